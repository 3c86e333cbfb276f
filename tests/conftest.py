"""One thread, no network, no progress bars: set before anything imports torch or the Hugging Face libraries."""

import os
import tempfile

os.environ |= {
    # Diffusers copies each local custom pipeline into one place, which another worker may be reading: every process has its own.
    "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="diffx-modules-"),
    "OMP_NUM_THREADS": "1",  # the models are small: a second thread costs more than it brings, and sums depend on the count
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "MPLBACKEND": "Agg",
    "COLUMNS": "200",  # rich wraps help texts at the terminal's width
    "NO_COLOR": "1",
}
os.environ.pop("DIFFX_DEBUG", None)

import shutil

import diffusers.utils.logging
import pytest
import torch
import transformers.utils.logging

from diffx.testing.loopback import only_loopback

torch.set_num_threads(1)
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

only_loopback()


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def embedded():
    """The embedded pipeline, loaded once; a test that changes more than its scheduler loads its own."""
    from diffx.loading import load_pipeline

    pipe = load_pipeline(device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe
