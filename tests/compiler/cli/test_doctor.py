"""``qie doctor``."""

import json
import re
from pathlib import Path

from tests.support.command_line import Qie


def test_doctor(qie: Qie, named_bundle: str, qie_home: Path) -> None:
    text = qie("doctor").stdout
    assert re.search(r"^run engines of onnxruntime +yes", text, re.MULTILINE)
    assert re.search(rf"^{named_bundle} +yes$", text, re.MULTILINE)
    report = json.loads(qie("doctor", "--json").stdout)
    assert set(report) >= {"qie", "python", "machine", "home", "free_bytes", "capabilities", "bundles"}
    (cpu,) = [c for c in report["capabilities"] if c["name"] == "run engines of onnxruntime"]
    assert cpu == {"name": cpu["name"], "ready": True, "requirements": cpu["requirements"], "missing": [], "fix": None}
    assert report["home"] == str(qie_home)
    assert report["bundles"] == [{"name": named_bundle, "reason": None}]
