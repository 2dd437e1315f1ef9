"""All faults, and how one is made."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from qie.compiler.validation.report import Report
from qie.compiler.validation.run import Options, validate
from tests.support.faults.bundles import build_sound
from tests.support.faults.code import changed
from tests.support.faults.fault import Fault
from tests.support.faults.kinds import constants, editing, files, graphs, quantized, runtime, weights

__all__ = ["FAULTS", "KINDS", "inject"]

KINDS: dict[str, dict[str, Fault]] = {
    "Files": files.FAULTS,
    "Constants of the manifest": constants.FAULTS,
    "Weights and tables": weights.FAULTS,
    "Graphs": graphs.FAULTS,
    "Quantized graphs": quantized.FAULTS,
    "Code of the runtime": runtime.FAULTS,
    "Code of a whole edit": editing.FAULTS,
}
FAULTS: dict[str, Fault] = {name: fault for faults in KINDS.values() for name, fault in faults.items()}
assert len(FAULTS) == sum(map(len, KINDS.values())), "two faults have one name"


def inject(fault: Fault, sound: Callable[[str], Path], folder: Path) -> Report:
    """The report on a bundle with ``fault``.

    Args:
        fault: to be made.
        sound: gives the folder of a sound bundle by its name.
        folder: an empty one.
    """
    path = sound(fault.bundle)
    if fault.writes is not None:
        with changed(fault.writes):
            path = build_sound(fault.bundle, folder / "written")
    if fault.breaks is not None:
        path = Path(shutil.copytree(path, folder / "broken"))
        fault.breaks(path)
    golden = None if fault.golden is None else fault.golden(folder)
    with ExitStack() as stack:
        if fault.runs is not None:
            stack.enter_context(changed(fault.runs))
        return validate(path, Options(level=fault.level, golden=golden, bisect=fault.level != "structure"))
