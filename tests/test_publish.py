"""What is published: which files, under which card, and that the card's own lines load it in stock Diffusers."""

import json
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from adapter_parts import clip, picture
from diffusers import LCMScheduler
from huggingface_hub import ModelCard
from typer.testing import CliRunner

import diffx
from diffx.cli import app
from diffx.evaluation import evaluate
from diffx.evaluation.pictures import PictureTensor
from diffx.hub.artifact import artifact_of
from diffx.hub.card import make_card
from diffx.hub.publish import push_to_hub, write_repository
from diffx.loading import EMBEDDED_STUDENT, EMBEDDED_TABLE
from diffx.objectives import LCM
from diffx.testing import IMAGE_SIZE, LocalHub, tiny_stable_diffusion

SMALL = dict(train_steps=2, batch_size=2, resolution=IMAGE_SIZE, progress=False, device="cpu")
NAMES = ("lora", "whole", "controlnet", "ip-adapter")
BASE = dict(base_model="tester/base", license="apache-2.0")


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A run of each kind, with the model that they were made of beside them, as a folder whose card says a licence."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_stable_diffusion().save_pretrained(folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: openrail\n---\n\n# Base\n")
    clip().save_pretrained(folder / "clip")
    photos = [{"image": np.asarray(picture(i)), "text": "one"} for i in range(4)]
    common = dict(SMALL, cache=folder / "cache")
    method = LCM(calls=4, embed_guidance=False)
    diffx.distill(str(folder / "base"), method, photos, lora_rank=2, sample_prompts=["one", "two"], output=folder / "lora", **common)
    diffx.distill(str(folder / "base"), method, photos, output=folder / "whole", **common)
    adapters = {"controlnet": diffx.ControlNet(), "ip-adapter": diffx.IPAdapter("plain", image_encoder=folder / "clip")}
    for name, adapter in adapters.items():
        diffx.train(str(folder / "base"), adapter, photos, num_held_out=2, output=folder / name, **common)
    return folder


@pytest.fixture(scope="session")
def evaluated(runs):
    """Steps against quality of the LoRA, beside the model's own sampler."""
    pictures = PictureTensor(torch.rand(40, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)), ["one"] * 40, "noise")
    samplers = [str(runs / "lora" / "model"), "DDIM"]
    found = evaluate(
        diffx.loading.load_pipeline(runs / "base", device="cpu"), pictures, samplers=samplers, num_inference_steps=(2,), num_images=8,
        measures=["KID", "coverage"], batch_size=8, progress=False,
    )  # fmt: skip
    found.save(runs / "evaluated")
    return runs / "evaluated"


def front_matter(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(
    ("name", "kind", "relation"),
    [
        ("lora", "lora", "adapter"),
        ("whole", "pipeline", "finetune"),
        ("controlnet",) * 2 + ("adapter",),
        ("ip-adapter",) * 2 + ("adapter",),
    ],
)
def test_the_card_is_valid_and_names_what_it_is(runs, tmp_path, name, kind, relation):
    made = write_repository(runs / name, tmp_path / "out", "me/made", base_model="tester/base")
    told = front_matter(made.card)
    assert told["license"] == "openrail"  # of the model's own card
    assert (told["base_model"], told["base_model_relation"], told["library_name"]) == ("tester/base", relation, "diffusers")
    assert told["pipeline_tag"] == "text-to-image" and ("distillation" in told["tags"]) == (name in ("lora", "whole"))
    assert told["widget"][0]["output"]["url"] in made.files
    assert artifact_of(tmp_path / "out").kind == kind  # what was written can be published again
    compile(code(made.card), "card", "exec")
    ModelCard(made.card)  # the Hub's own reading of it


@pytest.mark.parametrize("name", ["controlnet", "ip-adapter"])
def test_lines_name_no_file_that_is_not_there(runs, name):
    assert '"shown.png")' in code(push_to_hub(runs / name, "me/made", dry_run=True, **BASE).card)
    alone = artifact_of(runs / name / "model")  # as a run that did not keep what was shown
    card = str(make_card(replace(alone, run=None), "me/made", **BASE))
    assert 'load_image("picture.png")' in code(card) and "shown.png" not in card


def test_only_the_export_is_published(runs, tmp_path):
    made = write_repository(runs / "lora", tmp_path / "out", "me/made", **BASE)
    assert set(made.files) == {
        "README.md", "call_kwargs.json", "pytorch_lora_weights.safetensors", "samples.png", "scheduler/scheduler_config.json",
    }  # fmt: skip
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == set(made.files)
    assert str(runs) not in made.card  # no path of the machine it was made on


def test_a_result_publishes_itself(runs):
    made = diffx.Trained(None, {}, {}, runs / "lora", None, None)  # type: ignore[arg-type]  # all that it asks is the folder
    assert made.push_to_hub("me/made", dry_run=True, **BASE) == push_to_hub(runs / "lora", "me/made", dry_run=True, **BASE)


def test_numbers_in_the_card_are_the_reports(runs, evaluated):
    made = artifact_of(runs / "lora")
    card = make_card(made, "me/made", evaluation=evaluated, **BASE)
    report = json.loads((evaluated / "report.json").read_text())
    mine = next(row for row in report["rows"] if row["sampler"] == str(made.folder))
    told = front_matter(str(card))["model-index"][0]["results"][0]["metrics"]
    assert [entry["value"] for entry in told] == [measure["value"] for measure in mine["measures"]]
    for row in report["rows"]:
        for measure in row["measures"]:
            assert f"{measure['value']:.4g}" in str(card)
    assert "| **this** | 4 | 1 |" in str(card)


def test_an_adapters_figures_are_its_runs(runs):
    made = artifact_of(runs / "controlnet")
    told = front_matter(str(make_card(made, "me/made", **BASE)))["model-index"][0]["results"][0]["metrics"][0]
    assert told["value"] == made.report["figures"][str(made.report["kept_step"])]["gain"]


def test_a_calibrated_table_says_its_errors(tmp_path):
    table = diffx.Calibrated.from_pretrained(EMBEDDED_TABLE)
    table.save_pretrained(tmp_path)
    card = push_to_hub(tmp_path, "me/table", license="mit", dry_run=True).card
    assert front_matter(card)["tags"] == ["diffusers", "diffx", "scheduler"]
    assert "6 network calls at guidance 3" in card
    assert all(f"{stage} {error:.4g}" in card for stage, error in table.calibration.errors.items())
    assert code(card) == 'import diffx\n\npipe.scheduler = diffx.AutoScheduler.from_pretrained("me/table")\n'


def test_a_card_that_is_there_is_the_card():
    made = push_to_hub("emoji_progressive_4", "me/made", dry_run=True)
    assert made.card == (EMBEDDED_STUDENT / "README.md").read_text() and made.url is None
    with pytest.raises(ValueError, match=r"has a README.md, which is published as its card"):
        push_to_hub("emoji_progressive_4", "me/made", license="mit", dry_run=True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {}, "A LoRA is loaded beside its model, and its run was begun with '.*'; say base_model="),
        ("lora", dict(base_model="not an id"), "base_model='not an id' is no Hub id"),
        ("whole", dict(evaluation="nowhere"), "'nowhere' is no report of `diffx evaluate"),
        ("nowhere", {}, "'.*nowhere' is no folder here"),
        ("clip", {}, "holds nothing to publish .*it has config.json, model.safetensors"),
    ],
)
def test_what_is_not_known_is_asked_for(runs, name, options, message):
    with pytest.raises(ValueError, match=message):
        push_to_hub(runs / name, "me/made", dry_run=True, **options)


def test_an_evaluation_of_something_else_is_refused(runs, evaluated):
    with pytest.raises(ValueError, match=r"the evaluation is of real pictures, .*, DDIM, and not of"):
        push_to_hub(runs / "whole", "me/made", evaluation=evaluated, dry_run=True, **BASE)


def test_a_name_that_is_no_repository_is_refused_before_work():
    with pytest.raises(ValueError, match=r"repo_id='me/\.\./you' is no name of a repository"):
        push_to_hub("emoji_progressive_4", "me/../you", dry_run=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("optimizer.pt", "'optimizer.pt' in .* is a pickle or may hold one"),
        ("unet/diffusion_pytorch_model.bin", "is a pickle"),
        ("notes.txt", "'notes.txt' in .* is not published"),
    ],
)
def test_files_that_are_not_published_are_named(runs, tmp_path, name, message):
    folder = write_and_return(runs, tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        push_to_hub(folder, "me/made", dry_run=True)


def test_a_link_out_of_the_folder_is_refused(runs, tmp_path):
    folder = write_and_return(runs, tmp_path)
    (tmp_path / "secret.json").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ValueError, match=r"'config.json' in .* is a link"):
        push_to_hub(folder, "me/made", dry_run=True)


def write_and_return(runs, tmp_path):
    write_repository(runs / "lora", tmp_path / "out", "me/made", **BASE)
    return tmp_path / "out"


def test_an_unfinished_run_is_said_to_be_one(tmp_path):
    (tmp_path / "run.yaml").write_text("{}")
    with pytest.raises(ValueError, match="has no result yet; the command that began it goes on"):
        push_to_hub(tmp_path, "me/made", dry_run=True)


def test_nothing_is_written_over(runs, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already; give a folder that is new or empty"):
        write_repository(runs / "lora", tmp_path, "me/made", **BASE)


def test_the_command_shows_what_it_would_upload(runs):
    words = ["push", str(runs / "lora"), "me/made", "--base-model", "tester/base", "--dry-run"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "pytorch_lora_weights.safetensors" in shown.output and "nothing was uploaded" in shown.output
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).output)
    assert told["url"] is None and front_matter(told["card"])["base_model"] == "tester/base"


# On the Hub

SNIPPETS = """
import json, re, sys
import torch
from huggingface_hub import ModelCard

assert "diffx" in sys.modules and sys.modules["diffx"] is None  # cannot be imported here
sums = {}
for name in json.loads(sys.argv[1]):
    code = re.search(r"```python\\n(.*?)```", ModelCard.load(f"tester/{name}").content, re.S)[1]
    torch.manual_seed(0)
    space = {}
    exec(code.replace(".images[0]", "").replace("image = pipe(", "image = pipe(output_type='latent', prompt="), space)
    sums[name] = space["image"].images.double().sum().item()
print(json.dumps(sums))
"""


@pytest.fixture(scope="module")
def hub(runs):
    """A Hub that has the base model, with its card, and every run, pushed from one process."""
    with LocalHub() as hub:
        hub.commit("tester/base", runs / "base")
        commands = [["push", str(runs / name), f"tester/{name}", "--base-model", "tester/base", "--private"] for name in NAMES]
        code = f"""
            import json, sys
            from typer.testing import CliRunner
            from diffx.cli import app
            for words in {commands!r}:
                done = CliRunner().invoke(app, words)
                assert done.exit_code == 0, done.output
                print(done.output)
        """
        hub.said = hub.run(textwrap.dedent(code)).stdout
        yield hub


def test_the_cards_lines_load_it_in_stock_diffusers(hub, runs):
    done = hub.run(["-c", SNIPPETS, json.dumps(NAMES)], without=("diffx",))
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(np.isfinite(value) for value in found.values()) and len({round(value, 3) for value in found.values()}) == len(NAMES)
    made = artifact_of(runs / "lora")
    pipe = tiny_stable_diffusion()
    pipe.load_lora_weights(made.folder)
    pipe.scheduler = LCMScheduler.from_pretrained(made.folder, subfolder="scheduler")
    torch.manual_seed(0)
    mine = pipe("one", output_type="latent", **made.call_kwargs).images
    assert found["lora"] == mine.double().sum().item()


def test_what_lies_on_the_hub_is_what_was_shown_and_private(hub, runs):
    for name in NAMES:
        made = push_to_hub(runs / name, f"tester/{name}", base_model="tester/base", license="openrail", dry_run=True)
        there = {file: len(data) for file, data in hub.files(f"tester/{name}").items() if file != ".gitattributes"}
        assert there == dict(made.files)
        assert hub.repository(f"tester/{name}").private


def test_no_token_is_written_or_said(hub):
    assert hub.token not in hub.said
    for name in NAMES:
        assert not any(hub.token.encode() in data for data in hub.files(f"tester/{name}").values())


def test_a_broken_push_changes_nothing_and_the_same_call_tries_again(hub, runs):
    push = """
import diffx
from diffx.testing import tiny_stable_diffusion
pipe = tiny_stable_diffusion()
pipe.scheduler = diffx.UniPC.from_config(pipe.scheduler.config)
try:
    print(diffx.push_to_hub(pipe, "tester/pipe", license="mit", revision="next").url)
except ValueError as error:
    print("refused:", error)
"""
    hub.break_uploads()  # the weights are there already, as the base model's
    first = hub.run(push, check=False)
    assert "refused: tester/pipe was not published, and nothing in it has changed" in first.stdout
    assert set(hub.files("tester/pipe", "next")) == {".gitattributes"}
    hub.repair()
    again = hub.run(push)
    assert "/tester/pipe/" in again.stdout
    files = hub.files("tester/pipe", "next")
    assert "README.md" in files and json.loads(files["scheduler/scheduler_config.json"])["_class_name"] == "UniPCMultistepScheduler"
    assert set(hub.files("tester/pipe")) == {".gitattributes"}  # the other branch


def test_a_hub_out_of_reach_is_said_in_one_line(runs):
    with pytest.raises(ValueError, match=r"tester/whole was not published, and nothing in it has changed .*OfflineModeIsEnabled"):
        push_to_hub(runs / "whole", "tester/whole", license="mit")  # all tests run offline
