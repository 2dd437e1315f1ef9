"""``qie run``: images and an instruction become edited images."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from qie.engines.cli.options import BundleOption, DeviceOption, JsonOption, VllmUrlOption, parse_size, print_json
from qie.engines.errors import RequestError
from qie.engines.terminal import Bars, human_seconds, say

if TYPE_CHECKING:
    from qie.engines.editing.editor import Editor
    from qie.engines.editing.request import Edit

__all__ = ["RunCommand", "run"]


class RunCommand(TyperCommand):
    """Shows the arguments in the usage as a person types them."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The arguments after ``qie run``."""
        return ["[OPTIONS]", "IMAGE...", "INSTRUCTION"]


def run(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE... INSTRUCTION",
            help="One to three images, or any number with --each, then the instruction in quotes.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="File to write: .png, .jpg or .webp; with --each, a folder.",
            show_default="IMAGE-edited.png",
        ),
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Edit every image by itself, in batches; skips those that are done.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise.", show_default="random")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the recipe's")] = None,
    cfg: Annotated[
        float | None,
        typer.Option(help="Guidance scale; 1 turns guidance off and halves the time.", show_default="the recipe's"),
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt for guidance.", show_default="one space")] = " ",
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Size of the result in pixels.", show_default="the model's area"),
    ] = None,
    match_input: Annotated[
        bool, typer.Option("--match-input", help="Resize the result to the last image's own size.")
    ] = False,
    num_images: Annotated[int, typer.Option(min=1, max=256, help="Number of results, with consecutive seeds.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Allow --out to name an input image.")] = False,
    bundle: BundleOption = None,
    device: DeviceOption = None,
    encoder_cache: Annotated[
        bool,
        typer.Option("--encoder-cache", help="Keep embeddings of images and instruction on disk for later runs."),
    ] = False,
    vllm_url: VllmUrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Edit images with an instruction.

    The last image sets the size of the result. The path of each result is printed on stdout, everything else on stderr.
    """
    *paths, instruction = arguments
    if not paths or _is_file(instruction):
        raise RequestError(
            f"{instruction!r} comes last, expected an instruction there; give the images first, then what to change, "
            "as `qie run --help` shows"
        )
    requested_size = parse_size(size)
    if each:
        from qie.engines.cli.each import run_each

        return run_each(
            [Path(path) for path in paths],
            instruction,
            out,
            count=num_images,
            bundle=bundle,
            device=device,
            vllm_url=vllm_url,
            as_json=as_json,
            options={
                "seeds": None if seed is None else [seed],
                "negative": negative,
                "steps": steps,
                "guidance": cfg,
                "size": requested_size,
                "match_input": match_input,
            },
        )

    from qie.engines.cache import encoder_cache_on_disk
    from qie.engines.cli.results import Results
    from qie.engines.editing.editor import Editor
    from qie.engines.editing.encoder_cache import EncoderCache
    from qie.engines.editing.request import Request
    from qie.engines.inputs.image import load_image

    sources = [load_image(Path(path)) for path in paths]
    results = Results(out, [Path(path) for path in paths], count=num_images, overwrite=overwrite)
    request = Request(
        images=[source.image for source in sources],
        instructions=[instruction],
        seeds=None if seed is None and num_images == 1 else _seeds(seed, num_images),
        negative=negative,
        steps=steps,
        guidance=cfg,
        size=requested_size,
        match_input=match_input,
    )
    cache = EncoderCache(bytes_max=0, disk=encoder_cache_on_disk() if encoder_cache else None)
    # one edit needs each engine once
    with Editor(bundle, device=device, residency="sequential", encoder_cache=cache, vllm_url=vllm_url) as editor:
        try:
            with Bars(enabled=not as_json) as bars:
                edit = editor.edit(request, progress=bars, on_image=results.save)
        except BaseException:
            for path in results.paths.values():
                say(str(path))  # what is complete stays, whatever stopped the rest
            raise
    notes = [f"{path}: {note}" for path, s in zip(paths, sources, strict=True) for note in s.notes] + list(edit.notes)
    return _report_run(editor, edit, [results.paths[n] for n in range(num_images)], notes, negative, as_json)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a file's name can be
        return False


def _seeds(seed: int | None, count: int) -> list[int]:
    import secrets

    first = secrets.randbelow(2**32 - count) if seed is None else seed
    return [first + n for n in range(count)]


def _report_run(
    editor: "Editor", edit: "Edit", outputs: list[Path], notes: list[str], negative: str, as_json: bool
) -> None:
    guided = edit.guidance > 1
    if as_json:
        return print_json(
            {
                "images": [
                    {"path": str(path), "seed": seed, "width": image.width, "height": image.height}
                    for path, image, (_, seed) in zip(outputs, edit.images, edit.samples, strict=True)
                ],
                "instruction": edit.samples[0][0],
                "negative": negative if guided else None,
                "bundle": str(editor.bundle.path),
                "model": editor.model.name,
                "generated_size": {"width": edit.size.width, "height": edit.size.height},
                "steps": edit.steps,
                "guidance": edit.guidance if guided else None,
                "about": editor.model.about,
                "notes": notes,
                "seconds": {stage: round(s, 4) for stage, s in edit.seconds.items()},
            }
        )
    for note in notes:
        say(f"note: {note}", err=True)
    if editor.model.about:
        say(f"{editor.model.name}: {editor.model.about}", err=True)
    guidance = f"guidance {edit.guidance:g} away from {negative!r}" if guided else "no guidance"
    skipped = [stage for stage in ("vision", "language") if stage not in edit.seconds]
    cached = f", {' and '.join(skipped)} from the cache" if skipped else ""
    say(
        f"{editor.model.name} ({editor.bundle.name}), {edit.size}, {edit.steps} steps, {guidance}, "
        f"{human_seconds(sum(edit.seconds.values()))}{cached}",
        err=True,
    )
    for path, (_, seed) in zip(outputs, edit.samples, strict=True):
        say(f"seed {seed}: ", err=True, end="")
        say(str(path))
    return None
