"""The data of the embedded model: 1,360 Noto Color Emoji, each in many renderings, with captions.

A rendering is a glyph, flipped or not, scaled and shifted, on a plain background. The caption names glyph and background
("red apple", "red apple on blue"; white is not named), so that a prompt has more than one right picture.

Three kinds of prompt, fixed before any training: *seen*; *unseen glyphs* (every tenth, no network ever saw a picture or a
name of one); *unseen pairs* (a seen glyph on a background it never had in training).
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "assets" / "glyphs"
SIZE = 32  # pixels of a rendering
CELL = 48  # pixels of a glyph in the sheet
COLUMNS = 40
BACKGROUNDS = {
    "white": (255, 255, 255),
    "gray": (190, 190, 190),
    "pink": (250, 195, 220),
    "yellow": (255, 236, 150),
    "green": (170, 220, 160),
    "blue": (150, 195, 240),
}
# A mirrored picture must not contradict its caption: directions, letters, digits and clock faces stay as they are.
ONE_SIDED = re.compile(
    r"left|right|east|west|clock|squared|circled|letter|ideograph|katakana|numeral|input|mark|arrow|keycap|sign|sym|button"
)


@dataclass(frozen=True)
class Rendering:
    """How one picture is made; ``scale`` is the glyph's width over the picture's, shifts are in pixels."""

    glyph: int
    background: str = "white"
    flip: bool = False
    scale: float = 0.94
    shift: tuple[float, float] = (0.0, 0.0)

    def caption(self) -> str:
        return names()[self.glyph] + ("" if self.background == "white" else f" on {self.background}")

    def image(self) -> np.ndarray:
        """(32, 32, 3) uint8."""
        glyph = _glyph(self.glyph)
        if self.flip:
            glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # Output pixel (u, v) reads the sheet at (a u + b, a v + c); reducing is done by rendering at 4x and averaging.
        over = 4 * SIZE
        step = CELL / (over * self.scale)
        corner = [(CELL - CELL / self.scale) / 2 - 4 * step * offset for offset in self.shift]
        premultiplied = glyph.convert("RGBa")
        fine = premultiplied.transform(
            (over, over), Image.Transform.AFFINE, (step, 0, corner[0], 0, step, corner[1]), Image.Resampling.BICUBIC
        )
        small = fine.reduce(4).convert("RGBA")
        canvas = Image.new("RGBA", (SIZE, SIZE), (*BACKGROUNDS[self.background], 255))
        canvas.alpha_composite(small)
        return np.asarray(canvas.convert("RGB"))


@functools.cache
def names() -> tuple[str, ...]:
    """The lower-case Unicode name of every glyph, in the sheet's order."""
    return tuple((FOLDER / "names.txt").read_text().splitlines())


@functools.cache
def held_out() -> frozenset[int]:
    """Glyphs that nothing was trained on."""
    listed = set((FOLDER / "held_out.txt").read_text().splitlines())
    return frozenset(i for i, name in enumerate(names()) if name in listed)


def is_held_out_pair(glyph: int, background: str) -> bool:
    """Whether a seen glyph never had this background in training: one of its five colours, a different one by index."""
    colours = list(BACKGROUNDS)[1:]
    return background == colours[glyph % len(colours)]


def seen() -> list[int]:
    """Glyphs that training may show, all but the held-out ones."""
    return [i for i in range(len(names())) if i not in held_out()]


def training_renderings(per_glyph: int, seed: int) -> list[Rendering]:
    """``per_glyph`` random renderings of every seen glyph, half of them on white; unseen pairs left out."""
    return [random_rendering(glyph, np.random.default_rng((seed, glyph, k))) for glyph in seen() for k in range(per_glyph)]


def random_rendering(glyph: int, rng: np.random.Generator, background: str | None = None) -> Rendering:
    """A random rendering; without a ``background`` one is drawn, white half of the time and never an unseen pair."""
    if background is None:
        colours = [c for c in BACKGROUNDS if c != "white" and not is_held_out_pair(glyph, c)]
        background = "white" if rng.random() < 0.5 else str(rng.choice(colours))
    flip = bool(rng.random() < 0.5) and not ONE_SIDED.search(names()[glyph])
    shift = rng.uniform(-1.5, 1.5, 2)
    return Rendering(glyph, background, flip, float(rng.uniform(0.82, 1.0)), (float(shift[0]), float(shift[1])))


@functools.cache
def _sheet() -> Image.Image:
    return Image.open(FOLDER / "glyphs.webp").convert("RGBA")


def _glyph(index: int) -> Image.Image:
    x, y = index % COLUMNS * CELL, index // COLUMNS * CELL
    return _sheet().crop((x, y, x + CELL, y + CELL))
