"""Calibration: its parts against brute force and closed forms, and whole runs on data whose exact denoiser is known."""

import itertools
import json
import math
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import torch

import diffx
from diffx.calibration import NetworkProblem, PipelineProblem, Settings, api, calibrate_problems, cost
from diffx.calibration.fixed import BETA_PAIRS, FLOW_PAIRS, calibration_of, candidates
from diffx.calibration.learn import TRIALS, Knobs, Runner, knobs_of, loss_of, mean_distance, normal_equations
from diffx.calibration.path import best_grid
from diffx.calibration.problem import mu_of
from diffx.calibration.reference import recorded
from diffx.calibration.stages import Calibrator, cost_of
from diffx.oracle import Mixture
from diffx.schedulers import Calibrated
from diffx.schedulers.calibrated import fingerprint
from diffx.testing import call_inputs, denoise, tiny_flux, tiny_sd3, tiny_stable_diffusion

BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
VP = dict(diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **BETAS).config)
FLOW = dict(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
DATA = Mixture(torch.tensor([[-1.0, 0.5], [1.0, 0.8], [0.2, -1.2]], dtype=torch.float64), 0.25)
SMALL = dict(num_samples=48, num_held_out=48, reference_steps=40, iterations=3, batch_size=48)


def flow_network(x, t):
    sigma = min(float(t) / 1000, 1 - 1e-9)
    return DATA.predict(x, 1 - sigma, sigma, "flow_prediction")


def problems(network=flow_network):
    return [NetworkProblem(network, FLOW, (2,), "three-gaussians", seed=seed) for seed in (0, 1)]


def smooth(x, t):
    return 0.8 * torch.tanh(0.9 * x + 0.001 * float(t)) + 0.05 * torch.sin(3 * x)


def noise(seed=0, shape=(2, 3, 4, 4)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def learned(config=FLOW, calls=5):
    """A calibration that no fixed sampler makes: a cubic history, moved times."""
    scheduler = diffx.DPMSolver.from_config(config, solver_order=3)
    scheduler.set_timesteps(calls)
    start = calibration_of(scheduler)
    knobs = Knobs(scheduler._make_process(), start)
    return knobs.run(np.random.default_rng(0).normal(0, 0.05, len(knobs.all)))


# ---------------------------------------------------------------------------------------------- every fixed run is a calibration

DETERMINISTIC = {
    "DDIM": lambda c: diffx.DDIM.from_config(c),
    "Euler": lambda c: diffx.Euler.from_config(c, timestep_spacing="trailing"),
    "Heun": lambda c: diffx.Heun.from_config(c, timestep_spacing="trailing"),
    "DPM2": lambda c: diffx.DPMSolver.from_config(c),
    "DPM3": lambda c: diffx.DPMSolver.from_config(c, solver_order=3),
    "UniPC3": lambda c: diffx.UniPC.from_config(c, solver_order=3),
    "Single3": lambda c: diffx.DPMSolverSinglestep.from_config(c, solver_order=3),
    "LMS": lambda c: diffx.LMS.from_config(c, timestep_spacing="trailing"),
}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_fixed_run_written_as_a_calibration_is_the_same_run(name, kind):
    """VE runs are rescaled, kept anchors and directions written out; 1e-5: float32 states of a scale up to 15 in the VE frame."""
    config = FLOW if kind == "flow" else {**VP, "prediction_type": kind}
    scheduler = DETERMINISTIC[name](config)
    scheduler.set_timesteps(6)
    made = calibration_of(scheduler)
    table = Calibrated.from_config(config, calibration=made.to_dict())
    table.set_timesteps(made.num_inference_steps)
    want = denoise(scheduler, smooth, noise() * float(scheduler.init_noise_sigma))
    got = denoise(table, smooth, noise() * start_scale(scheduler))
    assert ((got - want).abs().max() / want.abs().max()).item() <= 1e-5


def start_scale(scheduler) -> float:
    """From initial noise to the first sample in VP (or flow) units: 1 but for the VE frame, whose "trailing" start is sigma itself."""
    alpha, sigma = (float(level[0]) for level in scheduler._levels)
    return float(scheduler.init_noise_sigma) / (math.hypot(alpha, sigma) if scheduler._process.frame == "ve" else 1.0)


def test_a_stochastic_run_is_no_calibration():
    scheduler = diffx.DPMSolver.from_config(VP, algorithm_type="sde-dpmsolver++")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="DPMSolver draws fresh noise"):
        calibration_of(scheduler)


# ---------------------------------------------------------------------------------------------- the scheduler


@pytest.mark.parametrize("config", [FLOW, VP], ids=["flow", "vp"])
def test_a_table_survives_saving_to_the_bit(config, tmp_path):
    table = Calibrated.from_config(config, calibration=learned(config).to_dict())
    table.save_pretrained(tmp_path)
    again = Calibrated.from_pretrained(tmp_path)
    assert again.calibration == table.calibration and not list(tmp_path.glob("*.py"))
    for scheduler in (table, again):
        scheduler.set_timesteps(5)
    assert torch.equal(denoise(table, smooth, noise()), denoise(again, smooth, noise()))


def test_a_table_edited_by_hand_is_refused_by_name():
    good = learned().to_dict()
    Calibrated.from_config(FLOW, calibration=good)
    edits = {
        r"row 2 lands on alpha=": lambda c: c["rows"][2].__setitem__(1, c["rows"][2][1] + 1e-3),
        r"5 rows need 5 timesteps, got 4": lambda c: c["timesteps"].pop(),
        r"5 rows need 6 levels, got 7": lambda c: c["levels"].append(0.0),
        r"levels must fall": lambda c: c["levels"].__setitem__(2, c["levels"][0]),
        r"timesteps must not rise": lambda c: c["timesteps"].__setitem__(2, c["timesteps"][0]),
        r"timesteps must be finite": lambda c: c["timesteps"].__setitem__(2, math.nan),
        r"row 1 has 9 weights; it can weigh the sample and up to 2 predictions": lambda c: c["rows"].__setitem__(1, [0.1] * 9),
        r"must be an object with levels, timesteps and rows": lambda c: c.pop("rows"),
    }
    for message, edit in edits.items():
        bad = json.loads(json.dumps(good))
        edit(bad)
        with pytest.raises(ValueError, match=message):
            Calibrated.from_config(FLOW, calibration=bad)
    with pytest.raises(ValueError, match=r"Calibrated needs a table: make one with diffx\.calibrate"):
        Calibrated.from_config(FLOW)
    with pytest.raises(ValueError, match="calibrated for num_train_timesteps=1024, the model has 1000"):
        Calibrated.from_config(FLOW, calibration={**good, "process": {"num_train_timesteps": 1024}})


def test_another_number_of_steps_warns_and_runs_a_known_solver():
    table = Calibrated.from_config(VP, calibration=learned(VP).to_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.set_timesteps(5)
    with pytest.warns(UserWarning, match="calibrated for 5 steps, asked were 8 steps: DPM-Solver"):
        table.set_timesteps(8)
    other = diffx.DPMSolver.from_config(VP)
    other.set_timesteps(8)
    assert torch.isfinite(denoise(table, smooth, noise())).all() and len(table.plan()) == 8
    with pytest.warns(UserWarning, match="times of the caller's own"):
        table.set_timesteps(timesteps=[900, 500, 100])


def test_flow_pipelines_default_sigmas_mean_the_learned_grid():
    """Flux and others hand over 1 - i / N where their user gave nothing."""
    table = Calibrated.from_config(FLOW, calibration=learned().to_dict())
    table.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    assert table.timesteps.tolist() == pytest.approx(list(learned().timesteps))
    with pytest.warns(UserWarning, match="times of the caller's own"):
        table.set_timesteps(sigmas=[1.0, 0.8, 0.5, 0.3, 0.1])


def test_image_to_image_begins_anywhere():
    table = Calibrated.from_config(VP, calibration=learned(VP).to_dict())
    for begin in range(5):
        table.set_timesteps(5)
        assert torch.isfinite(denoise(table, smooth, noise(), begin=begin)).all()
        assert len(table.plan(begin)) == 5 - begin  # and every tail keeps the noise levels, which its table checks


def test_misfits_name_what_differs():
    pipe = tiny_stable_diffusion()
    made = Calibrated.from_config(VP, calibration={**learned(VP).to_dict(), "guidance_scale": 3.0, "model": fingerprint(pipe)})
    assert made.misfits(pipe, guidance_scale=3.0) == []
    assert made.misfits(pipe, guidance_scale=4.5) == ["calibrated at guidance_scale=3, used at 4.5"]
    (other,) = made.misfits(tiny_sd3(), guidance_scale=3.0)
    assert "UNet2DConditionModel" in other and "SD3Transformer2DModel" in other


def test_who_knows_the_guidance_warns(tmp_path):
    from diffx.sampling import sample

    pipe = tiny_stable_diffusion()
    pipe.scheduler = Calibrated.from_config(VP, calibration={**learned(VP).to_dict(), "guidance_scale": 3.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        sample(pipe, ["a"], num_inference_steps=5, guidance_scale=3.0)
    with pytest.warns(UserWarning, match=r"calibrated at guidance_scale=3, used at 4\.5; a calibrated table is made for one"):
        sample(pipe, ["a"], num_inference_steps=5, guidance_scale=4.5)


# ---------------------------------------------------------------------------------------------- the parts


def test_the_cut_path_is_the_cheapest_of_all():
    """Against every subset of 9 reference calls, the costs summed one by one from their definition."""
    one, _ = problems()
    scheduler = diffx.DPMSolver.from_config(FLOW)
    with recorded(scheduler) as (samples, predictions), torch.no_grad():
        end = one.ends(scheduler, range(8), 9)
    x, x0 = torch.stack([*samples, end]).double(), torch.stack(predictions).double()
    alpha, sigma = scheduler._levels
    lam = np.log(alpha[:-1] + 1e-12) - np.log(sigma[:-1])

    def cost_by_hand(path, power):
        total = 0.0
        for n, i in enumerate(path):
            j = path[n + 1] if n + 1 < len(path) else 9
            keep = sigma[j] / sigma[i]
            slope = 0.0
            if n and j < 9:
                slope = 0.5 * (lam[j] - lam[i]) / (lam[i] - lam[path[n - 1]])
            back = x0[path[n - 1]] if n else x0[i]
            landed = keep * x[i] + (alpha[j] - keep * alpha[i]) * (x0[i] + slope * (x0[i] - back))
            total += float((landed - x[j]).square().mean()) * max(sigma[j] if j < 9 else sigma[-2], 1e-12) ** -power
        return total

    for power, calls in itertools.product((0.0, 1.0), (2, 3, 5)):
        best = min(([0, *rest] for rest in itertools.combinations(range(1, 9), calls - 1)), key=lambda path: cost_by_hand(path, power))
        assert best_grid(x, x0, alpha, sigma, calls, power=power) == best


def test_a_tail_of_a_changed_run_ends_where_the_whole_changed_run_does():
    one, _ = problems()
    runner, start = Runner(one), learned()
    knobs = Knobs(runner.scheduler._make_process(), start)
    before = runner.whole(knobs.run(np.zeros(len(knobs.all))), range(4))
    for i, knob in enumerate(knobs.all):
        run, _ = knobs.moved(np.zeros(len(knobs.all)), i, 0.05)
        # The history is in float32 and added in another order: 1e-6 of samples around 1.
        torch.testing.assert_close(
            runner.changed(run, knob.acts_from, before, range(4)), runner.whole(run, range(4)).end, rtol=0, atol=2e-6
        )


def test_zero_knobs_are_the_start_and_all_others_keep_the_invariant():
    for config in (FLOW, VP):
        start = learned(config)
        process = diffx.DDIM.from_config(config)._make_process()
        knobs = Knobs(process, start)
        same = knobs.run(np.zeros(len(knobs.all)))
        for name in ("levels", "timesteps"):
            np.testing.assert_allclose(getattr(same, name), getattr(start, name), rtol=1e-12)
        for one, two in zip(same.rows, start.rows, strict=True):
            np.testing.assert_allclose(one, two[: len(one)] + [0.0] * (len(one) - len(two)), rtol=1e-9, atol=1e-12)
        moved = knobs.run(np.random.default_rng(1).normal(0, 0.1, len(knobs.all)))
        Calibrated.from_config(config, calibration=moved.to_dict())  # its table is checked
    assert len(knobs_of(6)) == 6 + 6 + 1 + 2 + 3 + 3 + 3
    assert [sum(calls - knob.acts_from for knob in knobs_of(calls)) for calls in (6, 10)] == [61, 195]  # as the module says


def test_the_normal_equations_are_those_of_the_whole_runs():
    """Gradient of the loss, by central differences of whole runs. 1 %: one-sided differences of float32 runs."""
    one, _ = problems()
    runner, start = Runner(one), learned(calls=3)
    knobs = Knobs(runner.scheduler._make_process(), start)
    goals = one.ends(diffx.DPMSolver.from_config(FLOW), range(32), 60)
    values = np.zeros(len(knobs.all))
    passes = [(range(32), runner.whole(knobs.run(values), range(32)))]
    _, slope = normal_equations(runner, knobs, values, passes, goals)
    scale = mean_distance(passes, goals)
    by_hand = []
    for i in range(len(values)):
        ends = []
        for by in (1e-2, -1e-2):
            run = knobs.run(values + by * np.eye(len(values))[i])
            ends.append(loss_of([(range(32), runner.whole(run, range(32)))], goals, scale))
        by_hand.append((ends[0] - ends[1]) / 2e-2)
    # The equations sum over samples and entries, the loss is a mean over samples of means over entries.
    np.testing.assert_allclose(slope / (32 * 2), by_hand, rtol=0.02, atol=0.01 * max(map(abs, by_hand)))


def test_flow_candidates_know_the_pipelines_default_grid():
    names = candidates(FLOW, 4)
    assert "UniPC from even sigmas" in names and "UniPC:shift=5 from even sigmas" in names
    assert names["DDIM:shift=1 from even sigmas"].levels == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_gradient_estimation_is_a_candidate():
    """On flow from even sigmas, as its authors write it: x moves along 2 eps_new - eps_old."""
    made = candidates(FLOW, 4)["gradient_estimation:gamma=2,shift=1 from even sigmas"]
    table = Calibrated.from_config(FLOW, calibration=made.to_dict())
    table.set_timesteps(4)
    x = noise()
    eps = old = x  # at pure noise
    for sigma, after, t in ((1.0, 0.75, 1000), (0.75, 0.5, 750), (0.5, 0.25, 500), (0.25, 0.0, 250)):
        x0 = x - sigma * smooth(x, t)
        if sigma == 1:
            x = after * eps + (1 - after) * x0
        else:
            new = (x - (1 - sigma) * x0) / sigma
            eps, old = 2 * new - old, new
            x = (1 - after) / (1 - sigma) * (x - sigma * eps) + after * eps
    torch.testing.assert_close(denoise(table, smooth, noise()), x, rtol=1e-5, atol=1e-5)  # float32


def test_every_pair_is_a_candidate_and_there_are_not_many_more():
    assert len(candidates(VP, 6)) == 40 + len(BETA_PAIRS) and len(candidates(FLOW, 6)) == 2 * (40 + len(FLOW_PAIRS))


# ---------------------------------------------------------------------------------------------- whole calibrations


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    made = calibrate_problems(*problems(), Settings(num_inference_steps=4, **SMALL), cache=cache, progress=False)
    return made, cache


def test_learning_helps_on_noises_it_never_saw(calibrated):
    made, _ = calibrated
    stages = {stage["name"]: stage for stage in made.calibration.made_with["stages"]}
    # Measured: 0.61 of what the search found, 0.051, to which gradient estimation brought it from 0.118.
    assert stages["learn"]["held_out_error"] < 0.75 * stages["search"]["held_out_error"]
    assert made.calibration.errors["learn"] == min(made.calibration.errors.values())


def test_a_second_run_spends_nothing_on_references_and_is_equal(calibrated, tmp_path):
    made, cache = calibrated
    first, second, settings = Counting(), Counting(), Settings(num_inference_steps=4, **SMALL)
    calibrate_problems(*problems(first), settings, cache=tmp_path, progress=False)
    again = calibrate_problems(*problems(second), settings, cache=cache, progress=False)
    assert again.calibration.rows == made.calibration.rows
    assert first.calls - second.calls >= 2 * 3 * 40  # three files of references each, of 40 calls, and all steps of the last stage


class Counting:
    """The network, counting; it may be told to break after some calls."""

    def __init__(self, last=None):
        self.calls, self.last = 0, last

    def __call__(self, x, t):
        self.calls += 1
        if self.last is not None and self.calls > self.last:
            raise KeyboardInterrupt
        return flow_network(x, t)


def test_an_interrupted_calibration_goes_on_to_the_same_result(calibrated, tmp_path):
    made, _ = calibrated
    settings, total = Settings(num_inference_steps=4, **SMALL), Counting()
    calibrate_problems(*problems(total), settings, cache=tmp_path / "whole", progress=False)
    for stop in np.linspace(1, total.calls - 1, 5).astype(int):
        with pytest.raises(KeyboardInterrupt):
            calibrate_problems(*problems(Counting(stop)), settings, cache=tmp_path / str(stop), progress=False)
        left = Counting()
        again = calibrate_problems(*problems(left), settings, cache=tmp_path / str(stop), progress=False)
        assert again.calibration.rows == made.calibration.rows and again.calibration.timesteps == made.calibration.timesteps
        assert left.calls <= total.calls


def test_other_held_out_samples_choose_anew(tmp_path):
    """The same noises to learn from, others to decide: what was stored for the first choice is not taken for the second."""
    settings, (learned_from, one) = Settings(num_inference_steps=4, **SMALL), problems()
    other = NetworkProblem(flow_network, FLOW, (2,), "three-gaussians", seed=7)
    calibrate_problems(learned_from, one, settings, cache=tmp_path / "shared", progress=False)
    shared, alone = (calibrate_problems(learned_from, other, settings, cache=tmp_path / name, progress=False) for name in ("shared", "own"))
    assert shared.calibration.rows == alone.calibration.rows and len(list((tmp_path / "shared").rglob("learn-*"))) == 2


def test_the_dry_run_tells_what_is_spent(tmp_path):
    for iterations in (0, 1):
        settings = Settings(num_inference_steps=4, **{**SMALL, "iterations": iterations})
        calibrator = Calibrator(*problems(), settings, tmp_path / str(iterations), progress=False)
        calibrator.run()
        told = cost_of(settings, len(candidates(FLOW, 4)))
        shortened, left = divmod(calibrator.spent - told.total, 48 * 4)  # a step that has to be shortened costs one run more
        assert left == 0 and 0 <= shortened < TRIALS * iterations + 1
    assert cost(tiny_sd3(), num_inference_steps=4, **SMALL).reference == 96 * 40
    assert str(told.total) in str(told).replace(",", "")


def test_one_call_is_searched_alone(tmp_path):
    made = calibrate_problems(*problems(), Settings(num_inference_steps=1, **SMALL), cache=tmp_path, progress=False)
    assert set(made.calibration.errors) == {"search", "path"} and len(made.calibration.rows) == 1


@pytest.mark.parametrize("build", [tiny_stable_diffusion, tiny_sd3, tiny_flux])
def test_a_pipeline_is_calibrated_and_left_as_it_was(build, tmp_path):
    pipe = build()
    own, inputs = pipe.scheduler, call_inputs(pipe)
    inputs.pop("prompt")
    before = {name: p.clone() for name, p in pipe.components["unet" if "unet" in pipe.components else "transformer"].named_parameters()}
    made = diffx.calibrate(
        pipe, num_inference_steps=3, prompts=["a", "b", "c", "d", "e"], guidance_scale=2.0, cache=tmp_path, progress=False,
        call_kwargs=inputs, num_samples=8, num_held_out=8, reference_steps=8, iterations=1,
    )  # fmt: skip
    assert pipe.scheduler is own
    network = pipe.components["unet" if "unet" in pipe.components else "transformer"]
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert made.misfits(pipe, guidance_scale=2.0) == [] and made.calibration.guidance_scale == 2.0
    pipe.scheduler = made
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pictures = pipe(prompt="a", num_inference_steps=3, guidance_scale=2.0, output_type="pt", **inputs).images
    assert torch.isfinite(pictures).all()
    pipe.save_pretrained(tmp_path / "pipe")
    assert type(type(pipe).from_pretrained(tmp_path / "pipe").scheduler) is Calibrated


def test_mu_is_what_the_pipeline_says():
    pipe = tiny_flux()
    problem = PipelineProblem(pipe, ["a"], 1.0, call_kwargs={k: v for k, v in call_inputs(pipe).items() if k != "prompt"})
    assert mu_of(problem) == pytest.approx(diffusers.pipelines.flux.pipeline_flux.calculate_shift(64, 256, 4096, 0.5, 1.15), abs=0.1)
    assert mu_of(problems()[0]) is None


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_input_next_to_its_accepted_neighbour(tmp_path):
    good = dict(num_inference_steps=4)
    Settings(**good)
    for bad, (value, text) in {
        "num_samples": (7, "num_samples=7 must be a whole number of at least 8"),
        "num_held_out": (0, "num_held_out=0 must be"),
        "reference_steps": (7, "reference_steps=7 must be a whole number of at least 8: twice num_inference_steps=4"),
        "num_inference_steps": (0, "num_inference_steps=0 must be"),
        "num_inference_steps ": (25, "num_inference_steps=25 is no few-step run; at most 24 can be calibrated"),
        "time_budget": (0, "time_budget=0 must be a positive number"),
    }.items():
        with pytest.raises(ValueError, match=text):
            Settings(**{**good, "reference_steps": 64, bad.strip(): value})
    with pytest.raises(ValueError, match="unknown setting 'iteration'; did you mean 'iterations'"):
        api.make_settings(num_inference_steps=4, iteration=3)
    pipe = tiny_stable_diffusion()
    with pytest.raises(ValueError, match="3 different prompts are too few: at least 4"):
        diffx.calibrate(pipe, num_inference_steps=4, guidance_scale=3.0, prompts=["a", "b", "c", "c"])
    with pytest.raises(ValueError, match="prompts is a list of strings"):
        diffx.calibrate(pipe, num_inference_steps=4, guidance_scale=3.0, prompts="a rocket")
    unnatural = diffusers.DDIMPipeline(unet=diffusers.UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                                       up_block_types=("UpBlock2D",) * 2), scheduler=diffusers.DDIMScheduler())  # fmt: skip
    with pytest.raises(ValueError, match="DDIMPipeline takes no prompt, latents, guidance_scale"):
        diffx.calibrate(unnatural, num_inference_steps=4, guidance_scale=3.0, prompts=list("abcd"))
    for sampler, message in {
        "DPMSolver:algorithm_type=sde-dpmsolver++": "draws fresh noise",
        "diffusers:DDIMScheduler": "must be a sampler of diffx",
    }.items():
        with pytest.raises(ValueError, match=message):
            calibrate_problems(*problems(), Settings(reference=sampler, **good, **SMALL), cache=tmp_path, progress=False)


def test_a_network_that_breaks_down_is_named(tmp_path):
    with pytest.raises(FloatingPointError, match=r"the 40-call reference of samples 0 \.\. 15 holds NaN"):
        calibrate_problems(*problems(lambda x, t: x * math.nan), Settings(num_inference_steps=4, **SMALL), cache=tmp_path, progress=False)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_damaged_reference_is_made_again(calibrated, tmp_path):
    made, cache = calibrated
    shutil.copytree(cache, tmp_path / "cache")
    file = sorted((tmp_path / "cache").rglob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:50])
    again = calibrate_problems(*problems(), Settings(num_inference_steps=4, **SMALL), cache=tmp_path / "cache", progress=False)
    assert again.calibration.rows == made.calibration.rows
