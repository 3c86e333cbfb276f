"""Grids against their formulas, and lists that cannot be one."""

import numpy as np
import pytest

import diffx
from diffx.schedulers.grid import Convention, karras_sigmas, shift_sigmas, spaced_timesteps

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
