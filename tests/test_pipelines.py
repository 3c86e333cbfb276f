"""Each class in unmodified, tiny, real pipelines beside its twin: latents equal to 1e-5 of their largest entry.

Networks and states are float32 here, so the bound is twenty roundings wide; measured differences lie below 4e-6.
"""

import diffusers
import numpy as np
import pytest
import torch

import diffx
import diffx.testing
from diffx.testing import IMAGE_SIZE, call_inputs, end_of, sample_of, tiny_flux, tiny_sd3, tiny_sdxl, tiny_stable_diffusion

TOLERANCE = 1e-5
SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
STEPS = (4, 12, 50)

# name -> (stock scheduler for betas, our class, our options)
TWINS = {
    "DDIM": (lambda **c: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, **c), diffx.DDIM, {}),
    "DDIM-linspace": (
        lambda **c: diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="linspace", **c),
        diffx.DDIM,
        dict(stock_step=True),
    ),
    "Euler": (lambda **c: diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **c), diffx.Euler, {}),
    "Euler-karras": (lambda **c: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **c), diffx.Euler, {}),
    "DPM2": (lambda **c: diffusers.DPMSolverMultistepScheduler(**c), diffx.DPMSolver, {}),
    "DPM2-karras": (lambda **c: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True, **c), diffx.DPMSolver, {}),
    "DPM3": (
        lambda **c: diffusers.DPMSolverMultistepScheduler(solver_order=3, timestep_spacing="trailing", **c),
        diffx.DPMSolver,
        dict(stock_third_order=True),
    ),
    "SDE2": (lambda **c: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **c), diffx.DPMSolver, {}),
    "UniPC2": (lambda **c: diffusers.UniPCMultistepScheduler(**c), diffx.UniPC, {}),
    "UniPC3": (lambda **c: diffusers.UniPCMultistepScheduler(solver_order=3, timestep_spacing="leading", **c), diffx.UniPC, {}),
}


@pytest.fixture(scope="module")
def sd():
    return tiny_stable_diffusion()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


@pytest.fixture(scope="module")
def sd3():
    return tiny_sd3()


@pytest.fixture(scope="module")
def flux():
    return tiny_flux()


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, scheduler, num_steps=6, **call):
    pipe.scheduler = scheduler
    inputs = call_inputs(pipe)
    if isinstance(pipe, diffusers.StableDiffusionImg2ImgPipeline):  # takes its size from the image
        inputs = {"prompt": inputs["prompt"]}
    call = {**inputs, "num_inference_steps": num_steps, "generator": torch.Generator().manual_seed(4), **call}
    return pipe(**call, output_type="latent").images


def assert_same(pipe, ours, stock, **call):
    got, want = run(pipe, ours, **call), run(pipe, stock, **call)
    assert torch.isfinite(want).all()
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= TOLERANCE, f"relative difference {error:.2e}"


def twins(name, **config):
    build, cls, options = TWINS[name]
    stock = build(**{**SCALED, **config})
    return cls.from_config(stock.config, **options), stock


def photo():
    return torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", TWINS)
def test_stable_diffusion(sd, name, prediction_type):
    for num_steps in STEPS:
        assert_same(sd, *twins(name, prediction_type=prediction_type), num_steps=num_steps, guidance_scale=3.0)


@pytest.mark.parametrize("name", TWINS)
def test_stable_diffusion_xl(sdxl, name):
    for num_steps in STEPS:
        assert_same(sdxl, *twins(name), num_steps=num_steps, guidance_scale=3.0)


def test_sdxl_stops_early_for_a_refiner(sdxl):
    # denoising_end counts `timesteps >= cutoff` on our tensor
    assert_same(sdxl, *twins("UniPC2"), num_steps=10, denoising_end=0.7)


@pytest.mark.parametrize("name", TWINS)
def test_custom_timesteps_where_stock_takes_them(sd, name):
    stock_takes = name.startswith(("Euler", "DPM", "SDE")) and "karras" not in name
    if stock_takes:
        assert_same(sd, *twins(name), num_steps=None, timesteps=[981, 700, 450, 200, 30])
    elif "karras" not in name:
        ours, _ = twins(name)
        if name != "DDIM-linspace":  # stock_step is about Diffusers' own grids
            assert torch.isfinite(run(sd, ours, num_steps=None, timesteps=[981, 700, 450, 200, 30])).all()


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("name", TWINS)
def test_image_to_image(sd, name, strength):
    pipe = quiet(diffusers.StableDiffusionImg2ImgPipeline(**sd.components, requires_safety_checker=False))
    assert_same(pipe, *twins(name), num_steps=8, image=photo(), strength=strength)


@pytest.mark.parametrize("name", TWINS)
def test_inpaint_overwrites_the_known_half_at_every_step(sd, name):
    pipe = quiet(diffusers.StableDiffusionInpaintPipeline(**sd.components, requires_safety_checker=False))
    mask = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    mask[..., IMAGE_SIZE // 2 :] = 1
    for strength in (1.0, 0.6):
        assert_same(pipe, *twins(name), num_steps=8, image=photo(), mask_image=mask, strength=strength)


def bump_once(pipe, index, t, tensors):
    if index == 2:
        tensors["latents"] = tensors["latents"] + 0.5 * torch.sin(tensors["latents"])
    return tensors


def bump_always(pipe, index, t, tensors):
    known = torch.linspace(-1, 1, tensors["latents"].numel()).reshape(tensors["latents"].shape)
    mask = torch.linspace(0, 1, tensors["latents"].shape[-1])
    tensors["latents"] = mask * tensors["latents"] + (1 - mask) * known
    return tensors


@pytest.mark.parametrize("callback", [bump_once, bump_always])
@pytest.mark.parametrize("name", TWINS)
def test_callbacks_that_edit_latents(sd, name, callback):
    assert_same(sd, *twins(name), num_steps=8, callback_on_step_end=callback)


# ---------------------------------------------------------------------------------------------- flow


class UntruncatedDPM(diffusers.DPMSolverMultistepScheduler):
    """The stock class but for one thing: the network is told sigma * T, which stock truncates to an integer."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1].double() * self.config.num_train_timesteps


class UntruncatedUniPC(diffusers.UniPCMultistepScheduler):
    """As above."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.sigmas[:-1].double() * self.config.num_train_timesteps


FLOW_STOCK = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
FLOW_TWINS = {
    "DPM1": (lambda: UntruncatedDPM(solver_order=1, **FLOW_STOCK), diffx.DPMSolver, {}),
    "DPM2": (lambda: UntruncatedDPM(**FLOW_STOCK), diffx.DPMSolver, {}),
    "DPM3": (lambda: UntruncatedDPM(solver_order=3, **FLOW_STOCK), diffx.DPMSolver, dict(stock_third_order=True)),
    "UniPC2": (lambda: UntruncatedUniPC(**FLOW_STOCK), diffx.UniPC, {}),
    "UniPC3": (lambda: UntruncatedUniPC(solver_order=3, **FLOW_STOCK), diffx.UniPC, {}),
}


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_flow_euler(which, request):
    pipe = request.getfixturevalue(which)
    for config in (dict(shift=3.0), dict(shift=1.0), dict(shift=3.0, use_dynamic_shifting=True), dict(use_karras_sigmas=True)):
        stock = diffusers.FlowMatchEulerDiscreteScheduler(**config)
        for num_steps in STEPS:
            assert_same(pipe, diffx.Euler.from_config(stock.config), stock, num_steps=num_steps)


@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_flow_euler_with_given_sigmas_and_callbacks(which, request):
    pipe = request.getfixturevalue(which)
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert_same(pipe, diffx.Euler.from_config(stock.config), stock, num_steps=5, sigmas=[0.95, 0.8, 0.5, 0.3, 0.1])
    for callback in (bump_once, bump_always):
        assert_same(pipe, diffx.Euler.from_config(stock.config), stock, callback_on_step_end=callback)


@pytest.mark.parametrize("cls", [diffx.Euler, diffx.DDIM])
@pytest.mark.parametrize("strength", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("which", ["sd3", "flux"])
def test_flow_image_to_image(which, strength, cls, request):
    source = request.getfixturevalue(which)
    wanted = {"sd3": diffusers.StableDiffusion3Img2ImgPipeline, "flux": diffusers.FluxImg2ImgPipeline}[which]
    components = {k: v for k, v in source.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = quiet(wanted(**components))
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = cls.from_config(stock.config, **(dict(clip_sample=False) if cls is diffx.DDIM else {}))
    assert_same(pipe, ours, stock, num_steps=8, image=photo(), strength=strength)


@pytest.mark.parametrize("which", ["sd3", "flux"])
@pytest.mark.parametrize("name", FLOW_TWINS)
def test_flow_multistep(which, name, request):
    """Ours is given stock's grid, already shifted; Flux hands no explicit grid to schedulers that have use_flow_sigmas."""
    pipe = request.getfixturevalue(which)
    build, cls, options = FLOW_TWINS[name]
    for num_steps in STEPS:
        stock = build()
        stock.set_timesteps(num_steps)
        grid = stock.sigmas[:-1].tolist()
        want = run(pipe, FlowMu(stock) if which == "flux" else stock, num_steps=num_steps)
        ours = cls.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0).config, **options, **solver_words(stock))
        got = run(pipe, ours, num_steps=num_steps, sigmas=grid)
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error <= TOLERANCE, f"relative difference {error:.2e} with {num_steps} calls"


def solver_words(stock):
    return {k: stock.config[k] for k in ("solver_order", "solver_type", "lower_order_final")}


def FlowMu(stock):
    """Flux always passes ``mu``, which the stock classes take with dynamic shifting only; drop it."""

    class WithoutMu(type(stock)):
        def set_timesteps(self, num_inference_steps=None, device=None, mu=None):
            super().set_timesteps(num_inference_steps, device=device)

    return WithoutMu.from_config(stock.config)


@pytest.mark.parametrize("which", ["sd3", "flux"])
@pytest.mark.parametrize("cls", [diffx.DDIM, diffx.Euler, diffx.DPMSolver, diffx.UniPC])
def test_swap_on_a_flow_pipeline_needs_no_option(which, cls, request):
    """from_config of the pipeline's own scheduler runs, and with one call all classes are Euler."""
    pipe = request.getfixturevalue(which)
    config = {"sd3": tiny_sd3, "flux": tiny_flux}[which]().scheduler.config
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    ours = cls.from_config(config, **(dict(clip_sample=False) if cls is diffx.DDIM else {}))
    assert torch.isfinite(run(pipe, ours, num_steps=7)).all()
    assert_same(pipe, ours, stock, num_steps=1)


@pytest.mark.parametrize("which", ["sd", "sdxl", "sd3", "flux"])
def test_default_run_is_bit_reproducible_and_seeded(which, request):
    pipe = request.getfixturevalue(which)
    scheduler = diffx.UniPC.from_config(pipe.scheduler.config)
    first, again = run(pipe, scheduler), run(pipe, scheduler)
    other = run(pipe, scheduler, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, again) and not torch.equal(first, other)


BUILDS = [getattr(diffx.testing, name) for name in diffx.testing.__all__ if name.startswith("tiny_")]


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_the_tiny_pipelines_are_what_they_say(build):
    one, two, other = build(), build(), build(seed=1)
    net = "unet" if "unet" in one.components else "transformer"
    weights = [torch.cat([p.flatten() for p in pipe.components[net].parameters()]) for pipe in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    noise = lambda: [torch.Generator().manual_seed(0) for _ in range(2)]  # noqa: E731
    ends = end_of(one, **call_inputs(one, batch_size=2), num_inference_steps=2, generator=noise())
    assert torch.isfinite(ends).all() and not torch.equal(ends[0], ends[1])  # same noise, two prompts
    others = end_of(one, **call_inputs(one, batch_size=2, seed=1), num_inference_steps=2, generator=noise())
    assert len({end.numpy().tobytes() for end in (*ends, *others)}) == 4
    alone = sample_of(call_inputs(one, batch_size=2), 1)
    assert end_of(one, **alone, num_inference_steps=2, generator=noise()[:1]).shape == ends[:1].shape


def test_pictures_have_the_size_they_say():
    for build in (tiny_stable_diffusion, tiny_sdxl, tiny_sd3, tiny_flux):
        pipe = build()
        image = pipe(**call_inputs(pipe, batch_size=2), num_inference_steps=2, output_type="np").images
        assert image.shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3) and np.isfinite(image).all()


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_sdxl, tiny_sd3, tiny_flux])
def test_the_tiny_pipelines_save_and_load(build, tmp_path):
    pipe = build()
    want = run(pipe, pipe.scheduler, num_steps=2)
    pipe.save_pretrained(tmp_path)
    again = quiet(type(pipe).from_pretrained(tmp_path))
    assert torch.equal(run(again, again.scheduler, num_steps=2), want)
