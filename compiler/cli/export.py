"""``qie export``: the graphs of a model as ONNX files."""

from pathlib import Path
from typing import Annotated

import typer

from qie.compiler.cli.options import (
    DEFAULT_MODEL,
    AllowUnreadOption,
    CalibrationOption,
    GpuOption,
    LanguageOption,
    LoraOption,
    ModelArgument,
    RevisionOption,
)
from qie.engines.cli.options import JsonOption, print_json
from qie.engines.terminal import Bars, say

__all__ = ["export"]


def export(
    model: ModelArgument = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("graphs"),
    gpu: GpuOption = "cpu",
    language: LanguageOption = None,
    weights: Annotated[bool, typer.Option("--weights/--no-weights", help="Write the weights too.")] = True,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, metavar="GPUS", help="GPUs to split a checkpoint for TensorRT-LLM over: 1, 2 or 4.")
    ] = 1,
    lora: LoraOption = None,
    calibration: CalibrationOption = None,
    revision: RevisionOption = None,
    allow_unread: AllowUnreadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the graphs of a model as ONNX files.

    They are the graphs that `qie build` compiles: precision, quantization and LoRAs included. With `--language
    tensorrt-llm` the checkpoint for TensorRT-LLM is written too.
    """
    from qie.compiler.planning.resolve import plan_build

    plan = plan_build(
        model,
        gpu=gpu,
        loras=lora or (),
        calibration=calibration,
        out=out,
        revision=revision,
        allow_unread=allow_unread,
        language=language,
    )

    from qie.compiler.packing.export import export_graphs

    with Bars(enabled=not as_json) as bars:
        files = export_graphs(plan, weights=weights, tensor_parallel=tensor_parallel, progress=bars)
    if as_json:
        return print_json({"files": [str(file) for file in files]})
    for file in files:
        say(str(file))
    return None
