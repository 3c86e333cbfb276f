"""Every hint that needs no weights, controlnet-aux's included: sheets, costs, and what their errors say. Writes results/hints.

    make test-hints && .venv-hints/bin/python benchmarks/hints.py

CPU, one thread.
"""

import importlib.metadata
import os
import platform
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import skimage.data
from PIL import Image

from diffx import glyphs
from diffx.conditioning import hints
from diffx.conditioning.hints import bridge, depth, sheet

RESULTS = Path(__file__).parent / "results" / "hints"
PACKAGES = ("controlnet_aux", "torch", "torchvision", "opencv-python-headless", "scikit-image", "numpy")
SHOWN = 12  # glyphs of the picture
UNITS = {"regions": "CIEDE2000", "tile": "CIEDE2000", "colour": "CIEDE2000", "shuffle": "Lab"}  # of errors; else 1 - edge-F1


def main() -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = sheet.available()
    photo = Image.fromarray(skimage.data.astronaut()).crop((0, 0, 512, 448)).reduce(2)
    sheet.sheet({"picture": photo, **{name: hint(photo) for name, hint in found.items()}}).save(RESULTS / "photo.png")
    held_out = [Image.fromarray(glyphs.Rendering(i).image()) for i in sorted(glyphs.held_out())]
    rows = [held_out[:SHOWN], *([hint(glyph) for glyph in held_out[:SHOWN]] for hint in found.values())]
    whole = np.concatenate([np.concatenate([np.asarray(picture) for picture in row], 1) for row in rows])
    Image.fromarray(whole).resize((whole.shape[1] * 2, whole.shape[0] * 2), Image.Resampling.NEAREST).save(RESULTS / "glyphs.png")
    motorcycle().save(RESULTS / "motorcycle.png")

    table = ["| hint | ms, 256 x 224 | ms, 32 x 32 | error to another glyph | unit |", "| --- | --- | --- | --- | --- |"]
    for name, hint in found.items():
        cost = [milliseconds(hint, picture) for picture in (photo, held_out[0])]
        drawn = [hint(glyph) for glyph in held_out]
        others = [hint.error(control, glyph) for control, glyph in zip(drawn, held_out[1:] + held_out[:1])]
        unit = UNITS.get(name, "Lab" if "Shuffle" in name else "1 - edge-F1")
        table.append(f"| {name} | {cost[0]:.1f} | {cost[1]:.1f} | {np.mean(others):.3f} | {unit} |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    text = f"""# Hints

`python benchmarks/hints.py` in the environment of `make test-hints`: {versions}; {platform.machine()}, one thread.
Pictures: photo.png (every hint of one photograph), glyphs.png (held-out glyphs as columns; rows: the glyph, then the hints in the table's
order), motorcycle.png (a measured disparity as depth and as normals).

The error of a glyph to its own hint is 0. To the hint of the next held-out glyph ({len(held_out)} pairs) it is the figure below, the floor
that a ControlNet has to leave behind.

{chr(10).join(table)}
"""
    (RESULTS / "report.md").write_text(text)


def milliseconds(hint: hints.Hint, picture: Image.Image, rounds: int = 5) -> float:
    """CPU time of one call, the least of several."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        hint(picture)
        times.append(time.process_time() - start)
    return 1000 * min(times)


def motorcycle() -> Image.Image:
    """A photograph, its measured disparity as a depth hint, and the normals of that; unknown points face the viewer."""
    left, _, disparity = skimage.data.stereo_motorcycle()
    disparity = np.where(np.isfinite(disparity), disparity, np.nan)
    f, u0, v0, dx, baseline = 994.978, 311.193, 254.877, 31.086, 193.001  # from the data's description
    normals = depth.paint_normals(depth.normals_from_depth(baseline * f / (disparity + dx), focal=f, centre=(v0, u0)))
    parts = [left / 255, depth.paint_depth(disparity)[..., None].repeat(3, -1), normals]
    return Image.fromarray(np.rint(np.concatenate(parts, 1) * 255).astype(np.uint8)).reduce(3)


if __name__ == "__main__":
    if not bridge.installed():
        raise SystemExit("controlnet-aux is not installed: make test-hints, then .venv-hints/bin/python benchmarks/hints.py")
    main()
