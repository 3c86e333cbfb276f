"""The folders in ``schedulers/`` and the embedded table: they load, hold the published numbers of their family, sample its pipeline."""

import ast
import importlib
import json
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import diffusers.utils.dynamic_modules_utils
import numpy as np
import pytest
import torch

import diffx
from diffx.calibration import PipelineProblem
from diffx.calibration.learn import distances
from diffx.evaluation.samplers import make_sampler
from diffx.families import family_of
from diffx.hub.artifact import published_files
from diffx.loading import EMBEDDED_TABLE
from diffx.oracle import Gaussian
from diffx.schedulers.one_step import ddim
from diffx.schedulers.table import State, advance
from diffx.testing import LocalHub, call_inputs, denoise, tiny_flux, tiny_sd3, tiny_sdxl, tiny_stable_diffusion, tiny_svd
from diffx.testing.matrix import observe

ROOT = Path(__file__).parent.parent
FOLDERS = ROOT / "schedulers"
RECIPES = sorted(folder.name for folder in FOLDERS.iterdir() if folder.is_dir() and not (folder / "scheduler.py").is_file())
TINY = {"sd15": tiny_stable_diffusion, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
BETAS = dict(num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
# What the model repositories of each family hold, without the options of one stock class alone.
PUBLISHED = {
    "sd15": (diffusers.PNDMScheduler, dict(BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)),
    "sdxl": (diffusers.EulerDiscreteScheduler, dict(BETAS, prediction_type="epsilon", timestep_spacing="leading", steps_offset=1)),
    "sd3": (diffusers.FlowMatchEulerDiscreteScheduler, dict(num_train_timesteps=1000, shift=3.0)),
    "flux": (
        diffusers.FlowMatchEulerDiscreteScheduler,
        dict(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
             base_image_seq_len=256, max_image_seq_len=4096),
    ),
    "svd": (
        diffusers.EulerDiscreteScheduler,
        dict(BETAS, prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
             timestep_spacing="leading", steps_offset=1),
    ),
}  # fmt: skip

# What sampling a student takes, and the method that exports it for models with these betas.
STUDENTS = {
    "lcm": (tiny_stable_diffusion, diffx.objectives.LCM(calls=4)),
    "progressive": (tiny_sdxl, diffx.objectives.Progressive(start=16, end=4)),
}
# Every folder, and a pipeline of its family.
IN_PIPELINES = TINY | {name: build for name, (build, _) in STUDENTS.items()}
IN_PIPELINES |= {"svd": tiny_svd, "emoji": tiny_stable_diffusion, "gradient_estimation": tiny_stable_diffusion}


def card(name):
    return (FOLDERS / name / "README.md").read_text()


def table_card():
    return (EMBEDDED_TABLE / "README.md").read_text()


def published(name):
    cls, config = PUBLISHED[name]
    return cls(**config)


def prepared(scheduler, steps=8):
    scheduler.set_timesteps(steps, mu=0.8 if scheduler.config.use_dynamic_shifting else None)
    return scheduler


def test_every_family_has_a_recipe():
    assert RECIPES == sorted([*PUBLISHED, *STUDENTS, "emoji"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_holds_the_published_numbers(name):
    """The very run that the published config gives when it is swapped as users swap it."""
    ours = prepared(diffx.UniPC.from_pretrained(FOLDERS / name))
    theirs = prepared(diffx.UniPC.from_config(published(name).config))
    assert str(ours.plan()) == str(theirs.plan())
    assert torch.equal(ours.timesteps, theirs.timesteps)


def test_the_embedded_recipe_is_the_process_of_the_embedded_model(embedded):
    ours, own = diffx.UniPC.from_pretrained(FOLDERS / "emoji"), diffx.UniPC.from_config(embedded.scheduler.config)
    assert str(prepared(ours).plan()) == str(prepared(own).plan())


@pytest.mark.parametrize("name", STUDENTS)
def test_a_students_recipe_is_what_its_method_exports(name):
    build, method = STUDENTS[name]
    pipe = build()
    family = family_of(pipe)
    exported = method.settled(family, lora=True).inference(family).scheduler
    recipe = diffx.AutoScheduler.from_pretrained(FOLDERS / name)
    assert type(recipe) is type(exported)
    public = [{key: value for key, value in each.config.items() if key[0] != "_"} for each in (recipe, exported)]
    assert public[0] == public[1]
    exec(re.search(r"```python\n(.*?)```", card(name), re.DOTALL).group(1).replace('"schedulers/', f'"{FOLDERS}/'), {"pipe": pipe})
    assert type(pipe.scheduler) is type(exported)
    for calls in (1, 2, 4, 8):
        pipe.scheduler.set_timesteps(calls)
        assert len(pipe.scheduler.timesteps) == calls and pipe.scheduler.timesteps[0] == 999


@pytest.mark.parametrize("folder", sorted(folder.name for folder in FOLDERS.iterdir() if folder.is_dir()))
def test_every_folder_keeps_the_contract(folder):
    """What ``tests/test_matrix.py`` asks of every class: finite, the same again, another for another seed, alone as in a batch."""
    pipe = IN_PIPELINES[folder]()
    scheduler = diffx.AutoScheduler.from_pretrained(FOLDERS / folder, trust_remote_code=(FOLDERS / folder / "scheduler.py").is_file())
    seen = observe(pipe, scheduler, num_inference_steps=3)
    assert seen.finite and seen.repeats and seen.seeded
    # Another batch size is another order of sums in the network: float32, passed on three times (measured: up to 2e-6).
    assert seen.batch_difference < 2e-5


@pytest.fixture
def dry_run(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.publish_dry_run")


@pytest.mark.slow  # a process of its own
def test_everything_published_comes_back_from_a_hub(dry_run):
    """``make publish-dry-run``: private repositories, and code only where it is trusted."""
    with LocalHub() as hub:
        found = dry_run.publish(dry_run.folders(), hub)
    assert {(each.kind, each.name) for each in found} == {(folder.parent.name, folder.name) for folder in dry_run.folders()}
    assert all(each.fine for each in found), dry_run.table(found)
    for each in found:
        trusted = each.kind == "pipelines" or (FOLDERS / each.name / "scheduler.py").is_file()
        assert each.note == ("its code, when trusted" if trusted else "no code"), each


def test_published_folders_hold_what_belongs_on_the_hub(dry_run):
    for folder in dry_run.folders():
        assert "README.md" in published_files(folder), folder


@pytest.mark.parametrize("name", TINY)
def test_a_recipe_runs_in_the_pipeline_of_its_family(name):
    pipe = TINY[name]()
    pipe.scheduler = published(name)
    stock = dict(pipe.scheduler.config)
    exec(re.search(r"```python\n(.*?)```", card(name), re.DOTALL).group(1).replace('"schedulers/', f'"{FOLDERS}/'), {"pipe": pipe})
    assert type(pipe.scheduler) is diffx.UniPC
    made = [pipe(**call_inputs(pipe), num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images]
    pipe.scheduler = make_sampler(str(FOLDERS / name), stock)
    made += [pipe(**call_inputs(pipe), num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images]
    assert made[0].isfinite().all() and made[0].std() > 0
    assert torch.equal(*made)


def test_the_embedded_recipe_samples_the_embedded_model(embedded):
    stock, images = embedded.scheduler, []
    for scheduler in (diffx.UniPC.from_pretrained(FOLDERS / "emoji"), make_sampler("UniPC", stock.config)):
        embedded.scheduler = scheduler
        images.append(embedded("rocket", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt").images)
    embedded.scheduler = stock
    assert torch.equal(*images)


def test_a_recipe_of_another_kind_of_model_is_refused():
    make_sampler(str(FOLDERS / "flux"), diffusers.FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(ValueError, match="is for models of flow, this one has betas"):
        make_sampler(str(FOLDERS / "flux"), diffusers.DDIMScheduler().config)
    with pytest.raises(ValueError, match="is for models of betas, this one has flow"):
        make_sampler(str(FOLDERS / "sdxl"), diffusers.FlowMatchEulerDiscreteScheduler().config)


def test_the_calibrated_table_is_for_the_embedded_model_and_helps(embedded):
    """Eight noises of its benchmark's kind: nearer to 48 calls than the best fixed sampler, by more than half of what its card says."""
    stock = embedded.scheduler
    exec(
        re.search(r"```python\n(.*?)```", table_card(), re.DOTALL).group(1).replace('"diffx/', f'"{ROOT}/diffx/'),
        {"pipe": embedded},
    )
    table, embedded.scheduler = embedded.scheduler, stock
    by_name = make_sampler("emoji_calibrated_6", stock.config)
    assert by_name.calibration == table.calibration
    assert table.misfits(embedded, guidance_scale=3.0) == []
    problem = PipelineProblem(embedded, ["rocket", "red apple on blue", "ghost on pink", "panda face"], 3.0, seed=5)
    goals = problem.ends(make_sampler("DPMSolver:timestep_spacing=trailing", problem.config), range(8), 48)
    error = {
        name: distances(problem.ends(scheduler, range(8), 6), goals).mean().item()
        for name, scheduler in (("table", table), ("fixed", make_sampler("DDIM:spacing=ays_sd", problem.config)))
    }
    assert error["table"] < 0.75 * error["fixed"], error
    made = table.calibration.errors
    assert made["learn"] == min(made.values())


def test_the_calibrated_card_has_the_figures_of_the_benchmark():
    part = json.loads((ROOT / "benchmarks" / "results" / "calibration" / "parts" / "emoji-6.json").read_text())
    for found in (part["calibrated"], part["diffx"][0], part["diffusers"][0]):
        assert f"| {found['mean']:.4f} | {found['rms']:.4f} |" in table_card()
    saved = json.loads((EMBEDDED_TABLE / "scheduler_config.json").read_text())
    assert part["config"]["calibration"]["rows"] == saved["calibration"]["rows"]
    misuse = json.loads((ROOT / "benchmarks" / "results" / "calibration" / "misuse.json").read_text())
    for found in misuse.values():
        assert f"| {found['calibrated']:.4f} | {found['DDIM:spacing=ays_sd']:.4f} |" in table_card()


def error_on_gaussian_data(scheduler, steps):
    """RMS distance to the exact end of the flow, for a perfect network that is fed log(edm_sigma) / 4."""
    rng = torch.Generator().manual_seed(0)
    data = Gaussian(torch.randn(4, 8, 8, generator=rng), 1.5 * torch.rand(4, 8, 8, generator=rng))
    scheduler.set_timesteps(steps)

    def level(edm_sigma):
        return 1 / math.hypot(1, edm_sigma), edm_sigma / math.hypot(1, edm_sigma)

    noise = torch.randn((2, 4, 8, 8), generator=rng, dtype=torch.float64)
    first = noise * scheduler.init_noise_sigma
    end = denoise(scheduler, lambda x, t: data.predict(x, *level(math.exp(4 * float(t))), "v_prediction"), first)
    top = float(scheduler.sigmas[0])
    start = first / math.hypot(1, top) if scheduler.init_noise_sigma > 1 else first  # Euler's frame has alpha = 1
    return (end - data.flow(start, level(top), (1.0, 0.0))).square().mean().sqrt().item()


def test_the_video_card_tells_what_gaussian_data_say():
    found = re.findall(r"(\d\.\d+) against (\d\.\d+) at (\d+)", card("svd"))
    assert [int(steps) for *_, steps in found] == [6, 10, 25]
    for ours, theirs, steps in found:
        # The card has three decimals.
        assert error_on_gaussian_data(diffx.UniPC.from_pretrained(FOLDERS / "svd"), int(steps)) == pytest.approx(float(ours), abs=6e-4)
        assert error_on_gaussian_data(published("svd"), int(steps)) == pytest.approx(float(theirs), abs=6e-4)


# gradient estimation

GRADIENT_ESTIMATION = FOLDERS / "gradient_estimation"
LAM_STEPS = (48, 72, 108, 160, 256)


@pytest.fixture
def component(monkeypatch):
    """The component as the card imports it, from the top folder of the repository."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("schedulers.gradient_estimation.scheduler")


def levels(num_steps):
    """(alpha, sigma), each (N + 1,), on the flow alpha = 1 - sigma, even in log(alpha / sigma)."""
    sigma = 1 / (1 + np.exp(np.linspace(-3, 3, num_steps + 1)))
    return 1 - sigma, sigma


def as_in_the_paper(alpha, sigma, x, network, gamma):
    """The end point, written with eps alone: x moves along gamma * eps_new + (1 - gamma) * eps_old."""
    old = None
    for a0, s0, a1, s1 in zip(alpha, sigma, alpha[1:], sigma[1:]):
        new = (x - a0 * network(x, a0, s0)) / s0
        eps = new if old is None else gamma * new + (1 - gamma) * old
        x, old = a1 / a0 * (x - s0 * eps) + s1 * eps, new
    return x


def by_table(rows, alpha, sigma, x, network):
    table, state = diffx.Table(alpha, sigma, tuple(rows)), State()
    for a, s in zip(alpha[:-1], sigma[:-1]):
        x, state = advance(table, state, x, network(x, a, s), noise=None)
    return x


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0, 3.0])
def test_the_rows_are_the_papers_sampler(component, gamma):
    alpha, sigma = levels(12)
    x = torch.tensor([1.3, -0.4], dtype=torch.float64)

    def network(x, alpha, sigma):  # any function does; this one is far from linear
        return torch.sin(3 * x) + alpha * x

    ours = by_table(component.gradient_estimation(alpha, sigma, gamma), alpha, sigma, x, network)
    # The same sums in another order: 12 steps of float64 rounding, and gamma 3 doubles an error at each.
    assert torch.allclose(ours, as_in_the_paper(alpha, sigma, x, network, gamma), rtol=0, atol=1e-11)


def test_gamma_one_is_ddim_and_only_sensible_ones_are_taken(component):
    alpha, sigma = levels(6)
    x = torch.tensor([1.3, -0.4], dtype=torch.float64)
    ends = [by_table(rows, alpha, sigma, x, lambda x, a, s: torch.sin(3 * x)) for rows in
            (component.gradient_estimation(alpha, sigma, 1.0), ddim(alpha, sigma))]  # fmt: skip
    assert torch.allclose(*ends, rtol=0, atol=1e-12)  # DDIM written with eps instead of x0: float64 rounding
    with pytest.raises(ValueError, match=r"gamma=0.9 must lie between 1 \(DDIM\) and 3"):
        component.gradient_estimation(alpha, sigma, 0.9)
    with pytest.raises(ValueError, match=r"gamma=3.5 must lie between"):
        component.GradientEstimation(gamma=3.5).set_timesteps(4)


def test_gradient_estimation_has_order_one(component):
    """gamma 2 leans too far for order 2, which on even steps of eps would need 1.5; its gain is a smaller constant."""
    data, errors = Gaussian(torch.tensor([0.7, -1.5], dtype=torch.float64), torch.tensor([0.5, 1.8], dtype=torch.float64)), []
    for n in LAM_STEPS:
        alpha, sigma = levels(n)
        x = torch.tensor([[1.2, 0.4]], dtype=torch.float64)
        end = by_table(component.gradient_estimation(alpha, sigma, 2.0), alpha, sigma, x, data.x0)
        errors.append((end - data.flow(x, (alpha[0], sigma[0]), (alpha[-1], sigma[-1]))).abs().max().item())
    slope = -np.polyfit(np.log(LAM_STEPS), np.log(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.2)  # as in test_orders


def test_gradient_estimation_begins_at_pure_noise(component):
    """alpha = 0: x holds nothing of x0, and eps is x itself."""
    alpha, sigma = np.array([0.0, 0.3, 0.6, 1.0]), np.array([1.0, 0.7, 0.4, 0.0])
    x = torch.tensor([1.3, -0.4], dtype=torch.float64)

    def network(x, alpha, sigma):
        return torch.sin(3 * x)

    eps, end = x, 0.7 * x + 0.3 * network(x, 0, 1)  # the first step in x0; then as the paper has it
    for a0, s0, a1, s1 in zip(alpha[1:], sigma[1:], alpha[2:], sigma[2:]):
        new = (end - a0 * network(end, a0, s0)) / s0
        end, eps = a1 / a0 * (end - s0 * (2 * new - eps)) + s1 * (2 * new - eps), new
    ours = by_table(component.gradient_estimation(alpha, sigma, 2.0), alpha, sigma, x, network)
    assert torch.allclose(ours, end, rtol=0, atol=1e-12)  # float64 rounding
    single = by_table(component.gradient_estimation(alpha[-2:], sigma[-2:], 2.0), alpha[-2:], sigma[-2:], x, network)
    assert torch.equal(single, network(x, 0, 1))  # one call, to sigma 0: its x0


def test_gradient_estimation_loads_by_folder_and_in_every_frame_of_process(component, embedded):
    loaded = component.GradientEstimation.from_pretrained(GRADIENT_ESTIMATION)
    assert str(prepared(loaded).plan()) == str(prepared(component.GradientEstimation.from_config(embedded.scheduler.config)).plan())
    for name, build in TINY.items():
        pipe = build()
        pipe.scheduler = component.GradientEstimation.from_config(published(name).config, gamma=1.5)
        assert pipe(**call_inputs(pipe), num_inference_steps=5, output_type="pt").images.isfinite().all()


def test_gradient_estimation_travels_as_a_custom_component(component, embedded, tmp_path):
    """As the card says: its folder becomes the pipeline's ``scheduler``, and Diffusers runs it only when trusted."""
    embedded.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    shutil.copytree(GRADIENT_ESTIMATION, tmp_path / "scheduler")
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"scheduler": ["scheduler", "GradientEstimation"]}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler).__name__ == "GradientEstimation"
    stock, images = embedded.scheduler, []
    embedded.scheduler = component.GradientEstimation.from_config(stock.config)
    for made in (embedded, pipe):
        images.append(made("rocket", num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="pt").images)
    embedded.scheduler = stock
    assert torch.equal(*images)


def test_without_diffx_the_component_says_where_it_comes_from(monkeypatch):
    source = (GRADIENT_ESTIMATION / "scheduler.py").read_text()
    monkeypatch.setitem(sys.modules, "diffx", None)  # how Python marks a module that cannot be imported
    with pytest.raises(ImportError, match="needs diffx, which is installed from a clone of its repository"):
        exec(compile(source, "scheduler.py", "exec"), {"__name__": "scheduler"})
    assert len(source.splitlines()) < 50  # the point of the example is its size


CODE = sorted([*ROOT.glob("schedulers/*/scheduler.py"), *ROOT.glob("pipelines/*/pipeline.py")])


@pytest.mark.parametrize("file", CODE, ids=[file.parent.name for file in CODE])
def test_diffusers_does_not_tell_to_install_a_strangers_package(file, monkeypatch, caplog, tmp_path):
    """It reads the imports of a published file, guarded or not, and says ``pip install`` for each that is missing."""
    monkeypatch.setitem(sys.modules, "diffx", None)
    caplog.set_level("WARNING", logger="diffusers")
    logging.getLogger("diffusers").addHandler(caplog.handler)  # whose logger tells nobody above it
    try:
        diffusers.utils.dynamic_modules_utils.check_imports(file)
        assert not caplog.messages
        (tmp_path / "file.py").write_text("import diffx\n")
        diffusers.utils.dynamic_modules_utils.check_imports(tmp_path / "file.py")
        assert "pip install" in caplog.text  # the accepted neighbour: this is how it would be seen
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)


def test_contributing_shows_the_component_as_it_is():
    shown = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL).group(1).replace("diffx.", "")
    shown = {node.name: ast.unparse(node.body) for node in ast.parse(shown).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for file in (ROOT / "diffx" / "schedulers" / "derivative.py", GRADIENT_ESTIMATION / "scheduler.py"):
        bodies = {node.name: ast.unparse(node.body) for node in ast.parse(file.read_text()).body if hasattr(node, "name")}
        (name,) = shown.keys() & bodies.keys()  # the rows there, the class here
        assert shown.pop(name) == bodies[name].replace("diffx.", "")
    assert not shown


def test_the_script_of_the_card_writes_its_plot_and_table(component, tmp_path):
    shutil.copy(GRADIENT_ESTIMATION / "README.md", tmp_path)
    command = [sys.executable, ROOT / "benchmarks" / "gradient_estimation.py", "--output", tmp_path, "--calls", "2", "3"]
    done = subprocess.run([*command, "--reference-calls", "4"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "error.png").stat().st_size > 1000
    written = (tmp_path / "README.md").read_text()
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert rows[0] == "| guidance | sampler | 2 | 3 |" and len(rows) == 2 + 2 * 5
    assert written.split("<!-- table -->")[0] == card("gradient_estimation").split("<!-- table -->")[0]
