"""qie compiles Qwen-Image-Edit into engines for one GPU and runs edits with them.

Every public name is here. A name is imported when it is first used: ``import qie`` is cheap, a program that only edits
never imports the compiler, and NumPy comes with the first ``Editor``.

``qie.compiler`` works ahead of time and needs ``qie[compile]``; ``qie.engines`` is the thin runtime (NumPy, Pillow,
tokenizers and one backend); ``qie.recipes`` is data: one TOML file per GPU.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qie.compiler.packing.add_schedule import add_schedule
    from qie.compiler.packing.build import build
    from qie.compiler.planning.plan import Plan
    from qie.compiler.planning.resolve import plan_build
    from qie.engines.bundle.bundle import Bundle, open_bundle
    from qie.engines.editing.editor import Editor
    from qie.engines.editing.encoder_cache import EncoderCache
    from qie.engines.editing.request import Edit, Request
    from qie.engines.errors import (
        BackendMissingError,
        BuildError,
        BundleError,
        BusyError,
        CalibrationError,
        CancelledError,
        CheckpointError,
        EngineError,
        EngineMismatchError,
        ExportError,
        GoldenError,
        ImageError,
        LateError,
        QieError,
        RecipeError,
        RequestError,
    )
    from qie.engines.progress import Progress

# onnxruntime 1.32 sends usage events to Microsoft unless this is set before its first import
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "BackendMissingError",
    "BuildError",
    "Bundle",
    "BundleError",
    "BusyError",
    "CalibrationError",
    "CancelledError",
    "CheckpointError",
    "Edit",
    "Editor",
    "EncoderCache",
    "EngineError",
    "EngineMismatchError",
    "ExportError",
    "GoldenError",
    "ImageError",
    "LateError",
    "Plan",
    "Progress",
    "QieError",
    "RecipeError",
    "Request",
    "RequestError",
    "__version__",
    "add_schedule",
    "build",
    "open_bundle",
    "plan_build",
]

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "qie.engines.bundle.bundle",
    "Edit": "qie.engines.editing.request",
    "Editor": "qie.engines.editing.editor",
    "EncoderCache": "qie.engines.editing.encoder_cache",
    "Plan": "qie.compiler.planning.plan",
    "Progress": "qie.engines.progress",
    "Request": "qie.engines.editing.request",
    "add_schedule": "qie.compiler.packing.add_schedule",
    "build": "qie.compiler.packing.build",
    "open_bundle": "qie.engines.bundle.bundle",
    "plan_build": "qie.compiler.planning.resolve",
}
"""The module of every name but the errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOMES.get(name, "qie.engines.errors")), name)
    except ModuleNotFoundError as problem:
        from qie.engines.errors import BackendMissingError

        raise BackendMissingError(
            f"{problem.name} is not installed, and qie.{name} needs it; run `pip install 'qie[compile]'`"
        ) from problem
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
