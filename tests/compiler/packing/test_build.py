"""The compiler's one call: what it takes, and that nothing is downloaded for a build that is rejected."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qie.compiler.checkpoint import checkpoint as checkpoints
from qie.compiler.packing.build import build
from qie.compiler.packing.export import export_graphs
from qie.compiler.planning.resolve import plan_build
from qie.engines.bundle.bundle import open_bundle
from qie.engines.errors import BuildError, CheckpointError, QieError, RecipeError
from tests.support.command_line import Qie, Refusal
from tests.support.hub import COMMIT, HUB_ID, FakeHub


@pytest.fixture
def hub(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(checkpoint, tmp_path / "cache", monkeypatch)


def test_a_model_or_its_plan_is_built(checkpoint: Path, qie_home: Path) -> None:
    bundle = build(checkpoint, name="mine")
    assert bundle.path == qie_home / "bundles" / "mine"
    plan = plan_build(checkpoint, name="mine")
    again = build(plan)
    assert again.manifest == bundle.manifest == open_bundle("mine").manifest
    with pytest.raises(AssertionError, match="a plan has decided these arguments"):
        build(plan, name="other")  # type: ignore[call-overload]


def test_the_weights_are_downloaded_after_the_plan(hub: FakeHub, tmp_path: Path) -> None:
    plan = plan_build(HUB_ID, out=tmp_path / "bundle")
    assert hub.calls == [("configs", None)]
    kinds: list[str] = []
    bundle = build(plan, progress=lambda kind, done, total: kinds.append(kind))
    assert [call for call in hub.calls if call[0] != "sizes"] == [("configs", None), ("weights", COMMIT)]
    assert bundle.manifest.model.revision == COMMIT
    assert list(dict.fromkeys(kinds))[:2] == ["download", "digest of the checkpoint"]


SMALL = "[shapes]\nmin_side = 32\nbatch = { max = 64 }\n"
REJECTED: dict[str, tuple[str, type[QieError], str]] = {
    "too large for the GPU": (
        f'extends = "cpu"\nmemory_gib = 0.25\n[limits]\nbuild_workspace_gib = 0.25\n{SMALL}', RecipeError, "not fit"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_nothing_is_downloaded_for_a_build_that_is_rejected(hub: FakeHub, tmp_path: Path, name: str) -> None:
    text, kind, expected = REJECTED[name]
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(kind, match=expected):
        build(HUB_ID, gpu=tmp_path / "mine.toml", out=tmp_path / "bundle")
    assert hub.calls == [("configs", None)]
    assert not (tmp_path / "bundle").exists()


def test_nothing_is_downloaded_to_a_folder_that_is_not_a_bundle(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("three years of work")
    with pytest.raises(BuildError, match="is not a qie bundle"):
        build(HUB_ID, out=tmp_path / "thesis")
    with pytest.raises(BuildError, match="not exported graphs"):
        export_graphs(plan_build(HUB_ID, out=tmp_path / "thesis"), weights=True)
    assert {kind for kind, _ in hub.calls} == {"configs"}


@pytest.mark.parametrize("command", ["build", "export"])
def test_a_download_that_does_not_fit_is_not_started(
    hub: FakeHub, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cache and destination share a disk: it must hold both."""
    plan = plan_build(HUB_ID, out=tmp_path / "out")
    missing = plan.checkpoint.missing_bytes()
    assert missing is not None
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=plan.disk_bytes + missing // 2))
    carry_out: Callable[..., Any] = build if command == "build" else lambda plan: export_graphs(plan, weights=True)
    with pytest.raises(
        BuildError, match=rf"owner/name has {missing:,} bytes of weights to download, .* free some space"
    ):
        carry_out(plan)
    assert {kind for kind, _ in hub.calls} == {"configs", "sizes"}


def test_a_hub_that_does_not_answer(hub: FakeHub, tmp_path: Path) -> None:
    plan = plan_build(HUB_ID, out=tmp_path / "out")
    hub.online = False
    with pytest.raises(CheckpointError, match="cannot be downloaded .the hub does not answer.; check the id"):
        build(plan)


def test_graphs_without_weights_download_none(hub: FakeHub, tmp_path: Path) -> None:
    export_graphs(plan_build(HUB_ID, out=tmp_path / "out"), weights=False)
    assert hub.calls == [("configs", None)]


def test_what_is_to_be_downloaded_is_printed(hub: FakeHub, qie: Qie, refusal: Refusal, workplace: Path) -> None:
    shown = qie("build", HUB_ID, "--dry-run").stdout
    assert "download: " in shown
    assert " free\n" in shown
    hub.online = False
    unknown = qie("build", checkpoints.POCKET, "--dry-run").stdout
    assert "download: " not in unknown


def test_an_unknown_size_is_printed(hub: FakeHub, qie: Qie, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi", fail)
    shown = qie("build", HUB_ID, "--dry-run").stdout
    assert "download: weights of unknown size, since the hub does not answer, to a disk with " in shown


def test_a_destination_with_the_name_of_another_bundle(
    checkpoint: Path, bundle: Path, qie_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative folder is that folder, not the bundle of this name in the home."""
    shutil.copytree(bundle, qie_home / "bundles" / "here")
    monkeypatch.chdir(tmp_path)
    assert build(str(checkpoint), out="here").path == tmp_path / "here"
