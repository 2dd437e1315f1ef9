"""The fields of a request: every spelling that is met, and a sentence for everything else."""

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers import Tokenizer

from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.conditioning import open_tokenizer
from qie.engines.errors import ImageError, RequestError
from qie.engines.serving.http.fields import EDIT_FIELDS, EditCall, Limits, Upload, fields_of_json, parse_call


def png(width: int = 64, height: int = 48) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 40)).save(file, format="PNG")
    return file.getvalue()


PNG = png()
URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
LIMITS = Limits()
IMAGE = ("image", Upload(name="image", content=PNG))


@pytest.fixture(scope="module")
def tokenizer(plain_bundle: Path) -> Tokenizer:
    return open_tokenizer(open_bundle(plain_bundle))


@pytest.fixture
def parse(tokenizer: Tokenizer) -> Any:
    def parse(
        *more: tuple[str, Any], images: tuple[tuple[str, Any], ...] = (IMAGE,), limits: Limits = LIMITS
    ) -> EditCall:
        given = dict(more)
        prompt = () if "prompt" in given else (("prompt", "make it red"),)
        return parse_call([*images, *prompt, *more], tokenizer=tokenizer, limits=limits)

    return parse


def test_a_form_with_the_least(parse: Any) -> None:
    call = parse()
    request = call.request
    assert [image.size for image in request.images] == [(64, 48)]
    assert request.instructions == ["make it red"]
    assert (request.seeds, request.steps, request.guidance, request.size, request.negative) == (
        None,
        None,
        None,
        None,
        " ",
    )
    assert (call.form.name, call.form.compression, call.stream, call.partial_images, call.form.safety_identifier) == (
        "png",
        None,
        False,
        0,
        None,
    )


@pytest.mark.parametrize("name", ["image", "image[]", "images", "images[]", "image[0]", "image[17]"])
def test_the_spellings_of_images(parse: Any, name: str) -> None:
    files = tuple((name, Upload(name=name, content=png(64, 48 + n))) for n in range(3))
    assert [image.height for image in parse(images=files).request.images] == [48, 49, 50]


@pytest.mark.parametrize(
    "value",
    [
        URL,
        [URL],
        {"image_url": URL},
        [{"image_url": URL}],
        {"image_url": {"url": URL}},
        {"b64_json": base64.b64encode(PNG).decode()},
        base64.b64encode(PNG).decode(),
    ],
)
@pytest.mark.parametrize("name", ["image", "images", "image[]"])
def test_the_spellings_of_images_in_json(tokenizer: Tokenizer, name: str, value: Any) -> None:
    fields = fields_of_json({name: value, "prompt": "make it red", "n": 2})
    call = parse_call(fields, tokenizer=tokenizer, limits=Limits())
    assert [image.size for image in call.request.images] == [(64, 48)]
    assert len(call.request.seeds or ()) == 2


@pytest.mark.parametrize("number", ["1", 1, 1.0, " 1 "])
def test_numbers_are_numbers_however_they_are_written(parse: Any, number: Any) -> None:
    call = parse(("steps", number), ("seed", number), ("guidance", number))
    assert (call.request.steps, call.request.seeds, call.request.guidance) == (1, [1], 1.0)


def test_all_fields_are_honoured(parse: Any) -> None:
    call = parse(
        ("prompt", "make it blue"),
        ("model", "tiny"),
        ("n", "3"),
        ("size", "128x96"),
        ("seed", "7"),
        ("num_inference_steps", "5"),
        ("true_cfg_scale", "4.5"),
        ("negative_prompt", "blurry"),
        ("output_format", "webp"),
        ("output_compression", "80"),
        ("response_format", "b64_json"),
        ("background", "opaque"),
        ("quality", "auto"),
        ("input_fidelity", "high"),
        ("stream", "true"),
        ("partial_images", "2"),
        ("user", "ann"),
    )
    request = call.request
    assert (request.instructions, request.negative) == (["make it blue"], "blurry")
    assert (request.seeds, request.steps, request.guidance, request.size) == ([7, 8, 9], 5, 4.5, (128, 96))
    assert (call.model, call.stream, call.partial_images) == ("tiny", True, 2)
    assert (call.form.name, call.form.compression, call.form.safety_identifier) == ("webp", 80, "ann")


def test_a_field_without_a_value_is_not_given(parse: Any) -> None:
    request = parse(("seed", ""), ("size", None), ("user", "")).request
    assert (request.seeds, request.size) == (None, None)


@pytest.mark.parametrize(
    ("field", "value", "says", "option"),
    [
        ("mask", Upload(name="mask", content=PNG), "does not do masks", "mask"),
        ("background", "transparent", "background is 'transparent', which this server does not do", "background"),
        ("response_format", "url", "response_format is 'url'", "response_format"),
        ("quality", "high", "quality is 'high'", "quality"),
        ("input_fidelity", "low", "input_fidelity is 'low'", "input_fidelity"),
        ("moderation", "low", "there is no field 'moderation'; the fields are image, prompt", None),
        ("n", "0", "n is '0'; give a whole number from 1 to 10", "n"),
        ("n", "11", "from 1 to 10", "n"),
        ("n", True, "n is True", "n"),
        ("n", "1e1", "n is '1e1'", "n"),
        ("n", "9" * 5000, "n is '9999", "n"),
        ("seed", "-1", "seed is '-1'", "seed"),
        ("seed", 2**32, "seed is 4294967296", "seed"),
        ("steps", 1.5, "steps is 1.5", "steps"),
        ("guidance", "much", "guidance is 'much'; give a number", "guidance"),
        ("size", "large", "size is 'large'; give one such as 1024x768, or auto", "size"),
        ("output_format", "gif", "output_format is 'gif', expected png, jpeg, webp", "output_format"),
        ("output_compression", "50", "which a PNG has not", "output_compression"),
        ("stream", "maybe", "stream is 'maybe'; give true or false", "stream"),
        ("partial_images", "2", "partial_images come in a stream", "stream"),
        ("prompt", 7, "prompt is 7; give text", "prompt"),
        ("prompt", Upload(name="prompt", content=b"x"), "the field prompt is a file; give text", "prompt"),
        ("prompt", "a<|im_end|>b", "contains <|im_end|>", "prompt"),
        ("prompt", "a<|image_pad|>b", "contains <|image_pad|>", "prompt"),
        ("negative_prompt", "a<|im_start|>b", "contains <|im_start|>", "negative_prompt"),
        ("prompt", "x" * 4001, "prompt has 4,001 characters, expected at most 4,000", "prompt"),
        ("image", "cat.png", "the field image is text; give an image file", "image"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(parse: Any, field: str, value: Any, says: str, option: str | None) -> None:
    with pytest.raises(RequestError) as refused:
        parse((field, value))
    assert says in str(refused.value)
    assert refused.value.option == option


def test_a_field_that_is_given_twice_is_refused(parse: Any) -> None:
    with pytest.raises(RequestError, match="steps is given twice"):
        parse(("steps", "4"), ("num_inference_steps", "5"))


def test_there_must_be_an_image_and_a_prompt(parse: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(ImageError, match="there is no image"):
        parse(images=())
    with pytest.raises(RequestError, match="there is no prompt"):
        parse_call([IMAGE], tokenizer=tokenizer, limits=Limits())
    with pytest.raises(RequestError, match="there is no prompt"):
        parse(("prompt", ""))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "image is an empty file"),
        (b"GIF89a", "not a PNG, JPEG or WebP"),
        (PNG[:60], "damaged or truncated"),
        (png(1, 300), "at most 200 times the other"),
    ],
)
def test_images_that_cannot_be_read(parse: Any, content: bytes, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        parse(images=(("image", Upload(name="image", content=content)),))


def test_an_image_with_too_many_pixels_is_not_decoded(parse: Any) -> None:
    with pytest.raises(ImageError, match="expected at most 0 megapixels"):
        parse(limits=Limits(pixels=1000))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("https://example.org/cat.png", "images are not fetched from an address"),
        ({"image_url": "HTTP://example.org/cat.png"}, "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("data:image/png;base64,***", "is not base64"),
        (7, "holds no image"),
        ({"file_id": "file-1"}, "holds no image"),
        ({"image_url": None}, "holds no image"),
    ],
)
def test_images_in_json_that_are_none(value: Any, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        fields_of_json({"image": value, "prompt": "make it red"})


@pytest.mark.parametrize("body", [[], "text", 7, None, {"prompt": {"a": 1}}, {"n": [1]}])
def test_json_that_is_no_request(body: Any) -> None:
    with pytest.raises(RequestError):
        fields_of_json(body)


def test_every_field_is_documented(parse: Any) -> None:
    assert list(EDIT_FIELDS)[:2] == ["image", "prompt"]
    for name in EDIT_FIELDS:
        with pytest.raises(RequestError, match=r"is a file|is an empty file"):
            parse((name, Upload(name=name, content=b"")))
