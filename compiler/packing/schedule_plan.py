"""The plan of ``add_schedule``: which tables a bundle lacks, and where the weights for them come from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.checkpoint.shards import ShardSource
from qie.compiler.packing.made_from import bundle_loras, bundle_recipe
from qie.compiler.packing.readers import checkpoint_readers
from qie.compiler.packing.shard_sources import shard_source
from qie.compiler.planning.plan import Plan, make_plan
from qie.compiler.planning.resolve import LoraSource
from qie.compiler.quantization.calibration import read_calibration
from qie.compiler.weights.modulation import modulation_weights
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import Manifest
from qie.engines.bundle.specs import Size
from qie.engines.errors import BuildError, CheckpointError, RequestError
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.sizes import fits
from qie.engines.inputs.stored_schedules import has_tables, stored_dtype
from qie.engines.progress import Progress

__all__ = ["SchedulePlan", "plan_schedule"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SchedulePlan:
    """Tables that are added to a bundle.

    Attributes:
        bundle: it gets the tables.
        steps: denoising steps.
        sizes: those at which it lacks tables; none where it has all.
        schedules: sigmas of the tables, float32 [S + 1], each once.
        plan: of a build from the checkpoint of the bundle; None where its own modulation weights are read.
        source: where the shards of the checkpoint come from; None where they are on this machine.
        shards: those that hold modulation weights and are fetched, in the order of their names.
    """

    bundle: Bundle
    steps: int
    sizes: tuple[Size, ...]
    schedules: tuple[NDArray[np.float32], ...]
    plan: Plan | None = None
    source: ShardSource | None = None
    shards: tuple[str, ...] = ()

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables."""
        record = self.bundle.manifest.model.modulation
        return len(self.schedules) * self.steps * record.values * stored_dtype(record).itemsize

    @property
    def fetch_bytes(self) -> int:
        """Bytes of weights that are fetched."""
        return sum(self._shard_bytes())

    @property
    def disk_bytes(self) -> int:
        """Peak use of the disk: the tables, and one shard."""
        return self.table_bytes + max(self._shard_bytes(), default=0)

    def reader(self, folder: Path, *, progress: Progress) -> TensorReader:
        """The transformer of the checkpoint, with the LoRAs and the smoothing of the bundle.

        Args:
            folder: for one shard, where these are fetched; it is made.
            progress: called with ("fetch", bytes done, bytes in all).

        Raises:
            CheckpointError: the weights are missing or damaged.
        """
        assert self.plan is not None, "the weights are in the bundle"
        checkpoint = self.plan.checkpoint
        if self.source is None:
            checkpoint = checkpoint.with_weights()
        else:
            total = self.fetch_bytes
            checkpoint = checkpoint.streamed(
                self.source, folder, progress=lambda done, _: progress("fetch", min(done, total), total)
            )
        return checkpoint_readers(replace(self.plan, checkpoint=checkpoint))["transformer"]

    def _shard_bytes(self) -> list[int]:
        return [] if self.source is None else [self.source.shards[path].bytes for path in self.shards]


def plan_schedule(
    bundle: Bundle,
    *,
    steps: int,
    sizes: Sequence[tuple[int, int]] | None = None,
    model: str | Path | None = None,
    revision: str | None = None,
    loras: Sequence[LoraSource] = (),
) -> SchedulePlan:
    """What ``add_schedule`` will do, of which see the arguments; no weights are read or fetched.

    Raises:
        RequestError: the bundle takes no such steps or sizes.
        CheckpointError: the checkpoint or a LoRA is missing, damaged or seen to be another one.
        BuildError: the bundle is of an earlier version, or no checkpoint is known.
    """
    manifest, record = bundle.manifest, bundle.manifest.model.modulation
    wanted = _wanted(manifest, steps, sizes)
    if record.digest is None:
        raise BuildError(
            f"{bundle.path} was built by an earlier version, which gave tables other names; build the bundle again"
        )
    lacking = tuple(size for size in wanted if not has_tables(manifest, steps, size))
    schedules = [sigmas(manifest.model.scheduler, steps=steps, noise_tokens=size.tokens) for size in lacking]
    distinct = tuple({values.tobytes(): values for values in schedules}.values())
    planned = SchedulePlan(bundle=bundle, steps=steps, sizes=lacking, schedules=distinct)
    if not lacking or record.file is not None:
        return planned
    plan = _checkpoint_plan(bundle, model, revision, loras)
    source = shard_source(plan.checkpoint)
    shards = () if source is None else _shards(source, plan)
    return replace(planned, plan=plan, source=source, shards=shards)


def _shards(source: ShardSource, plan: Plan) -> tuple[str, ...]:
    """The shards of ``source`` that hold tensors of the modulation."""
    names = {weight.name for weight in modulation_weights(plan.model.transformer, None)}
    paths = sorted(path for path in source.shards if path.startswith("transformer/"))
    return tuple(path for path in paths if not names.isdisjoint(source.tensors(path)))


def _wanted(manifest: Manifest, steps: int, sizes: Sequence[tuple[int, int]] | None) -> tuple[Size, ...]:
    """The sizes at which tables are wanted.

    Raises:
        RequestError: the bundle takes no such steps or sizes.
    """
    steps_max = manifest.model.scheduler.num_train_timesteps
    if not 1 <= steps <= steps_max:
        raise RequestError(
            f"the number of steps is {steps}, expected from 1 to {steps_max}; use another number", option="steps"
        )
    if sizes is None:
        return manifest.limits.buckets
    for width, height in sizes:
        if not fits(manifest.limits, width, height):
            raise RequestError(
                f"the bundle does not edit at {width}x{height}; choose a size with sides that are multiples of 16, "
                "within its limits, which `qie inspect` shows",
                option="size",
            )
    return tuple(dict.fromkeys(Size(width=width, height=height) for width, height in sizes))


def _checkpoint_plan(
    bundle: Bundle, model: str | Path | None, revision: str | None, loras: Sequence[LoraSource]
) -> Plan:
    """The plan of a build of ``bundle`` from its checkpoint.

    Raises:
        CheckpointError: the checkpoint or a LoRA is missing, damaged or seen to be another one.
        BuildError: no checkpoint is known.
    """
    manifest = bundle.manifest
    known = manifest.model.revision is not None or manifest.model.name == "pocket"
    if model is None and not known:
        raise BuildError(
            f"{bundle.path} has tables alone, and its checkpoint {manifest.model.name} is no hub id; name its folder",
            option="model",
        )
    if model is None:
        model, revision = manifest.model.name, revision or manifest.model.revision
    opened = bundle_loras(bundle, loras)
    checkpoint = open_checkpoint(str(model), revision=revision, weights=False)
    config, record = checkpoint.model.transformer, manifest.model.modulation
    if (config.layers, config.width, config.zero_cond_t) != (record.layers, record.width, record.zero_cond_t):
        raise CheckpointError(
            f"{model} has another transformer than {bundle.path}; name the checkpoint that it was built from",
            option="model",
        )
    calibration = None
    if manifest.calibration is not None:
        path = manifest.calibration.path
        calibration = bundle.folder.read(lambda folder: read_calibration(folder / path))
    return make_plan(
        checkpoint,
        recipe_name=manifest.recipe.name,
        recipe=bundle_recipe(bundle),
        loras=opened,
        destination=bundle.path,
        calibration=calibration,
        allow_unread=True,
    )
