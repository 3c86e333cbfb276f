"""Guidance in ordinary pipelines: the hook against the pipelines' own guidance bit for bit, the rules against their formulas."""

import importlib
import math
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import guiders
from diffusers.guiders.guider_utils import BaseGuidance, rescale_noise_cfg

import diffx
from diffx.guidance import (
    APG,
    CFG,
    CFGPlusPlus,
    CFGZeroStar,
    ClassifierGuidance,
    DynamicThresholding,
    Interval,
    LossGuidance,
    Moment,
    NoisyClassifier,
    Ramp,
    Rescale,
    Rule,
    train_classifier,
)
from diffx.guidance.run import Run
from diffx.oracle import Mixture
from diffx.testing import (
    call_inputs,
    end_of,
    tiny_controlnet,
    tiny_flux,
    tiny_latent_consistency,
    tiny_latent_upscale,
    tiny_pixart,
    tiny_sd3,
    tiny_sdxl,
    tiny_stable_diffusion,
    tiny_svd,
)
from diffx.testing.parts import WIDTH, quiet

ROOT = Path(__file__).parent.parent
SCALE = 3.0


def with_ip_adapter(pipe=None):
    """Stable Diffusion with an IP-Adapter of random weights, put in by Diffusers' own loader."""
    pipe = pipe or tiny_stable_diffusion()
    rng = torch.Generator().manual_seed(1)
    tokens, embedded = 4, 12

    def normal(*shape):
        return torch.randn(shape, generator=rng) * 0.2

    names = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    keys = [pipe.unet.state_dict()[name.removesuffix("processor") + "to_k.weight"].shape for name in names]
    adapter = {f"{2 * i + 1}.to_{kind}_ip.weight": normal(*shape) for i, shape in enumerate(keys) for kind in "kv"}
    projection = {"proj.weight": normal(tokens * WIDTH, embedded), "proj.bias": normal(tokens * WIDTH)}
    projection |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}], low_cpu_mem_usage=False)
    return pipe


def inputs_of(pipe):
    made = call_inputs(pipe, batch_size=2)
    if getattr(pipe, "unet", None) is not None and pipe.unet.encoder_hid_proj is not None:
        made["ip_adapter_image_embeds"] = [
            torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(2))
        ]  # of nothing, and of a picture
    return made


def run(pipe, scale, *, steps=3, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    return end_of(pipe, **inputs_of(pipe), num_inference_steps=steps, guidance_scale=scale, generator=generator, **more)


def of(cls, source):
    return lambda: quiet(cls.from_pipe(source()))


PIPELINES = {
    "Stable Diffusion": tiny_stable_diffusion,
    "image to image": of(diffusers.StableDiffusionImg2ImgPipeline, tiny_stable_diffusion),
    "inpainting": of(diffusers.StableDiffusionInpaintPipeline, tiny_stable_diffusion),
    "ControlNet": tiny_controlnet,
    "IP-Adapter": with_ip_adapter,
    "SDXL": tiny_sdxl,
    "SDXL, image to image": of(diffusers.StableDiffusionXLImg2ImgPipeline, tiny_sdxl),
    "SDXL, inpainting": of(diffusers.StableDiffusionXLInpaintPipeline, tiny_sdxl),
    "Stable Diffusion 3": tiny_sd3,
    "Stable Diffusion 3, image to image": of(diffusers.StableDiffusion3Img2ImgPipeline, tiny_sd3),
}
SCHEDULERS = {
    "Heun": diffusers.HeunDiscreteScheduler,
    "DPMSolver": diffusers.DPMSolverMultistepScheduler,
    "PNDM": diffusers.PNDMScheduler,  # calls twice at its second time
    "ours": diffx.UniPC,
}


def network_of(pipe):
    return pipe.components.get("unet") or pipe.transformer


def hooks(pipe):
    """Everything that torch and instances can hang on the modules of a network."""
    return [
        (name, sorted(vars(module)), [list(getattr(module, kind)) for kind in vars(module) if kind.endswith(("_hooks", "_kwargs"))])
        for name, module in network_of(pipe).named_modules()
    ]


# the hook


@pytest.mark.parametrize("build", PIPELINES.values(), ids=PIPELINES)
def test_the_hook_is_the_pipelines_own_guidance_whatever_its_scale_and_leaves_nothing(build):
    pipe = build()
    before, components = hooks(pipe), dict(pipe.components)
    stock, other = run(pipe, SCALE), run(pipe, 9.0)
    with diffx.guide(pipe, CFG(SCALE)) as guided:
        # The same formula on the same bits, and g + s (g - g) = g: no tolerance.
        assert torch.equal(run(pipe, 9.0), stock)
        assert torch.equal(run(pipe, 1.5), stock)
    calls = guided.calls // 2
    assert (guided.calls, guided.uncond_calls) == (2 * calls, 2 * calls)
    with diffx.guide(pipe, CFG(1.0)) as guided:  # half the batch, as an unguided pipeline makes it
        half = run(pipe, 9.0)
    assert (guided.calls, guided.uncond_calls) == (calls, 0)
    assert not torch.equal(stock, other)
    if "ip_adapter_image_embeds" not in inputs_of(pipe):  # which an unguided pipeline takes without those of nothing
        # A ControlNet still sees both halves, and in batches of another size the last bits of float32 may differ.
        torch.testing.assert_close(half, run(pipe, 1.0), rtol=1e-3, atol=1e-4)
    assert torch.equal(run(pipe, SCALE), stock) and torch.equal(run(pipe, 9.0), other)
    assert hooks(pipe) == before
    assert all(pipe.components[name] is part for name, part in components.items())


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_the_hook_knows_runs_and_calls_of_every_kind_of_sampler(scheduler):
    pipe = tiny_stable_diffusion()
    more = {"skip_prk_steps": True} if scheduler is diffusers.PNDMScheduler else {}  # as Stable Diffusion has it
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **more)
    stock, seen = run(pipe, SCALE), []

    class Watching(Rule):
        def __call__(self, cond, uncond, moment):
            seen.append((moment.call, moment.run, float(moment.t)))
            return CFG(SCALE)(cond, uncond, moment)

    with diffx.guide(pipe, Watching()):
        assert torch.equal(run(pipe, 5.0), stock)
        assert torch.equal(run(pipe, 5.0), stock)
    half = len(seen) // 2
    assert [call for call, _, _ in seen] == 2 * list(range(half))
    assert seen[0][1] is seen[half - 1][1] is not seen[half][1]
    assert seen[0][1].num_calls == half == len(pipe.scheduler.timesteps)
    assert [t for _, _, t in seen] == 2 * pipe.scheduler.timesteps.tolist()


def test_a_run_that_begins_in_the_middle_counts_its_own_calls():
    pipe = PIPELINES["image to image"]()
    runs = []

    class Watching(Rule):
        def __call__(self, cond, uncond, moment):
            runs.append((moment.call, moment.run.num_calls, moment.level.t[0], moment.next_level.t[0]))
            return cond

    with diffx.guide(pipe, Watching()):
        run(pipe, 5.0, steps=4)  # strength 0.75: three of the four
    times = pipe.scheduler.timesteps.tolist()
    assert runs == [(0, 3, times[1], times[2]), (1, 3, times[2], times[3]), (2, 3, times[3], 0.0)]


def test_an_error_inside_detaches_and_attach_detach_do_what_with_does():
    pipe = tiny_stable_diffusion()
    before, stock = hooks(pipe), run(pipe, SCALE)

    class Broken(Rule):
        def __call__(self, cond, uncond, moment):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"), diffx.guide(pipe, Broken()):
        run(pipe, SCALE)
    assert hooks(pipe) == before
    guided = diffx.guide(pipe, CFG(SCALE)).attach()
    assert torch.equal(run(pipe, 9.0), stock)
    guided.detach()
    guided.detach()  # nothing is left to do
    assert hooks(pipe) == before


def test_outputs_keep_their_type():
    pipe = tiny_stable_diffusion()
    told = dict(timestep=10, encoder_hidden_states=torch.zeros(2, 8, WIDTH))
    pipe.scheduler.set_timesteps(4)
    pipe._guidance_scale = 5.0  # as inside a call
    with torch.no_grad(), diffx.guide(pipe, CFG(1.0)):
        x = torch.ones(2, 4, 8, 8)
        named, plain = pipe.unet(x, **told), pipe.unet(x, **told, return_dict=False)
    assert type(named).__name__ == "UNet2DConditionOutput" and isinstance(plain, tuple)
    assert torch.equal(named.sample, plain[0]) and named.sample.shape == (2, 4, 8, 8)


def test_half_precision_keeps_its_type():
    pipe = tiny_stable_diffusion().to(torch.bfloat16)
    stock = run(pipe, SCALE)
    with diffx.guide(pipe, CFG(SCALE)):
        assert torch.equal(run(pipe, 9.0), stock)

    def size(x0):
        return x0.square().flatten(1).sum(1)

    around = Rescale(CFG(SCALE)), DynamicThresholding(CFG(SCALE)), LossGuidance(size, 0.01, CFG(SCALE), through_network=True)
    for rule in (APG(SCALE), CFGZeroStar(SCALE), CFGPlusPlus(0.6), *around):
        with diffx.guide(pipe, rule):
            found = run(pipe, 9.0)
        assert found.dtype == torch.bfloat16 and torch.isfinite(found).all(), rule


# what cannot work


@pytest.mark.parametrize(
    ("build", "rule", "message"),
    [
        (tiny_flux, CFG(3.0), "Flux has one prediction"),
        (tiny_svd, CFG(3.0), "has a UNetSpatioTemporalConditionModel"),
        (tiny_pixart, CFG(3.0), "has a PixArtTransformer2DModel"),
        (tiny_stable_diffusion, diffx.objectives.Guidance(), "is no guidance rule"),
        (tiny_stable_diffusion, 5.0, "is no guidance rule"),
    ],
)
def test_refused_before_any_call(build, rule, message):
    with pytest.raises(ValueError, match=message):
        diffx.guide(build(), rule)


def test_refused_before_the_first_step():
    pipe = tiny_stable_diffusion()
    steps = []

    def refused(pipe, rule, message, scale=5.0, **more):
        step, pipe.scheduler.step = pipe.scheduler.step, lambda *args, **kwargs: steps.append(args)
        try:
            with pytest.raises(ValueError, match=message), diffx.guide(pipe, rule):
                run(pipe, scale, **more)
        finally:
            pipe.scheduler.step = step

    refused(pipe, CFG(3.0), "runs without guidance", scale=1.0)
    refused(pipe, Interval(CFG(3.0), high=1.0), "runs without guidance", scale=1.0)  # not only at the call that would need it
    refused(pipe, CFG(3.0), "guidance_rescale=0.7 would rescale", guidance_rescale=0.7)
    refused(tiny_latent_consistency(), CFG(3.0), "if it is no distilled model")
    refused(tiny_latent_upscale(), CFG(3.0), "runs without guidance")
    refused(pipe, CFGZeroStar(3.0, zero_calls=1), "this one predicts epsilon")
    pipe.scheduler = diffusers.EDMEulerScheduler()
    refused(pipe, APG(3.0), "preconditioned as EDM's")
    assert steps == []
    assert not pipe.unet._forward_hooks


def test_three_parts_in_a_batch_are_refused():
    unet = tiny_stable_diffusion().unet
    wide = type(unet).from_config(unet.config, in_channels=8).eval()
    parts = {**tiny_stable_diffusion().components, "unet": wide}
    pipe = quiet(diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False))
    with pytest.raises(ValueError, match="not the same half twice"), diffx.guide(pipe, CFG(3.0)):
        pipe("no 1", image=torch.rand(1, 3, 16, 16), num_inference_steps=2, output_type="latent")


def test_a_pipeline_with_more_guidance_of_its_own_is_refused():
    pipe = tiny_sd3()
    with pytest.raises(ValueError, match="for guidance of its own"), diffx.guide(pipe, CFG(3.0)):
        run(pipe, 5.0, steps=4, skip_guidance_layers=[0], skip_layer_guidance_start=-1.0)


def test_a_network_is_guided_once():
    pipe = tiny_stable_diffusion()
    with diffx.guide(pipe, CFG(3.0)), pytest.raises(ValueError, match="guided already"):
        diffx.guide(pipe, APG(3.0)).attach()


# Diffusers' guiders

GUIDERS = {
    "ClassifierFreeGuidance": {},
    "AdaptiveProjectedGuidance": dict(adaptive_projected_guidance_momentum=-0.5),
    "AdaptiveProjectedMixGuidance": dict(adaptive_projected_guidance_start_step=1),
    "ClassifierFreeZeroStarGuidance": dict(zero_init_steps=0),
    "TangentialClassifierFreeGuidance": {},
}
REFUSED = {
    "AutoGuidance": (dict(auto_guidance_layers=[0], dropout=0.1), "changes the network"),
    "LTX2Guidance": ({}, "combines pred_cond"),
    "PerturbedAttentionGuidance": (dict(perturbed_guidance_layers=[0]), "combines pred_cond"),
    "SkipLayerGuidance": (dict(skip_layer_guidance_layers=[0]), "combines pred_cond"),
    "SmoothedEnergyGuidance": (dict(seg_guidance_layers=[0]), "combines pred_cond"),
}
NOT_HERE = {
    "FrequencyDecoupledGuidance": (ImportError, "kornia"),  # which the tests' environment does not have
    "MagnitudeAwareGuidance": (RuntimeError, "matrix_norm: dim must be a 2-tuple"),  # Diffusers 0.42 asks torch for a norm it refuses
}


def all_guiders():
    found = [kind for kind in vars(guiders).values() if isinstance(kind, type) and issubclass(kind, BaseGuidance)]
    return {kind.__name__: kind for kind in found if kind is not BaseGuidance}


def test_every_guider_of_diffusers_runs_or_is_refused_by_name():
    assert set(all_guiders()) == {*GUIDERS, *REFUSED, *NOT_HERE}


@pytest.mark.parametrize("name", NOT_HERE)
def test_guiders_that_do_not_run_here_do_not_run_in_diffusers_either(name):
    error, message = NOT_HERE[name]
    with pytest.raises(error, match=message):
        all_guiders()[name]().forward(torch.ones(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guider_that_needs_predictions_only_runs(name):
    pipe, options = tiny_stable_diffusion(), GUIDERS[name] | dict(guidance_scale=SCALE)
    expected, kept = [], []

    class By(Rule):  # the guider by hand, as Diffusers' modular pipelines drive it
        def __init__(self):
            self.guider = all_guiders()[name](**options)

        def __call__(self, cond, uncond, moment):
            self.guider.set_state(moment.call, moment.run.num_calls, moment.t)
            self.guider.prepare_inputs({})
            return self.guider.forward(cond, uncond).pred

    with diffx.guide(pipe, By()):
        expected = run(pipe, 9.0)
    guider = all_guiders()[name](**options)
    with diffx.guide(pipe, guider) as guided:
        kept = [run(pipe, 9.0), run(pipe, 9.0)]  # the second begins anew
    assert torch.equal(kept[0], expected) and torch.equal(kept[1], expected)
    assert guided.uncond_calls == guided.calls == 6
    assert guider._step is None  # it is the user's, and as it was
    if name == "ClassifierFreeGuidance":
        assert torch.equal(expected, run(pipe, SCALE))


def test_a_guider_with_an_interval_saves_the_other_half():
    pipe = tiny_stable_diffusion()
    with diffx.guide(pipe, guiders.ClassifierFreeGuidance(SCALE, start=0.5)) as guided:
        run(pipe, 9.0, steps=4)
    assert (guided.calls, guided.uncond_calls) == (4, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_guiders_that_need_more_are_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        diffx.guide(tiny_stable_diffusion(), all_guiders()[name](**options))


# rules against their formulas

LEVELS = {
    "epsilon": diffusers.DDIMScheduler(steps_offset=1),
    "v, zero terminal SNR": diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "sample": diffusers.DDIMScheduler(prediction_type="sample"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
}


def moment_of(scheduler, call=1, calls=4, batch=3, shape=(2, 4, 4), network=None):
    scheduler.set_timesteps(calls)
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(call))
    return Moment(x, scheduler.timesteps[call], call, Run(scheduler, calls), network or (lambda x: x))


def pair(moment):
    rng = torch.Generator().manual_seed(5)
    return torch.randn(moment.x.shape, generator=rng), torch.randn(moment.x.shape, generator=rng)


each_level = pytest.mark.parametrize("scheduler", LEVELS.values(), ids=LEVELS)


@each_level
def test_clean_samples_and_moves_are_inverse(scheduler):
    moment = moment_of(scheduler)
    out, by = pair(moment)
    assert torch.equal(moment.moved(out, torch.zeros_like(by)), out)
    # float32, with factors alpha / sigma up to about 10
    torch.testing.assert_close(moment.x0(moment.moved(out, by)), moment.x0(out) + by, rtol=1e-4, atol=1e-5)


@each_level
def test_projected_guidance_without_its_parts_is_classifier_free_guidance(scheduler):
    moment = moment_of(scheduler)
    cond, uncond = pair(moment)
    plain = APG(4.0, eta=1.0, momentum=0.0)(cond, uncond, moment)
    torch.testing.assert_close(plain, CFG(4.0)(cond, uncond, moment), rtol=1e-4, atol=1e-4)  # float32 there and back


def test_projected_guidance_is_its_algorithm():
    moment, scale, eta, limit, beta = moment_of(LEVELS["epsilon"]), 5.0, 0.3, 2.0, -0.5
    rule, running = APG(scale, eta, limit, beta), 0.0
    for sign in (1, -1):  # two calls of one run, of other predictions
        cond, uncond = (sign * out for out in pair(moment))
        x0 = moment.x0(cond)
        running = x0 - moment.x0(uncond) + beta * running
        goals = []
        for own, difference in zip(x0, running):
            difference = difference * min(1.0, limit / float(difference.norm()))
            unit = own / own.norm()
            parallel = (difference * unit).sum() * unit
            goals.append(own + (scale - 1) * (difference - parallel + eta * parallel))
        torch.testing.assert_close(moment.x0(rule(cond, uncond, moment)), torch.stack(goals), rtol=1e-4, atol=1e-4)  # float32


def test_zero_star_leaves_nothing_of_the_unconditional_in_the_difference():
    moment = moment_of(LEVELS["flow"])
    cond, uncond = pair(moment)
    found = CFGZeroStar(3.0)(cond, uncond, moment)
    difference = ((found - cond) / 2).flatten(1)  # g = c + (w - 1) (c - s u)
    along = (difference * uncond.flatten(1)).sum(1)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-4)  # float32 sums of 32 numbers
    assert torch.equal(CFGZeroStar(3.0, zero_calls=2)(cond, uncond, moment), torch.zeros_like(cond))
    assert not torch.equal(CFGZeroStar(3.0, zero_calls=1)(cond, uncond, moment), torch.zeros_like(cond))


@pytest.mark.parametrize("name", ["epsilon", "v, zero terminal SNR"])
def test_plus_plus_is_its_algorithm_in_ddim(name):
    # By hand: the guided clean samples, noised again with the unconditional noise, step by step.
    scheduler = diffusers.DDIMScheduler(**LEVELS[name].config | dict(clip_sample=False, timestep_spacing="trailing"))
    mixing, calls, weights = 0.6, 5, torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(3)) * 0.4

    def predictions(x):
        return (torch.einsum("ij,bjhw->bihw", w, x).tanh() for w in weights)

    start = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(4))
    x = by_hand = start
    scheduler.set_timesteps(calls)
    run = Run(scheduler, calls)
    for call, t in enumerate(scheduler.timesteps):
        cond, uncond = predictions(x)
        moment = Moment(x, t, call, run, None)
        x = scheduler.step(CFGPlusPlus(mixing)(cond, uncond, moment), t, x).prev_sample
        cond, uncond = predictions(by_hand)
        moment = Moment(by_hand, t, call, run, None)
        (a, s), (a1, s1) = ((float(level.alpha[0]), float(level.sigma[0])) for level in (moment.level, moment.next_level))
        x0, x0_null = moment.x0(cond), moment.x0(uncond)
        by_hand = a1 * torch.lerp(x0_null, x0, mixing) + s1 * (by_hand - a * x0_null) / s
    torch.testing.assert_close(x, by_hand, rtol=1e-4, atol=1e-4)  # float32 and Diffusers' float32 tables


def test_plus_plus_needs_falling_noise():
    pipe = tiny_stable_diffusion()
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="noise falls from call to call"), diffx.guide(pipe, CFGPlusPlus(0.6)):
        run(pipe, 5.0)


def test_rescale_is_the_pipelines_own():
    pipe = tiny_stable_diffusion()
    stock = run(pipe, 5.0, guidance_rescale=0.7)
    with diffx.guide(pipe, Rescale(CFG(5.0), 0.7)):
        assert torch.equal(run(pipe, 9.0), stock)
    moment = moment_of(LEVELS["epsilon"])
    cond, uncond = pair(moment)
    guided = CFG(5.0)(cond, uncond, moment)
    assert torch.equal(Rescale(CFG(5.0), 0.4)(cond, uncond, moment), rescale_noise_cfg(guided, cond, 0.4))


@each_level
def test_thresholding_bounds_what_is_too_large_and_nothing_else(scheduler):
    moment = moment_of(scheduler)
    cond, uncond = pair(moment)
    x0 = moment.x0(CFG(8.0)(cond, uncond, moment))
    bound = float(x0.flatten(1).abs().quantile(0.9, dim=1).sort().values[1])  # one of the three samples is within it
    found = moment.x0(DynamicThresholding(CFG(8.0), 0.9, bound)(cond, uncond, moment))
    for one, was in zip(found, x0):
        limit = float(was.abs().flatten().quantile(0.9))
        goal = was.clamp(-limit, limit) * bound / limit if limit > bound * (1 + 1e-6) else was
        torch.testing.assert_close(one, goal, rtol=1e-3, atol=1e-3 * limit)  # float32 there and back


def test_scales_ramp_from_end_to_end():
    shares = [moment_of(LEVELS["epsilon"], call).progress for call in range(4)]
    assert shares == [0, 1 / 3, 2 / 3, 1]
    assert [Ramp(1.0, 7.0).at(share) for share in shares] == pytest.approx([1, 3, 5, 7])
    assert [Ramp(1.0, 7.0, "cosine").at(share) for share in shares] == pytest.approx([1, 2.5, 5.5, 7])
    pipe = tiny_stable_diffusion()
    with diffx.guide(pipe, CFG(Ramp(SCALE, SCALE))):
        ramped = run(pipe, 9.0)
    assert torch.equal(ramped, run(pipe, SCALE))


def test_an_interval_guides_inside_it_alone_and_saves_the_rest():
    pipe, sigmas, guided_at = tiny_stable_diffusion(), [], []
    sigma_of = np.sqrt(1 / pipe.scheduler.alphas_cumprod.double().numpy() - 1)

    class Watching(Rule):
        def __call__(self, cond, uncond, moment):
            sigmas.append(moment.sigma)
            guided_at.append(moment.call)
            return CFG(SCALE)(cond, uncond, moment)

    with diffx.guide(pipe, Interval(Watching(), 0.5, 5.0)) as guided:
        run(pipe, 9.0, steps=8)
    expected = [k for k, t in enumerate(pipe.scheduler.timesteps.tolist()) if 0.5 < sigma_of[t] <= 5.0]
    assert guided_at == expected and 0 < len(expected) < 8
    assert (guided.calls, guided.uncond_calls) == (8, len(expected))
    assert sigmas == pytest.approx(sigma_of[pipe.scheduler.timesteps.numpy()[expected]])
    with diffx.guide(pipe, Interval(CFG(SCALE))):
        whole = run(pipe, 9.0)
    assert torch.equal(whole, run(pipe, SCALE))


@pytest.mark.parametrize("name", ["ControlNet", "IP-Adapter", "SDXL", "Stable Diffusion 3", "inpainting"])
def test_a_saved_half_is_the_conditional_half(name):
    # What the network is told besides the sample is halved, too: the other half is made, looked at and dropped instead.
    pipe = PIPELINES[name]()

    class Dropping(Rule):
        def __call__(self, cond, uncond, moment):
            return cond

    with diffx.guide(pipe, Dropping()) as dropping:
        whole = run(pipe, 9.0)
    with diffx.guide(pipe, CFG(1.0)) as saving:
        half = run(pipe, 9.0)
    assert (dropping.uncond_calls, saving.uncond_calls) == (dropping.calls, 0)
    # Batches of 2 and of 4 may differ in the last bits of float32.
    torch.testing.assert_close(half, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFGPlusPlus(5.0), "must lie between 0 and 1"),
        (lambda: APG(norm_threshold=0.0), "must be positive; inf switches it off"),
        (lambda: APG(momentum=1.0), "must lie between -1 and 1"),
        (lambda: Interval(CFG(), 2.0, 1.0), "0 <= low < high"),
        (lambda: Rescale(CFG(), 2.0), "must lie between 0 and 1"),
        (lambda: DynamicThresholding(CFG(), quantile=0.0), "must lie between 0 and 1"),
        (lambda: DynamicThresholding(CFG(), bound=0.0), "must be positive"),
        (lambda: Ramp(1.0, 2.0, "square"), "not one of linear, cosine"),
    ],
)
def test_numbers_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# gradients

DATA = Mixture(torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), std=0.4)


def log_odds(x, level):
    """(B, 3) exact log p(component, x): the posterior of a mixture's components, up to a constant."""
    alpha, sigma = (torch.as_tensor(part).view(-1, 1) for part in (level.alpha, level.sigma))
    away = x[:, None].double() - alpha[..., None, None, None] * DATA.means
    return -away.square().flatten(2).sum(-1) / (2 * (alpha**2 * 0.4**2 + sigma**2))


@pytest.mark.parametrize("name", ["epsilon", "v, zero terminal SNR", "flow"])
def test_an_exact_classifier_makes_the_conditional_prediction_of_the_unconditional(name):
    moment = moment_of(LEVELS[name], call=2, shape=(2, 2, 2))
    alpha, sigma = float(moment.level.alpha[0]), float(moment.level.sigma[0])
    prediction_type = moment.prediction_type
    out = DATA.predict(moment.x, alpha, sigma, prediction_type)
    for label in range(3):
        alone = Mixture(DATA.means[label : label + 1], std=0.4).predict(moment.x, alpha, sigma, prediction_type)
        found = ClassifierGuidance(log_odds, label)(out, None, moment)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)  # float32 conversions


def finite_difference(function, x, step=1e-3):
    """(B, ...) float64 central differences of a sum over samples, entry by entry."""
    found = torch.zeros_like(x)
    for place in np.ndindex(*x.shape):
        move = torch.zeros_like(x)
        move[place] = step
        found[place] = (function(x + move) - function(x - move)) / (2 * step)
    return found


def test_the_gradient_of_a_trained_kind_of_classifier_is_that_of_finite_differences():
    torch.manual_seed(0)
    classifier, moment = NoisyClassifier(2, 3, (8, 8)), moment_of(LEVELS["epsilon"], call=2)
    labels = [0, 2, 1]
    found = ClassifierGuidance(classifier, labels).gradient(moment)
    wide = classifier.double()

    def log_p(x):
        with torch.no_grad():
            return wide(x, moment.level).log_softmax(-1)[range(3), labels].sum()

    expected = finite_difference(log_p, moment.x.double())
    # float32 against float64; differences are right to step^2
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_a_loss_moves_clean_samples_by_its_gradient_and_the_noisy_ones_through_the_network():
    moment = moment_of(LEVELS["epsilon"], call=2, network=lambda x: (0.3 * x).sin())
    cond = moment.network(moment.x)

    def loss(x0):
        return (x0**4).flatten(1).sum(1)

    direct = LossGuidance(loss, 0.01)(cond, None, moment)
    x0 = moment.x0(cond)
    torch.testing.assert_close(moment.x0(direct), x0 - 0.01 * 4 * x0**3, rtol=1e-4, atol=1e-4)  # float32 there and back

    rule = LossGuidance(loss, 0.01, through_network=True)
    alpha, sigma = moment.level.alpha[0], moment.level.sigma[0]

    def of_noisy(x):
        return loss((x - sigma * moment.network(x)) / alpha).sum()

    expected = finite_difference(of_noisy, moment.x.double())
    torch.testing.assert_close(rule.gradient(moment).double(), expected, rtol=2e-3, atol=1e-3)  # float32 against float64
    noise = cond + 0.01 * sigma * rule.gradient(moment)  # Bansal et al.: the noise, plus sigma times the gradient
    torch.testing.assert_close(rule(cond, None, moment), noise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Stable Diffusion", "inpainting", "Stable Diffusion 3", "ControlNet"])
def test_losses_guide_pipelines_and_nothing_is_nothing(name):
    pipe = PIPELINES[name]()
    stock = run(pipe, SCALE)

    def size(x0):
        return x0.square().flatten(1).sum(1)

    for through in (False, True):
        with diffx.guide(pipe, LossGuidance(size, 0.0, CFG(SCALE), through)):
            assert torch.equal(run(pipe, 9.0), stock)
        with diffx.guide(pipe, LossGuidance(size, 0.05, CFG(SCALE), through)) as guided:
            smaller = run(pipe, 9.0)
        if not through:  # an untrained network has no say in where its samples may go
            assert size(smaller).sum() < size(stock).sum()
        assert guided.calls == guided.uncond_calls  # those that a rule makes itself are not counted


def test_labels_are_one_or_one_each():
    moment = moment_of(LEVELS["epsilon"])
    with pytest.raises(ValueError, match="label has 2 entries for 3 samples"):
        ClassifierGuidance(NoisyClassifier(2, 3, (8,)), [0, 1])(*pair(moment), moment)
    with pytest.raises(ValueError, match="need labels"):
        train_classifier(tiny_stable_diffusion(), torch.zeros(4, 1, 8, 8), torch.zeros(3))


def test_a_classifier_is_saved_and_loaded(tmp_path):
    classifier, moment = NoisyClassifier(2, 3, (8, 16)), moment_of(LEVELS["epsilon"])
    classifier.save_pretrained(tmp_path)
    again = NoisyClassifier.from_pretrained(tmp_path)
    assert torch.equal(again(moment.x, moment.level), classifier(moment.x, moment.level))


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.guidance")
    sys.path.remove(str(ROOT))


@pytest.fixture(scope="module")
def classifier(bench):
    return bench.guiding_classifier(250)


def test_digits_are_what_a_classifier_guides_them_to(bench, classifier):
    judge = bench.judge_of_digits()  # of the other half of the real digits
    rates = []
    for scale in (0.0, 1.0, 4.0):
        images, wanted = bench.guided_digits(classifier, scale, 200)
        rates.append(float((judge(images) == wanted).mean()))
    # Chance is 0.1, its deviation 0.02 for 200 samples; measured: about 0.08, 0.33, 0.8.
    assert rates[0] < 0.2 and rates[1] > 0.25 and rates[2] > 0.65


def test_a_classifier_at_scale_0_is_the_model(bench, classifier):
    call = dict(batch_size=20, num_inference_steps=bench.CALLS, output_type="np")
    images = bench.load("teacher")(**call, generator=torch.Generator().manual_seed(bench.SEED)).images
    guided, _ = bench.guided_digits(classifier, 0.0, 20)
    assert torch.equal(guided, torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)


def test_training_repeats_and_leaves_the_global_generator(bench):
    from benchmarks.digits import digits, load

    pictures, labels = digits()
    torch.manual_seed(3)
    made = [train_classifier(load("teacher"), pictures[:64], torch.as_tensor(labels[:64]), train_steps=2) for _ in range(2)]
    assert all(torch.equal(one, two) for one, two in zip(made[0].state_dict().values(), made[1].state_dict().values()))
    assert made[0].head.out_features == 10 and not made[0].head.weight.requires_grad
    assert math.isfinite(float(made[0].head.weight.sum()))
