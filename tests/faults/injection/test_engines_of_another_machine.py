"""Bundles for an L40S, which this machine judges by the graphs that their engines were built from."""

from pathlib import Path

import pytest

from qie.compiler.validation.run import Options, validate
from tests.support.bundles import build
from tests.support.faults.code import Change, changed
from tests.support.faults.findings import failures

L40S = """\
extends = "l40s"
backends = ["onnxruntime"]

[components.transformer]
precision = "float32"
"""
"""The recipe of an L40S with the one backend that builds without a GPU, and in a precision that this quantizes in."""

CHANGES = {
    "graph": Change(
        module="compiler.graphs.transformer",
        old="op.Add(latents_BNC, op.Mul(dsigma_B11, rescaled_BNC))",
        new="op.Sub(latents_BNC, op.Mul(dsigma_B11, rescaled_BNC))",
    ),
    "quantized linears": Change(
        module="compiler.quantization.qdq",
        old="names = [name for name in linears(graph) if name not in exclude]",
        new="names = [name for name in linears(graph) if name not in exclude][1:]",
    ),
}


def test_a_sound_bundle_for_an_l40s_passes(tmp_path: Path) -> None:
    report = validate(build("pocket", tmp_path / "l40s", L40S).path, Options(level="trajectory"))
    assert report.verdict == "incomplete"  # what the compiler makes of the graphs is not known here
    assert failures(report) == ""
    (graphs,) = (check for check in report.checks if check.name == "graphs")
    assert graphs.detail == "5 engines were built from the graphs that are run here in their place"


@pytest.mark.parametrize("name", CHANGES)
def test_engines_of_another_graph_are_found_by_their_key(tmp_path: Path, name: str) -> None:
    with changed(CHANGES[name]):
        path = build("pocket", tmp_path / "l40s", L40S).path
    report = validate(path, Options(level="trajectory"))
    assert report.verdict == "failed"
    (graphs,) = (check for check in report.checks if check.name == "graphs")
    assert graphs.result == "failed"
    assert graphs.detail.startswith("transformer was built from another graph")
