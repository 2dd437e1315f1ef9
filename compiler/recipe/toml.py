"""TOML tables as dataclasses: a strict reader and a small writer, for ``recipe.schema``.

A field of a dataclass is a key, a nested dataclass is a table, a default makes a key optional. A field is ``str``, a
``Literal``, ``Annotated`` with ``Within`` (int, float), ``Matching`` or ``OneOf`` (str), a tuple of one of these or of
a dataclass (an array, an array of tables), ``X | None`` (None where the key is absent), or a word or an array
(``Literal | tuple``).
"""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from qie.engines.errors import RecipeError

__all__ = ["Matching", "OneOf", "Setting", "Within", "build", "flatten", "inline", "write", "wrong"]

Table = TypeVar("Table")


@dataclass(frozen=True, kw_only=True, slots=True)
class Within:
    """A number from ``low`` to ``high`` in ``unit``, and a multiple of ``multiple`` unless that is 0."""

    low: float
    high: float
    unit: str = ""
    multiple: int = 0

    def __str__(self) -> str:
        text = f"number from {self.low:g} to {self.high:g} {self.unit}".rstrip()
        return f"{text}, a multiple of {self.multiple}" if self.multiple else text

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is in range; NaN is not."""
        return bool(self.low <= value <= self.high and not (self.multiple and value % self.multiple))


@dataclass(frozen=True, kw_only=True, slots=True)
class Matching:
    """A string that a regular expression matches as a whole, with an example for messages."""

    pattern: str
    example: str

    def __str__(self) -> str:
        return f'string like "{self.example}"'

    def allows(self, value: Any) -> bool:
        """Whether ``value`` matches."""
        return re.fullmatch(self.pattern, value, flags=re.ASCII) is not None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OneOf:
    """A string that is a key of ``table``, which is read at every check."""

    what: str
    table: Mapping[str, object]

    def __str__(self) -> str:
        return f"{self.what} ({', '.join(inline(key) for key in self.table)})"

    def allows(self, value: Any) -> bool:
        """Whether ``value`` is a key."""
        return value in self.table


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A value as TOML has it, and the file that it comes from."""

    value: object
    file: Path


def flatten(
    schema: type, table: Mapping[str, object], file: Path, prefix: str = "", beside: tuple[str, ...] = ()
) -> dict[str, Setting]:
    """The settings of a TOML table by dotted key. Arrays stay whole, so that ``|`` of two results merges two files.

    ``beside`` are keys that the caller has taken out of the table; messages suggest them for a misspelt key.

    Raises:
        RecipeError: the schema has no such key, or has a table where the file has a value.
    """
    kinds = get_type_hints(schema, include_extras=True)
    settings: dict[str, Setting] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in kinds:
            keys = (*kinds, *beside)
            near = difflib.get_close_matches(name, keys, n=1)
            fix = f'use "{prefix}{near[0]}"' if near else f"use one of {', '.join(keys)}"
            raise RecipeError(f'unknown key "{key}" in {file}; {fix}')
        if not is_dataclass(kinds[name]):
            settings[key] = Setting(value=value, file=file)
        elif isinstance(value, dict):
            settings |= flatten(kinds[name], value, file, key + ".")
        else:
            raise wrong(key, Setting(value=value, file=file), "a table")
    return settings


def build(
    schema: type[Table], settings: Mapping[str, Setting], file: Path, prefix: str = "", default: Any = MISSING
) -> Table:
    """A dataclass from settings by dotted key.

    A missing key takes its value from ``default``, then from the schema; a message names ``file`` where neither has it.

    Raises:
        RecipeError: a key is missing, or a value is of the wrong type or out of range.
    """
    kinds = get_type_hints(schema, include_extras=True)
    values: dict[str, object] = {}
    for entry in fields(schema):  # type: ignore[arg-type]
        key = prefix + entry.name
        fallback = _default(entry) if default is MISSING else getattr(default, entry.name)
        if key in settings:
            values[entry.name] = _convert(kinds[entry.name], key, settings[key])
        elif is_dataclass(kinds[entry.name]):
            values[entry.name] = build(kinds[entry.name], settings, file, key + ".", fallback)
        elif fallback is MISSING:
            raise RecipeError(f'the key "{key}" is missing in {file}; add it as recipes/README.md describes')
        else:
            values[entry.name] = fallback
    return schema(**values)


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def wrong(key: str, setting: Setting, expected: str) -> RecipeError:
    """The error for a value that its key does not allow."""
    try:
        shown = inline(setting.value)
    except (ValueError, RecursionError):  # a whole number with more digits than Python prints, or deep nesting
        shown = "of thousands of digits or brackets"
    shown = shown if len(shown) < 200 else f"{shown[:200]}…"
    return RecipeError(f"{key} in {setting.file} is {shown}; set it to {expected}")


def write(table: Any) -> str:
    """A dataclass as TOML text with every key; ``flatten`` and ``build`` read it back to an equal one.

    Plain keys come first, then one section per table, then arrays of tables; deeper tables are inline.
    """
    return "\n".join(_lines(table)) + "\n"


def inline(value: object) -> str:
    """A value or a dataclass as TOML on one line."""
    if is_dataclass(value):
        value = _plain(value)
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {inline(item)}' for key, item in value.items())} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(inline(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML escapes DEL, JSON does not
    return str(value).lower() if isinstance(value, bool) else str(value)


def _convert(kind: Any, key: str, setting: Setting) -> Any:
    """A setting's value as the annotation ``kind`` requires."""
    value: Any = setting.value
    options: tuple[Any, ...] = get_args(kind)
    if get_origin(kind) is Annotated:
        base, rule = options
        whole = type(value) is int
        if not (type(value) is base or (whole and base is float)) or not rule.allows(value):
            raise wrong(key, setting, f"a whole {rule}" if base is int else f"a {rule}")
        return base(value)
    if get_origin(kind) is Literal:
        if not any(type(value) is type(option) and value == option for option in options):
            raise wrong(key, setting, " or ".join(inline(option) for option in options))
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise wrong(key, setting, "an array")
        items = (Setting(value=item, file=setting.file) for item in value)
        return tuple(_convert(options[0], f"{key}[{index}]", item) for index, item in enumerate(items))
    if options:  # a union: X | None, where TOML leaves None out, or a word or an array
        arrays = [option for option in options if get_origin(option) is tuple]
        return _convert(arrays[0] if arrays and isinstance(value, list) else options[0], key, setting)
    if is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise wrong(key, setting, "a table")
        return build(kind, flatten(kind, value, setting.file, key + "."), setting.file, key + ".")
    if type(value) is not str:
        raise wrong(key, setting, "a string")
    return value


def _plain(table: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not None, by name."""
    values = {entry.name: getattr(table, entry.name) for entry in fields(table)}
    return {name: value for name, value in values.items() if value is not None}


def _lines(table: Any) -> Iterator[str]:
    sections: list[tuple[str, Any]] = []
    for name, value in _plain(table).items():
        if is_dataclass(value):
            sections.append((f"[{name}]", value))
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            sections += [(f"[[{name}]]", item) for item in value]
        else:
            yield f"{name} = {inline(value)}"
    for header, value in sections:
        yield from ("", header)
        yield from (f"{name} = {inline(item)}" for name, item in _plain(value).items())
