"""What a plan says about memory on a CPU is at least what a process uses, and not far more."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qie.compiler.planning.estimate import estimate
from qie.compiler.synthetic.checkpoint import ARCHITECTURES, write_checkpoint
from qie.engines.bundle.manifest import Residency
from tests.support.bundles import build, planned

EDIT = """
import json, sys
from pathlib import Path
from PIL import Image
from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
bundle, side, batch, references, guidance = sys.argv[1], *map(int, sys.argv[2:6])
image = Image.effect_noise((side, side), 60).convert("RGB")
editor = Editor(open_bundle(bundle))
for _ in range(1 + (side < 512)):
    editor.edit(Request(images=[image] * references, instructions=["make it red " * 8], seeds=list(range(batch)),
                        steps=4, guidance=float(guidance), negative="blurry " * 8, size=(side, side)))
status = Path("/proc/self/status").read_text()
print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))
"""

BUILD = """
import sys
from pathlib import Path
from qie.compiler.cli.main import main
sys.argv = ["qie", "build", *sys.argv[1:]]
try:
    main()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), file=sys.stderr)
"""

RECIPE = """extends = "cpu"
residency = "{residency}"
[shapes]
aspect_ratios = ["1:1"]
area_scale_max = {scale}
batch = {{ max = {batch} }}
references = {{ max = {references} }}
prompt_tokens = {{ max = {tokens}, opt = {tokens} }}
[[schedules]]
steps = 4
guidance = 1.0
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("demo") / "demo", ARCHITECTURES["demo"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "batch", "references", "guidance", "residency"),
    [
        pytest.param(256, 4, 3, 4, "resident", marks=pytest.mark.soak),
        pytest.param(512, 2, 2, 4, "sequential", marks=pytest.mark.soak),
        (768, 1, 1, 1, "resident"),
    ],
)  # fmt: skip
def test_an_edit_takes_no_more_than_was_planned(
    demo: Path, tmp_path: Path, side: int, batch: int, references: int, guidance: int, residency: Residency
) -> None:
    recipe = RECIPE.format(
        residency=residency, scale=(side / 256) ** 2, batch=batch, references=references, tokens=64 * references + 128
    )
    plan = planned(demo, tmp_path / "bundle", recipe)
    build(demo, tmp_path / "bundle", recipe)
    words = [str(word) for word in (tmp_path / "bundle", side, batch, references, guidance)]
    done = subprocess.run([sys.executable, "-c", EDIT, *words], capture_output=True, text=True, check=True)
    measured, expected = int(done.stdout), estimate(plan).gpu_bytes
    assert measured <= expected <= 2 * measured, f"measured {measured / 1e6:.0f} MB, planned {expected / 1e6:.0f} MB"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "pocket", "demo"])
def test_a_build_takes_no_more_than_was_planned(demo: Path, checkpoint: Path, tmp_path: Path, name: str) -> None:
    source = {"tiny": checkpoint, "demo": demo, "pocket": "pocket"}[name]
    words = [str(source), "--gpu", "cpu", "--out", str(tmp_path / "bundle"), "--json"]
    done = subprocess.run([sys.executable, "-c", BUILD, *words], capture_output=True, text=True, check=True)
    measured = int(done.stderr.split()[-1])
    expected = estimate(planned(source, tmp_path / "x")).host_bytes
    assert measured <= expected, f"measured {measured / 1e6:.0f} MB, planned {expected / 1e6:.0f} MB"
    assert json.loads(done.stdout)["bytes"]


@pytest.mark.parametrize("name", ["tiny", "pocket", "demo"])
def test_a_build_takes_no_more_disk_than_was_planned(demo: Path, checkpoint: Path, tmp_path: Path, name: str) -> None:
    source = {"tiny": checkpoint, "demo": demo, "pocket": "pocket"}[name]
    plan = planned(source, tmp_path / "bundle")
    built = build(source, tmp_path / "bundle")
    written = sum(path.stat().st_size for path in built.path.rglob("*") if path.is_file())
    assert written <= plan.disk_bytes <= 1.2 * written + 2_000_000
