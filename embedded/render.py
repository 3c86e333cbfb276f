"""Write the glyph data of the embedded model: one sheet of RGBA glyphs, their names, and the held-out list.

Needs Debian's `fonts-noto-color-emoji` and `pip install fonttools`; nothing else in the repository needs the font, because
everything reads the sheet. Run once, before any training:

    python embedded/render.py --output diffx/assets/glyphs
"""

import argparse
import unicodedata
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CELL = 48  # pixels per glyph in the sheet: 1.5x the model's 32, so that shifted and scaled renderings stay sharp
COLUMNS = 40
HELD_OUT_EVERY = 10


def wanted(code_point: int) -> bool:
    """Single pictures only: no plain text symbols, skin-tone modifiers, variation selectors, flag halves or tags."""
    skipped = [(0, 0x203B), (0x1F3FB, 0x1F3FF), (0xFE00, 0xFE0F), (0x1F1E6, 0x1F1FF), (0xE0000, 0x10FFFF)]
    return not any(first <= code_point <= last for first, last in skipped)


def main(font_path: Path, output: Path) -> None:
    font = ImageFont.truetype(font_path, 109)  # the only size in which the font holds its bitmaps
    glyphs, names = [], []
    for code_point in sorted(TTFont(font_path).getBestCmap()):
        name = unicodedata.name(chr(code_point), "").lower()
        if not wanted(code_point) or not name:
            continue
        image = Image.new("RGBA", (160, 160), (255, 255, 255, 0))
        ImageDraw.Draw(image).text((12, 16), chr(code_point), font=font, embedded_color=True)
        if np.asarray(image)[..., 3].max() == 0:
            continue  # in the character map, but without a picture
        glyphs.append(image.crop((8, 8, 152, 152)).resize((CELL, CELL), Image.LANCZOS))
        names.append(name)

    rows = -(-len(glyphs) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for i, glyph in enumerate(glyphs):
        sheet.paste(glyph, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    output.mkdir(parents=True, exist_ok=True)
    sheet.save(output / "glyphs.webp", lossless=True, quality=100, method=6)
    (output / "names.txt").write_text("\n".join(names) + "\n")
    (output / "held_out.txt").write_text("\n".join(names[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    main(args.font, args.output)
