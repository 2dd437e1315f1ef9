"""Images that cannot be edited."""

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from tests.support.command_line import Qie, Refusal, assert_says
from tests.support.damage import Break, cut


def png(width: int, height: int) -> bytes:
    """A PNG whose header claims this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_IMAGES: dict[str, tuple[Break, str]] = {
    "missing": (lambda path: path.unlink(), "photo.png does not exist; check the path"),
    "cut short": (cut, "photo.png is a damaged or truncated image .*; use an intact copy"),
    "empty": (lambda path: path.write_bytes(b""), "photo.png is an empty file"),
    "text": (lambda path: path.write_text("Dear diary"), "photo.png is not a PNG, JPEG or WebP image .*; convert it"),
    "huge": (
        lambda path: path.write_bytes(png(50_000, 50_000)),
        r"photo.png has 50,000 x 50,000 pixels, 2,500 megapixels, .*; make it smaller",
    ),
    "thin": (lambda path: Image.new("RGB", (5000, 10)).save(path), "5,000 x 10 pixels.*; crop it"),
    "a folder": (lambda path: [path.unlink(), path.mkdir()], "photo.png is a folder; give an image file"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_image(qie: Qie, refusal: Refusal, workplace: Path, bundle: Path, name: str) -> None:
    break_it, expected = BAD_IMAGES[name]
    break_it(workplace / "photo.png")
    message = refusal(qie("run", "photo.png", "make it red", "--bundle", bundle))
    assert_says(message, expected)


def test_image_in_a_process_of_its_own(process: Qie, refusal: Refusal, workplace: Path, bundle: Path) -> None:
    cut(workplace / "photo.png")
    done = process("run", "photo.png", "make it red", "--bundle", bundle)
    assert_says(refusal(done), "truncated")
    assert done.stdout == ""


def test_one_bad_image_among_good_ones(qie: Qie, refusal: Refusal, workplace: Path, bundle: Path) -> None:
    (workplace / "bad.png").write_text("no image")
    assert_says(refusal(qie("run", "photo.png", "bad.png", "x", "--bundle", bundle)), "bad.png is not a PNG")
