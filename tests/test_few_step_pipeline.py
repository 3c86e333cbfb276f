"""``pipelines/few_step``: the calls that are asked for, and bit for bit what Diffusers does with the same times."""

import re
import sys

import diffusers
import pytest
import torch
from adapter_parts import picture
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler, LCMScheduler
from PIL import Image

from diffx.loading import EMBEDDED
from diffx.testing import IMAGE_SIZE, tiny_latent_consistency, tiny_stable_diffusion
from diffx.testing.parts import quiet

FOLDER = EMBEDDED.parents[2] / "pipelines" / "few_step"
STUDENT = EMBEDDED.parent / "emoji_progressive_4"
TRAILING = {"timestep_spacing": "trailing"}
MASK = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
MASK.paste(255, (0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))


@pytest.fixture(scope="module")
def cls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_stable_diffusion().save_pretrained(folder)
    return type(DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FOLDER), trust_remote_code=True))


@pytest.fixture(scope="module")
def few(cls):
    return quiet(cls(**tiny_stable_diffusion().components, requires_safety_checker=False))


def twin(kind, pipe):
    return quiet(kind(**pipe.components, requires_safety_checker=False))


def run(pipe, *given, **options):
    options = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"} | options
    return pipe("x", *given, **options).images


def calls_of(pipe, *given, **options):
    calls = []
    hook = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    run(pipe, *given, **options)
    hook.remove()
    return len(calls)


SCHEDULERS = {
    "DDIM": lambda config: DDIMScheduler.from_config(config, **TRAILING),
    "Euler": lambda config: EulerDiscreteScheduler.from_config(config, **TRAILING),
    "LCM": lambda config: LCMScheduler.from_config(config),
}
each_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


@each_scheduler
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_text_to_image_is_the_plain_pipelines(few, name, guidance_scale):
    few.scheduler = SCHEDULERS[name](few.scheduler.config)
    stock = run(twin(diffusers.StableDiffusionPipeline, few), num_inference_steps=4, guidance_scale=guidance_scale)
    assert torch.equal(run(few, guidance_scale=guidance_scale), stock)
    assert torch.equal(run(few), stock) == (guidance_scale == 1)


@pytest.mark.parametrize("mask", [None, MASK], ids=["img2img", "inpaint"])
@pytest.mark.parametrize("name", ["DDIM", "Euler"])
def test_the_last_n_calls_of_a_longer_run_are_those_of_diffusers(few, name, mask):
    few.scheduler = SCHEDULERS[name](few.scheduler.config)
    given = (picture(0),) if mask is None else (picture(0), mask)
    size = {} if mask is None else {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    stock = twin(diffusers.StableDiffusionImg2ImgPipeline if mask is None else diffusers.StableDiffusionInpaintPipeline, few)
    for n, full in ((1, 2), (2, 4), (3, 16), (4, 4), (5, 7)):
        # A little more strength for Diffusers, which rounds n calls down to n - 1 where the quotient is a rounding below.
        slightly = min(1.0, n / full + 1e-9)
        want = run(stock, *given, num_inference_steps=full, strength=slightly, guidance_scale=3.0, **size)
        found = run(few, *given, num_inference_steps=n, strength=n / full, guidance_scale=3.0, **size)
        assert torch.equal(found, want), (n, full)


def test_the_times_are_the_last_ones_of_a_trailing_run(cls):
    set_times = sys.modules[cls.__module__].set_times
    for num_train_timesteps in (1000, 1024):
        for kind in (DDIMScheduler, EulerDiscreteScheduler):
            ours, stock = (kind(num_train_timesteps=num_train_timesteps, **TRAILING) for _ in range(2))
            for full in range(1, 33):
                stock.set_timesteps(full)
                for n in range(1, min(full, 8) + 1):
                    set_times(ours, n, n / full)
                    assert torch.equal(ours.timesteps, stock.timesteps[-n:]), (kind, num_train_timesteps, n, full)


@each_scheduler
def test_every_strength_has_the_calls_that_are_asked_for(few, name):
    few.scheduler = SCHEDULERS[name](few.scheduler.config)
    for n, strength in ((1, 0.05), (1, 0.7), (4, 0.33), (4, 0.7), (8, 0.99)):
        assert calls_of(few, picture(0), num_inference_steps=n, strength=strength) == n
        first = few.scheduler.timesteps[0].item()
        apart = 20 if name == "LCM" else 1  # its training times are that far apart
        assert 0 <= strength * 1000 - 1 - first < apart + 0.5
    assert calls_of(few, picture(0), MASK, num_inference_steps=3, height=IMAGE_SIZE, width=IMAGE_SIZE) == 3
    # What it is about: Diffusers, asked for 4 calls.
    stock = twin(diffusers.StableDiffusionImg2ImgPipeline, few)
    if name != "LCM":
        assert [calls_of(stock, image=picture(0), num_inference_steps=4, strength=s) for s in (0.7, 0.3)] == [2, 1]


def test_the_calls_in_the_card(few):
    few.scheduler = SCHEDULERS["DDIM"](few.scheduler.config)
    stock = twin(diffusers.StableDiffusionImg2ImgPipeline, few)
    rows = [re.findall(r"[\d., ]+(?= \|)", line) for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert [len(row) for row in rows] == [6, 6, 6]
    for asked, theirs, ours in zip(*rows, strict=True):
        n, strength = int(asked.split(",")[0]), float(asked.split(",")[1])
        assert calls_of(stock, image=picture(0), num_inference_steps=n, strength=strength) == int(theirs)
        assert calls_of(few, picture(0), num_inference_steps=n, strength=strength) == int(ours)


def test_the_scheduler_is_as_before_for_the_next_run(few):
    few.scheduler = SCHEDULERS["DDIM"](few.scheduler.config)
    before = run(few)
    run(few, picture(0), num_inference_steps=3, strength=0.37)
    assert torch.equal(run(few), before)


def test_a_network_that_is_told_the_scale_gets_it(cls):
    lcm = tiny_latent_consistency()
    few = quiet(cls(**lcm.components, requires_safety_checker=False))
    for scale in (None, 3.0):
        given = {} if scale is None else {"guidance_scale": scale}
        assert torch.equal(run(few, **given), run(lcm, num_inference_steps=4, **given))  # the default of both is 8.5
    # ... and image to image goes as its own pipeline goes, which takes training times up to strength.
    own = quiet(diffusers.LatentConsistencyModelImg2ImgPipeline(**few.components, requires_safety_checker=False))
    for n, strength in ((4, 0.8), (1, 0.3)):
        want = run(own, image=picture(0), num_inference_steps=n, strength=strength)
        assert torch.equal(run(few, picture(0), num_inference_steps=n, strength=strength), want)


def test_the_embedded_student_changes_a_picture_on_its_own_times():
    pipe = quiet(DiffusionPipeline.from_pretrained(EMBEDDED, custom_pipeline=str(FOLDER), trust_remote_code=True))
    pipe.load_lora_weights(STUDENT)
    pipe.scheduler = DDIMScheduler.from_pretrained(STUDENT, subfolder="scheduler")
    stock = twin(diffusers.StableDiffusionPipeline, pipe)
    options = {"output_type": "pil"}
    rocket = run(pipe, **options)[0]
    assert rocket == run(stock, num_inference_steps=4, guidance_scale=1.0, **options)[0]
    own = pipe.scheduler.timesteps.tolist()
    run(pipe, rocket, num_inference_steps=2, strength=0.5)
    assert pipe.scheduler.timesteps.tolist() == own[2:]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(num_inference_steps=0), "num_inference_steps=0 must be at least 1"),
        (dict(strength=0.5), "strength says what to change in a picture, and none is given"),
        (dict(mask_image=MASK), "mask_image says what to change in a picture"),
        (dict(image=picture(0), strength=0.0), "strength=0.0 must be above 0 and at most 1"),
        (dict(image=picture(0), strength=1.1), "strength=1.1 must be above 0 and at most 1"),
        (dict(image=picture(0), strength=0.001), "strength=0.001 leaves fewer than num_inference_steps=4 of 1000 training times"),
    ],
)
def test_bad_input_is_refused(few, given, message):
    few.scheduler = SCHEDULERS["DDIM"](few.scheduler.config)
    with pytest.raises(ValueError, match=message):
        few("x", **given)


def test_schedulers_that_do_not_fit_pictures_are_named(few):
    before = few.scheduler
    for kind, message in (
        (diffusers.EulerAncestralDiscreteScheduler, "EulerAncestralDiscreteScheduler cannot be told where to begin"),
        (diffusers.HeunDiscreteScheduler, "HeunDiscreteScheduler calls the network 2 times per step"),
    ):
        few.scheduler = kind.from_config(before.config)
        run(few)
        with pytest.raises(ValueError, match=message):
            run(few, picture(0))
    few.scheduler = before
