"""What a validation works on: a bundle, its recipe, a golden file, and the engines that this machine runs for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tokenizers import Tokenizer

from qie.compiler.recipe.schema import Recipe
from qie.compiler.validation.golden.file import Golden, GoldenCase
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import Component, EngineRecord
from qie.engines.editing.conditioning import open_tokenizer
from qie.engines.editing.request import Request
from qie.engines.editing.stages import Stages
from qie.engines.progress import StageProgress, no_progress

__all__ = ["Executed", "Subject", "request_of"]

Result = TypeVar("Result")


@dataclass(kw_only=True)
class Executed:
    """The engines that run for a bundle, loaded when first needed.

    Attributes:
        bundle: whose engines these are: the bundle itself, or its graphs built again for onnxruntime.
        on: for reports, such as ``onnxruntime 1.32.0, CPU``.
        rebuilt: whether these are the bundle's graphs and not its engines.
        device: CUDA index of the GPU; None for the first that fits, and on a CPU.
        stages: the engines as functions.
        tokenizer: of the bundle.
    """

    bundle: Bundle
    on: str
    rebuilt: bool
    device: int | None
    stages: Stages
    tokenizer: Tokenizer
    _results: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        engines: Mapping[Component, tuple[EngineRecord, ...]],
        *,
        on: str,
        rebuilt: bool,
        device: int | None,
    ) -> "Executed":
        """The chosen ``engines`` of ``bundle``; none is loaded.

        Raises:
            BundleError: the tokenizer is damaged.
        """
        stages = Stages(bundle, engines, device=device)
        tokenizer = open_tokenizer(bundle)
        return cls(bundle=bundle, on=on, rebuilt=rebuilt, device=device, stages=stages, tokenizer=tokenizer)

    def once(self, what: str, case: str, compute: Callable[[], Result]) -> Result:
        """The result of ``compute``, which runs once for each ``what`` and case: checks share it."""
        if (what, case) not in self._results:
            self._results[what, case] = compute()
        result: Result = self._results[what, case]
        return result

    def close(self) -> None:
        """Release the engines."""
        self.stages.close()


@dataclass(kw_only=True)
class Subject:
    """A bundle and what it is compared with.

    Attributes:
        bundle: that is validated.
        recipe: of its manifest, with the gates.
        golden: None without a golden file.
        no_golden: why there is none, a semicolon, and what to do.
        executed: what runs on this machine; None where nothing does.
        not_executed: why nothing runs, a semicolon, and what to do.
        wants_graphs: whether graphs were asked for in place of engines that do not run here.
        not_own: where graphs run in place of the engines, why these do not, a semicolon, and what to do.
        other_graphs: where graphs run in place of engines, the engines that were not built from these, as sentences.
        progress: called with (units done, units in all) of the running check.
    """

    bundle: Bundle
    recipe: Recipe
    golden: Golden | None = None
    no_golden: str = ""
    executed: Executed | None = None
    not_executed: str = ""
    wants_graphs: bool = False
    not_own: str = ""
    other_graphs: tuple[str, ...] | None = None
    progress: StageProgress = field(default=no_progress)

    @property
    def obstacle(self) -> str | None:
        """Why checks against the golden file cannot run, a semicolon, and what to do; None where they can."""
        if self.golden is None:
            return self.no_golden
        return self.not_executed if self.executed is None else None


def request_of(case: GoldenCase, **changes: Any) -> Request:
    """The edit of a golden case from the reference's own noise."""
    record = case.record
    values: dict[str, Any] = {
        "images": case.images,
        "instructions": [record.instruction],
        "seeds": [record.seed],
        "negative": record.negative,
        "steps": record.steps,
        "guidance": record.guidance,
        "size": (record.width, record.height),
        "noise": case.noise[None],
    }
    return Request(**(values | changes))
