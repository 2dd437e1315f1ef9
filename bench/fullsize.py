"""A build at full size with made-up weights: ``python -m bench.fullsize [--layers N] [--gpu RECIPE] [--json FILE]``.

Builds Qwen-Image-Edit-2511 with random weights by one call, stage by stage: seconds, CPU seconds, peak memory, bytes
read and written. The weights are made one shard at a time, so that the disk holds the bundle and one shard, and the
stages include the time to make them, which is given too; ``--folder`` writes them first and reads them from there. The
floor of the weights' stages is the time that a plain read of the tensors and a plain write of the files that are made
of them take in the same run, at the rates of ``--floor-gib`` GiB past the page cache.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench.report import argument_parser, environment, write_report
from bench.stages import Cost, Stages, plain_read, plain_write
from qie.compiler.packing.build import build
from qie.compiler.planning.estimate import estimate
from qie.compiler.planning.plan import Plan
from qie.compiler.planning.resolve import plan_build
from qie.compiler.synthetic.shards import SyntheticShards
from qie.compiler.synthetic.synthesize import plan_synthesis, synthesize
from qie.compiler.weights.weights_file import total_bytes
from qie.engines.bundle.bundle import Bundle
from qie.engines.progress import StageProgress, no_progress
from qie.engines.terminal import human_bytes, human_seconds, table

WEIGHTS = "weights of "
"""Beginning of the name of a stage that reads and writes weights."""


def main() -> None:
    options = arguments()
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="fullsize-", dir=options.work))
    os.environ["QIE_HOME"] = str(home / "home")
    try:
        figures = measure(options, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print(report(figures))
    write_report(options, figures)


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", default="2511", help="published model, default: 2511")
    parser.add_argument("--gpu", default="l40s", help="recipe, default: l40s")
    parser.add_argument("--layers", type=int, help="blocks of the transformer, default: as published")
    parser.add_argument("--language-layers", type=int, help="layers of the language model, default: as published")
    parser.add_argument("--memory-gib", type=float, help="host memory that the build may use, default: the machine's")
    parser.add_argument("--calibration", type=Path, help="calibration of an earlier run; default: a stage of the build")
    parser.add_argument("--keep-calibration", type=Path, help="file for the calibration that was made")
    parser.add_argument(
        "--work", type=Path, help="folder for everything that is written, default: that of temporary files"
    )
    parser.add_argument("--shard-gb", type=float, help="largest shard in GB, default: as published")
    parser.add_argument("--folder", action="store_true", help="write the checkpoint to the disk first")
    parser.add_argument(
        "--floor-gib", type=float, default=4, help="GiB that are written and read for the floor, default: 4"
    )
    return parser.parse_args()


def measure(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Synthesize, plan, build; the figures."""
    stages = Stages()
    read, write = floor(home, int(options.floor_gib * 2**30))
    with stages.stage("synthesize"):
        synthesize(
            plan_synthesis(
                options.model,
                home / "checkpoint",
                layers=options.layers,
                language_layers=options.language_layers,
                on_demand=not options.folder,
                shard_bytes=None if options.shard_gb is None else int(options.shard_gb * 1e9),
            )
        )
    with stages.stage("graphs"):
        plan = plan_build(
            home / "checkpoint", gpu=options.gpu, calibration=options.calibration, memory_gib=options.memory_gib
        )
    start = time.perf_counter()
    with counted_fetches(stages):
        bundle = build(plan, stream=not options.folder, progress=stages)
    seconds = time.perf_counter() - start
    stages.end()
    if options.keep_calibration is not None and bundle.manifest.calibration is not None:
        shutil.copyfile(bundle.path / bundle.manifest.calibration.path, options.keep_calibration)
    estimated = estimate(plan)
    return {
        "model": options.model,
        "layers": plan.model.transformer.layers,
        "language_layers": plan.model.language.layers,
        "recipe": options.gpu,
        "seconds": seconds,
        "bundle_bytes": bundle.bytes,
        "planned_bundle_bytes": estimated.disk_bytes,
        "read_bytes_per_second": read,
        "write_bytes_per_second": write,
        "fetched_bytes": stages.fetched_bytes,
        "fetch_seconds": stages.fetch_seconds,
        "stages": {
            name: asdict(cost) | {"floor_ratio": ratio(name, cost, plan, read, write)}
            for name, cost in stages.costs.items()
        },
        "engines": engines(bundle),
        "planned_host_bytes": estimated.host_bytes,
    }


def ratio(name: str, cost: Cost, plan: Plan, read: float, write: float) -> float | None:
    """How often the floor's time a stage took that reads and writes weights; None for another one.

    The floor is that of the bytes of the tensors, and of the files of weights and tables that are made of them.
    """
    if not name.startswith(WEIGHTS):
        return None
    written = written_bytes(plan, name.removeprefix(WEIGHTS))
    return cost.seconds / (cost.total / read + written / write)


def written_bytes(plan: Plan, subfolder: str) -> int:
    """Bytes of the files that are made of the weights of ``subfolder`` in one pass."""
    graphs = [part for planned in plan.components if planned.graph.subfolder == subfolder for part in planned.parts]
    tables = plan.tables_bytes + plan.modulation_bytes if subfolder == "transformer" else 0
    return sum(total_bytes(graph.weights) for graph in graphs) + tables


@contextmanager
def counted_fetches(stages: Stages) -> Iterator[None]:
    """Count the shards that are made on demand in the block."""
    fetch = SyntheticShards.fetch

    def counted(self: SyntheticShards, path: str, target: Path, *, progress: StageProgress = no_progress) -> None:
        with stages.fetching(self.shards[path].bytes):
            fetch(self, path, target, progress=progress)

    with patch.object(SyntheticShards, "fetch", counted):
        yield


def engines(bundle: Bundle) -> list[dict[str, Any]]:
    """What every compiled engine took."""
    return [
        {
            "engine": engine.path,
            "bytes": sum(file.bytes for file in engine.files),
            "seconds": engine.build_seconds,
            "peak_bytes": engine.build_peak_bytes,
        }
        for engine in bundle.manifest.engines
    ]


def floor(folder: Path, count: int) -> tuple[float, float]:
    """Bytes per second of a plain read, and of a plain write, of a file of ``count`` bytes that is in no cache."""
    file = folder / "floor"
    written = plain_write(file, count)
    taken = plain_read(file)
    file.unlink()
    return count / taken, count / written


def report(figures: Mapping[str, Any]) -> str:
    """The figures as tables."""
    machine = environment()
    heading = [
        ["CPU", f"{machine['cpu']}, {machine['cores']} cores"],
        ["model", f"{figures['model']}, {figures['layers']} blocks, {figures['language_layers']} language layers"],
        ["recipe", figures["recipe"]],
        ["build", human_seconds(figures["seconds"])],
        ["bundle", f"{human_bytes(figures['bundle_bytes'])}, planned {human_bytes(figures['planned_bundle_bytes'])}"],
        [
            "shards made",
            f"{human_bytes(figures['fetched_bytes'])} in {human_seconds(figures['fetch_seconds'])}, beside the stages",
        ],
        ["plain read", f"{figures['read_bytes_per_second'] / 1e9:.2f} GB/s"],
        ["plain write", f"{figures['write_bytes_per_second'] / 1e9:.2f} GB/s"],
    ]
    rows = [
        [
            name,
            human_seconds(cost["seconds"]),
            human_seconds(cost["cpu_seconds"]),
            human_bytes(cost["peak_bytes"]),
            human_bytes(cost["read_bytes"]),
            human_bytes(cost["written_bytes"]),
            "" if cost["floor_ratio"] is None else f"{cost['floor_ratio']:.1f}",
        ]
        for name, cost in figures["stages"].items()
    ]
    built = [
        [
            engine["engine"],
            human_bytes(engine["bytes"]),
            human_seconds(engine["seconds"]),
            human_bytes(engine["peak_bytes"]),
        ]
        for engine in figures["engines"]
    ]
    header = ["stage", "time", "CPU time", "peak memory", "read", "written", "x floor"]
    return "\n\n".join(
        [
            table(heading),
            table(rows, header=header, right=[1, 2, 3, 4, 5, 6]),
            table(built, header=["engine", "size", "time", "compiler's peak"], right=[1, 2, 3]),
        ]
    )


if __name__ == "__main__":
    main()
