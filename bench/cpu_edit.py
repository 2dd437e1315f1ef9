"""An edit of the pocket model on the CPU against diffusers and OpenVINO: ``python -m bench.cpu_edit``.

It measures a whole edit from the shell, one step of the transformer, and the VAE. All peers run the same weights with
the same number of threads in one run of the benchmark; figures are medians after warm-up.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.report import WARM_UP, argument_parser, median_seconds, write_report
from qie.compiler.checkpoint.checkpoint import POCKET
from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.conditioning import condition
from qie.engines.editing.denoise import Denoiser, upload_schedule
from qie.engines.editing.edit import row_of, start_noise
from qie.engines.editing.editor import Editor
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from qie.engines.inputs.feeds import transformer_feed
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.schedule import sigmas
from qie.engines.machine import cores
from qie.engines.terminal import table

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "cat.jpg"
INSTRUCTION = "make it grayscale"

DIFFUSERS_EDIT = """
import sys
from pathlib import Path
from PIL import Image
from qie.compiler.validation.reference import load_reference
reference = load_reference(Path(sys.argv[1]))
edited = reference.edit([Image.open(sys.argv[2])], sys.argv[3], steps=int(sys.argv[4]), seed=1, cfg=1.0)
Image.fromarray(edited).save(sys.argv[5])
"""
"""The shortest script for diffusers: its pipeline with the checkpoint's image areas, without torchvision."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--bundle", default="pocket", help="name or folder of a bundle of the pocket model")
    parser.add_argument(
        "--checkpoint", type=Path, default=POCKET, help="checkpoint for the peers, default: the pocket model"
    )
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each, default: 7")
    options = parser.parse_args()
    import torch

    threads = cores()
    torch.set_num_threads(threads)
    editor = Editor(open_bundle(options.bundle), encoder_cache=EncoderCache(bytes_max=0))
    print(f"{threads} threads, torch {torch.__version__}, medians of {options.runs} runs")
    figures = {
        "threads": threads,
        "runs": options.runs,
        "edit": measure_edit(options, editor.bundle.manifest.defaults.steps),
        "transformer": measure_transformer(options, editor, threads),
        "vae": measure_vae(options, editor),
    }
    write_report(options, figures)


def measure_edit(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """A whole edit from the shell: time and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.png"
        qie = [str(Path(sys.executable).parent / "qie"), "run", str(IMAGE), INSTRUCTION, "--bundle", options.bundle]
        diffusers = [sys.executable, "-c", DIFFUSERS_EDIT, str(options.checkpoint)]
        commands = {
            "qie run": [*qie, "--seed", "1", "-o", out],
            "diffusers": [*diffusers, str(IMAGE), INSTRUCTION, str(steps), out],
        }
        figures = {}
        for name, command in commands.items():
            runs = []
            for _ in range(options.runs + 1):
                Path(out).unlink(missing_ok=True)
                runs.append(measure_process(command))
            seconds, peak = (statistics.median(column) for column in zip(*runs[1:], strict=True))
            figures[name] = {"seconds": seconds, "peak_bytes": peak}
    ratios = {key: figures["diffusers"][key] / figures["qie run"][key] for key in ("seconds", "peak_bytes")}
    print(f"\nOne edit from the shell, {steps} steps")
    rows = [[name, f"{f['seconds']:.2f} s", f"{f['peak_bytes'] / 2**20:.0f} MiB"] for name, f in figures.items()]
    print(table([*rows, ["ratio", f"{ratios['seconds']:.1f}", f"{ratios['peak_bytes']:.1f}"]], right=(1, 2)))
    return {**figures, "ratio": ratios, "steps": steps}


LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(json.dumps([time.perf_counter() - start, usage.ru_maxrss * 1024, status]))
"""
"""Prints time, peak memory and exit status of a command. Linux starts the peak of a child at that of its parent, so the
parent has to be small."""


def measure_process(command: list[str]) -> tuple[float, int]:
    """Seconds and peak bytes of a process."""
    launch = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
    done = subprocess.run(launch, capture_output=True, text=True, check=True)
    seconds, peak, status = json.loads(done.stdout.splitlines()[-1])
    if status != 0:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-2000:]}")
    return seconds, peak


def show(title: str, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Print seconds and their ratios to qie's; returns both."""
    ratios = {name: value / seconds["qie"] for name, value in seconds.items()}
    print(f"\n{title}")
    print(table([[name, f"{1000 * s:.2f} ms", f"{ratios[name]:.2f}"] for name, s in seconds.items()], right=(1, 2)))
    return {"seconds": dict(seconds), "ratio": ratios}


def measure_transformer(options: argparse.Namespace, editor: Editor, threads: int) -> dict[str, Any]:
    """One step of an edit."""
    import torch

    from qie.compiler.validation.reference import load_reference

    request = Request(
        images=[Image.open(IMAGE)], instructions=[INSTRUCTION], seeds=[1], steps=WARM_UP + options.runs, guidance=1.0
    )
    settings = resolve(request, editor.bundle.manifest)
    conditioning = condition(editor.stages, editor.tokenizer, request, settings)
    noise = start_noise(request, settings, editor.bundle.manifest)
    schedule = sigmas(editor.model.scheduler, steps=settings.steps, noise_tokens=settings.size.tokens)
    tables = modulation_tables(editor.bundle, schedule)
    arrays = transformer_feed(
        latents_BNC=noise,
        reference_BRC=conditioning.reference,
        prompt_BLD=conditioning.prompts[0],
        rotary=editor.model.rotary,
        grids=conditioning.grids,
        modulation_YM=tables.blocks[0],
        modulation_out_O=tables.out[0],
        dsigma=schedule[1] - schedule[0],
    )
    with editor.stages.session("transformer") as session:
        denoiser = Denoiser.start(
            session,
            [row_of(conditioning, settings, noise, 0)],
            schedule=upload_schedule(session, schedule, tables),
            rotary=editor.model.rotary,
            grids=conditioning.grids,
        )
        seconds = {"qie": median_seconds(options.runs, denoiser.step)}

    reference = load_reference(options.checkpoint)
    module = reference.pipeline.transformer
    hidden = torch.from_numpy(np.concatenate([arrays["latents"], arrays["reference"]], 1))
    prompt, timestep = torch.from_numpy(arrays["prompt_embeds"]), torch.tensor([0.5])
    shapes = [[(1, *grid) for grid in conditioning.grids]]

    def step(network: Any) -> Any:
        with torch.inference_mode():
            return network(
                hidden_states=hidden,
                encoder_hidden_states=prompt,
                timestep=timestep,
                img_shapes=shapes,
                return_dict=False,
            )

    seconds["diffusers eager"] = median_seconds(options.runs, lambda: step(module))
    compiled = torch.compile(module)
    seconds["diffusers torch.compile"] = median_seconds(options.runs, lambda: step(compiled))
    try:
        import openvino
    except ImportError:
        print("\nOpenVINO is not installed; run `pip install openvino` to compare with it")
    else:
        graph = next(e for e in editor.bundle.manifest.engines if e.component == "transformer")
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(str(editor.bundle.path / graph.path), "CPU", settings)
        request = model.create_infer_request()
        seconds["OpenVINO"] = median_seconds(options.runs, lambda: request.infer(arrays))
    return show(f"One transformer step, {hidden.shape[1]} image tokens, {prompt.shape[1]} text tokens", seconds)


def measure_vae(options: argparse.Namespace, editor: Editor) -> dict[str, Any]:
    """One image to latents and back."""
    import torch

    from qie.compiler.validation.reference import load_reference

    reference = load_reference(options.checkpoint)
    image = reference.reference_image(Image.open(IMAGE))
    (latents,) = editor.stages.encode([image])
    rows, columns, _ = latents.shape
    tokens = latents.reshape(rows * columns, -1)
    with torch.inference_mode():
        encode = {
            "qie": median_seconds(options.runs, lambda: editor.stages.encode([image])),
            "diffusers": median_seconds(options.runs, lambda: reference.encode_image(image)),
        }
        decode = {
            "qie": median_seconds(options.runs, lambda: editor.stages.decode([latents])),
            "diffusers": median_seconds(options.runs, lambda: reference.decode(tokens, rows, columns)),
        }
    height, width = image.shape[:2]
    return {
        "encode": show(f"VAE encode, {width}x{height}", encode),
        "decode": show(f"VAE decode, {width}x{height}", decode),
    }


if __name__ == "__main__":
    main()
