"""The files of a run's results: never over an input, and never over what another run writes at the same time."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from qie.engines.errors import RequestError
from qie.engines.inputs.image import check_output, save_image

__all__ = ["Results"]


class Results:
    """Where each result is saved.

    Attributes:
        paths: file of each result that is saved, by its number.
    """

    def __init__(self, out: Path | None, inputs: Sequence[Path], *, count: int, overwrite: bool) -> None:
        """Check what can be checked before the work.

        Args:
            out: file of the only result, or ``out-1.png``, ``out-2.png`` … for several; None for names after the last
                input that nobody has taken, in the current folder.
            inputs: the files of the images.
            count: of the results.
            overwrite: whether ``out`` may be an input.

        Raises:
            RequestError: a file cannot be written, or it is an input.
        """
        self.paths: dict[int, Path] = {}
        self._stem = f"{inputs[-1].stem}-edited"
        self._free = 1
        self._files = None if out is None else [out]
        if out is not None and count > 1:
            self._files = [out.with_stem(f"{out.stem}-{number}") for number in range(1, count + 1)]
        for file in self._files or [self._name(count)]:
            check_output(file)
            if not overwrite and any(_same(file, path) for path in inputs):
                raise RequestError(
                    f"{file} is one of the images to edit and would be lost; choose another file, or allow it with "
                    "--overwrite",
                    option="out",
                )

    def save(self, number: int, image: Image.Image) -> None:
        """Save the result ``number``.

        Raises:
            ImageError: its file cannot be written.
        """
        if self._files is not None:
            save_image(image, self._files[number])
            self.paths[number] = self._files[number]
            return
        while number not in self.paths:
            path = self._name(self._free)
            self._free += 1
            if path.exists():
                continue
            try:
                save_image(image, path, overwrite=False)
            except FileExistsError:  # another run was faster
                continue
            self.paths[number] = path

    def _name(self, number: int) -> Path:
        return Path(f"{self._stem}.png" if number == 1 else f"{self._stem}-{number}.png")


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False
