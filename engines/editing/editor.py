"""The editor: from images and instructions to edited images, as one numbered loop over five engines.

Shape suffixes: B images to make, V image tokens of the prompt, S prompt tokens, L = S - 64 text tokens,
N noise tokens, R reference tokens, D width of the language model, C = 64 latent channels of a token.
"""

import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer

from qie.engines.bundle.bundle import Bundle
from qie.engines.bundle.manifest import Component, Residency
from qie.engines.bundle.specs import SIDE_MULTIPLE, Size
from qie.engines.editing.denoise import StepState, denoise, upload_moments
from qie.engines.errors import BundleError, EditError
from qie.engines.files import qie_home
from qie.engines.inputs.image import output_size, prepare, resize, to_uint8_HWC
from qie.engines.inputs.modulation import modulation_tables
from qie.engines.inputs.prompt import DEFAULT_NEGATIVE, PREFIX_TOKENS, PromptTokens, encode
from qie.engines.inputs.rotary import noise_latents, rotary_tables
from qie.engines.inputs.schedule import sigmas
from qie.engines.inputs.sizes import resolve_size
from qie.engines.inputs.vision import VisionInputs, vision_inputs
from qie.engines.sessions.choose import choose_engines
from qie.engines.sessions.load import load, open_device
from qie.engines.sessions.session import Session, Tensor

if TYPE_CHECKING:
    from qie.engines.sessions.device import Device

__all__ = ["Edit", "Editor", "Progress", "Request"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to edit and how. Everything that is None takes the bundle's default.

    images: one to three, mode RGB, upright; the last one gives the size of the result
    instructions: one or more, each applied to the same images
    seeds: one or more; every instruction is edited with every seed. None draws one
    negative: what guidance steers away from; the model's own default is a single space
    guidance: scale of true classifier-free guidance; 1 or less turns it off and halves the work
    size: width and height of the result in pixels, None for the model's area at the last image's aspect
    match_input: bring the result to the last image's own pixel size
    noise: start latents float32 [B, N, 64] in place of noise from the seeds
    """

    images: Sequence[Image.Image]
    instructions: Sequence[str]
    seeds: Sequence[int] | None = None
    negative: str = DEFAULT_NEGATIVE
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    match_input: bool = False
    noise: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Edit:
    """The result: one image for each instruction and seed, instructions outermost.

    images: uint8 [H, W, 3] each
    samples: (instruction, seed) of each image
    size: what the model made, before match_input
    notes: what differs from what was asked for, for a person to read
    seconds: time of each stage
    """

    images: tuple[NDArray[np.uint8], ...]
    samples: tuple[tuple[str, int], ...]
    size: Size
    steps: int
    guidance: float
    notes: tuple[str, ...]
    seconds: dict[str, float]


class Editor:
    """Runs edits with the engines of one bundle.

    Engines are loaded when first needed; with residency "resident" they stay loaded, with "sequential" each is
    released when its part of an edit is done.
    """

    def __init__(self, bundle: Bundle, *, residency: Residency | None = None, graphs: bool = True) -> None:
        """Choose the engines of ``bundle`` for this machine.

        ``residency`` is used in place of the bundle's; ``graphs`` allows CUDA graphs on a GPU.

        Raises:
            EngineMismatchError, BackendMissingError, BundleError: see ``choose_engines``, or the tokenizer is damaged.
        """
        self.bundle = bundle
        self.model = bundle.manifest.model
        self._engines = choose_engines(bundle)
        self._sessions: dict[Component, Session] = {}
        self._device: Device | None = None
        self._residency = residency or bundle.manifest.defaults.residency
        self._graphs = graphs
        tokenizer = bundle.path / bundle.manifest.tokenizer.path
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer))
        except Exception as problem:  # the library raises nothing more precise
            raise BundleError(f"{tokenizer} is damaged ({problem}); build the bundle again with `qie build`") from None

    def edit(
        self,
        request: Request,
        *,
        progress: Progress = lambda what, done, total: None,
        observer: Callable[[StepState], None] | None = None,
    ) -> Edit:
        """Edit ``request.images`` by every instruction with every seed.

        ``observer`` sees every step, at the price of copying its tensors to the host.

        Raises:
            EditError: an image, instruction, seed or option cannot be used, or a backend failed.
        """
        manifest, limits = self.bundle.manifest, self.bundle.manifest.limits
        stopwatch = Stopwatch()

        # 1. Settle what is asked for: sizes, steps, guidance, seeds and their noise.
        steps = manifest.defaults.steps if request.steps is None else request.steps
        guidance = manifest.defaults.guidance if request.guidance is None else request.guidance
        size, notes = self._size(request)
        self._check_request(request, steps, guidance)
        seeds = [secrets.randbelow(2**32)] if request.seeds is None else list(request.seeds)
        samples = [(i, seed) for i in range(len(request.instructions)) for seed in seeds]
        negatives = [request.negative] if guidance > 1 else []
        schedule = sigmas(self.model.scheduler, steps=steps, noise_tokens=size.tokens)
        noise_BNC = request.noise
        if noise_BNC is None:
            noise_BNC = noise_latents(
                [seed for _, seed in samples],
                size.height,
                size.width,
                self.model.latent_channels,
                manifest.defaults.noise,
            )

        # 2. Images and words to prompt embeddings; the negative prompt sees the same images.
        prepared = [prepare(image, self.model.areas) for image in request.images]
        self._check_references([copies.vae.shape for copies in prepared])
        seen = vision_inputs([p.vision for p in prepared], self.model.vision)
        words = partial(encode, self._tokenizer, grids=seen.grids, spec=self.model.prompt)
        prompts = [words([text]) for text in request.instructions]
        prompts += [words([text], allow_blank=True) for text in negatives]
        self._check_lengths(prompts)
        with stopwatch("vision"):
            progress("vision", 0, 1)
            image_embeds_VD = self._vision(seen)
            progress("vision", 1, 1)
        with stopwatch("language"), self._session("language") as session:
            image_embeds = session.upload(image_embeds_VD)
            embeds = []
            for number, prompt in enumerate(prompts):
                progress("language", number, len(prompts))
                embeds.append(self._language(prompt, image_embeds))
            progress("language", len(prompts), len(prompts))

        # 3. References to latents.
        with stopwatch("vae_encoder"), self._session("vae_encoder"):
            references = []
            for number, copies in enumerate(prepared):
                progress("encode", number, len(prepared))
                references.append(self._encode(copies.vae))
            progress("encode", len(prepared), len(prepared))
        reference_1RC = np.concatenate([tokens for tokens, _ in references], axis=1)
        grids = [(size.height // SIDE_MULTIPLE, size.width // SIDE_MULTIPLE), *(grid for _, grid in references)]

        # 4. The modulation of every step.
        with stopwatch("modulation"):
            tables = modulation_tables(
                self.bundle.path,
                self.model.modulation,
                schedule,
                cache=qie_home() / "modulation",
                progress=partial(progress, "modulation"),
            )

        # 5. Denoise. Prompts of one length make a batch, so that nothing is ever padded and a result does not depend
        #    on what else is in the batch.
        negative_1LD = embeds[-1] if negatives else None
        batches = list(_batches([embeds[i].shape[1] for i, _ in samples], limits.batch_max))
        latents = []
        with stopwatch("transformer"), self._session("transformer") as session:
            moments = upload_moments(session, schedule, tables)
            for number, batch in enumerate(batches):
                latents_BNC = denoise(
                    session,
                    noise_BNC=noise_BNC[batch],
                    reference_1RC=reference_1RC,
                    prompt_BLD=np.concatenate([embeds[samples[b][0]] for b in batch]),
                    negative_1LD=negative_1LD,
                    rotary=partial(rotary_tables, self.model.rotary, grids=grids),
                    moments=moments,
                    guidance=guidance,
                    progress=partial(_batch_progress, progress, number, len(batches)),
                    observer=observer,
                )
                latents.append(latents_BNC)

        # 6. Latents to pixels.
        order = [b for batch in batches for b in batch]
        results: dict[int, NDArray[np.uint8]] = {}
        with stopwatch("vae_decoder"), self._session("vae_decoder"):
            for number, (b, latents_NC) in enumerate(zip(order, np.concatenate(latents), strict=True)):
                progress("decode", number, len(order))
                results[b] = self._finish(self._decode(latents_NC.reshape(*grids[0], -1)), request)
            progress("decode", len(order), len(order))
        images = tuple(results[b] for b in range(len(samples)))
        return Edit(
            images=images,
            samples=tuple((request.instructions[i], seed) for i, seed in samples),
            size=size,
            steps=steps,
            guidance=guidance,
            notes=notes,
            seconds=stopwatch.seconds,
        )

    def close(self) -> None:
        """Release all engines and the GPU; the next edit would load them again."""
        while self._sessions:
            self._sessions.popitem()[1].close()
        if self._device is not None:
            self._device.close()
        self._device = None

    def _size(self, request: Request) -> tuple[Size, tuple[str, ...]]:
        if not request.images:
            raise EditError("an edit needs at least one image; name one before the instruction")
        wanted = request.size or output_size(request.images[-1].size, self.model.areas.vae_area)
        size, note = resolve_size(self.bundle.manifest.limits, *wanted)
        return size, (note,) if note else ()

    def _check_request(self, request: Request, steps: int, guidance: float) -> None:
        most = 1 if self.model.pipeline == "edit" else self.bundle.manifest.limits.references_max
        if len(request.images) > most:
            raise EditError(
                f"{len(request.images)} images were given, this bundle takes at most {most}; leave some out"
            )
        if not request.instructions:
            raise EditError('an edit needs an instruction; say what to change, for example "make it grayscale"')
        if request.seeds is not None and not request.seeds:
            raise EditError("an edit needs at least one seed; leave seeds out to draw one")
        most = self.model.scheduler.num_train_timesteps
        if steps > most:
            raise EditError(f"{steps} steps were asked for, expected at most {most}; lower --steps")
        if not math.isfinite(guidance):
            raise EditError(f"the guidance scale is {guidance}, expected a number such as 4.0")
        for text in (*request.instructions, request.negative):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise EditError(f"{text!r} is not UTF-8 text; write it again")

    def _check_references(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Refuse an image so wide or tall that its copy at the model's area is beyond what the engine takes."""
        for profile in self._engines["vae_encoder"].profiles:
            for number, (height, width, _) in enumerate(shapes, start=1):
                (_, *low, _), (_, *high, _) = profile.min, profile.max
                if not (low[0] <= height <= high[0] and low[1] <= width <= high[1]):
                    raise EditError(
                        f"image {number} would be encoded at {width}x{height} pixels, this bundle's engine takes sides "
                        f"from {max(low)} to {min(high)}; crop it nearer to a square"
                    )

    def _check_lengths(self, prompts: Sequence[PromptTokens]) -> None:
        most = self.bundle.manifest.limits.prompt_tokens_max
        longest = max(prompt.lengths[0] for prompt in prompts) - PREFIX_TOKENS
        if longest > most:
            raise EditError(
                f"a prompt is {longest} tokens long with its images, this bundle takes at most {most}; "
                "shorten the instruction or leave out an image"
            )

    @contextmanager
    def _session(self, component: Component) -> Iterator[Session]:
        """The session of ``component``; where residency is sequential, the block that loaded it releases it."""
        held = component in self._sessions
        if not held:
            self._device = self._device or open_device(self._engines.values(), graphs=self._graphs)
            self._sessions[component] = load(self.bundle.path, self._engines[component], self._device)
        try:
            yield self._sessions[component]
        finally:
            if not held and self._residency == "sequential":
                self._sessions.pop(component).close()

    def _run(self, component: Component, output: str, sizes: dict[str, int], **inputs: NDArray[Any] | Tensor) -> Any:
        """One engine once: host arrays or tensors of its session in, the array of ``output`` out."""
        with self._session(component) as session:
            result = session.empty(output, sizes)
            tensors = {name: session.upload(i) if isinstance(i, np.ndarray) else i for name, i in inputs.items()}
            session.run(tensors, {output: result})
            return session.download(result)

    def _vision(self, seen: VisionInputs) -> NDArray[np.float32]:
        embeds: NDArray[np.float32] = self._run(
            "vision",
            "image_embeds",
            {"image_tokens": len(seen.raster_index)},
            patches=seen.patches,
            window_ids=seen.window_ids,
            image_ids=seen.image_ids,
            rotary_cos=seen.rotary_cos,
            rotary_sin=seen.rotary_sin,
            raster_index=seen.raster_index,
        )
        return embeds

    def _language(self, tokens: PromptTokens, image_embeds_VD: Tensor) -> NDArray[np.float32]:
        embeds: NDArray[np.float32] = self._run(
            "language",
            "prompt_embeds",
            {"batch": 1, "text_tokens": tokens.lengths[0] - PREFIX_TOKENS},
            input_ids=tokens.input_ids,
            image_embeds=image_embeds_VD,
            image_index=tokens.image_index,
            position_ids=tokens.position_ids,
        )
        return embeds

    def _encode(self, image_HWC: NDArray[np.uint8]) -> tuple[NDArray[np.float32], tuple[int, int]]:
        rows, columns = (side // SIDE_MULTIPLE for side in image_HWC.shape[:2])
        sizes = {"batch": 1, "rows": rows, "columns": columns}
        latents = self._run("vae_encoder", "latents", sizes, image=image_HWC[None])
        return latents.reshape(1, rows * columns, -1), (rows, columns)

    def _decode(self, latents_hwC: NDArray[np.float32]) -> NDArray[np.uint8]:
        rows, columns, _ = latents_hwC.shape
        sizes = {"batch": 1, "height": rows * SIDE_MULTIPLE, "width": columns * SIDE_MULTIPLE}
        images: NDArray[np.uint8] = self._run("vae_decoder", "image", sizes, latents=latents_hwC[None])
        return images[0]

    def _finish(self, image_HWC: NDArray[np.uint8], request: Request) -> NDArray[np.uint8]:
        if not request.match_input or image_HWC.shape[1::-1] == request.images[-1].size:
            return image_HWC
        return to_uint8_HWC(resize(Image.fromarray(image_HWC), *request.images[-1].size))


class Stopwatch:
    """Adds up the time of each stage in ``seconds``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of ``lengths`` in groups of one length, at most ``most`` in a group."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for _, group in groupby(order, key=lambda i: lengths[i]):
        members = list(group)
        for start in range(0, len(members), most):
            yield members[start : start + most]


def _batch_progress(progress: Progress, batch: int, batches: int, done: int, total: int) -> None:
    progress("denoise", batch * total + done, batches * total)
