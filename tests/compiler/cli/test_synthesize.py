"""`qie synthesize`: what it states and writes, and the sentence of every refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from qie.compiler.synthetic import synthesize as folders

Qie = Callable[..., CompletedProcess[str]]
Refusal = Callable[[CompletedProcess[str]], str]


def test_disk_use_is_stated_before_the_folder_is_written(qie: Qie, tmp_path: Path) -> None:
    done = qie("synthesize", "tiny", "--out", tmp_path / "out", "--layers", "1")
    assert done.returncode == 0, done.stderr
    sizes, disk, written = done.stdout.splitlines()
    assert sizes.startswith("tiny: 1 transformer block, 2 language layers, bfloat16, seed 0: 3 shards, ")
    assert disk.startswith("needs 2.") and disk.endswith(" are free")
    assert written == f"{tmp_path / 'out'}: written; build with: qie build {tmp_path / 'out'} --gpu cpu"
    assert json.loads((tmp_path / "out/transformer/config.json").read_text())["num_layers"] == 1


def test_a_checkpoint_on_demand_is_planned_like_a_whole_one(qie: Qie, tmp_path: Path) -> None:
    done = qie("synthesize", "tiny", "-o", tmp_path / "tiny", "--on-demand", "--seed", "3")
    assert done.stdout.endswith(f"written; build with: qie build {tmp_path / 'tiny'} --gpu cpu --stream\n")
    assert not list((tmp_path / "tiny").rglob("*.safetensors"))
    assert json.loads((tmp_path / "tiny/synthetic.json").read_text())["seed"] == 3
    planned = qie("plan", tmp_path / "tiny", "--gpu", "cpu")
    assert planned.returncode == 0, planned.stderr


def test_json_says_the_same(qie: Qie, tmp_path: Path) -> None:
    done = qie("synthesize", "2511", "--out", tmp_path / "out", "--on-demand", "--dry-run", "--json")
    facts = json.loads(done.stdout)
    assert (facts["written"], facts["on_demand"], len(facts["shards"])) == (False, True, 10)
    assert sum(facts["shards"].values()) > 57 * 10**9 and facts["disk_bytes"] < 10**6
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("2512",), "unknown model '2512', expected one of 2511, 2509, edit, tiny"),
        (
            ("tiny", "--layers", "0"),
            "the transformer has 0 layers, expected 1 to 1000; choose another number (--layers)",
        ),
        (
            ("tiny", "--language-layers", "1001"),
            "the language model has 1001 layers, expected 1 to 1000; choose another number (--language-layers)",
        ),
    ],
)
def test_bad_input_is_refused(words: tuple[str, ...], said: str, qie: Qie, refusal: Refusal, tmp_path: Path) -> None:
    assert refusal(qie("synthesize", *words, "--out", tmp_path / "out")).startswith(said)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept(qie: Qie, refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    said = refusal(qie("synthesize", "tiny", "--out", tmp_path))
    assert said == f"{tmp_path} exists and is not an empty folder; delete it or choose another one (--out)"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_too_small_a_disk_is_refused(
    qie: Qie, refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = folders.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    said = refusal(qie("synthesize", "2511", "--out", tmp_path / "out"))
    assert said.startswith("the checkpoint needs 57,") and "1,000,000,000 free; free some space" in said
    assert not list(tmp_path.iterdir())
