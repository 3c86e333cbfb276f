"""Diffusers' own tests for schedulers, unmodified, on every public class of ours. The wheel has none; a checkout has them.

    git clone https://github.com/huggingface/diffusers
    DIFFUSERS_CHECKOUT=$PWD/diffusers python -m pytest tests/test_stock_suite.py

The file imports its neighbours relatively, so it is loaded as part of its package, which is called ``tests``: our folder of the
same name must not be a package. Result: benchmarks/results/stock_suite.md.
"""

import importlib
import os
import sys
import unittest

import pytest

from diffx.schedulers import SAMPLERS

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="DIFFUSERS_CHECKOUT names no checkout of Diffusers, whose tests these are"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of the compatible stock classes
]
CONFIG = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear")  # as Diffusers' files have it
INHERITED = (
    "test_add_noise_device", "test_compatibles", "test_deprecated_kwargs", "test_from_pretrained", "test_from_save_pretrained",
    "test_getattr_is_correct", "test_scheduler_outputs_equivalence", "test_scheduler_public_api", "test_step_shape", "test_trained_betas",
)  # fmt: skip


@pytest.fixture(scope="module")
def common():
    """Diffusers' ``SchedulerCommonTest``."""
    sys.path.insert(0, CHECKOUT)
    try:
        return importlib.import_module("tests.schedulers.test_schedulers").SchedulerCommonTest
    finally:
        sys.path.remove(CHECKOUT)


def test_the_inherited_tests_are_these(common):
    assert tuple(unittest.defaultTestLoader.getTestCaseNames(common)) == INHERITED


@pytest.mark.parametrize("name", INHERITED)
@pytest.mark.parametrize("cls", SAMPLERS, ids=lambda cls: cls.__name__)
def test_passes_the_stock_suite(cls, name, common):
    about = dict(
        scheduler_classes=(cls,),
        forward_default_kwargs=(("num_inference_steps", 25),),
        get_scheduler_config=lambda self, **config: {**CONFIG, **config},
    )
    type(f"Stock{cls.__name__}", (common,), about)(name).debug()  # runs set-up, test and tear-down, and lets errors through
