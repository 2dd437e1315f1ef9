"""What the compiler's commands share: arguments, options, and examples with the default model."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "DEFAULT_MODEL",
    "AllowUnreadOption",
    "CalibrationOption",
    "GpuOption",
    "LanguageOption",
    "LoraOption",
    "MemoryOption",
    "ModelArgument",
    "RevisionOption",
    "ScheduleOption",
]

DEFAULT_MODEL = "Qwen/Qwen-Image-Edit-2511"

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder in diffusers format, Hugging Face Hub id, or pocket.")
]
GpuOption = Annotated[str, typer.Option("--gpu", help="Recipe: a name that `qie recipes` lists, or a .toml file.")]
LoraOption = Annotated[
    list[str] | None, typer.Option("--lora", metavar="PATH[:WEIGHT]", help="LoRA to fuse; repeatable.")
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        help="Calibration file written by `qie calibrate`, for recipes that quantize; without one the build makes it.",
        show_default="the recipe's, else the model's own",
    ),
]
ScheduleOption = Annotated[
    str | None,
    typer.Option(
        help="Schedule of a distilled LoRA: lightning, lightning-4, lightning-8, or checkpoint for the model's own.",
        show_default="what the LoRAs say",
    ),
]
LanguageOption = Annotated[
    str | None,
    typer.Option(
        metavar="BACKEND", help="Backend of the language model, before the recipe's.", show_default="the recipe's"
    ),
]
MemoryOption = Annotated[
    float | None,
    typer.Option(
        "--memory-gib",
        metavar="GIB",
        help="Host memory that the build may use; larger components are built in parts.",
        show_default="9/10 of this machine's",
    ),
]
AllowUnreadOption = Annotated[
    bool, typer.Option("--allow-unread", help="Accept tensors of the checkpoint that nothing reads.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
