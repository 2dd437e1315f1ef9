"""A sheet of edits by the pocket model: ``python -m bench.pocket_sheet OUT [--bundle NAME]``.

It shows every edit on a held-out photo, or on a scene where the edit needs one, without any selection by quality.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bench.report import argument_parser, write_report
from pocket.data.edits import EDITS, instruction_text, random_instruction
from pocket.data.examples import HELD_OUT_PAIRS
from pocket.data.images import SIDE
from pocket.data.scenes import scene
from pocket.judge import views
from qie.engines.bundle.bundle import open_bundle
from qie.engines.editing.editor import Editor
from qie.engines.editing.encoder_cache import EncoderCache
from qie.engines.editing.request import Request
from qie.engines.terminal import table

COLUMNS, GAP, CAPTION = 4, 10, 34

ROW = ("tint", "upside down", "invert", "pixelate")
"""The edits of ``--row``: in color, and of one image of any shape."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("out", type=Path, help="image to write")
    parser.add_argument("--bundle", default="pocket", help="name or folder of a bundle of the pocket model")
    parser.add_argument("--row", type=Path, help=f"image to write {', '.join(ROW)} into, on one line")
    parser.add_argument("--seed", type=int, default=3, help="seed of noise, colors, shapes and places, default: 3")
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    editor = Editor(open_bundle(options.bundle), encoder_cache=EncoderCache(bytes_max=0))
    photos = views()
    with_foreground = scene(rng, SIDE, SIDE)
    edits = []
    for number, (name, edit) in enumerate(EDITS.items()):
        source = with_foreground if edit.scene else photos[number % len(photos)]
        images = [source.image, photos[(number + 1) % len(photos)].image][: edit.images]
        edits.append((images, instruction_text(random_instruction(rng, name))))
    for number, pair in enumerate(HELD_OUT_PAIRS[:5]):
        text = " and ".join(instruction_text(random_instruction(rng, name)) for name in pair)
        edits.append(([photos[number].image], text))
    cells = [cell(editor, images, text, options.seed) for images, text in edits]
    sheet(cells).save(options.out, quality=90)
    if options.row is not None:
        sheet([cells[list(EDITS).index(name)] for name in ROW]).save(options.row, quality=90)
    rows = [[str(number), text, str(len(images))] for number, (images, text) in enumerate(edits, start=1)]
    print(table(rows, header=("cell", "instruction", "images"), right=(0, 2)))
    write_report(options, {"seed": options.seed, "instructions": [text for _, text in edits]})


def sheet(cells: list[Image.Image]) -> Image.Image:
    """Cells of one size in rows of COLUMNS cells."""
    width, height = cells[0].size
    lines = -(-len(cells) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, lines * (height + GAP) + GAP), "white")
    for place, image in enumerate(cells):
        line, column = divmod(place, COLUMNS)
        page.paste(image, (GAP + column * (width + GAP), GAP + line * (height + GAP)))
    return page


def cell(editor: Editor, images: list[np.ndarray], text: str, seed: int) -> Image.Image:
    """Input and result side by side above the instruction; a second input is shown small in a corner."""
    edit = editor.edit(Request(images=[Image.fromarray(i) for i in images], instructions=[text], seeds=[seed]))
    page = Image.new("RGB", (2 * SIDE, SIDE + CAPTION), "white")
    before = Image.fromarray(images[0])
    if len(images) > 1:
        before.paste(Image.fromarray(images[1]).resize((SIDE // 3, SIDE // 3)), (SIDE - SIDE // 3, SIDE - SIDE // 3))
    page.paste(before, (0, 0))
    page.paste(edit.images[0], (SIDE, 0))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for number, line in enumerate(wrap(text, font, 2 * SIDE)):
        draw.text((2, SIDE + 2 + 15 * number), line, fill="black", font=font)
    return page


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
