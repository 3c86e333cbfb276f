"""``benchmarks/rules_of_thumb.py``: its figures on pictures whose figures are known, and a whole run at its smallest."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffx.evaluation.emoji import parse_prompt, render

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rules():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.rules_of_thumb")
    sys.path.remove(str(ROOT))


def test_quality_is_the_distance_to_the_nearest_real_picture(rules):
    quality, prompts = rules.QualityInDecibels(renderings=3), ("rocket", "ghost on pink")
    real = render(prompts, seed=rules.SEED, per_prompt=3)
    shifted = real[[1, 5]] + 0.1  # one of each prompt's own, off by a tenth: 20 dB
    (measure,) = quality.evaluate(shifted, prompts)
    assert measure.value == pytest.approx(20, abs=1e-3)
    assert measure.count == 2 and 5 < measure.floor < 40


def test_look_of_known_pictures(rules):
    look = rules.Look(per_prompt=2)
    same = torch.full((4, 3, 32, 32), 0.5)
    figures = look._figures(same)
    assert figures["diversity"] == pytest.approx(0, abs=1e-6) and figures["colour"] == 0 and figures["at the ends"] == 0
    red = torch.zeros(4, 3, 32, 32)
    red[:, 0] = 0.75
    assert look._figures(red)["colour"] == pytest.approx(0.75) and look._figures(red)["at the ends"] == pytest.approx(2 / 3)
    real = look._figures(render(["rocket", "rocket", "ghost", "ghost"], seed=0))
    assert real["diversity"] > 0.01


def test_prompts_are_captions_of_seen_glyphs_and_always_the_same(rules):
    prompts = rules.seen_prompts(8)
    assert prompts == rules.seen_prompts(8) and len(set(prompts)) == 8
    assert {parse_prompt(prompt)[0] for prompt in prompts} <= set(rules.glyphs.seen())


@pytest.mark.slow
def test_the_smallest_run_writes_every_section(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "rules_of_thumb.py", "--smallest", "--output", tmp_path / "rules.md"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "rules.md").read_text()
    assert text.count("\n## ") == text.count("\nThe advice: ") == text.count("\nSo: ") == 5
    assert "nan" not in text
