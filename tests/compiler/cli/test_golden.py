"""``qie golden`` says what it wrote, and refuses in one sentence."""

import json
import re
import sys
from pathlib import Path

import pytest

from qie.compiler.validation.golden.file import open_golden
from tests.support.command_line import Qie, Refusal

CASES = '[[cases]]\nname = "a"\nimages = ["photo.png"]\ninstruction = "make it red"\nsteps = 2\nguidance = 1.0\n'


@pytest.fixture
def cases(workplace: Path) -> str:
    (workplace / "cases.toml").write_text(CASES)
    return "cases.toml"


def test_it_writes_a_golden_file(qie: Qie, checkpoint: Path, cases: str) -> None:
    pytest.importorskip("torch")
    done = qie("golden", checkpoint, "-o", "tiny.golden", "--cases", cases)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    golden = open_golden(Path("tiny.golden"))
    modules = sum(len(samples) for samples in golden.modules.values())
    assert done.stdout.startswith(f"tiny.golden: 1 cases, 2 steps, {modules} modules, ")
    assert [case.record.name for case in golden.cases] == ["a"]

    done = qie("golden", checkpoint, "-o", "tiny.golden", "--cases", cases, "--dtype", "bfloat16", "--json")
    assert json.loads(done.stdout) == {
        "golden": "tiny.golden",
        "bytes": Path("tiny.golden").stat().st_size,
        "model": "tiny",
        "digest": golden.record.digest,
        "dtype": "bfloat16",
        "cases": ["a"],
        "steps": 2,
        "modules": modules,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cases", "none.toml"), r"none.toml cannot be read .*; name a TOML file of cases \(--cases\)"),
        (("--cases", "photo.png"), r"photo.png is not TOML .* \(--cases\)"),
        (("-o", "photo.png"), r"photo.png is not a golden file and would be lost; choose another file \(--out\)"),
        (("-o", "none/file"), r"none/file cannot be written; choose a file in an existing folder \(--out\)"),
        (("--dtype", "float16"), r"the dtype is 'float16', expected float32 or bfloat16; choose one \(--dtype\)"),
        (("--lora", "none.safetensors"), r"none.safetensors cannot be read"),
        (("--revision", "main"), r"has no revision 'main'; leave the revision out"),
    ],
)
def test_a_refusal_is_one_sentence(
    words: tuple[str, ...], message: str, qie: Qie, refusal: Refusal, checkpoint: Path, workplace: Path
) -> None:
    pytest.importorskip("torch")
    before = sorted(workplace.iterdir())
    sentence = refusal(qie("golden", checkpoint, *words))
    assert re.search(message, sentence), sentence
    assert sorted(workplace.iterdir()) == before


@pytest.mark.parametrize("package", ["torch", "diffusers", "transformers"])
def test_a_missing_package_says_what_to_install(
    package: str, qie: Qie, refusal: Refusal, checkpoint: Path, cases: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, package, None)
    sentence = refusal(qie("golden", checkpoint, "--cases", cases))
    assert sentence.startswith(f"{package} is not installed") and "pip install 'qie[reference]'" in sentence
