"""A sheet of edits by the pocket model: ``python bench/pocket_sheet.py OUT [--bundle NAME]``.

Every instruction on a held-out photograph (or a scene, where it needs one): nothing is chosen by its looks.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))

from pocket.data.edits import EDITS, instruction_text, random_instruction
from pocket.data.examples import HELD_OUT_PAIRS
from pocket.data.images import SIDE
from pocket.data.scenes import scene
from pocket.judge import views
from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.request import Request

COLUMNS, GAP, CAPTION = 4, 10, 34

ROW = ("tint", "upside down", "invert", "pixelate")
"""The edits that ``--row`` writes: in colour, and of one image of any shape."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="image to write")
    parser.add_argument("--bundle", default="pocket", help="name or folder of a bundle of the pocket model")
    parser.add_argument("--row", type=Path, help=f"image to write {', '.join(ROW)} into, on one line")
    parser.add_argument("--seed", type=int, default=3, help="of noise, colours, shapes and places")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    editor = Editor(open_bundle(options.bundle))
    pictures = views()
    drawn = scene(rng, SIDE, SIDE)
    asked = []
    for number, (name, edit) in enumerate(EDITS.items()):
        picture = drawn if edit.scene else pictures[number % len(pictures)]
        images = [picture.image, pictures[(number + 1) % len(pictures)].image][: edit.images]
        asked.append((images, instruction_text(random_instruction(rng, name))))
    for number, pair in enumerate(HELD_OUT_PAIRS[:5]):
        text = " and ".join(instruction_text(random_instruction(rng, name)) for name in pair)
        asked.append(([pictures[number].image], text))
    cells = [cell(editor, images, text, options.seed) for images, text in asked]
    sheet(cells).save(options.out, quality=90)
    if options.row is not None:
        sheet([cells[list(EDITS).index(name)] for name in ROW]).save(options.row, quality=90)


def sheet(cells: list[Image.Image]) -> Image.Image:
    """Cells of one size in lines of ``COLUMNS``."""
    width, height = cells[0].size
    lines = -(-len(cells) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, lines * (height + GAP) + GAP), "white")
    for place, image in enumerate(cells):
        line, column = divmod(place, COLUMNS)
        page.paste(image, (GAP + column * (width + GAP), GAP + line * (height + GAP)))
    return page


def cell(editor: Editor, images: list[np.ndarray], text: str, seed: int) -> Image.Image:
    """Before and after side by side, with the instruction below; a second picture lies small in a corner."""
    edit = editor.edit(Request(images=[Image.fromarray(i) for i in images], instructions=[text], seeds=[seed]))
    made = Image.new("RGB", (2 * SIDE, SIDE + CAPTION), "white")
    before = Image.fromarray(images[0])
    if len(images) > 1:
        before.paste(Image.fromarray(images[1]).resize((SIDE // 3, SIDE // 3)), (SIDE - SIDE // 3, SIDE - SIDE // 3))
    made.paste(before, (0, 0))
    made.paste(edit.images[0], (SIDE, 0))
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(13)
    for line, words in enumerate(wrap(text, font, 2 * SIDE)):
        pen.text((2, SIDE + 2 + 15 * line), words, fill="black", font=font)
    return made


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width - 4 and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


if __name__ == "__main__":
    main()
