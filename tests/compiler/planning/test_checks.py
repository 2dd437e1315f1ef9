"""Checks before a build: room for a download, and the reason why a component has no builder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qie.compiler.backends import BUILDERS
from qie.compiler.planning import checks
from qie.compiler.planning.checks import check_download, missing_builder
from qie.compiler.planning.plan import Plan
from qie.engines.errors import BuildError
from tests.support.bundles import planned

FREE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """A checkpoint of the Hub whose weights are still missing."""

    path: Path
    name: str = "org/model"
    missing: int | None = 0

    def missing_bytes(self) -> int | None:
        return self.missing


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A folder on the disk ``device``."""

    device: int

    def stat(self) -> Any:
        return SimpleNamespace(st_dev=self.device)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``check_download`` with 1000 bytes free on the cache's disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=FREE))

    def check(missing: int | None, output: int, *, same_disk: bool = True) -> None:
        cache, destination = tmp_path / "cache", tmp_path / "out"
        disks = {cache: Folder(device=1), destination: Folder(device=1 if same_disk else 2)}
        monkeypatch.setattr(checks, "existing", disks.__getitem__)
        checkpoint: Any = Download(path=cache, missing=missing)
        check_download(checkpoint, destination=destination, output_bytes=output)

    return check


@pytest.mark.parametrize("missing", [0, None])
def test_nothing_to_download_needs_no_room(check: Callable[..., None], missing: int | None) -> None:
    check(missing, FREE + 1)


def test_a_download_and_an_output_share_a_disk(check: Callable[..., None]) -> None:
    check(FREE - 300, 300)
    with pytest.raises(BuildError, match=r"org/model has 701 bytes of weights to download, 1,001 bytes are needed on"):
        check(FREE - 299, 300)


def test_an_output_on_another_disk_does_not_count(check: Callable[..., None]) -> None:
    check(FREE, 300, same_disk=False)
    with pytest.raises(BuildError, match=r"1,001 bytes are needed .* and 1,000 are free there; free some space or"):
        check(FREE + 1, 0, same_disk=False)


def unbuildable(plan: Plan, *backends: str) -> Plan:
    """``plan`` with a transformer that none of ``backends`` can build here."""
    components = tuple(replace(p, backend=None, finish=None) for p in plan.components)
    recipe = replace(plan.recipe, backends=backends)
    return replace(plan, components=components, recipe=recipe, recipe_name="mine")


@pytest.fixture
def plan(checkpoint: Path, tmp_path: Path) -> Plan:
    return planned(checkpoint, tmp_path / "out")


def test_a_component_with_a_backend_lacks_no_builder(plan: Plan) -> None:
    assert missing_builder(plan, "transformer") is None


def test_the_reason_names_every_backend(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder's message becomes part of a sentence, so its semicolon becomes a comma."""
    for name, reason in (("tensorrt", "no GPU; add one"), ("tensorrt-rtx", "not installed; install it")):
        monkeypatch.setitem(BUILDERS, name, SimpleNamespace(unavailable=lambda recipe, device, reason=reason: reason))
    assert missing_builder(unbuildable(plan, "tensorrt", "tensorrt-rtx"), "transformer") == (
        "the recipe mine builds transformer for tensorrt or tensorrt-rtx: "
        "no GPU, add one, and not installed, install it"
    )


def test_a_backend_without_a_builder_names_those_that_exist(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(BUILDERS, "tensorrt")
    reason = missing_builder(unbuildable(plan, "tensorrt"), "vision")
    assert reason == f"the recipe mine builds vision for tensorrt: this qie builds for {', '.join(BUILDERS)}"
