"""Exported graphs: they are valid ONNX, hold the checkpoint's tensors or none, and replace nothing but an export."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from qie.compiler.packing.export import export_graphs
from qie.compiler.planning.plan import Plan
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.manifest import COMPONENTS
from qie.engines.errors import BuildError
from tests.support.bundles import planned

Make = Callable[..., Plan]


@pytest.fixture
def make(checkpoint: Path, tmp_path: Path) -> Make:
    def make(recipe: str = "cpu", source: Path = checkpoint, *, weights: bool = True) -> Plan:
        return planned(source, tmp_path / "graphs", recipe, weights=weights)

    return make


def parameters(model: onnx.ModelProto) -> int:
    """Scalars that a graph takes from the checkpoint: those that are stored outside it."""
    outside = [i for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL]
    return sum(int(np.prod(tensor.dims)) for tensor in outside)


def test_with_weights(make: Make, checkpoint: Path) -> None:
    files = export_graphs(make(), weights=True)
    assert [file.name for file in files] == [f"{component}.onnx" for component in COMPONENTS]
    for file in files:
        onnx.checker.check_model(str(file), full_check=True)
        ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    tensors = load_file(next((checkpoint / "transformer").glob("*.safetensors")))
    model = onnx.load(str(files[COMPONENTS.index("transformer")]))
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer if i.name in tensors}
    assert len(stored) > 40
    name = "transformer_blocks.0.img_mlp.net.0.proj.bias"
    assert np.array_equal(stored[name], tensors[name])


def test_a_component_in_parts_is_exported_whole(make: Make, tmp_path: Path) -> None:
    (tmp_path / "parts.toml").write_text('extends = "cpu"\n[components.transformer]\nparts = 2\n')
    plan = make(str(tmp_path / "parts.toml"), weights=False)
    assert [file.name for file in export_graphs(plan, weights=False)] == [f"{name}.onnx" for name in COMPONENTS]
    names = [file.name for file in export_graphs(plan, weights=False, in_parts=True)]
    assert names[3:5] == ["transformer.0.onnx", "transformer.1.onnx"]
    assert [file.name for file in export_graphs(plan, weights=False, in_parts=True)] == names  # it replaces its own


def test_without_weights(make: Make, tmp_path: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare", ARCHITECTURES["tiny"], weights=False)
    plan = make(source=bare, weights=False)
    files = export_graphs(plan, weights=False)
    assert sorted(path.name for path in plan.destination.iterdir()) == sorted(file.name for file in files)
    for part, file in zip(plan.components, files, strict=True):
        model = onnx.load(str(file), load_external_data=False)
        assert parameters(model) == part.parameters > 0
        assert [i.name for i in model.graph.input] == [spec.name for spec in part.graph.inputs]
        assert [o.name for o in model.graph.output] == [spec.name for spec in part.graph.outputs]


def test_the_graph_of_the_published_transformer(make: Make, tmp_path: Path) -> None:
    """13.51 billion parameters, named as in the checkpoint; what depends on the timestep alone is not among them."""
    source = write_checkpoint(tmp_path / "2511", ARCHITECTURES["qwen-image-edit-2511"], weights=False)
    files = export_graphs(make("a100", source, weights=False), weights=False)
    model = onnx.load(str(files[COMPONENTS.index("transformer")]), load_external_data=False)
    assert round(parameters(model) / 1e9, 2) == 13.51
    assert len(model.graph.node) < 10_000
    names = {i.name for i in model.graph.initializer}
    assert "transformer_blocks.59.attn.to_out.0.weight" in names
    assert not [name for name in names if "_mod." in name or "norm_out.linear" in name or "time_text_embed" in name]
    assert "transformer_blocks.59.attn.to_add_out.weight" not in names  # the last block's text output is never used
    assert "transformer_blocks.58.attn.to_add_out.weight" in names


def test_progress(make: Make) -> None:
    seen: dict[str, tuple[int, int]] = {}
    export_graphs(make(), weights=True, progress=lambda what, done, total: seen.update({what: (done, total)}))
    assert list(seen) == list(COMPONENTS)
    assert all(done == total for done, total in seen.values())


def test_an_earlier_export_is_replaced(make: Make) -> None:
    plan = make()
    export_graphs(plan, weights=True)
    export_graphs(plan, weights=False)
    assert sorted(path.suffix for path in plan.destination.iterdir()) == [".onnx"] * len(COMPONENTS)
    assert [path.name for path in plan.destination.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("other", ["thesis.txt", "model.onnx", "manifest.json", "vision.weights.bak"])
def test_anything_else_is_not(make: Make, other: str) -> None:
    plan = make()
    export_graphs(plan, weights=False)
    (plan.destination / other).write_text("mine")
    with pytest.raises(BuildError, match="holds files that are not exported graphs; choose another folder"):
        export_graphs(plan, weights=False)
    assert (plan.destination / other).read_text() == "mine"


def test_a_file_in_the_way(make: Make) -> None:
    plan = make()
    plan.destination.write_text("mine")
    with pytest.raises(BuildError, match="holds files that are not exported graphs"):
        export_graphs(plan, weights=False)
    assert plan.destination.read_text() == "mine"


def test_a_full_disk(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "no room")

    plan = make()
    monkeypatch.setattr("qie.compiler.packing.export.write_graph", fail)
    with pytest.raises(BuildError, match=r"is full, [\d,]+ bytes are needed; free some space or choose a folder"):
        export_graphs(plan, weights=False)
    assert list(plan.destination.parent.iterdir()) == []
