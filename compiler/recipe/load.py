"""Reading recipes: finds the file of a name, merges what it extends, and builds the resolved recipe."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from qie.compiler.recipe.rules import check_rules
from qie.compiler.recipe.schema import Recipe
from qie.compiler.recipe.toml import Setting, build, flatten, wrong
from qie.engines.backends import BACKENDS
from qie.engines.bundle.manifest import Component
from qie.engines.errors import RecipeError

__all__ = ["load_recipe", "parse_recipe", "recipe_names", "with_backend"]

RECIPES_FOLDER = Path(__file__).parents[2] / "recipes"

LONGEST = 1 << 20
"""Bytes of a recipe."""

MOST_EXTENDS = 16
"""Recipes that extend each other, one after the other."""

RENAMED = {"quantization": "scheme", "keep": "exclude"}
"""Keys of a component in schema 1 -> their names in schema 2."""


def recipe_names() -> tuple[str, ...]:
    """The names of the recipes that qie ships, sorted."""
    return tuple(sorted(path.stem for path in RECIPES_FOLDER.glob("*.toml")))


def load_recipe(name_or_path: str) -> Recipe:
    """The resolved recipe of a name (in any case) or of a path that ends in ``.toml``.

    Raises:
        RecipeError: the name or file is unknown, the file is not TOML, a key is unknown, or a value has the wrong type,
            is out of range, or is more than the recipe's GPU can do.
    """
    path = _find(name_or_path, Path())
    return _resolve(_settings(_read(path), path, ()), path)


def parse_recipe(text: str, file: Path) -> Recipe:
    """The resolved recipe of TOML ``text``; ``file`` is where it comes from, for messages and relative paths.

    Raises:
        RecipeError: see ``load_recipe``.
    """
    return _resolve(_settings(text, file, ()), file)


def with_backend(recipe: Recipe, component: Component, backend: str) -> Recipe:
    """The recipe with ``backend`` before its own ones for ``component``.

    Raises:
        RecipeError: there is no such backend, or it cannot run the component of this recipe.
    """
    if backend not in BACKENDS:
        raise RecipeError(f'there is no backend "{backend}"; use one of {", ".join(BACKENDS)}', option=component)
    section = replace(recipe.components[component], backend=backend)
    changed = replace(recipe, components=replace(recipe.components, **{component: section}))
    needs_gpu = recipe.compute_capability is None and not BACKENDS[backend].on_cpu
    misfit = "needs a GPU" if needs_gpu else changed.misfit(backend, component)
    if misfit is not None:
        raise RecipeError(
            f"{component} of a recipe for {recipe.gpu} cannot run on {backend}, which {misfit}; choose another backend",
            option=component,
        )
    return changed


def _resolve(settings: Mapping[str, Setting], file: Path) -> Recipe:
    recipe = build(Recipe, settings, file)
    check_rules(recipe, file)
    return recipe


def _find(name_or_path: str, folder: Path) -> Path:
    """The file of a recipe; a relative path starts at ``folder``."""
    names = recipe_names()
    if name_or_path.lower() in names:
        return RECIPES_FOLDER / f"{name_or_path.lower()}.toml"
    if name_or_path.endswith(".toml"):
        return folder / name_or_path
    near = difflib.get_close_matches(name_or_path.lower(), names, n=1)
    nearest = f'"{near[0]}", or another of ' if near else "one of "
    raise RecipeError(
        f'there is no recipe "{name_or_path}"; use {nearest}{", ".join(names)}, or the path of a .toml file'
    )


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError("it is a pipe or a device")
        if path.stat().st_size > LONGEST:
            raise RecipeError(f"{path} has {path.stat().st_size:,} bytes, expected at most {LONGEST:,}; name a recipe")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not valid TOML ({error}); save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"cannot read the recipe {str(path)[:300]} ({getattr(error, 'strerror', None) or error}); check the path"
        ) from error


def _settings(text: str, file: Path, extenders: tuple[Path, ...]) -> dict[str, Setting]:
    """The settings of TOML ``text`` by dotted key, with those of the recipe that it extends.

    ``extenders`` are the files that extend this one, directly or not.
    """
    real = file.resolve()
    if len(extenders) > MOST_EXTENDS:
        raise RecipeError(f"{file} is the end of more than {MOST_EXTENDS} recipes that extend each other; use fewer")
    if real in extenders:
        circle = " -> ".join(path.name for path in (*extenders[extenders.index(real) :], real))
        raise RecipeError(f"recipes extend each other in a circle ({circle}); remove one of the extends")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise RecipeError(f"{file} is nested too deeply; correct it") from None
    except ValueError as error:
        raise RecipeError(f"{file} is not valid TOML ({error}); correct it") from error
    _refuse_schema_1(table, file)
    parent = table.pop("extends", None)
    settings = flatten(Recipe, table, file, beside=("extends",))
    calibration = settings.get("calibration")
    if calibration is not None and isinstance(calibration.value, str):
        try:
            settings["calibration"] = Setting(value=str((file.parent / calibration.value).resolve()), file=file)
        except (OSError, ValueError, RuntimeError):
            raise wrong("calibration", calibration, "a path") from None
    if parent is None:
        return settings
    if not isinstance(parent, str):
        raise wrong("extends", Setting(value=parent, file=file), 'a string like "l40s"')
    path = _find(parent, file.parent)
    return _settings(_read(path), path, (*extenders, real)) | settings


def _refuse_schema_1(table: Mapping[str, object], file: Path) -> None:
    """Refuse keys of schema 1, also in a recipe without a ``schema`` key that extends another one.

    Raises:
        RecipeError: the recipe has schema 1.
    """
    components = table.get("components")
    sections = components.values() if isinstance(components, dict) else ()
    renamed = any(isinstance(section, dict) and section.keys() & RENAMED.keys() for section in sections)
    schema = table.get("schema")
    if (type(schema) is int and schema == 1) or renamed:
        keys = " and ".join(f"{old} to {new}" for old, new in RENAMED.items())
        raise RecipeError(
            f"{file} has schema 1, expected 2; rename the component keys {keys}, take the keys of [gates] from "
            "recipes/README.md and set schema to 2"
        )
