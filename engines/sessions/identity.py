"""The identity of an engine on this machine: what decides the numbers that it gives."""

import json
from collections.abc import Sequence

import qie
from qie.engines.backends import package_versions
from qie.engines.bundle.manifest import EngineRecord, Specialization
from qie.engines.machine import choose_gpu, cores, cpu_name, this_machine

__all__ = ["engine_identity"]


def engine_identity(
    engine: EngineRecord,
    *,
    written: Sequence[int] = (),
    device: int | None = None,
    specialization: Specialization = "none",
    threads: int = 0,
) -> str:
    """JSON of everything but its inputs that decides the numbers of ``engine``.

    Engines of one identity give equal bytes for equal inputs. The digests of its files are those of the manifest: of a
    bundle that somebody made or edited by hand, the key alone may be another engine's too.

    Args:
        engine: of a bundle.
        written: when each of its files was written: one that was damaged and then repaired has the same digest in the
            manifest all the time.
        device: CUDA index of the GPU; None for the first that fits.
        specialization: kernels of TensorRT for RTX, which sum in another order where they are compiled for a shape.
        threads: on the CPU, 0 for one per core: sums of ``w8a16`` depend on their number.

    Raises:
        EngineMismatchError: there is no such GPU.
    """
    facts: dict[str, object] = {
        "qie": qie.__version__,
        "component": engine.component,
        "part": engine.part,
        "backend": engine.backend,
        "compute_capability": engine.compute_capability,
        "key": engine.key,
        "files": [(file.path, file.sha256) for file in engine.files],
        "written": list(written),
        "packages": package_versions(),
    }
    if engine.compute_capability == "cpu":
        facts |= {"cpu": cpu_name(), "cores": cores(), "threads": threads}
    else:
        machine = this_machine()
        gpu = choose_gpu(machine, engine.compute_capability, device)
        facts |= {"gpu": gpu.name, "driver": machine.driver, "specialization": specialization}
    return json.dumps(facts, sort_keys=True)
