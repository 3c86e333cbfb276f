"""The noising process: frames, betas, and conversions of network outputs, against formulas written out here."""

import math

import diffusers
import numpy as np
import pytest
import torch

import diffx
from diffx.schedulers.process import PredictionType, Process, get_args, is_flow, x0_weights

LEVELS = {"vp": (0.6, 0.8), "ve": (1.0, 3.0), "flow": (0.25, 0.75)}


@pytest.mark.parametrize("frame", LEVELS)
@pytest.mark.parametrize("prediction_type", get_args(PredictionType))
def test_every_output_gives_back_x0(frame, prediction_type):
    alpha, sigma = LEVELS[frame]
    x0, eps = np.float64(0.3), np.float64(-1.7)
    r = math.hypot(alpha, sigma)  # the network was trained in VP units: its v has them in every frame
    out = {"epsilon": eps, "sample": x0, "v_prediction": (alpha * eps - sigma * x0) / r, "flow_prediction": eps - x0}[prediction_type]
    a, b = x0_weights(prediction_type, alpha, sigma)
    assert a * (alpha * x0 + sigma * eps) + b * out == pytest.approx(x0, rel=1e-14)  # float64 rounding of four products


def test_unknown_prediction_type_lists_the_known_ones():
    x0_weights("epsilon", 0.5, 0.5)
    with pytest.raises(ValueError, match="'eps' is not one of epsilon, sample, v_prediction, flow_prediction"):
        x0_weights("eps", 0.5, 0.5)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("frame", LEVELS)
def test_frames(frame):
    sigmas = np.array([0.9, 0.4, 0.0]) if frame == "flow" else np.array([80.0, 1.0, 0.0])
    alpha, sigma = Process(frame, "sample", 1000, np.arange(1.0, 1001.0)).levels(sigmas)
    expected = {"vp": alpha**2 + sigma**2, "ve": alpha, "flow": alpha + sigma}[frame]
    np.testing.assert_allclose(expected, 1, rtol=1e-15)  # float64
    ratio = sigma if frame == "flow" else sigma / alpha
    np.testing.assert_allclose(ratio, sigmas, rtol=1e-15)


def test_exactly_zero_terminal_snr_is_pure_noise():
    alpha, sigma = Process("vp", "v_prediction", 2, np.array([1.0, np.inf])).levels(np.array([np.inf, 1.0]))
    assert (alpha[0], sigma[0]) == (0.0, 1.0)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
def test_betas_are_the_bits_of_diffusers(schedule, rescale):
    words = {"trained_betas": np.linspace(1e-4, 0.02, 1000)} if schedule == "trained" else {"beta_schedule": schedule}
    ours = diffx.DDIM(rescale_betas_zero_snr=rescale, **words)
    stock = diffusers.DDIMScheduler(rescale_betas_zero_snr=rescale, **words)
    assert torch.equal(ours.betas, stock.betas) and torch.equal(ours.alphas_cumprod, stock.alphas_cumprod)


@pytest.mark.parametrize("cls", [diffx.DDIM, diffx.Euler, diffx.DPMSolver, diffx.UniPC])
def test_trained_betas_of_another_length_are_refused_where_a_time_is_looked_up(cls):
    """Construction takes them, as in Diffusers, whose tests make schedulers of two betas and never run them."""
    good, bad = (cls(trained_betas=[0.01] * n) for n in (1000, 999))
    x, t = torch.ones(1, 3, 2, 2), torch.tensor([5])
    good.set_timesteps(4)
    good.set_timesteps(sigmas=[9.0, 3.0, 0.0])
    good.add_noise(x, x, t)
    uses = lambda: bad.set_timesteps(4), lambda: bad.set_timesteps(sigmas=[9.0, 3.0, 0.0]), lambda: bad.add_noise(x, x, t)
    for use in uses:
        with pytest.raises(ValueError, match="trained_betas has 999 numbers, num_train_timesteps is 1000; they must agree"):
            use()


def test_unknown_beta_schedule_is_refused():
    with pytest.raises(ValueError, match="beta_schedule='cosine' is not one of linear, scaled_linear, squaredcos_cap_v2"):
        diffx.Euler(beta_schedule="cosine")


def test_times_and_sigmas_are_inverse():
    process = diffx.Euler()._process
    t = np.linspace(1, 998, 57)
    whole = np.round(t)
    np.testing.assert_allclose(process.t_at(process.sigma_at(whole)), whole, rtol=1e-12)  # float64 logarithms
    # Between train times sigma is linear in t and t is linear in log sigma, Diffusers' two rules: they meet at whole times only.
    assert np.abs(process.t_at(process.sigma_at(t)) - t).max() < 0.5


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_flow_config_is_recognised_by_its_keys(name):
    assert is_flow(getattr(diffusers, name)().config)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_config_with_betas_is_not_a_flow_config(name):
    cls = getattr(diffusers, name)
    assert not is_flow(cls().config)
    if name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        assert is_flow(cls(use_flow_sigmas=True, prediction_type="flow_prediction").config)
