"""Every training method on real pictures, 8x8 digits, sampled through stock pipelines: ``benchmarks/digits.py`` and its committed teachers.

Distances are Frechet, of 1,024 samples; the floor, real half against real half, is about 1.2. Between seeds of training they move by
a tenth or so, between seeds of sampling by less.
"""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def digits():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.digits")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def teacher(digits):
    """Distances of the teacher's samples, by number of calls."""
    pipe = digits.load("teacher")
    calls = (4, 8, 16)
    return {n: digits.distance(digits.sample(pipe, digits.Inference(pipe.scheduler, {"num_inference_steps": n}))) for n in calls}


def mean(part, key):
    return float(np.mean([part(seed)[key] for seed in SEEDS]))


def test_progressive_in_one_call_beats_the_teacher_in_four(digits, teacher):
    # The longer run below reaches the teacher in eight; half of it has to reach the easier half.
    assert digits.progressive(0, end=1, train_steps=800)["@1"] < teacher[4]


def test_lcm_in_four_calls_is_as_good_as_the_teacher_in_sixteen(digits, teacher):
    # The slow bound on one seed, at two thirds of the updates: 2.8 is the teacher's.
    assert digits.lcm(0, train_steps=400)["@4"] <= teacher[16]


@pytest.mark.slow
def test_progressive_reaches_its_teacher_in_an_eighth_of_the_calls(digits, teacher):
    assert mean(digits.PARTS["progressive-1"], "@1") <= 1.15 * teacher[8]
    assert mean(digits.PARTS["progressive-2"], "@2") <= 1.3 * teacher[16]


@pytest.mark.slow
def test_consistency_in_four_calls_is_as_good_as_the_teacher_in_sixteen(digits, teacher):
    assert mean(digits.PARTS["lcm"], "@4") <= teacher[16]
    assert mean(digits.PARTS["pcm"], "@4") <= 1.15 * teacher[16]


@pytest.mark.slow
def test_distribution_matching_in_one_call_beats_the_teacher_in_four(digits, teacher):
    assert mean(digits.PARTS["dmd2"], "@1") <= teacher[4]


@pytest.mark.slow
def test_guidance_costs_half(digits):
    runs = [digits.guidance(seed) for seed in SEEDS]
    assert np.mean([run["student"] for run in runs]) <= 1.5 * runs[0]["floor"]
    assert runs[0]["unguided"] > 3 * runs[0]["floor"]  # so there was something to learn


@pytest.mark.slow
def test_consistency_training_beats_its_start(digits):
    runs = [digits.consistency_training(seed) for seed in SEEDS]
    assert all(run["@2"] < 0.1 * run["untrained@2"] for run in runs)
