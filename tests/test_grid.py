"""Grids against their formulas, and lists that cannot be one."""

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch

import diffx
from diffx.schedulers.grid import Convention, shift_sigmas, spaced_timesteps
from diffx.schedulers.spacing import (
    ays_sigmas,
    beta_quantile,
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    logsnr_sigmas,
    polyexponential_sigmas,
    quadratic_timesteps,
)

POINTS, ENDS = Convention(), Convention(ends_on_point=True)


def test_the_three_spacings_of_ten_steps():
    # Table 2 of arXiv:2305.08891, T = 1000.
    assert spaced_timesteps("leading", 10, 1000, POINTS).tolist() == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert spaced_timesteps("linspace", 10, 1000, POINTS).tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert spaced_timesteps("trailing", 10, 1000, POINTS).tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]


def test_classes_that_drop_the_last_point():
    assert spaced_timesteps("linspace", 9, 1000, ENDS).tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111]
    assert spaced_timesteps("leading", 9, 1000, ENDS, offset=1).tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101]


def test_karras_is_even_in_the_seventh_root():
    sigmas = karras_sigmas(8, sigma_min=0.1, sigma_max=80.0)
    assert sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.1)
    np.testing.assert_allclose(np.diff(sigmas ** (1 / 7), n=2), 0, atol=1e-14)  # float64


def test_exponential_is_even_in_the_logarithm():
    np.testing.assert_allclose(exponential_sigmas(4, sigma_min=0.01, sigma_max=10.0), [10, 1, 0.1, 0.01], rtol=1e-14)


@pytest.mark.parametrize("a", [0.3, 0.6, 1.0, 2.5, 10.0])
@pytest.mark.parametrize("b", [0.3, 0.6, 1.0, 2.5, 10.0])
def test_beta_quantiles_are_scipys(a, b):
    u = np.concatenate([np.linspace(0, 1, 101), [1e-6, 1 - 1e-6]])
    # The series of shape 10 loses four digits to terms of changing sign, and bisection stops at 2^-61.
    np.testing.assert_allclose(beta_quantile(u, a, b), scipy.stats.beta.ppf(u, a, b), rtol=1e-10, atol=1e-14)
    sigmas = beta_sigmas(9, sigma_min=0.1, sigma_max=10.0, a=a, b=b)
    assert sigmas[0] == 10.0 and sigmas[-1] == 0.1
    if a == b:
        assert sigmas[4] == pytest.approx(5.05)  # the median is the middle


def test_beta_of_shapes_1_is_even_and_b_1_a_power():
    np.testing.assert_allclose(beta_sigmas(5, sigma_min=1.0, sigma_max=9.0, a=1.0, b=1.0), [9, 7, 5, 3, 1], rtol=1e-14)
    # I_x(a, 1) = x^a
    np.testing.assert_allclose(beta_sigmas(5, sigma_min=1e-9, sigma_max=1.0, a=0.5, b=1.0), [1, 9 / 16, 1 / 4, 1 / 16, 0], atol=2e-9)


def test_polyexponential_is_a_power_of_the_ramp_in_the_logarithm():
    # (1, 2/3, 1/3, 0)^2 of nine powers of ten, from 1e-3 on
    sigmas = polyexponential_sigmas(4, sigma_min=1e-3, sigma_max=1e6, rho=2.0)
    np.testing.assert_allclose(sigmas, [1e6, 10.0, 1e-2, 1e-3], rtol=1e-13)
    plain, exponential = (f(7, sigma_min=0.03, sigma_max=14.6) for f in (polyexponential_sigmas, exponential_sigmas))
    np.testing.assert_allclose(plain, exponential, rtol=1e-14)


def test_logsnr_is_even_in_lam_on_flow_models_too():
    sigmas = logsnr_sigmas(5, sigma_min=0.1, sigma_max=0.9)
    np.testing.assert_allclose(sigmas, [0.9, 0.75, 0.5, 0.25, 0.1], rtol=1e-14)  # lam from -log 9 to log 9: 9 = 3^2
    for options in (dict(prediction_type="flow_prediction", shift=3.0), {}):
        scheduler = diffx.DPMSolver(spacing="logsnr", **options)
        scheduler.set_timesteps(8)
        np.testing.assert_allclose(np.diff([call.lam for call in scheduler.plan().calls], n=2), 0, atol=1e-12)  # float64
    flow = diffx.Euler(spacing="logsnr", prediction_type="flow_prediction")
    flow.set_timesteps(8)
    assert flow.sigmas[0] == pytest.approx(0.999) and flow.sigmas[-2:].tolist() == pytest.approx([0.001, 0])
    flow.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))  # as pipelines pass it: between its ends, as for karras
    assert flow.sigmas[0] == pytest.approx(0.999) and flow.sigmas[-2:].tolist() == pytest.approx([0.125, 0])
    with pytest.raises(ValueError, match=r"need 0 < sigma_min < sigma_max < 1, got 0\.001 and 1\.0"):
        diffx.Euler(spacing="logsnr", prediction_type="flow_prediction", sigma_max=1.0).set_timesteps(8)


@pytest.mark.parametrize("options", [{}, dict(prediction_type="flow_prediction", shift=3.0)], ids=["betas", "flow"])
def test_our_fills_have_the_ends_of_diffusers_and_parameters_of_their_own(options):
    grids = {}
    for words in (
        dict(use_beta_sigmas=True),
        dict(spacing="beta"),
        dict(spacing="beta", spacing_alpha=0.4, spacing_beta=0.9),
        dict(use_exponential_sigmas=True),
        dict(spacing="polyexponential"),
        dict(spacing="polyexponential", spacing_rho=2.0),
    ):
        scheduler = diffx.UniPC(**words, **options)
        scheduler.set_timesteps(6)
        grids["/".join(map(str, words.values() if "spacing" in words else words))] = scheduler._grid.sigmas
    np.testing.assert_array_equal(grids["beta"], grids["use_beta_sigmas"])
    np.testing.assert_allclose(grids["polyexponential"], grids["use_exponential_sigmas"], rtol=1e-14)
    for sigmas in grids.values():
        assert sigmas[[0, -2]].tolist() == pytest.approx(grids["beta"][[0, -2]].tolist(), rel=1e-14)
    assert (grids["beta/0.4/0.9"][1:-2] < grids["beta"][1:-2]).all() and (
        grids["polyexponential/2.0"][1:-2] < grids["polyexponential"][1:-2]
    ).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (dict(spacing_rho=2.0), "spacing_rho=2.0 has no effect without spacing='polyexponential'; set both or neither"),
        (dict(spacing="polyexponential", spacing_alpha=0.5), "spacing_alpha=0.5 has no effect without spacing='beta'"),
        (dict(spacing="polyexponential", spacing_rho=0.0), "spacing_rho=0.0 must be above 0; 1 is exponential"),
        (dict(spacing="beta", spacing_beta=11.0), "spacing_beta=11.0 must lie between 0 and 10"),
        (dict(spacing="beta", use_beta_sigmas=True), "spacing='beta' contradicts use_beta_sigmas=True; set one of them"),
        (dict(shift=3.0), "shift=3.0 is for flow models"),
    ],
)
def test_words_without_effect_or_sense(words, message):
    diffx.DPMSolver(spacing="polyexponential", spacing_rho=2.0).set_timesteps(4)
    diffx.DPMSolver(spacing="beta", spacing_alpha=0.5, spacing_beta=10.0).set_timesteps(4)
    with pytest.raises(ValueError, match=message):
        diffx.DPMSolver(**words).set_timesteps(4)


def test_quadratic_times():
    # (i / 9)^2 of 999, rounded; T steps visit every time once.
    assert quadratic_timesteps(10, 1000).tolist() == [999, 789, 604, 444, 308, 197, 111, 49, 12, 0]
    assert quadratic_timesteps(1, 1000).tolist() == [999]
    for num_steps in (2, 50, 400, 999, 1000):
        times = quadratic_timesteps(num_steps, 1000)
        assert times[0] == 999 and times[-1] == 0 and (np.diff(times) <= -1).all()


@pytest.mark.parametrize("name", ["ays_sd", "ays_sdxl", "ays_svd"])
def test_align_your_steps_at_ten_and_other_counts(name):
    published = {
        "ays_sd": "StableDiffusionSigmas", "ays_sdxl": "StableDiffusionXLSigmas", "ays_svd": "StableDiffusionVideoSigmas"
    }[name]  # fmt: skip
    want = diffusers.schedulers.AysSchedules[published]
    np.testing.assert_allclose([*ays_sigmas(10, name), 0], want, rtol=1e-14)
    np.testing.assert_allclose(ays_sigmas(19, name)[::2], want[:-1], rtol=1e-14)  # halved intervals keep the points ...
    np.testing.assert_allclose(ays_sigmas(19, name)[1], np.sqrt(want[0] * want[1]), rtol=1e-14)  # ... and add geometric means
    assert ays_sigmas(1, name).tolist() == [pytest.approx(want[0])]


def test_the_classes_take_our_spacings():
    scaled = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    for cls in (diffx.Euler, diffx.DPMSolver):
        ays = cls(spacing="ays_sd", **scaled)
        ays.set_timesteps(10)
        np.testing.assert_allclose(ays.sigmas, diffusers.schedulers.AysSchedules["StableDiffusionSigmas"], rtol=1e-6)  # float32
        # the published times, rounded otherwise and from rounded sigmas: within 6 of 1000
        assert np.abs(ays.timesteps.numpy() - diffusers.schedulers.AysSchedules["StableDiffusionTimesteps"]).max() <= 6
    quadratic = diffx.DDIM.from_config(diffusers.DDIMScheduler(timestep_spacing="trailing").config, spacing="quadratic")
    quadratic.set_timesteps(10)
    assert quadratic.timesteps.tolist() == [999, 789, 604, 444, 308, 197, 111, 49, 12, 0]
    with pytest.raises(ValueError, match="contradicts timestep_spacing='trailing'"):
        diffx.DDIM.from_config(quadratic.config, spacing="quadratic", timestep_spacing="trailing")


def test_our_spacing_survives_a_file(tmp_path):
    diffx.DPMSolver(spacing="quadratic").save_pretrained(tmp_path)
    again = diffx.DPMSolver.from_pretrained(tmp_path)
    assert again.config.spacing == "quadratic"
    again.set_timesteps(6)
    assert again.timesteps[0] == 999


def test_betas_quadratic_and_sigmoid():
    quadratic, scaled = (diffx.DDIM(beta_schedule=name, beta_start=0.00085, beta_end=0.012) for name in ("quadratic", "scaled_linear"))
    assert torch.equal(quadratic.betas, scaled.betas)
    assert quadratic.config.beta_schedule == "scaled_linear"  # saved by the name that Diffusers reads
    assert torch.equal(diffx.DDPM(beta_schedule="sigmoid").betas, diffusers.DDPMScheduler(beta_schedule="sigmoid").betas)


def test_shift_moves_the_middle_and_keeps_the_ends():
    np.testing.assert_allclose(shift_sigmas(np.array([0.0, 0.5, 1.0]), 3.0), [0.0, 0.75, 1.0])
    np.testing.assert_allclose(shift_sigmas(shift_sigmas(np.linspace(0, 1, 9), 3.0), 1 / 3), np.linspace(0, 1, 9), atol=1e-15)


def test_karras_refuses_an_empty_range():
    karras_sigmas(4, sigma_min=0.1, sigma_max=0.2)
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        karras_sigmas(4, sigma_min=0.2, sigma_max=0.1)


def test_video_times_are_a_quarter_log_sigma():
    # Stable Video Diffusion's scheduler config.
    svd = diffx.Euler(timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0)
    svd.set_timesteps(6)
    np.testing.assert_allclose(svd.timesteps.numpy(), 0.25 * np.log(svd.sigmas[:-1].numpy()), rtol=1e-6)  # float32 tensors
    assert svd.sigmas[0] == 700


def test_the_pipelines_sigmas_are_shifted_once_and_ours_twice():
    # FlowMatchEuler's own default range starts from an already shifted table; what a pipeline passes does not.
    flow = diffx.Euler(prediction_type="flow_prediction", shift=3.0)
    flow.set_timesteps(sigmas=[1.0, 0.5])
    np.testing.assert_allclose(flow.sigmas, [1.0, 0.75, 0.0])
    flow.set_timesteps(2)
    np.testing.assert_allclose(flow.sigmas, [1.0, shift_sigmas(shift_sigmas(np.array(0.001), 3.0), 3.0), 0.0], rtol=1e-6)  # float32


def test_two_names_of_one_shift_may_not_differ():
    diffx.UniPC(prediction_type="flow_prediction", shift=3.0, flow_shift=3.0).set_timesteps(4)
    with pytest.raises(ValueError, match="contradicts flow_shift=5"):
        diffx.UniPC(prediction_type="flow_prediction", shift=3.0, flow_shift=5.0).set_timesteps(4)


def test_more_steps_than_times_are_refused():
    diffx.DDIM(num_train_timesteps=20).set_timesteps(20)
    with pytest.raises(ValueError, match="num_inference_steps=21 is more than the 20 train times"):
        diffx.DDIM(num_train_timesteps=20).set_timesteps(21)
