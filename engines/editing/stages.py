"""The stages of an edit as functions: arrays in, arrays out, with the engines of one bundle behind them.

Shape suffixes: V image tokens of the prompt, L text tokens (without the template's prefix), D width of the language
model, H W pixels, h w = H / 16, W / 16 latent tokens, C = 64 latent channels of a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import (
    COMPONENTS,
    Component,
    EngineRecord,
    FileRecord,
    GraphRecord,
    Residency,
    Specialization,
)
from qie.engines.bundle.specs import SIDE_MULTIPLE
from qie.engines.errors import BundleError, RequestError
from qie.engines.inputs.feeds import Feed, decoder_feed, encoder_feed, language_feed, vision_feed
from qie.engines.inputs.prompt import PREFIX_TOKENS, PromptTokens
from qie.engines.inputs.vision import VisionInputs
from qie.engines.progress import StageProgress, no_progress
from qie.engines.sessions.choose import choose_engines
from qie.engines.sessions.identity import engine_identity
from qie.engines.sessions.load import load_parts, open_device
from qie.engines.sessions.read_ahead import read_ahead
from qie.engines.sessions.session import Session, Tensor

if TYPE_CHECKING:
    from qie.engines.editing.denoise import UploadedSchedule
    from qie.engines.sessions.device import Device

__all__ = ["Stages", "elsewhere"]

Float32 = NDArray[np.float32]


class Stages:
    """The engines of a bundle, loaded when first needed, and the GPU that they share.

    With residency "resident" an engine stays loaded; with "sequential" its weights leave when its stage is done. On a
    GPU with TensorRT, the file of the next engine is read ahead while one runs. Every stage takes ``progress``, which
    is called with (runs done, runs in all).
    """

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[Component, tuple[EngineRecord, ...]] | None = None,
        *,
        device: int | None = None,
        residency: Residency | None = None,
        cuda_graphs: bool | None = None,
        specialization: Specialization | None = None,
        threads: int = 0,
        vllm_url: str | None = None,
    ) -> None:
        """Choose the engines; none is loaded.

        Args:
            bundle: where the engines are.
            engines: of each component its engine, or those of its parts; None chooses those that fit this machine.
            device: CUDA index of the GPU to run on; None is the first that fits.
            residency: None is the bundle's default.
            cuda_graphs: capture repeated runs as CUDA graphs on a GPU; None is with TensorRT and not with TensorRT for
                RTX, see ``DeviceOptions``.
            specialization: kernels of TensorRT for RTX for shapes that vary; None is the bundle's default.
            threads: of engines on the CPU; 0 is one per core.
            vllm_url: URL of a vLLM server that runs the language model, whose engine is then neither chosen nor loaded.

        Raises:
            EngineMismatchError, BackendMissingError, BundleError: see ``choose_engines``.
            RequestError: there is no such residency or specialization, threads are less than none, or
                ``vllm_url`` is no URL.
        """
        for option, value, kinds in (
            ("residency", residency, get_args(Residency)),
            ("specialization", specialization, get_args(Specialization)),
        ):
            if value is not None and value not in kinds:
                raise RequestError(f"the {option} is {value!r}; choose {' or '.join(kinds)}", option=option)
        if threads < 0:
            raise RequestError(f"{threads} threads were requested; give 0 for one per core, or more", option="threads")
        self._vllm_url = vllm_url
        if vllm_url is not None:
            from qie.engines.sessions.vllm.connection import parse_url

            self._vllm_url = parse_url(vllm_url)
        self.bundle = bundle
        served = elsewhere(vllm_url)
        chosen = choose_engines(bundle, device, elsewhere=served) if engines is None else engines
        self.engines = {component: parts for component, parts in chosen.items() if component not in served}
        self.residency: Residency = residency or bundle.manifest.defaults.residency
        self._index, self._cuda_graphs, self._threads = device, cuda_graphs, threads
        self._specialization: Specialization = specialization or bundle.manifest.defaults.specialization
        self._sessions: dict[Component, Session] = {}
        self._unloaded: set[Component] = set()
        self._device: Device | None = None
        self._schedule: tuple[bytes, UploadedSchedule] | None = None
        self._identities: dict[Component, str] = {}

    @property
    def loaded(self) -> tuple[Component, ...]:
        """The components whose engines are loaded, in the order of an edit."""
        return tuple(c for c in COMPONENTS if c in self._sessions and c not in self._unloaded)

    @property
    def device(self) -> "Device | None":
        """What the sessions share on a GPU; None before the first one is loaded, and on a CPU."""
        return self._device

    @property
    def loads_cheaply(self) -> bool:
        """Whether an engine may be loaded again and again: it stays loaded, or is mapped into the memory of a CPU."""
        on_cpu = all(parts[0].compute_capability == "cpu" for parts in self.engines.values())
        return self.residency == "resident" or on_cpu

    def identity(self, component: Component) -> str | None:
        """Everything but its inputs that decides the numbers of ``component``, see ``engine_identity``.

        None where that is not known, such as of a server.

        Raises:
            EngineMismatchError: the GPU is gone.
        """
        if component not in self.engines:
            return None
        if component not in self._identities:
            identities = []
            for engine in self.engines[component]:
                try:
                    written = self.bundle.folder.read(partial(_written, engine.files))
                except OSError:  # whoever loads the engine tells what is wrong
                    return None
                identity = engine_identity(
                    engine,
                    written=written,
                    device=self._index,
                    specialization=self._specialization,
                    threads=self._threads,
                )
                identities.append(identity)
            self._identities[component] = "\n".join(identities)
        return self._identities[component]

    def schedule(self, sigmas: Float32) -> "UploadedSchedule | None":
        """The schedule ``sigmas`` [S + 1] as the edit before left it on the GPU; None where it left another or none.

        Another one is dropped, so that there are never two.
        """
        if self._schedule is not None and self._schedule[0] != sigmas.tobytes():
            self._schedule = None
        return None if self._schedule is None else self._schedule[1]

    def keep_schedule(self, sigmas: Float32, schedule: "UploadedSchedule") -> None:
        """Keep ``schedule`` for the next edit, where the transformer stays on a GPU until then."""
        if self._device is not None and self.residency == "resident":
            self._schedule = (sigmas.tobytes(), schedule)

    def vision(self, inputs: VisionInputs, *, progress: StageProgress = no_progress) -> Float32:
        """Image embeddings float32 [V, D] of all images of an edit, in the order of the prompt.

        Raises:
            BackendMissingError, BundleError: the engine cannot be loaded.
            EngineError: the backend failed or memory ran out.
        """
        with self.session("vision") as session:
            progress(0, 1)
            sizes = {"image_tokens": len(inputs.raster_index)}
            embeds_VD: Float32 = _run(session, vision_feed(inputs), "image_embeds", sizes)
            progress(1, 1)
        return embeds_VD

    def language(
        self, prompts: Sequence[PromptTokens], image_embeds_VD: Float32, *, progress: StageProgress = no_progress
    ) -> list[Float32]:
        """Prompt embeddings float32 [B, L, D] of each of ``prompts``, which are batches about the same images.

        Raises:
            BackendMissingError, BundleError: the engine cannot be loaded.
            EngineError: the backend failed or memory ran out.
        """
        embeds: list[Float32] = []
        with self.session("language") as session:
            image_embeds = session.upload(image_embeds_VD)
            for number, tokens in enumerate(prompts):
                progress(number, len(prompts))
                batch, length = tokens.input_ids.shape
                sizes = {"batch": batch, "text_tokens": length - PREFIX_TOKENS}
                feed = language_feed(tokens, image_embeds_VD)
                embeds.append(_run(session, feed, "prompt_embeds", sizes, uploaded={"image_embeds": image_embeds}))
            progress(len(prompts), len(prompts))
        return embeds

    def encode(self, images: Sequence[NDArray[np.uint8]], *, progress: StageProgress = no_progress) -> list[Float32]:
        """Latents float32 [h, w, C] of each image, uint8 [H, W, 3] with sides that are multiples of 16.

        Raises:
            BackendMissingError, BundleError: the engine cannot be loaded.
            EngineError: the backend failed or memory ran out.
        """
        latents: list[Float32] = []
        with self.session("vae_encoder") as session:
            for number, image_HWC in enumerate(images):
                progress(number, len(images))
                rows, columns = (side // SIDE_MULTIPLE for side in image_HWC.shape[:2])
                sizes = {"batch": 1, "rows": rows, "columns": columns}
                latents.append(_run(session, encoder_feed(image_HWC), "latents", sizes)[0])
            progress(len(images), len(images))
        return latents

    def decode(self, latents: Sequence[Float32], *, progress: StageProgress = no_progress) -> list[NDArray[np.uint8]]:
        """Images uint8 [H, W, 3] of latents float32 [h, w, C].

        Raises:
            BackendMissingError, BundleError: the engine cannot be loaded.
            EngineError: the backend failed or memory ran out.
        """
        images: list[NDArray[np.uint8]] = []
        with self.session("vae_decoder") as session:
            for number, latents_hwC in enumerate(latents):
                progress(number, len(latents))
                rows, columns, _ = latents_hwC.shape
                sizes = {"batch": 1, "height": rows * SIDE_MULTIPLE, "width": columns * SIDE_MULTIPLE}
                images.append(_run(session, decoder_feed(latents_hwC), "image", sizes)[0])
            progress(len(latents), len(latents))
        return images

    @contextmanager
    def session(self, component: Component) -> Iterator[Session]:
        """The session of ``component``, for ``Denoiser.start``; with residency "sequential" the block releases it.

        Raises:
            BackendMissingError, BundleError: the engine cannot be loaded.
            EngineError: memory ran out.
        """
        loads = component not in self.loaded
        if component not in self._sessions:
            self._load(component)
        self._unloaded.discard(component)
        try:
            if loads:
                self._read_next(component)
            yield self._sessions[component]
        finally:
            if loads and self.residency == "sequential":
                for done in self._done_with(component):
                    self._release(done)

    def _done_with(self, component: Component) -> list[Component]:
        """The loaded components to release behind ``component``, the last to be loaded first.

        Components that share an engine, such as a text encoder in vLLM, are released together behind the last of them.
        """
        path = self.engines[component][0].path if component in self.engines else None
        sharing = [c for c in COMPONENTS if c in self.engines and self.engines[c][0].path == path] or [component]
        return [c for c in reversed(sharing) if c in self._sessions] if component == sharing[-1] else []

    def _load(self, component: Component) -> None:
        if self._device is None:
            self._device = open_device(
                [engine for parts in self.engines.values() for engine in parts],
                device=self._index,
                cuda_graphs=self._cuda_graphs,
                specialization=self._specialization,
                unloads=self.residency == "sequential",
            )
        if component not in self.engines:
            self._sessions[component] = self._connect(component)
            return
        parts, device, index, threads = self.engines[component], self._device, self._index, self._threads
        to_come: dict[str, int] = {}
        if self.residency == "resident":
            others = [
                e for c, every in self.engines.items() if c != component and c not in self._sessions for e in every
            ]
            to_come = {file.path: file.bytes for other in others for file in other.files}
        try:
            self._sessions[component] = self.bundle.folder.read(
                lambda folder: load_parts(folder, parts, device, index, threads, to_come=sum(to_come.values())),
                discard=lambda session: session.close(),
            )
        except OSError as problem:
            raise BundleError(
                f"the bundle {self.bundle.path} cannot be read any more ({problem.strerror or problem}); build it "
                "again with `qie build`"
            ) from problem

    def _connect(self, component: Component) -> Session:
        """The session of ``component`` on the server."""
        from qie.engines.editing.conditioning import open_tokenizer
        from qie.engines.sessions.vllm.server import VllmServerSession

        assert self._vllm_url is not None, f"{component} has no engine"
        manifest = self.bundle.manifest
        every: list[EngineRecord | GraphRecord] = [*manifest.engines, *manifest.graphs]
        records = [record for record in every if record.component == component and record.part == 0]
        if not records:
            raise BundleError(f"bundle {self.bundle.path} has no {component}; build it again with `qie build`")
        return VllmServerSession(self._vllm_url, records[0], open_tokenizer(self.bundle), manifest.model.prompt)

    def _release(self, component: Component) -> None:
        """Unload the weights, or close the session where they cannot be unloaded alone."""
        unloaded = False
        try:
            unloaded = self._sessions[component].unload()
        finally:
            if unloaded:
                self._unloaded.add(component)
            else:
                self._sessions.pop(component).close()

    def _read_next(self, component: Component) -> None:
        """Read the engine that an edit needs after ``component`` ahead, where a GPU takes engines whole."""
        following = COMPONENTS[COMPONENTS.index(component) + 1 :]
        awaited = bool(following) and following[0] in self.engines and following[0] not in self.loaded
        if self._device is not None and awaited:
            paths = [engine.path for engine in self.engines[following[0]]]
            with suppress(OSError):  # whoever loads it tells what is wrong
                self.bundle.folder.read(lambda folder: read_ahead(*(folder / path for path in paths)))

    def close(self) -> None:
        """Release all engines and the GPU; the next stage would load them again. Closing twice is allowed."""
        self._schedule = None
        with ExitStack() as stack:  # last in, first out: the device outlives the sessions, and no failure skips it
            if self._device is not None:
                stack.callback(self._device.close)
            for session in self._sessions.values():
                stack.callback(session.close)
            self._sessions, self._unloaded, self._device = {}, set(), None


def _written(files: Sequence[FileRecord], folder: Path) -> list[int]:
    """When each of ``files`` was written, in nanoseconds."""
    return [(folder / file.path).stat().st_mtime_ns for file in files]


def elsewhere(vllm_url: str | None) -> tuple[Component, ...]:
    """The components that a server runs where ``vllm_url`` names one."""
    return () if vllm_url is None else ("language",)


def _run(
    session: Session,
    feed: Feed,
    output: str,
    sizes: Mapping[str, int],
    *,
    uploaded: Mapping[str, Tensor] | None = None,
) -> Any:
    """Run an engine once: the array of ``output``, whose free dims ``sizes`` gives; ``uploaded`` inputs are reused."""
    result = session.empty(output, sizes)
    reused = uploaded or {}
    tensors = {name: reused[name] if name in reused else session.upload(array) for name, array in feed.items()}
    session.run(tensors, {output: result})
    return session.download(result)
