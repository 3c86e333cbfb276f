"""The README's support matrix, cell by cell: what it says was run is run here."""

import re
from pathlib import Path

import diffusers
import pytest
import torch

import diffx
from diffx.schedulers import SAMPLERS
from diffx.testing import IMAGE_SIZE, call_inputs, tiny_flux, tiny_sd3, tiny_sdxl, tiny_stable_diffusion

README = (Path(__file__).parent.parent / "README.md").read_text()
HEAD, *ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.split("## What was run")[1].split("\n## ")[0].splitlines()
    if line.startswith("|") and not line.startswith("| ---")
]
NAMES = HEAD[2:]
CELLS = [(row[0].strip("`"), name) for row in ROWS for name, word in zip(NAMES, row[2:], strict=True) if word == "runs and reloads"]
BUILDERS = {"StableDiffusionXL": tiny_sdxl, "StableDiffusion3": tiny_sd3, "StableDiffusion": tiny_stable_diffusion, "Flux": tiny_flux}


def test_the_matrix_has_every_sampler_and_three_words():
    assert NAMES == [cls.__name__ for cls in SAMPLERS]
    assert {word for row in ROWS for word in row[2:]} == {"measured", "runs and reloads", "not run"}
    assert [row[0] for row in ROWS if "measured" in row[2:]] == ["`StableDiffusionPipeline`, the embedded model"]


def build(class_name: str):
    base = BUILDERS[re.match("|".join(BUILDERS), class_name).group()]()
    pipe = base if type(base).__name__ == class_name else getattr(diffusers, class_name).from_pipe(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe) -> torch.Tensor:
    """(1, 3, H, W) of four steps, all of them taken also where a picture is given."""
    inputs = call_inputs(pipe)
    if "Img2Img" in type(pipe).__name__ or "Inpaint" in type(pipe).__name__:
        inputs |= {"image": torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(9)), "strength": 0.75}
        if isinstance(pipe, diffusers.StableDiffusionImg2ImgPipeline | diffusers.StableDiffusionXLImg2ImgPipeline):
            del inputs["height"], inputs["width"]  # these take their size from the picture
    if "Inpaint" in type(pipe).__name__:
        inputs["mask_image"] = (torch.arange(IMAGE_SIZE) < IMAGE_SIZE // 2).float().expand(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    return pipe(**inputs, num_inference_steps=4, generator=torch.Generator().manual_seed(4), output_type="pt").images


@pytest.mark.parametrize(("class_name", "name"), CELLS, ids=[f"{pipe}-{name}" for pipe, name in CELLS])
def test_runs_and_reloads(class_name, name, tmp_path):
    pipe = build(class_name)
    pipe.scheduler = getattr(diffx, name).from_config(pipe.scheduler.config)
    made = picture(pipe)
    assert torch.isfinite(made).all() and made.std() > 0
    pipe.save_pretrained(tmp_path)
    again = getattr(diffusers, class_name).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is getattr(diffx, name)
    assert torch.equal(picture(again), made)
