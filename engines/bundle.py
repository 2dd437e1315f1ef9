"""Bundles on disk: where they lie, how one is found and opened, and which of its engines fit this machine."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qie.engines.errors import BackendMissingError, BundleError, EngineMismatchError, QieError
from qie.engines.files import qie_home, sha256_of
from qie.engines.machine import Machine, this_machine
from qie.engines.manifest import COMPONENTS, MANIFEST, Component, EngineRecord, Manifest, read_manifest
from qie.engines.sessions import BACKENDS, available, cuda_needed, distribution, serves_gpu, version

__all__ = [
    "Bundle",
    "bundles",
    "bundles_folder",
    "choose_engines",
    "is_bundle",
    "locate",
    "open_bundle",
    "refusal",
    "remove_bundle",
    "verify",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(record.bytes for record in self.manifest.files())


def bundles_folder() -> Path:
    """Where bundles live by name."""
    return qie_home() / "bundles"


def bundles() -> tuple[Path, ...]:
    """Folders of the bundles that have a name, newest first; whether they open is not checked."""
    found = [path.parent for path in bundles_folder().glob(f"[!.]*/{MANIFEST}")]
    return tuple(sorted(found, key=lambda path: (-(path / MANIFEST).stat().st_mtime, path.name)))


def is_bundle(path: Path) -> bool:
    """Whether the folder ``path`` is qie's to replace or delete: a manifest says so, or it lies where bundles live.

    Other programs have a manifest.json too; a damaged bundle counts where it has a name.
    """
    if not (path / MANIFEST).is_file():
        return False
    if path.resolve().parent == bundles_folder().resolve():
        return True
    try:
        data = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    return isinstance(data, dict) and {"schema", "qie", "engines"} <= data.keys()


def open_bundle(which: str | None = None) -> Bundle:
    """Open a bundle by name or folder; None is the newest one.

    The manifest is read and every file's presence and size compared with it; ``verify`` reads contents.

    Raises:
        BundleError: there is no such bundle, its manifest is unreadable, or a file is missing or of another size.
    """
    path = locate(which)
    bundle = Bundle(path=path, manifest=read_manifest(path))
    for record in bundle.manifest.files():
        file = path / record.path
        if not file.is_file():
            raise BundleError(f"bundle {path} lacks {record.path}; build it again with `qie build`")
        if file.stat().st_size != record.bytes:
            raise BundleError(
                f"{file} has {file.stat().st_size:,} bytes, the manifest says {record.bytes:,}; "
                "build the bundle again with `qie build`"
            )
    return bundle


def verify(bundle: Bundle, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Compare the content of every file with its digest; ``progress`` is called with (bytes done, bytes).

    Raises:
        BundleError: a file's content is not what was built.
    """
    done = 0
    for record in bundle.manifest.files():
        if sha256_of(bundle.path / record.path) != record.sha256:
            raise BundleError(f"{bundle.path / record.path} is damaged; build the bundle again with `qie build`")
        done += record.bytes
        if progress is not None:
            progress(done, bundle.bytes)


def remove_bundle(path: Path) -> None:
    """Delete the bundle in the folder ``path``.

    Raises:
        BundleError: the folder is no bundle.
    """
    if not is_bundle(path):
        raise BundleError(f"{path} was not built by qie, so it is not deleted; `qie list` shows the bundles")
    (path / MANIFEST).unlink()  # first, so that what is half deleted does not open
    shutil.rmtree(path)


def choose_engines(bundle: Bundle) -> dict[Component, EngineRecord]:
    """The first engine of each component that fits this machine.

    Raises:
        EngineMismatchError: a component has engines, none of which fits.
        BackendMissingError: the only thing in the way is a package that is not installed.
        BundleError: a component has no engine at all.
    """
    machine = this_machine() if any(e.compute_capability != "cpu" for e in bundle.manifest.engines) else None
    chosen: dict[Component, EngineRecord] = {}
    for component in COMPONENTS:
        engines = [e for e in bundle.manifest.engines if e.component == component]
        if not engines and any(graph.component == component for graph in bundle.manifest.graphs):
            raise BundleError(
                f"bundle {bundle.path} has the graph of {component} and no engine yet; run `qie build --finish "
                f"{bundle.path}` on the machine with its GPU"
            )
        if not engines:
            raise BundleError(f"bundle {bundle.path} has no engine for {component}; build it again with `qie build`")
        obstacles = [_obstacle(engine, machine) for engine in engines]
        fitting = [engine for engine, obstacle in zip(engines, obstacles, strict=True) if obstacle is None]
        if not fitting:
            missing = all(isinstance(obstacle, BackendMissingError) for obstacle in obstacles)
            kind = BackendMissingError if missing else EngineMismatchError
            raise kind("; ".join(dict.fromkeys(str(obstacle) for obstacle in obstacles)))
        chosen[component] = fitting[0]
    return chosen


def refusal(engine: EngineRecord, machine: Machine | None = None) -> str | None:
    """Why ``machine`` (None: this one) cannot run ``engine``, with what to do about it; None where it can."""
    obstacle = _obstacle(engine, machine)
    return None if obstacle is None else str(obstacle)


def _obstacle(engine: EngineRecord, machine: Machine | None) -> QieError | None:
    """What keeps ``machine`` from running ``engine``: the first of GPU, backend, driver and version."""
    target = f"{engine.component} is built for {engine.backend}/{engine.compute_capability}"
    backend = BACKENDS.get(engine.backend)
    if backend is None:
        return EngineMismatchError(
            f"{target}, which this qie cannot execute; build for this machine with `qie build --gpu cpu`"
        )
    on_gpu = engine.compute_capability != "cpu"
    if on_gpu:
        machine = machine or this_machine()
        if obstacle := _gpu_obstacle(target, engine, machine):
            return obstacle
    if not available(engine.backend):
        return BackendMissingError(f"{target}, which is not installed here; run `{backend.install}`")
    if on_gpu and engine.backend == "onnxruntime" and not serves_gpu():
        return BackendMissingError(
            f"{target}, and the onnxruntime that is installed here uses the processor alone; run "
            "`pip uninstall --yes onnxruntime && pip install 'qie[cuda]'`"
        )
    return _version_obstacle(target, engine, machine)


def _gpu_obstacle(target: str, engine: EngineRecord, machine: Machine) -> QieError | None:
    if not machine.gpus:
        return EngineMismatchError(
            f"{target}, and this machine has no NVIDIA GPU that `nvidia-smi` lists; build for this machine with "
            "`qie build --gpu cpu`"
        )
    if all(gpu.compute_capability != engine.compute_capability for gpu in machine.gpus):
        found = ", ".join(dict.fromkeys(f"{gpu.name} ({gpu.compute_capability})" for gpu in machine.gpus))
        return EngineMismatchError(
            f"{target}, and this machine has {found}; build for that GPU with `qie build --gpu NAME`, "
            "`qie recipes` lists the names"
        )
    return None


def _version_obstacle(target: str, engine: EngineRecord, machine: Machine | None) -> QieError | None:
    """Engines of TensorRT need a driver that serves its CUDA, and the version that built them."""
    backend = BACKENDS[engine.backend]
    if not backend.bound or machine is None:
        return None
    packages = dict(backend.distributions)
    needed = cuda_needed(engine.backend)
    served = None if machine.cuda is None else int(machine.cuda.partition(".")[0])
    if served is not None and needed > served:
        older = f"'cuda-python<{served + 1}' {packages[served]}" if served in packages else ""
        mend = f"update the driver, or run `pip install {older}`" if older else "update the driver"
        return EngineMismatchError(
            f"{target}, whose packages here need a driver for CUDA {needed}, and driver {machine.gpus[0].driver} "
            f"serves CUDA {machine.cuda}; {mend}"
        )
    try:
        installed = version(engine.backend)
    except BackendMissingError as problem:
        return problem
    if installed != engine.backend_version:
        return EngineMismatchError(
            f"{target} by version {engine.backend_version}, and version {installed} is installed, which cannot load "
            f"it; build the bundle again with `qie build`, or run `pip install {distribution(engine.backend)}=="
            f"{engine.backend_version}`"
        )
    return None


def locate(which: str | None) -> Path:
    """The folder of a bundle by name or folder; None is the newest one.

    Raises:
        BundleError: there is no such bundle.
    """
    if which is None:
        found = bundles()
        if not found:
            raise BundleError(
                f"there is no bundle in {bundles_folder()}; make one with `qie build pocket --gpu cpu`, "
                "or name one with --bundle"
            )
        return found[0]
    named = bundles_folder() / which
    for path in (named, Path(which)):
        if (path / MANIFEST).is_file():
            return path
    known = ", ".join(path.name for path in bundles()) or "none"
    raise BundleError(f"there is no bundle {which!r}, neither by name (known: {known}) nor as a folder; see `qie list`")
