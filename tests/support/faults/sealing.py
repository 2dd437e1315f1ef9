"""Changes of a bundle after which its manifest is right again: digests, sizes and its own seal."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qie.engines.bundle.manifest import MANIFEST
from qie.engines.bundle.sealed import seal
from qie.engines.files import sha256_of

__all__ = ["assign", "changing", "engine_of", "reseal"]

Data = dict[str, Any]


def reseal(bundle: Path, change: Callable[[Data], object] = lambda data: None) -> None:
    """Apply ``change`` to the manifest, then give it the sizes and digests of the files as they are."""
    path = bundle / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    digests: dict[str, str] = {}
    for record in _files(data):
        file = bundle / record["path"]
        digest = digests.setdefault(record["path"], sha256_of(file))
        record |= {"bytes": file.stat().st_size, "sha256": digest}
    path.write_text(json.dumps(seal(data)), encoding="utf-8")


def _files(data: Any) -> Iterator[Data]:
    """The records of files in the plain data of a manifest."""
    if isinstance(data, dict):
        if data.keys() == {"path", "bytes", "sha256"}:
            yield data
        for value in data.values():
            yield from _files(value)
    elif isinstance(data, list):
        for value in data:
            yield from _files(value)


def assign(**values: Any) -> Callable[[Path], None]:
    """Give keys of the manifest another value; dots of a key are written as two underscores."""

    def change(data: Data) -> None:
        for key, value in values.items():
            *outer, last = key.split("__")
            place = data
            for name in outer:
                place = place[name]
            assert place[last] != value, (key, value)
            place[last] = value

    return lambda bundle: reseal(bundle, change)


def changing(component: str, **values: Any) -> Callable[[Path], None]:
    """Give keys of the engine of ``component`` another value."""

    def change(data: Data) -> None:
        engine = engine_of(data, component)
        assert all(engine[key] != value for key, value in values.items())
        engine |= values

    return lambda bundle: reseal(bundle, change)


def engine_of(data: Data, component: str) -> Data:
    """The engine of ``component`` in the plain data of a manifest."""
    (engine,) = (engine for engine in data["engines"] if engine["component"] == component)
    return engine
