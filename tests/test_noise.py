"""Noise of the stochastic solvers: where it comes from, who gets which, and how much of it there is."""

import math

import numpy as np
import pytest
import torch

import diffx
from diffx.oracle import Gaussian, finite_data
from diffx.schedulers.multistep import dpm, dpm_excess, dpmpp
from diffx.schedulers.noise import keyed_normal, seeds_of
from diffx.schedulers.one_step import ddim
from diffx.schedulers.stochastic import ddpm, flow_ancestral
from diffx.schedulers.table import State, Table, advance
from diffx.testing import call_inputs, denoise, tiny_flux, tiny_sd3

SDE = dict(algorithm_type="sde-dpmsolver++")
BUILDS = {"sd3": tiny_sd3, "flux": tiny_flux}


@pytest.fixture(params=["sd3", "flux"])
def pipe(request):
    """A pipeline that never hands its generator to the scheduler."""
    return BUILDS[request.param]()


def rng(seed):
    return torch.Generator().manual_seed(seed)


def run(pipe, generator, batch_size=1, options=None, **call):
    pipe.scheduler = diffx.DPMSolver.from_config(pipe.scheduler.config, **{"seed": None, **SDE, **(options or {})})
    call = call_inputs(pipe, batch_size) | {"generator": generator, "num_inference_steps": 5} | call
    return pipe(**call, output_type="latent").images


# ---------------------------------------------------------------------------------------------- where it comes from


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_pipelines_generator_seeds_the_solver(pipe, order):
    options = dict(solver_order=order)
    first, again, other = (run(pipe, rng(seed), options=options) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-2)


def test_the_noise_is_there(pipe):
    """The stochastic run is not the deterministic one, and differs by more than a rounding."""
    noisy = run(pipe, rng(0))
    pipe.scheduler = diffx.DPMSolver.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    plain = pipe(**call_inputs(pipe), generator=rng(0), num_inference_steps=5, output_type="latent").images
    assert (noisy - plain).abs().max() > 1e-2


def test_global_random_state_is_neither_used_nor_moved(pipe):
    torch.manual_seed(1)
    np.random.seed(1)
    one = run(pipe, rng(0))
    before = torch.get_rng_state()
    two = run(pipe, rng(0))
    assert torch.equal(one, two) and torch.equal(before, torch.get_rng_state())


def test_an_image_does_not_depend_on_its_place_in_the_batch(pipe):
    """Three images, each with its own generator; then the last one first, and alone."""
    prompts = call_inputs(pipe, 3)["prompt"]

    def images(which):
        return run(pipe, [rng(i) for i in which], prompt=[prompts[i] for i in which])

    straight, turned, alone = images([0, 1, 2]), images([2, 0, 1]), images([2])
    # matrix products of another batch size round differently (measured 1e-6 of entries around 1); noise would differ by 1
    torch.testing.assert_close(turned, straight[[2, 0, 1]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone, straight[[2]], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(straight[0], straight[1], atol=1e-2)


def test_seeds_in_the_config_override_the_latents(pipe):
    same_latents = lambda seed: run(pipe, rng(0), options=dict(seed=seed))  # noqa: E731
    assert torch.equal(same_latents(7), same_latents(7))
    assert not torch.allclose(same_latents(7), same_latents(8), atol=1e-2)
    assert not torch.allclose(same_latents(7), run(pipe, rng(0)), atol=1e-2)


def test_steps_draw_different_noise():
    """One sample, two calls, two samples, one call: four fields that share nothing."""
    fields = torch.cat([keyed_normal((1, 2), call, (2, 4, 64, 64)) for call in (0, 1)]).flatten(1).double()
    n = fields.shape[1]
    correlation = fields @ fields.T / n
    assert (correlation - torch.eye(4, dtype=torch.float64)).abs().max() < 5 * math.sqrt(2 / n)  # five standard errors of a variance
    assert fields.mean(1).abs().max() < 5 / n**0.5


def test_keys_depend_on_content_alone():
    x = torch.randn(3, 4, 8, 8, generator=rng(0))
    seeds = seeds_of(x, None)
    assert len(set(seeds)) == 3
    assert seeds_of(x.flip(0), None) == seeds[::-1] and seeds_of(x[1:2], None) == seeds[1:2]
    one = keyed_normal(seeds, 5, x.shape)
    assert torch.equal(keyed_normal(seeds[::-1], 5, x.shape), one.flip(0))
    assert seeds_of(x, 3) != seeds_of(x, 4) and len(set(seeds_of(x, 3))) == 3
    assert seeds_of(x, (3, 4, 5)) != seeds_of(x, (3, 4, 6))
    big = 2**40  # torch's CPU generator ignores bits above 32; keys must not
    assert seeds_of(x[:1], (1,)) != seeds_of(x[:1], (1 + big,))
    with pytest.raises(ValueError, match="2 seeds were given for a batch of 3"):
        seeds_of(x, (1, 2))


def test_keyed_noise_is_pinned():
    """Saved seeds keep their pictures: these numbers may never change."""
    got = keyed_normal((1, 2**63 + 5), 3, (2, 3))
    streams = [np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 3, 0])) for key in (1, 2**63 + 5)]
    assert np.array_equal(got.numpy(), np.stack([stream.standard_normal(3, dtype=np.float32) for stream in streams]))


def test_a_generator_that_reaches_step_is_used_like_in_the_twin():
    """Two runs from one generator state are equal; without a generator the key takes over."""
    x = torch.randn(2, 3, 4, 4, generator=rng(0))
    network = lambda x, t: 0.3 * torch.tanh(x)  # noqa: E731

    def end(**step):
        scheduler = diffx.DPMSolver(**SDE)
        scheduler.set_timesteps(6)
        return denoise(scheduler, network, x, **step)

    assert torch.equal(end(generator=rng(1)), end(generator=rng(1)))
    assert not torch.equal(end(generator=rng(1)), end(generator=rng(2)))
    assert torch.equal(end(), end()) and not torch.equal(end(), end(generator=rng(1)))
    one = end(generator=[rng(1), rng(2)])  # one generator per sample, as Diffusers allows
    assert not torch.equal(one[0], one[1])


def test_given_noise_is_used_as_it_is():
    scheduler, x, z = diffx.DPMSolver(**SDE), torch.zeros(1, 2, 3, 3), torch.randn(1, 2, 3, 3, generator=rng(0))
    scheduler.set_timesteps(4)
    noise = scheduler.plan().calls[0].noise
    out = scheduler.step(x, scheduler.timesteps[0], x, variance_noise=z).prev_sample
    torch.testing.assert_close(out, noise * z)
    assert noise > 0


# ---------------------------------------------------------------------------------------------- how much of it there is


def levels(frame, num_steps, lam=(-4.0, 4.0)):
    lam = np.linspace(*lam, num_steps + 1)
    if frame == "ve":
        return np.ones_like(lam), np.exp(-lam)
    sigma = 1 / (1 + np.exp(lam)) if frame == "flow" else 1 / np.sqrt(1 + np.exp(2 * lam))
    return (1 - sigma if frame == "flow" else np.sqrt(1 - sigma**2)), sigma


STOCHASTIC = {
    "ddim_eta1": lambda a, s: ddim(a, s, eta=1.0),
    "ddim_eta0.5": lambda a, s: ddim(a, s, eta=0.5),
    "sde_dpm1": lambda a, s: dpmpp(a, s, [1] * (len(a) - 1), eta=1.0),
    "sde_dpm2": lambda a, s: dpmpp(a, s, [min(i + 1, 2) for i in range(len(a) - 1)], eta=1.0),
    "sde_dpm2_eta0.4": lambda a, s: dpmpp(a, s, [min(i + 1, 2) for i in range(len(a) - 1)], eta=0.4),
    "sde_dpm2_eta1.7": lambda a, s: dpmpp(a, s, [min(i + 1, 2) for i in range(len(a) - 1)], eta=1.7),
    "sde_dpm3": lambda a, s: dpmpp(a, s, [min(i + 1, 3) for i in range(len(a) - 1)], eta=1.0),
    "ddpm": lambda a, s: ddpm(a, s),
    "ancestral": lambda a, s: flow_ancestral(s) if a[0] < 1 else ddim(a, s, eta=1.0),
    "ancestral_eta0.5": lambda a, s: flow_ancestral(s, eta=0.5) if a[0] < 1 else ddim(a, s, eta=0.5),
}
# These leave the levels of the grid at finite steps, by their own definition, see below.
LEAVING = {f"sde_eps{order}": lambda a, s, order=order: dpm(a, s, [min(i + 1, order) for i in range(len(a) - 1)], stochastic=True)
           for order in (1, 2, 3)}  # fmt: skip
LEAVING_CASES = [(name, frame) for name in LEAVING for frame in ("vp", "flow")]
CASES = [(name, frame) for name in STOCHASTIC for frame in (("ve", "flow") if "ancestral" in name else ("vp", "flow"))]


def table_of(name, alpha, sigma):
    rows = (STOCHASTIC | LEAVING)[name](alpha, sigma)
    return Table(alpha, sigma, tuple(rows), excess=dpm_excess(sigma, rows) if name in LEAVING else 1e-9)


def particles(table, data, n, seed):
    """``n`` samples carried through the whole table with the exact denoiser, (n, D) after each row."""
    z, state = rng(seed), State()
    draw = lambda: torch.randn(n, *data.sample(1).shape[1:], generator=z, dtype=torch.float64)  # noqa: E731
    x = table.alpha[0] * data.sample(n, z) + table.sigma[0] * draw()
    for k in range(len(table.rows)):
        x, state = advance(table, state, x, data.x0(x, table.alpha[k], table.sigma[k]), draw)
        yield x


@pytest.mark.parametrize(("name", "frame"), CASES)
def test_every_level_of_one_point_has_variance_sigma_squared(name, frame):
    """One-point data: whatever the step size, the spread around alpha x0 after each row is sigma exactly."""
    alpha, sigma = levels(frame, 6)
    table = Table(alpha, sigma, tuple(STOCHASTIC[name](alpha, sigma)))
    assert sum(row.noise > 0 for row in table.rows) == 6
    point, n = torch.tensor([[1.3]], dtype=torch.float64), 40000
    for k, x in enumerate(particles(table, finite_data(point), n, seed=2), 1):
        assert abs(x.mean().item() - alpha[k] * 1.3) < 4 * sigma[k] / n**0.5  # 4 standard errors, six rows, ten cases
        assert abs(x.var().item() / sigma[k] ** 2 - 1) < 4 * math.sqrt(2 / n)


def shrink(alpha, sigma, std):
    """E[x0 | x] = shrink x for normal data of mean 0."""
    return alpha * std**2 / (alpha**2 * std**2 + sigma**2)


def exact_variance(table, std):
    """Variance after each row on N(0, std^2) data: everything is linear in the start and the draws, so follow their weights."""
    calls, state = len(table.rows), State()
    basis = iter(torch.eye(calls + 1, dtype=torch.float64))
    x = math.sqrt(table.alpha[0] ** 2 * std**2 + table.sigma[0] ** 2) * next(basis)
    for k in range(calls):
        x, state = advance(table, state, x, shrink(table.alpha[k], table.sigma[k], std) * x, lambda: next(basis))
        yield x.square().sum().item()


@pytest.mark.parametrize(("name", "frame"), CASES + LEAVING_CASES)
def test_sampled_variance_is_the_analytic_one(name, frame):
    """Six coarse steps on Gaussian data: the spread of 40000 samples after each row, within 3 standard errors."""
    std, n = 0.8, 40000
    alpha, sigma = levels(frame, 6)
    table = table_of(name, alpha, sigma)
    want = list(exact_variance(table, std))
    for k, x in enumerate(particles(table, Gaussian(torch.zeros(1, dtype=torch.float64), std), n, seed=3)):
        assert abs(x.mean().item()) < 3 * math.sqrt(want[k] / n)
        assert abs(x.var().item() / want[k] - 1) < 3 * math.sqrt(2 / n)


@pytest.mark.parametrize(("name", "frame"), CASES + LEAVING_CASES)
def test_fine_grids_reach_the_variance_of_the_data(name, frame):
    """The analytic variance tends to the marginal's: its error falls at least like the step, and is gone when extrapolated to step 0."""
    std, errors = 0.8, []
    for num_steps in (200, 400):
        alpha, sigma = levels(frame, num_steps)
        *_, end = exact_variance(table_of(name, alpha, sigma), std)
        errors.append(end / (alpha[-1] ** 2 * std**2 + sigma[-1] ** 2) - 1)
    assert abs(errors[1]) < 0.6 * abs(errors[0]), errors
    assert abs(2 * errors[1] - errors[0]) < 1e-3, errors  # what is left is of second order: (0.02)^2


@pytest.mark.parametrize("frame", ["vp", "flow"])
def test_ddim_with_eta_1_is_ddpms_posterior(frame):
    """The same variances from DDPM's q(x' | x, x0), written here and not from the table."""
    std = 0.8
    alpha, sigma = levels(frame, 6)
    got = list(exact_variance(Table(alpha, sigma, tuple(ddim(alpha, sigma, eta=1.0))), std))
    variance, want = alpha[0] ** 2 * std**2 + sigma[0] ** 2, []
    for a0, s0, a1, s1 in zip(alpha, sigma, alpha[1:], sigma[1:], strict=False):
        step = s0**2 - (a0 / a1) ** 2 * s1**2  # variance that the forward process adds from level 1 to level 0
        on_x, on_x0 = (a0 / a1) * s1**2 / s0**2, a1 * step / s0**2
        variance = (on_x + on_x0 * shrink(a0, s0, std)) ** 2 * variance + step * s1**2 / s0**2
        want.append(variance)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("frame", ["vp", "flow"])
def test_ddpms_large_variance_is_that_of_the_forward_step(frame):
    """Variances from x' = posterior mean + sqrt(beta) z, written here; they lie above the grid's levels, which the table states."""
    std = 0.8
    alpha, sigma = levels(frame, 6)
    rows, small = ddpm(alpha, sigma, large=True), ddpm(alpha, sigma)
    with pytest.raises(ValueError, match="row 0 lands on alpha="):
        Table(alpha, sigma, tuple(rows))
    excess = sum(row.noise**2 - other.noise**2 for row, other in zip(rows, small, strict=True)) + 1e-9
    got = list(exact_variance(Table(alpha, sigma, tuple(rows), excess=excess), std))
    variance = alpha[0] ** 2 * std**2 + sigma[0] ** 2
    for k, (a0, s0, a1, s1) in enumerate(zip(alpha, sigma, alpha[1:], sigma[1:], strict=False)):
        beta = s0**2 - (a0 / a1) ** 2 * s1**2
        on_x, on_x0 = (a0 / a1) * s1**2 / s0**2, a1 * beta / s0**2
        variance = (on_x + on_x0 * shrink(a0, s0, std)) ** 2 * variance + beta
        assert got[k] == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("frame", ["vp", "flow"])
def test_the_sde_on_noise_predictions_leaves_the_levels_by_its_own_formula(frame):
    """One-point data, x' = (a1 / a0) x - 2 s1 (e^h - 1) eps + s1 sqrt(e^2h - 1) z: the mean is kept, the variance is not."""
    alpha, sigma = levels(frame, 6)
    with pytest.raises(ValueError, match="row 0 lands on alpha="):
        Table(alpha, sigma, tuple(LEAVING["sde_eps1"](alpha, sigma)))
    growth = np.exp(np.diff(np.log(alpha / sigma)))  # e^h
    want, variance = [], sigma[0] ** 2
    for s0, s1, g in zip(sigma, sigma[1:], growth, strict=False):
        variance = (s1 / s0 * (2 - g)) ** 2 * variance + s1**2 * (g**2 - 1)
        want.append(variance)
    assert want[0] == pytest.approx(sigma[1] ** 2 * (1 + 2 * (growth[0] - 1) ** 2), rel=1e-12)
    for name in LEAVING:
        table, got = table_of(name, alpha, sigma), []
        for k, x in enumerate(particles(table, finite_data(torch.tensor([[1.3]], dtype=torch.float64)), 40000, seed=2)):
            got.append(x.var().item())
            assert abs(x.mean().item() - alpha[k + 1] * 1.3) < 4 * (got[k] / 40000) ** 0.5  # 4 standard errors
        exact = list(exact_variance(table, 0.0))  # of the point 0
        np.testing.assert_allclose(got, exact, rtol=4 * math.sqrt(2 / 40000))
        if name == "sde_eps1":
            np.testing.assert_allclose(exact, want, rtol=1e-12)
        assert np.abs(exact - sigma[1:] ** 2).max() <= table.excess


def test_a_perfect_model_leads_the_sde_on_noise_predictions_to_its_point():
    """The last step is x0, whatever the steps before left; float64, since the first ones multiply what is there by e^h."""
    data, draw = finite_data(torch.full((1, 1, 2, 2), 0.7, dtype=torch.float64)), rng(1)
    for order in (1, 2, 3):
        scheduler = diffx.DPMSolver(algorithm_type="sde-dpmsolver", solver_order=order)
        scheduler.set_timesteps(7)
        x = torch.randn(2, 1, 2, 2, generator=draw, dtype=torch.float64)
        for t, call in zip(scheduler.timesteps, scheduler.plan().calls, strict=True):
            out = data.predict(x, 1 / math.hypot(1, call.sigma), call.sigma / math.hypot(1, call.sigma), "epsilon")
            x = scheduler.step(out, t, x, generator=draw).prev_sample
        assert (x - 0.7).abs().max() < 1e-10


def test_boundary_scaling_leaves_the_marginal_by_what_the_table_states():
    """c_skip at 4 steps is below 4e-8, so the stated excess is far below any noise; at a small scaling it is not, and is stated."""
    for scaling, bound in ((10.0, 4e-6), (0.01, 2.5)):
        scheduler = diffx.LCM(timestep_scaling=scaling)
        scheduler.set_timesteps(4)
        table = scheduler._table(0)
        off = [abs(row.sample[0] * a + row.sample[1] - b) for row, a, b in zip(table.rows, table.alpha[:-1], table.alpha[1:], strict=True)]
        assert 0 < max(off) <= table.excess <= bound
        scaled = scheduler.timesteps.double() * scaling
        for row, s, b in zip(table.rows, scaled.tolist(), table.alpha[1:], strict=True):  # the paper's formulas
            want = (b * 0.25 / (s**2 + 0.25), b * s / math.sqrt(s**2 + 0.25))
            assert row.sample == pytest.approx(want, rel=1e-12)


def test_s_noise_scales_every_draw():
    scheduler, x = diffx.EulerAncestral(s_noise=0.6), torch.zeros(1, 2, 3, 3)
    stock = diffx.EulerAncestral()
    for each in (scheduler, stock):
        each.set_timesteps(5)
    for ours, theirs in zip(scheduler.plan().calls, stock.plan().calls, strict=True):
        assert (ours.noise, ours.sample) == (0.6 * theirs.noise, theirs.sample)
    for cls in (diffx.EulerAncestral, diffx.DPMSolver):
        with pytest.raises(ValueError, match=r"eta=-0\.1 must"):
            cls(eta=-0.1)
    with pytest.raises(ValueError, match="s_noise=-1 must be a finite factor"):
        diffx.EulerAncestral(s_noise=-1)
    assert torch.isfinite(scheduler.step(x, scheduler.timesteps[0], x).prev_sample).all()


def test_eta_runs_from_the_ode_to_the_sde():
    """eta=0 is DPM-Solver++ to the bit, eta=1 the stock SDE; an ODE has no noise to share."""
    ode, none, half, sde = (
        diffx.DPMSolver(**options) for options in (dict(), dict(eta=0.0, **SDE), dict(eta=0.5, **SDE), dict(eta=1.0, **SDE))
    )
    for scheduler in (ode, none, half, sde):
        scheduler.set_timesteps(8)
    assert none.plan().calls == ode.plan().calls
    for low, middle, high in zip(none.plan().calls[:-1], half.plan().calls[:-1], sde.plan().calls[:-1], strict=True):
        assert 0 == low.noise < middle.noise < high.noise
    assert "eta" not in sde.config and half.config.eta == 0.5
    with pytest.raises(ValueError, match=r'eta=0\.5 needs algorithm_type="sde-dpmsolver'):
        diffx.DPMSolver(eta=0.5)


@pytest.mark.parametrize("name", ["DDIM", "SDE1", "SDE2"])
def test_the_classes_end_with_the_spread_of_the_data(name):
    """As users run them, on the Stable Diffusion betas, followed by weights as above: ``variance_noise`` is a basis vector."""
    std, num_steps = 0.8, 400
    common = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing")
    if name == "DDIM":
        scheduler, options = diffx.DDIM(clip_sample=False, **common), dict(eta=1.0)
    else:
        scheduler, options = diffx.DPMSolver(solver_order=int(name[-1]), **SDE, **common), {}
    scheduler.set_timesteps(num_steps)
    basis = torch.eye(num_steps + 1, dtype=torch.float64)
    x = basis[:1]
    for k, t in enumerate(scheduler.timesteps):
        s = scheduler.sigmas[k].item()
        alpha, sigma = 1 / math.hypot(1, s), s / math.hypot(1, s)
        eps = (x - alpha * shrink(alpha, sigma, std) * x) / sigma
        x = scheduler.step(eps, t, x, variance_noise=basis[k + 1 : k + 2], **options).prev_sample
    # first order in the step: 2.4 % at 400 steps, see the extrapolation above
    assert abs(x.square().sum().item() / std**2 - 1) < 0.03
