"""The command line of qie: every command in its section of the help.

A command parses, calls one function and prints. Heavy imports are inside the commands.
"""

from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qie.compiler.cli.add_schedule import add_schedule
from qie.compiler.cli.bench import bench
from qie.compiler.cli.build import build
from qie.compiler.cli.calibrate import calibrate
from qie.compiler.cli.diff import diff
from qie.compiler.cli.doctor import doctor
from qie.compiler.cli.export import export
from qie.compiler.cli.golden import golden
from qie.compiler.cli.plan import plan
from qie.compiler.cli.recipes import recipes_app
from qie.compiler.cli.selftest import selftest
from qie.compiler.cli.synthesize import synthesize
from qie.compiler.cli.validate import validate
from qie.engines.cli.bundles import inspect, list_bundles, rm
from qie.engines.cli.clean import clean
from qie.engines.cli.options import examples
from qie.engines.cli.run import RunCommand, run
from qie.engines.cli.serve import serve
from qie.engines.terminal import say

__all__ = ["ARGUMENTS", "SECTIONS", "app"]

SECTIONS: dict[str, tuple[str, ...]] = {
    "Build": ("plan", "calibrate", "build", "export", "recipes", "synthesize"),
    "Edit": ("run", "serve"),
    "Validate": ("validate", "golden", "diff", "bench"),
    "Bundles": ("list", "inspect", "add-schedule", "rm", "clean"),
    "This machine": ("doctor", "selftest"),
}
"""The commands as `qie --help` groups them."""

ARGUMENTS = {"guidance": "cfg", "loras": "lora", "seeds": "seed"}
"""The ``option`` of an error, where a command's parameter has another name."""


class Sections(TyperGroup):
    """The commands under the headings of ``SECTIONS``."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the commands of each section with the first sentence of their help."""
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(80)) for name in names])


app = typer.Typer(
    name="qie",
    cls=Sections,
    help="Compile Qwen-Image-Edit for one GPU, and edit images with it.",
    epilog=examples("qie build pocket --gpu cpu", 'qie run photo.jpg "tint it purple"'),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        import qie

        say(f"qie {qie.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compile Qwen-Image-Edit for one GPU, and edit images with it."""


_needs_arguments = partial(app.command, no_args_is_help=True)

_needs_arguments(
    epilog=examples("qie plan pocket --gpu l40s", "qie plan --gpu l40s --size 1024x768"),
)(plan)
_needs_arguments(
    epilog=examples(
        "qie calibrate pocket --images photos -o pocket.npz", "qie calibrate pocket --images photos --sensitivity"
    ),
)(calibrate)
_needs_arguments(
    epilog=examples("qie build pocket --gpu cpu", "qie build --gpu l40s --calibration 2511.npz --dry-run"),
)(build)
_needs_arguments(
    epilog=examples("qie export pocket -o graphs", "qie export --gpu a100 --no-weights"),
)(export)
app.add_typer(recipes_app, name="recipes")
_needs_arguments(
    epilog=examples(
        "qie synthesize 2511 --out 2511-synthetic --layers 5 --language-layers 2",
        "qie synthesize 2511 --out 2511-synthetic --on-demand",
    ),
)(synthesize)
_needs_arguments(
    cls=RunCommand,
    epilog=examples(
        'qie run photo.jpg "make the sky pink" -o pink.png',
        'qie run person.jpg jacket.jpg "put the jacket on the person" --seed 7',
    ),
)(run)
app.command(epilog=examples("qie serve pocket-cpu", "qie serve pocket-cpu --port 9000 --api-keys keys.txt"))(serve)
_needs_arguments(
    epilog=examples("qie validate pocket-cpu", "qie validate pocket-l40s --level structure --junit report.xml"),
)(validate)
_needs_arguments(
    epilog=examples(
        "qie golden pocket -o pocket.safetensors", "qie golden --cases edits.toml --dtype bfloat16 -o 2511.safetensors"
    ),
)(golden)
_needs_arguments(
    epilog=examples("qie diff pocket-cpu pocket-w8a16", "qie diff before after --golden 2511.safetensors --exit-code"),
)(diff)
_needs_arguments(
    epilog=examples(
        "qie bench pocket-cpu -o before.json", "qie bench pocket-cpu --baseline before.json --tolerance 10%"
    ),
)(bench)
app.command("list", epilog=examples("qie list"))(list_bundles)
_needs_arguments(epilog=examples("qie inspect pocket-cpu --verify"))(inspect)
_needs_arguments(
    epilog=examples(
        "qie add-schedule pocket-cpu --steps 20", "qie add-schedule pocket-l40s --steps 5 --size 160x96 --model pocket"
    ),
)(add_schedule)
_needs_arguments(epilog=examples("qie rm pocket-cpu"))(rm)
app.command(epilog=examples("qie clean", "qie clean --yes"))(clean)
app.command(epilog=examples("qie doctor", "qie doctor --json"))(doctor)
app.command(epilog=examples("qie selftest", "qie selftest --device 1 --json"))(selftest)
