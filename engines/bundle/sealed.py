"""The manifest of a bundle as a file, sealed with a digest of what it says."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qie.engines.bundle.checks import check_manifest
from qie.engines.bundle.manifest import MANIFEST, SCHEMA, Manifest
from qie.engines.errors import BundleError, first_line
from qie.engines.records import from_plain, to_plain

__all__ = ["parse_manifest", "read_manifest", "seal", "write_manifest"]

_READABLE = (3, SCHEMA)
"""Schemas that are read. Since 4 a manifest has ``added`` and the digest of the modulation, which may have no file."""

_LONGEST = 1 << 26
"""Bytes; the manifest of the published models has less than a thousandth of it."""


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest``, the last file of a bundle that is being built, in place: it is the bundle's lock.

    It gets this version's schema, also where it was read from an older one.
    """
    text = json.dumps(seal(to_plain(replace(manifest, schema=SCHEMA))), indent=1, ensure_ascii=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """The plain data of a manifest with its ``digest``: sha256 of the rest as JSON with sorted keys, without spaces."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {"schema": rest.get("schema"), "digest": hashlib.sha256(canonical.encode()).hexdigest()} | rest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the bundle ``folder``, which is not held.

    Raises:
        BundleError: it is missing or cannot be read; see ``parse_manifest``.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BundleError(f"{folder} has no {MANIFEST} and is not a bundle; choose one of `qie list`") from None
    except OSError as problem:
        raise BundleError(
            f"{path} cannot be read ({problem.strerror}); build the bundle again with `qie build`"
        ) from None
    return parse_manifest(content, path)


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """Parse the content of the manifest at ``path``.

    Raises:
        BundleError: it is not JSON, of another schema, was changed, or a key is wrong.
    """
    try:
        if len(content) > _LONGEST:
            raise ValueError(f"{len(content):,} bytes")
        data = json.loads(content)
        schema = data.get("schema") if isinstance(data, dict) else None
        sealed = schema in _READABLE and seal(data)["digest"] == data.get("digest")
    except (ValueError, RecursionError) as problem:
        raise BundleError(
            f"{path} cannot be read ({first_line(problem)}); build the bundle again with `qie build`"
        ) from None
    if schema not in _READABLE:
        raise BundleError(
            f"{path} has schema {schema!r}, expected {' or '.join(map(str, _READABLE))}; build the bundle again with "
            "`qie build`"
        )
    if not sealed:
        raise BundleError(f"{path} is damaged, its digest is another; build the bundle again with `qie build`")
    del data["digest"]
    try:
        manifest = from_plain(Manifest, data)
        check_manifest(manifest)
        return manifest
    except ValueError as problem:
        raise BundleError(f"{path}: {problem}; build the bundle again with `qie build`") from None
