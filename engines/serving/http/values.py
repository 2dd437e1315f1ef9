"""The values of fields: text, numbers, flags and sizes, each as itself or as text, or refused with a sentence.

Each function takes a field out of ``given``, names to values; one that is not there, or None, is not given.
"""

import re
from collections.abc import Iterable, MutableMapping
from typing import Any

from tokenizers import Tokenizer

from qie.engines.errors import RequestError

__all__ = ["shown", "take_flag", "take_name", "take_number", "take_size", "take_text", "take_whole"]

_SIZE = re.compile(r"(\d{1,6})[x×](\d{1,6})")

_NAME_MAX = 256
"""Characters of the name of a model or a user."""

Values = MutableMapping[str, Any]


def take_text(given: Values, name: str, tokenizer: Tokenizer, most: int) -> str | None:
    """A text of at most ``most`` characters, with no token that has a meaning of its own to the model.

    Raises:
        RequestError: it is something else.
    """
    value = given.pop(name, None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RequestError(f"{name} is {shown(value)}; give text", option=name)
    if not _is_unicode(value):
        raise RequestError(f"{name} has half of a character (a lone surrogate); give valid Unicode", option=name)
    if len(value) > most:
        raise RequestError(
            f"{name} has {len(value):,} characters, expected at most {most:,}; shorten it",
            option=name,
        )
    for token in _special_tokens(tokenizer):
        if token in value:
            raise RequestError(
                f"{name} contains {token}, which has a meaning of its own to the model; remove it", option=name
            )
    return value


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _special_tokens(tokenizer: Tokenizer) -> Iterable[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values()]


def take_size(given: Values) -> tuple[int, int] | None:
    """Width and height in pixels; None for ``auto``.

    Raises:
        RequestError: it is something else.
    """
    value = given.pop("size", None)
    if value is None or value == "auto":
        return None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise RequestError(f"size is {shown(value)}; give one such as 1024x768, or auto", option="size")
    return int(match[1]), int(match[2])


def take_whole(given: Values, name: str, least: int, most: int, *, default: int | None) -> int | None:
    """A whole number from ``least`` to ``most``.

    Raises:
        RequestError: it is something else.
    """
    value = given.pop(name, None)
    if value is None:
        return default
    number: object = value
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d{1,20}\s*", value):
        number = int(value)
    if isinstance(value, float) and value.is_integer():
        number = int(value)
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
        raise RequestError(f"{name} is {shown(value)}; give a whole number from {least} to {most}", option=name)
    return number


def take_number(given: Values, name: str) -> float | None:
    """A number.

    Raises:
        RequestError: it is something else.
    """
    value = given.pop(name, None)
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(f"{name} is {shown(value)}; give a number such as 4.0", option=name) from None


def take_flag(given: Values, name: str) -> bool:
    """True or false; false where it is not given.

    Raises:
        RequestError: it is something else.
    """
    value = given.pop(name, None)
    if value is None:
        return False
    if isinstance(value, bool):
        return value
    meant = (
        {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
        if isinstance(value, str)
        else None
    )
    if meant is None:
        raise RequestError(f"{name} is {shown(value)}; give true or false", option=name)
    return meant


def take_name(given: Values, name: str) -> str | None:
    """A short text of one line.

    Raises:
        RequestError: it is something else.
    """
    value = given.pop(name, None)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RequestError(f"{name} is {shown(value)}; give text", option=name)
    if len(value) > _NAME_MAX or not value.isprintable():
        raise RequestError(
            f"{name} is {shown(value)}, expected at most {_NAME_MAX} printable characters; change it",
            option=name,
        )
    return value


def shown(value: object) -> str:
    """``value`` for an error: as Python writes it, or the beginning of that."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
