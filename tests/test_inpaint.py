"""Soft inpainting and outpainting: what is kept is kept bit for bit, and what may change changes as much as it may."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import diffx
from diffx.conditioning.inpaint import SoftInpaint, outpaint
from diffx.loading import load_pipeline
from diffx.testing import call_inputs, end_of, tiny_sd3, tiny_sdxl, tiny_stable_diffusion
from diffx.testing.parts import IMAGE_SIZE, quiet

SIDE = IMAGE_SIZE
LEFT = (torch.arange(SIDE) < SIDE // 2).float().expand(SIDE, SIDE)
PIPELINES = {
    "Stable Diffusion": lambda: diffusers.StableDiffusionImg2ImgPipeline.from_pipe(tiny_stable_diffusion()),
    "inpainting": lambda: diffusers.StableDiffusionInpaintPipeline.from_pipe(tiny_stable_diffusion()),
    "text to image": tiny_stable_diffusion,
    "SDXL": lambda: diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(tiny_sdxl()),
    "Stable Diffusion 3": lambda: diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(tiny_sd3()),
}
SCHEDULERS = (
    diffusers.HeunDiscreteScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffx.UniPC,
    diffx.Euler,
)


def photo():
    return torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))


def run(pipe, callback=None, strength=1.0, steps=4):
    inputs = call_inputs(pipe, 2)
    if "image" in inputs:
        inputs |= {"image": photo().expand(2, -1, -1, -1), "strength": strength}
    generator = torch.Generator().manual_seed(0)
    return end_of(pipe, **inputs, num_inference_steps=steps, guidance_scale=3.0, generator=generator, callback_on_step_end=callback)


def check(pipe, strength=1.0):
    free = run(pipe, strength=strength)
    assert torch.equal(run(pipe, SoftInpaint(pipe, photo(), torch.ones(SIDE, SIDE)), strength), free)
    nothing = SoftInpaint(pipe, photo(), torch.zeros(SIDE, SIDE))
    assert torch.equal(run(pipe, nothing, strength), nothing.kept.expand(2, -1, -1, -1))
    half = SoftInpaint(pipe, photo(), 1 - LEFT)
    made = run(pipe, half, strength)
    middle = made.shape[-1] // 2
    assert torch.equal(made[..., :middle], half.kept[..., :middle].expand(2, -1, -1, -1))
    assert not torch.isclose(made[..., middle:], half.kept[..., middle:]).all(1).any()


@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
def test_what_is_kept_is_kept_bit_for_bit_and_the_rest_is_free(build):
    check(quiet(build()))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda each: each.__name__)
def test_under_every_kind_of_sampler(scheduler):
    pipe = quiet(PIPELINES["Stable Diffusion"]())
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    check(pipe)
    check(pipe, strength=0.75)


def test_what_is_held_is_at_the_level_of_the_next_call():
    pipe, seen = quiet(PIPELINES["Stable Diffusion"]()), []
    soft = SoftInpaint(pipe, photo(), torch.zeros(SIDE, SIDE), seed=5)

    def watched(pipe, step, t, given):
        seen.append(soft(pipe, step, t, given)["latents"])
        return {"latents": seen[-1]}

    run(pipe, watched)
    noise = torch.randn(soft.kept.shape, generator=torch.Generator().manual_seed(5))
    for latents, t in zip(seen[:-1], pipe.scheduler.timesteps[1:]):
        alpha = pipe.scheduler.alphas_cumprod[t] ** 0.5
        torch.testing.assert_close(latents[:1], alpha * soft.kept + (1 - alpha**2) ** 0.5 * noise)  # float32, another order


def test_change_grows_with_the_map():
    # Embedded model: the same wish, picture and noises under five maps, each the same everywhere.
    source = quiet(load_pipeline(device="cpu"))
    image = source("red apple", num_inference_steps=8, guidance_scale=3.0, generator=torch.Generator().manual_seed(0)).images[0]
    pipe, moved = quiet(diffusers.StableDiffusionImg2ImgPipeline.from_pipe(source)), []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        soft = SoftInpaint(pipe, image, np.full((32, 32), share, np.float32))
        call = dict(num_inference_steps=8, strength=1.0, output_type="latent", generator=torch.Generator().manual_seed(1))
        made = pipe(["tangerine"] * 4, image=[image] * 4, callback_on_step_end=soft, guidance_scale=1.0, **call).images
        moved.append(float((made - soft.kept).abs().mean()))
    assert moved[0] == 0
    assert moved == sorted(moved) and moved[-1] > 2 * moved[1], moved  # measured: 0.3 to 0.8


def test_outpainting_adds_and_fades():
    old = Image.fromarray((photo().permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    canvas, change = outpaint(old, right=8, top=4, feather=3)
    assert canvas.size == change.size == (SIDE + 8, SIDE + 4)
    canvas, change = np.asarray(canvas), np.asarray(change)
    assert (canvas[4:, :SIDE] == np.asarray(old)).all()
    assert (canvas[4:, SIDE:] == np.asarray(old)[:, -1:]).all()  # continues the edge
    assert (change[:4] == 255).all() and (change[:, SIDE:] == 255).all()
    assert change[-1, SIDE - 5 : SIDE + 1].tolist() == [0, 0, 64, 128, 191, 255]  # quarters of 255, rounded
    hard = np.asarray(outpaint(old, left=2)[1])
    assert set(np.unique(hard)) == {0, 255} and (hard[:, :2] == 255).all() and (hard[:, 2:] == 0).all()


def test_outpainted_pictures_keep_their_old_latents():
    pipe = quiet(PIPELINES["Stable Diffusion"]())
    canvas, change = outpaint(Image.fromarray((photo().permute(1, 2, 0).numpy() * 255).astype(np.uint8)), right=8, feather=2)
    soft = SoftInpaint(pipe, canvas, change)
    made = pipe(
        "no 1", image=canvas, strength=1.0, num_inference_steps=3, callback_on_step_end=soft, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    assert made.shape[-2:] == (8, 12)
    assert torch.equal(made[..., :7], soft.kept[..., :7])  # the eighth column of two pixels fades
    assert not torch.equal(made[..., 8:], soft.kept[..., 8:])


def test_bad_input():
    pipe, image = tiny_stable_diffusion(), Image.new("RGB", (SIDE, SIDE))
    for make, message in (
        (lambda: SoftInpaint(pipe, photo(), torch.ones(8, 8)), "the map of changes has 8 x 8 pixels and the picture 16 x 16"),
        (lambda: SoftInpaint(pipe, photo(), LEFT * 3), "change has values from 0 to 3"),
        (lambda: SoftInpaint(pipe, photo() - 2, LEFT), "must lie between 0 and 1"),
        (lambda: outpaint(image), "nothing to add"),
        (lambda: outpaint(image, left=-1), "must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    small = SoftInpaint(pipe, torch.rand(3, 8, 8), torch.ones(8, 8))
    with pytest.raises(ValueError, match="the picture's latents are"):
        run(quiet(pipe), small)
