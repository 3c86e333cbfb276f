"""``pipelines/latent_interpolation``: loaded as Diffusers loads a custom pipeline, corners bit for bit those of the plain one."""

import ast
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

from diffx.loading import EMBEDDED

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "pipelines" / "latent_interpolation"
PROMPTS, SEEDS = ("red apple", "rocket on blue"), (3, 4)
FEW = dict(num_inference_steps=3, guidance_scale=3.0)


@pytest.fixture(scope="module")
def pipe():
    pipe = DiffusionPipeline.from_pretrained(EMBEDDED, custom_pipeline=str(FOLDER), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def slerp(pipe):
    return sys.modules[type(pipe).__module__].slerp


@pytest.fixture(scope="module")
def drawn(pipe):
    return pipe(PROMPTS, seed=SEEDS, num_rows=2, num_columns=3, **FEW)


def pixels(image):
    return np.asarray(image, dtype=np.int16)


def test_it_is_loaded_only_when_trusted(pipe):
    assert type(pipe).__name__ == "LatentInterpolationPipeline" and isinstance(pipe, StableDiffusionPipeline)
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(EMBEDDED, custom_pipeline=str(FOLDER))


def test_the_folder_stands_alone_with_one_pipeline_of_its_own_name():
    tree = ast.parse((FOLDER / "pipeline.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= {"torch", "diffusers", "PIL"} | sys.stdlib_module_names
    pipelines = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and "Pipeline" in ast.unparse(node.bases)]
    assert pipelines == ["LatentInterpolationPipeline"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_corners_are_the_plain_pipelines_bit_for_bit(embedded, pipe, guidance_scale):
    options = FEW | {"guidance_scale": guidance_scale}
    drawn = pipe(PROMPTS, seed=SEEDS, num_rows=2, num_columns=2, **options)
    corners = [embedded(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0] for prompt in PROMPTS for seed in SEEDS]
    assert [np.array_equal(pixels(a), pixels(b)) for a, b in zip(drawn.images, corners, strict=True)] == [True] * 4
    assert not np.array_equal(pixels(corners[0]), pixels(corners[1]))


def test_the_way_leads_from_one_end_to_the_other(drawn):
    first, middle, last = (pixels(image) for image in drawn.images[:3])
    assert not np.array_equal(middle, first) and not np.array_equal(middle, last)
    assert len(drawn.images) == 6


def test_noises_may_be_given_and_one_row_keeps_to_the_first_prompt(pipe, drawn):
    noises = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    row = pipe(PROMPTS, latents=noises, num_rows=1, num_columns=3, **FEW)
    assert [np.array_equal(pixels(a), pixels(b)) for a, b in zip(row.images, drawn.images[:3], strict=True)] == [True] * 3


def test_grid_and_gif_hold_every_picture(drawn, tmp_path):
    grid = pixels(drawn.grid(2))
    assert grid.shape == (2 * 64, 3 * 64, 3)
    assert np.array_equal(grid[64::2, 128::2], pixels(drawn.images[5]))  # the lower right one
    order = [drawn.images.index(frame) for frame in drawn.loop()]
    assert order == [0, 1, 2, 5, 4, 3, 4, 5, 2, 1]
    drawn.save_gif(tmp_path / "loop.gif", milliseconds=40, scale=3)
    with Image.open(tmp_path / "loop.gif") as gif:
        assert gif.size == (96, 96) and gif.n_frames == 10 and gif.info["loop"] == 0 and gif.info["duration"] == 40


# slerp


def test_slerp_of_unit_vectors_is_the_angle(slerp):
    a, b = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    found = slerp(a, b, 0.25)
    angle = math.pi / 8
    assert torch.allclose(found, 1.25 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64), atol=1e-15)


def test_slerp_keeps_lengths_and_ends(slerp):
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 256, generator=rng) for _ in range(2))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    assert torch.equal(slerp(a, a, 0.3), a)
    for t in (0.1, 0.5, 0.9):
        want = (1 - t) * a.norm(dim=1) + t * b.norm(dim=1)
        assert torch.allclose(slerp(a, b, t).norm(dim=1), want, rtol=1e-6)  # float32 results


def test_slerp_refuses_what_has_no_way(slerp):
    a = torch.tensor([[1.0, 2.0]])
    slerp(a, -a + torch.tensor([[0.1, 0.0]]), 0.5)
    with pytest.raises(ValueError, match="opposite vectors have no shortest way"):
        slerp(a, -a, 0.5)
    with pytest.raises(ValueError, match="a zero vector has no direction"):
        slerp(a, 0 * a, 0.5)
    with pytest.raises(ValueError, match=r"t=1.5 must lie between 0 and 1"):
        slerp(a, a, 1.5)
    with pytest.raises(ValueError, match=r"shape \(1, 2\), b \(1, 1\)"):
        slerp(a, a[:, :1], 0.5)


# pictures


def test_encoding_is_deterministic_and_between_starts_and_ends_there(pipe, drawn):
    first, last = drawn.images[0], drawn.images[5]
    latents = pipe.encode(first)
    assert torch.equal(latents, pipe.encode(first)) and latents.shape == (1, 4, 8, 8)
    row = pipe.between(first, last, num_columns=3)
    for end, image in ((0, first), (-1, last)):
        assert np.array_equal(pixels(row.images[end]), pixels(pipe.decode(pipe.encode(image))))
        # The autoencoder's own error: 16 of 255 is 24 dB, and a mirrored picture is further away.
        assert np.sqrt(np.mean((pixels(row.images[end]) - pixels(image)) ** 2.0)) < 16


# input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(prompt="rocket"), "prompt='rocket' must be two texts"),
        (dict(prompt=["a", "b", "c"]), "must be two texts"),
        (dict(seed=3), "seed=3 must be two whole numbers"),
        (dict(seed=[1]), "must be two whole numbers"),
        (dict(latents=[torch.ones(1, 4, 8, 8)]), "latents holds 1 noises; two are needed"),
        (dict(num_rows=0), "num_rows=0 must be at least 1"),
        (dict(num_columns=0), "num_columns=0 must be at least 1"),
    ],
)
def test_bad_input_is_refused_before_the_first_picture(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(**dict(prompt=PROMPTS, seed=SEEDS) | given)


def test_pictures_of_different_sizes_are_refused(pipe):
    square = Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match=r"sizes \(32, 32\) and \(32, 16\)"):
        pipe.between(square, Image.new("RGB", (32, 16)))
    with pytest.raises(ValueError, match="num_columns=0 must be at least 1"):
        pipe.between(square, square, num_columns=0)


def test_the_demo_writes_what_it_says(tmp_path):
    few = ["--num-rows", "1", "--num-columns", "2", "--num-inference-steps", "2", "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, FOLDER / "demo.py", *few], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("grid.png", "loop.gif"):
        assert str(tmp_path / "out" / name) in done.stdout and (tmp_path / "out" / name).stat().st_size > 500


def test_the_card_runs_as_written(tmp_path, monkeypatch):
    block = re.search(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL).group(1)
    quick = block.replace("num_rows=5, num_columns=7, num_inference_steps=12", "num_rows=2, num_columns=2, num_inference_steps=2")
    assert quick != block
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    exec(quick, {"model": str(EMBEDDED)})
    assert (tmp_path / "grid.png").is_file() and (tmp_path / "loop.gif").is_file()
