"""The fields of a request's body: a form of either kind, or a JSON object."""

import json
from collections.abc import Iterable
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from qie.engines.errors import RequestError
from qie.engines.serving.http.fields import Upload, Value, fields_of_json

__all__ = ["read_fields"]

_FIELDS_MAX = 64
"""Fields of a form: far more than there are names."""

_TEXT_MAX = 1 << 20
"""Bytes of a field of text: far more than of a prompt."""

_FORM = {"multipart/form-data", "application/x-www-form-urlencoded"}


async def read_fields(request: Request) -> list[tuple[str, Value]]:
    """The fields of a form or a JSON object, in their order.

    Raises:
        RequestError: the body is damaged or of another type, or a field stands in the address.
    """
    if request.url.query:
        raise RequestError("the address has parameters behind a question mark; send them as fields of the body")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            content = b"".join([chunk async for chunk in request.stream()])  # ``Request.body`` would keep it
            body = json.loads(content, object_pairs_hook=_object)
        except (ValueError, RecursionError):
            raise RequestError("the body is no JSON; send a JSON object, or a form") from None
        return fields_of_json(body)
    if kind not in _FORM:
        raise RequestError(f"the content type is {kind[:60]!r}; send a form (multipart/form-data) or JSON")
    try:
        form = await request.form(max_files=_FIELDS_MAX, max_fields=_FIELDS_MAX, max_part_size=_TEXT_MAX)
    except HTTPException as problem:
        detail = str(problem.detail).rstrip(".")
        raise RequestError(f"the form cannot be read ({detail}); send at most {_FIELDS_MAX} fields") from None
    try:
        return [
            (name, Upload(name=name, content=await value.read()) if isinstance(value, UploadFile) else value)
            for name, value in form.multi_items()
        ]
    finally:
        await form.close()


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        RequestError: a name is twice there.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RequestError(f"{name[:60]!r} is given twice; give it once")
        found[name] = value
    return found
