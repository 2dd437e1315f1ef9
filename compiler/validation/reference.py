"""The diffusers pipeline in torch, the reference for everything that qie builds.

It runs on the CPU, without torchvision, and corrects diffusers in one place: with transformers 5 the pipelines no
longer pass the text encoder the types of its tokens (diffusers issue 14194), so image tokens silently get the rotary
positions of text. Here they get those of training. It needs ``qie[reference]``, which the first call imports.

Shapes: B batch, N noise tokens, R reference tokens of one image, T = N + R of all images, C = 64 channels a token (or
of a VAE latent or pixel), L prompt tokens, D prompt width, S tokens of the whole prompt, P vision patches, V = P / 4
image tokens, I images, H W height and width. A grid is the (height, width) of an image in tokens, 16 pixels wide.
All arrays are float32 unless stated otherwise.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qie.compiler.checkpoint.checkpoint import open_checkpoint
from qie.compiler.checkpoint.lora import Lora
from qie.compiler.checkpoint.model import CONDITION_AREA, PIPELINES, VAE_AREA
from qie.compiler.validation.fusing import fuse
from qie.compiler.validation.packages import import_package, quiet
from qie.compiler.weights.weight import DType
from qie.engines.errors import RequestError

__all__ = ["Reference", "ReferencePrompt", "ReferenceStep", "load_reference", "randn"]

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferencePrompt:
    """The inputs of the text encoder for one prompt, and its output.

    Attributes:
        input_ids: int64 [S], with the template's prefix.
        position_ids: int64 [3, S] (time, height, width), with the prefix.
        patches: [P, 1176], input of the vision tower.
        grid_thw: int64 [I, 3], patches of each image in time, height and width.
        embeds: [L, D], the last hidden state after the final norm, without the prefix.
    """

    input_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    patches: Floats
    grid_thw: NDArray[np.int64]
    embeds: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceStep:
    """One step of an edit.

    Attributes:
        index: number of the step, from 0.
        sigma: noise level before the step.
        latents: [N, C] before the step.
        velocity: [N, C], after guidance.
        conditional: [N, C], velocity of the conditional pass, before guidance.
        negative: [N, C], velocity of the negative pass; None without guidance.
        latents_next: [N, C] after the step.
    """

    index: int
    sigma: float
    latents: Floats
    velocity: Floats
    conditional: Floats
    negative: Floats | None
    latents_next: Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A loaded pipeline.

    Attributes:
        pipeline: the diffusers pipeline.
        dtype: dtype of weights and activations.
        vae_area: area in pixels to which images are resized for the VAE.
        condition_area: area in pixels to which images are resized for the vision tower.
    """

    pipeline: Any
    dtype: DType
    vae_area: int
    condition_area: int

    def vision(self, patches_P: Floats, grid_thw_I3: NDArray[np.int64]) -> Floats:
        """The vision tower: patches [P, 1176] of images with ``grid_thw`` [I, 3] patches -> image embeddings [V, D]."""
        visual = self.pipeline.text_encoder.model.visual
        return _floats(visual(self._tensor(patches_P), grid_thw=_torch().from_numpy(grid_thw_I3)).pooler_output)

    def prompt(self, images: Sequence[Image.Image], instruction: str) -> ReferencePrompt:
        """Tokenize and encode the prompt of an edit of RGB ``images`` in their original size."""
        encoder = self.pipeline.text_encoder
        inputs: dict[str, Any] = {}
        handle = encoder.register_forward_pre_hook(lambda _, __, arguments: inputs.update(arguments), with_kwargs=True)
        try:
            embeds_BLD, _ = self.pipeline.encode_prompt(instruction, self._condition_images(images))
        finally:
            handle.remove()
        tokens = {key: inputs[key] for key in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        position_ids_3BS, _ = encoder.model.get_rope_index(**tokens)
        return ReferencePrompt(
            input_ids=inputs["input_ids"][0].numpy(),
            position_ids=position_ids_3BS[:, 0].numpy(),
            patches=_floats(inputs["pixel_values"]),
            grid_thw=inputs["image_grid_thw"].numpy(),
            embeds=_floats(embeds_BLD[0]),
        )

    def prompt_embeds(self, images: Sequence[Image.Image], instruction: str) -> Floats:
        """The prompt embeddings [L, D] of an edit of RGB ``images`` in their original size."""
        return self.prompt(images, instruction).embeds

    def noise(self, seed: int, width: int, height: int, dtype: DType = "float32") -> Floats:
        """The noise [N, C] of an edit to ``width`` x ``height`` pixels, drawn by the pipeline in ``dtype``."""
        generator, channels = _torch().Generator("cpu").manual_seed(seed), self.pipeline.vae.config.z_dim
        where = getattr(_torch(), dtype), "cpu", generator
        latents_BNC, _ = self.pipeline.prepare_latents(None, 1, channels, height, width, *where)
        return _floats(latents_BNC[0])

    @property
    def sigmas(self) -> Floats:
        """The sigmas [T + 1] of the last edit, with the final zero."""
        return _floats(self.pipeline.scheduler.sigmas)

    def reference_image(self, image: Image.Image) -> NDArray[np.uint8]:
        """An RGB image as the pipeline resizes it for the VAE: uint8 [height, width, 3]."""
        return np.asarray(self._resize(image, self.vae_area))

    def encode_image(self, image_HWC: NDArray[np.uint8]) -> Floats:
        """An image uint8 [height, width, 3], sides multiples of 16 -> normalized packed latents [R, C]."""
        pipeline = self.pipeline
        pixels_BCTHW = pipeline.image_processor.preprocess(Image.fromarray(image_HWC)).unsqueeze(2)
        height, width, _ = image_HWC.shape
        channels, noise = pipeline.vae.config.z_dim, _torch().zeros(1)
        where = self._torch_dtype, pixels_BCTHW.device, None
        _, latents_BRC = pipeline.prepare_latents(pixels_BCTHW, 1, channels, height, width, *where, latents=noise)
        return _floats(latents_BRC[0])

    def velocity(
        self,
        latents_BNC: Floats,
        reference_BRC: Sequence[Floats],
        prompt_embeds_BLD: Floats,
        sigma: float,
        grids: Sequence[tuple[int, int]],
    ) -> Floats:
        """One pass of the transformer, before guidance -> [B, N, C].

        Args:
            latents_BNC: noisy latents.
            reference_BRC: latents of each reference image.
            prompt_embeds_BLD: prompt embeddings.
            sigma: noise level.
            grids: grid of the noise, then of each reference image.
        """
        hidden_BTC = self._tensor(np.concatenate([latents_BNC, *reference_BRC], axis=1))
        batch, noise_tokens, _ = latents_BNC.shape
        timestep_B = _torch().full((batch,), sigma * 1000).to(self._torch_dtype) / 1000
        output_BTC = self.pipeline.transformer(
            hidden_states=hidden_BTC,
            encoder_hidden_states=self._tensor(prompt_embeds_BLD),
            timestep=timestep_B,
            img_shapes=[[(1, height, width) for height, width in grids]] * batch,
            return_dict=False,
        )[0]
        return _floats(output_BTC[:, :noise_tokens])

    def decode(self, latents_NC: Floats, height: int, width: int) -> NDArray[np.uint8]:
        """Normalized packed latents [N, C] of a grid of ``height`` x ``width`` tokens -> uint8 [16 h, 16 w, 3].

        A token is 2 x 2 latents, channel-major (pipeline_qwenimage_edit_plus.py, _unpack_latents).
        """
        pipeline, config = self.pipeline, self.pipeline.vae.config
        tokens_hwcyx = self._tensor(latents_NC).view(height, width, config.z_dim, 2, 2)
        z_BCTHW = tokens_hwcyx.permute(2, 0, 3, 1, 4).reshape(1, config.z_dim, 1, 2 * height, 2 * width)
        mean = self._tensor(np.asarray(config.latents_mean, np.float32)).view(1, -1, 1, 1, 1)
        std = self._tensor(np.asarray(config.latents_std, np.float32)).view(1, -1, 1, 1, 1)
        pixels_BCHW = pipeline.vae.decode(z_BCTHW / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
        return np.asarray(pipeline.image_processor.postprocess(pixels_BCHW, output_type="pil")[0])

    def edit(
        self,
        images: Sequence[Image.Image],
        instruction: str,
        *,
        negative: str = " ",
        cfg: float = 4.0,
        steps: int,
        seed: int | None = None,
        latents: Floats | None = None,
        width: int | None = None,
        height: int | None = None,
        on_step: Callable[[ReferenceStep], None] | None = None,
    ) -> NDArray[np.uint8]:
        """A whole edit by the pipeline itself -> uint8 [height, width, 3].

        Args:
            images: RGB in their original size.
            instruction: the instruction.
            negative: negative prompt.
            cfg: scale of true classifier-free guidance; 1 or less turns it off.
            steps: number of steps.
            seed: seed of the noise; exclusive with ``latents``.
            latents: noise [N, C].
            width: width of the result in pixels; None for the model's area at the aspect ratio of the last image.
            height: height of the result in pixels.
            on_step: called after every step.

        Raises:
            RequestError: not exactly one of ``seed`` and ``latents``, or several images for a model that takes one.
        """
        if (seed is None) == (latents is None):
            given = "neither seed nor latents are given" if seed is None else "both seed and latents are given"
            raise RequestError(f"{given}, expected one of them; give one of the two", option="seed")
        if not self._plus and len(images) != 1:
            raise RequestError(
                f"{len(images)} images were given, this model takes 1; use one image or an Edit-Plus checkpoint"
            )
        with self._areas(), self._observed(on_step):
            result = self.pipeline(
                image=list(images) if self._plus else images[0],
                prompt=instruction,
                negative_prompt=negative if cfg > 1 else None,
                true_cfg_scale=cfg,
                num_inference_steps=steps,
                generator=None if seed is None else _torch().Generator("cpu").manual_seed(seed),
                latents=None if latents is None else self._tensor(latents)[None],
                width=width,
                height=height,
            )
        return np.asarray(result.images[0])

    @property
    def _plus(self) -> bool:
        return type(self.pipeline).__name__ == "QwenImageEditPlusPipeline"

    @property
    def _module(self) -> Any:
        return sys.modules[type(self.pipeline).__module__]

    @property
    def _torch_dtype(self) -> Any:
        return getattr(_torch(), self.dtype)

    def _tensor(self, array: Floats) -> Any:
        return _torch().tensor(array, dtype=self._torch_dtype)

    def _resize(self, image: Image.Image, area: int) -> Any:
        width, height, *_ = self._module.calculate_dimensions(area, image.width / image.height)
        return self.pipeline.image_processor.resize(image, height, width)

    def _condition_images(self, images: Sequence[Image.Image]) -> list[Any]:
        """The images as the pipeline passes them to the image processor: Edit resizes them once, Edit-Plus twice."""
        return [self._resize(image, self.condition_area if self._plus else self.vae_area) for image in images]

    @contextmanager
    def _areas(self) -> Iterator[None]:
        """Inside the block, the code of the pipeline resizes to the areas of the checkpoint."""
        module, original = self._module, self._module.calculate_dimensions
        areas = {VAE_AREA: self.vae_area, CONDITION_AREA: self.condition_area}
        module.calculate_dimensions = lambda area, ratio: original(areas[area], ratio)
        try:
            yield
        finally:
            module.calculate_dimensions = original

    @contextmanager
    def _observed(self, on_step: Callable[[ReferenceStep], None] | None) -> Iterator[None]:
        """Inside the block, the scheduler reports its steps, with the transformer's passes since the step before."""
        scheduler, original = self.pipeline.scheduler, self.pipeline.scheduler.step
        passes: list[Any] = []  # the conditional one, and with guidance the negative one
        handle = self.pipeline.transformer.register_forward_hook(lambda _, __, output: passes.append(output[0]))

        def step(velocity_BNC: Any, timestep: Any, latents_BNC: Any, **options: Any) -> Any:
            result = original(velocity_BNC, timestep, latents_BNC, **options)
            if on_step is not None:
                index = scheduler.step_index - 1
                conditional, *negative = (_floats(output[0, : latents_BNC.shape[1]]) for output in passes)
                on_step(
                    ReferenceStep(
                        index=index,
                        sigma=float(scheduler.sigmas[index]),
                        latents=_floats(latents_BNC[0]),
                        velocity=_floats(velocity_BNC[0]),
                        conditional=conditional,
                        negative=negative[0] if negative else None,
                        latents_next=_floats(result[0][0]),
                    )
                )
            passes.clear()
            return result

        scheduler.step = step
        try:
            yield
        finally:
            del scheduler.step
            handle.remove()


def load_reference(folder: Path, *, dtype: DType = "float32", loras: Sequence[Lora] = ()) -> Reference:
    """Load a checkpoint's pipeline on the CPU, with LoRAs fused and the scheduler that they were distilled for.

    Raises:
        BackendMissingError: torch, diffusers or transformers is not installed.
        CheckpointError, ExportError: see ``open_checkpoint`` and ``fuse``.
    """
    torch, diffusers = _torch(), import_package("diffusers")
    model = open_checkpoint(str(folder), weights=False).model
    kind = next(name for name, pipeline in PIPELINES.items() if pipeline == model.pipeline)
    with quiet():
        pipeline = getattr(diffusers, kind).from_pretrained(
            folder, processor=_load_processor(folder / "processor"), dtype=getattr(torch, dtype), local_files_only=True
        )
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        module.eval().requires_grad_(False)
    pipeline.text_encoder.register_forward_pre_hook(_mark_image_tokens, with_kwargs=True)
    fuse(pipeline, loras)
    return Reference(
        pipeline=pipeline,
        dtype=dtype,
        vae_area=model.areas.vae_area,
        condition_area=model.areas.condition_area or model.areas.vae_area,
    )


def randn(shape: Sequence[int], seed: int, dtype: DType = "float32") -> Floats:
    """The output of ``torch.randn`` on the CPU in ``dtype`` with a new generator, as float32."""
    torch = _torch()
    generator = torch.Generator("cpu").manual_seed(seed)
    return _floats(torch.randn(tuple(shape), generator=generator, dtype=getattr(torch, dtype)))


def _mark_image_tokens(encoder: Any, arguments: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Pass the text encoder the types of its tokens, so that image tokens get positions in three dimensions."""
    types_BS = (inputs["input_ids"] == encoder.config.image_token_id).int()
    return arguments, {**inputs, "mm_token_type_ids": types_BS}


def _load_processor(folder: Path) -> Any:
    """The checkpoint's Qwen2VLProcessor without video, whose processor needs torchvision."""
    transformers = import_package("transformers")

    class ImageTextProcessor(transformers.Qwen2VLProcessor):  # type: ignore[misc, name-defined]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    return ImageTextProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil.from_pretrained(folder),
        tokenizer=transformers.Qwen2Tokenizer.from_pretrained(folder),
    )


def _floats(tensor: Any) -> Floats:
    floats: Floats = tensor.float().numpy()
    return floats


def _torch() -> Any:
    return import_package("torch")
