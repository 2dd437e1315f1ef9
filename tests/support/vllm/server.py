"""A stand-in of vLLM's server: the requests and answers of 0.32 that qie uses, and faults to order."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.conditioning import open_tokenizer
from tests.support.vllm.reference import Reference, opened

__all__ = ["Served", "serve"]

POOLING = {
    "model", "messages", "task", "encoding_format", "embed_dtype", "endianness", "use_activation", "add_special_tokens",
}  # fmt: skip
"""Fields of a request to /pooling that the stand-in knows; the real one ignores others."""


@dataclass
class Served:
    """A running server.

    Attributes:
        url: of it.
        reference: what it computes with.
        tokenizer: of its model.
        requests: every path and body that it got.
        max_model_len: its longest prompt.
        mm_embeds: takes embeddings of images.
        use_activation: normalizes, whatever a request says.
        drop: hidden states that a prefix cache keeps.
        before: text that its chat template adds.
        width: of its model; 0 for the right one.
        key: that it wants; empty for none.
        answers: status and body by path, in place of its own; a status of 0 breaks off.
    """

    url: str
    reference: Reference
    tokenizer: Tokenizer
    requests: list[tuple[str, Any]] = field(default_factory=list)
    max_model_len: int = 4096
    mm_embeds: bool = True
    use_activation: bool = False
    drop: int = 0
    before: str = ""
    width: int = 0
    key: str = ""
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)

    def pool(self, asked: dict[str, Any]) -> tuple[dict[str, str], bytes]:
        """The answer to /pooling.

        Raises:
            ValueError: it is refused.
        """
        if unknown := asked.keys() - POOLING:
            raise ValueError(f"unknown {unknown}")
        if asked["task"] != "token_embed" or asked["encoding_format"] != "bytes" or asked["embed_dtype"] != "float32":
            raise ValueError("the stand-in answers in bytes of float32")
        text, grids, embeds = self.before, [], []
        for part in asked["messages"][0]["content"]:
            if part["type"] == "text":
                text += part["text"]
                continue
            if not self.mm_embeds:
                raise ValueError("You must set `--enable-mm-embeds` to input `image_embeds`")
            text += "<|image_pad|>"
            image = part["image_embeds"]
            array = np.load(io.BytesIO(base64.b64decode(image["image_embeds"])), allow_pickle=False)
            t, h, w = image["image_grid_thw"]
            if t * h * w != 4 * len(array):
                raise ValueError(f"Expected image embeddings of {t * h * w // 4} tokens, got {len(array)}")
            grids.append([t, h, w])
            embeds.append(array)
        ids = self.tokenizer.encode(text, add_special_tokens=asked["add_special_tokens"]).ids
        if len(self.reference.expand(ids, grids)) > self.max_model_len:
            raise ValueError(f"This model's maximum context length is {self.max_model_len} tokens.")
        hidden = self.reference.hidden_states(ids, np.concatenate(embeds), grids)[self.drop :]
        hidden = hidden[:, : self.width or None]
        if self.use_activation or asked["use_activation"]:
            hidden = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
        body = hidden.astype("<f4").tobytes()
        item = {"index": 0, "embed_dtype": "float32", "endianness": "little", "start": 0, "end": len(body)}
        usage = {"prompt_tokens": len(hidden), "total_tokens": len(hidden)}
        metadata = {"id": "pool-1", "model": "qie", "data": [item | {"shape": list(hidden.shape)}], "usage": usage}
        return {"metadata": json.dumps(metadata)}, body


@contextmanager
def serve(bundle: Any) -> Iterator[Served]:
    """A server of the text encoder of the bundle for the CPU at the path ``bundle``, on a free port."""
    tokenizer = open_tokenizer(open_bundle(bundle))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.served = Served(  # type: ignore[attr-defined]
        url=f"http://127.0.0.1:{server.server_port}", reference=opened(bundle), tokenizer=tokenizer
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.served  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *words: Any) -> None:
        """Nothing."""

    def _answer(self, asked: Any) -> None:
        served: Served = self.server.served  # type: ignore[attr-defined]
        served.requests.append((self.path, asked))
        if self.path in served.answers:
            status, body = served.answers[self.path]
            if status:
                self._send(status, {}, body)
            return None
        if served.key and self.headers["Authorization"] != f"Bearer {served.key}":
            return self._send(401, {}, b'{"error": "Unauthorized"}')
        try:
            match self.path:
                case "/v1/models":
                    model = {"id": "qie", "object": "model", "parent": None, "max_model_len": served.max_model_len}
                    self._json({"object": "list", "data": [model]})
                case "/tokenize":
                    ids = served.tokenizer.encode(asked["prompt"], add_special_tokens=asked["add_special_tokens"]).ids
                    self._json({"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids})
                case "/pooling":
                    headers, body = served.pool(asked)
                    self._send(200, headers, body)
                case _:
                    self._send(404, {}, b'{"detail":"Not Found"}')
        except ValueError as problem:
            error = {"message": str(problem), "type": "BadRequestError", "param": None, "code": 400}
            self._send(400, {}, json.dumps({"error": error}).encode())

    def _json(self, content: Any) -> None:
        self._send(200, {}, json.dumps(content).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
