"""The answers of the API: JSON, and server-sent events as OpenAI's clients read them."""

import base64
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from qie.engines.inputs.image import encode_image
from qie.engines.serving.http.fields import FORMATS, Format
from qie.engines.serving.submission import ImageDone, Submission

__all__ = ["answer", "encoded", "event", "of_image", "of_result"]


def encoded(image: Image.Image, form: Format) -> str:
    """``image`` in the format that was asked for, as base64."""
    options: dict[str, Any] = {} if form.compression is None else {"quality": form.compression}
    return base64.b64encode(encode_image(image, FORMATS[form.name], **options)).decode()


def answer(form: Format, submission: Submission, images: Sequence[str]) -> dict[str, Any]:
    """The answer to a request that was not streamed; ``images`` are ``encoded``."""
    edit = submission.result(0)
    return {
        "created": int(time.time()),
        "data": [{"b64_json": image, "seed": seed} for image, (_, seed) in zip(images, edit.samples, strict=True)],
        **_facts(form, edit.images[0]),
        "usage": _usage(submission, len(images)),
        "steps": edit.steps,
        "guidance": edit.guidance if edit.guidance > 1 else None,
        "notes": [*form.notes, *edit.notes],
    }


def of_image(kind: str, form: Format, image: Image.Image, content: str, **more: Any) -> dict[str, Any]:
    """The data of an event ``image_edit.partial_image`` or ``image_edit.completed``."""
    facts = {**_facts(form, image), "quality": "auto"}
    return {"type": kind, "created_at": int(time.time()), "b64_json": content, **facts, **more}


def of_result(done: ImageDone, form: Format, content: str, submission: Submission) -> dict[str, Any]:
    """The data of an event ``image_edit.completed``."""
    settings = submission.settings
    more = {
        "sample": done.sample,
        "seed": settings.samples[done.sample][1],
        "usage": _usage(submission, 1),
        "notes": [*form.notes, *settings.notes],
    }
    return of_image("image_edit.completed", form, done.image, content, **more)


def event(data: Mapping[str, Any]) -> bytes:
    """One server-sent event, whose name is the data's type."""
    return f"event: {data['type']}\ndata: {json.dumps(data)}\n\n".encode()


def _facts(form: Format, image: Image.Image) -> dict[str, Any]:
    facts = {"size": f"{image.width}x{image.height}", "output_format": form.name, "background": "opaque"}
    return facts if form.safety_identifier is None else {**facts, "safety_identifier": form.safety_identifier}


def _usage(submission: Submission, images: int) -> dict[str, Any]:
    """Tokens of ``images`` results: what the language model reads, of the reference images, and of the results."""
    bucket = submission.bucket(0)
    generated, *references = (height * width for height, width in bucket.grids)
    text, image, output = bucket.prompt_tokens, sum(references), images * generated
    return {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": output,
        "total_tokens": text + image + output,
    }
