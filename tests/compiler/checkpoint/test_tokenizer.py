"""The tokenizer: the ids of transformers and of tiktoken, from every file layout, and with Qwen's real vocabulary."""

import base64
import importlib.util
import json
import shutil
import unicodedata
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from qie.compiler.checkpoint.tokenizer import load_tokenizer
from qie.engines.errors import CheckpointError

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
"""Of Qwen2.5-VL, in the order of their ids from 151643 on."""

SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
USER = {
    "edit": "<|vision_start|><|image_pad|><|vision_end|>{}",
    "edit_plus": "Picture 1: <|vision_start|><|image_pad|><|vision_end|>{}",
}
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

TEXTS = (
    "",
    " ",
    "Make the sky blue.",
    "  two  spaces, tabs\t\tand\r\n\r\nlines \n ",
    "I'll don't WE'RE it's",
    "Stop!\n\nNow: {\n  x;\n}\n",
    "Ersetze die Straßenschilder durch größere; 1234567 Stück für 3,50 €",
    "把背景换成海边的日落,人物保持不变。",
    "日本語のテキストを「変更」してください",
    "이미지를 수채화로 바꿔 주세요",
    "غيّر لون السيارة إلى الأحمر",
    "हिन्दी में लिखो",
    "cafe\u0301 and caf\u00e9, A\u030angstro\u0308m, \u1112\u1161\u11ab\u1100\u1173\u11af",
    "👩\u200d👩\u200d👧 🇩🇪 🏳️\u200d🌈 \U0001f600",
    "zero\u200bwidth\ufeff, non\u00a0breaking, \x00\x7f\u0085 and \ufffd",
    "<|im_start|>user\nwrite <|im_end|> < |im_end| > <|image_pad|><|image_pad|>x<|vision_end|>",
    "snake_case(x) -> {'a': [1, 2.5e-3]}  # 'quoted' \"text\"",
    PREFIX,
)


def described(first: int) -> dict[str, dict[str, Any]]:
    """added_tokens_decoder as the published tokenizer_config.json writes it."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(first + number): {"content": token, **flags} for number, token in enumerate(SPECIAL)}


def write_vocabulary(folder: Path, vocab: dict[str, int], merges: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": described(len(vocab)), "bos_token": None}
    config |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps({t: len(vocab) + i for i, t in enumerate(SPECIAL)}))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint's folder with a small vocabulary that was trained on the texts of this test."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    write_vocabulary(tmp_path / "tokenizer", model["vocab"], [" ".join(merge) for merge in model["merges"]])
    return tmp_path


def ids(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def test_ids_of_transformers(root: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.Qwen2Tokenizer.from_pretrained(root / "tokenizer")
    tokenizer = load_tokenizer(root)
    for text, found in zip(TEXTS, ids(tokenizer), strict=True):
        assert found == reference(text, add_special_tokens=False)["input_ids"], text
        assert tokenizer.decode(found, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_every_file_layout_gives_the_same_ids(root: Path) -> None:
    tokenizer = load_tokenizer(root)
    expected = ids(tokenizer)
    config = root / "tokenizer/tokenizer_config.json"
    config.rename(root / "config")
    assert ids(load_tokenizer(root)) == expected, "with added_tokens.json"
    (root / "config").rename(config)
    (root / "tokenizer").rename(root / "processor")
    assert ids(load_tokenizer(root)) == expected, "with vocab.json in processor/"
    (root / "processor/vocab.json").unlink()
    tokenizer.save(str(root / "processor/tokenizer.json"))
    assert ids(load_tokenizer(root)) == expected, "with tokenizer.json in processor/"
    (root / "processor").rename(root / "tokenizer")
    assert ids(load_tokenizer(root)) == expected, "with tokenizer.json in tokenizer/"


def test_ids_of_transformers_from_a_saved_tokenizer(root: Path) -> None:
    transformers = pytest.importorskip("transformers")
    expected = ids(load_tokenizer(root))
    reference = transformers.Qwen2Tokenizer.from_pretrained(root / "tokenizer")
    shutil.rmtree(root / "tokenizer")
    reference.save_pretrained(root / "tokenizer")
    assert ids(load_tokenizer(root)) == expected


def test_truncation_and_padding_of_the_file_are_switched_off(root: Path) -> None:
    tokenizer = load_tokenizer(root)
    expected = ids(tokenizer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(root / "tokenizer/tokenizer.json"))
    assert ids(load_tokenizer(root)) == expected


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"])
def test_a_missing_special_token(root: Path, token: str) -> None:
    config = root / "tokenizer/tokenizer_config.json"
    config.write_text(config.read_text().replace(json.dumps(token), '"<|other|>"'))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(root)
    assert f"lacks {token};" in str(caught.value)


def test_no_tokenizer(root: Path) -> None:
    (root / "tokenizer/merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer, expected tokenizer/tokenizer\.json, or"):
        load_tokenizer(root)


def test_no_special_tokens_at_all(root: Path) -> None:
    (root / "tokenizer/tokenizer_config.json").unlink()
    (root / "tokenizer/added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks <\|im_start\|>, <\|im_end\|>, "):
        load_tokenizer(root)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("tokenizer.json", "{broken", r"tokenizer\.json is not a tokenizer"),
        ("vocab.json", "{broken", r"vocab\.json and merges\.txt are not a vocabulary"),
        ("merges.txt", "a b c\n", r"vocab\.json and merges\.txt are not a vocabulary"),
        ("merges.txt", "neither there\n", r"vocab\.json and merges\.txt are not a vocabulary"),
        ("tokenizer_config.json", "{broken", r"tokenizer_config\.json is not JSON"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added tokens that cannot be read"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "y"}}}', "added tokens that cannot be"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"other": "y"}}}', "added tokens that cannot be"),
    ],
)
def test_damaged_files(root: Path, file: str, text: str, says: str) -> None:
    (root / "tokenizer" / file).write_text(text)
    with pytest.raises(CheckpointError, match=says):
        load_tokenizer(root)


def test_special_tokens_of_another_vocabulary(root: Path) -> None:
    config = root / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": described(151643)}))
    with pytest.raises(CheckpointError, match=r"'<\|endoftext\|>' has id 151643, but vocab\.json leaves it \d+"):
        load_tokenizer(root)


# Qwen's real vocabulary: bytes and ranks, from which vocabulary and merges follow.


def byte_characters() -> list[str]:
    """The character by which byte-level BPE writes each byte (GPT-2, encoder.py): itself where it is printable."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts of which a token was made: what byte-pair encoding leaves of it with the earlier merges alone."""
    parts = [token[i : i + 1] for i in range(len(token))]
    own = ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, own) for left, right in pairwise(parts)]
        best = min(pairs)
        assert best < own, token
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    package = importlib.util.find_spec("dashscope")
    if package is None or package.origin is None:
        pytest.skip("needs the package dashscope, which holds Qwen's vocabulary")
    lines = (Path(package.origin).parent / "resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


@pytest.fixture(scope="module")
def qwen(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    characters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocab = {written(token): rank for token, rank in ranks.items()}
    longer = [token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    merges = [" ".join(map(written, last_merge(token, ranks))) for token in longer]
    root = tmp_path_factory.mktemp("qwen")
    write_vocabulary(root / "tokenizer", vocab, merges)
    return load_tokenizer(root)


def test_special_tokens_have_the_published_ids(qwen: Tokenizer) -> None:
    published = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652}
    published |= {"<|vision_end|>": 151653, "<|vision_pad|>": 151654, "<|image_pad|>": 151655, "<|video_pad|>": 151656}
    assert {token: qwen.token_to_id(token) for token in published} == published


@pytest.mark.parametrize("pipeline", USER)
def test_the_fixed_part_of_the_prompt_is_64_tokens(qwen: Tokenizer, pipeline: str) -> None:
    prefix = qwen.encode(PREFIX, add_special_tokens=False).ids
    assert len(prefix) == 64
    for instruction in ("", " ", "Make it blue", "\n\nnew lines first", "把背景换成海边", "'s"):
        prompt = PREFIX + USER[pipeline].format(instruction) + SUFFIX
        whole = qwen.encode(prompt, add_special_tokens=False).ids
        assert whole[:64] == prefix, "the user's part changes the tokens before it"


def test_ids_of_tiktoken(qwen: Tokenizer, ranks: dict[bytes, int]) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    special = {token: len(ranks) + number for number, token in enumerate(SPECIAL)}
    reference = tiktoken.Encoding("qwen", pat_str=words, mergeable_ranks=ranks, special_tokens=special)
    for text in TEXTS:
        normal = unicodedata.normalize("NFC", text)
        found = qwen.encode(text, add_special_tokens=False).ids
        assert found == reference.encode(normal, allowed_special="all"), text
