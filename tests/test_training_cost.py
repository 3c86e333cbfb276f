"""What makes training cheap changes no number, and full size fits: ``diffx/training/summed.py``, ``benchmarks/training_cost.py``."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import nn

from diffx import ControlNet
from diffx.families import family_of
from diffx.objectives import LCM, Diffusion
from diffx.objectives.objective import Batch, Moment
from diffx.testing import IMAGE_SIZE, tiny_sdxl, tiny_stable_diffusion
from diffx.training.config import TrainConfig
from diffx.training.draws import Draws
from diffx.training.loop import Training
from diffx.training.networks import Lora, Networks, use_adapter
from diffx.training.sheet import pictures
from diffx.training.summed import can_be_summed, is_cheaper, summed

ROOT = Path(__file__).resolve().parent.parent
SIZE = (IMAGE_SIZE, IMAGE_SIZE)


# The loss of Diffusers' examples/consistency_distillation/train_lcm_distill_lora_sdxl.py (Apache-2.0, commit 58eb52c), transcribed: its
# main() computes it among everything else, and importing the file needs torchvision. What the script draws is given here.


def script_loss(unet, scheduler, latents, noise, index, w, condition, *, num_ddim_timesteps=50, huber_c=0.001):
    """The script's "huber" loss; ``index`` counts its DDIM times from the clean end, ``w`` is the guidance scale less 1."""
    alphas, sigmas = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    alpha_cumprods = scheduler.alphas_cumprod.numpy()
    topk = scheduler.config.num_train_timesteps // num_ddim_timesteps
    ddim_timesteps = (np.arange(1, num_ddim_timesteps + 1) * topk).round().astype(np.int64) - 1
    previous = torch.from_numpy(np.asarray([alpha_cumprods[0], *alpha_cumprods[ddim_timesteps[:-1]].tolist()]))

    def of(values, t):
        return values.gather(-1, t).reshape(-1, 1, 1, 1)

    def scalings(t, sigma_data=0.5):
        t = 10.0 * t.reshape(-1, 1, 1, 1)
        return sigma_data**2 / (t**2 + sigma_data**2), t / (t**2 + sigma_data**2) ** 0.5

    def call(x, t, embeds, text_embeds):
        added = {"text_embeds": text_embeds, "time_ids": condition["time_ids"]}
        out = unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
        return (x - of(sigmas, t) * out) / of(alphas, t), out  # predicted x0 and noise

    told = condition["encoder_hidden_states"], condition["text_embeds"]
    start = torch.from_numpy(ddim_timesteps)[index]
    timesteps = torch.where(start - topk < 0, torch.zeros_like(start), start - topk)
    noisy = scheduler.add_noise(latents, noise, start)
    c_skip, c_out = scalings(start)
    model_pred = c_skip * noisy + c_out * call(noisy, start, *told)[0]
    unet.disable_adapters()
    with torch.no_grad():
        x0, eps = call(noisy, start, *told)
        uncond_x0, uncond_eps = call(noisy, start, *map(torch.zeros_like, told))
        w = w.reshape(-1, 1, 1, 1)
        x0, eps = x0 + w * (x0 - uncond_x0), eps + w * (eps - uncond_eps)
        alpha_cumprod_prev = of(previous, index)
        x_prev = (alpha_cumprod_prev.sqrt() * x0 + (1.0 - alpha_cumprod_prev).sqrt() * eps).to(unet.dtype)
    unet.enable_adapters()
    with torch.no_grad():
        c_skip, c_out = scalings(timesteps)
        target = c_skip * x_prev + c_out * call(x_prev, timesteps, *told)[0]
    return torch.mean(torch.sqrt((model_pred.float() - target.float()) ** 2 + huber_c**2) - huber_c)


SCRIPT_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
]  # fmt: skip


class Given:
    """Draws that were made elsewhere."""

    def __init__(self, call, guidance, noise):
        self.call, self.guidance, self.noise = call, guidance, noise

    def integers(self, name, low, high):
        return self.call

    def uniform(self, name, low, high):
        return self.guidance

    def normal(self, name, like):
        return self.noise


@torch.no_grad()
def trained_a_little(network):
    """Adapters with random numbers in place of the zeros that they start with."""
    torch.manual_seed(1)
    for name, weight in network.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.05)


def relative(one, two):
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("cheap", [False, True], ids=["PEFT's layers", "summed layers"])
def test_the_loss_and_its_gradient_are_those_of_diffusers_script(cheap):
    pipe = tiny_sdxl()
    reference, family = copy.deepcopy(pipe.unet).requires_grad_(False), family_of(pipe)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    nets = Networks(family, LCM(teacher_steps=50), Lora(rank=4, alpha=6), size=SIZE)
    trained_a_little(nets.modules["student"])
    reference.add_adapter(LoraConfig(r=4, lora_alpha=6, target_modules=SCRIPT_TARGETS))
    theirs = {name: weight for name, weight in reference.named_parameters() if "lora_" in name}
    ours = {name.replace(".student.", ".default."): weight for name, weight in nets.parameters("student").items()}
    assert ours.keys() == theirs.keys()  # the same layers have adapters
    for name, weight in theirs.items():
        weight.data.copy_(ours[name].data)

    index = torch.tensor([0, 1, 17, 30, 49])  # the first arrives, the last begins at pure noise
    rng = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(len(index), *family.sample_shape(SIZE), generator=rng) for _ in range(2))
    w = torch.rand(len(index), generator=rng) * 12 + 3
    condition = family.encode_condition([f"no {i}" for i in index], None, size=SIZE)
    expected = script_loss(reference, scheduler, latents, noise, index, w, condition)
    expected.backward()
    given = Given(49 - index.numpy(), w.double().numpy() + 1, noise)
    with summed([nets.modules["student"]] if cheap else []):
        loss = nets.objective.losses(nets, Batch(latents, condition, given), Moment(0, 0))["student"].per_example.mean()
        loss.backward()
    # Pure noise divides by alpha = 0.07, and the guided difference is multiplied by up to 15: roundings of 6e-8 grow accordingly.
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    gradients = [torch.cat([named[name].grad.flatten() for name in theirs]) for named in (ours, theirs)]
    assert relative(*gradients) < 1e-4  # the distance bends within 0.001 of zero: its slope has roundings 1,000 times as large


# The same of examples/controlnet/train_controlnet.py, of that commit.


def control_script_loss(unet, controlnet, noise_scheduler, latents, noise, timesteps, encoder_hidden_states, controlnet_image):
    noisy_latents = noise_scheduler.add_noise(latents.float(), noise.float(), timesteps)
    down_block_res_samples, mid_block_res_sample = controlnet(
        noisy_latents, timesteps, encoder_hidden_states=encoder_hidden_states, controlnet_cond=controlnet_image, return_dict=False
    )
    model_pred = unet(
        noisy_latents,
        timesteps,
        encoder_hidden_states=encoder_hidden_states,
        down_block_additional_residuals=down_block_res_samples,
        mid_block_additional_residual=mid_block_res_sample,
        return_dict=False,
    )[0]
    return torch.nn.functional.mse_loss(model_pred.float(), noise.float(), reduction="mean")


class GivenTimes(Draws):
    """Draws of that noise and those train times of 1,000."""

    def __init__(self, noise, times):
        super().__init__(0, 0, range(len(noise)))
        self.noise, self.times = noise, times

    def normal(self, name, like):
        return self.noise

    def uniform(self, name, low=0.0, high=1.0):
        return (self.times.double().numpy() + 0.5) / 1000 if name == "time" else super().uniform(name, low, high)


def test_a_controlnets_loss_and_its_gradient_are_those_of_diffusers_script():
    pipe = tiny_stable_diffusion()
    family = ControlNet().wrap(family_of(pipe))
    nets = Networks(family, Diffusion(ema_decay=0, condition_dropout=0), None, size=SIZE)
    network, rng = nets.modules["student"], torch.Generator().manual_seed(0)
    for weight in network.parameters():
        if not weight.any():  # a ControlNet that has learned something
            weight.data = torch.randn(weight.shape, generator=rng) * 0.1
    times = torch.tensor([0, 1, 500, 999])
    latents, noise = (torch.randn(4, *family.sample_shape(SIZE), generator=rng) for _ in range(2))
    hint = torch.randint(0, 256, (4, 3, *SIZE), dtype=torch.uint8, generator=rng)
    told = family.encode_condition([f"no {i}" for i in times], None, size=SIZE)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    script = control_script_loss(pipe.unet, network, scheduler, latents, noise, times, told["encoder_hidden_states"], hint / 255)
    script.backward()
    theirs = torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])
    network.zero_grad()
    batch = Batch(latents, told | {"hint": hint}, GivenTimes(noise, times))
    loss = nets.objective.losses(nets, batch, Moment(0, 0))["student"].per_example.mean()
    loss.backward()
    ours = torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])
    # Float32: alpha and sigma are rounded once here, and are roots of rounded numbers there.
    assert loss.item() == pytest.approx(script.item(), rel=1e-6) and relative(ours, theirs) < 1e-5


# Summed layers


class Layers(nn.Module):
    """A layer of each kind that adapters are put into."""

    def __init__(self):
        super().__init__()
        self.linear, self.plain = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)
        self.conv, self.strided, self.point = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Conv2d(8, 6, 1)


INPUTS = {"linear": (2, 300, 8), "plain": (600, 8), "conv": (2, 8, 16, 16), "strided": (2, 8, 16, 16), "point": (2, 8, 16, 16)}


def with_adapters(network, rank=4):
    from peft import inject_adapter_in_model

    torch.manual_seed(0)
    network.requires_grad_(False)
    for role in ("student", "fake"):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=3, target_modules=list(INPUTS)), network, adapter_name=role)
    trained_a_little(network)
    for name, weight in network.named_parameters():
        weight.requires_grad_("lora_" in name)
    return network


def outcome(layer, x, role):
    """What a layer says, and the gradients of its input and of every adapter."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(weight.grad for weight in layer.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("role", ["student", "fake", None])
@pytest.mark.parametrize("name", INPUTS)
def test_a_summed_layer_says_what_pefts_does(name, role):
    network = with_adapters(Layers())
    use_adapter(network, role)
    layer, x = getattr(network, name), torch.randn(INPUTS[name], generator=torch.Generator().manual_seed(0))
    expected = outcome(layer, x, role)
    with summed([network]):
        assert layer.forward.func.__module__ == "diffx.training.summed"
        found = outcome(layer, x, role)
    assert "forward" not in vars(layer)  # outside it is PEFT's again
    assert len(found) == len(expected) == (4 if role else 2)  # adapters that rest have no gradient
    assert all(relative(one, two) < 2e-6 for one, two in zip(found, expected))  # sums of at most 600 numbers, in another order
    assert role is None or not torch.equal(found[0], expected[0])  # it took the other way


def test_the_cheaper_way_is_taken():
    assert is_cheaper(4096, 320, 320, 64, trained=True) and not is_cheaper(4096, 1280, 1280, 64, trained=True)
    assert is_cheaper(4096, 1280, 1280, 64, trained=False) and not is_cheaper(64, 1280, 1280, 64, trained=False)
    network = with_adapters(Layers())
    use_adapter(network, "student")
    few = torch.randn(2, 8)
    expected = network.linear(few)
    with summed([network]):
        assert torch.equal(network.linear(few), expected)  # of two rows, PEFT's own way


def test_layers_that_cannot_be_summed_stay():
    network = with_adapters(Layers())
    assert can_be_summed(network.conv)
    assert not can_be_summed(copy.deepcopy(network).bfloat16().conv)  # the sum would round a small adapter away
    grouped = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, groups=8)})
    assert not can_be_summed(with_adapters(grouped, rank=8)["conv"])


class Noise:
    """Eight samples of noise, told a caption each."""

    group_sizes = (8,)

    def __init__(self, family):
        self.family = family

    def read(self, indices):
        made = [torch.randn(self.family.sample_shape(SIZE), generator=torch.Generator().manual_seed(i)) for i in indices]
        return torch.stack(made), self.family.encode_condition([f"no {i}" for i in indices], None, size=SIZE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_the_same_either_way(checkpointing):
    """Gradient checkpointing runs layers again in the backward pass, which must go the same way."""
    losses = {}
    for sums in (False, True):
        family = family_of(tiny_sdxl())
        nets = Networks(family, LCM(), Lora(rank=4), size=SIZE)
        config = TrainConfig(train_steps=4, batch_size=4, lr=1e-3, optimizer="sgd", gradient_checkpointing=checkpointing)
        training = Training(nets, Noise(family), config, Accelerator(cpu=True))
        assert training.sums
        training.sums = sums
        losses[sums] = [step.losses["student"] for step in training.steps()]
        assert not any("forward" in vars(layer) for layer in nets.modules["student"].modules())
    assert losses[True] == pytest.approx(losses[False], rel=1e-5) and losses[True] != losses[False]


def test_pictures_made_in_parts_are_the_same():
    call = dict(prompts=["no 0", "no 1"], count=5, seed=3)
    whole, parts = (pictures(tiny_stable_diffusion(), {"num_inference_steps": 2}, **call, at_once=at_once) for at_once in (5, 2))
    assert parts.shape == (5, *SIZE, 3)
    np.testing.assert_allclose(parts, whole, atol=1e-5)  # of 1; a batch of another size rounds otherwise


# Full size


@pytest.mark.slow  # two minutes of CPU, 6 GB
def test_one_update_of_stable_diffusion_at_full_size_fits(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "training_cost.py", "full-size", "one-base", "--output", tmp_path / "cost"]
    subprocess.run(command, check=True)
    found = json.loads((tmp_path / "cost.json").read_text())
    full, one_base = found["full-size"], found["one-base"]
    assert full["parameters"]["base"] == 859_520_964 and full["losses"][0]["student"] > 0
    assert full["whole"]["peak_mib"] < 24_000
    lcm, dmd2 = one_base["lcm"], one_base["dmd2"]
    assert dmd2["parameters"] == {**lcm["parameters"], "fake": lcm["parameters"]["student"]}  # the base is counted once
    adapter_mib = 16 * dmd2["parameters"]["fake"] / 2**20  # weight, gradient, two moments
    assert dmd2["whole"]["peak_mib"] - lcm["whole"]["peak_mib"] < adapter_mib + 100
