"""``qie synthesize``: a checkpoint of published sizes with made-up weights."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qie.engines.cli.options import JsonOption, print_json
from qie.engines.terminal import Bars, human_bytes, say

if TYPE_CHECKING:
    from qie.compiler.synthetic.synthesize import Synthesis

__all__ = ["synthesize"]

KEPT_BLOCKS = 4
"""Blocks that recipes which quantize keep as they are: with no more there is nothing to quantize."""

SMALL = 1 << 30
"""Bytes of a model that runs on a CPU in seconds."""


def synthesize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Sizes: 2511, 2509, edit, or a small model such as tiny or demo.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; it must not exist, or be empty.")],
    layers: Annotated[int | None, typer.Option(help="Blocks of the transformer.", show_default="as published")] = None,
    language_layers: Annotated[
        int | None, typer.Option(help="Layers of the language model.", show_default="as published")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights.")] = 0,
    on_demand: Annotated[
        bool, typer.Option("--on-demand", help="Write no weights; they are made shard by shard when they are needed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint with made-up weights.

    It has the sizes and files of a published one, and opens, builds and runs like it without a download; its edits
    are noise. Equal arguments give equal bytes.
    """
    from qie.compiler.planning.resolve import compile_packages

    with compile_packages():
        from qie.compiler.synthetic.synthesize import plan_synthesis
        from qie.compiler.synthetic.synthesize import synthesize as write

    plan = plan_synthesis(model, out, layers=layers, language_layers=language_layers, seed=seed, on_demand=on_demand)
    if not as_json:
        _state(model, plan)
    if not dry_run:
        with Bars(enabled=not as_json) as bars:
            write(plan, progress=bars)
    if as_json:
        return print_json(
            {
                "folder": str(out),
                "written": not dry_run,
                "on_demand": on_demand,
                "disk_bytes": plan.disk_bytes,
                "free_bytes": plan.free_bytes,
                "shards": {file.path: file.bytes for file in plan.files},
            }
        )
    if not dry_run:
        words = ["qie", "build", str(out), "--gpu", _recipe(plan), *(["--stream"] if on_demand else [])]
        say(f"{out}: written; build with: {shlex.join(words)}")
    return None


def _state(model: str, plan: "Synthesis") -> None:
    """Say what is written, and what it takes."""
    made = plan.recorded
    say(
        f"{model}: {_count(made.layers, 'transformer block')}, {_count(made.language_layers, 'language layer')}, "
        f"bfloat16, seed {made.seed}: {_count(len(plan.files), 'shard')}, {human_bytes(plan.weight_bytes)}"
    )
    say(f"needs {human_bytes(plan.disk_bytes)} of disk, {human_bytes(plan.free_bytes)} are free")


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _recipe(plan: "Synthesis") -> str:
    """A recipe that builds the checkpoint of ``plan``."""
    if plan.weight_bytes < SMALL:
        return "cpu"
    return "l40s" if plan.recorded.layers > KEPT_BLOCKS else "a100"
