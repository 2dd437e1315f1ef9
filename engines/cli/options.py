"""What the commands share: options, sizes, examples in the help, and JSON."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from qie.engines.errors import RequestError
from qie.engines.files import is_writable
from qie.engines.terminal import say

__all__ = [
    "BundleArgument",
    "BundleOption",
    "DeviceOption",
    "JsonOption",
    "VllmUrlOption",
    "check_out",
    "examples",
    "parse_size",
    "print_json",
]

BundleArgument = Annotated[str, typer.Argument(metavar="BUNDLE", help="Name or folder of a bundle.")]
BundleOption = Annotated[
    str | None, typer.Option("--bundle", help="Name or folder of a bundle.", show_default="the newest that runs here")
]
DeviceOption = Annotated[
    int | None,
    typer.Option(
        "--device", metavar="N", min=0, help="GPU, as `qie doctor` lists them.", show_default="the first that fits"
    ),
]
VllmUrlOption = Annotated[
    str | None,
    typer.Option(
        "--vllm-url",
        metavar="URL",
        help="vLLM server that runs the language model.",
        show_default="the bundle's engine",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


def examples(*commands: str) -> str:
    """The end of a command's help: command lines that work as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def check_out(path: Path | None, option: str = "out") -> None:
    """Check before work is spent on it that the file ``path`` of ``option`` can be written; None is no file.

    Raises:
        RequestError: its folder is missing or read-only, or it is a folder, a device or a read-only file.
    """
    if path is not None and not is_writable(path):
        raise RequestError(f"{path} cannot be written; choose a file in an existing folder", option=option)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Width and height of ``1024x768``.

    Raises:
        RequestError: it is something else.
    """
    if text is None:
        return None
    match = SIZE.fullmatch(text.strip().lower())
    if match is None:
        raise RequestError(
            f"the size is {text!r}, expected width x height in pixels; give one such as 1024x768", option="size"
        )
    return int(match[1]), int(match[2])


def print_json(value: Any) -> None:
    """Print plain data as indented JSON."""
    say(json.dumps(value, indent=2, ensure_ascii=False))
