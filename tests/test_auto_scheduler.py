"""AutoScheduler: whatever a folder or repository holds, and a clear error for what it does not."""

import io
import json
import re
import shutil
import tokenize
from pathlib import Path

import diffusers
import huggingface_hub.constants
import pytest

import diffx
from diffx.hub.degrade import degraded
from diffx.loading import EMBEDDED, EMBEDDED_TABLE
from diffx.testing import LocalHub, tiny_stable_diffusion

ROOT = Path(__file__).parent.parent
GRADIENT_ESTIMATION = ROOT / "schedulers" / "gradient_estimation"
load = diffx.AutoScheduler.from_pretrained


def written(folder, **config):
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def test_it_loads_what_the_config_names(tmp_path):
    stock = load(EMBEDDED, subfolder="scheduler")
    assert type(stock) is diffusers.DDIMScheduler and stock.config.num_train_timesteps == 1024
    ours = load(ROOT / "schedulers" / "sdxl")
    assert type(ours) is diffx.UniPC and ours.config == diffx.UniPC.from_pretrained(ROOT / "schedulers" / "sdxl").config
    assert load(EMBEDDED_TABLE).calibration.num_inference_steps == 6
    pipe = tiny_stable_diffusion()
    pipe.scheduler = diffx.DPMSolver.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++", eta=0.5)
    degraded(pipe).scheduler.save_pretrained(tmp_path)
    restored = load(tmp_path)
    assert type(restored) is diffx.DPMSolver and restored.config.eta == 0.5
    changed = json.loads((tmp_path / "scheduler_config.json").read_text())
    written(tmp_path, **changed | {"prediction_type": "sample"})
    with pytest.raises(ValueError, match=r"changed since diffx\.save_pretrained wrote it: prediction_type is 'sample', was 'epsilon'"):
        load(tmp_path)


def test_code_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    shutil.copytree(GRADIENT_ESTIMATION, tmp_path / "one")
    source = (tmp_path / "one" / "scheduler.py").read_text()
    (tmp_path / "one" / "scheduler.py").write_text(source + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ValueError, match=r"defines its class GradientEstimation in scheduler.py, .* pass trust_remote_code=True") as error:
        load(tmp_path / "one")
    assert str(tmp_path / "one" / "scheduler.py") in str(error.value)  # where it can be read
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.DIFFUSERS_DISABLE_REMOTE_CODE", True)
    with pytest.raises(ValueError, match="DIFFUSERS_DISABLE_REMOTE_CODE"):
        load(tmp_path / "one", trust_remote_code=True)
    assert not (tmp_path / "ran").exists()
    monkeypatch.undo()
    scheduler = load(tmp_path / "one", trust_remote_code=True)
    assert type(scheduler).__name__ == "GradientEstimation" and isinstance(scheduler, diffx.TableScheduler)
    assert (tmp_path / "ran").exists()


def test_the_library_trusts_no_code_of_itself():
    """The flag is passed on where the user has given it, in one place."""
    trusting = [path.name for path in (ROOT / "diffx").rglob("*.py") if re.search(r"trust_remote_code *= *True[,)]", code_of(path))]
    assert trusting == ["auto.py"]


def code_of(path):
    """The source without its texts."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return "".join(token.string for token in tokens if token.type not in (tokenize.STRING, tokenize.COMMENT))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no scheduler_config.json: there is no scheduler"),
        ({"scheduler/scheduler_config.json": "{}"}, 'that of its pipeline is loaded with subfolder="scheduler"'),
        ({"scheduler_config.json": "{"}, "scheduler_config.json is not readable JSON"),
        ({"scheduler_config.json": "[1]"}, "scheduler_config.json holds a list, where an object with options belongs"),
        ({"scheduler_config.json": "{}"}, "_class_name is None; the name of a class belongs there"),
        ({"scheduler_config.json": '{"_class_name": "../x"}'}, "_class_name is '../x'; the name of a class belongs there"),
        (
            {"scheduler_config.json": '{"_class_name": "Newer"}'},
            "the class Newer, which neither Diffusers nor diffx has",
        ),
        ({"scheduler_config.json": '{"_class_name": "UNet2DModel"}'}, "UNet2DModel is not a scheduler"),
        ({"scheduler_config.json": '{"_class_name": "UniPC", "solver_order": 9}'}, "solver_order"),
        ({"scheduler_config.json": '{"_class_name": "DDIMScheduler", "beta_schedule": "x"}'}, "DDIMScheduler refuses its config"),
        ({"scheduler_config.json": '{"_class_name": "DDIMScheduler", "_diffx": {}}'}, "_diffx of the scheduler config must be"),
        ({"scheduler_config.json": '{"_class_name": "X"}', "scheduler.py": "class X: pass"}, "X is not a scheduler"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tmp_path, trust_remote_code=True)


def test_bad_places(tmp_path):
    for subfolder in ("../outside", "/etc", "a/../../b", "a\\b"):
        with pytest.raises(ValueError, match="leads out of"):
            load(tmp_path, subfolder=subfolder)
    with pytest.raises(ValueError, match="is no folder here, and a Hub id has the form owner/name"):
        load("no/such/folder")
    with pytest.raises(TypeError, match="is not made itself"):
        diffx.AutoScheduler()


def test_repositories_and_the_lack_of_them(tmp_path, monkeypatch):
    """huggingface_hub in this process: the Hub is told to it by argument, and it is let out of the offline mode of our tests."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with LocalHub() as hub:
        there = dict(endpoint=hub.url, cache_dir=tmp_path / "cache", token=False)
        first = hub.commit("someone/scheduler", ROOT / "schedulers" / "sd15")
        hub.commit("someone/scheduler", ROOT / "schedulers" / "sd3")
        hub.commit("someone/private", ROOT / "schedulers" / "sd3", private=True)
        hub.commit("tester/private", ROOT / "schedulers" / "sd3", private=True)
        hub.commit("someone/code", GRADIENT_ESTIMATION)
        assert load("someone/scheduler", **there).config.shift == 3.0
        assert load("someone/scheduler", revision=first, **there).config.beta_start == 0.00085
        assert load("tester/private", **there | {"token": hub.token}).config.shift == 3.0
        assert hub.token not in "".join(request.path for request in hub.requests)
        for repo_id, options, message in (
            ("someone/private", {}, "no repository on the Hub that this token can see; log in with `hf auth login`"),
            ("someone/absent", {}, "no repository on the Hub that this token can see"),
            ("someone/scheduler", dict(revision="v9"), "someone/scheduler has no revision 'v9'; give a branch, a tag or a commit"),
            ("someone/scheduler", dict(subfolder="scheduler"), "holds no scheduler_config.json in 'scheduler'"),
            ("someone/code", {}, "defines its class GradientEstimation in scheduler.py, which would have to run here"),
        ):
            with pytest.raises(ValueError, match=re.escape(message)) as error:
                load(repo_id, **there | options)
            assert hub.token not in str(error.value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries six times
    with pytest.raises(ValueError, match=r"the Hub is out of reach, and scheduler_config\.json of someone/other is not in the cache"):
        load("someone/other", **there)
    assert load("someone/scheduler", **there, revision=first).config.beta_start == 0.00085  # from the cache


REFUSED = """
import json, diffx
told = {}
for name, repo_id in {"pickle": "someone/pickle", "index": "someone/index", "code": "someone/code", "private": "someone/private",
                      "scheduler": "someone/scheduler", "file": "someone/broken"}.items():
    try:
        diffx.from_pretrained(repo_id)
        told[name] = "loaded"
    except ValueError as error:
        told[name] = str(error)
print(json.dumps(told))
"""


@pytest.mark.slow  # a process of its own
def test_pipelines_of_repositories_that_are_refused(tmp_path):
    tiny_stable_diffusion().save_pretrained(tmp_path)
    files = {file.relative_to(tmp_path).as_posix(): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    index = json.loads(files["model_index.json"])

    def named(**changed):
        return json.dumps(index | changed).encode()

    weights = "unet/diffusion_pytorch_model.safetensors"
    with LocalHub() as hub:
        hub.commit("someone/pickle", {name.replace(weights, weights.replace("safetensors", "bin")): data for name, data in files.items()})
        hub.commit("someone/index", files | {"model_index.json": named(**{"../unet": ["diffusers", "UNet2DConditionModel"]})})
        hub.commit("someone/code", files | {"model_index.json": named(_class_name=["mine", "Mine"]), "mine.py": "open('ran', 'w')"})
        hub.commit("someone/private", files, private=True)
        hub.commit("someone/scheduler", ROOT / "schedulers" / "sd15")
        hub.commit("someone/broken", files | {weights: b"no tensors"})
        told = json.loads(hub.run(REFUSED, cwd=tmp_path).stdout)
    for name, message in {
        "pickle": "did not load .*safetensors.*unet",
        "index": "the component '../unet' is no name of a folder",
        "code": "trust_remote_code=True",
        "private": "no repository on the Hub that this token can see",
        "scheduler": "holds no model_index.json; diffx.AutoScheduler loads",
        "file": "did not load",
    }.items():
        assert re.search(message, told[name], re.DOTALL), told[name]
    assert not (tmp_path / "ran").exists()
