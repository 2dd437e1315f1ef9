"""The fields of a request for an edit, in the spellings of OpenAI's API and of those who call it: honoured or refused.

A form and a JSON object become the same list of (name, value). A field that this server does not know, or whose value
it cannot honour, is refused with a sentence; none is ignored.
"""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from qie.engines.bundle.specs import DEFAULT_NEGATIVE
from qie.engines.editing.request import Request
from qie.engines.errors import ImageError, RequestError
from qie.engines.inputs.image import decode_image
from qie.engines.serving.http import values
from qie.engines.serving.http.values import shown

__all__ = [
    "EDIT_FIELDS",
    "FORMATS",
    "IMAGES_MAX",
    "N_MAX",
    "PARTIAL_IMAGES_MAX",
    "EditCall",
    "Format",
    "Limits",
    "Upload",
    "Value",
    "fields_of_json",
    "parse_call",
]

_IMAGE = re.compile(r"images?(\[\d{0,6}\])?")
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)

FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""Value of ``output_format`` -> suffix of such a file."""

N_MAX = 10
"""Images of one request, as in OpenAI's API."""

IMAGES_MAX = 3
"""Images to edit together: what the models take, before any of them is decoded."""

PARTIAL_IMAGES_MAX = 3
"""Previews of one image, as in OpenAI's API."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request may take.

    Attributes:
        body_bytes: of the whole request.
        pixels: of one image.
        prompt_characters: of the instruction, and of the negative prompt.
    """

    body_bytes: int = 64 << 20
    pixels: int = 64_000_000
    prompt_characters: int = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """An image file of a request.

    Attributes:
        name: of the field, for errors.
        content: its bytes.
    """

    name: str
    content: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """How results are answered.

    Attributes:
        name: a key of ``FORMATS``.
        compression: quality of a JPEG or WebP, 0 to 100; None for the writer's own.
        notes: on the images of the request, for a person to read.
        safety_identifier: who asks, where the request says so; it is in the answer.
    """

    name: str
    compression: int | None
    notes: tuple[str, ...]
    safety_identifier: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EditCall:
    """A request for an edit.

    Attributes:
        request: what to edit and how.
        form: of the results.
        stream: whether to answer with server-sent events.
        partial_images: previews of each image.
        model: of the request; None for whatever is served.
    """

    request: Request
    form: Format
    stream: bool
    partial_images: int
    model: str | None


Value = Upload | str | int | float | bool | None
Fields = Sequence[tuple[str, Value]]

EDIT_FIELDS: Mapping[str, str] = {
    "image": "one to three images: PNG, JPEG or WebP files; in JSON as data URLs",
    "prompt": "what to change",
    "model": "name of the model that is served",
    "n": f"images to make, 1 to {N_MAX}",
    "size": "width x height in pixels, or auto",
    "seed": "seed of the first image; the others have the numbers behind it",
    "steps": "denoising steps",
    "guidance": "scale of classifier-free guidance; 1 turns it off",
    "negative_prompt": "what guidance steers away from",
    "output_format": ", ".join(FORMATS),
    "output_compression": "quality of a JPEG or WebP, 0 to 100",
    "response_format": "b64_json",
    "background": "auto or opaque",
    "quality": "auto",
    "input_fidelity": "high",
    "stream": "true for server-sent events",
    "partial_images": f"previews of each image in the stream, 0 to {PARTIAL_IMAGES_MAX}",
    "user": "who asks; users take turns",
    "safety_identifier": "who asks, in place of user",
}
"""The fields with their values."""

_ALIASES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": "guidance",
}

_OVERLAYS = {"mask": "masks", "markup": "markup"}
"""Fields with an image that is no image to edit."""

_ONLY = {
    "response_format": ("b64_json",),
    "background": ("auto", "opaque"),
    "quality": ("auto",),
    "input_fidelity": ("high",),
}
"""Fields that have one meaning here, and the values that ask for it."""


def fields_of_json(body: Any) -> list[tuple[str, Value]]:
    """The fields of a JSON object; images are data URLs, or objects that hold one.

    Raises:
        RequestError: it is no object, or a value is not plain.
        ImageError: an image is something else.
    """
    if not isinstance(body, dict):
        raise RequestError("the body is no JSON object; send one, or a form")
    fields: list[tuple[str, Value]] = []
    for name, value in body.items():
        if _IMAGE.fullmatch(name) or name in _OVERLAYS:
            images = value if isinstance(value, list) else [value]
            fields += [(name, _from_data_url(image, name)) for image in images if image is not None]
        elif isinstance(value, str | int | float | bool | None):
            fields.append((name, value))
        else:
            raise RequestError(f"the field {shown(name)} is a {type(value).__name__}; give a string or a number")
    return fields


def parse_call(fields: Fields, *, tokenizer: Tokenizer, limits: Limits) -> EditCall:
    """The call that ``fields`` ask for.

    Args:
        fields: names and values, in the order of the request.
        tokenizer: of the model, whose special tokens a text must not contain.
        limits: what a request may take.

    Raises:
        RequestError: a field is unknown, missing or twice there, or its value cannot be honoured.
        ImageError: an image cannot be read, or is larger than allowed.
    """
    files, given = _sorted(fields)
    for name, expected in _ONLY.items():
        value = given.pop(name, None)
        if value not in (None, *expected):
            choice = " or ".join(expected)
            raise RequestError(
                f"{name} is {shown(value)}, which this server does not do; leave it out, or give {choice}", option=name
            )
    prompt = values.take_text(given, "prompt", tokenizer, limits.prompt_characters)
    if prompt is None:
        raise RequestError("there is no prompt; say what to change", option="prompt")
    negative = values.take_text(given, "negative_prompt", tokenizer, limits.prompt_characters)
    count = values.take_whole(given, "n", 1, N_MAX, default=1) or 1
    seed = values.take_whole(given, "seed", 0, 2**32 - count, default=None)
    output_format = given.pop("output_format", None) or "png"
    if output_format not in FORMATS:
        raise RequestError(
            f"output_format is {shown(output_format)}, expected {', '.join(FORMATS)}; choose one",
            option="output_format",
        )
    compression = values.take_whole(given, "output_compression", 0, 100, default=None)
    if output_format == "png" and compression not in (None, 100):
        raise RequestError(
            f"output_compression is {compression}, which a PNG has not; leave it out, or choose jpeg or webp",
            option="output_compression",
        )
    stream = values.take_flag(given, "stream")
    partial_images = values.take_whole(given, "partial_images", 0, PARTIAL_IMAGES_MAX, default=0) or 0
    if partial_images and not stream:
        raise RequestError(
            "partial_images come in a stream; ask for one with stream, or leave them out", option="stream"
        )
    steps, guidance = values.take_whole(given, "steps", 1, 1000, default=None), values.take_number(given, "guidance")
    size, model = values.take_size(given), values.take_name(given, "model")
    user, identifier = values.take_name(given, "user"), values.take_name(given, "safety_identifier")
    images = [decode_image(upload.content, upload.name, pixels_max=limits.pixels) for upload in files]
    notes = tuple(
        f"{upload.name}: {note}" for upload, source in zip(files, images, strict=True) for note in source.notes
    )
    return EditCall(
        request=Request(
            images=[source.image for source in images],
            instructions=[prompt],
            seeds=None if seed is None and count == 1 else _seeds(seed, count),
            negative=DEFAULT_NEGATIVE if negative is None else negative,
            steps=steps,
            guidance=guidance,
            size=size,
        ),
        form=Format(
            name=output_format,
            compression=None if output_format == "png" else compression,
            notes=notes,
            safety_identifier=identifier or user,
        ),
        stream=stream,
        partial_images=partial_images,
        model=model,
    )


def _sorted(fields: Fields) -> tuple[list[Upload], dict[str, Value]]:
    """The images, and all other fields by name; a field without a value is not given."""
    files: list[Upload] = []
    given: dict[str, Value] = {}
    for spelled, value in fields:
        name = _ALIASES.get(spelled, spelled)
        if _IMAGE.fullmatch(name):
            if not isinstance(value, Upload):
                raise ImageError(
                    f"the field {spelled} is text; give an image file, or a data URL in JSON", option="image"
                )
            files.append(value)
        elif name in _OVERLAYS:
            raise RequestError(
                f"this server does not do {_OVERLAYS[name]}; say in the prompt what to change", option=name
            )
        elif name not in EDIT_FIELDS:
            raise RequestError(f"there is no field {shown(spelled)}; the fields are {', '.join(EDIT_FIELDS)}")
        elif isinstance(value, Upload):
            raise RequestError(f"the field {spelled} is a file; give text", option=name)
        elif name in given:
            raise RequestError(f"{name} is given twice; give it once", option=name)
        elif value is not None and value != "":
            given[name] = value
    if len(files) > IMAGES_MAX:
        raise ImageError(f"{len(files)} images were given, expected one to {IMAGES_MAX}; use fewer", option="image")
    if not files:
        raise ImageError("there is no image; give one to three", option="image")
    return files, given


def _from_data_url(value: Any, name: str) -> Upload:
    """The file in a data URL, or in an object that holds one under a name of OpenAI's API."""
    if isinstance(value, Mapping):
        held = [value[key] for key in ("image_url", "url", "b64_json") if key in value]
        value = held[0] if len(held) == 1 and len(value) == 1 else None
        if isinstance(value, Mapping):  # {"image_url": {"url": ...}}
            value = value.get("url")
    if not isinstance(value, str):
        raise ImageError(f"the field {name} holds no image; give a data URL in base64", option="image")
    if re.match(r"(?i)[a-z][a-z0-9+.-]*://", value):
        raise ImageError("images are not fetched from an address; give the image itself", option="image")
    head = _DATA_URL.match(value)
    try:
        return Upload(name=name, content=base64.b64decode(value[head.end() :] if head else value, validate=True))
    except (binascii.Error, ValueError):
        raise ImageError(f"the field {name} is not base64; give a data URL in base64", option="image") from None


def _seeds(seed: int | None, count: int) -> list[int]:
    import secrets

    first = secrets.randbelow(2**32 - count) if seed is None else seed
    return [first + number for number in range(count)]
