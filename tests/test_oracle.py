"""The oracles are themselves tested: by formulas written another way, by quadrature, and by each other."""

import math

import pytest
import torch

from diffx.oracle import Gaussian, Mixture, finite_data

SHAPE = (2, 3)
LEVELS = {"VP": (0.6, 0.8), "VE": (1.0, 2.5), "flow": (0.3, 0.7)}
TYPES = ["epsilon", "sample", "v_prediction", "flow_prediction"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def covariance(size, seed=1):
    a = randn(size, size, seed=seed)
    return a @ a.T + 0.1 * torch.eye(size, dtype=torch.float64)


def oracles():
    return {
        "gaussian": Gaussian(randn(*SHAPE, seed=2), std=0.5 + randn(*SHAPE, seed=3).abs()),
        "covariance": Gaussian.from_covariance(randn(*SHAPE, seed=2), covariance(6)),
        "mixture": Mixture(randn(4, *SHAPE, seed=4), torch.tensor([0.3, 0.5, 0.2, 0.4]).reshape(4, 1, 1), torch.tensor([1.0, 2, 3, 4])),
        "finite": finite_data(randn(5, *SHAPE, seed=5)),
    }


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_gaussian_posterior_is_the_matrix_formula(level):
    alpha, sigma = level
    mean, cov, x = randn(6), covariance(6), randn(7, 6, seed=8)
    gain = alpha * cov @ torch.linalg.inv(alpha**2 * cov + sigma**2 * torch.eye(6, dtype=torch.float64))
    want = mean + (x - alpha * mean) @ gain.T
    # float64 and a condition number below 1e3
    torch.testing.assert_close(Gaussian.from_covariance(mean, cov).x0(x, alpha, sigma), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_mixture_posterior_is_bayes_by_quadrature(level):
    alpha, sigma = level
    data = Mixture(torch.tensor([[-1.0], [0.5], [2.0]]), torch.tensor([[0.3], [0.1], [0.6]]), torch.tensor([0.5, 0.2, 0.3]))
    c = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    parts = ((0.5, -1, 0.3), (0.2, 0.5, 0.1), (0.3, 2, 0.6))
    prior = sum(w * torch.distributions.Normal(m, s).log_prob(c).exp() for w, m, s in parts)
    for x in (-2.0, 0.0, 0.7, 3.0):
        weight = prior * (-0.5 * ((x - alpha * c) / sigma) ** 2).exp()
        want = (weight * c).sum() / weight.sum()
        got = data.x0(torch.tensor([[x]], dtype=torch.float64), alpha, sigma)
        assert abs(got.item() - want.item()) < 1e-6  # the means and stds above are float32 numbers


def test_finite_data_is_the_softmax_of_squared_distances():
    data, x, (alpha, sigma) = randn(5, *SHAPE, seed=5), randn(3, *SHAPE, seed=6), LEVELS["VP"]
    distance = ((x[:, None] - alpha * data[None]) ** 2).sum((2, 3))
    want = torch.einsum("bk,kij->bij", (-distance / (2 * sigma**2)).softmax(1), data)
    torch.testing.assert_close(finite_data(data).x0(x, alpha, sigma), want)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("name", oracles())
def test_every_prediction_type_carries_the_same_x0(name, level, prediction_type):
    data, (alpha, sigma), x = oracles()[name], level, randn(4, *SHAPE, seed=9)
    out = data.predict(x, alpha, sigma, prediction_type)
    back = {
        "epsilon": lambda: (x - sigma * out) / alpha,
        "sample": lambda: out,
        "v_prediction": lambda: (alpha * x - sigma * out) / (alpha**2 + sigma**2),
        "flow_prediction": lambda: (x - sigma * out) / (alpha + sigma),
    }[prediction_type]()
    torch.testing.assert_close(back, data.x0(x, alpha, sigma), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", oracles())
def test_levels_may_differ_per_sample_and_the_dtype_is_kept(name):
    data, x = oracles()[name], randn(2, *SHAPE, seed=9)
    alpha, sigma = torch.tensor([0.6, 0.3]), torch.tensor([0.8, 0.7])
    both = data.x0(x, alpha.reshape(2, 1, 1), sigma)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], data.x0(x[i : i + 1], alpha[i].item(), sigma[i].item()))
    assert data.x0(x.half(), 0.6, 0.8).dtype == torch.float16
    assert data.predict(x.float(), 0.6, 0.8, "epsilon").dtype == torch.float32
    with pytest.raises(ValueError, match=r"shape \(3,\) fits neither one number nor 2 samples"):
        data.x0(x, torch.ones(3), sigma)


@pytest.mark.parametrize("name", oracles())
def test_flow_obeys_its_differential_equation(name):
    # on VP, x = cos(phi) x0 + sin(phi) eps moves by dx/dphi = v
    data, x, phi, h = oracles()[name], randn(3, *SHAPE, seed=10), 0.9, 1e-4
    level = lambda p: (math.cos(p), math.sin(p))  # noqa: E731
    slope = (data.flow(x, level(phi), level(phi + h)) - data.flow(x, level(phi), level(phi - h))) / (2 * h)
    # central differences: h^2 = 1e-8 times third derivatives of order ten; the integrator's 1e-10 / h = 1e-6
    torch.testing.assert_close(slope, data.predict(x, *level(phi), "v_prediction"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", [("VP", "flow"), ("VE", "VP"), ("flow", "VE")])
@pytest.mark.parametrize("name", oracles())
def test_flow_composes_inverts_and_changes_frame(name, pair):
    data, x = oracles()[name], randn(3, *SHAPE, seed=11)
    start, end, middle = LEVELS[pair[0]], LEVELS[pair[1]], (0.9, 0.5)
    direct = data.flow(x, start, end)
    # 1e-8: two integrations of relative tolerance 1e-10, errors grow by the expansion of the flow
    torch.testing.assert_close(data.flow(data.flow(x, start, middle), middle, end), direct, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(data.flow(direct, end, start), x, rtol=1e-7, atol=1e-7)
    scaled = data.flow(2 * x, (2 * start[0], 2 * start[1]), end)  # the same noise level in another frame
    torch.testing.assert_close(scaled, direct, rtol=1e-8, atol=1e-8)


def test_integrated_flow_equals_the_closed_form():
    mean, std, x = randn(*SHAPE), 0.3, randn(4, *SHAPE, seed=3)
    for start, end in [((0.0, 1.0), (1.0, 0.0)), ((0.6, 0.8), (1.0, 0.0)), ((1.0, 50.0), (1.0, 0.01))]:
        closed, numeric = Gaussian(mean, std).flow(x, start, end), Mixture(mean[None], std).flow(x, start, end)
        torch.testing.assert_close(numeric, closed, rtol=1e-8, atol=1e-8)  # DOP853 at 1e-10


def test_flow_of_points_ends_on_a_point_even_from_pure_noise():
    data = randn(5, *SHAPE, seed=5)
    end = finite_data(data).flow(randn(8, *SHAPE, seed=6), (0.0, 1.0), (1.0, 0.0))
    distance = (end[:, None] - data[None]).abs().amax((2, 3)).amin(1)
    assert distance.max() < 1e-12  # the last step is exact


@pytest.mark.parametrize("name", oracles())
def test_samples_have_the_stated_moments(name):
    data, n = oracles()[name], 20000
    x = data.sample(n, rng()).flatten(1)
    if isinstance(data, Gaussian):
        axes = torch.eye(6, dtype=torch.float64) if data.axes is None else data.axes
        mean, cov = data.mean.flatten(), axes @ torch.diag(data._std().flatten() ** 2) @ axes.T
    else:
        w, m, s = data._log_weights().exp(), data.means.double().flatten(1), data._std().flatten(1)
        mean = w @ m
        cov = torch.diag(w @ s**2) + (w[:, None] * m).T @ m - mean[:, None] * mean
    std = cov.diagonal().sqrt()
    assert ((x.mean(0) - mean).abs() < 4.5 * std / n**0.5).all()  # 4.5 standard errors, six coordinates
    assert (x.T.cov() - cov).abs().max() < 6 * std.max() ** 2 / n**0.5  # fourth moments of these data are below 6
    torch.testing.assert_close(data.sample(3, rng(4)), data.sample(3, rng(4)), rtol=0, atol=0)


def test_bad_input_next_to_its_accepted_neighbour():
    data, x = oracles()["finite"], randn(1, *SHAPE)
    data.x0(x, 1.0, 1e-3)
    with pytest.raises(ValueError, match="sigma=0 on a data set of points"):
        data.x0(x, 1.0, 0.0)
    data.predict(x, 0.6, 0.8, "sample")
    with pytest.raises(ValueError, match="prediction_type='x0' is not one of epsilon, sample"):
        data.predict(x, 0.6, 0.8, "x0")
    Gaussian.from_covariance(randn(6), covariance(6))
    with pytest.raises(ValueError, match="not symmetric"):
        Gaussian.from_covariance(randn(6), randn(6, 6))
    with pytest.raises(ValueError, match="mean has 6 entries"):
        Gaussian.from_covariance(randn(6), covariance(5))
    with pytest.raises(ValueError, match="negative eigenvalue"):
        Gaussian.from_covariance(randn(6), -covariance(6))
