"""Edits of many clients at once, against one after the other: ``python -m bench.serving``.

The same requests, which differ in their seeds, are sent by 1, 2, 4 and 8 clients, each of which waits for its answer
before it sends the next one: to the service in this process, and to `qie serve` over HTTP. A step of the transformer is
timed by itself for every size of a batch, because that is all that batches can save. The images of all runs are
compared byte by byte.
"""

import argparse
import base64
import io
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from bench.report import argument_parser, median_seconds, write_report
from bench.served import batched_pocket, served
from qie.engines.editing.conditioning import condition
from qie.engines.editing.denoise import Denoiser, upload_schedule
from qie.engines.editing.edit import row_of, start_noise, table_dtype
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.editing.settings import resolve
from qie.engines.inputs.image import encode_image, load_image
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.schedule import sigmas
from qie.engines.machine import cores
from qie.engines.serving.service import Service
from qie.engines.terminal import table

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "cat.jpg"
INSTRUCTION = "tint it purple"
CLIENTS = (1, 2, 4, 8)

Edit = Callable[[int], bytes]
"""The PNG of a seed."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--requests", type=int, default=64, help="requests of every run, default: 64")
    options = parser.parse_args()
    print(f"{cores()} cores, {options.requests} requests of every run")
    with tempfile.TemporaryDirectory() as folder:
        bundle = batched_pocket(Path(folder), batch=max(CLIENTS))
        steps = measure_steps(bundle)
        runs = measure_service(bundle, options) | measure_http(bundle, options)
    images = {image for run in runs.values() for image in run.pop("images")}
    assert len(images) == options.requests, "an image depends on what else is edited"
    rows = [
        [
            name,
            str(clients),
            f"{run['per_second']:.1f}",
            f"{run['ratio']:.2f}",
            "" if run["mean_batch"] is None else f"{run['mean_batch']:.1f}",
        ]
        for (name, clients), run in runs.items()
    ]
    print(table(rows, header=("through", "clients", "edits/s", "ratio", "mean batch"), right=(1, 2, 3, 4)))
    figures = {
        "requests": options.requests,
        "cores": cores(),
        "step_seconds": steps,
        "throughput": [{"through": name, "clients": clients} | run for (name, clients), run in runs.items()],
    }
    write_report(options, figures)


def measure_steps(bundle: Path) -> dict[str, float]:
    """Seconds of a step of the transformer by the size of its batch."""
    found = {}
    with Editor(bundle, residency="resident") as editor:
        request = Request(images=[load_image(IMAGE).image], instructions=[INSTRUCTION], seeds=list(range(max(CLIENTS))))
        settings, manifest = resolve(request, editor.bundle.manifest), editor.bundle.manifest
        schedule = sigmas(manifest.model.scheduler, steps=settings.steps, noise_tokens=settings.size.tokens)
        conditioning = condition(editor.stages, editor.tokenizer, request, settings)
        noise = start_noise(request, settings, manifest)
        with editor.stages.session("transformer") as session:
            tables = modulation_tables(editor.bundle, schedule, dtype=table_dtype(editor.stages.engines["transformer"]))
            uploaded = upload_schedule(session, schedule, tables)
            for size in CLIENTS:
                rows = [row_of(conditioning, settings, noise, number) for number in range(size)]

                def step(rows: list[Any] = rows) -> Denoiser:
                    denoiser = Denoiser.start(
                        session, rows, schedule=uploaded, rotary=editor.model.rotary, grids=conditioning.grids
                    )
                    denoiser.step()
                    denoiser.latents()
                    return denoiser

                found[str(size)] = median_seconds(50, step)
    lines = [[size, f"{1000 * s:.1f}", f"{1000 * s / int(size):.2f}"] for size, s in found.items()]
    print(table(lines, header=("batch", "ms a step", "ms an image"), right=(0, 1, 2)))
    return found


def measure_service(bundle: Path, options: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any]]:
    """Edits a second of the service in this process."""
    sizes: list[int] = []
    image = load_image(IMAGE).image
    with Service(Editor(bundle, residency="resident"), on_step=lambda size, _: sizes.append(size)) as service:

        def edit(seed: int) -> bytes:
            request = Request(images=[image], instructions=[INSTRUCTION], seeds=[seed])
            return encode_image(service.submit(request).result().images[0], ".png")

        return measure("service", edit, sizes, options.requests)


def measure_http(bundle: Path, options: argparse.Namespace) -> dict[tuple[str, int], dict[str, Any]]:
    """Edits a second of `qie serve`, in a process of its own."""
    content, local = IMAGE.read_bytes(), threading.local()
    with served(bundle) as server:

        def edit(seed: int) -> bytes:
            if not hasattr(local, "client"):
                local.client = httpx.Client(base_url=server.url, timeout=600)
            data = {"prompt": INSTRUCTION, "seed": str(seed)}
            answer = local.client.post("/v1/images/edits", files={"image": content}, data=data)
            return base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])

        return measure("qie serve", edit, None, options.requests)


def measure(name: str, edit: Edit, sizes: list[int] | None, requests: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Edits a second with every number of clients."""
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for clients in CLIENTS:
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(edit, range(requests // 4)))
            if sizes is not None:
                sizes.clear()
            begun = time.perf_counter()
            contents = list(pool.map(edit, range(requests)))
            seconds = time.perf_counter() - begun
        images = {Image.open(io.BytesIO(content)).tobytes() for content in contents}
        per_second = requests / seconds
        first = runs.get((name, 1), {"per_second": per_second})["per_second"]
        runs[name, clients] = {
            "per_second": per_second,
            "ratio": per_second / first,
            "mean_batch": None if sizes is None else sum(sizes) / len(sizes),
            "images": images,
        }
    return runs


if __name__ == "__main__":
    main()
