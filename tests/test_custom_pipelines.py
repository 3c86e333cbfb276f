"""``pipelines/``: each folder is a repository for ``custom_pipeline``; loaded, saved and described as its users do."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import ControlNetModel, DiffusionPipeline, StableDiffusionPipeline

from diffx.loading import EMBEDDED
from diffx.testing import tiny_stable_diffusion

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(path for path in (ROOT / "pipelines").iterdir() if path.is_dir())
NAMES = {"controlled": "ControlledPipeline", "few_step": "FewStepPipeline", "latent_interpolation": "LatentInterpolationPipeline"}
TRUST = {"trust_remote_code": True}
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of Stable Diffusion that loads in no time."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_stable_diffusion().save_pretrained(folder)
    return str(folder)


# Where the code comes from. A Hub repository would be another entry: its id for the folder's path.
@pytest.fixture(params=["folder"])
def load(request):
    return lambda model, folder, **more: DiffusionPipeline.from_pretrained(model, custom_pipeline=str(folder), **TRUST, **more)


def drawn(pipe):
    """The latents of a call that all three pipelines inherit."""
    return StableDiffusionPipeline.__call__(
        pipe, "x", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images


def test_every_folder_is_known_here():
    assert [folder.name for folder in FOLDERS] == sorted(NAMES)


@each_folder
def test_a_folder_holds_what_may_be_published_and_stands_alone(folder):
    assert {file.suffix for file in folder.iterdir() if file.is_file()} <= {".py", ".json", ".md", ".safetensors", ".png", ".gif"}
    code = folder / f"{folder.name}_pipeline.py"
    imported = set()
    for node in ast.walk(ast.parse(code.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level  # one file, which a saved pipeline can take along
            imported.add(node.module)
    assert {name.split(".")[0] for name in imported} <= {"torch", "diffusers", "numpy", "PIL"} | sys.stdlib_module_names
    stub = ast.parse((folder / "pipeline.py").read_text())
    (source,) = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    assert (source.level, source.module, [name.name for name in source.names]) == (1, code.stem, [NAMES[folder.name]])


def test_all_folders_work_in_one_process_loaded_twice_and_in_any_order(tiny, load):
    pipes = [load(tiny, folder) for folder in (*FOLDERS, *reversed(FOLDERS))]
    assert [type(pipe).__name__ for pipe in pipes] == [NAMES[folder.name] for folder in (*FOLDERS, *reversed(FOLDERS))]
    goal = drawn(tiny_stable_diffusion())
    assert [torch.equal(drawn(pipe), goal) for pipe in pipes] == [True] * len(pipes)
    assert pipes[0].outpaint and pipes[-1].outpaint  # the first of them still has its own methods and helpers
    assert len({type(pipe).__module__ for pipe in pipes}) == len(FOLDERS)


@each_folder
def test_they_are_loaded_only_when_trusted(tiny, folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(tiny, custom_pipeline=str(folder))


def test_saved_ones_keep_their_code_and_are_saved_again(tiny, load, tmp_path):
    for folder in FOLDERS:
        once, twice, code = tmp_path / "once" / folder.name, tmp_path / folder.name, f"{folder.name}_pipeline.py"
        load(tiny, folder).save_pretrained(once)
        DiffusionPipeline.from_pretrained(once, **TRUST).save_pretrained(twice)
        assert json.loads((twice / "model_index.json").read_text())["_class_name"] == [f"{folder.name}_pipeline", NAMES[folder.name]]
        assert [file.name for file in twice.glob("*.py")] == [code]
        assert (twice / code).read_bytes() == (folder / code).read_bytes()
        with pytest.raises(ValueError, match="trust_remote_code"):
            DiffusionPipeline.from_pretrained(twice)
    # In a new process, to which no module and no class is known.
    ask = "import sys; from diffusers import DiffusionPipeline\nfor folder in sys.argv[1:]:\n"
    ask += "    print(type(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)).__name__)"
    done = subprocess.run([sys.executable, "-c", ask, *(tmp_path / name for name in NAMES)], capture_output=True, text=True)
    assert done.stdout.split() == list(NAMES.values()), done.stderr


def test_a_local_file_is_an_address_too(tiny):
    pipe = DiffusionPipeline.from_pretrained(tiny, custom_pipeline=str(ROOT / "pipelines/few_step/few_step_pipeline.py"), **TRUST)
    assert type(pipe).__name__ == "FewStepPipeline"


# cards


def card(folder):
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@each_folder
def test_a_card_says_what_it_is(folder):
    front, text = card(folder)
    assert front["license"] == "apache-2.0" and front["library_name"] == "diffusers" and "custom-pipeline" in front["tags"]
    assert front["pipeline_tag"] in ("text-to-image", "image-to-image")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert pictures and all((folder / picture).is_file() for picture in pictures)


@each_folder
def test_the_snippets_of_a_card_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    (tmp_path / "diffx").symlink_to(ROOT / "diffx")
    blocks = re.findall(r"```python\n(.*?)```", card(folder)[1], re.DOTALL)
    # Fewer calls of the network: the text is run, not the time it takes.
    few = re.sub(r"num_inference_steps=(\d\d)", "num_inference_steps=2", "\n".join(blocks))
    few = re.sub(r"num_rows=\d, num_columns=\d", "num_rows=2, num_columns=2", few)
    exec(few, {"model": str(EMBEDDED), "ControlNetModel": ControlNetModel})


@pytest.mark.slow
@pytest.mark.parametrize("demo", sorted(ROOT.glob("pipelines/*/*demo.py")), ids=lambda demo: f"{demo.parent.name}/{demo.stem}")
def test_a_demo_writes_what_it_says(demo, tmp_path):
    done = subprocess.run([sys.executable, demo, "--output", tmp_path / "out"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = [file for file in (tmp_path / "out").iterdir() if str(file) in done.stdout]
    assert made and all(file.stat().st_size > 500 for file in made)
