"""image.py: what it accepts and refuses, and what it writes."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from qie.engines.errors import ImageError
from qie.engines.inputs import image as image_module
from qie.engines.inputs.image import MAX_PIXELS, load_image, save_image
from tests.support.images import noise_image

RNG_PIXELS = np.asarray(noise_image(20, 24))


def png(width, height, depth, color_type, rows, *chunks):
    """A PNG file of any depth; rows are the bytes of each row, chunks stand before the pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    extra = b"".join(chunk(*pair) for pair in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def load(tmp_path, data, name="image.bin"):
    path = tmp_path / name
    path.write_bytes(data)
    return load_image(path)


def stored(image, format_name, **options):
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo"])
@pytest.mark.parametrize(("format_name", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {})])
def test_formats_are_told_apart_by_content(tmp_path, name, format_name, options):
    loaded = load(tmp_path, stored(Image.fromarray(RNG_PIXELS), format_name, **options), name)
    assert loaded.notes == ()
    assert loaded.image.mode == "RGB"
    assert loaded.image.size == (20, 24)
    if format_name != "JPEG":
        np.testing.assert_array_equal(np.asarray(loaded.image), RNG_PIXELS)


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, format_name, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the bright quarter is at the top left
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    turned = Image.fromarray(upright)
    if orientation in undo:
        turned = turned.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load(tmp_path, stored(turned, format_name, exif=exif))
    assert loaded.notes == (("EXIF orientation applied",) if orientation > 1 else ())
    assert loaded.image.size == (32, 16)
    np.testing.assert_allclose(np.asarray(loaded.image).astype(int), upright, atol=40)


def test_an_orientation_that_does_not_exist_changes_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    loaded = load(tmp_path, stored(Image.fromarray(RNG_PIXELS), "PNG", exif=exif))
    assert loaded.notes == ()
    np.testing.assert_array_equal(np.asarray(loaded.image), RNG_PIXELS)


@pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_flattened_onto_white(tmp_path, format_name, mode):
    source = Image.fromarray(RNG_PIXELS).convert(mode)
    source.putalpha(Image.fromarray(np.tile(np.arange(20, dtype=np.uint8) * 13, (24, 1))))
    options = {"lossless": True, "exact": True} if format_name == "WEBP" else {}
    loaded = load(tmp_path, stored(source, format_name, **options))
    assert "alpha channel flattened onto white" in loaded.notes
    rgba = np.asarray(source.convert("RGBA")).astype(float)
    weight = rgba[..., 3:] / 255
    np.testing.assert_allclose(np.asarray(loaded.image), rgba[..., :3] * weight + 255 * (1 - weight), atol=1)


def test_an_opaque_alpha_channel_is_no_news(tmp_path):
    loaded = load(tmp_path, stored(Image.fromarray(RNG_PIXELS).convert("RGBA"), "PNG"))
    assert loaded.notes == ()
    np.testing.assert_array_equal(np.asarray(loaded.image), RNG_PIXELS)


def test_palette_with_and_without_transparency(tmp_path):
    source = Image.fromarray(RNG_PIXELS).quantize(8)
    expected = np.asarray(source.convert("RGB"))
    plain = load(tmp_path, stored(source, "PNG"))
    assert plain.notes == ()
    np.testing.assert_array_equal(np.asarray(plain.image), expected)
    for transparency in (3, bytes([255, 255, 255, 0])):
        keyed = load(tmp_path, stored(source, "PNG", transparency=transparency))
        assert keyed.notes == ("alpha channel flattened onto white",)
        white = np.where((np.asarray(source) == 3)[..., None], 255, expected)
        np.testing.assert_array_equal(np.asarray(keyed.image), white)


def test_color_key_of_an_rgb_image(tmp_path):
    key = (b"tRNS", struct.pack(">HHH", *RNG_PIXELS[0, 0]))
    loaded = load(tmp_path, png(20, 24, 8, 2, [row.tobytes() for row in RNG_PIXELS], key))
    assert loaded.notes == ("alpha channel flattened onto white",)
    assert loaded.image.getpixel((0, 0)) == (255, 255, 255)
    np.testing.assert_array_equal(np.asarray(loaded.image)[1], RNG_PIXELS[1])


@pytest.mark.parametrize("mode", ["L", "1"])
@pytest.mark.parametrize("format_name", ["PNG", "JPEG"])
def test_grayscale_is_expanded(tmp_path, mode, format_name):
    if (mode, format_name) == ("1", "JPEG"):
        mode = "L"
    source = Image.fromarray(RNG_PIXELS).convert(mode)
    loaded = load(tmp_path, stored(source, format_name))
    assert loaded.notes == ("grayscale expanded to RGB",)
    pixels = np.asarray(loaded.image)
    assert (pixels == pixels[..., :1]).all()
    if format_name == "PNG":
        np.testing.assert_array_equal(pixels[..., 0], np.asarray(source.convert("L")))


@pytest.mark.parametrize(("color_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_reduced_to_eight(tmp_path, color_type, channels):
    pixels = np.random.default_rng(1).integers(0, 65536, (6, 5, channels), dtype=np.uint16)
    if channels in (2, 4):
        pixels[..., -1] = 65535
    loaded = load(tmp_path, png(5, 6, 16, color_type, [row.astype(">u2").tobytes() for row in pixels]))
    assert loaded.notes[0] == "16-bit reduced to 8-bit"
    expected = np.broadcast_to(pixels[..., : 3 if channels > 2 else 1] >> 8, (6, 5, 3))
    np.testing.assert_array_equal(np.asarray(loaded.image), expected)


def test_sixteen_bit_gray_is_turned_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.arange(30, dtype=np.uint16).reshape(5, 6) * 1000
    loaded = load(tmp_path, stored(Image.fromarray(pixels), "PNG", exif=exif))
    assert loaded.notes == ("16-bit reduced to 8-bit", "EXIF orientation applied", "grayscale expanded to RGB")
    np.testing.assert_array_equal(np.asarray(loaded.image)[..., 0], pixels[::-1, ::-1] >> 8)


def test_cmyk_is_converted(tmp_path):
    source = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    loaded = load(tmp_path, stored(source, "JPEG"))
    assert loaded.notes == ("CMYK converted to RGB",)
    np.testing.assert_allclose(loaded.image.getpixel((8, 8)), (255, 0, 0), atol=3)


@pytest.mark.parametrize("format_name", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_used(tmp_path, format_name):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format_name == "WEBP" else {}
    loaded = load(tmp_path, stored(frames[0], format_name, save_all=True, append_images=frames[1:], **options))
    assert loaded.notes == ("first of 3 frames used",)
    assert loaded.image.getpixel((8, 8)) == (255, 0, 0)


def swapped_profile():
    """An RGB profile that is sRGB with its red and green primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    entries = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "JPEG"])
def test_a_profile_is_converted_to_srgb(tmp_path, format_name):
    options = {"lossless": True} if format_name == "WEBP" else {}
    source = Image.new("RGB", (16, 16), (200, 30, 60))
    loaded = load(tmp_path, stored(source, format_name, icc_profile=swapped_profile(), **options))
    assert loaded.notes == ("ICC profile converted to sRGB",)
    np.testing.assert_allclose(loaded.image.getpixel((8, 8)), (30, 200, 60), atol=4)


def test_colors_are_converted_before_alpha_is_flattened(tmp_path):
    source = Image.new("RGBA", (16, 16), (255, 0, 0, 128))
    loaded = load(tmp_path, stored(source, "PNG", icc_profile=swapped_profile()))
    assert loaded.notes == ("ICC profile converted to sRGB", "alpha channel flattened onto white")
    np.testing.assert_allclose(loaded.image.getpixel((8, 8)), (127, 255, 127), atol=2)


def test_an_srgb_profile_changes_nothing(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    loaded = load(tmp_path, stored(Image.fromarray(RNG_PIXELS), "PNG", icc_profile=profile))
    assert loaded.notes == ()
    np.testing.assert_array_equal(np.asarray(loaded.image), RNG_PIXELS)


@pytest.mark.parametrize("profile", [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()])
def test_an_unusable_profile_is_ignored_and_said(tmp_path, profile):
    loaded = load(tmp_path, stored(Image.fromarray(RNG_PIXELS), "PNG", icc_profile=profile))
    assert loaded.notes == ("unusable ICC profile ignored, colors taken as sRGB",)
    np.testing.assert_array_equal(np.asarray(loaded.image), RNG_PIXELS)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ImageError, match="is no name of a file .*; check it"):
        load_image(tmp_path / "a.png\0")
    with pytest.raises(ImageError, match="does not exist; check the path"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder; give an image file"):
        load_image(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(stored(Image.fromarray(RNG_PIXELS), "PNG"))
    path.chmod(0)
    with pytest.raises(ImageError, match="permissions"):
        load_image(path)


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(ImageError, match="empty file"):
        load(tmp_path, b"")


@pytest.mark.parametrize("data", [b"just a note\n", stored(Image.fromarray(RNG_PIXELS), "GIF"), b"\x89PN", b"RIFF"])
def test_other_content_is_refused_whatever_its_name(tmp_path, data):
    with pytest.raises(ImageError, match="not a PNG, JPEG or WebP image"):
        load(tmp_path, data, "note.png")


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_image_is_refused(tmp_path, format_name, keep):
    data = stored(noise_image(64, 48), format_name)
    with pytest.raises(ImageError, match="damaged or truncated"):
        load(tmp_path, data[: int(len(data) * keep)])


def test_a_damaged_png_is_refused(tmp_path):
    data = bytearray(stored(noise_image(64, 48), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(ImageError, match="damaged or truncated"):
        load(tmp_path, bytes(data))


def test_a_huge_header_is_refused_before_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(image_module.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"50,000 x 50,000 pixels, 2,500 megapixels, expected at most 179"):
        load(tmp_path, png(50_000, 50_000, 8, 2, []))


def test_a_huge_webp_header_is_refused(tmp_path):
    width_height = struct.pack("<I", 16383 - 1)[:3] * 2
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + width_height
    with pytest.raises(ImageError, match=r"large|damaged"):
        load(tmp_path, b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended)


def test_the_limit_is_pillows_and_below_it_is_no_warning(tmp_path, monkeypatch):
    assert 2 * Image.MAX_IMAGE_PIXELS in (MAX_PIXELS, MAX_PIXELS + 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 20 x 24 lies between once and twice that
    load(tmp_path, stored(Image.fromarray(RNG_PIXELS), "PNG"))


def test_too_narrow_an_image_is_refused(tmp_path):
    load(tmp_path, stored(Image.new("RGB", (200, 1)), "PNG"))
    for size in ((201, 1), (1, 201)):
        with pytest.raises(ImageError, match="200 times"):
            load(tmp_path, stored(Image.new("RGB", size), "PNG"))


@pytest.mark.parametrize("name", ["out.png", "out.PNG", "out.jpg", "out.jpeg", "out.webp"])
def test_a_saved_image_has_the_format_of_its_suffix(tmp_path, name):
    smooth = np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)
    path = tmp_path / name
    path.write_text("old")
    save_image(Image.fromarray(smooth), path)
    with Image.open(path) as reopened:
        assert reopened.format == {"png": "PNG", "webp": "WEBP"}.get(path.suffix[1:].lower(), "JPEG")
        np.testing.assert_allclose(np.asarray(reopened).astype(int), smooth, atol=0 if reopened.format == "PNG" else 12)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["out", "out.gif", "out.png.txt"])
def test_other_suffixes_are_refused_with_the_list(tmp_path, name):
    with pytest.raises(ImageError, match=r"\.png, \.jpg, \.jpeg, \.webp"):
        save_image(Image.fromarray(RNG_PIXELS), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ImageError, match="there is no folder"):
        save_image(Image.fromarray(RNG_PIXELS), tmp_path / "none" / "out.png")


def test_a_folder_in_the_way_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "out.png").mkdir()
    with pytest.raises(ImageError, match="cannot be written"):
        save_image(Image.fromarray(RNG_PIXELS), tmp_path / "out.png")
    assert os.listdir(tmp_path) == ["out.png"]


@pytest.mark.parametrize(
    ("error", "expected"), [(OSError(28, "No space left"), ImageError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, error, expected):
    def save(self, path, **options):
        path.write_bytes(b"half")
        raise error

    path = tmp_path / "out.png"
    path.write_text("old")
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(expected):
        save_image(Image.fromarray(RNG_PIXELS), path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["out.png"]


def test_paths_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image(Image.fromarray(RNG_PIXELS), Path("out.png"))
    np.testing.assert_array_equal(np.asarray(load_image(Path("out.png")).image), RNG_PIXELS)
