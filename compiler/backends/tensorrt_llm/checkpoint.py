"""Writes a TensorRT-LLM checkpoint: config.json and a safetensors file for each GPU, one tensor at a time.

Shape suffixes: O outputs, I inputs of a linear.
"""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qie.compiler.backends.tensorrt_llm.config import CONFIG_FILE, checkpoint_config
from qie.compiler.backends.tensorrt_llm.settings import Settings
from qie.compiler.backends.tensorrt_llm.tensors import Module, Source, Tensor, modules, sources, tensors
from qie.compiler.checkpoint.safetensors import TensorReader
from qie.compiler.weights.placed_file import disk_error
from qie.compiler.weights.prepare import check_weights, prepare
from qie.compiler.weights.quantizer import Quantizer
from qie.compiler.weights.weight import DType, Weight
from qie.compiler.weights.weights_file import CHUNK_BYTES
from qie.engines.files import replacing
from qie.engines.progress import StageProgress, no_progress

__all__ = ["rank_file", "write_checkpoint"]

Array = NDArray[Any]

_CODES = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "int8": "I8"}
"""dtype -> its name in a safetensors header."""


def rank_file(rank: int) -> str:
    """Name of the file with the tensors of one GPU."""
    return f"rank{rank}.safetensors"


def write_checkpoint(
    settings: Settings, reader: TensorReader, folder: Path, *, progress: StageProgress = no_progress
) -> tuple[str, ...]:
    """Write config.json, rank0.safetensors and so on into ``folder``.

    Names, shapes and dtypes are checked before the first byte is written. The files appear when all are complete,
    config.json last; on an error none remains.

    Args:
        settings: the model and how it is stored.
        reader: tensors of the text encoder under canonical names, smoothed already.
        folder: an existing folder.
        progress: called with the bytes done and the bytes in all.

    Returns:
        The names of the files.

    Raises:
        ExportError: the sizes of the model cannot be split over the GPUs, or quantized.
        RecipeError: only some of the linears that TensorRT-LLM fuses are quantized.
        CheckpointError: a tensor is missing, has another shape, or is not floating-point or finite.
        BuildError: the disk is full or a file cannot be written.
    """
    config = json.dumps(checkpoint_config(settings), indent=2) + "\n"
    check_weights(sources(settings), {"text_encoder": reader})
    stored = [tensor for module in modules(settings) for tensor in tensors(module, settings)]
    header, places = _layout(stored)
    total = settings.tensor_parallel * (len(header) + sum(tensor.bytes for tensor in stored))
    ranks = tuple(folder / rank_file(rank) for rank in range(settings.tensor_parallel))
    try:
        if total > shutil.disk_usage(folder).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with ExitStack() as stack:  # the last context is left first, so that config.json is published last
            stack.enter_context(replacing(folder / CONFIG_FILE)).write_text(config, encoding="utf-8")
            files = [stack.enter_context(stack.enter_context(replacing(path)).open("r+b")) for path in ranks]
            writer = _Writer(files=files, places=places, progress=progress, total=total)
            writer.put_header(header)
            amax = _WeightAmax(reader)
            for module in modules(settings):
                for piece in _pieces(module, settings, reader, amax):
                    writer.put(piece)
            assert writer.done == total, f"{writer.done} of {total} bytes written"
            for file in files:  # what fails, fails before the first file is published
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, folder / rank_file(0), total) from error
    return (CONFIG_FILE, *(path.name for path in ranks))


def _layout(stored: Sequence[Tensor]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, and where each tensor starts.

    Tensors of large elements come first, so that all are aligned without gaps.
    """
    ordered = sorted(stored, key=lambda tensor: -np.dtype(tensor.dtype).itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    end = 0
    for tensor in ordered:
        offsets[tensor.name] = end
        end += tensor.bytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offsets[tensor.name], end),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """Consecutive elements of a tensor.

    Attributes:
        ranks: GPUs in whose files they stand.
        name: of the tensor.
        start: its elements before these.
        values: in the dtype that is stored.
    """

    ranks: Sequence[int]
    name: str
    start: int
    values: Array


@dataclass(kw_only=True, slots=True)
class _Writer:
    """Puts pieces at their places in the files of all GPUs."""

    files: Sequence[BinaryIO]
    places: Mapping[str, int]
    progress: StageProgress
    total: int
    done: int = 0

    def put_header(self, header: bytes) -> None:
        for file in self.files:
            self._write(file, memoryview(header))

    def put(self, piece: _Piece) -> None:
        content = np.ascontiguousarray(piece.values).reshape(-1).view(np.uint8).data
        for rank in piece.ranks:
            self.files[rank].seek(self.places[piece.name] + piece.start * piece.values.itemsize)
            self._write(self.files[rank], content)

    def _write(self, file: BinaryIO, content: memoryview) -> None:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            file.write(chunk)
            self.done += len(chunk)
            self.progress(self.done, self.total)


class _WeightAmax:
    """Largest magnitude of the weights of linears, each read once."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._known: dict[str, float] = {}

    def __call__(self, linears: Sequence[Source]) -> float:
        for source in linears:
            if source.name not in self._known:
                weight_OI = _read(self._reader, f"{source.name}.weight", "float32")
                self._known[source.name] = float(max(weight_OI.max(), -weight_OI.min()))
        return max(self._known[source.name] for source in linears)


def _read(reader: TensorReader, name: str, dtype: DType) -> Array:
    """A tensor, rounded to ``dtype`` and finite."""
    return _prepare(name, reader.read(name), dtype)


def _prepare(name: str, raw: Array, dtype: DType) -> Array:
    return prepare(Weight(name=name, subfolder="text_encoder", shape=raw.shape, dtype=dtype), raw)


def _pieces(
    module: Module, settings: Settings, reader: TensorReader, amax: Callable[[Sequence[Source]], float]
) -> Iterator[_Piece]:
    """Everything that the files hold of ``module``."""
    everywhere = range(settings.tensor_parallel)

    def everywhere_same(kind: str, values: Array) -> _Piece:
        return _Piece(ranks=everywhere, name=f"{module.name}.{kind}", start=0, values=values)

    weights, inputs = module.format.weights, module.format.inputs
    if weights is None:
        yield from _plain(module, settings, reader)
    elif weights.per == "tensor":
        scale = weights.scale_from_amax(amax(module.scaled_with))
        yield from _per_tensor(module, settings, reader, weights, scale)
        yield everywhere_same("weights_scaling_factor", scale.reshape(1))
    elif weights.per == "channel":
        yield from _per_channel(module, settings, reader, weights)
        width = tensors(module, settings)[0].shape[1]
        yield everywhere_same("prequant_scaling_factor", np.ones(width, np.dtype(settings.dtype)))
    else:
        yield from _per_group(module, settings, reader, weights)
    if inputs is not None:
        largest = max(settings.amax[source.name] for source in module.scaled_with)
        yield everywhere_same("activation_scaling_factor", inputs.scale_from_amax(largest).reshape(1))
    if module.bias:
        for source, before in _with_outputs_before(module):
            bias_O = _read(reader, f"{source.name}.bias", settings.dtype)
            yield from _split(module, settings, "bias", bias_O, before)


def _plain(module: Module, settings: Settings, reader: TensorReader) -> Iterator[_Piece]:
    """Weights in the model's dtype, some rows at a time where they are not split."""
    for source, before in _with_outputs_before(module):
        name = f"{source.name}.weight"
        if module.split is not None:
            yield from _split(module, settings, "weight", _read(reader, name, settings.dtype), before)
            continue
        raw, row = reader.read(name), math.prod(source.shape[1:])
        step = max(1, CHUNK_BYTES // (row * 4))
        for start in range(0, source.shape[0], step):
            yield _Piece(
                ranks=range(settings.tensor_parallel),
                name=f"{module.name}.weight",
                start=start * row,
                values=_prepare(name, raw[start : start + step], settings.dtype),
            )


def _per_tensor(
    module: Module, settings: Settings, reader: TensorReader, quantizer: Quantizer, scale: Array
) -> Iterator[_Piece]:
    for source, before in _with_outputs_before(module):
        weight_OI = _read(reader, f"{source.name}.weight", "float32")
        yield from _split(module, settings, "weight", quantizer.quantize(weight_OI, scale), before)


def _per_channel(module: Module, settings: Settings, reader: TensorReader, quantizer: Quantizer) -> Iterator[_Piece]:
    for source, before in _with_outputs_before(module):
        weight_IO = _read(reader, f"{source.name}.weight", "float32").T
        scale_O = quantizer.scale(weight_IO)
        yield from _split(module, settings, "weight", quantizer.quantize(weight_IO, scale_O).T, before)
        yield from _split(module, settings, "weights_scaling_factor", scale_O, before)


def _per_group(module: Module, settings: Settings, reader: TensorReader, quantizer: Quantizer) -> Iterator[_Piece]:
    for source, before in _with_outputs_before(module):
        weight_IO = _read(reader, f"{source.name}.weight", "float32").T
        scale_GO = quantizer.scale(weight_IO)
        quantized_OI = quantizer.quantize(weight_IO, scale_GO).T.astype(np.int8)
        yield from _split(module, settings, "weight", _packed(quantized_OI), before // 2)
        yield from _split(
            module, settings, "weights_scaling_factor", scale_GO.T.astype(np.dtype(settings.dtype)), before
        )


def _packed(quantized_OI: NDArray[np.int8]) -> NDArray[np.int8]:
    """Pairs of outputs in one byte, [out / 2, in]: the even output is the lower half (two's complement).

    TensorRT-LLM reorders this for the GPU when it builds an engine. It takes bytes as signed ones only.
    """
    low, high = quantized_OI[0::2].view(np.uint8) & 0xF, quantized_OI[1::2].view(np.uint8) & 0xF
    return np.asarray(low | (high << np.uint8(4)), np.uint8).view(np.int8)


def _with_outputs_before(module: Module) -> Iterator[tuple[Source, int]]:
    """The sources of ``module``, each with the number of outputs of those before it."""
    before = 0
    for source in module.sources:
        yield source, before
        before += source.shape[0]


def _split(module: Module, settings: Settings, kind: str, values: Array, before: int) -> Iterator[_Piece]:
    """The tensor ``kind`` of one source for each GPU; ``before`` is the number of rows of the sources before it.

    Outputs of a source are split evenly, so that every GPU has some of queries, keys and values. Where inputs are
    split, what has no inputs is the same everywhere.
    """
    gpus, name = settings.tensor_parallel, f"{module.name}.{kind}"
    row = math.prod(values.shape[1:])
    if module.split == "in":
        assert before == 0, f"{module.name} splits inputs and has several sources"
        if values.ndim == 1:
            yield _Piece(ranks=range(gpus), name=name, start=0, values=values)
            return
        for rank, part in enumerate(np.split(values, gpus, axis=1)):
            yield _Piece(ranks=(rank,), name=name, start=0, values=part)
        return
    for rank, part in enumerate(np.split(values, gpus, axis=0)):
        yield _Piece(ranks=(rank,), name=name, start=before // gpus * row, values=part)
