"""The folders in ``schedulers/``: they load, hold the published numbers of their family, and sample its pipeline."""

import json
import math
import re
from pathlib import Path

import diffusers
import pytest
import torch

import diffx
from diffx.evaluation.samplers import make_sampler
from diffx.oracle import Gaussian
from diffx.testing import call_inputs, denoise, tiny_flux, tiny_sd3, tiny_sdxl, tiny_stable_diffusion

ROOT = Path(__file__).parent.parent
FOLDERS = ROOT / "schedulers"
RECIPES = sorted(folder.name for folder in FOLDERS.iterdir() if folder.is_dir() and not (folder / "scheduler.py").is_file())
TINY = {"sd15": tiny_stable_diffusion, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
BETAS = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
# What the model repositories of each family hold, without the options of one stock class alone.
PUBLISHED = {
    "sd15": (diffusers.PNDMScheduler, dict(BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)),
    "sdxl": (diffusers.EulerDiscreteScheduler, dict(BETAS, prediction_type="epsilon", timestep_spacing="leading", steps_offset=1)),
    "sd3": (diffusers.FlowMatchEulerDiscreteScheduler, dict(num_train_timesteps=1000, shift=3.0)),
    "flux": (
        diffusers.FlowMatchEulerDiscreteScheduler,
        dict(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
             base_image_seq_len=256, max_image_seq_len=4096),
    ),
    "svd": (
        diffusers.EulerDiscreteScheduler,
        dict(BETAS, prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
             timestep_spacing="leading", steps_offset=1),
    ),
}  # fmt: skip


def card(name):
    return (FOLDERS / name / "README.md").read_text()


def saved(name):
    return json.loads((FOLDERS / name / "scheduler_config.json").read_text())


def published(name):
    cls, config = PUBLISHED[name]
    return cls(**config)


def prepared(scheduler, steps=8):
    scheduler.set_timesteps(steps, mu=0.8 if scheduler.config.use_dynamic_shifting else None)
    return scheduler


def test_every_family_has_a_recipe():
    assert RECIPES == sorted([*PUBLISHED, "emoji"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_holds_the_published_numbers(name):
    """The very run that the published config gives when it is swapped as users swap it."""
    ours = prepared(diffx.UniPC.from_pretrained(FOLDERS / name))
    theirs = prepared(diffx.UniPC.from_config(published(name).config))
    assert str(ours.plan()) == str(theirs.plan())
    assert torch.equal(ours.timesteps, theirs.timesteps)


def test_the_embedded_recipe_is_the_process_of_the_embedded_model(embedded):
    ours, own = diffx.UniPC.from_pretrained(FOLDERS / "emoji"), diffx.UniPC.from_config(embedded.scheduler.config)
    assert str(prepared(ours).plan()) == str(prepared(own).plan())


@pytest.mark.parametrize("name", TINY)
def test_a_recipe_runs_in_the_pipeline_of_its_family(name):
    pipe = TINY[name]()
    pipe.scheduler = published(name)
    stock = dict(pipe.scheduler.config)
    exec(re.search(r"```python\n(.*?)```", card(name), re.DOTALL).group(1).replace('"schedulers/', f'"{FOLDERS}/'), {"pipe": pipe})
    assert type(pipe.scheduler) is diffx.UniPC
    made = [pipe(**call_inputs(pipe), num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images]
    pipe.scheduler = make_sampler(str(FOLDERS / name), stock)
    made += [pipe(**call_inputs(pipe), num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images]
    assert made[0].isfinite().all() and made[0].std() > 0
    assert torch.equal(*made)


def test_the_embedded_recipe_samples_the_embedded_model(embedded):
    stock, images = embedded.scheduler, []
    for scheduler in (diffx.UniPC.from_pretrained(FOLDERS / "emoji"), make_sampler("UniPC", stock.config)):
        embedded.scheduler = scheduler
        images.append(embedded("rocket", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images)
    embedded.scheduler = stock
    assert torch.equal(*images)


def test_a_recipe_of_another_kind_of_model_is_refused():
    make_sampler(str(FOLDERS / "flux"), diffusers.FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(ValueError, match="is for models of flow, this one has betas"):
        make_sampler(str(FOLDERS / "flux"), diffusers.DDIMScheduler().config)
    with pytest.raises(ValueError, match="is for models of betas, this one has flow"):
        make_sampler(str(FOLDERS / "sdxl"), diffusers.FlowMatchEulerDiscreteScheduler().config)


def error_on_gaussian_data(scheduler, steps):
    """RMS distance to the exact end of the flow, for a perfect network that is fed log(edm_sigma) / 4."""
    rng = torch.Generator().manual_seed(0)
    data = Gaussian(torch.randn(4, 8, 8, generator=rng), 1.5 * torch.rand(4, 8, 8, generator=rng))
    scheduler.set_timesteps(steps)

    def level(edm_sigma):
        return 1 / math.hypot(1, edm_sigma), edm_sigma / math.hypot(1, edm_sigma)

    noise = torch.randn((2, 4, 8, 8), generator=rng, dtype=torch.float64)
    first = noise * scheduler.init_noise_sigma
    end = denoise(scheduler, lambda x, t: data.predict(x, *level(math.exp(4 * float(t))), "v_prediction"), first)
    top = float(scheduler.sigmas[0])
    start = first / math.hypot(1, top) if scheduler.init_noise_sigma > 1 else first  # Euler's frame has alpha = 1
    return (end - data.flow(start, level(top), (1.0, 0.0))).square().mean().sqrt().item()


def test_the_video_card_tells_what_gaussian_data_say():
    found = re.findall(r"(\d\.\d+) against (\d\.\d+) at (\d+)", card("svd"))
    assert [int(steps) for *_, steps in found] == [6, 10, 25]
    for ours, theirs, steps in found:
        # The card has three decimals.
        assert error_on_gaussian_data(diffx.UniPC.from_pretrained(FOLDERS / "svd"), int(steps)) == pytest.approx(float(ours), abs=6e-4)
        assert error_on_gaussian_data(published("svd"), int(steps)) == pytest.approx(float(theirs), abs=6e-4)
