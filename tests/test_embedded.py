"""The embedded model as strangers meet it: a stock folder, and a card that says what was measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffx import glyphs
from diffx.loading import EMBEDDED, EMBEDDED_STUDENT

STRANGER = """
import sys
sys.modules["diffx"] = None  # importing it raises ImportError
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
dtypes = {name: next(part.parameters()).dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
assert set(dtypes.values()) == {torch.float32}, dtypes
image = pipe("red apple on blue", num_inference_steps=4, guidance_scale=3.0, output_type="np", generator=torch.manual_seed(0)).images
print(type(pipe).__name__, type(pipe.scheduler).__name__, image.shape, bool((image >= 0).all() and image.std() > 0.05))
"""


def test_it_loads_without_a_dtype_and_runs_where_diffx_is_not():
    done = subprocess.run([sys.executable, "-c", STRANGER, str(EMBEDDED)], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[-2] == "StableDiffusionPipeline DDIMScheduler (1, 32, 32, 3) True", done.stderr


def test_the_card_says_what_was_measured():
    measured = json.loads((EMBEDDED / "measured.json").read_text())
    card = (EMBEDDED / "README.md").read_text()
    assert f"{measured['vae_psnr']['held_out']:.2f} dB on {measured['vae_psnr']['held_out_count']} renderings of unseen glyphs" in card
    for block in measured["blocks"].values():
        for name, figure in block["measures"].items():
            assert re.search(rf"{re.escape(name)} \| {figure['value']:.3f} \| {figure['vae']:.3f} \| {figure['floor']:.3f} \|", card)
    assert (EMBEDDED / "samples.png").exists()


def test_the_students_card_has_the_figures_of_the_benchmark():
    """Parts of ``benchmarks/distillation.py``, rounded as the card prints them."""
    card = (EMBEDDED_STUDENT / "README.md").read_text()
    for part, first in (("teacher-50", "the model | 50"), ("teacher-4", "the model | 4"), ("teacher-2", "the model | 2"),
                        ("progressive-lora", "**this student** | 4")):  # fmt: skip
        found = json.loads(
            (Path(__file__).parent.parent / "benchmarks" / "results" / "distillation" / "parts" / f"{part}.json").read_text()
        )["measures"]
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {first} |")]
        figures = [found["FD (glyph encoder)"]["value"], found["R-precision@1"]["value"]]
        assert all(f"{value:.3f} |" in line for value in figures), line
        assert "PSNR" not in found or f"{found['PSNR']['value']:.1f} dB" in line
    assert (EMBEDDED_STUDENT / "pytorch_lora_weights.safetensors").stat().st_size < 2e6


def test_nothing_held_out_is_in_the_training_renderings():
    renderings = glyphs.training_renderings(4, seed=0)
    assert not {r.glyph for r in renderings} & glyphs.held_out()
    assert not [r for r in renderings if glyphs.is_held_out_pair(r.glyph, r.background)]
    assert len(glyphs.names()) == 1360 and len(glyphs.held_out()) == 136


def test_renderings_are_reproducible_and_named():
    red_apple = glyphs.names().index("red apple")
    one, two = (glyphs.random_rendering(red_apple, np.random.default_rng(3), "blue") for _ in range(2))
    assert one.caption() == "red apple on blue" and one == two
    np.testing.assert_array_equal(one.image(), two.image())
    assert one.image()[0, 0].tolist() == list(glyphs.BACKGROUNDS["blue"])


@pytest.mark.parametrize("name", ["leftwards black arrow", "clock face three oclock", "squared id"])
def test_what_a_mirror_would_contradict_is_never_mirrored(name):
    glyph = glyphs.names().index(name)
    assert not any(glyphs.random_rendering(glyph, np.random.default_rng(k)).flip for k in range(40))
    assert any(glyphs.random_rendering(glyphs.names().index("red apple"), np.random.default_rng(k)).flip for k in range(40))
