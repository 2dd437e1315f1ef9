"""Random bytes of a bundle that are flipped: the level structure finds every one."""

import random
import shutil
from pathlib import Path

from qie.compiler.validation.run import Options, validate
from tests.support.soak import attempts


def test_every_flipped_byte_is_found(pocket_bundle: Path, tmp_path: Path) -> None:
    """Half of the bytes are chosen by the size of the files, half of them equal for every file."""
    bundle = Path(shutil.copytree(pocket_bundle, tmp_path / "copied"))
    generator, count = random.Random(15), attempts(20, 1000)
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    by_size = generator.choices(files, [path.stat().st_size for path in files], k=count // 2)
    found = 0
    for path in [*by_size, *(files[number % len(files)] for number in range(count - count // 2))]:
        place, mask = generator.randrange(path.stat().st_size), generator.randrange(1, 256)
        flip(path, place, mask)
        report = validate(bundle, Options(level="structure"))
        found += report.verdict == "failed" and any(c.name == "files" and c.result == "failed" for c in report.checks)
        flip(path, place, mask)
    assert found == count
    assert validate(bundle, Options(level="structure")).verdict == "passed"


def flip(path: Path, place: int, mask: int) -> None:
    """Flip bits of one byte in place."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ mask]))
