"""Several processes, and parts of a batch, train like one process: the same noise and data, the same sums in another order."""

import functools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from diffusers import DiffusionPipeline, LCMScheduler
from safetensors.torch import load_file
from training_parts import CASES, free_port, pipeline, processes, relative, run, training, weights_of

import diffx
from diffx.objectives.objective import Moment
from diffx.testing import IMAGE_SIZE, tiny_stable_diffusion
from diffx.training import checkpoint
from diffx.training.run import Stopped

# float32 sums of 8 terms in another order differ by 1e-7; up to 20 updates and a few layers add up
TOLERANCE = 1e-5
SGD = dict(train_steps=20, lr=1e-2, optimizer="sgd", grad_clip=float("inf"))


def first_gradients(made) -> dict[str, torch.Tensor]:
    made._accumulate(Moment(0, 0))
    named = {f"{role}/{name}": weight for role in made.objective.trains for name, weight in made.nets.parameters(role).items()}
    found = {name: weight.grad.clone() for name, weight in named.items() if weight.grad is not None}
    for optimizer in made.optimizers.values():
        optimizer.zero_grad()
    return found


def train(case, output, options):
    """Train, and leave behind what came out and what every place of every batch was given."""
    accelerator = Accelerator(cpu=True)
    gradients = first_gradients(training(*CASES[case], accelerator=accelerator, **options))
    made = training(*CASES[case], accelerator=accelerator, **options)
    seen = {}
    batch_of = made.batch

    def recorded(step, places):
        batch = batch_of(step, places)
        for place, x0, noise in zip(places, batch.x0, batch.draws.normal("noise", batch.x0)):
            seen[step, place] = x0.numpy().tobytes(), noise.numpy().tobytes()
        return batch

    made.batch = recorded
    losses = [step.losses for step in made.steps()]
    result = dict(weights=weights_of(made), gradients=gradients, seen=seen, losses=losses, processes=accelerator.num_processes)
    torch.save(result, output / f"{accelerator.process_index}.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process comes to, by case."""

    @functools.cache
    def of(case):
        train(case, folder := tmp_path_factory.mktemp("alone"), SGD)
        return torch.load(folder / "0.pt", weights_only=False)

    return of


MOST = "two roles in turns, adapters"
SPLITS = {"2 processes": (2, 1), "2 parts": (1, 2), "2 processes, 2 parts": (2, 2)}


@pytest.mark.parametrize("case, split", [*((case, "2 processes") for case in CASES), (MOST, "2 parts"), (MOST, "2 processes, 2 parts")])
def test_processes_and_parts_train_like_one(tmp_path, alone, case, split):
    one, (count, parts) = alone(case), SPLITS[split]
    assert processes(count, train, case, tmp_path, SGD | dict(gradient_accumulation_steps=parts)) == [0] * count
    several = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(count)]
    assert [each["processes"] for each in several] == [count] * count
    assert {place: given for each in several for place, given in each["seen"].items()} == one["seen"]
    assert len(one["seen"]) == 20 * 8 and sum(len(each["seen"]) for each in several) == 20 * 8
    for each in several:
        assert each["gradients"].keys() == one["gradients"].keys()
        assert relative(each["gradients"], one["gradients"]) <= TOLERANCE
        assert relative(each["weights"], one["weights"]) <= TOLERANCE
        assert each["losses"] == several[0]["losses"]
    start = weights_of(training(*CASES[case], **SGD))
    assert relative(start, one["weights"]) > 100 * TOLERANCE, "so there was something to differ in"


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path):
    def stopped():
        accelerator = Accelerator(cpu=True)
        made = run(tmp_path, *CASES["progressive"], accelerator=accelerator, train_steps=200, save_every=1000)
        steps = made.training.steps

        def told():
            for now in steps():
                if now.step == 3 and accelerator.process_index == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield now

        made.training.steps = told
        with pytest.raises(Stopped, match="stopped after step 3 of 200"):
            made.go()

    assert processes(2, stopped) == [0, 0]
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step-00000003"


def test_weights_in_parts_are_refused_before_any_work(tmp_path, monkeypatch):
    """On CPUs accelerate shards nothing, so that its state says what it would say on GPUs; all else is real."""
    Accelerator(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"configured for FSDP, .* use plain data parallelism"):
        diffx.distill(pipeline(), CASES["progressive"][0], ["one"], output=tmp_path / "run", device="cpu", train_steps=2)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_refused():
    training(*CASES["progressive"], batch_size=8, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="batch_size=8 does not divide into 1 processes x 3 gradient_accumulation_steps"):
        training(*CASES["progressive"], batch_size=8, gradient_accumulation_steps=3)


def shell(*words, code=0):
    """A command in new interpreters, as a user's shell starts it."""
    environ = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False, env=environ)
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.slow  # interpreters that import everything: half a minute
def test_accelerate_launches_the_command(tmp_path):
    """Two processes write one model, which stock Diffusers loads, with the weights of one process."""
    tiny_stable_diffusion().save_pretrained(tmp_path / "tiny")
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    words = ["distill", "lcm", tmp_path / "prompts.txt", "--teacher", tmp_path / "tiny", "--calls", 2, "--teacher-steps", 4]
    words += ["--guidance-range", "2,3", "--guidance-scale", 2.5, "--lora-rank", 2, "--resolution", IMAGE_SIZE, "--num-generated", 8]
    words += ["--generation-steps", 2, "--train-steps", 4, "--batch-size", 4, "--lr", 0.01, "--optimizer", "sgd"]
    words += ["--device", "cpu", "--json"]
    # With its flag --cpu, accelerate starts one process only, unless it is given MPI.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", free_port(), "-m", "diffx"]
    said = {}
    for name, start in (("one", ["-m", "diffx"]), ("two", launch)):
        said[name] = shell(*start, *words, "--cache", tmp_path / f"cache-{name}", "--output", tmp_path / name).stdout
    odd = shell(*launch, *words, "--batch-size", 5, "--cache", tmp_path / "cache-two", "--output", tmp_path / "odd", code=1)
    assert "batch_size=5 does not divide into 2 processes" in odd.stderr  # so there were two
    call = json.loads(said["two"])["call_kwargs"]  # one of the two says it
    assert call == json.loads(said["one"])["call_kwargs"] == {"num_inference_steps": 2, "guidance_scale": 1.0}
    one, two = (load_file(tmp_path / name / "model" / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    assert relative(two, one) <= TOLERANCE
    assert [json.loads(line)["step"] for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "tiny")
    pipe.load_lora_weights(tmp_path / "two" / "model")
    pipe.scheduler = LCMScheduler.from_pretrained(tmp_path / "two" / "model", subfolder="scheduler")
    assert np.isfinite(pipe("one", height=IMAGE_SIZE, width=IMAGE_SIZE, output_type="np", **call).images).all()
