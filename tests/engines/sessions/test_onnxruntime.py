"""Sessions of onnxruntime: real ones on the CPU, and the providers that are requested on a GPU."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qie.engines import gpus
from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.manifest import EngineRecord, ProfileRecord, TensorSpec
from qie.engines.errors import BundleError, EngineError, EngineMismatchError
from qie.engines.sessions import onnxruntime as module
from qie.engines.sessions.load import load
from qie.engines.sessions.onnxruntime import OnnxRuntimeSession
from tests.support.libcuda import Libcuda, StandIn

SIZES = {"batch": 1, "height": 32, "width": 48, "rows": 2, "columns": 3}
IMAGE = np.random.default_rng(0).integers(0, 256, (1, 32, 48, 3), np.uint8)
PROFILE = ProfileRecord(input="image", min=(1, 32, 32, 3), opt=(1, 64, 64, 3), max=(1, 96, 128, 3))


@pytest.fixture(scope="module")
def record(bundle: Path) -> EngineRecord:
    (record,) = [e for e in open_bundle(str(bundle)).manifest.engines if e.component == "vae_encoder"]
    return record


@pytest.fixture
def session(bundle: Path, record: EngineRecord) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(bundle, record, threads=1)


def encode(session: OnnxRuntimeSession, image: np.ndarray) -> np.ndarray:
    latents = session.empty("latents", SIZES)
    session.run({"image": session.upload(image)}, {"latents": latents})
    return np.array(session.download(latents))


# On the CPU


def test_a_run_is_onnxruntimes_own(session: OnnxRuntimeSession, bundle: Path, record: EngineRecord) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    plain = ort.InferenceSession(str(bundle / record.path), options, providers=["CPUExecutionProvider"])
    assert np.array_equal(encode(session, IMAGE), plain.run(["latents"], {"image": IMAGE})[0])


def test_nothing_is_copied_on_the_way_in(session: OnnxRuntimeSession) -> None:
    tensor = session.upload(IMAGE)
    assert np.shares_memory(session.download(tensor), IMAGE)
    turned = IMAGE.transpose(0, 2, 1, 3)
    assert np.array_equal(session.download(session.upload(turned)), turned)


def test_copy(session: OnnxRuntimeSession) -> None:
    source, place = session.upload(IMAGE), session.upload(np.zeros_like(IMAGE))
    address = place.data_ptr()
    session.copy(source, place)
    assert np.array_equal(session.download(place), IMAGE)
    assert place.data_ptr() == address


def test_wrong_tensors(session: OnnxRuntimeSession) -> None:
    with pytest.raises(EngineError, match=r"onnxruntime failed in vae_encoder \(.*; use a smaller size or fewer"):
        encode(session, IMAGE.astype(np.float32))


@pytest.mark.parametrize(("kind", "attributes"), [("INT4", {"axis": 0, "block_size": 32}), ("INT8", {"axis": 1})])
def test_weights_alone_are_quantized(
    tmp_path: Path, record: EngineRecord, kind: str, attributes: dict[str, int]
) -> None:
    """Where a graph widens codes of weights before a product, its inputs keep their digits."""
    rng = np.random.default_rng(0)
    codes, x = rng.integers(-7, 8, (64, 16)), rng.normal(size=(3, 64)).astype(np.float32)
    scales = rng.uniform(0.5, 1, (2, 16) if kind == "INT4" else 16).astype(np.float32)
    weight = onnx.helper.make_tensor("codes", getattr(onnx.TensorProto, kind), codes.shape, codes.reshape(-1).tolist())
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("DequantizeLinear", ["codes", "scales"], ["weight"], **attributes),
            onnx.helper.make_node("MatMul", ["x", "weight"], ["y"]),
        ],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, x.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (3, 16))],
        [weight, onnx.numpy_helper.from_array(scales, "scales")],
    )
    opset = onnx.helper.make_opsetid("", 23)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=11), tmp_path / "g.onnx")
    output = TensorSpec(name="y", dtype="float32", dims=(3, 16))
    session = OnnxRuntimeSession(tmp_path, replace(record, path="g.onnx", outputs=(output,)), threads=1)
    y = session.empty("y", {})
    session.run({"x": session.upload(x)}, {"y": y})
    widened = codes * (scales.repeat(32, axis=0) if kind == "INT4" else scales)
    np.testing.assert_allclose(session.download(y), x @ widened, rtol=1e-4, atol=1e-4)


def test_close(bundle: Path, record: EngineRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[weakref.ref[ort.InferenceSession]] = []

    class Watched(ort.InferenceSession):
        def __init__(self, *words: Any, **more: Any) -> None:
            super().__init__(*words, **more)
            graphs.append(weakref.ref(self))

    monkeypatch.setattr(ort, "InferenceSession", Watched)
    session = OnnxRuntimeSession(bundle, record)
    (graph,) = graphs
    assert graph() is not None
    session.close()
    gc.collect()
    assert graph() is None


def test_a_file_that_is_no_graph(tmp_path: Path, record: EngineRecord, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / record.path).write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot load .*; build the bundle again with `qie build`"):
        OnnxRuntimeSession(tmp_path, record)
    assert capsys.readouterr().out == ""


# On a GPU


class Asked:
    """onnxruntime's InferenceSession that notes what it was asked for and says what it got."""

    def __init__(self, got: tuple[str, ...]) -> None:
        self.got = got
        self.providers: list[tuple[str, dict[str, str]]] = []

    def __call__(
        self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int
    ) -> "Asked":
        assert not enable_fallback  # which prints to stdout and goes on without the first provider
        self.providers = providers
        return self

    def get_providers(self) -> list[str]:
        return list(self.got)


def asked(monkeypatch: pytest.MonkeyPatch, *got: str) -> Asked:
    asked = Asked((*got, "CPUExecutionProvider"))
    monkeypatch.setattr(ort, "InferenceSession", asked)
    return asked


def link(monkeypatch: pytest.MonkeyPatch, folder: Path, *, needs: int, installed: int | None) -> list[str]:
    """Put an onnxruntime that is linked to one major version of TensorRT beside an installed one; names that load."""
    (folder / "capi").mkdir()
    names = [f"libnvinfer.so.{needs}", f"libnvonnxparser.so.{needs}"]
    (folder / "capi" / "libonnxruntime_providers_tensorrt.so").write_bytes("\0".join(["\x7fELF", *names]).encode())
    monkeypatch.setattr(ort, "__file__", str(folder / "__init__.py"))
    loaded: list[str] = []

    def open_library(name: str) -> None:
        if not name.endswith(f".so.{installed}"):
            raise OSError(f"{name}: cannot open shared object file")
        loaded.append(name)

    def import_tensorrt(name: str) -> None:
        assert name == "tensorrt"
        if installed is None:
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(module.ctypes, "CDLL", open_library)
    monkeypatch.setattr(module, "import_module", import_tensorrt)
    return loaded


CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"


@pytest.mark.parametrize("device", [0, 2])
def test_the_provider_of_cuda(monkeypatch: pytest.MonkeyPatch, record: EngineRecord, device: int) -> None:
    onnxruntime = asked(monkeypatch, CUDA)
    OnnxRuntimeSession(Path(), replace(record, compute_capability="8.9"), device=device)
    assert onnxruntime.providers == [(CUDA, {"device_id": str(device), "cudnn_conv_algo_search": "HEURISTIC"})]


@pytest.mark.parametrize(("index", "expected"), [(None, "1"), (1, "1"), (2, "2")])
def test_the_gpu_is_the_one_that_fits_or_was_chosen(
    monkeypatch: pytest.MonkeyPatch, record: EngineRecord, index: int | None, expected: str
) -> None:
    driver = Libcuda([StandIn(name=f"GPU {c}", capability=c) for c in ("8.0", "8.9", "8.9")])
    monkeypatch.setattr(gpus, "libcuda", lambda: driver)
    onnxruntime = asked(monkeypatch, CUDA)
    load(Path(), replace(record, compute_capability="8.9"), None, index)
    assert [options["device_id"] for _, options in onnxruntime.providers] == [expected]


@pytest.mark.parametrize(
    ("profiles", "installed"), [((), 10), ((PROFILE,), None), ((PROFILE,), 11)], ids=["shapes", "absent", "later"]
)
def test_the_provider_of_tensorrt_needs_profiles_and_the_tensorrt_that_it_is_linked_to(
    monkeypatch: pytest.MonkeyPatch,
    record: EngineRecord,
    tmp_path: Path,
    profiles: tuple[ProfileRecord, ...],
    installed: int | None,
) -> None:
    onnxruntime = asked(monkeypatch, CUDA)
    link(monkeypatch, tmp_path, needs=10, installed=installed)
    OnnxRuntimeSession(Path(), replace(record, compute_capability="8.9", profiles=profiles))
    assert [name for name, _ in onnxruntime.providers] == [CUDA]


def test_an_onnxruntime_without_a_provider_of_tensorrt(monkeypatch: pytest.MonkeyPatch, record: EngineRecord) -> None:
    onnxruntime = asked(monkeypatch, CUDA)
    monkeypatch.setattr(module, "import_module", lambda name: pytest.fail("TensorRT was imported"))
    OnnxRuntimeSession(Path(), replace(record, compute_capability="8.9", profiles=(PROFILE,)))
    assert [name for name, _ in onnxruntime.providers] == [CUDA]


def test_the_provider_of_tensorrt(
    monkeypatch: pytest.MonkeyPatch, record: EngineRecord, tmp_path: Path, qie_home: Path
) -> None:
    onnxruntime = asked(monkeypatch, TENSORRT, CUDA)
    loaded = link(monkeypatch, tmp_path, needs=10, installed=10)
    changed = replace(record, compute_capability="8.9", profiles=(PROFILE,), precision="bfloat16")
    OnnxRuntimeSession(Path(), changed, device=1)
    assert sorted(loaded) == ["libnvinfer.so.10", "libnvonnxparser.so.10"]
    (first, options), (second, _) = onnxruntime.providers
    assert (first, second) == (TENSORRT, CUDA)
    folder = qie_home / "cache" / "onnxruntime" / record.key[:32]
    assert folder.is_dir()
    assert options == {
        "device_id": "1",
        "trt_profile_min_shapes": "image:1x32x32x3",
        "trt_profile_opt_shapes": "image:1x64x64x3",
        "trt_profile_max_shapes": "image:1x96x128x3",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_bf16_enable": "1",
    }


def test_falling_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, record: EngineRecord) -> None:
    asked(monkeypatch)
    with pytest.raises(
        EngineMismatchError, match=r"cannot use the GPU for vae_encoder.*'onnxruntime-gpu\[cuda,cudnn\]'"
    ):
        OnnxRuntimeSession(Path(), replace(record, compute_capability="8.9"))


def test_this_onnxruntime_has_no_gpu(bundle: Path, record: EngineRecord) -> None:
    """The installed onnxruntime ignores or rejects a provider that it lacks: both raise an error."""
    if CUDA in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.warns(UserWarning, match=CUDA), pytest.raises((EngineMismatchError, BundleError)):
        OnnxRuntimeSession(bundle, replace(record, compute_capability="8.9"))


def test_tensors_are_on_the_gpu(monkeypatch: pytest.MonkeyPatch, record: EngineRecord) -> None:
    """Uploads, empty tensors and copies name the GPU; a copy does not pass through the host."""
    asked(monkeypatch, CUDA)
    session = OnnxRuntimeSession(Path(), replace(record, compute_capability="8.9"), device=1)
    calls: list[tuple[Any, ...]] = []

    class Value:
        def update_inplace(self, source: Any) -> None:
            calls.append(("copy", source))

        @staticmethod
        def ortvalue_from_numpy(array: Any, place: str, device: int) -> "Value":
            calls.append(("upload", place, device))
            return Value()

        @staticmethod
        def ortvalue_from_shape_and_type(shape: Any, dtype: Any, place: str, device: int) -> "Value":
            calls.append(("empty", shape, dtype, place, device))
            return Value()

    monkeypatch.setattr(ort, "OrtValue", Value)
    source, target = session.upload(IMAGE), session.empty("latents", SIZES)
    session.copy(source, target)
    assert calls == [("upload", "cuda", 1), ("empty", [1, 2, 3, 64], np.float32, "cuda", 1), ("copy", source)]
