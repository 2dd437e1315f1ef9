"""``qie add-schedule``: modulation tables of another number of steps, or of another size, for a bundle."""

from typing import TYPE_CHECKING, Annotated

import typer

from qie.compiler.cli.options import LoraOption, RevisionOption
from qie.engines.cli.options import BundleArgument, JsonOption, parse_size, print_json
from qie.engines.terminal import Bars, human_bytes, say, wrap

if TYPE_CHECKING:
    from qie.engines.bundle.bundle import Bundle

__all__ = ["add_schedule"]


def add_schedule(
    bundle: BundleArgument,
    steps: Annotated[int, typer.Option(help="Denoising steps.")],
    size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WxH", help="Size of results in pixels; repeatable.", show_default="every size of the recipe"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Checkpoint of the bundle, where that has no modulation weights.",
            show_default="the one that the bundle names",
        ),
    ] = None,
    revision: RevisionOption = None,
    lora: LoraOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add the tables of a schedule to a bundle.

    A bundle without modulation weights edits only with the schedules whose tables it has. The tables are computed from
    its checkpoint, with the LoRAs that it was built with. All engines stay as they are.
    """
    from qie.compiler.packing.add_schedule import add_schedule as add
    from qie.engines.bundle.bundle import open_bundle

    sizes = [pixels for text in size or () if (pixels := parse_size(text)) is not None]
    before = open_bundle(bundle)
    with Bars(enabled=not as_json) as bars:
        after = add(
            before,
            steps=steps,
            sizes=sizes or None,
            model=model,
            revision=revision,
            loras=lora or (),
            progress=bars,
        )
    return _print_added(before, after, as_json=as_json)


def _print_added(before: "Bundle", after: "Bundle", *, as_json: bool) -> None:
    from qie.engines.inputs.stored_schedules import stored_schedules

    added = len(after.manifest.schedules) - len(before.manifest.schedules)
    grown = after.bytes - before.bytes
    schedules = stored_schedules(after.manifest)
    if as_json:
        known = [{"steps": s.steps, "sizes": [str(size) for size in s.sizes]} for s in schedules]
        return print_json({"bundle": str(after.path), "added": added, "bytes": grown, "schedules": known})
    if added:
        say(f"{after.path}: {added} {'table' if added == 1 else 'tables'}, {human_bytes(grown)}")
    else:
        say(f"{after.path} has these tables already")
    say(wrap("it edits with " + ", ".join(f"{s.steps} steps at {len(s.sizes)} sizes" for s in schedules)))
    return None
