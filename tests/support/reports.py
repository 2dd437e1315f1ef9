"""Reports of validations: passed, failed, incomplete, and with hostile and extreme data."""

from dataclasses import replace
from typing import Any

import numpy as np

from qie.compiler.validation.golden.file import png
from qie.compiler.validation.report import (
    Bisection,
    CaseImages,
    Check,
    Gate,
    Inapplicable,
    Measurement,
    Operation,
    Provenance,
    Report,
)
from qie.engines.bundle.manifest import Component
from qie.engines.gpus import Gpu
from qie.engines.machine import GIB, Machine
from tests.support.images import smooth_image

__all__ = [
    "HOSTILE",
    "check",
    "failed_report",
    "hostile_report",
    "incomplete_report",
    "not_run",
    "passed_report",
    "rebuilt",
    "sound_bisection",
]

HOSTILE = (
    "</style></title><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>\"'`|*_[a](https://b.example)"
    " ![](http://c.example/d.png) \x00\x1b[31m\u202e\ud800\uffff ]]> &lt; $x$ @all # ~~\n| a | b |\n\n- c"
)
"""Text that breaks out of HTML, attributes, XML, Markdown, tables and terminals where it is not escaped."""

ON = "onnxruntime 1.32.0 on the CPU"
CASES = ("tint", "flip", "invert", "pixelate", "two images")
INSTRUCTIONS = ("tint it purple", "flip it upside down", "invert the colours", "pixelate it", "put 1 beside 2")


def check(name: str, value: float | None, bound: float, **fields: Any) -> Check:
    """A check whose result follows from its value."""
    sense = fields.pop("sense", "at most")
    level = fields.get("level", "components")
    gate = Gate(key=fields.pop("key", f"gates.{level}.{name}"), sense=sense, bound=bound)
    result = "not run" if value is None else "passed" if gate.holds(value) else "failed"
    values: dict[str, Any] = {
        "level": level,
        "case": None,
        "on": ON if value is not None else "",
        "metric": "relative L2",
        "unit": "",
        "detail": "",
        "seconds": 0.25,
    }
    return Check(name=name, value=value, gate=gate, result=result, **(values | fields))


def not_run(one: Check) -> Check:
    """``one`` as it is where nothing on this machine executes it."""
    detail = "this machine has no GPU of compute capability 8.9; run `qie validate` on one"
    return replace(one, value=None, result="not run", on="", steps=(), detail=detail)


def _checks() -> list[Check]:
    found = [
        check("files", 0, 0, level="structure", key=None, metric="files that differ", detail="24 files, 38.4 MB"),
        check("fused_attention", 1.0, 1.0, level="structure", sense="at least", metric="fraction of attention layers"),
        check("quantized_kernels", 1.0, 0.98, level="structure", sense="at least", metric="fraction of linears"),
        check("vision", 0.0031, 0.03),
        check("language", 0.0048, 0.03),
        check("vae_encoder", 0.0102, 0.03),
        check("transformer", 0.0217, 0.03, detail="over steps 1 to 4 of five cases"),
        check("vae_decoder", 0.0054, 0.03),
    ]
    for number, case in enumerate(CASES):
        steps = tuple(0.004 * (1 + 0.2 * number) * 1.8**step for step in range(4))
        found.append(check("velocity", max(steps), 0.05, level="trajectory", case=case, steps=steps, seconds=1.5))
    for number, case in enumerate(CASES):
        psnr = {"level": "edits", "sense": "at least", "metric": "PSNR", "unit": "dB", "case": case, "seconds": 0.4}
        found.append(check("psnr", 41.25 - 2 * number, 28, **psnr))
    found.append(check("memory", 1.02, 1.1, level="edits", metric="peak memory, of planned", detail="712 of 698 MiB"))
    return found


def _images(case: str, instruction: str, seed: int, inputs: int, size: tuple[int, int]) -> CaseImages:
    reference = np.asarray(smooth_image(*size, seed + 10, grain=4))
    noise = np.random.default_rng(seed).normal(0, 3, reference.shape)
    edit = (reference + noise).clip(0, 255).astype(np.uint8)
    return CaseImages(
        case=case,
        instruction=instruction,
        inputs=tuple(png(smooth_image(*size, seed + k)).tobytes() for k in range(inputs)),
        reference=png(reference).tobytes(),
        edit=png(edit).tobytes(),
    )


def passed_report() -> Report:
    """Every level passed: 19 checks, five cases with images."""
    images = tuple(
        _images(case, text, seed, 2 if case == "two images" else 1, (160, 96))
        for seed, (case, text) in enumerate(zip(CASES, INSTRUCTIONS, strict=True))
    )
    gpu = Gpu(index=0, name="NVIDIA L40S", compute_capability="8.9", memory_gib=44.4)
    machine = Machine(
        system="Linux 6.8", cpu="AMD EPYC 7B13", cores=16, memory_gib=118.0, gpus=(gpu,), cuda="12.9", driver="575.57"
    )
    return Report(
        qie="0.1.0",
        created="2026-01-02T03:04:05Z",
        level="edits",
        required=False,
        provenance=Provenance(
            bundle="bundles/pocket-l40s",
            manifest="4be1" * 16,
            model="pocket",
            checkpoint="a0c3" * 16,
            loras=("style.safetensors:0.8",),
            recipe="l40s",
            recipe_digest="77d0" * 16,
            engines=tuple(
                f"{component}: tensorrt-rtx 1.7.1, 8.9"
                for component in ("vision", "language", "vae_encoder", "transformer", "vae_decoder")
            ),
            ran="tensorrt-rtx 1.7.1, GPU",
            golden="recipes/pocket/golden.safetensors",
            golden_digest="e19f" * 16,
            reference=(("torch", "2.13.0"), ("diffusers", "0.42.1")),
            machine=machine,
            packages=(("qie", "0.1.0"), ("tensorrt-rtx-cu12", "1.7.1.116"), ("numpy", "2.4.6")),
        ),
        checks=tuple(_checks()),
        inapplicable=(Inapplicable(level="edits", name="threads", reason="the engines run on a GPU"),),
        measurements=(
            Measurement(name="denoise", case="tint", value=0.212, unit="s"),
            Measurement(name="edit", case="tint", value=0.31, unit="s", planned=0.25),
            Measurement(name="peak memory", case=None, value=712 * 2**20, unit="bytes", planned=698 * 2**20),
            Measurement(name="host memory", case=None, value=1.5 * GIB, unit="bytes"),
        ),
        images=images,
        bisections=(),
        seconds=21.7,
    )


def incomplete_report(*, required: bool = False) -> Report:
    """Only the structure was checked; the rest did not run."""
    report = passed_report()
    checks = tuple(one if one.level == "structure" else not_run(one) for one in report.checks)
    machine = replace(report.provenance.machine, gpus=(), cuda=None, driver=None)
    return replace(
        report,
        required=required,
        checks=checks,
        images=(),
        measurements=(),
        provenance=replace(report.provenance, machine=machine, ran=None),
    )


def failed_report(operations: int = 1500) -> Report:
    """A transformer that leaves the reference in block 3, with a bisection of ``operations``, and checks not run."""
    report = passed_report()
    changed = {
        "transformer": 0.0713,
        "velocity": 0.31,
    }
    checks = []
    for one in report.checks:
        if one.name == "memory":
            checks.append(not_run(one))
        elif one.name in changed and one.case in (None, "flip"):
            steps = tuple(value * 12 for value in one.steps)
            gate = one.gate
            checks.append(
                check(
                    one.name,
                    max(steps, default=changed[one.name]),
                    gate.bound,
                    level=one.level,
                    case=one.case,
                    steps=steps,
                    detail="the largest error is at step 4 of case flip; bisect it",
                )
            )
        else:
            checks.append(one)
    return replace(report, checks=tuple(checks), bisections=(bisection(operations),))


def bisection(operations: int) -> Bisection:
    """A bisection of the transformer whose block 3 is the first outside the tolerance."""
    names = ("img_mod", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mlp.net.0", "img_mlp.net.2")
    rng = np.random.default_rng(0)
    found = []
    for number in range(operations):
        block, name = f"transformer_blocks.{number // len(names)}", names[number % len(names)]
        grown = 1e-5 * 1.0006**number * float(rng.uniform(0.5, 2))
        error = grown if number < 3 * len(names) + 1 else 0.02 + 0.1 * float(rng.uniform(0.3, 2)) + number * 1e-5
        found.append(
            Operation(
                name=f"{block}.{name}",
                block=block,
                similarity=1 - error**2 / 2,
                relative_l2=error,
                tolerance=0.02,
                tensors=(f"{block}.{name}.weight", f"{block}.{name}.bias"),
                source="compiler/graphs/layers.py:58",
            )
        )
    return Bisection(
        component="transformer",
        case="flip",
        on=ON,
        first_block="transformer_blocks.3",
        first_operation="transformer_blocks.3.attn.to_q",
        operations=tuple(found),
    )


def sound_bisection(component: Component, operations: int) -> Bisection:
    """A bisection in which all is within its tolerance; the last operation has the largest distance."""
    found = bisection(operations)
    sound = tuple(
        replace(op, relative_l2=1e-4 * number, similarity=1.0) for number, op in enumerate(found.operations, start=1)
    )
    return replace(found, component=component, first_block=None, first_operation=None, operations=sound)


def rebuilt(report: Report) -> Report:
    """``report`` as it is where graphs ran in place of the engines."""
    return replace(report, provenance=replace(report.provenance, rebuilt=True))


def hostile_report() -> Report:
    """The failed report with hostile text wherever there is text, and numbers that are not finite."""
    report = failed_report(operations=30)
    nan, inf = float("nan"), float("inf")
    odd = [
        check("nan", nan, 0.05, level="trajectory", case=HOSTILE, steps=(0.01, nan, 0.02, inf, -inf, 0.0)),
        check("inf", inf, 0.03, metric=HOSTILE, unit=HOSTILE, on=HOSTILE, detail=HOSTILE, key=HOSTILE),
        check("minus inf", -inf, 28, level="edits", sense="at least", unit="dB"),
        check(HOSTILE, None, 0.03, case=HOSTILE, detail=HOSTILE),
        check("all nan", nan, 0.03, level="trajectory", case="one", steps=(nan,)),
    ]
    (found,) = report.bisections
    bad = replace(
        found.operations[0],
        name=HOSTILE,
        block=HOSTILE,
        similarity=nan,
        relative_l2=inf,
        tensors=(HOSTILE,),
        source=HOSTILE,
    )
    odd_bisection = replace(
        found,
        case=HOSTILE,
        on=HOSTILE,
        first_block=HOSTILE,
        first_operation=HOSTILE,
        operations=(bad, *found.operations),
    )
    origin = replace(
        report.provenance,
        bundle=HOSTILE,
        manifest=HOSTILE,
        model=HOSTILE,
        checkpoint=HOSTILE,
        loras=(HOSTILE,) * 3,
        recipe=HOSTILE,
        recipe_digest=HOSTILE,
        engines=(HOSTILE,),
        ran=HOSTILE,
        golden=HOSTILE,
        golden_digest=HOSTILE,
        reference=((HOSTILE, HOSTILE),),
        machine=replace(report.provenance.machine, cpu=HOSTILE, system=HOSTILE),
        packages=((HOSTILE, HOSTILE),),
    )
    return replace(
        report,
        qie=HOSTILE,
        created=HOSTILE,
        provenance=origin,
        checks=(*report.checks, *odd),
        measurements=(
            Measurement(name=HOSTILE, case=HOSTILE, value=nan, unit="s", planned=inf),
            Measurement(name="none", case=None, value=0.0, unit="bytes", planned=0.0),
        ),
        images=(replace(report.images[0], case=HOSTILE, instruction=HOSTILE), *report.images[1:]),
        bisections=(odd_bisection, replace(found, operations=(), first_block=None, first_operation=None)),
    )
