"""The images of a case side by side: inputs, the reference's edit, the engines' edit, and their difference."""

import base64
import io
from xml.etree.ElementTree import Element

import numpy as np
from PIL import Image

from qie.compiler.validation.golden.file import png
from qie.compiler.validation.report import CaseImages, Report
from qie.compiler.validation.reports.html.markup import element

__all__ = ["TIMES", "difference", "images", "links"]

TIMES = 10
"""Factor of the difference that is shown."""

SMALL = 256
"""Width in pixels below which an image is shown with visible pixels."""


def difference(reference: bytes, edit: bytes) -> bytes | None:
    """The absolute difference of two PNG files times ``TIMES``, as a PNG file; None where their sizes differ."""
    first, second = _pixels(reference), _pixels(edit)
    if first.shape != second.shape:
        return None
    return png(np.minimum(np.abs(first - second) * TIMES, 255).astype(np.uint8)).tobytes()


def links(report: Report) -> dict[str, str]:
    """The link to the images of each case that has any."""
    return {case.case: f"#{_id(place)}" for place, case in reversed(list(enumerate(report.images)))}


def images(report: Report) -> Element | None:
    """The images of all cases; None where there are none."""
    if not report.images:
        return None
    made = "Graphs in float32" if report.provenance.rebuilt else "Engines"
    found = [_case(case, made, _id(place)) for place, case in enumerate(report.images)]
    return element("section", element("h2", "Images"), found, id="images")


def _id(place: int) -> str:
    return f"images-{place + 1}"


def _case(case: CaseImages, made: str, name: str) -> Element:
    """The images of one case with its instruction."""
    inputs = [
        _figure(file, "Input" if len(case.inputs) == 1 else f"Input {place}", case.case)
        for place, file in enumerate(case.inputs, start=1)
    ]
    distance = difference(case.reference, case.edit)
    return element(
        "section",
        element("h3", case.case),
        element("p", element("q", case.instruction), class_="instruction"),
        element(
            "div",
            inputs,
            _figure(case.reference, "Reference", case.case),
            _figure(case.edit, made, case.case),
            element("p", "The sizes of the two edits differ.", class_="note")
            if distance is None
            else _figure(distance, f"Difference × {TIMES}", case.case),
            class_="images",
        ),
        class_="case",
        id=name,
    )


def _pixels(file: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"), np.int16)


def _figure(file: bytes, caption: str, case: str) -> Element:
    with Image.open(io.BytesIO(file)) as image:
        width, height = image.size
    shown = element(
        "img",
        src=f"data:image/png;base64,{base64.b64encode(file).decode()}",
        alt=f"{caption}, case {case}",
        width=width,
        height=height,
        class_="small" if width < SMALL else None,
    )
    size = element("span", f"{width}×{height}", class_="muted")
    return element("figure", shown, element("figcaption", caption, " ", size))
