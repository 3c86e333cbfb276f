"""Each class against its Diffusers twin on tensors: same timesteps, same end sample.

The tolerance everywhere is 1e-5 of the largest entry. Diffusers keeps its tables, and the state of most classes, in float32
(6e-8), takes differences of logarithms of them, and repeats up to 50 times; the largest difference measured is 2.2e-6.
States and the network are float64 here, so that nothing but the two schedulers' own arithmetic is compared.
"""

import json

import diffusers
import numpy as np
import pytest
import torch

import diffx
from diffx.schedulers.singlestep import dpm_singlestep
from diffx.testing import denoise

TOLERANCE = 1e-5
SHAPE = (2, 3, 4, 4)
STEPS = (4, 9, 20, 50)
BETAS = {
    "linear": dict(beta_schedule="linear"),
    "scaled_linear": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "cosine": dict(beta_schedule="squaredcos_cap_v2"),
    "trained": dict(trained_betas=(np.linspace(0.02, 0.13, 1000) ** 2).tolist()),
    "zero_snr": dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True),
}
SPACINGS = {
    "leading": dict(timestep_spacing="leading", steps_offset=1),
    "linspace": dict(timestep_spacing="linspace"),
    "trailing": dict(timestep_spacing="trailing"),
}
SIGMA_GRIDS = {
    "karras": dict(use_karras_sigmas=True),
    "karras_leading": dict(use_karras_sigmas=True, timestep_spacing="leading"),
}
FILLED = {
    "exponential": dict(use_exponential_sigmas=True),
    "exponential_trailing": dict(use_exponential_sigmas=True, timestep_spacing="trailing"),
    "beta": dict(use_beta_sigmas=True),
    "beta_leading": dict(use_beta_sigmas=True, timestep_spacing="leading"),
}
TYPES = ("epsilon", "sample", "v_prediction")
SCALED = BETAS["scaled_linear"]
FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True)


def network(x, t):
    """A smooth bounded function of sample and time: nonlinear, so that no error cancels; of slope below 1, so that none grows."""
    return 0.8 * torch.tanh(0.9 * x + 0.001 * float(t)) + 0.05 * torch.sin(3 * x)


def noise(seed=0, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_same(got, want, what=""):
    assert torch.isfinite(want).all(), f"the stock run diverged {what}: the case proves nothing"
    assert got.shape == want.shape and got.dtype == want.dtype
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= TOLERANCE, f"relative difference {error:.2e} {what}"


def assert_parity(ours, stock, times=None, x=None, seed=None, begin=0, **kwargs):
    """Both already hold their timesteps. ``times``: what the network is told, where stock rounds its own.

    ``seed``: of a generator given to every step of each.
    """
    times = stock.timesteps if times is None else times
    assert len(ours.timesteps) == len(stock.timesteps)
    if times is stock.timesteps:
        torch.testing.assert_close(ours.timesteps.double(), stock.timesteps.double(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(float(ours.init_noise_sigma), float(getattr(stock, "init_noise_sigma", 1.0)), rtol=1e-6, atol=0)
    start = noise() * float(ours.init_noise_sigma) if x is None else x
    if not isinstance(stock, diffusers.DDIMScheduler | diffusers.DDPMScheduler):
        stock.set_begin_index(begin)  # stock looks times up by value and starts one late where two rounded times are equal
    ends = []
    for scheduler in (ours, stock):
        told = iter(times[begin:].tolist())
        options = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
        ends.append(denoise(scheduler, lambda x, t: network(x, next(told)), start, begin=begin, **options, **kwargs))  # noqa: B023
    assert_same(*ends, f"with {len(times) - begin} calls of {type(ours).__name__}")


def cases(grids):
    """Every prediction type x grid at scaled-linear betas, then every other beta schedule x grid at one prediction type."""
    kinds = [("scaled_linear", kind) for kind in TYPES] + [(betas, "epsilon") for betas in ("linear", "cosine", "trained")]
    kinds += [("zero_snr", kind) for kind in ("sample", "v_prediction")]
    return [pytest.param(betas, grid, kind, id=f"{betas}-{grid}-{kind}") for grid in grids for betas, kind in kinds]


# ---------------------------------------------------------------------------------------------- DDIM


@pytest.mark.parametrize(("betas", "grid", "prediction_type"), cases(SPACINGS))
def test_ddim(betas, grid, prediction_type):
    stock = diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=False, **BETAS[betas], **SPACINGS[grid])
    ours = diffx.DDIM.from_config(stock.config, stock_step=True)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_ddim_leading_needs_no_option(set_alpha_to_one, steps_offset):
    stock = diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=set_alpha_to_one, steps_offset=steps_offset, timestep_spacing="leading", **SCALED
    )
    ours = diffx.DDIM.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock)


@pytest.mark.parametrize("grid", ["linspace", "trailing"])
def test_ddim_aims_at_its_next_timestep_where_diffusers_does_not(grid):
    """Diffusers' DDIM steps to ``t - T // N``, whatever time the network is called at next. Ours steps to that time."""
    stock = diffusers.DDIMScheduler(clip_sample=False, **SCALED, **SPACINGS[grid])
    ours = diffx.DDIM.from_config(stock.config)
    num_steps = 30
    stock.set_timesteps(num_steps)
    ours.set_timesteps(num_steps)
    times = ours.timesteps.tolist()
    assert times == stock.timesteps.tolist()
    alphas_cumprod = [stock.alphas_cumprod[t].double() for t in times] + [torch.tensor(1.0, dtype=torch.float64)]
    x = noise()
    for k, t in enumerate(times):  # DDIM eq. 12 with the schedule's own next entry
        now, after, eps = alphas_cumprod[k], alphas_cumprod[k + 1], network(x, t)
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = after.sqrt() * x0 + (1 - after).sqrt() * eps
    assert_same(denoise(ours, network, noise()), x)
    far = denoise(stock, network, noise())
    assert ((far - x).abs().max() / x.abs().max()).item() > 100 * TOLERANCE  # the difference is no rounding


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_eta(eta):
    stock = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading", **SCALED)
    ours = diffx.DDIM.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock, seed=5, eta=eta)


def test_ddim_clips_like_use_clipped_model_output():
    """Clipping is a map on x0; the noise direction follows from the clipped x0, which Diffusers calls use_clipped_model_output."""
    stock = diffusers.DDIMScheduler(timestep_spacing="leading", clip_sample=True, clip_sample_range=0.7, **SCALED)
    ours = diffx.DDIM.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        want = denoise(stock, network, noise(), use_clipped_model_output=True)
        assert_same(denoise(ours, network, noise()), want)


# ---------------------------------------------------------------------------------------------- Euler


class Float64Euler(diffusers.EulerDiscreteScheduler):
    """The stock class whose derivative is formed in float64.

    Stock subtracts numbers of size sigma = 4096 (zero terminal SNR) in float32 to get one of size 5 and loses 2e-5.
    """

    def step(self, model_output, timestep, sample, return_dict=False, **kwargs):
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, sigma_next = self.sigmas[self.step_index].double(), self.sigmas[self.step_index + 1].double()
        x0 = {
            "sample": lambda: model_output,
            "epsilon": lambda: sample - sigma * model_output,
            "v_prediction": lambda: model_output * (-sigma / (sigma**2 + 1) ** 0.5) + sample / (sigma**2 + 1),
        }[self.config.prediction_type]()
        self._step_index += 1
        return (sample + (sample - x0) / sigma * (sigma_next - sigma), x0)


@pytest.mark.parametrize(("betas", "grid", "prediction_type"), cases(SPACINGS | SIGMA_GRIDS))
def test_euler(betas, grid, prediction_type):
    cls = Float64Euler if betas == "zero_snr" else diffusers.EulerDiscreteScheduler
    stock = cls(prediction_type=prediction_type, **BETAS[betas], **(SPACINGS | SIGMA_GRIDS)[grid])
    ours = diffx.Euler.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock)


FILLED_PAIRS = {
    "Euler": (diffx.Euler, diffusers.EulerDiscreteScheduler, FILLED),
    "Heun": (diffx.Heun, diffusers.HeunDiscreteScheduler, FILLED),
    "DPMSolver": (diffx.DPMSolver, diffusers.DPMSolverMultistepScheduler, FILLED | {"lu": dict(use_lu_lambdas=True)}),
    "UniPC": (diffx.UniPC, diffusers.UniPCMultistepScheduler, FILLED),
    "FlowEuler": (diffx.Euler, diffusers.FlowMatchEulerDiscreteScheduler, {k: FILLED[k] for k in ("exponential", "beta")}),
}


@pytest.mark.parametrize(("name", "grid"), [(name, grid) for name, (_, _, grids) in FILLED_PAIRS.items() for grid in grids])
def test_exponential_beta_and_lu_sigmas(name, grid):
    """DPM and UniPC truncate these times, ours are rounded: both networks are told stock's."""
    cls, stock_class, grids = FILLED_PAIRS[name]
    stock = stock_class(**grids[grid], **(dict(shift=3.0) if name == "FlowEuler" else SCALED))
    ours = cls.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        torch.testing.assert_close(ours.sigmas.double(), stock.sigmas.double(), rtol=2e-6, atol=0)
        assert (ours.timesteps - stock.timesteps).abs().max() <= 1
        assert_parity(ours, stock, times=stock.timesteps.clone())


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_euler_final_sigma(final_sigmas_type):
    stock = diffusers.EulerDiscreteScheduler(final_sigmas_type=final_sigmas_type, timestep_spacing="trailing", **SCALED)
    ours = diffx.Euler.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock)


def test_euler_custom_timesteps_and_sigmas():
    stock = diffusers.EulerDiscreteScheduler(**SCALED)
    ours = diffx.Euler.from_config(stock.config)
    for schedule in (dict(timesteps=[999, 812, 600, 405, 111, 7]), dict(sigmas=[14.0, 6.0, 2.5, 0.8, 0.1, 0.0])):
        stock.set_timesteps(**schedule)
        ours.set_timesteps(**schedule)
        assert_parity(ours, stock)


FLOW_GRIDS = {
    "shift1": (dict(), dict()),
    "shift3": (dict(shift=3.0), dict()),
    "dynamic": (dict(use_dynamic_shifting=True), dict(mu=0.9)),
    "dynamic_linear": (dict(use_dynamic_shifting=True, time_shift_type="linear"), dict(mu=1.7)),
    "terminal": (dict(shift=2.0, shift_terminal=0.1), dict()),
    "karras": (dict(shift=3.0, use_karras_sigmas=True), dict()),
}


@pytest.mark.parametrize("grid", FLOW_GRIDS)
def test_flow_euler(grid):
    config, call = FLOW_GRIDS[grid]
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = diffx.Euler.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps, **call)
        ours.set_timesteps(num_steps, **call)
        torch.testing.assert_close(ours.sigmas.double(), stock.sigmas.double(), rtol=1e-5, atol=1e-6)
        assert_parity(ours, stock)


@pytest.mark.parametrize("grid", ["shift1", "shift3", "dynamic"])
def test_flow_euler_explicit_sigmas(grid):
    config, call = FLOW_GRIDS[grid]
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = diffx.Euler.from_config(stock.config)
    for sigmas in ([0.95, 0.7, 0.44, 0.1], np.linspace(1, 1 / 9, 9).tolist(), np.linspace(1.0, 1 / 20, 20)):
        stock.set_timesteps(sigmas=sigmas, **call)
        ours.set_timesteps(sigmas=sigmas, **call)
        assert_parity(ours, stock)


# ---------------------------------------------------------------------------------------------- Heun


HEUN_CASES = [case for case in cases(SPACINGS | SIGMA_GRIDS) if "zero_snr" not in case.values]  # stock knows no zero terminal SNR


@pytest.mark.parametrize(("betas", "grid", "prediction_type"), HEUN_CASES)
def test_heun(betas, grid, prediction_type):
    stock = diffusers.HeunDiscreteScheduler(prediction_type=prediction_type, **BETAS[betas], **(SPACINGS | SIGMA_GRIDS)[grid])
    ours = diffx.Heun.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-5, atol=0)
        if betas == "cosine":  # stock rounds sigmas of 2e4 to float32, which alone is 5e-5 at the end: both get ours
            stock.sigmas = torch.tensor([call.sigma for call in ours.plan().calls] + [0.0], dtype=torch.float64)
        assert_parity(ours, stock)


def test_heun_clips_and_takes_custom_timesteps():
    stock = diffusers.HeunDiscreteScheduler(clip_sample=True, clip_sample_range=0.7, **SCALED)
    ours = diffx.Heun.from_config(stock.config)
    for times in ([999, 812, 600, 405, 111, 7], [700, 20]):
        stock.set_timesteps(timesteps=times)
        ours.set_timesteps(timesteps=times)
        assert_parity(ours, stock)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_heun(shift):
    """FlowMatchHeun knows one option, the shift, and takes neither sigmas nor mu: its own grid is all there is to compare."""
    stock = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    ours = diffx.Heun.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock)


def test_heun_edits_after_an_interval_act_like_in_the_twin():
    stock = diffusers.HeunDiscreteScheduler(**SCALED)
    ours = diffx.Heun.from_config(stock.config)
    mask, known = torch.rand(SHAPE, generator=torch.Generator().manual_seed(8), dtype=torch.float64), noise(9)
    for num_steps in (6, 20):
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock, edit=lambda k, x: mask * x + (1 - mask) * known if k % 2 else x)


@pytest.mark.parametrize("announced", [True, False], ids=["set_begin_index", "first_timestep"])
def test_heun_begins_with_every_interval(announced):
    for begin in range(0, 11, 2):
        stock = diffusers.HeunDiscreteScheduler(**SCALED)
        ours = diffx.Heun.from_config(stock.config)
        ends = []
        for scheduler in (ours, stock):
            scheduler.set_timesteps(6)
            if announced:
                scheduler.set_begin_index(begin)
            x = scheduler.add_noise(noise(1), noise(2), scheduler.timesteps[begin : begin + 1])
            for t in scheduler.timesteps[begin:]:
                x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
            ends.append(x)
        assert_same(*ends, f"from index {begin}")


# ---------------------------------------------------------------------------------------------- ancestral and DDPM

ANCESTRAL_CASES = [case for case in cases(SPACINGS) if "sample" not in case.values]  # "sample" is not implemented in stock


@pytest.mark.parametrize(("betas", "grid", "prediction_type"), ANCESTRAL_CASES)
def test_euler_ancestral(betas, grid, prediction_type):
    stock = diffusers.EulerAncestralDiscreteScheduler(prediction_type=prediction_type, **BETAS[betas], **SPACINGS[grid])
    ours = diffx.EulerAncestral.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        stock.sigmas = stock.sigmas.double()  # stock subtracts float32 sigmas of up to 2e4
        assert_parity(ours, stock, seed=3)


@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (0.3, 1.2), (0.0, 1.0)])
def test_flow_ancestral(eta, s_noise):
    stock = diffusers.LTXEulerAncestralRFScheduler(eta=eta, s_noise=s_noise)
    ours = diffx.EulerAncestral.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock, seed=3)
    given = [1.0, 0.9, 0.7, 0.3, 0.0]
    stock.set_timesteps(sigmas=given)
    ours.set_timesteps(sigmas=given)
    stock.timesteps = stock.timesteps[:-1]  # stock visits sigma 0, too, and there does nothing
    assert_parity(ours, stock, seed=3)


def stock_ddpm_pair(**config):
    stock = diffusers.DDPMScheduler(**{"clip_sample": False, **SCALED, **config})
    return stock, diffx.DDPM.from_config(stock.config)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_ddpm(variance_type, prediction_type):
    for betas in ("linear", "scaled_linear", "cosine", "trained"):
        stock, ours = stock_ddpm_pair(prediction_type=prediction_type, variance_type=variance_type, **BETAS[betas])
        for num_steps in STEPS:
            stock.set_timesteps(num_steps)
            ours.set_timesteps(num_steps)
            assert_parity(ours, stock, seed=3)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddpm_goes_to_the_next_time_of_any_grid(spacing):
    """As stock does. Not here: cosine betas, where stock's float32 reach 1.6e-5, and stock's "fixed_large" noise after the last step."""
    for betas in ("linear", "scaled_linear", "trained"):
        stock, ours = stock_ddpm_pair(timestep_spacing=spacing, **BETAS[betas])
        for num_steps in STEPS:
            for scheduler in (stock, ours):
                scheduler.set_timesteps(num_steps)
            assert_parity(ours, stock, seed=3)


def test_ddpm_offset_clipping_custom_times_and_zero_snr():
    for options in (dict(steps_offset=1), dict(clip_sample=True, clip_sample_range=0.7), dict(thresholding=True, sample_max_value=1.5)):
        stock, ours = stock_ddpm_pair(**options)
        for scheduler in (stock, ours):
            scheduler.set_timesteps(20)
        assert_parity(ours, stock, seed=3)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(timesteps=[999, 812, 600, 405, 111, 0])
    assert_parity(ours, stock, seed=3)
    stock, ours = stock_ddpm_pair(timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(20)
    assert_parity(ours, stock, seed=3)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_ddpm_learned_variance(variance_type):
    """The network's second half of the channels: a variance, or a number in -1 .. 1 between the small and the large one."""
    stock, ours = stock_ddpm_pair(variance_type=variance_type)

    def two_halves(x, t):
        low, high = (0.001, 0.05) if variance_type == "learned" else (-1, 1)
        return torch.cat([network(x, t), low + (high - low) * torch.sigmoid(2 * x)], 1)

    for num_steps in STEPS:
        for scheduler in (stock, ours):
            scheduler.set_timesteps(num_steps)
        want, got = (denoise(each, two_halves, noise(), generator=torch.Generator().manual_seed(3)) for each in (stock, ours))
        assert_same(got, want)
    with pytest.raises(ValueError, match=f"variance_type='{variance_type}' needs 6 channels of model_output.* it has 3"):
        ours.set_timesteps(4)
        ours.step(noise(), ours.timesteps[0], noise())
    with pytest.raises(ValueError, match="variance_type='large' is not one of fixed_small"):
        diffx.DDPM(variance_type="large")


def test_no_variance_type_is_fixed_small():
    """A DPM-Solver config that went through a file says None."""
    file = json.loads(diffusers.DPMSolverMultistepScheduler(**SCALED).to_json_string())
    stock, ours = diffusers.DDPMScheduler.from_config(file), diffx.DDPM.from_config(file)
    for scheduler in (stock, ours):
        scheduler.register_to_config(timestep_spacing="leading", clip_sample=False)
        scheduler.set_timesteps(9)
    assert_parity(ours, stock, seed=3)


def test_fixed_large_log_is_fixed_large():
    """Diffusers takes the square root of the logarithm, which is NaN; the name means the same numbers."""
    stock, ours = stock_ddpm_pair(variance_type="fixed_large_log")
    plain = diffx.DDPM.from_config(stock.config, variance_type="fixed_large")
    for scheduler in (stock, ours, plain):
        scheduler.set_timesteps(9)
    assert ours.plan().calls == plain.plan().calls
    draw = dict(generator=torch.Generator().manual_seed(3))
    assert torch.isnan(denoise(stock, network, noise(), **draw)).any()


# ---------------------------------------------------------------------------------------------- LCM


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("original_steps", [50, 100, 37])
def test_lcm(prediction_type, original_steps):
    stock = diffusers.LCMScheduler(prediction_type=prediction_type, original_inference_steps=original_steps)
    ours = diffx.LCM.from_config(stock.config)
    for num_steps in (1, 2, 4, 9, 30):
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock, seed=3)


def test_lcm_arguments_of_a_run():
    stock = diffusers.LCMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", clip_sample=True)
    ours = diffx.LCM.from_config(stock.config)
    for run in (
        dict(num_inference_steps=4, original_inference_steps=25),
        dict(num_inference_steps=3, strength=0.6),
        dict(timesteps=[999, 500, 19]),
    ):
        stock.set_timesteps(**run)
        ours.set_timesteps(**run)
        assert_parity(ours, stock, seed=3)
    with pytest.raises(ValueError, match="num_inference_steps=51 must be a whole number between 1 and the 50 distilled times"):
        ours.set_timesteps(51)
    with pytest.raises(ValueError, match="original_inference_steps=2000 must lie between 1 and the 1000 train times"):
        ours.set_timesteps(4, original_inference_steps=2000)
    with pytest.raises(ValueError, match=r"strength=0\.5 acts on the times of the distillation only"):
        ours.set_timesteps(timesteps=[999, 500], strength=0.5)
    with pytest.raises(ValueError, match="use_karras_sigmas=True does not fit LCM"):
        diffx.LCM(use_karras_sigmas=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):  # the first of its times is the last of training
        diffx.LCM(rescale_betas_zero_snr=True).set_timesteps(4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_lcm(shift):
    stock = diffusers.FlowMatchLCMScheduler(shift=shift)
    ours = diffx.LCM.from_config(stock.config)
    for num_steps in (1, 2, 4, 9):
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        # float32: stock draws in the dtype of a float32 sample and the network's output together
        assert_parity(ours, stock, seed=3, x=noise(dtype=torch.float32))


# ---------------------------------------------------------------------------------------------- bounds on x0

BOUNDED = {
    "DDIM": (diffx.DDIM, diffusers.DDIMScheduler, dict(timestep_spacing="leading", clip_sample=False)),
    "DPMSolver": (diffx.DPMSolver, diffusers.DPMSolverMultistepScheduler, {}),
    "DPMSolverSinglestep": (diffx.DPMSolverSinglestep, diffusers.DPMSolverSinglestepScheduler, {}),
    "UniPC": (diffx.UniPC, diffusers.UniPCMultistepScheduler, {}),
}


@pytest.mark.parametrize("most", [1.0, 1.5, 50.0])
@pytest.mark.parametrize("name", BOUNDED)
def test_dynamic_thresholding(name, most):
    cls, stock_class, options = BOUNDED[name]
    stock = stock_class(thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=most, **options, **SCALED)
    ours = cls.from_config(stock.config)
    consistent = dict(use_clipped_model_output=True) if name == "DDIM" else {}
    for num_steps in STEPS:
        for scheduler in (stock, ours):
            scheduler.set_timesteps(num_steps)
        loud = lambda x, t: 3 * network(x, t)  # noqa: E731  # so that the bound acts
        want = denoise(stock, loud, noise(), **consistent)
        assert_same(denoise(ours, loud, noise(), **consistent), want)
    unbounded = cls.from_config(stock.config, thresholding=False)
    for scheduler in (ours, unbounded):
        scheduler.set_timesteps(4)
    x0, free = (s.step(noise(2), s.timesteps[0], noise()).pred_original_sample for s in (ours, unbounded))
    assert x0.abs().max() <= 1 < free.abs().max()


# ---------------------------------------------------------------------------------------------- DPMSolver

DPM_SOLVERS = {
    "order1": dict(solver_order=1),
    "order2": dict(solver_order=2),
    "order3": dict(solver_order=3),
    "sde1": dict(solver_order=1, algorithm_type="sde-dpmsolver++"),
    "sde2": dict(solver_order=2, algorithm_type="sde-dpmsolver++"),
}


def dpm_pair(**config):
    """The stock class and ours with the stock coefficient of the third order's D2, which is half of the right one."""
    stock = diffusers.DPMSolverMultistepScheduler(**config)
    return stock, diffx.DPMSolver.from_config(stock.config, stock_third_order=True)


@pytest.mark.parametrize("solver", DPM_SOLVERS)
@pytest.mark.parametrize(("betas", "grid", "prediction_type"), cases(SPACINGS | SIGMA_GRIDS))
def test_dpm(betas, grid, prediction_type, solver):
    stock, ours = dpm_pair(prediction_type=prediction_type, **DPM_SOLVERS[solver], **BETAS[betas], **(SPACINGS | SIGMA_GRIDS)[grid])
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        # Stock rounds karras times, but truncates them for cosine betas: there both networks are told stock's times.
        truncated = betas == "cosine" and "karras" in grid
        assert not truncated or (ours.timesteps - stock.timesteps).abs().max() <= 1
        assert_parity(ours, stock, times=stock.timesteps.clone() if truncated else None, seed=3 if solver.startswith("sde") else None)


@pytest.mark.parametrize("solver", DPM_SOLVERS)
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("euler_at_final", [True, False])
def test_dpm_final_steps(solver, final_sigmas_type, lower_order_final, euler_at_final):
    # 14 and 15: Diffusers lowers the order of short runs only, below 15
    final = dict(final_sigmas_type=final_sigmas_type, lower_order_final=lower_order_final, euler_at_final=euler_at_final)
    stock, ours = dpm_pair(**final, **DPM_SOLVERS[solver], **SCALED)
    for num_steps in (1, 2, 3, 14, 15):
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock, seed=3 if solver.startswith("sde") else None)


@pytest.mark.parametrize("options", [dict(), dict(algorithm_type="sde-dpmsolver++")], ids=["ode", "sde"])
def test_dpm_heun_type(options):
    stock, ours = dpm_pair(solver_type="heun", **options, **SCALED)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock, seed=3)


@pytest.mark.parametrize("grid", ["linspace", "leading"])
def test_dpm_clips_lambda(grid):
    stock, ours = dpm_pair(lambda_min_clipped=-5.1, **BETAS["cosine"], **SPACINGS[grid])
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock)


@pytest.mark.parametrize("solver", DPM_SOLVERS)
def test_dpm_custom_timesteps(solver):
    stock, ours = dpm_pair(**DPM_SOLVERS[solver], **SCALED)
    stock.set_timesteps(timesteps=[999, 812, 600, 405, 111, 7])
    ours.set_timesteps(timesteps=[999, 812, 600, 405, 111, 7])
    assert_parity(ours, stock, seed=3 if solver.startswith("sde") else None)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", DPM_SOLVERS)
def test_dpm_flow(solver, shift):
    """Stock truncates flow times to integers, so both networks are told stock's; ours gets stock's grid, already shifted."""
    stock = diffusers.DPMSolverMultistepScheduler(flow_shift=shift, **FLOW, **DPM_SOLVERS[solver])
    ours = diffx.DPMSolver.from_config(stock.config, flow_shift=1.0, stock_third_order=True)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(sigmas=stock.sigmas[:-1].tolist())
        torch.testing.assert_close(ours.sigmas.double(), stock.sigmas.double(), rtol=0, atol=1e-7)
        assert_parity(ours, stock, times=stock.timesteps.clone(), seed=3 if solver.startswith("sde") else None)


# The noise predictions as the polynomial. Stock refuses to end them at zero, and its SDE form has no third order.
EPS_SOLVERS = {
    f"{kind}{order}": dict(solver_order=order, algorithm_type=kind, final_sigmas_type="sigma_min")
    for kind, orders in (("dpmsolver", (1, 2, 3)), ("sde-dpmsolver", (1, 2)))
    for order in orders
}


def eps_seed(solver):
    return 3 if solver.startswith("sde") else None


class Float64DPM(diffusers.DPMSolverMultistepScheduler):
    """The stock class without its rounding of samples and levels to float32, which pure noise multiplies by 1 / alpha = 4096."""

    def convert_model_output(self, model_output, *args, sample=None, **kwargs):
        self.wide = sample
        return super().convert_model_output(model_output, *args, sample=sample, **kwargs)

    def dpm_solver_first_order_update(self, *args, sample=None, **kwargs):
        return super().dpm_solver_first_order_update(*args, sample=self.wide, **kwargs)

    def multistep_dpm_solver_second_order_update(self, *args, sample=None, **kwargs):
        return super().multistep_dpm_solver_second_order_update(*args, sample=self.wide, **kwargs)

    def multistep_dpm_solver_third_order_update(self, *args, sample=None, **kwargs):
        return super().multistep_dpm_solver_third_order_update(*args, sample=self.wide, **kwargs)


@pytest.mark.parametrize("solver", EPS_SOLVERS)
@pytest.mark.parametrize(("betas", "grid", "prediction_type"), cases(SPACINGS | {"karras": dict(use_karras_sigmas=True)}))
def test_dpm_on_noise_predictions(betas, grid, prediction_type, solver):
    cls = Float64DPM if betas == "zero_snr" else diffusers.DPMSolverMultistepScheduler
    stock = cls(
        prediction_type=prediction_type, **EPS_SOLVERS[solver], **BETAS[betas], **(SPACINGS | SIGMA_GRIDS)[grid],
        euler_at_final=grid == "karras",  # those end on sigma_min twice: a last step of 0, at which stock's higher orders are 0 / 0
    )  # fmt: skip
    ours = diffx.DPMSolver.from_config(stock.config, stock_third_order=True)
    if solver.startswith("sde") and betas in ("zero_snr", "cosine") and grid != "leading":
        with pytest.raises(ValueError, match="the noise of sde-dpmsolver grows without bound from pure noise"):
            ours.set_timesteps(4)
        return
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        if betas == "zero_snr":
            stock.sigmas = torch.tensor([call.sigma for call in ours.plan().calls] + [stock.sigmas[-1]], dtype=torch.float64)
        truncated = betas == "cosine" and "karras" in grid  # as above
        assert_parity(ours, stock, times=stock.timesteps.clone() if truncated else None, seed=eps_seed(solver))


@pytest.mark.parametrize("solver", EPS_SOLVERS)
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("options", [dict(), dict(solver_type="heun"), dict(euler_at_final=True)], ids=["midpoint", "heun", "euler"])
def test_dpm_on_noise_predictions_types_and_final_steps(solver, lower_order_final, options):
    stock, ours = dpm_pair(lower_order_final=lower_order_final, **options, **EPS_SOLVERS[solver], **SCALED)
    for run in (*(dict(num_inference_steps=n) for n in (1, 2, 3, 14, 15)), dict(timesteps=[999, 812, 600, 405, 111, 7])):
        stock.set_timesteps(**run)
        ours.set_timesteps(**run)
        assert_parity(ours, stock, seed=eps_seed(solver))


def test_dpm_on_noise_predictions_ends_at_zero_where_stock_does_not():
    with pytest.raises(ValueError, match="is not supported for `algorithm_type` dpmsolver"):
        diffusers.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", **SCALED)
    ours = diffx.DPMSolver(algorithm_type="dpmsolver", **SCALED)
    ours.set_timesteps(6)
    assert ours.sigmas[-1] == 0 and ours.plan().calls[-1].sample == (0, 1) and ours.plan().calls[-1].kept == (0, 1)  # its x0
    stock = diffusers.DPMSolverMultistepScheduler(**EPS_SOLVERS["sde-dpmsolver2"], **SCALED)
    back = diffusers.DPMSolverMultistepScheduler.from_config(diffx.DPMSolver.from_config(stock.config).config)
    assert dict(back.config) == dict(stock.config)
    with pytest.raises(ValueError, match=r"algorithm_type='dpm' is not one of dpmsolver\+\+, sde-dpmsolver\+\+, dpmsolver, sde-dpmsolver"):
        diffx.DPMSolver(algorithm_type="dpm")


# ---------------------------------------------------------------------------------------------- DPMSolverSinglestep

SINGLESTEP = {
    f"{kind}{order}-{solver_type}": dict(solver_order=order, algorithm_type=kind, solver_type=solver_type)
    for kind in ("dpmsolver++", "dpmsolver")
    for order, solver_type in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun"))
}


def assert_singlestep_parity(run, **config):
    """A fresh stock class for every run, since one of an uneven number of steps writes ``lower_order_final`` into its config.

    It keeps its levels in float32: differences of their logarithms cost order 3 up to 9e-5, and noise predictions multiply them by
    exp(h) (1e-3). There it is given ours.
    """
    stock = diffusers.DPMSolverSinglestepScheduler(**config)
    ours = diffx.DPMSolverSinglestep.from_config(stock.config)
    stock.set_timesteps(**run)
    ours.set_timesteps(**run)
    torch.testing.assert_close(ours.sigmas.double(), stock.sigmas.double(), rtol=1e-5, atol=0)  # float32
    assert (ours.timesteps - stock.timesteps).abs().max() <= 1  # stock truncates exponential and beta times, ours are rounded
    if config["solver_order"] == 3 or config["algorithm_type"] == "dpmsolver":
        stock.sigmas = torch.tensor(ours._grid.sigmas)
    assert_parity(ours, stock, times=stock.timesteps.clone())


SINGLESTEP_GRIDS = {"linspace": {}, **{name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}}
SINGLESTEP_CASES = [case for case in cases(SINGLESTEP_GRIDS) if "zero_snr" not in case.values]  # stock knows no zero terminal SNR


@pytest.mark.filterwarnings("ignore:.algorithm_types=dpmsolver:FutureWarning")  # stock calls "dpmsolver" deprecated
@pytest.mark.parametrize("solver", SINGLESTEP)
@pytest.mark.parametrize(("betas", "grid", "prediction_type"), SINGLESTEP_CASES)
def test_singlestep(betas, grid, prediction_type, solver):
    on_noise = "++" not in solver
    config = dict(prediction_type=prediction_type, **SINGLESTEP[solver], **BETAS[betas], **SINGLESTEP_GRIDS[grid])
    if on_noise and betas == "cosine" and "1" not in solver:
        ours = diffx.DPMSolverSinglestep(final_sigmas_type="sigma_min", **config)
        with pytest.raises(ValueError, match=r"spans 1\d.* in log\(alpha / sigma\), and on noise predictions 10 is the most"):
            ours.set_timesteps(3)
        return
    for num_steps in STEPS:
        assert_singlestep_parity(dict(num_inference_steps=num_steps), final_sigmas_type="sigma_min" if on_noise else "zero", **config)


@pytest.mark.filterwarnings("ignore:.algorithm_types=dpmsolver:FutureWarning")  # as above
@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("solver", SINGLESTEP)
def test_singlestep_final_steps_and_custom_timesteps(solver, lower_order_final, final_sigmas_type):
    config = dict(lower_order_final=lower_order_final, final_sigmas_type=final_sigmas_type, **SINGLESTEP[solver], **SCALED)
    if config["algorithm_type"] == "dpmsolver" and final_sigmas_type == "zero":
        with pytest.raises(ValueError, match="is not supported for `algorithm_type` dpmsolver"):
            diffusers.DPMSolverSinglestepScheduler(**config)
        diffx.DPMSolverSinglestep(**config).set_timesteps(6)
        return
    for run in (*(dict(num_inference_steps=n) for n in (1, 2, 3, 4, 5, 6, 15)), dict(timesteps=[999, 812, 600, 405, 111, 7])):
        assert_singlestep_parity(run, **config)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", [name for name in SINGLESTEP if "++" in name])  # stock has no noise predictions of flow models
def test_singlestep_flow(solver, shift):
    """As for the multistep class: both networks are told stock's times, ours is given stock's grid, already shifted."""
    for num_steps in STEPS:
        stock = diffusers.DPMSolverSinglestepScheduler(flow_shift=shift, **FLOW, **SINGLESTEP[solver])
        ours = diffx.DPMSolverSinglestep.from_config(stock.config, flow_shift=1.0)
        stock.set_timesteps(num_steps)
        ours.set_timesteps(sigmas=stock.sigmas[:-1].tolist())
        stock.sigmas = stock.sigmas.double()  # 1 - sigma begins at 3e-4
        assert_parity(ours, stock, times=stock.timesteps.clone())


def test_singlestep_begins_its_groups_after_pure_noise():
    ours = diffx.DPMSolverSinglestep(solver_order=3, prediction_type="flow_prediction")
    ours.set_timesteps(8)
    assert ours.sigmas[0] == 1
    assert [call.predictions for call in ours.plan().calls] == [1, 1, 2, 2, 1, 2, 2, 1]  # 1 | 1 2 3 | 1 2 3 | 1, midpoint
    assert [call.anchor for call in ours.plan().calls] == [None, (1,), (1,), None, (1,), (1,), None, None]


def test_singlestep_clips_lambda_and_refuses_what_it_has_not():
    assert_singlestep_parity(dict(num_inference_steps=9), lambda_min_clipped=-5.1, **SINGLESTEP["dpmsolver++2-midpoint"], **BETAS["cosine"])
    with pytest.raises(ValueError, match=r"algorithm_type='sde-dpmsolver\+\+' has noise, which groups of calls cannot keep; use DPMSolver"):
        diffx.DPMSolverSinglestep(algorithm_type="sde-dpmsolver++")
    with pytest.raises(ValueError, match=r"algorithm_type='dpm' is not one of dpmsolver\+\+, dpmsolver"):
        diffx.DPMSolverSinglestep(algorithm_type="dpm")
    with pytest.raises(ValueError, match="solver_order=4 must be 1, 2 or 3"):
        diffx.DPMSolverSinglestep(solver_order=4)
    with pytest.raises(ValueError, match="solver_type='trapezoid' is not one of midpoint, heun"):
        diffx.DPMSolverSinglestep(solver_type="trapezoid").set_timesteps(4)
    alpha, sigma = np.array([0.0, 0.5, 0.8, 1.0]), np.array([1.0, 0.8, 0.6, 0.0])
    dpm_singlestep(alpha, sigma, [1, 1, 1])
    for orders, message in {
        (1, 2, 1): "call 0 is in a group that begins at pure noise",
        (1, 1, 2): "call 2 is in a group that begins at pure noise or ends at sigma = 0",
        (1, 1, 3): "order 3 of call 2 must be 1, or one more than that of the call before and at most 3",
        (2, 1, 1): "order 2 of call 0 must be 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            dpm_singlestep(alpha, sigma, orders)


# ---------------------------------------------------------------------------------------------- DEIS and LMS


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # stock hands tensors to NumPy
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("betas", "grid", "prediction_type"),
                         [case for case in cases(SPACINGS | SIGMA_GRIDS) if case.values[0] not in ("zero_snr", "cosine")])  # fmt: skip
def test_deis(betas, grid, prediction_type, order):
    """Without zero terminal SNR, which stock has not, and cosine betas, whose sigmas of 2e4 it rounds to float32."""
    stock = diffusers.DEISMultistepScheduler(
        solver_order=order, prediction_type=prediction_type, **BETAS[betas], **(SPACINGS | SIGMA_GRIDS)[grid]
    )
    ours = diffx.DEIS.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        if order == 3:  # its antiderivatives in rho (log rho)^2 cancel: 6e-5 in float32 at 50 steps
            stock.sigmas = torch.tensor(ours._grid.sigmas)
        assert_parity(ours, stock)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # stock hands tensors to NumPy
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_lowers_the_order_as_stock_does(order):
    for lower in (True, False):
        stock = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=lower, **SCALED)
        ours = diffx.DEIS.from_config(stock.config)
        for num_steps in (1, 2, 3, 14, 15):
            stock.set_timesteps(num_steps)
            ours.set_timesteps(num_steps)
            assert_parity(ours, stock)


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # stock hands tensors to NumPy
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_on_flow_but_for_the_last_step(order):
    """Stock stops at its last sigma, ours goes on to zero: compared where both are before it, on stock's grid."""
    stock = diffusers.DEISMultistepScheduler(solver_order=order, flow_shift=3.0, **FLOW)
    ours = diffx.DEIS.from_config(stock.config, flow_shift=1.0)
    for num_steps in (5, 9, 20):
        stock.set_timesteps(num_steps)
        ours.set_timesteps(sigmas=stock.sigmas[:-1].tolist())
        stock.sigmas = stock.sigmas.double()  # 1 - sigma begins at 3e-4
        ends = []
        for scheduler in (ours, stock):
            told, kept = iter(stock.timesteps.tolist()), []
            denoise(scheduler, lambda x, t: network(x, next(told)), noise(), edit=lambda k, x: kept.append(x) or x)  # noqa: B023
            ends.append(kept[num_steps - 3])  # the order is lowered after this one
        assert_same(*ends)


def test_deis_is_an_ode():
    ours = diffx.DEIS.from_config(diffusers.DPMSolverMultistepScheduler(**SCALED).config)  # any word of an ODE is read as deis
    ours.set_timesteps(6)
    with pytest.raises(ValueError, match=r"algorithm_type='sde-dpmsolver\+\+' has noise, and DEIS is an ODE's; use DPMSolver"):
        diffx.DEIS(algorithm_type="sde-dpmsolver++")
    with pytest.raises(ValueError, match="stock_third_order=True is for DPMSolver"):
        diffx.DEIS(stock_third_order=True)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("betas", "grid", "prediction_type"),
                         [case for case in cases(SPACINGS | SIGMA_GRIDS) if case.values[0] not in ("zero_snr", "cosine")])  # fmt: skip
def test_lms(betas, grid, prediction_type, order):
    """As for DEIS. The order is an argument of stock's step, which integrates its coefficients numerically to 1e-4 of each."""
    stock = diffusers.LMSDiscreteScheduler(prediction_type=prediction_type, **BETAS[betas], **(SPACINGS | SIGMA_GRIDS)[grid])
    ours = diffx.LMS.from_config(stock.config, solver_order=order)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_same_steps(ours, stock, order)


def assert_same_steps(ours, stock, order):
    stock.sigmas = torch.tensor(ours._grid.sigmas)
    ends, start = [], noise() * float(ours.init_noise_sigma)
    for scheduler, options in ((ours, {}), (stock, dict(order=order))):
        ends.append(denoise(scheduler, network, start, **options))
    assert_same(*ends, f"with {len(stock.timesteps)} calls")


# ---------------------------------------------------------------------------------------------- UniPC

UNIPC_SOLVERS = {f"{kind}-{order}": dict(solver_type=kind, solver_order=order) for kind in ("bh1", "bh2") for order in (1, 2, 3)}
UNIPC_GRIDS = SPACINGS | SIGMA_GRIDS


@pytest.mark.parametrize("solver", UNIPC_SOLVERS)
@pytest.mark.parametrize(("betas", "grid", "prediction_type"), cases(["leading", "linspace", "trailing", "karras"]))
def test_unipc(betas, grid, prediction_type, solver):
    # bh1 weighs by h, which is infinite at a last sigma of zero: stock gives NaN there
    last = "sigma_min" if solver.startswith("bh1") else "zero"
    stock = diffusers.UniPCMultistepScheduler(
        prediction_type=prediction_type, final_sigmas_type=last, **UNIPC_SOLVERS[solver], **BETAS[betas], **UNIPC_GRIDS[grid]
    )
    ours = diffx.UniPC.from_config(stock.config)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock)


@pytest.mark.parametrize("solver", UNIPC_SOLVERS)
@pytest.mark.parametrize("options", [dict(), dict(lower_order_final=False), dict(disable_corrector=[0, 2])], ids=["lower", "full", "skip"])
def test_unipc_final_sigma_min(solver, options):
    # a last step of full order exists for a last sigma above zero only
    stock = diffusers.UniPCMultistepScheduler(final_sigmas_type="sigma_min", **options, **UNIPC_SOLVERS[solver], **SCALED)
    ours = diffx.UniPC.from_config(stock.config)
    for num_steps in (1, 2, 3, 10):
        stock.set_timesteps(num_steps)
        ours.set_timesteps(num_steps)
        assert_parity(ours, stock)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["bh2-1", "bh2-2", "bh2-3"])
def test_unipc_flow(solver, shift):
    """bh2 only: stock's bh1 is NaN at a last sigma of zero, and its other choice repeats the last sigma, which is NaN, too."""
    stock = diffusers.UniPCMultistepScheduler(flow_shift=shift, **FLOW, **UNIPC_SOLVERS[solver])
    ours = diffx.UniPC.from_config(stock.config, flow_shift=1.0)
    for num_steps in STEPS:
        stock.set_timesteps(num_steps)
        ours.set_timesteps(sigmas=stock.sigmas[:-1].tolist())
        assert_parity(ours, stock, times=stock.timesteps.clone())


def test_unipc_flow_dynamic_and_explicit_sigmas():
    stock = diffusers.UniPCMultistepScheduler(use_dynamic_shifting=True, **FLOW)
    ours = diffx.UniPC.from_config(stock.config)
    given = np.linspace(0.99, 1 / 9, 9)
    stock.set_timesteps(sigmas=given, mu=0.9)
    ours.set_timesteps(sigmas=given, mu=0.9)
    torch.testing.assert_close(ours.sigmas.double(), stock.sigmas.double(), rtol=0, atol=1e-6)
    assert_parity(ours, stock, times=stock.timesteps.clone())


# ---------------------------------------------------------------------------------------------- edits and begin indices

PAIRS = {
    "DDIM": lambda: (diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading", **SCALED), diffx.DDIM, {}),
    "Euler": lambda: (diffusers.EulerDiscreteScheduler(**SCALED), diffx.Euler, {}),
    "EulerKarras": lambda: (diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, **SCALED), diffx.Euler, {}),
    "FlowEuler": lambda: (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), diffx.Euler, {}),
    "DPM1": lambda: (diffusers.DPMSolverMultistepScheduler(solver_order=1, **SCALED), diffx.DPMSolver, {}),
    "DPM2": lambda: (diffusers.DPMSolverMultistepScheduler(**SCALED), diffx.DPMSolver, {}),
    "DPM3": lambda: (diffusers.DPMSolverMultistepScheduler(solver_order=3, **SCALED), diffx.DPMSolver, dict(stock_third_order=True)),
    "SDE2": lambda: (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **SCALED), diffx.DPMSolver, {}),
    "Single2": lambda: (diffusers.DPMSolverSinglestepScheduler(**SCALED), diffx.DPMSolverSinglestep, {}),
    "Single3": lambda: (diffusers.DPMSolverSinglestepScheduler(solver_order=3, **SCALED), diffx.DPMSolverSinglestep, {}),
    "Eps2": lambda: (diffusers.DPMSolverMultistepScheduler(**EPS_SOLVERS["dpmsolver2"], **SCALED), diffx.DPMSolver, {}),
    "UniPC1": lambda: (diffusers.UniPCMultistepScheduler(solver_order=1, **SCALED), diffx.UniPC, {}),
    "UniPC2": lambda: (diffusers.UniPCMultistepScheduler(**SCALED), diffx.UniPC, {}),
    "UniPC3": lambda: (diffusers.UniPCMultistepScheduler(solver_order=3, **SCALED), diffx.UniPC, {}),
}


def pair_of(name, num_steps):
    stock, cls, options = PAIRS[name]()
    ours = cls.from_config(stock.config, **options)
    stock.set_timesteps(num_steps)
    ours.set_timesteps(num_steps)
    return stock, ours


def draws(name):
    """A seed for the generator of stochastic pairs; deterministic stock classes are given none."""
    return 3 if name == "SDE2" else None


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("num_steps", [6, 20])
def test_one_edit_acts_like_in_the_twin(name, num_steps):
    stock, ours = pair_of(name, num_steps)
    bump = noise(7)
    assert_parity(ours, stock, seed=draws(name), edit=lambda k, x: x + 0.3 * bump if k == 2 else x)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("num_steps", [6, 20])
def test_a_soft_mask_at_every_step_acts_like_in_the_twin(name, num_steps):
    stock, ours = pair_of(name, num_steps)
    mask, known = torch.rand(SHAPE, generator=torch.Generator().manual_seed(8), dtype=torch.float64), noise(9)
    assert_parity(ours, stock, seed=draws(name), edit=lambda k, x: mask * x + (1 - mask) * known)


def noised(scheduler, name, x0, eps, begin):
    t = scheduler.timesteps[begin : begin + 1]
    return scheduler.scale_noise(x0, t, eps) if name == "FlowEuler" else scheduler.add_noise(x0, eps, t)


@pytest.mark.parametrize("announced", [True, False], ids=["set_begin_index", "first_timestep"])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("num_steps", [6, 16])
def test_every_begin_index(name, num_steps, announced):
    """Image to image: the run starts in the middle, told by set_begin_index (where stock has it) or only by its first timestep."""
    for begin in range(num_steps):
        stock, ours = pair_of(name, num_steps)
        if announced and name != "DDIM":  # DDIM finds its place by value and has no set_begin_index
            stock.set_begin_index(begin)
        if announced:
            ours.set_begin_index(begin)
        x = noised(stock, name, noise(1), noise(2), begin)
        assert_same(noised(ours, name, noise(1), noise(2), begin), x)
        ends = []
        for scheduler in (ours, stock):
            options = {"generator": torch.Generator().manual_seed(3)} if name == "SDE2" else {}
            y, scale = x, getattr(scheduler, "scale_model_input", lambda x, t: x)
            for t in scheduler.timesteps[begin:]:
                y = scheduler.step(network(scale(y, t), t), t, y, return_dict=False, **options)[0]
            ends.append(y)
        assert_same(*ends, f"from index {begin}")
