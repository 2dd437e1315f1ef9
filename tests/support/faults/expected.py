"""What ``qie validate`` must say of each fault: the checks that fail, no others, and what bisecting names.

The lines are those of ``tests.support.faults.findings``.
"""

__all__ = ["EXPECTED"]

B0, B1, B2, B3, B4 = (f"transformer_blocks.{number}" for number in range(5))
"""Blocks of the transformer."""

STEPS = "transformer, velocity, latents, blocks"
"""The checks of what the transformer computes."""

GUIDED, IMAGES = "tall with guidance", "two images"
"""Cases of the golden file that show what others do not."""

EXPECTED: dict[str, tuple[str, str]] = {
    # Files
    "flipped byte of weights": ("files", ""),
    "missing file": ("files", ""),
    "truncated file": ("files", ""),
    "edited manifest": ("files", ""),
    "engine for another GPU": ("target", ""),
    "engine of another backend": ("target", ""),
    "engine in another precision": ("target", ""),
    "engine of another scheme": ("target, precision", ""),
    "stale golden file": ("golden file", ""),
    "golden file with a LoRA": ("golden file", ""),
    "golden file without the LoRA": ("golden file", ""),
    "layer in float16": ("precision", ""),
    "contract of another graph": ("contract", ""),
    "tokenizer of another model": ("inputs (wide), language (wide), blocks",
        "language_model.layers.0: language_model.embed_tokens"),
    # Constants of the manifest
    "shift of the schedule": (
        f"schedules, inputs, transformer (wide, {GUIDED}), velocity (wide, {GUIDED}), latents, blocks",
        f"{B0} (text): {B0}.attn.add_k_proj",
    ),
    "end of the schedule": (f"schedules, inputs, {STEPS}", f"{B0} (text): {B0}.attn.add_k_proj"),
    "formula of the shift": (
        f"schedules, inputs, transformer (wide, {GUIDED}), velocity (wide, {GUIDED}), latents, blocks",
        f"{B0} (text): {B0}.attn.add_k_proj",
    ),
    "rotary wavelengths": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "rotary channels": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "image token": ("inputs, language, blocks", "language_model.layers.0: language_model.layers.0.input_layernorm"),
    "template of the prompt": (
        f"inputs (wide, {GUIDED}, five in a row), language (wide, {GUIDED}, five in a row), blocks",
        "language_model.layers.0: language_model.embed_tokens",
    ),
    "mean of the vision tower": ("inputs, vision, blocks", "visual.blocks.0: visual.patch_embed.proj"),
    "deviation of the vision tower": ("inputs, vision, blocks", "visual.blocks.0: visual.patch_embed.proj"),
    "windows of the vision tower": ("vision (wide, tall with guidance), blocks",
        "visual.blocks.0: visual.patch_embed.proj"),
    "rotary wavelengths of the vision tower": ("vision, blocks", "visual.blocks.0: visual.blocks.0.attn.proj"),
    "area of reference images": ("target, schedules, inputs", ""),
    "area of the vision tower's images": ("inputs, vision, language, blocks",
        "visual.blocks.0: visual.patch_embed.proj"),
    "modulation weights exchanged": ("modulation", ""),
    "dtype of the noise": ("target", ""),
    "limits of another recipe": ("target", ""),
    # Weights and tables
    "queries and keys exchanged": (STEPS, f"{B2} (text): {B2}.attn.to_k"),
    "norms of queries and keys exchanged": (STEPS, f"{B1} (text): {B1}.attn.to_out.0"),
    "two blocks exchanged": (STEPS, f"{B1} (text): {B1}.attn.add_k_proj"),
    "missing bias": (STEPS, f"{B3}: {B3}.img_mlp.net.2"),
    "channel of a weight doubled": (STEPS, f"{B2} (text): {B2}.attn.to_v"),
    "one weight of 36,864": (STEPS, f"{B0}: {B0}.attn.to_q"),
    "weight not transposed": (STEPS, f"{B4}: {B4}.attn.to_out.0"),
    "foreign LoRA": (STEPS, f"{B2}: {B2}.attn.to_out.0"),
    "weights rounded to FP8": (STEPS, f"{B1}: {B1}.img_mlp.net.0.proj"),
    "text feed-forward missing": (STEPS, f"{B0} (text): {B0}.txt_mlp.net.2"),
    "key and value heads exchanged": ("language, blocks",
        "language_model.layers.1: language_model.layers.1.self_attn.k_proj"),
    "embedding of another token": ("language, blocks", "language_model.layers.0: language_model.embed_tokens"),
    "convolution of the VAE encoder": ("vae_encoder, blocks", "encoder.down_blocks.1: encoder.down_blocks.1.conv1"),
    "norm of the VAE decoder": ("vae_decoder, blocks", "decoder.norm_out"),
    "modulation of the next step": (f"modulation, {STEPS}", f"{B0} (text): {B0}.attn.add_k_proj"),
    "rows of modulation exchanged": (f"modulation, {STEPS}", f"{B3} (text): {B3}.attn.to_k"),
    "modulation of the output without 1": (f"modulation, {STEPS}", "proj_out"),
    "modulation weights": (f"schedules, {STEPS}", f"{B1} (text): {B1}.attn.add_k_proj"),
    # Graphs
    "reference tokens at the timestep of the noise": (STEPS, f"{B0} (text): {B0}.attn.to_k"),
    "gates of reference tokens": (STEPS, f"{B0}: {B0}.img_mlp.net.0.proj"),
    "epsilon of the norms": (STEPS, f"{B0} (text): {B0}.attn.add_k_proj"),
    "exact GELU": ("transformer (wide, two images, five in a row), velocity, latents", ""),
    "text after image": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "queries without rotation": (STEPS, f"{B4}: {B4}.attn.to_out.0"),
    "last block of other tokens": (STEPS, f"{B4}: {B4}.attn.to_q"),
    "norms of text and image": (STEPS, f"{B0} (text): {B0}.attn.to_add_out"),
    "missing residual": (STEPS, f"{B0} (text): {B0}.txt_mlp.net.0.proj"),
    "shift of the output as gain": (STEPS, "proj_out"),
    "modulation of another block": (STEPS, f"{B1} (text): {B1}.attn.add_k_proj"),
    "guidance without rescaling": ("latents (tall with guidance)", ""),
    "no guidance": ("latents (tall with guidance)", ""),
    "sign of the step": ("latents", ""),
    "attention scale": (f"vision, language, {STEPS}",
        "visual.blocks.0: visual.blocks.0.attn.proj, "
        "language_model.layers.0: language_model.layers.0.self_attn.o_proj, "
        f"{B0} (text): {B0}.attn.to_out.0"),
    "causal attention": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "pairs of rotary channels": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "mean of latents": ("vae_encoder", ""),
    "deviation of latents": ("vae_decoder, blocks", "decoder.mid_block.resnets.0: post_quant_conv"),
    "packing of latents": ("vae_encoder", ""),
    "unpacking of latents": ("vae_decoder, blocks", "decoder.mid_block.resnets.0: post_quant_conv"),
    "order of colors in the encoder": ("vae_encoder, blocks", "encoder.down_blocks.0: encoder.conv_in"),
    "order of colors in the decoder": ("vae_decoder", ""),
    "decoder without clipping": ("vae_decoder (tall with guidance, five in a row)", ""),
    "decoder without rounding": ("vae_decoder", ""),
    "decoder moves the image": ("vae_decoder", ""),
    "upsampling between pixels": ("vae_decoder, blocks",
        "decoder.up_blocks.1.resnets.0: decoder.up_blocks.0.upsamplers.0.resample.1"),
    "padding of the encoder": ("vae_encoder, blocks", "encoder.down_blocks.3: encoder.down_blocks.2.resample.1"),
    "scale of pixels": ("vae_encoder, blocks", "encoder.down_blocks.0: encoder.conv_in"),
    "attention of the VAE": ("vae_encoder, vae_decoder, blocks",
        "encoder.mid_block.attentions.0: encoder.mid_block.attentions.0.proj, "
        "decoder.mid_block.attentions.0: decoder.mid_block.attentions.0.proj"),
    "windows of vision blocks": ("vision (wide, tall with guidance), blocks",
        "visual.blocks.0: visual.blocks.0.attn.proj"),
    "activation of the merger": ("vision", ""),
    "values as queries": ("vision, blocks", "visual.blocks.0: visual.blocks.0.attn.proj"),
    "sections of positions": ("language (tall with guidance, two images)", ""),
    "language model that looks ahead": ("language, blocks",
        "language_model.layers.0: language_model.layers.0.self_attn.o_proj"),
    "prefix in the graph": ("language, blocks", "language_model.norm"),
    "missing norm": ("language", ""),
    # Quantized graphs
    "scale of one channel": ("blocks", f"{B2}.attn.to_q"),
    "scales of a weight": ("blocks", f"{B2} (text): {B2}.txt_mlp.net.2"),
    "input scale too large": ("scales", ""),
    "input scale too large in FP8": ("scales", ""),
    "input scale too small": ("scales, blocks", f"{B1} (text): {B1}.txt_mlp.net.0.proj"),
    "scale of one side": (f"scales, {STEPS}", f"{B2}: {B2}.img_mlp.net.0.proj"),
    "zero point": (f"scales, {STEPS}", f"{B3}: {B3}.img_mlp.net.0.proj"),
    "smoothing twice": (
        f"scales, transformer ({GUIDED}, {IMAGES}), "
        f"velocity (wide, {GUIDED}, {IMAGES}), latents (wide, {IMAGES}), blocks",
        f"{B2}.img_mlp.net.2",
    ),
    "smoothing of weights alone": (
        f"scales, transformer ({GUIDED}, {IMAGES}), "
        f"velocity (wide, {GUIDED}, {IMAGES}), latents (wide, {IMAGES}), blocks",
        f"{B2}: {B2}.img_mlp.net.2",
    ),
    "smoothing of weights without their inputs": (STEPS, f"{B0} (text): {B0}.attn.add_k_proj"),
    "channels of quantized values": (STEPS, f"{B2} (text): {B2}.attn.to_k"),
    "excluded linear quantized": (
        "precision, " + ", ".join(f"{check} (wide, two images, five in a row)" for check in STEPS.split(", ")[:3]),
        "",
    ),
    "linear not quantized": ("precision, scales", ""),
    # Code of the runtime
    "frame of references": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "start of the text": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "centered positions": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "center of an odd side": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "rows and columns": (STEPS, f"{B0} (text): {B0}.attn.to_out.0"),
    "packing of noise": ("inputs", ""),
    "noise of another seed": ("inputs", ""),
    "sigmas that end elsewhere": (
        f"schedules, inputs, transformer (wide, {GUIDED}), velocity (wide, {GUIDED}), latents, blocks",
        f"{B0} (text): {B0}.attn.add_k_proj",
    ),
    "resampling of references": ("inputs, vision, blocks", "visual.blocks.0: visual.patch_embed.proj"),
    "resampling of the vision tower's images": ("inputs, vision, blocks", "visual.blocks.0: visual.patch_embed.proj"),
    "number of the first image": ("inputs, language, blocks", "language_model.layers.0: language_model.embed_tokens"),
    "tokens of the prefix": ("language", ""),
    "positions after an image": ("inputs (wide), language (wide), blocks",
        "language_model.layers.0: language_model.layers.0.self_attn.o_proj"),
    "place of image embeddings": ("language, blocks",
        "language_model.layers.0: language_model.layers.0.input_layernorm"),
    "columns of windows": ("vision (wide), blocks", "visual.blocks.0: visual.patch_embed.proj"),
    "order of image embeddings": ("inputs (wide), vision (wide)", ""),
    "positions of patches": ("vision, blocks", "visual.blocks.0: visual.blocks.0.attn.proj"),
    "pixels of a patch": ("inputs, vision, blocks", "visual.blocks.0: visual.patch_embed.proj"),
    "step of the next sigma": ("latents", ""),
    "guidance scale": ("latents (tall with guidance)", ""),
    "negative pass with the instruction": (
        "transformer (tall with guidance), velocity (tall with guidance), latents (tall with guidance)",
        "",
    ),
    "formula of the timestep": ("modulation", ""),
    "latents upside down": ("vae_decoder, blocks", "decoder.mid_block.resnets.0: post_quant_conv"),
    # Code of a whole edit
    "tokens of the schedule": ("psnr, ssim", ""),
    "order of references": (f"psnr ({IMAGES}), ssim ({IMAGES}), max_drop_db ({IMAGES})", ""),
    "negative prompt of an edit": (f"psnr ({GUIDED}), ssim ({GUIDED})", ""),
    "grid of references": (
        f"psnr (wide, {GUIDED}), ssim (wide, {GUIDED}), shift ({GUIDED}), scale ({GUIDED}), "
        f"max_drop_db (wide, {GUIDED})",
        "",
    ),
}  # fmt: skip
