"""The parity tests can fail: each of these, broken in a copy of the project, turns the named test red.

``make test`` breaks one of them, ``make test-soak`` all. ``tests/faults/injection`` does the same to `qie validate`.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.soak import spread

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """``old`` becomes ``new`` in ``file``; ``test`` must then fail."""

    file: str
    old: str
    new: str
    test: str


EDIT = "test_edits.py::test_edit[2511-2-4.0]"
TRANSFORMER = "test_components.py::test_transformer[2511-2-0.62]"
VAE = "test_components.py::test_vae[2511-0]"

MUTANTS = {
    "rotary centring": Mutant(
        "engines/inputs/rotary.py", "np.arange(height) - (height - height // 2)", "np.arange(height)", TRANSFORMER
    ),
    "text start index": Mutant(
        "engines/inputs/rotary.py", "max(max(height // 2, width // 2)", "max(max(height, width)", TRANSFORMER
    ),
    "frame index of references": Mutant(
        "engines/inputs/rotary.py", "_image_positions(i, *grid)", "_image_positions(0, *grid)", TRANSFORMER
    ),
    "norm rescale": Mutant(
        "compiler/graphs/transformer.py",
        "op.Mul(guided_BNC, op.Div(norm_BN1, op.Max(guided_norm_BN1, tiny)))",
        "guided_BNC",
        TRANSFORMER,
    ),
    "mu from noise tokens only": Mutant(
        "engines/editing/edit.py", "noise_tokens=settings.size.tokens", "noise_tokens=2 * settings.size.tokens", EDIT
    ),
    "shift_terminal": Mutant("engines/inputs/schedule.py", "if spec.shift_terminal and steps > 1:", "if False:", EDIT),
    "zero_cond_t on the image stream only": Mutant(
        "engines/inputs/modulation.py", 'zero_SD if stream == "references" else conditioning_SD',
        'zero_SD if stream != "noise" else conditioning_SD', TRANSFORMER,
    ),
    "zero_cond_t on reference tokens": Mutant(
        "compiler/graphs/transformer.py", "tokens.of_references(op, x_BTD), reference.shift, reference.gain",
        "tokens.of_references(op, x_BTD), noise.shift, noise.gain", TRANSFORMER,
    ),
    "latent packing order": Mutant(
        "compiler/graphs/vae.py", "op.Reshape(blocks, [0, 0, 0, 4, z_dim])",
        "op.Transpose(op.Reshape(blocks, [0, 0, 0, z_dim, 4]), perm=[0, 1, 2, 4, 3])", VAE,
    ),
    "VAE mean": Mutant(
        "compiler/graphs/vae.py", "op.Sub(cast(op, mode_BCHW, self.dtype, \"float32\"), mean(op, self.config))",
        "cast(op, mode_BCHW, self.dtype, \"float32\")", VAE,
    ),
    "VAE std": Mutant(
        "compiler/graphs/vae.py", "op.Mul(unpack(op, latents_BhwC, self.config.z_dim), std(op, self.config))",
        "unpack(op, latents_BhwC, self.config.z_dim)", VAE,
    ),
    "window attention": Mutant(
        "compiler/graphs/vision.py", "if i in self.config.full_attention_blocks else window_mask_PP", "",
        "test_components.py::test_vision[2511-2]",
    ),
    "mrope sections": Mutant(
        "compiler/graphs/language.py", "np.repeat(np.arange(3), config.mrope_section)",
        "np.repeat(np.arange(3), config.mrope_section[::-1])", "test_components.py::test_language[2511-2-make it red]",
    ),
    "prefix length": Mutant(
        "compiler/graphs/language.py", "[PREFIX_TOKENS], [2**63 - 1], [1]", "[PREFIX_TOKENS - 1], [-1], [1]",
        "test_components.py::test_language[2511-2-make it red]",
    ),
}  # fmt: skip


def run_in_copy(folder: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """pytest over the parity tests of a copy of the project, which is what ``import qie`` finds there."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder / "tests" / "parity", env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("compiler", "engines", "recipes", "src", "tests/support", "tests/parity"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_copy_passes_unbroken(copy: Path) -> None:
    where = "import qie.engines, qie.compiler; print(qie.__file__)"
    imported = subprocess.run(
        [sys.executable, "-c", where],
        env=os.environ | {"PYTHONPATH": str(copy / "src")},
        capture_output=True,
        text=True,
    )
    assert imported.stdout.startswith(str(copy))
    done = run_in_copy(copy, sorted({mutant.test for mutant in MUTANTS.values()}))
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", spread(list(MUTANTS), 1))
def test_breaking_it_turns_a_test_red(copy: Path, name: str) -> None:
    mutant = MUTANTS[name]
    source = copy / mutant.file
    text = source.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    source.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    done = run_in_copy(copy, [mutant.test])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout
