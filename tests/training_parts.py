"""A training small enough to be repeated many times, and processes to multiply and stop it."""

import os
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import tqdm.auto
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from diffx.families import family_of
from diffx.objectives import DMD2, Diffusion, Loss, Objective, Progressive
from diffx.objectives.weights import squared
from diffx.training.config import TrainConfig
from diffx.training.loop import Training
from diffx.training.networks import Lora, Networks
from diffx.training.run import Run

LORA = Lora(rank=2, alpha=4, targets=["conv1", "conv2"])  # alpha is not the rank: a loader that mixes them up is seen


@dataclass(frozen=True, kw_only=True)
class Both(Objective):
    """Two roles that are trained at once, each towards something else: what no method does, and the loop allows."""

    trains = ("student", "other")

    def losses(self, nets, batch, now):
        level = nets.times.between(batch.draws.uniform("time"))
        goals = {"student": batch.x0, "other": -batch.x0}
        return {role: Loss(squared(nets.output(role, batch.x0, level, batch.condition) - goal)) for role, goal in goals.items()}

    def inference(self, family):
        return Diffusion().inference(family)


CASES = {
    "diffusion with an average": (Diffusion(ema_decay=0.9), None),
    "diffusion, adapter with an average": (Diffusion(ema_decay=0.9), LORA),
    "progressive": (Progressive(start=8, end=2), None),
    "progressive, adapter": (Progressive(start=8, end=2), LORA),
    "two roles in turns": (DMD2(calls=2, fake_steps=1), None),
    "two roles in turns, adapters": (DMD2(calls=2, fake_steps=1), LORA),
}


class Pictures:
    """40 pictures of random numbers."""

    group_sizes = (40,)

    def __init__(self):
        self.x0 = torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)

    def read(self, indices):
        return self.x0[indices], {}


class Spoilt(Pictures):
    """The same, one of them not a number."""

    def __init__(self, index=7):
        super().__init__()
        self.x0[index] = torch.nan


def pipeline():
    """An unconditional model of 8x8 pictures with 40,000 weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
        )  # fmt: skip
    betas = dict(num_train_timesteps=64, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipe = DDPMPipeline(network, DDIMScheduler(**betas, timestep_spacing="trailing", clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def training(objective: Objective, lora: Lora | None = None, data=None, accelerator=None, **options) -> Training:
    nets = Networks(family_of(pipeline()), objective, lora, size=(8, 8))
    config = TrainConfig(**(dict(train_steps=8, batch_size=8, lr=1e-2) | options))
    return Training(nets, data or Pictures(), config, accelerator or Accelerator(cpu=True, mixed_precision=config.mixed_precision))


def run(folder, objective: Objective, lora: Lora | None = None, metric=None, described=None, **options) -> Run:
    told = {"train": {name: value for name, value in options.items() if name not in ("data", "accelerator")}}
    return Run(training(objective, lora, **options), Path(folder), described or told, metric, progress=False)


def forked(function, *words) -> int:
    """The number of a process that calls ``function`` and exits with what it returns; it starts at once, unlike a new interpreter."""
    if number := os.fork():
        return number
    for bars in (tqdm.std.tqdm, tqdm.auto.tqdm):  # the parent's lock would stay taken if this process were killed while it draws
        bars.set_lock(threading.RLock())
    code = 99  # of an exception
    try:
        code = function(*words) or 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def exit_code(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def weights_of(made: Training) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.state()[0].items() if name.startswith("weights/")}


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two sets of tensors over the norm of the second."""
    difference = sum((a[name].double() - b[name].double()).square().sum() for name in b)
    return float((difference / sum(value.double().square().sum() for value in b.values())).sqrt())


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def processes(count: int, function, *words) -> list[int]:
    """Exit codes of ``count`` processes of one gloo group that all call ``function``."""
    port = free_port()

    def one(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        AcceleratorState._reset_state(reset_partial_state=True)  # the parent was alone
        function(*words)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    return [exit_code(number) for number in [forked(one, rank) for rank in range(count)]]
