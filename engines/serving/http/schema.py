"""The request for an edit and its answers in the OpenAPI schema."""

from typing import Any

from qie.engines.serving.http.fields import EDIT_FIELDS, FORMATS, IMAGES_MAX, N_MAX, PARTIAL_IMAGES_MAX

__all__ = ["answers", "edits"]

_VALUES: dict[str, dict[str, Any]] = {
    "n": {"type": "integer", "minimum": 1, "maximum": N_MAX},
    "size": {"type": "string", "pattern": r"^(auto|[0-9]{1,6}x[0-9]{1,6})$"},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
    "steps": {"type": "integer", "minimum": 1, "maximum": 1000},
    "guidance": {"type": "number"},
    "output_format": {"type": "string", "enum": list(FORMATS)},
    "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
    "response_format": {"type": "string", "enum": ["b64_json"]},
    "background": {"type": "string", "enum": ["auto", "opaque"]},
    "quality": {"type": "string", "enum": ["auto"]},
    "input_fidelity": {"type": "string", "enum": ["high"]},
    "stream": {"type": "boolean"},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": PARTIAL_IMAGES_MAX},
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_STATUSES = {
    400: "the request cannot be used",
    401: "the API key is missing or wrong",
    403: "a page of another site asks, or by another name",
    404: "the model is not served",
    408: "the body does not arrive in time",
    413: "the body is too long",
    429: "too many edits wait",
    500: "the server failed",
    503: "the machine cannot edit now",
    504: "the edit was not done within its time",
}

_RESULT = {
    "type": "object",
    "required": ["created", "data", "size", "output_format", "background", "usage"],
    "properties": {
        "created": {"type": "integer"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["b64_json", "seed"],
                "properties": {"b64_json": {"type": "string"}, "seed": {"type": "integer"}},
            },
        },
    },
}


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that a route answers."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _STATUSES[status], "content": content} for status in statuses}


def edits() -> dict[str, Any]:
    """The request for an edit, and its result."""
    properties = {
        name: {**_VALUES.get(name, {"type": "string"}), "description": text} for name, text in EDIT_FIELDS.items()
    }
    files = {"type": "string", "format": "binary"}
    urls = {"type": "string", "pattern": "^data:image/(png|jpeg|webp);base64,"}
    result = {"application/json": {"schema": _RESULT}, "text/event-stream": {"schema": {"type": "string"}}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": _body(properties, files)},
                "application/json": {"schema": _body(properties, urls)},
            },
        },
        "responses": {"200": {"description": "the results", "content": result}},
    }


def _body(properties: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    images = {
        "type": "array",
        "items": image,
        "minItems": 1,
        "maxItems": IMAGES_MAX,
        "description": EDIT_FIELDS["image"],
    }
    return {
        "type": "object",
        "properties": {**properties, "image": images},
        "required": ["image", "prompt"],
        "additionalProperties": False,
    }
