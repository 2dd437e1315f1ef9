"""The edits of the golden cases by what executes for a bundle: each runs once, for all checks that look at it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.compiler.metrics.alignment import Alignment, align
from qie.compiler.validation.golden.file import GoldenCase
from qie.compiler.validation.subject import Executed, request_of
from qie.engines.editing.edit import edit
from qie.engines.editing.request import Edit, Request
from qie.engines.editing.stages import Stages
from qie.engines.errors import QieError
from qie.engines.progress import no_progress

__all__ = ["CaseEdit", "edit_of", "images_of"]

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class CaseEdit:
    """The edit of a golden case, of the size of the reference's.

    Attributes:
        case: of the golden file.
        result: of the engines.
    """

    case: GoldenCase
    result: Edit

    @cached_property
    def image(self) -> Pixels:
        """The edit of the engines, uint8 [height, width, 3]."""
        return np.asarray(self.result.images[0])

    @cached_property
    def expected(self) -> Pixels:
        """The edit of the reference, uint8 [height, width, 3]."""
        return np.asarray(self.case.edit)

    @cached_property
    def alignment(self) -> Alignment | None:
        """Where the edit lies against the reference's; None where that cannot be told."""
        return align(self.image, self.expected)


def edit_of(executed: Executed, case: GoldenCase) -> CaseEdit | QieError:
    """The edit of ``case`` from the reference's noise, or the error with which it failed."""

    def run() -> CaseEdit | QieError:
        try:
            return CaseEdit(case=case, result=_edit(executed.stages, executed, request_of(case)))
        except QieError as problem:
            return problem

    return executed.once("edit", case.record.name, run)


def images_of(executed: Executed, requests: Sequence[Request], *, stages: Stages | None = None) -> list[Image.Image]:
    """The images of several requests, one after the other.

    Args:
        executed: what runs.
        requests: what to edit.
        stages: the same engines loaded otherwise; None for those of ``executed``.

    Raises:
        RequestError, EngineError: see ``edit``.
    """
    used = executed.stages if stages is None else stages
    return [image for request in requests for image in _edit(used, executed, request).images]


def _edit(stages: Stages, executed: Executed, request: Request) -> Edit:
    return edit(stages, executed.tokenizer, request, progress=no_progress)
