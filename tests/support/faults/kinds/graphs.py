"""Graphs that are written wrongly: a bundle built by code with one line changed."""

from tests.support.faults.code import Change
from tests.support.faults.fault import Fault

__all__ = ["FAULTS"]


def transformer(how: str, old: str, new: str) -> Fault:
    """A fault of the transformer's graph."""
    return Fault(
        how=how,
        writes=Change(module="compiler.graphs.transformer", old=old, new=new),
    )


def step(how: str, old: str, new: str) -> Fault:
    """A fault of guidance or of the Euler step in the transformer's graph, behind the velocity."""
    return Fault(
        how=how,
        writes=Change(module="compiler.graphs.transformer", old=old, new=new),
    )


def vae(how: str, old: str, new: str) -> Fault:
    """A fault of the graph of the VAE encoder or decoder."""
    return Fault(
        how=how,
        # type: ignore[arg-type]
        writes=Change(module="compiler.graphs.vae", old=old, new=new),
    )


def prompt(component: str, how: str, old: str, new: str) -> Fault:
    """A fault of the graph of the vision tower or of the language model."""
    return Fault(
        how=how,
        # type: ignore[arg-type]
        writes=Change(module=f"compiler.graphs.{component}", old=old, new=new),
    )


FAULTS = {
    "reference tokens at the timestep of the noise": transformer(
        "reference tokens are modulated as noise tokens are, in place of timestep 0",
        "tokens.of_references(op, x_BTD), reference.shift, reference.gain",
        "tokens.of_references(op, x_BTD), noise.shift, noise.gain",
    ),
    "gates of reference tokens": transformer(
        "the branches of reference tokens have the gates of noise tokens",
        "op.Where(tokens.is_noise_T1, noise.gate, reference.gate)",
        "noise.gate",
    ),
    "epsilon of the norms": transformer(
        "the epsilon of LayerNorm is 1e-2 in place of 1e-6",
        "op.LayerNormalization(x_BSD, self._one_D, axis=-1, epsilon=EPS)",
        "op.LayerNormalization(x_BSD, self._one_D, axis=-1, epsilon=1e-2)",
    ),
    "exact GELU": transformer(
        "GELU by the error function in place of tanh",
        'approximate="tanh"',
        'approximate="none"',
    ),
    "text after image": transformer(
        "the values of image tokens come before those of text tokens",
        "op.Concat(self.add_v_proj(op, text_BLD), self.to_v(op, image_BTD), axis=1)",
        "op.Concat(self.to_v(op, image_BTD), self.add_v_proj(op, text_BLD), axis=1)",
    ),
    "queries without rotation": transformer(
        "the queries of the last block are rotated by the positions of the text",
        "query_rotary = tuple(op.Slice(t, tokens.text, end, [0]) for t in rotary_SE)",
        "query_rotary = tuple(op.Slice(t, [0], tokens.noise, [0]) for t in rotary_SE)",
    ),
    "last block of other tokens": transformer(
        "the queries of the last block are of the last tokens, which are references, in place of the noise",
        "query = self.to_q(op, tokens.of_noise(op, image_BTD))",
        "query = self.to_q(op, op.Slice(image_BTD, op.Neg(tokens.noise), [INT64_MAX], [1]))",
    ),
    "norms of text and image": transformer(
        "the queries of the text are normalized by the weight of the image",
        "query, self.of_tokens(op, tokens, self.norm_added_q, self.norm_q), rotary_SE)",
        "query, op.Where(tokens.is_text_S11, self.norm_q(op), op.Add(self.norm_q(op), op.Mul(self.norm_added_q(op), "
        "constant(op, 0.0)))), rotary_SE)",
    ),
    "missing residual": transformer(
        "the attention branch of the text replaces its residual",
        "text_BLD = op.Add(text_BLD, op.Mul(text.attention.gate, text_out_BLD))",
        "text_BLD = op.Mul(text.attention.gate, text_out_BLD)",
    ),
    "shift of the output as gain": transformer(
        "shift and gain of the output norm are in each other's place",
        "gain_B1D, shift_B1D = split(op, steps.of_images(op, modulation_out_PO), 2, axis=2)",
        "shift_B1D, gain_B1D = split(op, steps.of_images(op, modulation_out_PO), 2, axis=2)",
    ),
    "modulation of another block": transformer(
        "every block reads the modulation of block 0",
        "steps.of_block(op, self.number)",
        "steps.of_block(op, 0)",
    ),
    "guidance without rescaling": step(
        "the guided velocity keeps its norm",
        "op.Mul(guided_BNC, op.Div(norm_BN1, op.Max(guided_norm_BN1, tiny)))",
        "guided_BNC",
    ),
    "no guidance": step(
        "the negative pass does not guide",
        "op.Add(negative_velocity_BNC, op.Mul(guidance_B11, difference_BNC))",
        "velocity_BNC",
    ),
    "sign of the step": step(
        "the Euler step subtracts",
        "op.Add(latents_BNC, op.Mul(dsigma_B11, rescaled_BNC))",
        "op.Sub(latents_BNC, op.Mul(dsigma_B11, rescaled_BNC))",
    ),
    "attention scale": Fault(
        how="attention is scaled by 1 / K in place of 1 / sqrt(K)",
        writes=Change(
            module="compiler.graphs.layers",
            old="is_causal=int(causal)\n",
            new="is_causal=int(causal), scale=1 / 64\n",
        ),
    ),
    "causal attention": transformer(
        "the transformer's attention is causal",
        "attention(op, query, key_BSD, value_BSD, heads=self.config.heads)",
        "attention(op, query, key_BSD, value_BSD, heads=self.config.heads, causal=True)",
    ),
    "pairs of rotary channels": Fault(
        how="the rotation has the other sign",
        writes=Change(
            module="compiler.graphs.layers",
            old="real_BSHE, imaginary_BSHE = normalized(0), normalized(1)",
            new="imaginary_BSHE, real_BSHE = normalized(0), normalized(1)",
        ),
    ),
    "mean of latents": vae(
        "the means of the latents are in reverse order when encoding",
        'op.Sub(cast(op, mode_BCHW, self.dtype, "float32"), mean(op, self.config))',
        'op.Sub(cast(op, mode_BCHW, self.dtype, "float32"), constant(op, np.array(self.config.latents_mean[::-1], '
        "np.float32).reshape(1, -1, 1, 1)))",
    ),
    "deviation of latents": vae(
        "the deviations of the latents are in reverse order when decoding",
        "op.Mul(unpack(op, latents_BhwC, self.config.z_dim), std(op, self.config))",
        "op.Mul(unpack(op, latents_BhwC, self.config.z_dim), constant(op, np.array(self.config.latents_std[::-1], "
        "np.float32).reshape(1, -1, 1, 1)))",
    ),
    "packing of latents": vae(
        "a token has the 2 x 2 positions first, then the channels",
        "return op.Reshape(op.Transpose(positions_first, perm=[0, 1, 2, 4, 3]), [0, 0, 0, 4 * z_dim])",
        "return op.Reshape(positions_first, [0, 0, 0, 4 * z_dim])",
    ),
    "unpacking of latents": vae(
        "a token is read with the 2 x 2 positions first, then the channels",
        "channels_first = op.Reshape(latents_BhwC, [0, 0, 0, z_dim, 4])",
        "channels_first = op.Transpose(op.Reshape(latents_BhwC, [0, 0, 0, 4, z_dim]), perm=[0, 1, 2, 4, 3])",
    ),
    "order of colors in the encoder": vae(
        "the image is read as BGR",
        "op.Transpose(op.Cast(image_BHWC, to=ir.DataType.FLOAT), perm=[0, 3, 1, 2])",
        "op.Gather(op.Transpose(op.Cast(image_BHWC, to=ir.DataType.FLOAT), perm=[0, 3, 1, 2]), constant(op, [2, 1, 0], "
        '"int64"), axis=1)',
    ),
    "order of colors in the decoder": vae(
        "the image is written as BGR",
        "(op.Cast(levels_BHWC, to=ir.DataType.UINT8),)",
        '(op.Gather(op.Cast(levels_BHWC, to=ir.DataType.UINT8), constant(op, [2, 1, 0], "int64"), axis=3),)',
    ),
    "decoder without clipping": vae(
        "values beyond -1 and 1 are not clipped, and wrap around as uint8",
        'op.Clip(cast(op, image_BCHW, self.dtype, "float32"), constant(op, -1.0), constant(op, 1.0))',
        'cast(op, image_BCHW, self.dtype, "float32")',
    ),
    "decoder without rounding": vae(
        "levels are cut off in place of rounded",
        "op.Round(op.Mul(op.Transpose(unit_BCHW, perm=[0, 2, 3, 1]), constant(op, 255.0)))",
        "op.Mul(op.Transpose(unit_BCHW, perm=[0, 2, 3, 1]), constant(op, 255.0))",
    ),
    "decoder moves the image": vae(
        "the image is one pixel further to the right",
        "(op.Cast(levels_BHWC, to=ir.DataType.UINT8),)",
        "(op.Cast(op.Concat(op.Slice(levels_BHWC, [-1], [2**63 - 1], [2]), "
        "op.Slice(levels_BHWC, [0], [-1], [2]), axis=2), to=ir.DataType.UINT8),)",
    ),
    "upsampling between pixels": vae(
        "upsampling takes the next pixel where it should take the one before",
        'nearest_mode="floor"',
        'nearest_mode="ceil"',
    ),
    "padding of the encoder": vae(
        "an image is padded at the left and at the top before it is halved",
        "pads=(0, 0, 1, 1)",
        "pads=(1, 1, 0, 0)",
    ),
    "scale of pixels": vae(
        "pixels are divided by 128 in place of 127.5",
        "op.Div(pixels_BCHW, constant(op, 127.5))",
        "op.Div(pixels_BCHW, constant(op, 128.0))",
    ),
    "attention of the VAE": vae(
        "the attention of the VAE is not scaled",
        "op.Mul(q_BCHW, constant(op, self.width**-0.5, self.dtype))",
        "q_BCHW",
    ),
    "windows of vision blocks": prompt(
        "vision",
        "every block of the vision tower attends to the whole image",
        "image_mask_PP if i in self.config.full_attention_blocks else window_mask_PP",
        "image_mask_PP",
    ),
    "activation of the merger": prompt(
        "vision",
        "GELU by tanh in place of the error function",
        "op.Gelu(self.up(op, merged_1VM))",
        'op.Gelu(self.up(op, merged_1VM), approximate="tanh")',
    ),
    "values as queries": prompt(
        "vision",
        "queries, keys and values are read in another order",
        "q, k, v = split",
        "v, k, q = split",
    ),
    "sections of positions": prompt(
        "language",
        "the sections of frame, height and width are in reverse order",
        "np.repeat(np.arange(3), config.mrope_section)",
        "np.repeat(np.arange(3), config.mrope_section[::-1])",
    ),
    "language model that looks ahead": prompt(
        "language",
        "attention of the language model is not causal",
        "kv_heads=self.kv_heads, causal=True",
        "kv_heads=self.kv_heads, causal=False",
    ),
    "prefix in the graph": prompt(
        "language",
        "the graph leaves out 63 tokens of the prefix and the last token",
        "[PREFIX_TOKENS], [2**63 - 1], [1]",
        "[PREFIX_TOKENS - 1], [-1], [1]",
    ),
    "missing norm": prompt(
        "language",
        "the last norm of the language model has the weight 1",
        "self.norm(op, x_BLD)",
        "op.Div(self.norm(op, x_BLD), self.norm.weight)",
    ),
}
