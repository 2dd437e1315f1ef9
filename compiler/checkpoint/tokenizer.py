"""The checkpoint's tokenizer, without transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from qie.compiler.checkpoint.checkpoint import Checkpoint
from qie.compiler.checkpoint.safetensors import read_json
from qie.engines.errors import CheckpointError
from qie.engines.inputs.prompt import PREFIX, PREFIX_TOKENS
from qie.engines.inputs.tokenizer import WORDS
from qie.engines.inputs.tokenizer import load_tokenizer as parse_tokenizer

__all__ = ["byte_level", "check_tokenizer", "load_tokenizer", "tokenizer_files"]

_REQUIRED = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
"""The special tokens of the prompt template."""

_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer from tokenizer.json, or else from vocab.json and merges.txt, without truncation and padding.

    ``path`` is the folder of a checkpoint; tokenizer/ comes before processor/. The ids are those of transformers'
    Qwen2Tokenizer.

    Raises:
        CheckpointError: there is no vocabulary, it is damaged, or a special token of the prompt template is missing.
    """
    folders = [path / "tokenizer", path / "processor"]
    for folder in folders:
        if (folder / "tokenizer.json").is_file():
            tokenizer = _from_file(folder / "tokenizer.json")
            break
    else:
        for folder in folders:
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                tokenizer = _from_vocabulary(folder)
                break
        else:
            raise CheckpointError(
                f"{path} has no tokenizer, expected tokenizer/tokenizer.json, or tokenizer/vocab.json with "
                "merges.txt; download the checkpoint again"
            )
    missing = [token for token in _REQUIRED if tokenizer.token_to_id(token) is None]
    if missing:
        raise CheckpointError(f"the tokenizer in {folder} lacks {', '.join(missing)}; download the checkpoint again")
    return tokenizer


def tokenizer_files(path: Path) -> tuple[Path, ...]:
    """The files of the tokenizer of the checkpoint ``path`` that are about as large as the bundle's one file."""
    names = ("tokenizer.json", "vocab.json", "merges.txt")
    return tuple(
        file for folder in ("tokenizer", "processor") for name in names if (file := path / folder / name).is_file()
    )


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Check that the tokenizer is the one for which the template, the pipeline and the text encoder were made.

    Raises:
        CheckpointError: it is not, or see ``load_tokenizer``.
    """
    tokenizer = load_tokenizer(checkpoint.path)
    prefix = len(tokenizer.encode(PREFIX, add_special_tokens=False).ids)
    if prefix != PREFIX_TOKENS:
        raise CheckpointError(
            f"the tokenizer splits the template's prefix into {prefix} tokens, expected {PREFIX_TOKENS}; restore the "
            "tokenizer of the checkpoint"
        )
    largest, vocabulary = max(tokenizer.get_vocab().values()), checkpoint.model.language.vocabulary
    if largest >= vocabulary:
        raise CheckpointError(
            f"the tokenizer has the id {largest}, and text_encoder/config.json a vocab_size of {vocabulary}; take both "
            "from the same checkpoint"
        )
    image_token_id, expected = checkpoint.model.image_token_id, tokenizer.token_to_id("<|image_pad|>")
    if image_token_id != expected:
        raise CheckpointError(
            f"text_encoder/config.json: image_token_id = {image_token_id}, but <|image_pad|> is {expected} in the "
            "tokenizer; take both from the same checkpoint"
        )


def _from_file(path: Path) -> Tokenizer:
    try:
        return parse_tokenizer(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a tokenizer of Qwen ({error}); download it again") from error


def _from_vocabulary(folder: Path) -> Tokenizer:
    try:
        model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(
            f"{folder}/vocab.json and merges.txt are not a vocabulary ({error}); download them again"
        ) from error
    tokenizer = byte_level(model)
    for token_id, token in sorted(_added_tokens(folder).items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{folder}: {token.content!r} has id {token_id}, but vocab.json leaves it "
                f"{tokenizer.token_to_id(token.content)}, so the files are of different downloads; download them again"
            )
    return tokenizer


def byte_level(model: BPE) -> Tokenizer:
    """A tokenizer that splits, encodes and decodes text as Qwen's does, by the pairs of ``model``."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added_tokens(folder: Path) -> Mapping[int, AddedToken]:
    """The tokens beside the vocabulary by id: with their flags where tokenizer_config.json has them."""
    config = folder / "tokenizer_config.json"
    described: Any = read_json(config).get("added_tokens_decoder") if config.is_file() else None
    try:
        if described:
            return {
                int(token_id): AddedToken(token["content"], **{flag: token[flag] for flag in _FLAGS if flag in token})
                for token_id, token in described.items()
            }
        plain = folder / "added_tokens.json"
        if not plain.is_file():
            return {}
        return {
            int(token_id): AddedToken(token, special=True, normalized=False)
            for token, token_id in read_json(plain).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{folder} has added tokens that cannot be read ({error}); download it again") from error
