"""Where a component leaves the reference: its graph run once, with the output of every module beside the golden one.

A component in parts runs part after part.

A module of the graph is the nodes of one scope. Its output is what leaves the scope: of a layer the last value, of a
transformer block the image stream first and then the text stream.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from qie.compiler.graphs.source import SOURCE
from qie.compiler.metrics.error import cosine, relative_l2
from qie.compiler.recipe.schema import Recipe
from qie.compiler.validation.golden.file import Golden, ModulesRecord
from qie.compiler.validation.golden.modules import SCOPES, TEXT, rows_of
from qie.compiler.validation.golden.places import sample_places
from qie.compiler.validation.host import component_feed
from qie.compiler.validation.onnx_file import output_divisors, read_graph
from qie.compiler.validation.report import Bisection, Operation
from qie.compiler.validation.subject import Executed, Subject
from qie.engines.bundle.manifest import COMPONENTS, Component, EngineRecord
from qie.engines.errors import EngineError, first_line
from qie.engines.sessions.onnxruntime import session_options

__all__ = ["bisect", "bisectable", "bisection"]

AT_ONCE = 64
"""Outputs that are kept of one run, so that a graph of many blocks fits into memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Module:
    """A module of a graph.

    Attributes:
        outputs: names of the values that leave its scope, in the order of the graph.
        tensors: of the checkpoint, that nodes of the scope read.
        source: of the node that writes the last output.
        place: of that node in the graph.
    """

    outputs: tuple[str, ...]
    tensors: tuple[str, ...]
    source: str
    place: int


def bisectable(executed: Executed, golden: Golden) -> tuple[Component, ...]:
    """The components that run as an ONNX graph on the CPU and have samples in the golden file."""
    engines = executed.stages.engines
    return tuple(
        c
        for c in COMPONENTS
        if c in golden.modules and (engines[c][0].backend, engines[c][0].compute_capability) == ("onnxruntime", "cpu")
    )


def bisection(subject: Subject, component: Component) -> Bisection:
    """``bisect`` with the tolerance of the recipe, run once for each component; nothing may be in the way."""
    executed, golden = subject.executed, subject.golden
    assert executed is not None
    assert golden is not None
    return executed.once("bisection", component, lambda: bisect(executed, golden, component, recipe=subject.recipe))


def bisect(executed: Executed, golden: Golden, component: Component, *, recipe: Recipe) -> Bisection:
    """Run the graph of ``component`` on the inputs of the first golden case and compare its modules.

    Args:
        executed: engines, for which ``bisectable`` gives the component.
        golden: of the same model.
        component: to run.
        recipe: of the bundle. Its gate is the largest relative L2 error of a module's output, over the samples in the
            golden file; its scheme may divide outputs, which is undone.

    Raises:
        EngineError: onnxruntime cannot load or run the graph.
    """
    case = golden.cases[0]
    record = next(modules for modules in golden.record.modules if modules.component == component)
    parts, tolerance = executed.stages.engines[component], recipe.gates.trajectory.block
    feed = component_feed(executed, case, component, step=record.step)
    operations: list[Operation] = []
    for engine in parts:
        model = executed.bundle.folder.read(lambda folder, path=engine.path: read_graph(folder / path))  # type: ignore[misc]
        divisors = output_divisors(executed.bundle, engine, recipe)
        modules = _modules(model.graph)
        wanted = {name: output for name in record.names if (output := _output(modules, name)) is not None}
        names = sorted(wanted, key=lambda name: modules[name.removesuffix(TEXT)].place)
        read = {spec.name: feed[spec.name] for spec in engine.inputs}
        for start in range(0, len(names), AT_ONCE):
            batch = names[start : start + AT_ONCE]
            values = _values(executed, model, engine, [wanted[name] for name in batch], read)
            for name in batch:
                module, value = modules[name.removesuffix(TEXT)], values[wanted[name]]
                exact = value * divisors[name] if name in divisors else value
                operations.append(_compared(name, module, exact, golden, record, tolerance))
        if engine is not parts[-1]:
            feed |= _values(executed, model, engine, [spec.name for spec in engine.outputs], read)
    found = {operation.name for operation in operations}
    outside = [operation for operation in operations if not operation.relative_l2 <= operation.tolerance]
    return Bisection(
        component=component,
        case=case.record.name,
        on=executed.on,
        first_block=next((operation.name for operation in outside if operation.whole_block), None),
        first_operation=next((operation.name for operation in outside if not operation.whole_block), None),
        operations=tuple(operations),
        lacking=tuple(name for name in record.names if name not in found),
    )


def _compared(
    name: str, module: _Module, value: NDArray[Any], golden: Golden, record: ModulesRecord, tolerance: float
) -> Operation:
    """The output of one module beside its samples."""
    shape = record.shapes[record.names.index(name)]
    rows = rows_of(value, record.component)
    places = sample_places(shape)
    there = places[:, 0] < len(rows)
    expected = golden.modules[record.component][name][there]
    fits = rows.shape[1] == shape[1]
    found = rows[places[there, 0], places[there, 1]] if fits else np.full_like(expected, np.nan)
    return Operation(
        name=name,
        block=_block(name, record.blocks),
        similarity=cosine(found, expected),
        relative_l2=relative_l2(found, expected),
        tolerance=tolerance,
        tensors=module.tensors,
        source=module.source,
        whole_block=name in record.blocks,
    )


def _block(name: str, blocks: Sequence[str]) -> str | None:
    """The block that ``name`` belongs to, or is."""
    whole, names = name.removesuffix(TEXT), {block.removesuffix(TEXT) for block in blocks}
    inside = [block for block in names if whole == block or whole.startswith(f"{block}.")]
    return max(inside, key=len, default=None)


def _output(modules: Mapping[str, _Module], name: str) -> str | None:
    """The value that is the output ``name`` of a module; None where the graph has no such module."""
    module = modules.get(name.removesuffix(TEXT))
    if module is None or not module.outputs:
        return None
    if name.endswith(TEXT):
        return module.outputs[1] if len(module.outputs) > 1 else None
    is_block = name.startswith("transformer_blocks.") and name.count(".") == 1
    return module.outputs[0] if is_block else module.outputs[-1]


def _modules(graph: onnx.GraphProto) -> dict[str, _Module]:
    """The modules of a graph by the names of their scopes, joined by dots."""
    scopes = [_scope(node) for node in graph.node]
    readers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers[name].append(index)
    results = {value.name for value in graph.output}
    weights = {w.name for w in graph.initializer if w.data_location == onnx.TensorProto.EXTERNAL}
    outputs: dict[str, list[tuple[int, str]]] = defaultdict(list)
    tensors: dict[str, dict[str, None]] = defaultdict(dict)
    for index, node in enumerate(graph.node):
        for scope in _around(scopes[index]):
            tensors[scope] |= dict.fromkeys(name.removesuffix(".scale") for name in node.input if name in weights)
            for name in node.output:
                outside = [r for r in readers[name] if not _is_inside(scopes[r], scope)]
                if outside or name in results:
                    outputs[scope].append((index, name))
    return {
        scope: _Module(
            outputs=tuple(name for _, name in leaving),
            tensors=tuple(tensors[scope]),
            source=_property(graph.node[leaving[-1][0]], SOURCE),
            place=leaving[-1][0],
        )
        for scope, leaving in outputs.items()
    }


def _around(scope: str) -> Iterator[str]:
    """``a.b.c``, ``a.b`` and ``a`` of the scope ``a.b.c``."""
    while scope:
        yield scope
        scope = scope.rpartition(".")[0]


def _is_inside(scope: str, outer: str) -> bool:
    return scope == outer or scope.startswith(f"{outer}.")


def _scope(node: onnx.NodeProto) -> str:
    return ".".join(filter(None, ast.literal_eval(_property(node, SCOPES) or "[]")))


def _property(node: onnx.NodeProto, key: str) -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == key), "")


def _values(
    executed: Executed,
    model: onnx.ModelProto,
    engine: EngineRecord,
    names: Sequence[str],
    feed: Mapping[str, NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """The values ``names`` of the graph ``model`` of ``engine``."""
    return executed.bundle.folder.read(lambda folder: _run(model, engine, folder, names, feed))


def _run(
    model: onnx.ModelProto,
    engine: EngineRecord,
    folder: Path,
    names: Sequence[str],
    feed: Mapping[str, NDArray[Any]],
) -> dict[str, NDArray[Any]]:
    """The values ``names`` of the graph, whose weights are in ``folder``."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    present = {value.name for value in opened.graph.output}
    opened.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(names) if name not in present
    )
    options = session_options(engine)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        session = ort.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])
        values = session.run(list(names), dict(feed))
    except Exception as problem:
        raise EngineError(
            f"onnxruntime cannot run {engine.path} with the outputs of its modules ({first_line(problem)}); validate "
            "without bisecting"
        ) from problem
    return dict(zip(names, values, strict=True))
