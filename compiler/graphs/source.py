"""The lines of code that write each node of a graph, kept in the node's metadata."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import onnx_ir as ir

__all__ = ["SOURCE", "SourceLines"]

SOURCE = "qie.source"
"""The key of a node's metadata: ``compiler/graphs/transformer.py:253``, and after a comma the line of ``layers.py`` for
a node of a layer that is written there."""

GRAPHS = Path(__file__).parent
LAYERS = "layers.py"


class SourceLines:
    """An ``OpBuilder`` of onnxscript that notes at every node which lines wrote it."""

    def __init__(self, op: Any) -> None:
        self._op = op

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._op, name)
        if not name[0].isupper():  # operators alone are capitalized
            return attribute

        def operator(*inputs: Any, **attributes: Any) -> Any:
            outputs = attribute(*inputs, **attributes)
            first: ir.Value = outputs[0] if isinstance(outputs, Sequence) else outputs
            node = first.producer()
            assert node is not None
            node.metadata_props[SOURCE] = ", ".join(reversed([*_lines(inspect.currentframe())]))
            return outputs

        return operator


def _lines(frame: FrameType | None) -> Iterator[str]:
    """The lines of graphs that lead to ``frame``, innermost first, up to the first one outside of the shared layers."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.parent == GRAPHS and file != Path(__file__):
            yield f"{'/'.join(file.parts[-3:])}:{frame.f_lineno}"
            if file.name != LAYERS:
                return
        frame = frame.f_back
