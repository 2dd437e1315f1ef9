"""``qie clean``: free the disk of what stopped builds left, and of caches."""

from typing import Annotated

import typer

from qie.engines.cli.options import JsonOption, print_json
from qie.engines.terminal import human_bytes, say, table

__all__ = ["clean"]


def clean(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete what is listed.")] = False,
    calibrations: Annotated[
        bool, typer.Option("--calibrations", help="Include calibrations that builds made and later builds use.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List leftovers and caches, and delete them.

    Leftovers are what stopped builds and deletions left; caches are made again when they are needed. Nothing is deleted
    without --yes, calibrations only with --calibrations too, and bundles never.
    """
    from qie.engines.bundle.clean import remove, unneeded

    items = unneeded(calibrations=calibrations)
    deleted = [item for item in items if yes and remove(item)]
    total = sum(item.bytes for item in (deleted if yes else items))
    if as_json:
        rows = [
            {"path": str(i.path), "what": i.what, "bytes": i.bytes, "deleted": any(i is d for d in deleted)}
            for i in items
        ]
        return print_json({"items": rows, "bytes": total})
    if not items:
        say("nothing to delete")
        return None
    rows_of_text = [[item.what, human_bytes(item.bytes), str(item.path)] for item in items]
    say(table(rows_of_text, header=["what", "size", "path"], right=[1]))
    if not yes:
        command = "qie clean --calibrations --yes" if calibrations else "qie clean --yes"
        say(f"\n{human_bytes(total)} in all; delete it with `{command}`")
        return None
    say(f"\ndeleted {human_bytes(total)}")
    for item in items:
        if item not in deleted:
            say(f"{item.path} is in use or cannot be deleted")
    return None
