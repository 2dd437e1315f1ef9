"""Differences between descriptions of engines, of which two are compiled by TensorRT for RTX."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.validation.diff.diff import diff_bundles
from qie.compiler.validation.diff.structure import (
    Description,
    LayerChange,
    diff_structures,
    read_description,
    without_numbers,
)
from qie.engines.bundle.bundle import Bundle, open_bundle
from qie.engines.bundle.manifest import file_record
from qie.engines.errors import BundleError
from qie.engines.records import from_plain, to_plain
from tests.support.damage import change_manifest
from tests.support.small_graphs import SHAPES, fp8_linear, linear, needs_rtx, record, small


def description(layers: list[tuple[str, str, str]], kernels: list[str], **changes: Any) -> Description:
    """A description of ``layers`` (name, type, precision) that ``kernels`` compute."""
    plain = {
        "layers": [[name, kind, [[precision, [-1, 64]]]] for name, kind, precision in layers],
        "layer_types": {},
        "layer_dtypes": {},
        "attention": {"layers": 0, "fused": 0, "types": []},
        "kernels": [[name, []] for name in kernels],
        "products": {"bf16": 1},
        "largest_buffer_bytes": 1024,
        "allocations": 0,
    }
    return from_plain(Description, plain | changes)


PLAIN = [("blocks.0/q/MatMul_node_7", "MATRIX_MULTIPLY", "BF16"), ("blocks.0/q/Add_node_8", "ELEMENTWISE", "BF16")]


def test_equal_descriptions_have_no_difference() -> None:
    assert not diff_structures(description(PLAIN, ["gemm"]), description(PLAIN, ["gemm"])).differs


def test_inserted_layers_do_not_rename_the_others() -> None:
    quantized = [
        ("blocks.0/q/MatMul_node_9.QuantizeLinear_1", "QUANTIZE", "FP8"),
        ("blocks.0/q/MatMul_node_9", "MATRIX_MULTIPLY", "FLOAT"),
        ("blocks.0/q/Add_node_12", "ELEMENTWISE", "BF16"),
    ]
    found = diff_structures(description(PLAIN, ["gemm"]), description(quantized, ["gemm", "gemm", "cast"]))
    assert found.layers == (
        LayerChange(
            kind="precision", name="blocks.0/q/MatMul", type="MATRIX_MULTIPLY", old="BF16", new="FLOAT", count=1
        ),
        LayerChange(
            kind="added", name="blocks.0/q/MatMul.QuantizeLinear", type="QUANTIZE", old=None, new="FP8", count=1
        ),
    )
    assert {c.key: (c.old, c.new) for c in found.kernels} == {"gemm": (1, 2), "cast": (None, 1)}
    assert {c.key: (c.old, c.new) for c in found.counts} == {"layers": (2, 3), "kernels": (1, 3)}


def test_layers_of_one_name_are_counted() -> None:
    old = description([("x/Slice_node_1", "SLICE", "BF16"), ("x/Slice_node_2", "SLICE", "BF16")], [])
    new = description([("x/Slice_node_1", "SLICE", "FLOAT"), ("x/Slice_node_2", "GATHER", "BF16")], [])
    kinds = [(c.kind, c.type, c.old, c.new, c.count) for c in diff_structures(old, new).layers]
    assert kinds == [
        ("precision", "SLICE", "BF16", "FLOAT", 1),
        ("removed", "SLICE", "BF16", None, 1),
        ("added", "GATHER", None, "BF16", 1),
    ]


def test_counts_of_attention_memory_and_products() -> None:
    attention = {"layers": 2, "fused": 2, "types": ["bf16"]}
    old = description(PLAIN, ["gemm"], attention=attention)
    new = description(PLAIN, ["gemm"], attention=attention | {"fused": 1}, products={"float": 1}, allocations=3,
                      largest_buffer_bytes=2048)  # fmt: skip
    assert {c.key: (c.old, c.new) for c in diff_structures(old, new).counts} == {
        "fused attention": (2, 1),
        "library products in bf16": (1, None),
        "library products in float": (None, 1),
        "largest buffer, bytes": (1024, 2048),
        "run-time allocations": (0, 3),
    }


def test_what_a_backend_does_not_report_is_no_kernel() -> None:
    old = description(PLAIN, ["gemm"])
    found = diff_structures(old, replace(old, kernels=None, products=None, largest_buffer_bytes=None, allocations=None))
    assert {c.key: c.new for c in found.counts if c.key == "kernels"} == {"kernels": None}
    assert [(c.key, c.new) for c in found.kernels] == [("gemm", None)]


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("transformer_blocks.0/attn/to_q/MatMul_node_74", "transformer_blocks.0/attn/to_q/MatMul"),
        ("transformer_blocks.12/attn/to_q/MatMul_node_74.Cast_25", "transformer_blocks.12/attn/to_q/MatMul.Cast"),
        ("transformer_blocks.0/Split_node_22_60", "transformer_blocks.0/Split"),
        ("ONNXTRT_ShapeElementWise_17", "ONNXTRT_ShapeElementWise"),
        ("(Unnamed Layer* 60) [Constant]", "(Unnamed Layer* ) [Constant]"),
        ("const_1d_0", "const_1d"),
        ("transformer_blocks.4.img_mlp.net.2.weight", "transformer_blocks.4.img_mlp.net.2.weight"),
        ("encoder.down_blocks.0.conv1.weight", "encoder.down_blocks.0.conv1.weight"),
    ],
)
def test_running_numbers_are_left_out(name: str, bare: str) -> None:
    assert without_numbers(name) == bare


@pytest.fixture
def with_structure(bundle: Path, tmp_path: Path) -> Any:
    """A copy of the bundle whose transformer has the description ``content``."""

    def put(name: str, content: bytes) -> Bundle:
        folder = Path(shutil.copytree(bundle, tmp_path / name))
        (folder / "transformer.json").write_bytes(content)
        engines = json.loads((folder / "manifest.json").read_text())["engines"]
        structure = to_plain(file_record(folder, "transformer.json"))
        change_manifest(
            folder, engines=[e | {"structure": structure} if e["component"] == "transformer" else e for e in engines]
        )
        return open_bundle(folder)

    return put


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"layers": [["x", 1, []]]}'])
def test_a_damaged_description_is_refused(bundle: Path, with_structure: Any, content: bytes) -> None:
    good = with_structure("good", json.dumps(to_plain(description(PLAIN, ["gemm"]))).encode())
    with pytest.raises(BundleError, match="is no description of an engine"):
        diff_bundles(good, with_structure("bad", content))


def test_a_description_on_one_side_is_a_change(bundle: Path, with_structure: Any) -> None:
    good = with_structure("good", json.dumps(to_plain(description(PLAIN, ["gemm"]))).encode())
    (engine,) = [e for e in diff_bundles(open_bundle(bundle), good).engines if e.differs]
    assert engine.structure is None
    assert [(c.key, c.old) for c in engine.changes] == [("transformer.json", None)]


@needs_rtx
def test_compiled_engines(bundle: Path, with_structure: Any, tmp_path: Path) -> None:
    """A linear in bfloat16, and the same in FP8."""
    contents = []
    for name, model in (("plain", linear()), ("fp8", fp8_linear())):
        folder = tmp_path / f"graph-{name}"
        folder.mkdir()
        engine = BUILDERS["tensorrt-rtx"].build(record(folder, model, **SHAPES), folder, key="0" * 64,
                                                recipe=small("l40s"))  # fmt: skip
        assert engine.structure is not None
        contents.append((folder / engine.structure.path).read_bytes())
    old, new = with_structure("plain", contents[0]), with_structure("fp8", contents[1])
    (engine,) = [e for e in diff_bundles(old, new).engines if e.differs]
    assert engine.structure is not None
    added = {(c.type, c.new) for c in engine.structure.layers if c.kind == "added"}
    assert ("QUANTIZE", "FP8") in added
    assert ("DEQUANTIZE", "BF16") in added
    kernels = {c.key: (c.old, c.new) for c in engine.structure.counts}["kernels"]
    assert kernels[1] > kernels[0] >= 1
    (transformer,) = [e for e in old.manifest.engines if e.component == "transformer"]
    assert read_description(old, transformer).products == {"bf16": 1}
