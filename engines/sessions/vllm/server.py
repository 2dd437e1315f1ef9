"""The language model on a running server of vLLM: a prompt and embeddings of its images there, hidden states back.

The server takes embeddings of images only beside text, so the text of the prompt is sent, and the server is asked first
whether its tokens are the same. Nothing is computed from an answer that is not exactly what was asked for.

Shape suffixes: S prompt tokens, L text tokens, V image tokens, D width of the language model.
"""

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.manifest import EngineRecord, GraphRecord
from qie.engines.bundle.specs import PromptSpec
from qie.engines.errors import EngineError, first_line
from qie.engines.records import brief
from qie.engines.sessions.host_tensors import HostTensors
from qie.engines.sessions.vllm.connection import OPTION, Answer, Connection
from qie.engines.sessions.vllm.prompt import Prompt, read_prompt
from qie.engines.sessions.vllm.settings import TASK

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["VllmServerSession"]

UNIT_NORM = 1e-3
"""How near the norms of normalized hidden states are to 1, in bfloat16 too. Those of a norm layer are near the square
root of the width."""

_START = "start it as docs/language.md says"


class VllmServerSession(HostTensors):
    """The language model of a server."""

    def __init__(self, url: str, record: EngineRecord | GraphRecord, tokenizer: "Tokenizer", spec: PromptSpec) -> None:
        """Ask the server for its model.

        Args:
            url: of the server.
            record: of the language model in the bundle, whose inputs and outputs the server has too.
            tokenizer: of the bundle.
            spec: constants of the model's prompt.

        Raises:
            RequestError: the URL is none.
            EngineError: there is no server of vLLM there, or none with a model.
        """
        super().__init__(record)
        self._connection = Connection(url)
        self._tokenizer, self._spec = tokenizer, spec
        self._model, self._longest = self._ask_model()

    def run(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Compute ``prompt_embeds`` float32 [1, L, D], the last L hidden states of a prompt.

        Raises:
            EngineError: the server is gone, refuses, or is not one of this model.
        """
        self.check_tensors(inputs, outputs)
        target_1LD = outputs["prompt_embeds"]
        assert len(target_1LD) == 1, f"{len(target_1LD)} prompts in a run, expected 1"
        prompt = read_prompt(inputs, image_token_id=self._spec.image_token_id, merge_size=self._spec.merge_size)
        tokens = len(prompt.expanded_ids)
        if tokens > self._longest:
            raise self._wrong(
                f"takes prompts of {self._longest} tokens, and this one has {tokens}",
                "start it with a larger max-model-len, or shorten the instruction",
            )
        texts = self._texts(prompt)
        self._check_tokens(prompt, "".join("<|image_pad|>" if text is None else text for text in texts))
        hidden_SD = self._hidden_states(prompt, texts, target_1LD.shape[2])
        np.copyto(target_1LD[0], hidden_SD[tokens - target_1LD.shape[1] :])

    def close(self) -> None:
        """Nothing: the server goes on."""

    def _ask_model(self) -> tuple[str, int]:
        """The name of the server's model, and its longest prompt in tokens."""
        answer = self._connection.get("/v1/models")
        try:
            models = answer.json()["data"]
            (model,) = [each for each in models if each.get("parent") is None]
            name, longest = model["id"], model["max_model_len"]
            if not isinstance(name, str) or type(longest) is not int:
                raise TypeError("a model without name or length")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
            raise self._wrong(
                f"is not one of vLLM with one model ({first_line(problem)})", f"correct the URL, or {_START}"
            ) from problem
        return name, longest

    def _texts(self, prompt: Prompt) -> list[str | None]:
        """The text between the images, and None for each image."""
        texts: list[str | None] = []
        run: list[int] = []
        for token in [*prompt.token_ids, None]:
            if token is not None and token != self._spec.image_token_id:
                run.append(token)
                continue
            if run:
                texts.append(self._tokenizer.decode(run, skip_special_tokens=False))
            if token is not None:
                texts.append(None)
            run = []
        return texts

    def _check_tokens(self, prompt: Prompt, text: str) -> None:
        """Check that the server's tokenizer makes the same tokens of the prompt.

        Raises:
            EngineError: it does not.
        """
        asked = {"model": self._model, "prompt": text, "add_special_tokens": False}
        answer = self._connection.post("/tokenize", asked)
        try:
            tokens = answer.json()["tokens"]
        except (ValueError, LookupError, TypeError, RecursionError) as problem:
            raise self._wrong(f"has no list of tokens at /tokenize ({first_line(problem)})", _START) from problem
        if tokens != prompt.token_ids:
            raise self._wrong(
                "makes other tokens of the prompt than the tokenizer of the bundle",
                "serve the text encoder of the model",
            )

    def _hidden_states(self, prompt: Prompt, texts: list[str | None], width: int) -> NDArray[np.float32]:
        """The hidden states float32 [S, D] of all tokens."""
        images = iter(zip(prompt.embeds, prompt.grids, strict=True))
        content = [_image_part(*next(images)) if text is None else {"type": "text", "text": text} for text in texts]
        answer = self._connection.post(
            "/pooling",
            {
                "model": self._model,
                "messages": [{"role": "user", "content": content}],
                "task": TASK,
                "encoding_format": "bytes",
                "embed_dtype": "float32",
                "endianness": "little",
                "use_activation": False,
                "add_special_tokens": False,
            },
            refused=_refused,
        )
        hidden_SD = self._read(answer)
        tokens = len(prompt.expanded_ids)
        if hidden_SD.shape[1] != width:
            raise self._wrong(
                f"has a model of width {hidden_SD.shape[1]}, expected {width}", "serve the text encoder of the model"
            )
        if len(hidden_SD) != tokens:
            raise self._wrong(
                f"returned {len(hidden_SD)} hidden states for a prompt of {tokens} tokens, so that its chat template "
                "adds text or it keeps a prefix cache",
                _START,
            )
        if not np.isfinite(hidden_SD).all():
            raise self._wrong("returned hidden states that are not finite", "serve the model in bfloat16 or float32")
        if (np.abs(np.linalg.norm(hidden_SD, axis=1) - 1) < UNIT_NORM).all():
            raise self._wrong("normalizes the hidden states to length 1", f"{_START}, with use_activation false")
        return hidden_SD

    def _read(self, answer: Answer) -> NDArray[np.float32]:
        """The array [S, D] of an answer of ``/pooling`` in bytes."""
        try:
            (item,) = answer.metadata["data"]
            shape, dtype = item["shape"], item["embed_dtype"]
            if len(shape) != 2 or dtype != "float32" or item["endianness"] != "little":
                raise ValueError(f"{dtype} of shape {brief(shape)}")
            return np.frombuffer(answer.body, "<f4").reshape(shape).astype(np.float32)
        except (ValueError, LookupError, TypeError) as problem:
            raise self._wrong(
                f"returned no hidden states of all tokens ({first_line(problem)})",
                "start it with vLLM 0.32 or later and the task token_embed, as docs/language.md says",
            ) from problem

    def _wrong(self, found: str, fix: str) -> EngineError:
        return EngineError(f"the vLLM server at {self._connection.url} {found}; {fix}", option=OPTION)


def _image_part(embeds_VD: NDArray[np.float32], grid: tuple[int, int, int]) -> dict[str, Any]:
    """An image in a message, as vLLM takes it: its embeddings, an .npy file in base64, and its grid."""
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(embeds_VD, np.float32), allow_pickle=False)
    embeds = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_embeds", "image_embeds": {"image_embeds": embeds, "image_grid_thw": list(grid)}}


def _refused(connection: Connection, status: int, message: str) -> EngineError:
    """Why a server refuses a prompt, as far as its message tells."""
    if status == 404 or "task" in message.lower():
        found, fix = "does not return hidden states", "start it with the task token_embed, as docs/language.md says"
    elif "mm-embeds" in message or "mm_embeds" in message:
        found, fix = "takes no embeddings of images", "start it with enable-mm-embeds, as docs/language.md says"
    elif "maximum context length" in message or "longer than" in message:
        found, fix = "refuses the prompt as too long", "start it with a larger max-model-len"
    else:
        found, fix = "refuses the prompt", "see its log" if status >= 500 else _START
    return EngineError(f"the vLLM server at {connection.url} {found} ({status}, {message}); {fix}", option=OPTION)
