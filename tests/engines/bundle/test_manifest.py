"""The manifest: what is written is read back, and a manifest that is not of this schema to the last key is refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qie.engines.bundle.manifest import COMPONENTS, SCHEMA, Manifest, TensorSpec
from qie.engines.bundle.sealed import read_manifest, seal, write_manifest
from qie.engines.errors import BundleError

AGAIN = "build the bundle again with `qie build`"


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return read_manifest(bundle)


def plain(bundle: Path) -> dict[str, Any]:
    data = dict(json.loads((bundle / "manifest.json").read_text(encoding="utf-8")))
    del data["digest"]
    return data


def write(folder: Path, data: Any) -> Path:
    text = data if isinstance(data, str) else json.dumps(seal(data) if isinstance(data, dict) else data)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
    return folder


def test_there_and_back(manifest: Manifest, tmp_path: Path) -> None:
    written = replace(manifest, model=replace(manifest.model, name="modèle 模型", revision="abc"))
    write_manifest(written, tmp_path)
    assert read_manifest(tmp_path) == written
    assert "模型" in (tmp_path / "manifest.json").read_text(encoding="utf-8")


def test_the_manifest_of_a_build_names_every_file_once(manifest: Manifest, bundle: Path) -> None:
    listed = [record.path for record in manifest.files()]
    present = [str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()]
    assert sorted([*listed, "manifest.json"]) == sorted(present)
    assert [engine.component for engine in manifest.engines] == list(COMPONENTS)
    assert manifest.schema == SCHEMA


def test_files_that_two_engines_share_are_listed_once(manifest: Manifest) -> None:
    doubled = replace(manifest, engines=manifest.engines * 2)
    assert doubled.files() == manifest.files()


def test_shapes_of_tensors() -> None:
    spec = TensorSpec(name="latents", dtype="float32", dims=("batch", "noise_tokens", 64))
    assert spec.shape({"batch": 2, "noise_tokens": 60, "other": 1}) == (2, 60, 64)
    with pytest.raises(KeyError, match="noise_tokens"):
        spec.shape({"batch": 2})


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="has no manifest.json and is not a bundle; choose one of `qie list`"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "no JSON", '{"schema": 1,}', "\udcff"])
def test_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=f"manifest.json cannot be read .*; {AGAIN}"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("schema", [0, 1, 2, "3", 5, None, [3], {}])
def test_another_schema(bundle: Path, tmp_path: Path, schema: Any) -> None:
    with pytest.raises(BundleError, match=f"has schema .*, expected 3 or {SCHEMA}; {AGAIN}"):
        read_manifest(write(tmp_path, plain(bundle) | {"schema": schema}))


def test_the_schema_before_is_read_and_written_as_this_one(manifest: Manifest, bundle: Path, tmp_path: Path) -> None:
    old = plain(bundle) | {"schema": 3}
    del old["added"], old["model"]["modulation"]["digest"]
    read = read_manifest(write(tmp_path, old))
    modulation = replace(manifest.model.modulation, digest=None)
    assert read == replace(manifest, schema=3, model=replace(manifest.model, modulation=modulation))
    write_manifest(read, tmp_path)
    assert read_manifest(tmp_path) == replace(read, schema=SCHEMA)


@pytest.mark.parametrize("data", [[], "x", 1, None, {}])
def test_json_of_something_else(tmp_path: Path, data: Any) -> None:
    with pytest.raises(BundleError, match=f"has schema None, expected 3 or {SCHEMA}; {AGAIN}"):
        read_manifest(write(tmp_path, json.dumps(data)))


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value; of lists the first item's alone."""
    items = data.items() if isinstance(data, dict) else enumerate(data[:1]) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


def test_every_object_refuses_unknown_keys_and_every_value_another_type(bundle: Path, tmp_path: Path) -> None:
    original = plain(bundle)
    objects = values = 0
    for path in [(), *places(original)]:
        if isinstance(at(original, path), dict):
            data = plain(bundle)
            at(data, path)["color"] = "red"
            with pytest.raises(BundleError, match=f"unknown key 'color'; {AGAIN}"):
                read_manifest(write(tmp_path, data))
            objects += 1
        if path and path != ("schema",):
            data = plain(bundle)
            at(data, path[:-1])[path[-1]] = {"color": "red"}
            with pytest.raises(BundleError, match=AGAIN):
                read_manifest(write(tmp_path, data))
            values += 1
    assert objects > 15
    assert values > 80


@pytest.mark.parametrize(
    "path",
    [("qie",), ("model",), ("model", "digest"), ("model", "modulation", "tables"), ("loras",), ("limits", "batch_max"),
     ("defaults", "noise"), ("tokenizer", "sha256"), ("engines", 0, "key"), ("engines", 0, "inputs", 0, "dims")],
    ids=str,
)  # fmt: skip
def test_a_missing_key(bundle: Path, tmp_path: Path, path: tuple[Any, ...]) -> None:
    data = plain(bundle)
    del at(data, path[:-1])[path[-1]]
    with pytest.raises(BundleError, match=f"missing key {path[-1]!r}; {AGAIN}"):
        read_manifest(write(tmp_path, data))
