"""One instruction for many images: through a service, with a record of what is done, so that a later run goes on."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request
from qie.engines.errors import ImageError, QieError
from qie.engines.files import sha256_of
from qie.engines.inputs.image import check_output, load_image, save_image
from qie.engines.serving.service import Service
from qie.engines.serving.submission import Submission

__all__ = ["RECORD", "Outcome", "edit_each", "targets"]

RECORD = "edits.jsonl"
"""Name of the record in the folder of the results: a JSON object a line for every image that was done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of an image.

    Attributes:
        image: its file.
        result: the file of its result.
        seed: of the noise; None where it failed.
        done_before: whether an earlier run has done it.
        problem: why it failed; None where it did not.
        notes: differences from the request, for a person to read.
    """

    image: Path
    result: Path
    seed: int | None = None
    done_before: bool = False
    problem: QieError | None = None
    notes: tuple[str, ...] = ()


def targets(images: Iterable[Path], out: Path) -> dict[Path, Path]:
    """The file of each image's result: in ``out``, named as the image, with a number where two have one name.

    The number depends on the order of ``images`` alone, so that a later run finds the same files.
    """
    taken: set[str] = set()
    found: dict[Path, Path] = {}
    for image in dict.fromkeys(images):
        name, number = f"{image.stem}.png", 2
        while name.lower() in taken:
            name, number = f"{image.stem}-{number}.png", number + 1
        taken.add(name.lower())
        found[image] = out / name
    return found


def edit_each(
    editor: Editor,
    results: Mapping[Path, Path],
    request: Request,
    *,
    on_outcome: Callable[[Outcome], None],
    waiting_max: int = 16,
) -> None:
    """Edit every image of ``results`` by ``request``, whose own images are not looked at.

    An image that cannot be edited does not stop the others. An image is done before where the record has its content,
    with the same request and bundle, and its result is there.

    Args:
        editor: whose engines run; it is closed.
        results: image -> file of its result, in one folder.
        request: one instruction, and one seed for all images, or None for a random one each.
        on_outcome: called with every image, in the order in which they end.
        waiting_max: images that are read ahead.
    """
    (folder,) = {result.parent for result in results.values()}
    record = _Record(folder / RECORD, _key(editor, request))
    waiting: deque[tuple[Path, str, Submission]] = deque()

    def finish() -> None:
        image, digest, submission = waiting.popleft()
        result = results[image]
        try:
            edit = submission.result()
            save_image(edit.images[0], result)
        except QieError as problem:
            return on_outcome(Outcome(image=image, result=result, problem=problem))
        ((_, seed),) = edit.samples
        record.add(result.name, digest, seed)
        return on_outcome(Outcome(image=image, result=result, seed=seed, notes=edit.notes))

    with Service(editor, waiting_max=waiting_max) as service:
        room = max(1, min(waiting_max, 2 * editor.bundle.manifest.limits.batch_max))
        for image, result in results.items():
            try:
                check_output(result)
                digest = _digest(image)
                seed = record.seed(result, digest)
                if seed is not None:
                    on_outcome(Outcome(image=image, result=result, seed=seed, done_before=True))
                    continue
                submission = service.submit(replace(request, images=[load_image(image).image]))
            except QieError as problem:
                on_outcome(Outcome(image=image, result=result, problem=problem))
                continue
            waiting.append((image, digest, submission))
            while len(waiting) >= room:
                finish()
        while waiting:
            finish()


class _Record:
    """The lines of the record with one key."""

    def __init__(self, file: Path, key: str) -> None:
        self._file, self._key = file, key
        self._seeds = {(line["result"], line["image"]): line["seed"] for line in _lines(file) if line.get("key") == key}

    def seed(self, result: Path, digest: str) -> int | None:
        """The seed of a result that is there and was made of this image; None where it was not."""
        return self._seeds.get((result.name, digest)) if result.is_file() else None

    def add(self, result: str, digest: str, seed: int) -> None:
        """Add a line, which is on the disk when this returns."""
        line = json.dumps({"result": result, "image": digest, "seed": seed, "key": self._key})
        with self._file.open("a+b") as file:
            torn = file.tell() > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read() != b"\n"
            file.write(b"\n" * torn + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that are whole; that of a killed run may not be."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and {"result", "image", "seed"} <= values.keys():
            yield values


def _key(editor: Editor, request: Request) -> str:
    """A digest of everything but the image that decides a result."""
    engines = [(engine.component, engine.key) for parts in editor.stages.engines.values() for engine in parts]
    asked = [
        list(request.instructions), list(request.seeds or ()), request.negative, request.steps, request.guidance,
        request.size, request.match_input,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps([engines, asked]).encode()).hexdigest()


def _digest(image: Path) -> str:
    try:
        return sha256_of(image)
    except OSError as problem:
        raise ImageError(f"{image} cannot be read ({problem.strerror}); check its name") from problem
