"""Calibration of the published width: ``python -m bench.calibration [--scheme NAME] [--layers N] [--checkpoint FOLDER]``.

The checkpoint has the published widths, ``--layers`` blocks and as many layers of the language model and the vision
tower, and made-up weights; it is written into FOLDER where that does not exist. The benchmark makes the calibration of a
build with the scheme, its samples made of the built-in images, and extrapolates the time to all blocks by that of those
in the middle. Memory is that of the process, of which the checkpoint's maker is none.
"""

import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from bench.report import argument_parser, environment, write_report
from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.packing.calibrate import IMAGES
from qie.compiler.planning.calibration import SAMPLES, calibration_model
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
        checkpoint = replace(checkpoint, model=calibration_model(checkpoint.model))
        samples = draw_samples(read_images(IMAGES, options.samples), INSTRUCTIONS, options.samples)
        times: dict[str, list[float]] = {}
        start = time.perf_counter()
        last = start

        def progress(what: str, done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            times.setdefault(what, []).append(now - last)
            last = now

        measure(
            checkpoint,
            checkpoint.readers(),
            samples,
            model="",
            schemes=(options.scheme,),
            partial=PartialCalibration(path=temporary / "reached", key=""),
            progress=progress,
        )
        seconds = time.perf_counter() - start
    blocks = {name: fmean(times[name][2:-1]) for name in PUBLISHED}  # without the beginning, the first and the last
    whole = seconds + sum((count - (len(times[name]) - 1)) * blocks[name] for name, count in PUBLISHED.items())
    figures = {
        "scheme": options.scheme,
        "samples": options.samples,
        "area": checkpoint.model.areas.vae_area,
        "block_seconds": blocks,
        "segment_seconds": times,
        "all_seconds": whole,
        "peak_bytes": peak_bytes(),
    }
    machine = environment()
    rows = [
        ["CPU", f"{machine['cpu']}, {machine['cores']} cores"],
        ["scheme", options.scheme],
        *([f"one block of {name}", f"{of_one:.1f} s"] for name, of_one in blocks.items()),
        ["all of 60, 28 and 32, extrapolated", human_seconds(whole)],
        ["peak memory", f"{figures['peak_bytes'] / 1e9:.2f} GB"],
    ]
    print(table(rows))
    write_report(options, figures)


def peak_bytes() -> int:
    """Peak resident memory of this process, from the kernel."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return int(peak[1]) * 1024


if __name__ == "__main__":
    main()
