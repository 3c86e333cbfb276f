"""One scheduler, several runs: each equals the run that has the scheduler to itself, or raises; never a silent mixture."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch

import diffx
from diffx.testing import call_inputs, denoise, tiny_stable_diffusion

SHAPE = (1, 2, 2, 2)
SOLVERS = {
    "DDIM": (diffx.DDIM, dict(clip_sample=False)),
    "Euler": (diffx.Euler, {}),
    "DPM3": (diffx.DPMSolver, dict(solver_order=3)),
    "SDE2": (diffx.DPMSolver, dict(algorithm_type="sde-dpmsolver++")),
    "UniPC3": (diffx.UniPC, dict(solver_order=3)),
}
FORMS = {"t": lambda t: t, "item": lambda t: t.item(), "copy": lambda t: t.clone()}
each_solver = pytest.mark.parametrize("name", SOLVERS)
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def make(name):
    cls, options = SOLVERS[name]
    return cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **options)


def noise(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def network(x, t):
    return 0.8 * torch.tanh(0.9 * x + 0.001 * float(t))


def run(scheduler, seed, num_steps, form=lambda t: t, begin=0):
    """A whole run, ``set_timesteps`` included."""
    scheduler.set_timesteps(num_steps)
    return loop(scheduler, seed, form, begin)


def loop(scheduler, seed, form=lambda t: t, begin=0):
    """The loop of pipelines, which read the list of times once; from ``begin`` > 0 on it is that of image to image."""
    x = noise(seed)
    if begin:
        scheduler.set_begin_index(begin)
    times = scheduler.timesteps[begin:]
    if begin:
        x = scheduler.add_noise(x, noise(seed + 1), times[:1])
    for t in times:
        told = form(t)
        x = scheduler.step(network(scheduler.scale_model_input(x, told), told), told, x).prev_sample
    return x


@pytest.fixture
def elsewhere():
    """Calls a function in another thread, always the same one, and returns its result or raises its error here."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture
def hasty():
    """Threads that take turns after a microsecond instead of five thousand."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(job, count=8):
    """``job(i)`` of each thread i, all started at once; what a thread raised is raised here."""
    start = threading.Barrier(count)

    def held(i):
        start.wait()
        return job(i)

    with ThreadPoolExecutor(max_workers=count) as pool:
        return list(pool.map(held, range(count)))


# ---------------------------------------------------------------------------------------------- threads


@each_form
@each_solver
def test_threads_on_one_scheduler_are_right_or_refused(name, form, hasty):
    """8 threads x 50 runs, of different lengths and starts, so that every mixture of two grids would show."""
    kinds = [
        (seed, num_steps, begin) for seed, (num_steps, begin) in enumerate([(1, 0), (2, 0), (4, 0), (6, 2), (6, 0), (7, 3), (3, 0), (4, 1)])
    ]
    want = [run(make(name), *kind[:2], form, kind[2]) for kind in kinds]
    shared = make(name)

    def job(i):
        refused = 0
        for k in range(50):
            j = (i + k) % len(kinds)
            seed, num_steps, begin = kinds[j]
            try:
                got = run(shared, seed, num_steps, form, begin)
            except ValueError as error:
                assert "two runs are using one scheduler" in str(error) and "fork()" in str(error)
                refused += 1
            else:
                assert torch.equal(got, want[j])
        return refused

    in_threads(job)
    assert torch.equal(run(shared, 0, 6), run(make(name), 0, 6))  # and no harm is left behind


@each_solver
def test_threads_on_forks_are_right(name, hasty):
    origin = make(name)
    origin.set_timesteps(5)
    want = [run(make(name), seed, 5) for seed in range(8)]

    def job(i):
        mine = origin.fork()
        assert torch.equal(loop(mine, i), want[i])  # on the grid it came with
        return all(torch.equal(run(mine, i, 5), want[i]) for _ in range(50))

    assert all(in_threads(job))


@each_form
@each_solver
def test_two_threads_that_take_turns_in_order_are_refused(name, form, elsewhere):
    """Each called ``set_timesteps`` once, and the values that the scheduler sees are those of one proper run."""
    scheduler = make(name)
    scheduler.set_timesteps(6)
    mine = scheduler.timesteps
    elsewhere(scheduler.set_timesteps, 6)
    with pytest.raises(ValueError, match=r"two runs are using one scheduler: set_timesteps\(\) was last called in another thread.*fork"):
        scheduler.step(noise(), form(mine[0]), noise())
    theirs = scheduler.timesteps
    x = elsewhere(lambda: scheduler.step(noise(), form(theirs[0]), noise()).prev_sample)
    with pytest.raises(ValueError, match="two runs are using one scheduler"):
        scheduler.step(x, form(theirs[1]), x)
    elsewhere(lambda: scheduler.step(x, form(theirs[1]), x))  # theirs goes on


@each_form
def test_two_threads_that_share_one_set_timesteps_are_refused(form, elsewhere):
    scheduler = make("DPM3")
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps[:2]:
        scheduler.step(noise(), t, noise())
    for use in (
        lambda: scheduler.step(noise(1), form(scheduler.timesteps[2]), noise(2)),
        lambda: scheduler.set_begin_index(2),
        lambda: scheduler.add_noise(noise(), noise(1), scheduler.timesteps[2:3]),
    ):
        with pytest.raises(ValueError, match="two runs are using one scheduler"):
            elsewhere(use)
    scheduler.step(noise(), scheduler.timesteps[2], noise())


def test_a_step_that_another_thread_cuts_through_raises_and_leaves_no_trace(elsewhere):
    def cut_through(scheduler):
        """A map of x0, the middle of a step, during which another thread starts a run."""

        def x0_map(x0):
            elsewhere(scheduler.set_timesteps, 5)
            return x0

        return x0_map

    for done in (0, 1, 3):  # before the run is there, within it, and at its last step
        scheduler, fresh = diffx.DPMSolver(solver_order=2), diffx.DPMSolver(solver_order=2)
        scheduler.set_timesteps(4)
        mine = list(scheduler.timesteps)
        for t in mine[:done]:
            scheduler.step(noise(), t, noise())
        scheduler._x0_map = cut_through(scheduler)
        with pytest.raises(ValueError, match=r"two runs are using one scheduler: another thread called set_timesteps\(\) meanwhile"):
            scheduler.step(noise(), mine[done], noise())
        assert torch.equal(elsewhere(loop, scheduler, 7), run(fresh, 7, 5))


def test_training_noise_needs_no_run_and_no_thread(elsewhere):
    scheduler = make("DDIM")
    args = noise(), noise(1), torch.tensor([500])
    assert torch.equal(scheduler.add_noise(*args), elsewhere(scheduler.add_noise, *args))
    scheduler.set_timesteps(4)
    scheduler.add_noise(*args)


# ---------------------------------------------------------------------------------------------- one thread


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@each_solver
def test_a_list_of_times_is_known_as_long_as_it_lives(name, mode):
    """However many runs came in between, and though the value would fit the run that is on."""
    with mode():
        scheduler = make(name)
        scheduler.set_timesteps(6)
        old = list(scheduler.timesteps)
        scheduler.step(noise(), old[0], noise())
        for _ in range(20):
            scheduler.set_timesteps(6)
            scheduler.step(noise(), scheduler.timesteps[0], noise())
        with pytest.raises(ValueError, match=r"two runs are using one scheduler: this timestep belongs to an earlier set_timesteps"):
            scheduler.step(noise(), old[1], noise())
        scheduler.step(noise(), scheduler.timesteps[1].clone(), noise())  # its accepted neighbour: a copy of the right time


def test_a_begin_index_cannot_move_a_run_that_is_under_way():
    scheduler = make("DPM3")
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(1)
    scheduler.set_begin_index(0)
    scheduler.step(noise(), scheduler.timesteps[0], noise())
    scheduler.set_begin_index(0)  # says nothing new
    with pytest.raises(ValueError, match="two runs are using one scheduler: begin_index=1 was set while a run is at index 1"):
        scheduler.set_begin_index(1)
    scheduler.step(noise(), scheduler.timesteps[1], noise())


@each_form
@each_solver
def test_forks_may_take_turns(name, form):
    scheduler = make(name)
    scheduler.set_timesteps(6)
    schedulers, want = [scheduler, scheduler.fork(), scheduler.fork()], [run(make(name), seed, 6) for seed in range(3)]
    xs = [noise(seed) for seed in range(3)]
    for k in range(6):
        for i, s in enumerate(schedulers):
            t = form(s.timesteps[k])
            xs[i] = s.step(network(s.scale_model_input(xs[i], t), t), t, xs[i]).prev_sample
    assert all(map(torch.equal, xs, want))


@each_solver
def test_a_fork_is_independent_and_at_the_start(name):
    scheduler = make(name)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(0)
    scheduler.step(noise(), scheduler.timesteps[0], noise())
    fork = scheduler.fork()
    assert type(fork) is type(scheduler) and dict(fork.config) == dict(scheduler.config)
    assert torch.equal(fork.timesteps, scheduler.timesteps) and torch.equal(fork.sigmas, scheduler.sigmas)
    assert fork.step_index is None and fork.begin_index is None and scheduler.step_index == 1
    assert torch.equal(loop(fork, 3), run(make(name), 3, 6))
    assert scheduler.step_index == 1
    fork.timesteps.zero_()
    fork.sigmas.zero_()
    fork.register_to_config(steps_offset=1)
    fork.set_timesteps(3)
    assert len(scheduler.timesteps) == 6 and scheduler.timesteps[0] > 0 and scheduler.sigmas[0] > 0 and scheduler.config.steps_offset == 0
    scheduler.step(noise(), scheduler.timesteps[1], noise())
    assert make(name).fork().step_index is None  # no run to begin with


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda s: pickle.loads(pickle.dumps(s)), "copy": copy.copy}


@each_form
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@each_solver
def test_a_copy_goes_on_in_whichever_thread_first_uses_it(name, copied, form, elsewhere):
    """With the history, the begin index, the arguments of step, and the noise key that the run began with."""
    scheduler, x = make(name), noise()
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(1)
    more = dict(eta=0.7) if name == "DDIM" else {}

    def steps(s, x, times):
        for t in times:
            told = form(t)
            x = s.step(network(s.scale_model_input(x, told), told), told, x, **more).prev_sample
        return x

    x = steps(scheduler, x, scheduler.timesteps[1:4])
    twin, third = copied(scheduler), copied(scheduler)
    assert (twin.step_index, twin.begin_index) == (4, 1)
    there = elsewhere(lambda: steps(twin, x, twin.timesteps[4:]))
    with pytest.raises(ValueError, match="two runs are using one scheduler"):
        twin.step(x, twin.timesteps[6], x)
    here = steps(scheduler, x, scheduler.timesteps[4:])
    assert torch.equal(there, here) and torch.equal(steps(third, x, third.timesteps[4:]), here)


# ---------------------------------------------------------------------------------------------- loops people write


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 3, 4, 4), (2, 3, 2, 4, 4)], ids=lambda shape: f"rank{len(shape)}")
@each_solver
def test_samples_of_any_rank(name, shape):
    """Every entry is stepped alike (but for noise): the numbers of rank 2 in another shape give the same numbers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scheduler, flat = make(name), make(name)
    for s in (scheduler, flat):
        s.set_timesteps(5)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    end = denoise(scheduler, network, x, variance_noise=z)
    assert end.shape == shape and torch.isfinite(end).all()
    assert torch.equal(end.flatten(1), denoise(flat, network, x.flatten(1), variance_noise=z.flatten(1)))


@pytest.mark.parametrize("cls", [diffx.DDIM, diffx.Euler, diffx.DPMSolver, diffx.UniPC])
def test_the_loop_of_the_documentation_with_the_class_changed(cls):
    """25 steps, guidance 7.5, ``eta=0.0`` for those who know it: Diffusers' hand-written text-to-image loop, and the pipeline's."""
    pipe = tiny_stable_diffusion()
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    inputs, scheduler, guidance_scale = call_inputs(pipe), pipe.scheduler, 7.5
    embeddings, negative = pipe.encode_prompt(inputs["prompt"], "cpu", 1, True)
    embeddings = torch.cat([negative, embeddings])
    size = inputs["height"] // pipe.vae_scale_factor
    shape = (1, pipe.unet.config.in_channels, size, size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    extra = dict(eta=0.0) if cls is diffx.DDIM else {}
    with torch.no_grad():
        scheduler.set_timesteps(25)
        latents = latents * scheduler.init_noise_sigma / scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            fed = scheduler.scale_model_input(torch.cat([latents] * 2), timestep=t)
            uncond, cond = pipe.unet(fed, t, encoder_hidden_states=embeddings).sample.chunk(2)
            latents = scheduler.step(uncond + guidance_scale * (cond - uncond), t, latents, **extra).prev_sample
    start = torch.Generator().manual_seed(0)
    got = pipe(**inputs, num_inference_steps=25, guidance_scale=guidance_scale, eta=0.0, generator=start, output_type="latent").images
    stock = {
        diffx.DDIM: diffusers.DDIMScheduler, diffx.Euler: diffusers.EulerDiscreteScheduler,
        diffx.DPMSolver: diffusers.DPMSolverMultistepScheduler, diffx.UniPC: diffusers.UniPCMultistepScheduler,
    }[cls]  # fmt: skip
    pipe.scheduler = stock.from_config(pipe.scheduler.config)
    start = torch.Generator().manual_seed(0)
    want = pipe(**inputs, num_inference_steps=25, guidance_scale=guidance_scale, eta=0.0, generator=start, output_type="latent").images
    # 1e-4 of the largest: float32 through 25 random networks, whose differences guidance 7.5 multiplies.
    for end in (latents, got):
        assert ((end - want).abs().max() / want.abs().max()).item() <= 1e-4
