"""The contract matrix: real pipelines with random weights x our solvers, and the README's table of it, cell by cell.

By default each pipeline meets Euler, UniPC and an SDE; the slow tests and ``make bench`` take every solver.
"""

import functools
from pathlib import Path

import diffusers
import pytest
import torch

import diffx
from diffx.schedulers import SAMPLERS
from diffx.schedulers.process import is_flow
from diffx.testing import call_inputs, end_of
from diffx.testing.matrix import CASES, SOLVERS, Observation, observe, takes

README = (Path(__file__).parent.parent / "README.md").read_text()
HEAD, *ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.split("## What was run")[1].split("\n## ")[0].splitlines()
    if line.startswith("|") and not line.startswith("| ---")
]
BY_NAME = {case.name: case for case in CASES}
SOLVER = {solver.name: solver for solver in SOLVERS}
STEPS = 4


@functools.cache
def pipeline(name: str):
    """The pipeline of a case and its own Diffusers scheduler; tests swap the scheduler and change nothing else."""
    pipe = BY_NAME[name].build()
    return pipe, pipe.scheduler


def start(seed: int = 4) -> dict:
    return dict(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


# ---------------------------------------------------------------------------------------------- the table of the README


def test_the_table_says_of_every_case_what_is_tested_here():
    assert HEAD[2:] == [cls.__name__ for cls in SAMPLERS]
    assert {word for row in ROWS for word in row[2:]} == {"measured", "runs and reloads", "refused", "not run"}
    assert [row[0] for row in ROWS if "measured" in row[2:]] == ["`StableDiffusionPipeline`, the embedded model"]
    told = {row[0].replace("`", ""): row[2:] for row in ROWS if not {"measured", "not run"} & set(row[2:])}
    assert told == {case.name: ["refused" if cls in case.refusals else "runs and reloads" for cls in SAMPLERS] for case in CASES}


def cells(refused: bool):
    return [
        pytest.param(case, cls, id=f"{case.name}-{cls.__name__}") for case in CASES for cls in SAMPLERS if (cls in case.refusals) == refused
    ]


@pytest.mark.parametrize(("case", "cls"), cells(refused=False))
def test_runs_and_reloads(case, cls, tmp_path):
    pipe, stock = pipeline(case.name)
    pipe.scheduler = cls.from_config(stock.config)
    made = end_of(pipe, **call_inputs(pipe), **start(), decoded=True)
    assert torch.isfinite(made).all() and made.std() > 0
    pipe.save_pretrained(tmp_path)
    absent = {name: None for name, component in pipe.components.items() if component is None}  # AudioLDM2 insists on being told
    again = type(pipe).from_pretrained(tmp_path, **absent)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is cls
    assert torch.equal(end_of(again, **call_inputs(again), **start(), decoded=True), made)


@pytest.mark.parametrize(("case", "cls"), cells(refused=True))
def test_refused_by_name(case, cls):
    pipe, stock = pipeline(case.name)
    with pytest.raises(ValueError, match=case.refusals[cls]) as caught:
        pipe.scheduler = cls.from_config(stock.config)
        end_of(pipe, **call_inputs(pipe), **start())
    assert cls.__name__ in str(caught.value)


# ---------------------------------------------------------------------------------------------- runs, seeds, batches

ALWAYS = ("Euler", "UniPC", "DPMSolver, SDE")
PASSES_ON = {"LMS": 40}  # times the rounding of the pipeline's own scheduler; of all others 10


def contract():
    """Every case x every solver that fits; by default those of ``ALWAYS``, or all where fewer than two of them fit."""
    for case in CASES:
        fits = [solver for solver in SOLVERS if solver.ours not in case.refusals]
        first = [solver for solver in fits if solver.name in ALWAYS]
        for solver in fits:
            marks = [] if solver in first or len(first) < 2 else [pytest.mark.slow]
            yield pytest.param(case, solver, marks=marks, id=f"{case.name}-{solver.name}")


@functools.cache
def observed_stock(name: str) -> Observation:
    pipe, stock = pipeline(name)
    return observe(pipe, stock, STEPS)


@pytest.mark.parametrize(("case", "solver"), [*contract()])
def test_the_same_seed_gives_the_same_bits_and_a_batch_its_samples(case, solver):
    """A network rounds otherwise in another batch, and a solver passes that on with its own weights.

    So the bound is ten times the difference of the pipeline's own Diffusers scheduler in the same place, most of which are of
    order 1 (measured: up to 7.0 times, Heun in image to image on flow, where Diffusers' own Heun has 3.7), and where that is next to
    nothing, ten times four roundings of float32. LMS extrapolates four derivatives with weights of changing sign, on flow over steps
    of uneven length (measured: up to 23 times). Noise that depended on the batch would differ by 1.
    """
    pipe, stock = pipeline(case.name)
    seen = observe(pipe, solver.make(stock.config), STEPS)
    assert seen.finite and seen.repeats and seen.seeded
    assert seen.batch_difference <= PASSES_ON.get(solver.name, 10) * max(
        observed_stock(case.name).batch_difference, 4 * torch.finfo(torch.float32).eps
    )


MODELS = {
    "betas": diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("generators", [False, True], ids=["keyed", "generators"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_any_split_of_a_batch_has_the_same_bits(solver, model, generators):
    """Noise and steps on equal network outputs, for every part of a batch of five; odd sizes, which vector loops do not divide."""
    rng = torch.Generator().manual_seed(0)
    scheduler = solver.make(MODELS[model].config)
    scheduler.set_timesteps(6)
    x, *outs = (torch.randn(5, 3, 7, 5, generator=rng) for _ in range(1 + len(scheduler.timesteps)))

    def end(first: int, last: int) -> torch.Tensor:
        scheduler.set_timesteps(6)
        sample = x[first:last] * scheduler.init_noise_sigma
        generator = [torch.Generator().manual_seed(i) for i in range(first, last)] if generators else None
        for t, out in zip(scheduler.timesteps, outs):
            sample = scheduler.step(out[first:last], t, sample, generator=generator, return_dict=False)[0]
        return sample

    whole = end(0, 5)
    for first in range(5):
        for last in range(first + 1, 6):
            assert torch.equal(end(first, last), whole[first:last])


# ---------------------------------------------------------------------------------------------- beside Diffusers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_the_pipeline_comes_with_has_a_twin_that_does_the_same(case):
    """The tolerance is that of test_pipelines: twenty roundings of float32."""
    pipe, stock = pipeline(case.name)
    solver = next(solver for solver in SOLVERS if type(stock) in (solver.stock, solver.stock_flow))
    pipe.scheduler = stock
    want = end_of(pipe, **call_inputs(pipe, 2), **start())
    pipe.scheduler = solver.make(stock.config)
    assert error(end_of(pipe, **call_inputs(pipe, 2), **start()), want) <= 1e-5


def test_pixart_in_one_step_takes_the_clean_sample():
    """It takes the second thing that ``step`` returns, which Diffusers' DPM-Solver++, PixArt's own, does not (docs/upstream.md)."""
    pipe, stock = pipeline("PixArtAlphaPipeline")
    once = lambda: dict(num_inference_steps=1, generator=torch.Generator().manual_seed(4))  # noqa: E731
    pipe.scheduler = SOLVER["Euler"].make_stock(stock.config)
    want = end_of(pipe, **call_inputs(pipe), **once())
    for solver in SOLVERS:
        pipe.scheduler = solver.make(stock.config)
        made = end_of(pipe, **call_inputs(pipe), **once())
        assert torch.isfinite(made).all() and (solver.name != "Euler" or error(made, want) <= 1e-5)


def test_bfloat16():
    """A row of Stable Diffusion in bfloat16, whose entries are rounded to 2^-9 = 0.002 in every layer of 4 network calls.

    Measured: 0.012 to 0.024, Diffusers' classes 0.015 to 0.026. Heun reaches 0.043 (0.016 in Diffusers): its second call weighs
    the rounding of the sample in between by half of (s0 - s1) / s1, which is large in so few steps.
    """
    wide, stock = pipeline("StableDiffusionPipeline")
    half = BY_NAME["StableDiffusionPipeline"].build().to(torch.bfloat16)
    for solver in SOLVERS:
        ends = []
        for pipe in (half, wide, half):
            pipe.scheduler = solver.make(stock.config)
            ends.append(end_of(pipe, **call_inputs(pipe), **start()))
        assert ends[0].dtype == torch.bfloat16 and torch.equal(ends[0], ends[2])
        assert error(ends[0].float(), ends[1]) <= (0.08 if solver.name == "Heun" else 0.04), solver.name


# ---------------------------------------------------------------------------------------------- times of one's own

TIMES = [900, 620, 333, 50]
SIGMAS = {"betas": [9.0, 3.0, 1.0, 0.3, 0.0], "flow": [0.95, 0.7, 0.4, 0.1]}
CHOICES = [pytest.param(case, word, id=f"{case.name}-{word}") for case in CASES for word in sorted(takes(case.build()) - {"mu"})]


@pytest.mark.parametrize(("case", "word"), CHOICES)
def test_times_that_the_caller_chooses(case, word):
    """Those are visited, as by the Diffusers twin: Euler, and UniPC on the same times, or LCM where neither fits."""
    pipe, stock = pipeline(case.name)
    given = TIMES if word == "timesteps" else SIGMAS["flow" if is_flow(stock.config) else "betas"]
    first, *others = [name for name in ("Euler", "UniPC", "LCM") if SOLVER[name].ours not in case.refusals][:2]
    draw = lambda: call_inputs(pipe) | {word: given, "generator": torch.Generator().manual_seed(4)}  # noqa: E731
    pipe.scheduler = twin = SOLVER[first].make_stock(stock.config)
    want = end_of(pipe, **draw())
    for name in (first, *others):
        pipe.scheduler = SOLVER[name].make(stock.config)
        made = end_of(pipe, **draw())
        assert error(made, want) <= 1e-5 if name == first else torch.isfinite(made).all()
        got, visited = (getattr(each, word).double() for each in (pipe.scheduler, twin))
        torch.testing.assert_close(got, visited, rtol=1e-6, atol=1e-6)  # float32 tables
        if word == "timesteps":
            assert got.tolist() == given


@pytest.mark.parametrize("case", [case for case in CASES if "mu" in takes(case.build())], ids=lambda case: case.name)
def test_mu_that_the_caller_chooses(case):
    pipe, stock = pipeline(case.name)
    grids = []
    for mu in (0.5, 2.0):
        draw = lambda: call_inputs(pipe) | start() | {"mu": mu}  # noqa: B023, E731
        pipe.scheduler = twin = type(stock).from_config(stock.config, use_dynamic_shifting=True)
        want = end_of(pipe, **draw())
        pipe.scheduler = diffx.Euler.from_config(stock.config, use_dynamic_shifting=True)
        assert error(end_of(pipe, **draw()), want) <= 1e-5
        torch.testing.assert_close(pipe.scheduler.sigmas, twin.sigmas, rtol=1e-6, atol=1e-6)  # float32 tables
        grids.append(pipe.scheduler.sigmas)
    assert not torch.allclose(*grids, rtol=0.1)


@pytest.mark.parametrize("name", ["FluxPipeline", "FluxImg2ImgPipeline"])
def test_mu_that_the_pipeline_makes_of_the_picture(name):
    pipe, stock = pipeline(name)
    grids = []
    for size in (16, 64):
        pipe.scheduler = diffx.UniPC.from_config(stock.config)
        end_of(pipe, **call_inputs(pipe) | start() | dict(height=size, width=size))
        grids.append(pipe.scheduler.sigmas)
    assert grids[0][1] < grids[1][1]  # more noise for more pixels


# ---------------------------------------------------------------------------------------------- the tiny pipelines themselves


def test_the_control_picture_and_the_blocks_of_sd35_matter():
    pipe, stock = pipeline("StableDiffusionControlNetPipeline")
    pipe.scheduler = stock
    inputs = call_inputs(pipe)
    one, other, none = (
        end_of(pipe, **inputs | start() | change)
        for change in ({}, dict(image=1 - inputs["image"]), dict(controlnet_conditioning_scale=0.0))
    )
    assert error(other, one) > 0.01 and error(none, one) > 0.01
    blocks = BY_NAME["StableDiffusion3Pipeline, SD 3.5"].build().transformer.transformer_blocks
    assert [block.use_dual_attention for block in blocks] == [True, False]
    assert all(type(block.attn.norm_q).__name__ == "RMSNorm" for block in blocks)


def test_networks_with_a_learned_variance_have_one():
    """Both pipelines keep the mean and drop the variance, so that DDPM must not look for it."""
    for name in ("PixArtAlphaPipeline", "DiTPipeline"):
        pipe, stock = pipeline(name)
        config = pipe.transformer.config
        assert config.out_channels == 2 * config.in_channels
        pipe.scheduler = diffx.DDPM.from_config(stock.config, variance_type="learned_range")
        with pytest.raises(ValueError, match=r"needs 8 channels of model_output.*it has 4: variance_type='fixed_small' samples"):
            end_of(pipe, **call_inputs(pipe), **start())
