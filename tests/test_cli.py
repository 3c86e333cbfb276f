"""The ``diffx`` command: what it writes, what it prints where, and how it says no."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from diffx import environment, loading, sampling
from diffx.cli import app
from diffx.cli.compare import CONTROLS, split_samplers

COMMANDS = [command.name for command in app.registered_commands]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="diffx")


def good(*words) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def refused(*words) -> str:
    """The one line on stderr of a call with bad input."""
    result = run(*words)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == ""
    assert result.stderr.startswith("diffx: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


# help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_an_example(command):
    assert f"diffx {command}" in good(command, "--help").split("Example:")[1]


def test_no_command_shows_them_all():
    result = run()
    assert result.exit_code == 2
    assert all(command in result.output for command in COMMANDS)


def test_a_wrong_command_or_flag_is_exit_code_2():
    assert run("smaple").exit_code == 2 and "sample" in run("smaple").stderr
    assert run("plan", "--step", "4").exit_code == 2


# quickstart and compare


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A whole quickstart: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, good("quickstart", "--output", folder, "--train-steps", 2)


def test_quickstart_writes_pictures_and_report(quickstart):
    folder, _ = quickstart
    assert {"compare.png", "error.png", "report.md", "report.json"} <= {path.name for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text())
    assert np.asarray(Image.open(folder / "compare.png").convert("L")).std() > 10  # of 255: not an empty sheet
    assert "UniPC" in json.dumps(report)


def test_quickstart_shows_the_calibrated_table_at_its_own_calls_and_nearest_to_the_reference(quickstart):
    rows = [row for row in json.loads((quickstart[0] / "report.json").read_text())["rows"] if row["role"] in ("sampler", "control")]
    assert [row["nfe"] for row in rows if row["sampler"] == "emoji_calibrated_6"] == [6]
    others = {row["sampler"]: row["rms"] for row in rows if row["nfe"] == 6}
    table = others.pop("emoji_calibrated_6")
    assert len(others) == 7 and table < min(others.values())
    assert f"RMS {table:.3f} to the reference" in (Path(__file__).parent.parent / "README.md").read_text()


def test_quickstart_loads_its_student_in_stock_diffusers_and_distils_it_on(quickstart):
    folder, printed = quickstart
    assert "emoji_progressive_4 in a process that has only Diffusers: identical pixels" in printed
    figures = {line[:32].strip(): line[32:].split() for line in printed.splitlines()}
    for name in ("loss", "PSNR to the teacher, dB", "R-precision@1", "FD (glyph encoder)"):
        before, after = map(float, figures[name][:2])
        assert before != after or name == "R-precision@1", name
    assert (folder / "student" / "model" / "pytorch_lora_weights.safetensors").is_file()
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [(row["nfe"], row["batch_factor"]) for row in rows if row["sampler"] == "emoji_progressive_4"] == [(4, 1)]


def test_quickstart_ends_with_the_table_the_pictures_and_what_to_do_next(quickstart):
    folder, printed = quickstart
    assert (folder / "report.md").read_text().strip().splitlines()[-1] in printed
    assert all(control in printed for control in CONTROLS)
    assert str(folder / "compare.png") in printed
    assert "diffx sample" in printed.split("next:")[1]
    script = printed.split("between:")[1].split()[1]
    assert (Path(__file__).parent.parent / script).is_file()


def test_compare_on_a_folder_prints_json_alone(tmp_path):
    (tmp_path / "prompts.txt").write_text("rocket\n\nghost on pink\n")
    printed = good(
        "compare", "--model", loading.EMBEDDED, "--samplers", "DDIM,diffusers:DDIMScheduler", "--num-inference-steps", "2,3",
        "--guidance-scale", "1,3", "--prompts", tmp_path / "prompts.txt", "--prompt", "snail", "--reference-steps", "5",
        "--output", tmp_path / "out", "--json",
    )  # fmt: skip
    assert json.loads(printed) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(prompt in printed for prompt in ("rocket", "ghost on pink", "snail"))


def test_compare_takes_steps_for_one_sampler(tmp_path):
    samplers = "Euler@2,DDIM,DPMSolver:algorithm_type=dpmsolver++,solver_order=1@4,emoji_calibrated_6"
    words = ("--num-inference-steps", 3, "--reference-steps", 6, "--prompt", "rocket", "--output", tmp_path / "out")
    rows = json.loads(good("compare", "--samplers", samplers, *words, "--json"))["rows"]
    assert [(row["sampler"].split(":")[0], row["nfe"]) for row in rows[2:]] == [
        ("Euler", 2), ("DDIM", 3), ("DPMSolver", 4), ("emoji_calibrated_6", 6),
    ]  # fmt: skip


def test_a_sampler_list_keeps_options_with_their_sampler():
    assert split_samplers("DDIM, UniPC") == ["DDIM", "UniPC"]
    assert split_samplers("DPMSolver:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true,diffusers:DDIMScheduler:eta=1") == [
        "DPMSolver:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true",
        "diffusers:DDIMScheduler:eta=1",
    ]


# sample


def test_sample_writes_what_the_library_makes(tmp_path, embedded):
    output = tmp_path / "new" / "one.png"
    printed = good("sample", "rocket", "--num-inference-steps", "3", "--seed", "7", "--output", output)
    assert printed == f"{output}  seed 7  rocket\n"
    (expected,) = sampling.sample(embedded, ["rocket"], num_inference_steps=3, guidance_scale=3.0, seed=7)
    assert np.array_equal(np.asarray(Image.open(output)), np.asarray(expected.image))


def test_a_printed_seed_gives_the_picture_again(tmp_path):
    shared = ["--sampler", "UniPC", "--num-inference-steps", "3", "--json", "--output"]
    made = json.loads(good("sample", "rocket", "snail", "--num-images-per-prompt", "2", *shared, tmp_path / "all.png"))
    assert [(p["prompt"], p["seed"]) for p in made] == [("rocket", 0), ("rocket", 1), ("snail", 2), ("snail", 3)]
    assert [Path(p["file"]).name for p in made] == ["all-1.png", "all-2.png", "all-3.png", "all-4.png"]
    good("sample", "snail", "--seed", "3", *shared, tmp_path / "one.png")
    alone, together = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "all-4.png"))
    # The same noise; convolutions of another batch size sum in another order, which may move a pixel's rounding.
    assert abs(alone - together).max() <= 1


def test_images_that_are_not_finite_are_an_error(tmp_path):
    pipe = loading.load_pipeline(device="cpu")
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    pipe.save_pretrained(tmp_path / "broken")
    result = run("sample", "rocket", "--model", tmp_path / "broken", "--num-inference-steps", "2", "--output", tmp_path / "a.png")
    assert result.exit_code == 1 and result.stderr.strip().splitlines()[-1].startswith("diffx: DDIMScheduler with 2 steps gave NaN")
    assert not (tmp_path / "a.png").exists()


# plan


def test_plan_prints_a_line_per_call():
    printed = good("plan", "--sampler", "UniPC", "--num-inference-steps", "5").splitlines()
    assert printed[0] == "UniPC: 5 network calls" and len(printed) == 2 + 5


def test_plan_as_json_has_the_calls():
    plan = json.loads(good("plan", "--sampler", "DPMSolver:algorithm_type=sde-dpmsolver++", "--num-inference-steps", "6", "--json"))
    assert plan["nfe"] == len(plan["calls"]) == 6
    assert plan["calls"][0]["noise"] > 0


# env


def test_env_reports_this_machine():
    import torch

    found = json.loads(good("env", "--json"))
    assert found["packages"]["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "cpu" in found["devices"] and found["embedded_model"]
    assert "torch" in good("env")


def test_env_warns_of_the_foreign_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert environment.warnings() == []
    (tmp_path / "diffx-1.2.3.dist-info").mkdir()
    (tmp_path / "diffx-1.2.3.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: diffx\nVersion: 1.2.3\n")
    result = run("env")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: the distribution 'diffx' 1.2.3 is installed")
    assert json.loads(good("env", "--json"))["warnings"] == environment.warnings()


# bad input, next to the calls above that differ in the wrong word alone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler", "UniPCC"], "UniPC"),
        (["--sampler", "UniPC:solver_odrer=2"], "solver_order"),
        (["--sampler", "diffusers:DDIMSchedulr"], "DDIMScheduler"),
        (["--num-inference-steps", "0"], "0"),
        (["--num-inference-steps", "-3"], "-3"),
        (["--sampler", "diffusers:DDIMScheduler"], "has no table"),
    ],
)
def test_plan_refuses(words, message):
    assert message in refused("plan", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-inference-steps", "0"], "num_inference_steps=0 must be at least 1"),
        (["--num-images-per-prompt", "0"], "num_images_per_prompt=0 must be at least 1"),
        (["--output", "picture.docx"], "picture format"),
        (["--output", "/dev/null/picture.png"], "its folder cannot be made"),
        (["--torch-dtype", "float8"], "float32, bfloat16, float16"),
        (["--device", "abacus"], "'cpu' always does"),
        (["--sampler", "Uni"], "UniPC"),
    ],
)
def test_sample_refuses(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused("sample", "rocket", *words)
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samplers", "DDIM,Eulre"], "Euler"),
        (["--samplers", "DDIM@four"], "a number of steps from 1 on, as in DDIM@6"),
        (["--samplers", "emoji_calibrated_6@8"], "was made for 6 steps alone, asked were 8"),
        (["--num-inference-steps", "4,0"], "0"),
        (["--prompts", "nowhere.txt"], "one prompt a line"),
        (["--reference", "DDIMM"], "DDIM"),
    ],
)
def test_compare_refuses(words, message, tmp_path):
    assert message in refused("compare", "--output", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_compare_refuses_a_file_as_folder_before_it_starts(tmp_path):
    (tmp_path / "out").touch()
    result = run("compare", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "is a file" in result.stderr


def test_lists_of_numbers_are_read_or_refused():
    result = run("compare", "--num-inference-steps", "4;8")
    assert result.exit_code == 2 and "4,8,16" in result.stderr


def missing(folder):
    return folder / "none"


def a_file(folder):
    (folder / "model.safetensors").touch()
    return folder / "model.safetensors"


def empty(folder):
    return folder


def bad_json(folder):
    (folder / "model_index.json").write_text("{")
    return folder


def truncated(folder):
    shutil.copytree(loading.EMBEDDED, folder / "copy")
    weights = next((folder / "copy" / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    return folder / "copy"


def without_unet(folder):
    shutil.copytree(loading.EMBEDDED, folder / "copy", ignore=lambda _, names: [name for name in names if name == "unet"])
    return folder / "copy"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (missing, "is no folder here"),
        (a_file, "from_single_file"),
        (empty, "has no model_index.json"),
        (bad_json, "did not load"),
        (truncated, "did not load"),
        (without_unet, "did not load"),
        (lambda folder: "somebody/not-on-this-machine", "did not load"),
    ],
)
def test_a_missing_or_broken_model_is_one_clear_line(make, message, tmp_path):
    model = make(tmp_path)
    assert message in (line := refused("sample", "rocket", "--model", model, "--output", tmp_path / "a.png"))
    assert str(model) in line


def test_a_broken_scheduler_config_is_one_clear_line(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert "no readable scheduler config" in refused("plan", "--model", tmp_path)


# evaluate


def test_evaluate_tells_few_steps_from_many_and_prints_json_alone(tmp_path):
    words = ("--num-images", 20, "--samplers", "UniPC", "--num-inference-steps", "2,8", "--measures", "KID,coverage")
    printed = json.loads(good("evaluate", *words, "--output", tmp_path / "out", "--json"))
    assert printed == json.loads((tmp_path / "out" / "report.json").read_text())
    real, two, eight = ({m["name"]: m["value"] for m in row["measures"]} for row in printed["rows"])
    assert real["R-precision@1"] > 0.9 and eight["R-precision@1"] > two["R-precision@1"] + 0.3
    assert two["KID"] > eight["KID"]
    assert (tmp_path / "out" / "quality.png").is_file()


def test_evaluate_a_folder_of_pictures(tmp_path):
    good("sample", "rocket", "snail", "--num-images-per-prompt", 3, "--num-inference-steps", 2, "--output", tmp_path / "made" / "a.png")
    words = ("--pictures", tmp_path / "made", "--measures", "KID, precision,recall,density,coverage", "--output", tmp_path / "out")
    printed = good("evaluate", *words)
    assert printed.startswith((tmp_path / "out" / "report.md").read_text()) and str(tmp_path / "out" / "pictures.png") in printed
    assert not (tmp_path / "out" / "quality.png").exists()
    assert "FD of 64 features needs at least 65 pictures in each set, there are 6" in refused("evaluate", "--pictures", tmp_path / "made")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pictures", "nowhere"], "no folder here"),
        (["--real", "nowhere"], "no folder here"),
        (["--features", "/no/where"], "cannot load an image model"),
        (["--measures", "FID"], "measure 'FID' is not one of FD, KID"),
        (["--samplers", "DDIMM"], "DDIM"),
        (["--num-images", "64"], "at least 65 pictures"),
        (["--prompts", "nowhere.txt"], "one prompt a line"),
        (["--device", "abacus"], "'cpu' always does"),
    ],
)
def test_evaluate_refuses(words, message, tmp_path):
    assert message in refused("evaluate", "--output", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_evaluate_has_the_defaults_of_the_library():
    import inspect

    from diffx.cli.evaluate import evaluate as command
    from diffx.evaluation import evaluate
    from diffx.evaluation.evaluate import MEASURES

    told, function = inspect.signature(command).parameters, inspect.signature(evaluate).parameters
    for name in ("num_inference_steps", "guidance_scale", "num_images", "resolution", "batch_size", "seed"):
        assert told[name].default == function[name].default, name
    assert tuple(told["measures"].default.split(",")) == MEASURES


# as a process


def process(*words, **environ):
    words = [sys.executable, "-m", "diffx", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ | environ, check=False)


def test_exit_codes_and_streams_of_the_process(tmp_path):
    done = process("plan", "--num-inference-steps", "4", "--json")
    assert (done.returncode, json.loads(done.stdout)["nfe"]) == (0, 4)
    wrong = process("plan", "--num-inference-steps", "0")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("diffx: ") and "Traceback" not in wrong.stderr


def test_debug_shows_where_it_came_from():
    for shown in (process("--debug", "plan", "--sampler", "UniPCC"), process("plan", "--sampler", "UniPCC", DIFFX_DEBUG="1")):
        assert shown.returncode == 1 and "Traceback" in shown.stderr and "ValueError" in shown.stderr


# calibrate


def test_calibrate_tells_its_cost_before_it_spends(tmp_path):
    printed = good("calibrate", "--dry-run", "--num-inference-steps", 4, "--output", tmp_path / "sampler")
    assert "reference" in printed and "total" in printed and not (tmp_path / "sampler").exists()
    assert json.loads(good("calibrate", "--dry-run", "--json"))["reference"] == (64 + 32) * 64


def test_calibrate_has_the_defaults_of_the_library():
    import inspect

    from diffx.calibration import Settings
    from diffx.cli.calibrate import calibrate

    told, settings = inspect.signature(calibrate).parameters, Settings(num_inference_steps=6)
    for name in ("num_samples", "num_held_out", "reference_steps", "iterations", "time_budget", "seed"):
        assert told[name].default == getattr(settings, name), name


def test_calibrate_writes_a_sampler_for_the_other_commands(tmp_path):
    words = ("--num-inference-steps", 3, "--num-samples", 8, "--num-held-out", 8, "--reference-steps", 8, "--iterations", 1)
    printed = good("calibrate", *words, "--cache", tmp_path / "cache", "--output", tmp_path / "sampler")
    assert "search" in printed and "learn" in printed and printed.strip().splitlines()[-1].startswith(f"sampler: {tmp_path / 'sampler'}")
    good("sample", "rocket", "--sampler", tmp_path / "sampler", "--output", tmp_path / "rocket.png")  # at its own number of steps
    assert Image.open(tmp_path / "rocket.png").size == (32, 32)
    assert "calibrated for 3 steps" not in good("plan", "--sampler", tmp_path / "sampler")
    assert "at least 8" in refused("calibrate", "--num-samples", 2)
