"""Nothing trained is lost: interrupted runs end in the same bits, checkpoints are whole or not there, and stopping is said."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tqdm.auto import tqdm
from training_parts import CASES, Both, Pictures, Spoilt, exit_code, forked, pipeline, run, training, weights_of
from typer.testing import CliRunner

from diffx.cli import app
from diffx.objectives import DMD2, Diffusion
from diffx.training import checkpoint
from diffx.training.run import Run, Stopped


class Crash(Exception):
    pass


def crashing(made: Run, step: int, *, logged: bool) -> Run:
    """A run that ends by an exception: after a step was taken, or when it was logged and perhaps saved, too."""
    steps = made.training.steps

    def until():
        for now in steps():
            if now.step == step and not logged:
                raise Crash
            yield now
            if now.step == step:
                raise Crash

    made.training.steps = until
    return made


def log_of(folder: Path) -> list[dict]:
    """Without what a clock says."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "examples_per_second"} for entry in entries]


def assert_same(one: Run, two: Run):
    (tensors, numbers), (others, other_numbers) = one.training.state(), two.training.state()
    assert tensors.keys() == others.keys() and numbers == other_numbers
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert log_of(one.folder) == log_of(two.folder)


@pytest.mark.parametrize("save_every, logged", [(1, True), (2, False)], ids=["after a save", "between saves"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_crashed_after_every_step_ends_in_the_same_bits(tmp_path, case, save_every, logged):
    options = dict(train_steps=6, save_every=save_every, evaluate_every=4)  # progressive's second stage begins after step 3
    whole = run(tmp_path / "whole", *CASES[case], **options)
    whole.go()
    for step in range(1, 6):
        with pytest.raises(Crash):
            crashing(run(tmp_path / "parts", *CASES[case], **options), step, logged=logged).go()
    parts = run(tmp_path / "parts", *CASES[case], **options)
    parts.go()
    assert_same(whole, parts)


def mean_weight(pipe, call_kwargs) -> float:
    return pipe.unet.conv_in.weight.detach().double().mean().item()


def test_kill_at_any_moment_then_resume_ends_in_the_same_bits(tmp_path):
    """20 kills: half of them at random moments, half while a checkpoint is being written."""
    options = dict(train_steps=30, save_every=1, evaluate_every=5)
    whole = run(tmp_path / "whole", *CASES["progressive"], metric=mean_weight, **options)
    report = whole.go()
    folder, random, unfinished, longest = tmp_path / "killed", np.random.default_rng(), 0, 0.25
    for kill in range(20):
        number = forked(run(folder, *CASES["progressive"], metric=mean_weight, **options).go)
        end = time.monotonic() + random.uniform(0, longest)
        while time.monotonic() < end or kill % 2:
            if kill % 2 and any((folder / "checkpoints").glob(".writing-*")):
                time.sleep(random.uniform(0, 0.005))  # a save takes about that long
                break
            if os.waitpid(number, os.WNOHANG)[0]:
                pytest.fail("the run was over before all kills; give it more steps")
            time.sleep(0.0005)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        unfinished += any((folder / "checkpoints").glob(".writing-*"))
        for left in (folder / "checkpoints").glob(".writing-*"):
            left.rename(tmp_path / f"left-{kill}")  # so that each kill waits for a save of its own run
    assert unfinished >= 3, "too few kills met a save: this machine writes faster than the test looks"
    killed = run(folder, *CASES["progressive"], metric=mean_weight, **options)
    assert killed.go() == report
    assert_same(whole, killed)


# checkpoints


def some(step: float) -> dict[str, torch.Tensor]:
    return {"weights/a": torch.full((100,), float(step))}


def saved(folder: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(folder, step, some(step), {"step": step}) for step in steps]


DAMAGES = {
    "truncated": lambda path: os.truncate(path / "weights.safetensors", 100),
    "another byte": lambda path: (path / "weights.safetensors").write_bytes(b"\xff" + (path / "weights.safetensors").read_bytes()[1:]),
    "no weights": lambda path: (path / "weights.safetensors").unlink(),
    "another state": lambda path: (path / "state.json").write_text('{"step": 9}'),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: os.truncate(path / "manifest.json", 30),
    "bytes for a manifest": lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00" * 20),
    "another manifest": lambda path: (path / "manifest.json").write_text('{"format": 1, "files": []}'),
    "a manifest of nothing": lambda path: (path / "manifest.json").write_text('{"format": 1, "files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    older, newer = saved(tmp_path, 1, 2)
    assert checkpoint.newest(tmp_path) == newer
    DAMAGES[damage](newer)
    assert checkpoint.newest(tmp_path) == older
    tensors, state = checkpoint.load(older)
    assert torch.equal(tensors["weights/a"], some(1)["weights/a"]) and state == {"step": 1}
    saved(tmp_path, 2)  # and written again
    assert checkpoint.newest(tmp_path) == newer


def test_a_checkpoint_of_a_newer_version_is_refused_by_name(tmp_path):
    _, newer = saved(tmp_path, 1, 2)
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(ValueError, match=r"step-00000002 has checkpoint format 2, and this diffx knows 1; update diffx"):
        checkpoint.newest(tmp_path)


def test_what_is_kept(tmp_path):
    paths = saved(tmp_path, *range(1, 7))
    checkpoint.point(tmp_path, "best", paths[1])
    (tmp_path / ".writing-crashed").mkdir()
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "latest", *(paths[i].name for i in (1, 4, 5))]
    assert checkpoint.pointed(tmp_path, "latest") == paths[5] and checkpoint.pointed(tmp_path, "best") == paths[1]


def test_a_full_disk_loses_nothing(tmp_path):
    """A limit on file sizes stands for the full disk: the write fails in the system itself, in the middle of a file."""
    before = run(tmp_path, *CASES["progressive"], train_steps=4, save_every=1)
    with pytest.raises(Crash):
        crashing(before, 2, logged=True).go()

    def go_on():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # else the system ends the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match=r"the checkpoint of step 3 cannot be written to .* the ones before it are still there"):
            run(tmp_path, *CASES["progressive"], train_steps=4, save_every=1).go()

    assert exit_code(forked(go_on)) == 0
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["latest", "step-00000001", "step-00000002"]
    after = run(tmp_path, *CASES["progressive"], train_steps=4, save_every=1)
    assert after.go()["kept_step"] == 4


# the run around it


def test_the_best_checkpoint_is_the_result(tmp_path):
    measured = iter([3.0, 1.0, float("nan"), 2.0])
    made = run(tmp_path, Diffusion(), metric=lambda pipe, call_kwargs: next(measured), train_steps=8, save_every=1, evaluate_every=2)
    kept = {}
    steps = made.training.steps

    def watched():
        for now in steps():
            kept[now.step] = weights_of(made.training)
            yield now

    made.training.steps = watched
    assert made.go() == {"train_steps": 8, "kept_step": 4, "metric": {"2": 3.0, "4": 1.0, "6": None, "8": 2.0}}
    result = weights_of(made.training)
    assert all(torch.equal(value, result[name]) for name, value in kept[4].items())
    assert not all(torch.equal(value, result[name]) for name, value in kept[8].items())


def test_the_best_is_the_same_after_a_crash_between_the_save_and_its_name(tmp_path, monkeypatch):
    options = dict(train_steps=6, save_every=1, evaluate_every=2)
    values = {2: 3.0, 4: 1.0, 6: 2.0}
    made = run(tmp_path, Diffusion(), **options)
    made.metric = lambda pipe, call_kwargs: values[made.training.step]
    with monkeypatch.context() as patched:

        def point(folder, name, goal, point=checkpoint.point):
            if name == "best" and goal.name.endswith("4"):
                raise Crash
            point(folder, name, goal)

        patched.setattr(checkpoint, "point", point)
        with pytest.raises(Crash):
            made.go()
    made = run(tmp_path, Diffusion(), **options)
    made.metric = lambda pipe, call_kwargs: values[made.training.step]
    assert made.go()["kept_step"] == 4


def test_the_folder_tells_what_happened(tmp_path):
    made = run(tmp_path, DMD2(fake_steps=1), train_steps=4, save_every=3, evaluate_every=2)
    made.go()
    entries = log_of(tmp_path)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert set(entries[0]) == {"step", "stage", "loss/fake", "grad_norm/fake", "lr"}
    assert set(entries[1]) == {"step", "stage", "loss/student", "grad_norm/student", "lr"}
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["step-00000002.png", "step-00000004.png"]
    assert np.asarray(Image.open(tmp_path / "samples" / "step-00000004.png")).std() > 10  # of 255: pictures are on it
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000004"
    assert json.loads((tmp_path / "report.json").read_text()) == {"train_steps": 4, "kept_step": 4}


def test_another_run_in_the_folder_is_refused_and_how_often_it_saves_is_free(tmp_path):
    config = {"train": {"lr": 1e-3, "save_every": 1}, "method": {"name": "LCM"}}
    run(tmp_path, Diffusion(), described=config, train_steps=2).go()
    run(tmp_path, Diffusion(), described={**config, "train": {"lr": 1e-3, "save_every": 5}}, train_steps=2).go()
    with pytest.raises(ValueError, match=r"other settings \(train.lr: 0.001 there, 0.002 now\); give the same ones to go on, or another"):
        run(tmp_path, Diffusion(), described={**config, "train": {"lr": 2e-3}}, train_steps=2).go()
    assert yaml.safe_load((tmp_path / "run.yaml").read_text()) == config


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_step(tmp_path, what):
    made = run(
        tmp_path, Diffusion(), data=Spoilt() if what == "loss" else Pictures(), described={"train": {}}, train_steps=20, save_every=1
    )
    message = r"the student's loss is nan at step (\d+), on examples \[.*\b7\b.*\]; nothing of this step was kept"
    if what == "gradient":
        message = r"the student's gradient is inf at step (\d+)"
        weight = made.training.nets.modules["student"].conv_in.weight
        weight.register_hook(lambda gradient: gradient * (float("inf") if made.training.step == 2 else 1))
    with pytest.raises(FloatingPointError, match=message) as stopped:
        made.go()
    newest = checkpoint.newest(tmp_path / "checkpoints")
    step = int(str(stopped.value).split("at step ")[1].split(",")[0].split(":")[0])
    if newest is None:
        assert step == 1
        return
    assert newest.name == checkpoint.name_of(step - 1)
    tensors, _ = checkpoint.load(newest)
    assert all(value.isfinite().all() for value in tensors.values())
    assert all(torch.equal(value, tensors[name]) for name, value in weights_of(made.training).items()), "nothing of the step was kept"


def test_no_role_moves_at_a_step_where_one_is_not_finite():
    made = training(Both())
    before = weights_of(made)
    made.nets.modules["other"].conv_in.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="the other's gradient is nan at step 1"):
        list(made.steps())
    assert all(torch.equal(value, before[name]) for name, value in weights_of(made).items())


# signals


def test_a_killed_child_leaves_progress_bars_free():
    """Children share the lock of tqdm's bars: one that was killed while it drew would stop every later bar of this process."""
    reader, writer = os.pipe()
    shared = tqdm.get_lock().locks  # made here, before the child

    def drawing():
        with tqdm.get_lock():
            os.write(writer, b".")
            time.sleep(60)

    process = forked(drawing)
    os.read(reader, 1)
    os.kill(process, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL
    for lock in shared:
        assert lock.acquire(timeout=1)
        lock.release()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_saves_says_so_and_goes_on(tmp_path, number):
    pipeline().save_pretrained(tmp_path / "model")
    shared = ["--teacher", tmp_path / "model", "--num-generated", 8, "--generation-steps", 2, "--cache", tmp_path / "cache"]
    words = ["distill", "progressive", *shared, "--start", 8, "--end", 4, "--train-steps", 400, "--batch-size", 4, "--device", "cpu"]
    folder = tmp_path / "run"

    def command():
        sys.stderr = (tmp_path / "said").open("w")
        app([*map(str, words), "--output", str(folder)], prog_name="diffx")

    def steps() -> list[int]:
        lines = (folder / "log.jsonl").read_text().split("\n")[:-1] if (folder / "log.jsonl").exists() else []
        return [json.loads(line)["step"] for line in lines]

    def until(reached: int) -> int:
        process = forked(command)
        while not steps() or steps()[-1] < reached:
            assert os.waitpid(process, os.WNOHANG) == (0, 0), (tmp_path / "said").read_text()
            time.sleep(0.02)
        return process

    process = until(3)
    os.kill(process, number)
    assert exit_code(process) == 128 + number
    step = checkpoint.load(checkpoint.newest(folder / "checkpoints"))[1]["step"]
    said = f"diffx: stopped after step {step} of 400, which is saved; the same call goes on from there"
    assert (tmp_path / "said").read_text().strip().splitlines()[-1] == said
    assert steps() == list(range(1, step + 1))
    process = until(step + 2)
    os.kill(process, signal.SIGKILL)
    exit_code(process)
    assert steps()[: step + 2] == list(range(1, step + 3))


def test_a_command_that_was_terminated_ends_in_the_same_bits_when_given_again(tmp_path):
    pipeline().save_pretrained(tmp_path / "model")
    words = ["distill", "progressive", "--teacher", tmp_path / "model", "--cache", tmp_path / "cache", "--num-generated", 8]
    words += ["--generation-steps", 2, "--start", 8, "--end", 4, "--train-steps", 40, "--batch-size", 4, "--device", "cpu", "--output"]
    folders = tmp_path / "whole", tmp_path / "stopped"
    whole, stopped = ([*map(str, words), str(folder)] for folder in folders)
    log = folders[1] / "log.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "diffx", *stopped], stderr=subprocess.PIPE, text=True)
    while not log.exists() or log.read_text().count("\n") < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 143 and "of 40, which is saved; the same call goes on from there" in said.splitlines()[-1], said
    assert checkpoint.load(checkpoint.newest(folders[1] / "checkpoints"))[1]["step"] < 40
    for command in (stopped, whole):
        assert CliRunner().invoke(app, command).exit_code == 0
    (one, numbers), (two, others) = (checkpoint.load(checkpoint.newest(folder / "checkpoints")) for folder in folders)
    assert numbers == others and one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    made = [(folder / "model" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in folders]
    assert made[0] == made[1]


def test_a_second_interrupt_does_not_wait(tmp_path):
    made = run(tmp_path, Diffusion(), train_steps=4)
    steps = made.training.steps

    def interrupted(times):
        for now in steps():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
            yield now

    made.training.steps = lambda: interrupted(2)
    with pytest.raises(KeyboardInterrupt) as stopped:
        made.go()
    assert not isinstance(stopped.value, Stopped)
    made.training.steps = lambda: interrupted(1)
    with pytest.raises(Stopped, match="stopped after step 2 of 4, which is saved"):
        made.go()
