"""Canaries: the Diffusers releases that diffx is for, each in an environment of its own, through folders and a Hub."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffx.testing import LocalHub

ROOT = Path(__file__).parent.parent
RELEASES = ("0.42.0", "0.42.1")
VERSION = "import diffusers; print(diffusers.__version__, diffusers.__file__)"
CODE = """
import diffusers, diffx
pipe = diffusers.DiffusionPipeline.from_pretrained("plain/UniPC", custom_pipeline="tester/interpolation", trust_remote_code=True)
assert type(pipe).__name__ == "LatentInterpolationPipeline" and type(pipe.scheduler) is diffx.UniPC
scheduler = diffx.AutoScheduler.from_pretrained("tester/gradient", trust_remote_code=True)
assert type(scheduler).__name__ == "GradientEstimation" and isinstance(scheduler, diffx.TableScheduler)
"""


@pytest.fixture(params=RELEASES)
def release(request, tmp_path, monkeypatch):
    """A release, which processes of ``LocalHub.run`` import from now on."""
    folder = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", folder, f"diffusers=={request.param}"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"diffusers {request.param} could not be installed: {done.stderr.strip().splitlines()[-1]}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return request.param, folder


@pytest.mark.slow  # needs a package registry
def test_everything_travels(release, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    script = importlib.import_module("benchmarks.hub_matrix")
    version, folder = release
    names = ("UniPC", "DPMSolver", "LCM", "UniPC, flow")
    with LocalHub() as hub:
        assert hub.run(VERSION).stdout.split()[0] == version and str(folder) in hub.run(VERSION).stdout
        found = script.measure(names, tmp_path, hub)
        hub.commit("tester/interpolation", ROOT / "pipelines" / "latent_interpolation")
        hub.commit("tester/gradient", ROOT / "schedulers" / "gradient_estimation")
        hub.run(CODE, cwd=tmp_path)
    for name, _, *entries in script.table(found, names):
        assert entries == ["0"] * 11, (name, entries)
