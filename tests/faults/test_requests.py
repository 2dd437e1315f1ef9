"""Instructions, options and places of output that an edit does not take."""

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from tests.support.command_line import RUN, Qie, Refusal, assert_says

TINY = ARCHITECTURES["tiny"]

BAD_REQUESTS: dict[str, tuple[tuple[str, ...], str]] = {
    "empty instruction": (("photo.png", ""), "the instruction is empty; describe what to change"),
    "blank instruction": (("photo.png", " \n"), "the instruction is empty; describe what to change"),
    "long instruction": (("photo.png", "snow and " * 1000), r"the instruction has \d+ tokens, .* 1024; shorten it"),
    "vision token": (("photo.png", "<|image_pad|>"), "marks an image in the prompt; remove it"),
    "vision token in negative": (("photo.png", "x", "--negative", "<|image_pad|>"), "remove it"),
    "long negative": (("photo.png", "x", "--negative", "snow and " * 1000), "shorten it"),
    "not UTF-8": (("photo.png", "make it \udcff"), "is not UTF-8 text; write it again"),
    "negative not UTF-8": (("photo.png", "x", "--negative", "\udcff"), "is not UTF-8 text; write it again"),
    "no instruction": (("photo.png", "photo.png"), "give the images first, then what to change"),
    "instruction first": (("make it red", "photo.png"), "give the images first, then what to change"),
    "one word": (("photo.png",), "give the images first, then what to change"),
    "long instruction first": (("make it red " * 40, "photo.png"), "give the images first"),
    "name too long": (("p" * 300 + ".png", "x"), "cannot be read .File name too long.; check its name"),
    "steps 0": (("photo.png", "x", "--steps", "0"), "steps is 0, expected at least 1; use more"),
    "steps negative": (("photo.png", "x", "--steps", "-5"), "steps is -5, expected at least 1; use more"),
    "too many steps": (
        ("photo.png", "x", "--steps", "1001"),
        r"steps is 1001, expected at most 1000; use fewer steps \(--steps\)$",
    ),
    "guidance nan": (
        ("photo.png", "x", "--cfg", "nan"),
        r"guidance scale is nan, expected a finite number; .* \(--cfg\)$",
    ),
    "guidance infinite": (("photo.png", "x", "--cfg", "inf"), "guidance scale is inf, expected a finite number"),
    "seed too large": (("photo.png", "x", "--seed", str(2**64)), r"seed is 18446744073709551616, .* from -2\*\*63 to"),
    "seed too small": (("photo.png", "x", "--seed", str(-(2**63) - 1)), r"expected a whole number from -2\*\*63 to"),
    "a later seed too large": (("photo.png", "x", "--seed", str(2**64 - 1), "--num-images", "2"), "expected a whole"),
    "size without x": (
        ("photo.png", "x", "--size", "1024"),
        r"size is '1024', expected width x height in pixels; give one such as 1024x768 \(--size\)$",
    ),
    "size of words": (("photo.png", "x", "--size", "bigxsmall"), "give one such as 1024x768"),
    "size negative": (("photo.png", "x", "--size", "-64x64"), "give one such as 1024x768"),
    "size zero": (("photo.png", "x", "--size", "0x64"), "not positive; use 1024x768"),
    "size endless": (("photo.png", "x", "--size", "9" * 5000 + "x64"), "give one such as 1024x768"),
    "output gif": (("photo.png", "x", "-o", "out.gif"), "out.gif has the suffix .*; use one of .png, .jpg"),
    "output without suffix": (("photo.png", "x", "-o", "out"), "use one of .png, .jpg"),
    "output folder missing": (("photo.png", "x", "-o", "no/out.png"), "there is no folder no .*; create it or choose"),
    "output is a folder": (("photo.png", "x", "-o", "folder.png"), "it is no file, or read-only.; choose another path"),
    "four images": (("photo.png",) * 4 + ("x",), "4 images were given, this bundle takes at most 3; use fewer"),
    "unknown bundle": (
        ("photo.png", "x", "--bundle", "nope"),
        r"no bundle .nope.*available: none.*; choose one of `qie list`",
    ),
    "bundle name too long": (("photo.png", "x", "--bundle", "b" * 300), "there is no bundle 'bbb"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_request(qie: Qie, refusal: Refusal, workplace: Path, bundle: Path, name: str) -> None:
    words, expected = BAD_REQUESTS[name]
    (workplace / "folder.png").mkdir()
    before = sorted(workplace.iterdir())
    with_bundle = words if "--bundle" in words else (*words, "--bundle", str(bundle))
    assert_says(refusal(qie("run", *with_bundle)), expected)
    assert sorted(workplace.iterdir()) == before


def test_bad_seeds_and_texts_cost_no_engine(
    qie: Qie, workplace: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("an engine was loaded")

    monkeypatch.setattr("qie.engines.sessions.load.load", fail)
    for words in (("x", "--seed", str(2**64)), ("",), ("x", "--steps", "0"), ("x", "--negative", "<|image_pad|>")):
        assert qie("run", "photo.png", *words, "--bundle", bundle).returncode == 2


def test_two_images_for_the_first_generation(qie: Qie, refusal: Refusal, edit_bundle: Path) -> None:
    message = refusal(qie("run", "photo.png", "photo.png", "x", "--bundle", edit_bundle))
    assert_says(message, "2 images were given, this bundle takes at most 1; use fewer")


def test_no_bundle_at_all(qie: Qie, refusal: Refusal, qie_home: Path) -> None:
    message = refusal(qie("run", "photo.png", "x"))
    assert_says(message, f"there is no bundle in {qie_home}/bundles; build one with `qie build pocket --gpu cpu`")


@pytest.mark.parametrize(
    "words", [("run", "photo.png", "x", "--steps", "abc"), ("run", "photo.png", "x", "--num-images", "0"),
              ("run", "photo.png", "x", "--frobnicate"), ("frobnicate",), ("build", "a", "b")],
    ids=" ".join,
)  # fmt: skip
def test_words_that_no_command_knows(qie: Qie, words: tuple[str, ...]) -> None:
    done = qie(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: ") and "Error: " in done.stderr and "Traceback" not in done.stderr


def test_a_disk_that_is_full_when_the_image_is_written(process: Qie, refusal: Refusal, bundle: Path) -> None:
    full = ("bash", "-c", 'ulimit -f 1; exec "$@"', "bash")
    done = process("run", "photo.png", "x", *RUN, "-o", "out.png", "--bundle", bundle, before=full)
    assert_says(refusal(done), "out.png cannot be written .*; choose another path")
    assert not Path("out.png").exists()


def test_a_home_that_cannot_be_written(
    qie: Qie, workplace: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that an edit needs is lost with the cache."""
    monkeypatch.setenv("QIE_HOME", str(workplace / "photo.png" / "home"))
    assert qie("run", "photo.png", "x", "--steps", "3", "-o", "out.png", "--bundle", bundle).returncode == 0


def test_a_larger_model_than_the_memory(qie: Qie, refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qie.engines.editing.editor.open_bundle", fail)
    assert_says(
        refusal(qie("run", "photo.png", "x", "--bundle", "x")),
        "too little memory; close other programs or use a smaller model",
    )


def test_the_smallest_of_everything_is_not_refused(qie: Qie, workplace: Path) -> None:
    """The counterpart of this file: limits are limits, not a step before them."""
    small = replace(TINY, num_layers=1, text_layers=1, vision_depth=1, vision_fullatt_block_indexes=())
    write_checkpoint(workplace / "small", small)
    assert qie("build", "small").returncode == 0
    Image.new("L", (1, 1)).save("dot.png")
    done = qie("run", "dot.png", "x", "--steps", "1", "--size", "32x32", "--seed", "0", "-o", "out.webp")
    assert done.returncode == 0, done.stderr
