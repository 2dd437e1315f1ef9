"""``qie golden``: what the reference computes for a set of edits, recorded for validation."""

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from qie.compiler.cli.options import DEFAULT_MODEL, LoraOption, ModelArgument, RevisionOption
from qie.engines.cli.options import JsonOption, print_json
from qie.engines.errors import GoldenError
from qie.engines.terminal import Bars, human_bytes, say

__all__ = ["golden"]

DTYPES = ("float32", "bfloat16")


def golden(
    model: ModelArgument = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("golden.safetensors"),
    cases: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", help="Edits to record.", show_default="the checkpoint's own, else those of qie"
        ),
    ] = None,
    lora: LoraOption = None,
    revision: RevisionOption = None,
    dtype: Annotated[str, typer.Option(help="Precision of the reference: float32 or bfloat16.")] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Record the edits that validation compares with.

    Runs the diffusers pipeline in PyTorch on the CPU, once; validation itself needs neither.
    """
    from qie.compiler.planning.resolve import compile_packages

    if dtype not in DTYPES:
        raise GoldenError(f"the dtype is {dtype!r}, expected {' or '.join(DTYPES)}; choose one", option="dtype")
    with compile_packages():
        from qie.compiler.validation.golden.record import record_golden

    with Bars(enabled=not as_json) as bars:
        written = record_golden(
            model,
            out,
            cases=cases,
            loras=lora or (),
            revision=revision,
            dtype=cast(Literal["float32", "bfloat16"], dtype),
            progress=bars,
        )
    record, size = written.record, out.stat().st_size
    steps = sum(len(case.recorded) for case in record.cases)
    modules = sum(len(one.names) for one in record.modules)
    if as_json:
        return print_json(
            {
                "golden": str(out),
                "bytes": size,
                "model": record.model,
                "digest": record.digest,
                "dtype": record.dtype,
                "cases": [case.name for case in record.cases],
                "steps": steps,
                "modules": modules,
            }
        )
    say(f"{out}: {len(record.cases)} cases, {steps} steps, {modules} modules, {human_bytes(size)}")
    return None
