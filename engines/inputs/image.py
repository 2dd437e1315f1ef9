"""Image files: read what a person has, write a result."""

import io
import math
import os
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from qie.engines.errors import ImageError
from qie.engines.files import existing, is_link_loop, replacing

__all__ = [
    "MAX_ASPECT",
    "MAX_PIXELS",
    "SourceImage",
    "check_output",
    "decode_image",
    "encode_image",
    "load_image",
    "save_image",
]

MAX_PIXELS = 178_956_970
"""Largest image that is decoded: twice Pillow's MAX_IMAGE_PIXELS, where Pillow itself suspects a decompression bomb."""

LONGEST_PATH = 4000
"""Bytes of a path, less than Linux's PATH_MAX by a temporary name."""

_PNG_GRAY, _PNG_RGB = 0, 2
"""Color types of the IHDR chunk."""

REDUCED_PIXELS = 1 << 26
"""Pixels beyond which an image is reduced before its colors are converted: 67 megapixels."""

_REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK")

MAX_PIPE_BYTES = 1 << 28
"""Most that is read from a pipe."""

MAX_ASPECT = 200
"""Longest side over shortest side (transformers image_processing_pil_qwen2_vl.py, ``smart_resize``)."""

_READERS: dict[re.Pattern[bytes], type[ImageFile.ImageFile]] = {
    re.compile(rb"\x89PNG\r\n\x1a\n"): PngImageFile,
    re.compile(rb"\xff\xd8\xff"): JpegImageFile,
    re.compile(rb"RIFF....WEBP", re.DOTALL): WebPImageFile,
}
"""First bytes of a file -> its reader. They are called directly because ``Image.open`` refuses or warns about large
sizes without naming them."""

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, struct.error, zlib.error)
"""What Pillow's readers raise for damaged files."""

_CMS_MODES = {("RGB", "RGB "): "RGB", ("L", "GRAY"): "L", ("L", "RGB "): "RGB", ("CMYK", "CMYK"): "CMYK"}
"""(mode of the image, color space of its profile) -> mode in which the profile describes the image."""

_WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
"""Suffix of a file -> Pillow's name and options of its format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceImage:
    """An image as the pipelines take it.

    Attributes:
        image: mode RGB, 8 bits, sRGB, upright.
        notes: the conversions applied to the file's content, for a person to read.
    """

    image: Image.Image
    notes: tuple[str, ...]


def load_image(path: Path) -> SourceImage:
    """Read a PNG, JPEG or WebP file; the content decides the format, not the suffix.

    The result is the first frame with its EXIF orientation applied, converted to sRGB from its ICC profile, flattened
    onto white and reduced to 8 bits per channel.

    Raises:
        ImageError: the file is missing, empty, a folder, damaged or of another format, has more than ``MAX_PIXELS``
            (checked before anything is decoded), or one side is more than ``MAX_ASPECT`` times the other.
    """
    file = _opened_once(path)
    return _decoded(str(path), file, *_identify(path, file))


def decode_image(content: bytes, name: str, *, pixels_max: int = MAX_PIXELS) -> SourceImage:
    """The image in the bytes of a PNG, JPEG or WebP file, as ``load_image`` reads it.

    Args:
        content: the bytes.
        name: for errors.
        pixels_max: pixels that it may have, at most ``MAX_PIXELS``.

    Raises:
        ImageError: see ``load_image``.
    """
    return _decoded(name, io.BytesIO(content), *_format_of(name, content[:32]), pixels_max=pixels_max)


def _decoded(
    name: str,
    file: Path | io.BytesIO,
    head: bytes,
    reader: type[ImageFile.ImageFile],
    *,
    pixels_max: int = MAX_PIXELS,
) -> SourceImage:
    try:
        with warnings.catch_warnings(action="ignore"), reader(file) as image:
            _check_size(name, *image.size, pixels_max)
            notes = []
            if getattr(image, "is_animated", False):
                notes.append(f"first of {getattr(image, 'n_frames', 'several')} frames used")
            if reader is PngImageFile and head[24] == 16:  # bit depth in the IHDR chunk
                notes.append("16-bit reduced to 8-bit")
            image.load()
            if reader is PngImageFile:
                _scale_transparency(image, depth=head[24], color=head[25])
            whole, reduced = _reduced(image)
            notes += reduced
            if whole.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
                notes.append("EXIF orientation applied")
            rgb, color_notes = _to_rgb(ImageOps.exif_transpose(whole))
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name} is too large to decode ({error}); make it smaller") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"{name} is a damaged or truncated image ({error}); use an intact copy") from error
    return SourceImage(image=rgb, notes=(*notes, *color_notes))


def _opened_once(path: Path) -> Path | io.BytesIO:
    """``path``, or what comes out of it where it is a pipe or a device, which can be read only once."""
    try:
        if not path.exists() or path.is_file() or path.is_dir():
            return path
        with path.open("rb") as file:
            return io.BytesIO(file.read(MAX_PIPE_BYTES))
    except OSError as error:
        raise ImageError(f"{_shortened(path)} cannot be read ({error.strerror}); check its name") from error
    except ValueError as error:
        raise ImageError(f"{_shortened(path)!r} is no name of a file ({error}); check it") from error


def _identify(path: Path, file: Path | io.BytesIO) -> tuple[bytes, type[ImageFile.ImageFile]]:
    """The first bytes of a file and the reader for its content."""
    if path.is_dir():
        raise ImageError(f"{path} is a folder; give an image file")
    try:
        if isinstance(file, io.BytesIO):
            head = file.getvalue()[:32]
        else:
            with file.open("rb") as opened:
                head = opened.read(32)
    except FileNotFoundError as error:
        raise ImageError(f"{path} does not exist; check the path") from error
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise ImageError(f"{_shortened(path)!r} is no name of a file ({error}); check it") from error
    return _format_of(str(path), head)


def _format_of(name: str, head: bytes) -> tuple[bytes, type[ImageFile.ImageFile]]:
    """The first bytes of a file and the reader for its content."""
    if not head:
        raise ImageError(f"{name} is an empty file; give an image")
    for signature, reader in _READERS.items():
        if signature.match(head):
            return head, reader
    raise ImageError(
        f"{name} is not a PNG, JPEG or WebP image (it starts with {head[:8]!r}); convert it to one of these formats"
    )


def _check_size(name: str, width: int, height: int, pixels_max: int) -> None:
    if width * height > pixels_max:
        raise ImageError(
            f"{name} has {width:,} x {height:,} pixels, {width * height / 1e6:,.0f} megapixels, expected at most "
            f"{pixels_max / 1e6:,.0f} megapixels; make it smaller"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{name} has {width:,} x {height:,} pixels, expected a side of at most {MAX_ASPECT} times the other; "
            "crop it"
        )


def _reduced(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """A very large image at a whole fraction of its size, so that what follows takes no gigabytes."""
    factor = math.ceil(math.sqrt(image.width * image.height / REDUCED_PIXELS))
    if factor == 1 or image.mode not in _REDUCIBLE:
        return image, []
    exif, smaller = image.getexif(), image.reduce(factor)
    smaller.info = dict(image.info)
    smaller.getexif().update(exif)
    return smaller, [f"{image.width}x{image.height} reduced to {smaller.width}x{smaller.height}"]


def _scale_transparency(image: Image.Image, *, depth: int, color: int) -> None:
    """Give the transparent color of a PNG (tRNS) the scale of the pixels; Pillow leaves it in that of the file."""
    key = image.info.get("transparency")
    if color == _PNG_GRAY and depth in (2, 4) and isinstance(key, int):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif color == _PNG_RGB and depth == 16 and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Convert any mode that the readers give to sRGB of mode RGB, with notes on what was lost or added."""
    notes = []
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode == "I;16":
        values, key = np.asarray(image), image.info.get("transparency")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if isinstance(key, int):
            alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    color_mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB")
    image = image.convert(color_mode)
    if color_mode != "RGB":
        notes.append("grayscale expanded to RGB" if color_mode == "L" else "CMYK converted to RGB")
    rgb = image.convert("RGB")
    if profile:
        managed = _from_profile(image, profile)
        if managed is None:
            notes.append("unusable ICC profile ignored, colors taken as sRGB")
        elif managed.tobytes() != rgb.tobytes():
            notes.append("ICC profile converted to sRGB")
            rgb = managed
    if alpha is not None and alpha.getextrema() != (255, 255):
        notes.append("alpha channel flattened onto white")
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return rgb, notes


def _from_profile(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The image in sRGB; None where the profile is damaged or is not for images of this mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _CMS_MODES[image.mode, source.profile.xcolor_space]
        return ImageCms.profileToProfile(image.convert(mode), source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, KeyError):
        return None


def check_output(path: Path) -> None:
    """Check that an image can be written to ``path``, before work is spent on it.

    Raises:
        ImageError: the suffix is not .png, .jpg, .jpeg or .webp, the folder is missing or read-only, a file that exists
            is read-only, or the name is too long.
    """
    try:
        longest = min(os.pathconf(existing(path.parent), "PC_NAME_MAX"), 255)
        long = len(os.fsencode(path.name)) > longest or len(os.fsencode(path.absolute())) > LONGEST_PATH
        too_long = long or "\0" in str(path)
    except (OSError, ValueError, UnicodeError):  # a name that no file can have
        too_long = True
    if too_long:
        raise ImageError(f"{_shortened(path)} is too long for a file, or no name of one; choose another", option="out")
    if path.suffix.lower() not in _WRITERS:
        raise ImageError(
            f"{path} has the suffix {path.suffix!r}, which names no image format; use one of {', '.join(_WRITERS)}",
            option="out",
        )
    if not path.parent.is_dir():
        raise ImageError(f"there is no folder {path.parent} for {path.name}; create it or choose another", option="out")
    loop = is_link_loop(path)
    folder = path.parent if loop else path.resolve().parent  # of a link, what it points to is written
    writable = os.access(folder, os.W_OK) and (not path.exists() or (path.is_file() and os.access(path, os.W_OK)))
    if loop or not writable:
        raise ImageError(f"{path} cannot be written (it is no file, or read-only); choose another path", option="out")


def save_image(image: Image.Image, path: Path, *, overwrite: bool = True) -> None:
    """Write an image in the format of the path's suffix: .png, .jpg, .jpeg or .webp.

    The file appears whole or not at all. An existing one is replaced, and a link is followed.

    Raises:
        ImageError: as ``check_output``, or the file cannot be written.
        FileExistsError: the file exists, and ``overwrite`` is false.
    """
    check_output(path)
    format_name, options = _WRITERS[path.suffix.lower()]
    try:
        with replacing(path, overwrite=overwrite) as temporary:
            image.save(temporary, format=format_name, **options)
    except FileExistsError:
        raise
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be written ({error}); choose another path or format", option="out") from error


def encode_image(image: Image.Image, suffix: str, **options: Any) -> bytes:
    """The bytes of the file that ``save_image`` writes for ``suffix``, such as ".png".

    Args:
        image: mode RGB.
        suffix: of the file.
        options: of Pillow's writer, in place of those of ``save_image``.
    """
    format_name, defaults = _WRITERS[suffix]
    file = io.BytesIO()
    image.save(file, format=format_name, **(defaults | options))
    return file.getvalue()


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) < 80 else f"{text[:40]}…{text[-36:]}"
