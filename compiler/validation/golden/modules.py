"""Samples of what the modules of the reference compute, by which an error is traced to the module that makes it.

The output of a module is seen as [rows, channels], as the graph of the component has it for one image:

- of a transformer or language layer, rows are tokens in the order of the sequence: noise before references in the
  image stream;
- of the vision tower, rows are patches (after the merger, tokens) in window order;
- of the VAE, rows are positions in raster order, and channels, which the tensors have on axis 1, come last;
- of ``language_model.norm``, rows begin after the prefix of the prompt's template, which the graph leaves out.

A graph may compute fewer rows than the reference, such as only those of noise tokens, which are the first ones.
"""

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qie.compiler.checkpoint.model import Model
from qie.compiler.graphs.components import GRAPHS
from qie.compiler.validation.golden.places import SAMPLES, sample_places
from qie.compiler.validation.golden.records import ModulesRecord
from qie.compiler.validation.reference import Reference
from qie.engines.bundle.manifest import Component
from qie.engines.inputs.prompt import PREFIX_TOKENS

__all__ = ["SAMPLES", "SCOPES", "TEXT", "ModuleSamples", "graph_modules", "rows_of", "sample_places", "sampled"]

Floats = NDArray[np.float32]

TEXT = " (text)"
"""What follows the name of a transformer block for its text stream; the name alone is its image stream."""

_BLOCK = re.compile(r"\b(?:transformer_blocks|blocks|layers|down_blocks|resnets|attentions)\.\d+$")
"""The names of whole blocks."""

SCOPES = "pkg.onnxscript.name_scopes"
"""Where onnxscript keeps the module of a node."""

_FIRST_INPUT = "visual.blocks.0"
_PATCHES = "visual.patch_embed.proj"


@dataclass(kw_only=True)
class ModuleSamples:
    """The samples of one component, in the order in which the modules ran.

    Attributes:
        component: the component.
        step: of the schedule, for the transformer.
        samples: float32 [S] by name, at ``sample_places`` of the shape.
        shapes: (rows, channels) by name.
        blocks: names of whole blocks.
    """

    component: Component
    step: int = 0
    samples: dict[str, Floats] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    blocks: list[str] = field(default_factory=list)

    def add(self, name: str, rows: Floats, *, block: bool) -> None:
        """Sample the output [rows, channels] of a module."""
        places = sample_places((rows.shape[0], rows.shape[1]))
        self.samples[name] = np.ascontiguousarray(rows[places[:, 0], places[:, 1]], np.float32)
        self.shapes[name] = (rows.shape[0], rows.shape[1])
        if block:
            self.blocks.append(name)

    def record(self) -> ModulesRecord:
        """The description of the samples."""
        return ModulesRecord(
            component=self.component,
            step=self.step,
            names=tuple(self.samples),
            shapes=tuple(self.shapes.values()),
            blocks=tuple(self.blocks),
        )


def graph_modules(model: Model, component: Component) -> frozenset[str]:
    """The modules that compute something in the graph of ``component``, as the checkpoint names their tensors."""
    scopes = (node.metadata_props.get(SCOPES, "[]") for node in GRAPHS[component](model, "float32").model.graph)
    return frozenset(".".join(filter(None, ast.literal_eval(scope))) for scope in scopes)


@contextmanager
def sampled(reference: Reference, model: Model, component: Component) -> Iterator[ModuleSamples]:
    """Inside the block, what the modules of a component compute is sampled: those that its graph has, too.

    These are its layers with weights, and whole blocks. What a module computes last counts.
    """
    found, wanted = ModuleSamples(component=component), graph_modules(model, component)
    handles = []
    for name, module in _root(reference, component).named_modules():
        block = _BLOCK.search(name) is not None
        weighted = any(True for _ in module.parameters(recurse=False))
        if name in wanted and (block or weighted) and name != _PATCHES:
            handles.append(module.register_forward_hook(_hook(found, name, wanted, block=block)))
        if name == _FIRST_INPUT and component == "vision":
            handles.append(module.register_forward_pre_hook(_patches_hook(found), with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _root(reference: Reference, component: Component) -> Any:
    """The torch module below which modules have the names of the graph."""
    pipeline = reference.pipeline
    roots: dict[Component, Any] = {
        "vision": pipeline.text_encoder.model,
        "language": pipeline.text_encoder.model,
        "vae_encoder": pipeline.vae,
        "transformer": pipeline.transformer,
        "vae_decoder": pipeline.vae,
    }
    return roots[component]


def _hook(found: ModuleSamples, name: str, wanted: frozenset[str], *, block: bool) -> Any:
    def see(_: Any, __: Any, output: Any) -> None:
        if found.component == "transformer" and block:
            text, image = output
            if f"{name}.txt_mlp.net.2" in wanted:  # the last block of the graph computes none
                found.add(name + TEXT, _rows(text, found.component), block=True)
            found.add(name, _rows(image, found.component), block=True)
            return
        rows = _rows(output[0] if isinstance(output, tuple) else output, found.component)
        found.add(name, rows[PREFIX_TOKENS:] if name == "language_model.norm" else rows, block=block)

    return see


def _patches_hook(found: ModuleSamples) -> Any:
    """The output of the patch embedding in window order, which is the input of the first block."""

    def see(_: Any, inputs: Any, named: Any) -> None:
        found.add(_PATCHES, _rows(inputs[0] if inputs else named["hidden_states"], found.component), block=False)

    return see


def _rows(output: Any, component: Component) -> Floats:
    return rows_of(output.float().numpy(), component)


def rows_of(array: NDArray[Any], component: Component) -> NDArray[Any]:
    """The output of a module for one image as [rows, channels]."""
    if component.startswith("vae"):  # [B, C, H, W] or [B, C, T, H, W]
        return array[0].reshape(array.shape[1], -1).T
    return array.reshape(-1, array.shape[-1])
