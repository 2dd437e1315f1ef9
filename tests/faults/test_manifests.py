"""Hostile manifests, sealed as their forger would: each is refused, or an edit with it runs or is refused."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.engines.bundle.bundle import open_bundle
from qie.engines.bundle.checks import TENSORS
from qie.engines.bundle.manifest import COMPONENTS, FileRecord
from qie.engines.bundle.sealed import seal
from qie.engines.bundle.structure import read_structure
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.errors import BundleError, QieError
from tests.support.bundles import in_hub_cache
from tests.support.damage import change_manifest
from tests.support.images import smooth_image
from tests.support.soak import spread

EXTREMES: list[Any] = [0, -1, 1, 7, 2**31, 10**18, 10**400, 1e308, -1e308, 1e-308, 0.5, float("nan"), float("inf"), "",
                       "x" * 300, "\ud800", "../x", "/etc/passwd", "a\0b", None, [], {}, True,
                       [[[]]], "cpu", "8.9"]  # fmt: skip

Place = tuple[str | int, ...]


def leaves(value: Any, place: Place = ()) -> Iterator[Place]:
    """The place of one leaf of every kind: of a list, what is in its first element."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*place, key))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*place, 0))
    else:
        yield place


def changed(data: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(data)
    inner: Any = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return data


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copied"))


def edit(bundle: Path) -> None:
    request = Request(images=[smooth_image(150, 90)], instructions=["make it red"], seeds=[1], steps=1, guidance=1.0,
                      size=(64, 64))  # fmt: skip
    Editor(open_bundle(bundle)).edit(request)


def test_every_leaf_with_every_extreme(copied: Path) -> None:
    path = copied / "manifest.json"
    data = json.loads(path.read_text())
    places = [place for place in leaves(data) if place[0] not in ("digest", "schema")]
    assert len(places) > 80
    refused = edited = 0
    for place, value in spread([(place, value) for place in places for value in EXTREMES], 150):
        path.write_text(json.dumps(seal(changed(data, place, value))))
        try:
            edit(copied)
            edited += 1
        except QieError:
            refused += 1
    assert refused > 4 * edited > 0


DIMS = [
    (number, kind, tensor, dim)
    for number, component in enumerate(COMPONENTS)
    for kind, tensors in zip(("inputs", "outputs"), TENSORS[component], strict=True)
    for tensor, dims in enumerate(tensors.values())
    for dim in range(len(dims))
]


@pytest.mark.parametrize("value", ["unknown", 1, 2, 10**9, "batch"])
def test_every_dim_of_every_tensor(bundle: Path, copied: Path, value: Any) -> None:
    path = copied / "manifest.json"
    data = json.loads(path.read_text())
    for number, kind, tensor, dim in DIMS:
        place = ("engines", number, kind, tensor, "dims", dim)
        if data["engines"][number][kind][tensor]["dims"][dim] == value:
            continue
        path.write_text(json.dumps(seal(changed(data, place, value))))
        with pytest.raises(BundleError):
            open_bundle(copied)


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "a/../../outside", "./x", "", "a//b", "a\0b", "..", "."])
def test_paths_stay_inside(copied: Path, path: str) -> None:
    (copied.parent / "outside").write_text("not the bundle's")
    data = json.loads((copied / "manifest.json").read_text())
    change_manifest(copied, tokenizer=data["tokenizer"] | {"path": path})
    with pytest.raises(BundleError, match=r"is not one inside the bundle; build the bundle again") as problem:
        open_bundle(copied)
    assert "16 bytes" not in str(problem.value)


def test_links_stay_inside(copied: Path) -> None:
    outside = copied.parent / "outside"
    (copied / "tokenizer.json").rename(outside)
    (copied / "tokenizer.json").symlink_to(outside)
    with pytest.raises(BundleError, match=r"lacks tokenizer.json"):
        open_bundle(copied)


def test_a_download_of_the_hub_has_links_to_its_blobs(bundle: Path, tmp_path: Path) -> None:
    edit(in_hub_cache(bundle, tmp_path))


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"schema":' * 100_000, '{"schema": 4, "digest": ' + "9" * 10_000 + "}", "\ufeff{}", "{}{}",
     "\0" * 100, '{"schema": 1e999}', '{"schema": NaN}', '{"schema": "\\ud800"}', "nul"],
    ids=range(10),
)  # fmt: skip
def test_json_that_is_none(copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(BundleError):
        open_bundle(copied)


@pytest.mark.parametrize("value", EXTREMES[:12], ids=range(12))
def test_a_hostile_description_of_an_engine(copied: Path, value: Any) -> None:
    whole = {"layers": [1], "kernels": [], "attention": {"layers": 1, "fused": 1, "types": ["bf16"]},
             "largest_buffer_bytes": 5, "allocations": 0}  # fmt: skip
    data = json.loads((copied / "manifest.json").read_text())
    for place in leaves(whole):
        (copied / "s.json").write_text(json.dumps(changed(whole, place, value)))
        record = {"path": "s.json", "bytes": (copied / "s.json").stat().st_size, "sha256": "0" * 64}
        engine = data["engines"][0] | {"structure": record}
        change_manifest(copied, engines=[engine, *data["engines"][1:]])
        with pytest.raises(BundleError, match="s.json is damaged"):
            open_bundle(copied)
        change_manifest(copied, engines=data["engines"])
        bundle = open_bundle(copied)
        with suppress(BundleError):
            read_structure(bundle, replace(bundle.manifest.engines[0], structure=FileRecord(**record)))
