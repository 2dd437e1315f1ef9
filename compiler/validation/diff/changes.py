"""Values that differ between two tables, key by key."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Change", "changes", "flat"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A value that differs.

    Attributes:
        key: of the value, such as ``components.transformer.scheme``.
        old, new: plain data; None where the key is absent.
    """

    key: str
    old: Any
    new: Any


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Change, ...]:
    """What differs between two flat tables, in the order of their keys; None is an absent key."""
    keys = dict.fromkeys((*old, *new))
    return tuple(Change(key=k, old=old.get(k), new=new.get(k)) for k in keys if old.get(k) != new.get(k))


def flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys; an array of tables has indices, any other array is a value."""
    if isinstance(data, dict):
        items = [(f"{prefix}.{key}".lstrip("."), value) for key, value in data.items()]
    elif isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        items = [(f"{prefix}[{index}]", value) for index, value in enumerate(data)]
    else:
        return {prefix: data}
    return {key: value for name, inner in items for key, value in flat(inner, name).items()}
