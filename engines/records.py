"""Frozen dataclasses to plain JSON data and back, strictly: an unknown or missing key is an error."""

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar

__all__ = ["Range", "brief", "from_plain", "is_number", "to_plain"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Range:
    """The bounds of a number, both allowed: ``Annotated[int, Range(1, 64)]``."""

    min: float
    max: float


def to_plain(record: Any) -> Any:
    """Convert dataclasses to dicts and tuples to lists, recursively."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: to_plain(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, tuple | list):
        return [to_plain(item) for item in record]
    if isinstance(record, dict):
        return {key: to_plain(item) for key, item in record.items()}
    return record


def brief(data: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        shown = ascii(data) if isinstance(data, str) else repr(data)
    except (ValueError, RecursionError):  # a whole number with more digits than Python prints
        return "a value of thousands of digits"
    return shown if len(shown) < 60 else shown[:57] + "…"


def is_number(value: Any) -> bool:
    """Whether a value read from JSON is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def from_plain(kind: type[T], data: Any, where: str = "") -> T:
    """Convert plain ``data`` to a value of type ``kind``.

    ``kind`` is built from dataclasses, tuples, dicts with string keys, unions, literals, scalars, and numbers with a
    ``Range``. Numbers are finite, and text can be encoded.

    Raises:
        ValueError: ``data`` does not fit; the text names the place (``engines[0].files``) and the expected value.
    """
    value: T = _read(kind, data, where)
    return value


def _read(kind: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        value = _read(args[0], data, where)
        for bounds in args[1:]:
            _expect(bounds.min <= value <= bounds.max, data, where, f"a number from {bounds.min:g} to {bounds.max:g}")
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _read_dataclass(kind, data, where)
    if origin is typing.Union or origin is types.UnionType:
        return _read_union(args, data, where)
    if origin is typing.Literal:
        fits = any(data == arg and type(data) is type(arg) for arg in args)
        return _expect(fits, data, where, " or ".join(repr(a) for a in args))
    if origin is tuple:
        _expect(isinstance(data, list), data, where, "a list")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        _expect(len(data) == len(args), data, where, f"a list of {len(args)}")
        return tuple(_read(a, item, f"{where}[{i}]") for i, (a, item) in enumerate(zip(args, data, strict=True)))
    if origin is dict:
        _expect(isinstance(data, dict), data, where, "an object")
        return {key: _read(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is float:
        return float(_expect(is_number(data), data, where, "a number"))
    if kind is int:
        return _expect(isinstance(data, int) and not isinstance(data, bool), data, where, "a whole number")
    if kind is str and isinstance(data, str):
        return _expect(not any("\ud800" <= c <= "\udfff" for c in data), data, where, "text in UTF-8")
    return _expect(isinstance(data, kind), data, where, f"a {kind.__name__}")


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(isinstance(data, dict), data, where, "an object")
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}".lstrip(": "))
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _read(hints[name], data[name], f"{where}.{name}".lstrip("."))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: missing key {name!r}".lstrip(": "))
    try:
        return kind(**values)
    except ValueError as problem:  # of a check between its fields
        raise ValueError(f"{where}: {problem}".lstrip(": ")) from None


def _read_union(args: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in args:
        return None
    problems = []
    for arg in args:
        if arg is not type(None):
            try:
                return _read(arg, data, where)
            except ValueError as problem:
                problems.append(problem)
    raise problems[0]


def _expect(good: bool, data: Any, where: str, expected: str) -> Any:
    if not good:
        raise ValueError(f"{where} is {brief(data)}, expected {expected}")
    return data
