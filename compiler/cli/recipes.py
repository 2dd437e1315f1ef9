"""``qie recipes``: the recipes that come with qie, and one of them in full."""

from typing import Annotated

import typer

from qie.engines.cli.options import JsonOption, examples, print_json
from qie.engines.terminal import say, table

__all__ = ["recipes_app"]

recipes_app = typer.Typer(
    help="List the recipes, one for each GPU.",
    epilog=examples("qie recipes", "qie recipes show l40s > mine.toml"),
    rich_markup_mode=None,
)


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: JsonOption = False) -> None:
    """List the recipes, one for each GPU."""
    if context.invoked_subcommand is not None:
        return None
    from qie.compiler.recipe.load import load_recipe, recipe_names

    loaded = {name: load_recipe(name) for name in recipe_names()}
    if as_json:
        rows = [
            {
                "name": name,
                "gpu": recipe.gpu,
                "compute_capability": recipe.compute_capability,
                "memory_gib": recipe.memory_gib,
                "backends": list(recipe.backends),
                "transformer": [recipe.components.transformer.precision, recipe.components.transformer.scheme],
            }
            for name, recipe in loaded.items()
        ]
        return print_json({"recipes": rows})
    lines = []
    for name, recipe in loaded.items():
        transformer = recipe.components.transformer
        scheme = transformer.precision if transformer.scheme == "none" else transformer.scheme
        memory, backends = f"{recipe.memory_gib:g} GiB", ", ".join(recipe.backends)
        language = recipe.components.language.backend
        backends += "" if language is None else f"; language: {language}"
        lines.append([name, recipe.gpu, recipe.compute_capability or "-", memory, scheme, backends])
    header = ["recipe", "GPU", "compute capability", "memory", "transformer", "backends"]
    say(table(lines, header=header, right=[3]))
    return None


@recipes_app.command("show", no_args_is_help=True, epilog=examples("qie recipes show l40s > mine.toml"))
def show(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A name that `qie recipes` lists, or a .toml file.")],
) -> None:
    """Print a recipe with everything that it inherits."""
    from qie.compiler.recipe.load import load_recipe
    from qie.compiler.recipe.schema import to_toml

    say(to_toml(load_recipe(name)), end="")
