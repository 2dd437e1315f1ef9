"""``qie run --each``: one instruction for many images, into a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qie.engines.cli.options import print_json
from qie.engines.errors import RequestError
from qie.engines.terminal import say

if TYPE_CHECKING:
    from qie.engines.serving.each import Outcome

__all__ = ["run_each"]


def run_each(
    images: Sequence[Path],
    instruction: str,
    out: Path | None,
    *,
    count: int,
    bundle: str | None,
    device: int | None,
    vllm_url: str | None,
    options: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Edit every image and print the path of each result on stdout, everything else on stderr.

    ``options`` are fields of ``Request``. The exit code is 2 where an image failed.
    """
    if out is None:
        raise RequestError("there is no folder for the results; name one", option="out")
    if count > 1:
        raise RequestError(
            f"{count} results of each image were requested, expected 1; run again with other seeds", option="num_images"
        )
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out} is a file, expected a folder for the results; choose another", option="out")

    from qie.engines.editing.editor import Editor
    from qie.engines.editing.request import Request
    from qie.engines.serving.each import edit_each, targets

    results = targets(images, out)
    same = [image for image, result in results.items() if result.exists() and image.exists() and image.samefile(result)]
    if same:
        raise RequestError(f"{same[0]} would be replaced by its result; choose another folder", option="out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RequestError(
            f"{out} cannot be made ({problem.strerror}); choose another folder", option="out"
        ) from problem
    outcomes: list[Outcome] = []

    def tell(outcome: "Outcome") -> None:
        outcomes.append(outcome)
        if not as_json:
            _tell(outcome, len(outcomes), len(results))

    with Editor(bundle, device=device, vllm_url=vllm_url) as editor:
        edit_each(editor, results, Request(images=[], instructions=[instruction], **options), on_outcome=tell)
    failed = sum(outcome.problem is not None for outcome in outcomes)
    skipped = sum(outcome.done_before for outcome in outcomes)
    if as_json:
        print_json({"instruction": instruction, "images": [_facts(outcome) for outcome in outcomes]})
    else:
        done = len(outcomes) - failed - skipped
        say(f"{done} edited, {skipped} done before, {failed} failed", err=True)
    if failed:
        raise typer.Exit(2)


def _tell(outcome: "Outcome", number: int, total: int) -> None:
    place = f"{number}/{total} {outcome.image}"
    if outcome.problem is not None:
        return say(f"{place}: {outcome.problem}", err=True)
    for note in outcome.notes:
        say(f"note: {outcome.image}: {note}", err=True)
    how = "done before, " if outcome.done_before else ""
    say(f"{place}: {how}seed {outcome.seed}: ", err=True, end="")
    return say(str(outcome.result))


def _facts(outcome: "Outcome") -> dict[str, Any]:
    return {
        "image": str(outcome.image),
        "path": None if outcome.problem is not None else str(outcome.result),
        "seed": outcome.seed,
        "done_before": outcome.done_before,
        "notes": list(outcome.notes),
        "problem": None if outcome.problem is None else str(outcome.problem),
    }
