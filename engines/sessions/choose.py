"""Choose the engines of a bundle that this machine can run, and explain why it cannot run others."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from qie.engines.backends import (
    BACKENDS,
    available,
    cuda_fix,
    cuda_lacking,
    distribution,
    install_command,
    serves_gpu,
    version,
)
from qie.engines.bundle.bundle import Bundle, bundles, open_bundle
from qie.engines.bundle.checks import TENSORS
from qie.engines.bundle.manifest import COMPONENTS, Component, EngineRecord
from qie.engines.errors import BackendMissingError, BundleError, EngineMismatchError, QieError
from qie.engines.machine import Machine, gpu_misfit, this_machine

__all__ = ["Engines", "choose_engines", "newest_runnable", "refusal"]


Engines = dict[Component, tuple[EngineRecord, ...]]
"""Component -> its engine, or those of its parts in order."""


def choose_engines(bundle: Bundle, device: int | None = None, *, elsewhere: Collection[Component] = ()) -> Engines:
    """The first engine of each component that this machine can run, those for a GPU all for one.

    Of a component in parts it is one engine for each part, all of one target.

    Args:
        bundle: an opened bundle.
        device: CUDA index of the GPU to run on; None for any.
        elsewhere: components that a server runs, of which no engine is chosen.

    Raises:
        EngineMismatchError: a component has engines, and this machine, or that GPU, can run none of them.
        BackendMissingError: it could, with a package that is not installed.
        BundleError: a component has no engine, or lacks one of its parts.
    """
    used = [engine for engine in bundle.manifest.engines if engine.component not in elsewhere]
    machine = this_machine() if any(e.compute_capability != "cpu" for e in used) else None
    chosen = _chosen(bundle, machine, device, elsewhere)
    capabilities = [engines[0].compute_capability for engines in chosen.values()]
    targets = [capability for capability in dict.fromkeys(capabilities) if capability != "cpu"]
    if device is not None and not targets:
        raise EngineMismatchError(
            f"the engines of {bundle.path} that run here are for the CPU, and GPU {device} was chosen; choose none, or "
            "build for that GPU with a recipe of `qie recipes`",
            option="device",
        )
    if machine is None or len(targets) < 2:
        return chosen
    for target in targets:
        with suppress(QieError):
            gpus = tuple(gpu for gpu in machine.gpus if gpu.compute_capability == target)
            return _chosen(bundle, replace(machine, gpus=gpus), None, elsewhere)
    raise EngineMismatchError(
        f"the engines of {bundle.path} that run here are for GPUs of compute capability {' and '.join(targets)}, and "
        "an edit uses one GPU; build the bundle again with `qie build`"
    )


def _chosen(bundle: Bundle, machine: Machine | None, device: int | None, elsewhere: Collection[Component]) -> Engines:
    """The first engine of each component that ``machine`` can run; raises as ``choose_engines`` does."""
    chosen: Engines = {}
    for component in (component for component in COMPONENTS if component not in elsewhere):
        engines = _in_parts([e for e in bundle.manifest.engines if e.component == component])
        if not engines and any(graph.component == component for graph in bundle.manifest.graphs):
            raise BundleError(
                f"bundle {bundle.path} has no engine for {component} yet; run `qie build --finish "
                f"{bundle.path}` on the machine with its GPU"
            )
        if not engines:
            raise BundleError(f"bundle {bundle.path} has no engine for {component}; build it again with `qie build`")
        complete = [parts for parts in engines if _lacking(parts) is None]
        if not complete:
            raise BundleError(
                f"bundle {bundle.path} lacks part {_lacking(engines[0])} of {component} for {engines[0][0].backend}/"
                f"{engines[0][0].compute_capability}; build it again with `qie build`"
            )
        obstacles = [_first_obstacle(parts, machine, device) for parts in complete]
        fitting = [parts for parts, obstacle in zip(complete, obstacles, strict=True) if obstacle is None]
        if not fitting:
            missing = all(isinstance(obstacle, BackendMissingError) for obstacle in obstacles)
            kind = BackendMissingError if missing else EngineMismatchError
            option = next((obstacle.option for obstacle in obstacles if obstacle is not None), None)
            raise kind(_joined(dict.fromkeys(str(obstacle) for obstacle in obstacles)), option=option)
        chosen[component] = fitting[0]
    return chosen


def _in_parts(engines: Sequence[EngineRecord]) -> list[tuple[EngineRecord, ...]]:
    """The engines of one component as groups of one target, each with the parts that there are, in order."""
    groups: list[dict[int, EngineRecord]] = []
    for engine in engines:
        target = engine.backend, engine.compute_capability
        for group in groups:
            other = next(iter(group.values()))
            if (other.backend, other.compute_capability) == target and engine.part not in group:
                group[engine.part] = engine
                break
        else:
            groups.append({engine.part: engine})
    return [tuple(group[part] for part in sorted(group)) for group in groups]


def _lacking(parts: Sequence[EngineRecord]) -> int | None:
    """Number of the first part, from 1, that is not among ``parts``; None where all are there."""
    for number, engine in enumerate(parts):
        if engine.part != number:
            return number + 1
    _, outputs = TENSORS[parts[-1].component]
    return None if outputs.keys() <= {spec.name for spec in parts[-1].outputs} else len(parts) + 1


def _first_obstacle(parts: Sequence[EngineRecord], machine: Machine | None, device: int | None) -> QieError | None:
    """The first reason why ``machine`` cannot run one of ``parts``."""
    return next((found for part in parts if (found := _obstacle(part, machine, device)) is not None), None)


def newest_runnable(device: int | None = None, *, elsewhere: Collection[Component] = ()) -> Bundle:
    """The newest bundle that has a name and whose engines this machine, or its GPU ``device``, can run.

    Raises:
        BundleError, EngineMismatchError, BackendMissingError: there is none; the reason why the newest cannot run.
    """
    refused: QieError | None = None
    for path in bundles():
        try:
            bundle = open_bundle(path)
            choose_engines(bundle, device, elsewhere=elsewhere)
        except QieError as problem:
            refused = refused or problem
        else:
            return bundle
    if refused is None:
        return open_bundle()  # says that there is none
    raise refused


def _joined(sentences: Iterable[str]) -> str:
    """Several error messages as one: the problem of each, then the fix of each."""
    parts = [sentence.partition("; ") for sentence in sentences]
    return f"{', and '.join(problem for problem, *_ in parts)}; {', or '.join(dict.fromkeys(fix for *_, fix in parts))}"


def refusal(engine: EngineRecord, machine: Machine | None = None) -> str | None:
    """Why ``machine`` (None: this one) cannot run ``engine``, with the fix; None where it can."""
    obstacle = _obstacle(engine, machine)
    return None if obstacle is None else str(obstacle)


def _obstacle(engine: EngineRecord, machine: Machine | None, device: int | None = None) -> QieError | None:
    """The first reason why ``machine`` cannot run ``engine``: backend, GPU, package, driver or version."""
    target = f"{engine.component} is built for {engine.backend}/{engine.compute_capability}"
    backend = BACKENDS.get(engine.backend)
    if backend is None:
        return EngineMismatchError(
            f"{target}, which this qie cannot execute; build for this machine with the recipe cpu"
        )
    on_gpu = engine.compute_capability != "cpu"
    if on_gpu:
        machine = machine or this_machine()
        if obstacle := _gpu_obstacle(target, engine, machine, device):
            return obstacle
    if not available(engine.backend):
        return BackendMissingError(
            f"{target}, which is not installed here; run `{install_command(engine.backend, engine.compute_capability)}`"
        )
    if on_gpu and backend.gpu_package is not None and not serves_gpu():
        return BackendMissingError(
            f"{target}, and the {engine.backend} that is installed here uses only the CPU; run `{backend.gpu_install}`"
        )
    if machine is None or not on_gpu:
        return None
    return _driver_obstacle(target, engine, machine) or _version_obstacle(target, engine)


def _gpu_obstacle(target: str, engine: EngineRecord, machine: Machine, device: int | None) -> QieError | None:
    misfit = gpu_misfit(machine, engine.compute_capability, device)
    if misfit is None:
        return None
    if not machine.gpus:
        found, _, fix = misfit.partition("; ")
        return EngineMismatchError(f"{target}, and {found}; {fix}, or build for this machine with the recipe cpu")
    return EngineMismatchError(f"{target}, and {misfit}", option=None if device is None else "device")


def _driver_obstacle(target: str, engine: EngineRecord, machine: Machine) -> QieError | None:
    """Why the driver cannot run the installed packages of the backend of ``engine``."""
    needed = cuda_lacking(engine.backend, machine.cuda)
    if needed is None or machine.cuda is None:
        return None
    fix = cuda_fix(engine.backend, machine.cuda)
    driver = "the driver" if machine.driver is None else f"driver {machine.driver}"
    return EngineMismatchError(
        f"{target}, whose packages here need a driver for CUDA {needed}, and {driver} serves CUDA {machine.cuda}; {fix}"
    )


def _version_obstacle(target: str, engine: EngineRecord) -> QieError | None:
    """Why the installed version of a version-locked backend cannot run ``engine``."""
    if not BACKENDS[engine.backend].version_locked:
        return None
    try:
        installed = version(engine.backend)
    except BackendMissingError as problem:
        return problem
    if installed != engine.backend_version:
        return EngineMismatchError(
            f"{target}, version {engine.backend_version}, but version {installed} is installed; build the bundle again "
            f"with `qie build`, or run `pip install {distribution(engine.backend)}=={engine.backend_version}`"
        )
    return None
