"""Calibration at the published width: ``python -m bench.calibration [--scheme NAME] [--checkpoint FOLDER]``.

The checkpoint has the published widths, few blocks of the transformer, the language model and the vision tower, and
made-up weights; it is written into FOLDER where that does not exist. The benchmark makes the calibration of a build
with the scheme, of the built-in images, and extrapolates the time to all blocks by that of those in the middle. Memory
is that of this process; the checkpoint is written in another one.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from bench.report import argument_parser, environment, write_report
from bench.stages import peak_bytes
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.packing.calibrate import IMAGES
from qie.compiler.planning.calibration import SAMPLES, calibration_area, calibration_model
from qie.compiler.quantization.instructions import INSTRUCTIONS
from qie.compiler.quantization.measure import measure
from qie.compiler.quantization.partial import PartialCalibration
from qie.compiler.quantization.samples import draw_samples, read_images
from qie.compiler.quantization.schemes import SCHEMES
from qie.engines.terminal import human_seconds, table

PUBLISHED = {"vision": 32, "language": 28, "transformer": 60}
"""Blocks of the published 2511."""

MAKE = """
import sys
from dataclasses import replace
from pathlib import Path
from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
layers = int(sys.argv[2])
architecture = replace(ARCHITECTURES["qwen-image-edit-2511"], num_layers=layers, text_layers=layers,
                       vision_depth=layers, vision_fullatt_block_indexes=(layers - 1,))
write_checkpoint(Path(sys.argv[1]), architecture, dtype="bfloat16")
"""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--scheme", choices=tuple(SCHEMES), default="fp8", help="scheme of the build, default: fp8")
    parser.add_argument("--layers", type=int, default=4, help="blocks of every component, default: 4, at least 3")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"forward passes, default: {SAMPLES}")
    parser.add_argument("--checkpoint", type=Path, help="folder of the made-up checkpoint, to use it again")
    options = parser.parse_args()
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = options.checkpoint or temporary / "checkpoint"
        if not folder.exists():
            subprocess.run([sys.executable, "-c", MAKE, str(folder), str(options.layers)], check=True)
        checkpoint = open_checkpoint(str(folder))
        checkpoint = replace(checkpoint, model=calibration_model(checkpoint.model, calibration_area(options.scheme)))
        samples = draw_samples(read_images(IMAGES, options.samples), INSTRUCTIONS, options.samples)
        times: dict[str, list[float]] = {}
        cpu: dict[str, list[float]] = {}
        start = time.perf_counter(), time.process_time()
        last = start

        def progress(what: str, done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter(), time.process_time()
            times.setdefault(what, []).append(now[0] - last[0])
            cpu.setdefault(what, []).append(now[1] - last[1])
            last = now

        measure(
            checkpoint,
            checkpoint.readers(),
            samples,
            model="",
            schemes={"language": (options.scheme,), "transformer": (options.scheme,)},
            partial=PartialCalibration(path=temporary / "reached", key=""),
            progress=progress,
        )
        seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    whole, blocks = of_all(times, seconds)
    cpu_whole, cpu_blocks = of_all(cpu, cpu_seconds)
    figures = {
        "scheme": options.scheme,
        "samples": options.samples,
        "area": checkpoint.model.areas.vae_area,
        "block_seconds": blocks,
        "block_cpu_seconds": cpu_blocks,
        "segment_seconds": times,
        "segment_cpu_seconds": cpu,
        "all_seconds": whole,
        "all_cpu_seconds": cpu_whole,
        "peak_bytes": peak_bytes(),
    }
    machine = environment()
    rows = [
        ["CPU", f"{machine['cpu']}, {machine['cores']} cores"],
        ["scheme", options.scheme],
        *(
            [f"one block of {name}", f"{of_one:.1f} s, CPU time {cpu_blocks[name]:.1f} s"]
            for name, of_one in blocks.items()
        ),
        ["all of 60, 28 and 32, extrapolated", f"{human_seconds(whole)}, CPU time {human_seconds(cpu_whole)}"],
        ["peak memory", f"{figures['peak_bytes'] / 1e9:.2f} GB"],
    ]
    print(table(rows))
    write_report(options, figures)


def of_all(segments: Mapping[str, Sequence[float]], seconds: float) -> tuple[float, dict[str, float]]:
    """Seconds of all blocks, and of one: a mean without the beginning, the first block and the last."""
    blocks = {name: fmean(segments[name][2:-1]) for name in PUBLISHED}
    more = (PUBLISHED[name] - (len(segments[name]) - 1) for name in PUBLISHED)
    return seconds + sum(count * of_one for count, of_one in zip(more, blocks.values(), strict=True)), blocks


if __name__ == "__main__":
    main()
