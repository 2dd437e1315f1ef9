"""``qie export``, and what the published model costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qie.compiler.synthetic.architecture import ARCHITECTURES
from qie.compiler.synthetic.checkpoint import write_checkpoint
from qie.engines.bundle.manifest import COMPONENTS
from tests.support.command_line import Qie


def test_export(qie: Qie, workplace: Path, checkpoint: Path) -> None:
    done = qie("export", checkpoint)
    assert done.stdout.splitlines() == [f"graphs/{component}.onnx" for component in COMPONENTS]
    assert all(Path(line).is_file() for line in done.stdout.splitlines())
    bare = json.loads(qie("export", checkpoint, "-o", "bare", "--no-weights", "--json").stdout)
    assert bare == {"files": [f"bare/{component}.onnx" for component in COMPONENTS]}
    assert sorted(path.name for path in Path("bare").iterdir()) == sorted(f"{name}.onnx" for name in COMPONENTS)


@pytest.mark.parametrize("words", [("build", "--dry-run"), ("export", "--no-weights")], ids=["build", "export"])
def test_the_published_model_costs_seconds_and_little_memory(
    words: tuple[str, str], workplace: Path, qie_home: Path
) -> None:
    """Under 800 MB, with the transformer's graph and those of its parts; the limit of 300 seconds is no measurement."""
    folder = write_checkpoint(workplace / "2511", ARCHITECTURES["qwen-image-edit-2511"], weights=False)
    peak = "re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]"
    script = (
        "import re, sys; from pathlib import Path; from qie.compiler.cli.main import main\n"
        f"try: main()\nfinally: print({peak}, file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, words[0], str(folder), "--gpu", "l40s", words[1], "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr) * 1024 < 800e6
    if words[0] == "build":
        plan = json.loads(done.stdout)
        counts = {part["component"]: part["parameters"] for part in plan["components"]}
        assert round(counts["transformer"] / 1e9, 2) == 13.51
        assert 7.0e9 < counts["language"] < 7.1e9
        assert (plan["modulation"], plan["modulation_bytes"]) == ("tables", 0)
    else:
        assert sum(path.stat().st_size for path in Path("graphs").iterdir()) < 20e6
