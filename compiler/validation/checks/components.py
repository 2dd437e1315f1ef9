"""Components: inputs, modulation and every component by itself, on the inputs that the reference had."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from qie.compiler.metrics.error import pooled_relative_l2, relative_l2
from qie.compiler.validation.checks.check import (
    CheckSpec,
    Finding,
    NotApplicable,
    Outcome,
    counted,
    for_cases,
    not_taken,
)
from qie.compiler.validation.golden.file import GoldenCase
from qie.compiler.validation.host import differing_inputs, prompt_tokens, vision_of
from qie.compiler.validation.modulation import table_errors
from qie.compiler.validation.subject import Executed, Subject
from qie.compiler.validation.teacher_forcing import forced
from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import COMPONENTS, Component
from qie.engines.bundle.specs import SIDE_MULTIPLE
from qie.engines.errors import RequestError

__all__ = ["SPECS"]

_NO_WEIGHTS = (
    "the bundle has no modulation weights to compare its tables with; validate its graphs, which are built again from "
    "its checkpoint"
)

Values = Callable[[Executed, GoldenCase], tuple[float, str]]
"""Runs one component on the inputs of a case: the relative L2 error of its output, and what was compared."""


def engines(subject: Subject) -> Iterator[Outcome]:
    """The engines of the bundle themselves run here."""
    if subject.executed is None:
        yield Finding(value=None, detail=subject.not_executed)
    elif not subject.executed.rebuilt:
        yield counted([], "the engines of the bundle run here", on=subject.executed.on)
    elif subject.wants_graphs:
        yield NotApplicable(reason="the graphs of the engines were asked for")
    else:
        yield Finding(value=None, detail=subject.not_own)


def inputs(subject: Subject) -> Iterator[Outcome]:
    """What the host computes before any engine runs equals the reference bit by bit."""
    if subject.golden is None:
        yield Finding(value=None, detail=subject.no_golden)
        return
    for case in subject.golden.cases:
        try:
            checked, differing = differing_inputs(subject.bundle, case)
        except RequestError as problem:
            yield Finding(value=None, detail=not_taken(problem), case=case.record.name)
            continue
        yield counted(differing, f"{checked} tensors equal the reference's", case=case.record.name, on="NumPy")


def modulation(subject: Subject) -> Iterator[Outcome]:
    """The stored modulation tables against their weights, in the bundle or in the one that was built again."""
    weights = _with_weights(subject)
    if weights is None:
        yield Finding(value=None, detail=_NO_WEIGHTS)
        return
    tables = table_errors(subject.bundle, subject.recipe, weights=weights, progress=subject.progress)
    if tables:
        errors = [table.error for table in tables]
        worst = tables[int(np.argmax(errors))].path
        steps = sum(table.steps for table in tables)
        detail = f"{steps} steps of {len(tables)} tables, worst {worst}"
        yield Finding(value=float(np.max(errors)), on="NumPy", detail=detail)
    else:
        yield NotApplicable(reason="the bundle has no modulation tables of its recipe's schedules")


def _with_weights(subject: Subject) -> Bundle | None:
    """The bundle itself, or the one that was built again from its checkpoint: the one that has its weights."""
    record, executed = subject.bundle.manifest.model.modulation, subject.executed
    if record.file is not None:
        return subject.bundle
    again = executed is not None and executed.bundle.manifest.model.modulation
    return executed.bundle if executed and again and again.file and again.identity == record.identity else None


def vision(executed: Executed, case: GoldenCase) -> tuple[float, str]:
    """Image embeddings of the case's images."""
    embeds_VD = executed.stages.vision(vision_of(executed.bundle, case))
    return relative_l2(embeds_VD, case.image_embeds), f"{len(embeds_VD)} image embeddings"


def language(executed: Executed, case: GoldenCase) -> tuple[float, str]:
    """Prompt embeddings of instruction and negative prompt, from the reference's image embeddings."""
    prompts = prompt_tokens(executed.bundle, executed.tokenizer, case)
    found = [embeds_BLD[0] for embeds_BLD in executed.stages.language(prompts, case.image_embeds)]
    expected = [case.prompt_embeds, *([] if case.negative_embeds is None else [case.negative_embeds])]
    shapes = [a.shape for a in found], [b.shape for b in expected]
    if shapes[0] != shapes[1]:
        return float("inf"), f"prompt embeddings {shapes[0]}, expected {shapes[1]}"
    return pooled_relative_l2(found, expected), f"{sum(len(a) for a in found)} prompt embeddings"


def vae_encoder(executed: Executed, case: GoldenCase) -> tuple[float, str]:
    """Latents of the reference images."""
    found = [
        latents_hwC.reshape(-1, latents_hwC.shape[-1]) for latents_hwC in executed.stages.encode(case.reference_images)
    ]
    return pooled_relative_l2(found, case.reference_latents), f"{sum(len(a) for a in found)} latent tokens"


def transformer(executed: Executed, case: GoldenCase) -> tuple[float, str]:
    """Velocities of all recorded steps and both passes, from the reference's latents and embeddings."""
    steps = forced(executed, case)
    found = [step.velocity for step in steps]
    expected = list(case.velocity)
    if case.negative_velocity is not None:
        found += [step.negative_velocity for step in steps if step.negative_velocity is not None]
        expected += list(case.negative_velocity)
    return pooled_relative_l2(found, expected), f"{len(found)} passes of {len(steps)} steps"


def vae_decoder(executed: Executed, case: GoldenCase) -> tuple[float, str]:
    """Pixels of the reference's last latents."""
    rows, columns = case.record.height // SIDE_MULTIPLE, case.record.width // SIDE_MULTIPLE
    (image_HWC,) = executed.stages.decode([case.final_latents.reshape(rows, columns, -1)])
    expected_HWC = np.asarray(case.edit)
    largest = int(np.abs(image_HWC.astype(np.int16) - expected_HWC).max())
    return relative_l2(
        image_HWC, expected_HWC
    ), f"{case.record.width}x{case.record.height}, pixels differ by {largest} at most"


RUNS: dict[Component, Values] = {
    "vision": vision,
    "language": language,
    "vae_encoder": vae_encoder,
    "transformer": transformer,
    "vae_decoder": vae_decoder,
}
assert tuple(RUNS) == COMPONENTS


def component(executed: Executed, case: GoldenCase, *, name: Component) -> Finding:
    """One component on the inputs of a case."""
    value, detail = RUNS[name](executed, case)
    return Finding(value=value, case=case.record.name, on=executed.on, detail=detail)


SPECS = (
    CheckSpec(
        level="components",
        name="engines",
        metric="engines that do not run",
        unit="",
        gate=None,
        sense="at most",
        run=engines,
    ),
    CheckSpec(
        level="components",
        name="inputs",
        metric="tensors that differ",
        unit="",
        gate=None,
        sense="at most",
        run=inputs,
    ),
    CheckSpec(
        level="components",
        name="modulation",
        metric="relative L2",
        unit="",
        gate="gates.components.modulation",
        sense="at most",
        run=modulation,
    ),
    *(
        CheckSpec(
            level="components",
            name=name,
            metric="relative L2",
            unit="",
            gate=f"gates.components.{name}",
            sense="at most",
            run=for_cases(partial(component, name=name)),
        )
        for name in COMPONENTS
    ),
)
