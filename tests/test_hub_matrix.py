"""Schedulers through folders and a Hub, with diffx and without: ``benchmarks/hub_matrix.py``, of which one row is made here."""

import importlib
import inspect
import json
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import diffx
from diffx.hub.degrade import CLASSES
from diffx.testing import LocalHub, call_inputs, end_of, tiny_stable_diffusion

ROOT = Path(__file__).parent.parent
RESULT = (ROOT / "benchmarks" / "results" / "hub_matrix.md").read_text()


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.hub_matrix")


def check(script, names, tmp_path):
    with LocalHub() as hub:
        found = script.measure(names, tmp_path, hub)
        told = [request for request in hub.requests if hub.token in request.path]
    for name, twin, *entries in script.table(found, names):
        assert twin.endswith("Scheduler") and entries == ["0"] * 11, (name, entries)
    for what, *entries in script.controls(found):
        assert entries == ["`ValueError`"] * 4, (what, entries)
    assert not told
    return script.report(found, names)


def test_one_row_and_the_controls(script, tmp_path):
    check(script, ["UniPC"], tmp_path)


@pytest.mark.slow  # every row: a minute
def test_the_table_is_the_committed_one(script, tmp_path):
    def body(text):
        return re.sub(r"torch .*, one CPU thread", "", text)

    assert body(check(script, list(script.ROWS), tmp_path)) == body(RESULT)


def test_the_committed_table_has_every_class_and_only_zeros(script):
    assert {cls.__name__ for _, cls, _ in script.ROWS.values()} == set(CLASSES)
    public = {name for name in diffx.__all__ if inspect.isclass(each := getattr(diffx, name)) and issubclass(each, diffx.TableScheduler)}
    assert public - {"TableScheduler"} == set(CLASSES)
    rows = [line.strip("| ").split(" | ") for line in RESULT.splitlines() if line.startswith("| ")]
    assert {row[0] for row in rows} >= set(script.ROWS)
    assert all(row[2:] == ["0"] * 11 for row in rows if row[0] in script.ROWS)


def test_from_pipe_takes_ours_along(tmp_path):
    pipe = tiny_stable_diffusion()
    pipe.scheduler = diffx.UniPC.from_config(pipe.scheduler.config, solver_order=3, seed=2)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    made = [StableDiffusionImg2ImgPipeline.from_pipe(pipe), AutoPipelineForImage2Image.from_pipe(loaded)]
    images = []
    for each in made:
        assert type(each) is StableDiffusionImg2ImgPipeline and type(each.scheduler) is diffx.UniPC
        assert each.scheduler.config.solver_order == 3 and each.scheduler.config.seed == 2
        each.set_progress_bar_config(disable=True)
        images.append(end_of(each, **call_inputs(each), num_inference_steps=4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*images)
    back = StableDiffusionPipeline.from_pipe(made[1])
    back.save_pretrained(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "model_index.json").read_text())["scheduler"] == ["diffx", "UniPC"]


def test_the_package_has_no_pipeline_class():
    """Those it publishes are custom pipelines, which bring their file; none needs to be found by its name."""
    for path in (ROOT / "diffx").rglob("*.py"):
        assert not re.search(r"^class \w+\(.*Pipeline\)", path.read_text(), re.MULTILINE), path
    assert diffusers.pipelines.diffx is diffx
