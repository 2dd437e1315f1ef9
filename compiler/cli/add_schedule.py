"""``qie add-schedule``: modulation tables of another number of steps, or of another size, for a bundle."""

from typing import TYPE_CHECKING, Annotated

import typer

from qie.compiler.cli.options import LoraOption, RevisionOption
from qie.engines.cli.options import BundleArgument, JsonOption, parse_size, print_json
from qie.engines.terminal import Bars, human_bytes, say, wrap

if TYPE_CHECKING:
    from qie.compiler.packing.schedule_plan import SchedulePlan
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be added and fetched, and stop.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Add the tables of a schedule to a bundle.

    A bundle without modulation weights edits only with the schedules whose tables it has. The tables are computed from
    the modulation weights of the bundle; where it has none, from its checkpoint, with the LoRAs that it was built with.
    Weights that are not on this machine are fetched one shard at a time. All engines stay as they are.
    """
    from qie.compiler.packing.add_schedule import add_schedule as add
    from qie.engines.bundle.bundle import open_bundle

    sizes = [pixels for text in size or () if (pixels := parse_size(text)) is not None]
    before = open_bundle(bundle)
    if dry_run:
        from qie.compiler.planning.resolve import compile_packages

        with compile_packages():
            from qie.compiler.packing.schedule_plan import plan_schedule
        planned = plan_schedule(
            before, steps=steps, sizes=sizes or None, model=model, revision=revision, loras=lora or ()
        )
        return _print_planned(planned, as_json=as_json)
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


def _print_planned(planned: "SchedulePlan", *, as_json: bool) -> None:
    bundle, count = planned.bundle, len(planned.schedules)
    checkpoint = None if planned.plan is None else planned.plan.checkpoint
    if as_json:
        return print_json(
            {
                "bundle": str(bundle.path),
                "added": count,
                "sizes": [str(size) for size in planned.sizes],
                "bytes": planned.table_bytes,
                "checkpoint": None if checkpoint is None else checkpoint.name,
                "shards": list(planned.shards),
                "fetch_bytes": planned.fetch_bytes,
                "disk_bytes": planned.disk_bytes,
            }
        )
    if not planned.sizes:
        return say(f"{bundle.path} has these tables already")
    tables, sizes = _count(count, "table"), _count(len(planned.sizes), "size")
    say(f"{bundle.path}: {tables} of {planned.steps} steps, for {sizes}, {human_bytes(planned.table_bytes)}")
    if checkpoint is None:
        return say("computed from the modulation weights of the bundle")
    if planned.source is None:
        return say(wrap(f"computed from {checkpoint.name}, in {checkpoint.path}"))
    largest = human_bytes(planned.disk_bytes - planned.table_bytes)
    return say(
        wrap(
            f"computed from {checkpoint.name}: {_count(len(planned.shards), 'shard')}, "
            f"{human_bytes(planned.fetch_bytes)}, fetched one at a time, at most {largest}"
        )
    )


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _print_added(before: "Bundle", after: "Bundle", *, as_json: bool) -> None:
    from qie.engines.inputs.stored_schedules import stored_schedules

    added = len(after.manifest.schedules) - len(before.manifest.schedules)
    grown = after.bytes - before.bytes
    schedules = stored_schedules(after.manifest)
    if as_json:
        known = [{"steps": s.steps, "sizes": [str(size) for size in s.sizes]} for s in schedules]
        return print_json({"bundle": str(after.path), "added": added, "bytes": grown, "schedules": known})
    if added:
        say(f"{after.path}: {_count(added, 'table')}, {human_bytes(grown)}")
    else:
        say(f"{after.path} has these tables already")
    say(wrap("it edits with " + ", ".join(f"{s.steps} steps at {len(s.sizes)} sizes" for s in schedules)))
    return None
