"""Checkpoints for everybody: stock Diffusers without diffx loads them in silence, and diffx finds its scheduler again, bit for bit."""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import diffx
from diffx.evaluation.samplers import make_sampler
from diffx.hub.degrade import CLASSES, KEY, degraded, restore
from diffx.loading import EMBEDDED_TABLE, load_scheduler_config
from diffx.testing import LocalHub, call_inputs, end_of, tiny_flux, tiny_latent_consistency, tiny_stable_diffusion, tiny_svd
from diffx.testing.matrix import CASES, SOLVERS

GRADIENT_ESTIMATION = Path(__file__).parent.parent / "schedulers" / "gradient_estimation"
TABLE = json.loads((EMBEDDED_TABLE / "scheduler_config.json").read_text())
# Every class, with options that its stock twin lacks or means otherwise, and both kinds of model.
SAVED = {
    "DDIM": (tiny_stable_diffusion, diffx.DDIM, dict(spacing="ays_sd")),
    "DDPM": (tiny_stable_diffusion, diffx.DDPM, dict(seed=3, variance_type="fixed_large")),
    "DEIS": (tiny_stable_diffusion, diffx.DEIS, dict(solver_order=3)),
    "LMS": (tiny_stable_diffusion, diffx.LMS, dict(use_karras_sigmas=True)),
    "Euler": (tiny_stable_diffusion, diffx.Euler, dict(check_finite=True)),
    "EulerAncestral": (tiny_stable_diffusion, diffx.EulerAncestral, dict(eta=0.5, s_noise=1.1)),
    "Heun": (tiny_stable_diffusion, diffx.Heun, {}),
    "DPMSolver": (tiny_stable_diffusion, diffx.DPMSolver, dict(algorithm_type="sde-dpmsolver++", eta=0.3, solver_order=3)),
    "DPMSolverSinglestep": (tiny_stable_diffusion, diffx.DPMSolverSinglestep, dict(lower_order_final=False)),
    "UniPC": (tiny_stable_diffusion, diffx.UniPC, dict(solver_order=3, track_error=True, timestep_spacing="trailing")),
    "LCM": (tiny_latent_consistency, diffx.LCM, dict(original_inference_steps=20)),
    "UniPC on flow": (tiny_flux, diffx.UniPC, dict(solver_order=3)),
    "DPMSolver on v, continuous": (tiny_svd, diffx.DPMSolver, dict(solver_order=3)),
}  # fmt: skip
STRANGER = r"""
import io, json, logging, sys, warnings
import diffusers, numpy, torch
from diffusers import DiffusionPipeline

torch.set_num_threads(1)
log = io.StringIO()
logging.getLogger("diffusers").addHandler(logging.StreamHandler(log))
diffusers.utils.logging.disable_progress_bar()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in sys.argv[1:]:
        pipe = DiffusionPipeline.from_pretrained(name)
        pipe.save_pretrained(f"{name} again")
        scheduler = pipe.scheduler
        swapped = diffusers.DDIMScheduler if "Flow" not in type(scheduler).__name__ else diffusers.FlowMatchHeunDiscreteScheduler
        swapped.from_config(scheduler.config).save_pretrained(f"{name} swapped")
        key = "prediction_type" if "prediction_type" in scheduler.config else "shift"
        type(scheduler).from_config(scheduler.config, **{key: "sample" if key != "shift" else 1.5}).save_pretrained(f"{name} changed")
    # Python shows those to nobody but the author of the code.
    told = [str(each.message) for each in caught if not issubclass(each.category, DeprecationWarning)]
assert not [name for name in sys.modules if name.startswith("diffx") and sys.modules[name]]
try:
    DiffusionPipeline.from_pretrained("custom", trust_remote_code=True)
except ImportError as error:
    custom = str(error)
print(json.dumps({"warnings": told, "log": log.getvalue(), "custom": custom}))
"""


def made_by(pipe):
    pipe.set_progress_bar_config(disable=True)
    return end_of(pipe, **call_inputs(pipe), num_inference_steps=3, generator=torch.Generator().manual_seed(0))


def as_saved(config):
    """What a file keeps of a config, without the two keys that Diffusers adds when it prints or saves one."""
    return json.loads(json.dumps({key: value for key, value in config.items() if key not in ("_class_name", "_diffusers_version")}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders by name, with what a process without diffx said of them and made of them; and the schedulers as they were."""
    root, schedulers = tmp_path_factory.mktemp("saved"), {}
    for name, (build, cls, options) in SAVED.items():
        pipe = build()
        pipe.scheduler = schedulers[name] = cls.from_config(pipe.scheduler.config, **options)
        diffx.save_pretrained(pipe, root / name)
        assert pipe.scheduler is schedulers[name]
    with LocalHub() as hub:
        shutil.copytree(root / "DDIM", root / "custom", ignore=shutil.ignore_patterns("scheduler"))
        shutil.copytree(GRADIENT_ESTIMATION, root / "custom" / "scheduler")
        _index(root / "custom", scheduler=["scheduler", "GradientEstimation"])
        done = hub.run(["-c", STRANGER, *SAVED], cwd=root, without=("diffx",))
    said = json.loads(done.stdout) | {"output": done.stdout + done.stderr}
    return root, schedulers, said


def test_every_class_is_among_them():
    assert {cls.__name__ for _, cls, _ in SAVED.values()} | {"Calibrated"} == set(CLASSES)


def test_without_diffx_they_load_in_silence(saved):
    _, _, said = saved
    assert said["warnings"] == [] and said["log"] == ""


def test_without_diffx_published_code_says_where_diffx_comes_from(saved):
    """Diffusers would tell to install the package that has this name on PyPI, a stranger's, were the import not guarded."""
    _, _, said = saved
    assert said["custom"].startswith("this scheduler needs diffx, which is installed from a clone of its repository")
    assert "install diffx" not in said["output"]


@pytest.mark.parametrize("name", SAVED)
def test_after_loading_and_saving_elsewhere_ours_comes_back_bit_for_bit(saved, name):
    root, schedulers, _ = saved
    for folder in (root / name, root / f"{name} again"):
        index = json.loads((folder / "model_index.json").read_text())
        assert index["scheduler"][0] == "diffusers"
        pipe = DiffusionPipeline.from_pretrained(folder)
        assert diffx.upgrade(pipe) is pipe
        assert type(pipe.scheduler) is type(schedulers[name])
        assert as_saved(pipe.scheduler.config) == as_saved(schedulers[name].config)
        diffx.upgrade(pipe)  # once more is no error
    pipe.scheduler, restored = schedulers[name], pipe.scheduler
    want = made_by(pipe)
    pipe.scheduler = restored
    assert torch.equal(made_by(pipe), want)


@pytest.mark.parametrize("name", SAVED)
def test_a_change_in_between_is_named_and_can_be_undone(saved, name):
    root, schedulers, _ = saved
    was = json.loads((root / name / "model_index.json").read_text())["scheduler"][1]
    for folder, said in ((f"{name} swapped", f"it is .*, was {was}"), (f"{name} changed", "(prediction_type|shift) is .*, was ")):
        config = json.loads((root / folder / "scheduler_config.json").read_text())
        changed = getattr(diffusers, config["_class_name"]).from_pretrained(root / folder)
        if "swapped" in folder and type(changed).__name__ == was:
            continue
        with pytest.raises(ValueError, match=f"changed since diffx.save_pretrained wrote it: .*{said}") as error:
            restore(changed)
        assert f"pipe.scheduler = diffx.{type(schedulers[name]).__name__}.from_config" in str(error.value)
        restored = restore(changed, force=True)
        assert type(restored) is type(schedulers[name]) and as_saved(restored.config) == as_saved(schedulers[name].config)


def test_a_refused_upgrade_leaves_the_pipeline_as_it_is(saved):
    root, schedulers, _ = saved
    pipe = DiffusionPipeline.from_pretrained(root / "UniPC")
    pipe.scheduler = changed = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="it is EulerDiscreteScheduler, was UniPCMultistepScheduler"):
        diffx.upgrade(pipe)
    assert pipe.scheduler is changed
    diffx.upgrade(pipe, force=True)
    assert as_saved(pipe.scheduler.config) == as_saved(schedulers["UniPC"].config)


def _with(pipe, scheduler):
    pipe.scheduler = scheduler
    return pipe


@pytest.mark.slow  # every pipeline with every solver: twins alone, in this process
def test_every_pipeline_that_takes_ours_takes_the_twin():
    for case in CASES:
        for solver in SOLVERS:
            if solver.ours in case.refusals:
                continue
            pipe = case.build()
            pipe.scheduler = solver.make(pipe.scheduler.config)
            plain = degraded(pipe)
            assert type(plain.scheduler).__module__.startswith("diffusers."), (case.name, solver.name)
            assert made_by(plain).isfinite().all(), (case.name, solver.name)
            assert as_saved(diffx.upgrade(plain).scheduler.config) == as_saved(pipe.scheduler.config)


def test_such_a_folder_is_a_sampler_of_ours(saved):
    root, schedulers, _ = saved
    sampler = make_sampler(f"{root / 'UniPC'}?solver_order=2", schedulers["UniPC"].config)
    assert type(sampler) is diffx.UniPC and sampler.config.timestep_spacing == "trailing" and sampler.config.solver_order == 2


def test_a_run_in_between_is_no_change(saved):
    root, schedulers, _ = saved
    for name in ("DPMSolverSinglestep", "UniPC on flow", "LCM"):  # the first corrects its own config when it runs
        pipe = DiffusionPipeline.from_pretrained(root / name)
        made_by(pipe)
        assert as_saved(diffx.upgrade(pipe).scheduler.config) == as_saved(schedulers[name].config)


def test_flow_models_that_came_with_unipc_keep_it():
    stock = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    pipe = _with(tiny_stable_diffusion(), diffx.Euler.from_config(stock.config))
    twin = degraded(pipe).scheduler
    assert type(twin) is diffusers.UniPCMultistepScheduler and twin.config.flow_shift == 5.0 and twin.config.use_flow_sigmas


def test_a_calibrated_table_travels(embedded, tmp_path):
    stock = embedded.scheduler
    embedded.scheduler = diffx.Calibrated.from_pretrained(EMBEDDED_TABLE)
    try:
        diffx.save_pretrained(embedded, tmp_path / "model")
        want = embedded("rocket", num_inference_steps=6, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="np")
    finally:
        embedded.scheduler = stock
    plain = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(plain.scheduler) is diffusers.DPMSolverMultistepScheduler
    pipe = diffx.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.calibration == TABLE["calibration"]
    got = pipe("rocket", num_inference_steps=6, guidance_scale=3.0, generator=torch.Generator().manual_seed(0), output_type="np")
    assert np.array_equal(got.images, want.images)


def test_a_stock_scheduler_is_saved_as_diffusers_saves_it(tmp_path):
    pipe = tiny_stable_diffusion()
    diffx.save_pretrained(pipe, tmp_path / "ours")
    pipe.save_pretrained(tmp_path / "stock")
    for file in (tmp_path / "stock").rglob("*"):
        if file.is_file():
            assert (tmp_path / "ours" / file.relative_to(tmp_path / "stock")).read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match=r"was saved by diffx.save_pretrained; to swap one: pipe.scheduler = diffx.UniPC.from_config"):
        diffx.upgrade(pipe)
    assert isinstance(diffx.from_pretrained(tmp_path / "ours").scheduler, diffusers.DDIMScheduler)


def test_a_second_save_forgets_the_first_and_keeps_what_else_is_there(tmp_path):
    pipe = _with(tiny_stable_diffusion(), diffx.UniPC.from_config(load_scheduler_config()))
    (tmp_path / "model" / "pictures").mkdir(parents=True)
    (tmp_path / "model" / "README.md").write_text("a card")
    (tmp_path / "model" / "pictures" / "a.png").write_bytes(b"a")
    diffx.save_pretrained(pipe, tmp_path / "model")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "model")
    plain.scheduler = diffx.DDIM.from_config(plain.scheduler.config)  # carries the private key along
    assert diffx.save_pretrained(plain, tmp_path / "model") == tmp_path / "model"
    entry = json.loads((tmp_path / "model" / "scheduler" / "scheduler_config.json").read_text())[KEY]
    assert entry["class"] == "DDIM" and KEY not in entry["config"]
    assert (tmp_path / "model" / "README.md").read_text() == "a card"
    assert (tmp_path / "model" / "pictures" / "a.png").read_bytes() == b"a"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failing_save_leaves_what_was_there(tmp_path):
    pipe = _with(tiny_stable_diffusion(), diffx.UniPC.from_config(load_scheduler_config()))
    diffx.save_pretrained(pipe, tmp_path / "model")
    before = {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()}
    pipe.unet.register_to_config(unwritable=object())
    with pytest.raises(TypeError):
        diffx.save_pretrained(pipe, tmp_path / "model")
    assert {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# bad input


def _entry(**changed):
    scheduler = degraded(_with(tiny_stable_diffusion(), diffx.UniPC.from_config(load_scheduler_config()))).scheduler
    return scheduler.config[KEY] | changed


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("UniPC", r'_diffx of the scheduler config must be \{"class": name, .*got \'UniPC\'; it is written by diffx.save_pretrained'),
        ({"class": "UniPC", "config": {}}, "must be"),
        ({"class": ["UniPC"], "config": {}, "beside": {"class": "a", "config": {}}}, "must be"),
        (dict(**{"class": "Newer"}), "names the class 'Newer', which this diffx does not have; it has DDIM, .* A newer diffx may"),
        (dict(**{"class": "../outside"}), "names the class '../outside', which this diffx does not have"),
        (dict(config={"solver_order": 9}), "UniPC refuses what was saved: .*solver_order"),
        (dict(config={"beta_start": "much"}), "UniPC refuses what was saved"),
    ],
)
def test_entries_that_cannot_be_read(tmp_path, entry, message):
    pipe = tiny_stable_diffusion()
    whole = _entry(**entry) if isinstance(entry, dict) and len(entry) == 1 else entry
    stock = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    stock.register_to_config(**{KEY: whole})
    pipe.scheduler = stock
    with pytest.raises(ValueError, match=message):
        diffx.upgrade(pipe, force=True)
    assert pipe.scheduler is stock


def test_what_cannot_be_saved_says_so(tmp_path):
    pipe = tiny_stable_diffusion()

    class Mine(diffx.DDIM):
        pass

    pipe.scheduler = Mine()
    with pytest.raises(ValueError, match=r"Mine is not one of diffx's own schedulers .* save it with its scheduler.py"):
        diffx.save_pretrained(pipe, tmp_path / "model")
    with pytest.raises(ValueError, match="a Diffusers pipeline is needed, got UniPC"):
        diffx.save_pretrained(diffx.UniPC(), tmp_path / "model")
    for options, message in (
        (dict(push_to_hub=True), r"use diffx.push_to_hub\(pipe, repo_id\)"),
        (dict(safe_serialization=False), "writes pickles"),
    ):
        with pytest.raises(ValueError, match=message):
            diffx.save_pretrained(tiny_stable_diffusion(), tmp_path / "model", **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        diffx.save_pretrained(tiny_stable_diffusion(), tmp_path / "file")
    with pytest.raises(ValueError, match="is where this process works"):
        diffx.save_pretrained(tiny_stable_diffusion(), ".")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bad") / "model"
    diffx.save_pretrained(_with(tiny_stable_diffusion(), diffx.UniPC.from_config(load_scheduler_config())), made)
    return made


def _index(folder, **changed):
    file = folder / "model_index.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | changed))
    return lambda: file.write_text(before)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"../outside": ["diffusers", "UNet2DConditionModel"]}, "the component '../outside' is no name of a folder beside it"),
        ({"/etc": ["diffusers", "UNet2DConditionModel"]}, "the component '/etc' is no name"),
        ({"unet": ["../../outside", "UNet"]}, "the component 'unet' has .* where a library and a class belong"),
        ({"unet": ["diffusers", {"x": 1}]}, "the component 'unet' has"),
        ({"unet": ["diffusers", "NoSuchModel"]}, "did not load .*has no class `NoSuchModel`"),
        ({"_class_name": None}, "_class_name is None; the name of a pipeline class belongs there"),
        ({"_class_name": ["../outside", "Pipeline"]}, "the name of a pipeline class belongs there"),
        ({"size": [32, 32], "_class_name": "NoSuchPipeline"}, "did not load .*NoSuchPipeline"),  # two numbers are an option
        ({"_class_name": "NoSuchPipeline"}, "did not load .*NoSuchPipeline"),
    ],
)
def test_malformed_indexes(folder, changed, message):
    undo = _index(folder, **changed)
    try:
        with pytest.raises(ValueError, match=message):
            diffx.from_pretrained(folder)
    finally:
        undo()


def test_malformed_files_and_pickles(folder):
    index, weights = folder / "model_index.json", folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = index.read_text()
    for text, message in (("{", "is not readable JSON"), ("[]", "holds a list, where an object")):
        index.write_text(text)
        with pytest.raises(ValueError, match=f"model_index.json {message}"):
            diffx.from_pretrained(folder)
    index.write_text(before)
    pickle = weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model.bin is a pickle, .* reads safetensors only: convert it"):
        diffx.from_pretrained(folder)
    with pytest.raises(ValueError, match="use_safetensors=False reads pickles"):
        diffx.from_pretrained(folder, use_safetensors=False)
    pickle.rename(weights)
    weights.write_bytes(b"not a tensor")
    with pytest.raises(ValueError, match="did not load"):
        diffx.from_pretrained(folder)
    with pytest.raises(ValueError, match="has no model_index"):
        diffx.from_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=r"the Hub is out of reach, and model_index\.json of no/where is not in the cache"):
        diffx.from_pretrained("no/where")  # HF_HUB_OFFLINE is set for all tests
    with pytest.raises(ValueError, match="is no folder here, and a Hub id has the form owner/name"):
        diffx.from_pretrained("../no/where/at all")
