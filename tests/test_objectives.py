"""Training methods on data whose best students are known in closed form, and beside Diffusers' own formulas."""

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import compute_snr
from torch import nn

from diffx.families import family_of
from diffx.families.stable_diffusion import StableDiffusion
from diffx.families.unet2d import UNet2D
from diffx.objectives import DMD2, LCM, PCM, ConsistencyTraining, Diffusion, Guidance, Loss, Objective, Progressive
from diffx.objectives.consistency import boundary
from diffx.objectives.dmd import matching_loss
from diffx.objectives.ect import nearer_sigma, scalings
from diffx.objectives.level import Level, Times, from_output, guided, jump, noised, to_output
from diffx.objectives.objective import Batch, Moment
from diffx.objectives.sampling import deterministic, stochastic
from diffx.oracle import Gaussian
from diffx.testing.pipelines import tiny_stable_diffusion
from diffx.training.config import TrainConfig
from diffx.training.draws import Draws
from diffx.training.loop import Training
from diffx.training.networks import Lora, Networks

DATA = Gaussian(torch.full((1, 1, 1), 0.7), std=0.5)
T = 16  # train times of the networks below
PROCESSES = ("vp", "flow")


def scheduler(process="vp", steps=T, **changes):
    if process == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=steps)
    options = dict(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    return DDIMScheduler(**(options | dict(timestep_spacing="trailing", clip_sample=False) | changes))


class Lines(nn.Module):
    """A network whose output is a line in x at each train time: it can be the exact denoiser of Gaussian data, and its students'."""

    def __init__(self):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.zeros(T + 1)), nn.Parameter(torch.zeros(T + 1))

    def forward(self, x, t, return_dict=False):
        i = t.round().long().expand(len(x))
        return (self.slope[i].view(-1, 1, 1, 1) * x + self.offset[i].view(-1, 1, 1, 1),)

    @torch.no_grad()
    def set(self, t, at_zero, at_one):
        self.slope[t], self.offset[t] = at_one - at_zero, at_zero


class LineFamily(UNet2D):
    num_classes = None


ENDS = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)  # a line is known by what it does to 0 and 1


def exact(process="vp", data=DATA):
    """The family of an exact network of ``data``."""
    network = Lines()
    family = LineFamily(DDPMPipeline(network, scheduler(process)))
    for t in range(1 if process == "flow" else 0, T + (process == "flow")):
        level = Times(family.process).at(np.array([t]))
        out = data.predict(ENDS, level.alpha[0], level.sigma[0], family.process.prediction_type)
        network.set(t, *out.flatten())
    return family


class Drawn:
    """Examples of the Gaussian."""

    def __init__(self, data=DATA):
        self.x0 = data.sample(4096, torch.Generator().manual_seed(0)).float()

    def __len__(self):
        return len(self.x0)

    @property
    def group_sizes(self):
        return [len(self)]

    def read(self, indices):
        return self.x0[indices], {}


def batch(size=32, shape=None, step=0):
    x0 = Drawn().x0[:size] if shape is None else torch.randn((size, *shape), generator=torch.Generator().manual_seed(0))
    return Batch(x0, {}, Draws(0, step, range(size)))


def networks(family, objective, lora=None):
    return Networks(family, objective, lora, size=(8, 8))


def trained(family, objective, data=None, **config):
    nets = networks(family, objective)
    config = dict(train_steps=300, batch_size=16, lr=0.02, lr_schedule="cosine", grad_clip=math.inf) | config
    for _ in Training(nets, data or Drawn(), TrainConfig(**config), Accelerator(cpu=True)).steps():
        pass
    return nets


# the coefficients


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_outputs_are_predictions_and_back(kind):
    angle = np.linspace(0.05, 1.5, 7)
    level = Level(angle, np.cos(angle), np.sin(angle))
    x, out = torch.randn(2, 7, 1, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    found = from_output(out, x, level, kind)
    assert torch.allclose(noised(found.x0, found.eps, level), x, atol=2e-5)  # float32, and 1/alpha of 14 at the noisiest level
    assert torch.allclose(to_output(found.x0, found.eps, level, kind), out, atol=2e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_jump_is_a_ddim_step(kind):
    stock = scheduler(steps=1024, prediction_type=kind)
    times = Times(family_of(DDPMPipeline(tiny_unet(), stock)).process)
    stock.set_timesteps(8)
    grid = times.of(stock, 8)
    x, out = torch.randn(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    for k, t in enumerate(stock.timesteps):
        here, there = grid.at(np.array([k])), grid.at(np.array([k + 1]))
        ours = jump(from_output(out, x, here, kind), there)
        theirs = stock.step(out, t, x).prev_sample
        # epsilon divides by an alpha of 1e-4 at the first time: there both are 1e3 and float32 keeps seven digits
        assert torch.allclose(ours, theirs, atol=1e-6, rtol=1e-6 if kind == "v_prediction" else 1e-4), k


def test_a_jump_is_an_euler_step():
    stock = scheduler("flow", steps=1000)
    times = Times(family_of(DDPMPipeline(tiny_unet(), stock)).process)
    grid = times.of(stock, 8)
    x, out = torch.randn(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    for k, t in enumerate(stock.timesteps):
        ours = jump(from_output(out, x, grid.at(np.array([k])), "flow_prediction"), grid.at(np.array([k + 1])))
        assert torch.allclose(ours, stock.step(out, t, x).prev_sample, atol=1e-6), k


def test_guided_is_diffusers_rule():
    x = torch.randn(4, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    level = Level(np.ones(3), np.full(3, 0.6), np.full(3, 0.8))
    cond, null = (from_output(out, x[0], level, "epsilon") for out in x[1:3])
    scale = np.array([0.0, 1.0, 7.5])
    for part in ("x0", "eps"):
        ours, (c, u) = getattr(guided(cond, null, scale), part), (getattr(cond, part), getattr(null, part))
        assert torch.allclose(ours, u + torch.tensor(scale, dtype=torch.float32).view(-1, 1, 1, 1) * (c - u), atol=1e-5)


def test_signal_to_noise_ratios_and_weights_are_diffusers():
    stock = scheduler(steps=1024)
    t = np.array([1, 10, 500, 1000])
    level = Times(family_of(DDPMPipeline(tiny_unet(), stock)).process).at(t)
    snr = compute_snr(stock, torch.from_numpy(t)).numpy()
    assert np.allclose(level.snr, snr, rtol=1e-3)  # they subtract alphas_cumprod from 1 in float32
    clipped = np.minimum(level.snr, 5)
    # Hang et al. 2023, as Diffusers' training scripts have it
    assert np.allclose(Diffusion(weighting="min_snr").weight(level, "epsilon"), clipped / level.snr)
    assert np.allclose(Diffusion(weighting="min_snr").weight(level, "v_prediction"), clipped / (level.snr + 1))
    assert np.allclose(Diffusion(weighting="min_snr").weight(level, "sample"), clipped)


def test_the_boundary_scaling_is_the_schedulers():
    stock = LCMScheduler(timestep_scaling=10.0)
    t = np.array([0, 1, 19, 999])
    c_skip, c_out = zip(*(stock.get_scalings_for_boundary_condition_discrete(i) for i in t))
    assert np.allclose(boundary(torch.zeros(4, 1), torch.ones(4, 1), t).flatten(), c_skip, atol=1e-6)
    assert np.allclose(boundary(torch.ones(4, 1), torch.zeros(4, 1), t).flatten(), c_out, atol=1e-6)


def test_edm_scalings_are_the_schedulers():
    stock = CMStochasticIterativeScheduler()
    sigma = torch.tensor([0.002, 0.1, 80.0], dtype=torch.float64)
    c_skip, c_out, _ = scalings(sigma.numpy(), 0.002, 0.5)
    theirs = stock.get_scalings_for_boundary_condition(sigma)
    assert np.allclose(c_skip, theirs[0]) and np.allclose(c_out, theirs[1])
    assert c_skip[0] == 1 and c_out[0] == 0


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("calls", [1, 2, 4, 8])
def test_training_grids_are_what_the_exported_scheduler_visits(process, calls):
    family = family_of(DDPMPipeline(tiny_unet(), scheduler(process, steps=1024)))
    times = Times(family.process)
    own, theirs = times.trailing(calls), times.of(deterministic(family, calls).scheduler, calls)
    assert np.allclose(own.t, theirs.t, atol=1e-3) and np.allclose(own.sigma, theirs.sigma, atol=1e-6)
    for original in (calls, 64):
        sampler = stochastic(family, calls, original).scheduler
        sampler.set_timesteps(calls)
        assert np.isin(np.round(sampler.timesteps.numpy(), 3), np.round(times.trailing(original).t, 3)).all()
        assert sampler.timesteps[0] == own.t[0]


def test_stock_pipelines_change_nothing_of_an_exported_scheduler(recwarn):
    family = family_of(tiny_stable_diffusion())
    for inference in (deterministic(family, 4), stochastic(family, 4, 20)):
        before = dict(inference.scheduler.config)
        pipe = StableDiffusionPipeline(**family.pipe.components | {"scheduler": inference.scheduler}, requires_safety_checker=False)
        assert dict(pipe.scheduler.config) == before
    assert not [str(warning.message) for warning in recwarn if "steps_offset" in str(warning.message)]


# fixed points: what the best students of Gaussian data are


def walk(family, steps):
    """(level, edge to edge) of the exact network's deterministic steps: each is a line, given by what becomes of 0 and 1."""
    times, kind = Times(family.process), family.process.prediction_type
    grid = times.trailing(steps)
    moved = []
    for k in range(steps):
        here, there = (Level(*(np.repeat(part[k + j], 2) for part in (grid.t, grid.alpha, grid.sigma))) for j in (0, 1))
        x0 = DATA.x0(ENDS, here.alpha[0], here.sigma[0])
        eps = (ENDS - here.alpha[0] * x0) / here.sigma[0]
        moved.append((here, (there.alpha[0] * x0 + there.sigma[0] * eps).float()))
    return moved, kind


def through(line, x):
    """A line, by its ends, of a point."""
    return line[0] + (line[1] - line[0]) * x


def best_consistency_student(family, steps, phases=1):
    """The network that says, wherever the teacher's steps begin, where their phase ends."""
    student, (moved, kind) = Lines(), walk(family, steps)
    grid, length = Times(family.process).trailing(steps), steps // phases
    for k in reversed(range(steps)):
        level, line = moved[k]
        landed = line if (k + 1) % length == 0 else through(landed, line)  # noqa: F821  # set by the last of each phase
        edge = (k // length + 1) * length
        keep = grid.sigma[edge] / level.sigma[0]
        x0 = (landed - keep * ENDS) / (grid.alpha[edge] - keep * level.alpha[0])
        out = to_output(x0, (ENDS - float(level.alpha[0]) * x0) / float(level.sigma[0]), level, kind)
        student.set(round(level.t[0]), *out.flatten())
    return student


def asked(nets, steps):
    """Slopes and offsets of the student where the method asks it."""
    t = torch.tensor(np.round(nets.times.trailing(steps).t[:-1]), dtype=torch.long)
    network = nets.modules["student"]
    return network.slope[t].detach(), network.offset[t].detach()


@pytest.mark.parametrize("process", PROCESSES)
def test_progressive_goes_where_two_steps_go(process):
    family = exact(process)
    best = best_consistency_student(family, 8, phases=4)  # two steps of the teacher are one phase
    nets = trained(family, Progressive(start=8, end=4))
    for found, wanted in zip(asked(nets, 4), (best.slope, best.offset)):
        t = torch.tensor(np.round(nets.times.trailing(4).t[:-1]), dtype=torch.long)
        assert torch.allclose(found, wanted[t].detach(), atol=0.01)  # 300 steps of Adam; it starts up to 0.1 away


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("phases", [1, 2, 4])
def test_the_best_consistency_student_loses_nothing(process, phases):
    family = exact(process)
    objective = PCM(calls=phases, teacher_steps=8, ema_decay=0.0)
    nets = networks(family, objective)
    before = nets.objective.losses(nets, batch(), Moment(0, 0))["student"].per_example.mean()
    nets.modules["student"].load_state_dict(best_consistency_student(family, 8, phases).state_dict())
    after = nets.objective.losses(nets, batch(), Moment(0, 0))["student"].per_example.mean()
    assert before > 1e-3 and after < 1e-5  # float32


@pytest.mark.parametrize("process", PROCESSES)
def test_phased_consistency_finds_its_fixed_point(process):
    family = exact(process)
    best = best_consistency_student(family, 8, phases=2)
    nets = trained(family, PCM(calls=2, teacher_steps=8, ema_decay=0.0, huber_c=0.1))
    t = torch.tensor(np.round(nets.times.trailing(8).t[:-1]), dtype=torch.long)
    for found, wanted in zip(asked(nets, 8), (best.slope, best.offset)):
        assert torch.allclose(found, wanted[t].detach(), atol=0.03)  # errors add up over the four steps of a phase


def test_lcm_finds_the_end_of_the_whole_path():
    family = exact("flow")
    best = best_consistency_student(family, 4)
    nets = trained(family, LCM(calls=1, teacher_steps=4, ema_decay=0.0, huber_c=0.1))
    t = torch.tensor(np.round(nets.times.trailing(4).t[:-1]), dtype=torch.long)
    for found, wanted in zip(asked(nets, 4), (best.slope, best.offset)):
        assert torch.allclose(found, wanted[t].detach(), atol=0.03)


def test_lcm_at_the_last_step_aims_at_the_teachers_own_step():
    family = exact()
    nets = networks(family, LCM(calls=1, teacher_steps=1, ema_decay=0.0))
    b = batch()
    level, first = nets.times.at(np.full(32, T - 1)), nets.times.at(np.zeros(32))
    x = noised(b.x0, b.draws.normal("noise", b.x0), level)
    found = nets.predict("teacher", x, level, {})
    difference = boundary(found.x0, x, level.t) - jump(found, first)  # the student is the teacher still
    wanted = ((difference**2 + 1e-6).sqrt() - 1e-3).flatten(1).mean(1)
    assert torch.allclose(nets.objective.losses(nets, b, Moment(0, 0))["student"].per_example, wanted, atol=1e-6)


def test_guidance_learns_the_guided_line():
    class Pair(LineFamily):
        """Told nothing, the network is that of other data."""

        guidable = True

        def null_condition(self, *, size):
            return {"told": torch.zeros(1)}

        def forward(self, network, x, t, condition, guidance=None):
            told = condition["told"].view(-1, 1, 1, 1)
            return network(x, t)[0] + (1 - told) * 0.3

    class Told(Drawn):
        def read(self, indices):
            return self.x0[indices], {"told": torch.ones(len(indices))}

    family = Pair(exact().pipe)
    nets = trained(family, Guidance(guidance_scale=3.0), Told(), lr=0.05)
    before, after = (nets.modules[role].offset[:T] for role in ("teacher", "student"))
    # out + (scale - 1) (out - (out + 0.3)): all slopes stay and all offsets fall by 0.6
    assert torch.allclose(after, before - 0.6, atol=0.02)
    assert torch.allclose(nets.modules["student"].slope[:T], nets.modules["teacher"].slope[:T], atol=0.02)


# distribution matching


@pytest.mark.parametrize("process", PROCESSES)
def test_the_gradient_of_dmd_is_the_difference_of_the_denoisers(process):
    family = exact(process)
    nets = networks(family, DMD2(fake_steps=1))
    other = exact(process, Gaussian(torch.full((1, 1, 1), -0.2), std=0.8))
    nets.modules["fake"].load_state_dict(other.base.state_dict())
    b, now = batch(), Moment(1, 0)
    losses = nets.objective.losses(nets, b, now)
    assert losses.keys() == {"student"}
    start = nets.times.trailing(1).at(np.zeros(32, int))
    x0 = nets.predict("student", b.draws.normal("start", b.x0), start, {}).x0.detach()
    level = nets.times.between(b.draws.uniform("time", 0.02, 0.98))
    x = noised(x0, b.draws.normal("noise", b.x0), level)
    fake, real = (nets.predict(role, x, level, {}).x0.detach() for role in ("fake", "teacher"))
    by_x0 = (fake - real) / (x0 - real).abs().clamp(min=1e-4)  # one pixel: its mean is the value itself
    # x0 = alpha x - sigma v, or x - sigma u: the offset of v or u at the first time acts by -sigma
    wanted = (by_x0.flatten() * -torch.tensor(start.sigma, dtype=torch.float32)).mean()
    losses["student"].per_example.mean().backward()
    at = T if process == "flow" else T - 1
    assert nets.modules["student"].offset.grad[at] == pytest.approx(float(wanted), rel=1e-4)
    assert nets.modules["fake"].offset.grad is None


def test_dmd_rests_where_the_fake_network_agrees_with_the_teacher():
    nets = networks(exact(), DMD2(fake_steps=1))
    loss = nets.objective.losses(nets, batch(), Moment(1, 0))["student"].per_example
    assert loss.abs().max() == 0


def test_the_fake_network_learns_the_students_samples():
    family = exact(data=Gaussian(torch.full((1, 1, 1), -0.2), std=0.8))
    nets = networks(family, DMD2(fake_steps=3))
    # A one-call student x0 = alpha x - sigma v whose v is a line: its samples are Gaussian too.
    level = nets.times.trailing(1).at(np.zeros(1, int))
    alpha, sigma = float(level.alpha[0]), float(level.sigma[0])
    at_zero, at_one = (0.5 - 0 * alpha), (0.5 + 0.3)
    nets.modules["student"].set(T - 1, -at_zero / sigma, (alpha - at_one) / sigma)
    b = batch(4096)
    best = exact(data=Gaussian(torch.full((1, 1, 1), 0.5), std=0.3)).base
    losses = {}
    for name, network in (("start", family.base), ("best", best)):
        nets.modules["fake"].load_state_dict(network.state_dict())
        losses[name] = float(nets.objective.losses(nets, b, Moment(0, 0))["fake"].per_example.mean().detach())
    assert losses["best"] < losses["start"]
    nets.modules["fake"].zero_grad()
    nets.objective.losses(nets, b, Moment(0, 0))["fake"].per_example.mean().backward()
    assert nets.modules["fake"].offset.grad[:T].norm() < 0.02  # zero in expectation; 4,096 samples of unit variance


def test_dmd_takes_turns_and_rolls_out_its_own_samples():
    nets = networks(exact(), DMD2(calls=4, fake_steps=3))
    roles = [next(iter(nets.objective.losses(nets, batch(step=step), Moment(step, 0)))) for step in range(8)]
    assert roles == ["fake", "fake", "fake", "student"] * 2
    x, level = nets.objective.rollout(nets, batch(4096))
    assert set(level.t) == {15, 11, 7, 3}
    for t in (11, 3):  # the exact network of N(0.7, 0.25) makes x0 of mean 0.7, which is then noised to the level
        mean = x[level.t == t].mean()
        assert mean == pytest.approx(0.7 * level.alpha[level.t == t][0], abs=0.08)


def test_the_matching_loss_does_not_blow_up_where_the_teacher_agrees():
    x0 = torch.zeros(2, 1, 2, 2, requires_grad=True)
    matching_loss(x0, torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)).sum().backward()
    assert torch.isfinite(x0.grad).all()


# consistency training


def tiny_unet(channels=1):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip


def edm_family():
    return family_of(ConsistencyModelPipeline(tiny_unet(3), CMStochasticIterativeScheduler(clip_denoised=False)))


def test_consistency_training_asks_the_network_as_the_pipeline_does():
    nets = networks(edm_family(), ConsistencyTraining(calls=1))
    stock = nets.objective.inference(nets.family).scheduler
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = nets.objective.end(nets, stock.config, Batch(0 * noise, {}, Draws(0, 0, range(2))), noise, np.full(2, 80.0))
    made = nets.family.pipeline(nets.modules["student"], stock)
    made.set_progress_bar_config(disable=True)
    theirs = made(batch_size=2, latents=noise, output_type="pt", num_inference_steps=1).images * 2 - 1  # the pipeline scales by 80
    assert torch.allclose(ours.clamp(-1, 1), theirs, atol=1e-5)


def test_two_noise_levels_draw_together():
    sigma = np.array([0.01, 1.0, 80.0])
    assert (nearer_sigma(sigma, 0) == 0).all()
    ratios = np.stack([nearer_sigma(sigma, k) / sigma for k in range(10)])
    assert (np.diff(ratios, axis=0) >= 0).all() and (ratios[-1] > 0.98).all() and (ratios < 1).all()
    n = 1 + 8 / (1 + np.exp(sigma))
    assert np.allclose(1 - ratios[5], n / 32)


# configuration


def told_family(seed=0):
    """A tiny text-conditional network that can be told a guidance scale."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, time_cond_proj_dim=8,
    )  # fmt: skip

    class Told(StableDiffusion):
        def with_guidance_embedding(self, network):
            return network  # it has one

        def null_condition(self, *, size):
            return {"encoder_hidden_states": torch.zeros(1, 1, 8)}

    parts = dict(vae=None, text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None)
    return Told(StableDiffusionPipeline(unet=unet, scheduler=scheduler(steps=1024, steps_offset=1), requires_safety_checker=False, **parts))


def told_batch(size=8, step=0):
    generator = torch.Generator().manual_seed(0)
    x0, told = torch.randn(size, 1, 8, 8, generator=generator), torch.randn(size, 1, 8, generator=generator)
    return Batch(x0, {"encoder_hidden_states": told}, Draws(0, step, range(size)))


# every field, with another value than the base's
FIELDS = {
    Diffusion(): dict(
        ema_decay=0.9, distance="l1", times="gaussian", weighting="min_snr", offset_noise=0.1, condition_dropout=1.0,
        huber_c=(dict(distance="huber"), 0.5), times_mean=(dict(times="gaussian"), 0.2), times_std=(dict(times="gaussian"), 0.05),
    ),
    Guidance(): dict(ema_decay=0.9, guidance_scale=5.0, guidance_range=(1.0, 5.0), calls=8),
    Progressive(start=8, end=4): dict(ema_decay=0.9, start=16, end=2, guidance_scale=5.0),
    LCM(): dict(
        ema_decay=0.5, calls=2, teacher_steps=32, guidance_range=(1.0, 9.0), guidance_scale=5.0, embed_guidance=False, huber_c=0.1,
    ),
    PCM(): dict(
        ema_decay=0.5, calls=2, teacher_steps=32, guidance_range=(1.0, 9.0), guidance_scale=5.0, embed_guidance=False, huber_c=0.1,
    ),
    DMD2(): dict(ema_decay=0.9, calls=4, fake_steps=1, guidance_scale=5.0, times=(0.5, 0.6)),
    ConsistencyTraining(): dict(ema_decay=0.9, calls=4, halve_every=1, log_sigma_mean=0.0, log_sigma_std=0.1, huber_c=0.1),
}  # fmt: skip
CHANGES = [
    (replace(base, **value[0]), {name: value[1]}) if isinstance(value, tuple) and isinstance(value[0], dict) else (base, {name: value})
    for base, changes in FIELDS.items()
    for name, value in changes.items()
]


def test_every_field_is_listed():
    for base, changes in FIELDS.items():
        assert {field.name for field in fields(base)} == set(changes), type(base).__name__


def outcome(objective):
    """All that a method decides: who is trained, what is lost at two steps, how the student is sampled."""
    edm = isinstance(objective, ConsistencyTraining)
    nets = networks(edm_family() if edm else told_family(), objective)
    for role, network in nets.modules.items():  # students that have moved a little
        if role != "teacher":
            with torch.no_grad():
                for weight in network.parameters():
                    weight.add_(0.01)
    losses = []
    for step in (1, 5):
        b = batch(8, (3, 8, 8), step) if edm else told_batch(step=step)
        losses += [(role, loss.per_example.mean().item()) for role, loss in nets.objective.losses(nets, b, Moment(step, 0)).items()]
    made = nets.objective.inference(nets.family)
    return losses, made.call_kwargs, dict(made.scheduler.config), nets.objective.ema_decay, nets.objective.stages


@pytest.mark.parametrize(("base", "change"), CHANGES, ids=[f"{type(base).__name__}-{next(iter(change))}" for base, change in CHANGES])
def test_every_field_changes_something(base, change):
    assert outcome(replace(base, **change)) != outcome(base)


REFUSED = [
    (lambda: LCM(calls=0), LCM(calls=1), "calls=0 must be at least 1"),
    (lambda: LCM(guidance_range=(5.0, 3.0)), LCM(guidance_range=(3.0, 9.0)), "must rise"),
    (lambda: LCM(guidance_scale=20.0), LCM(guidance_scale=15.0), "guidance_scale=20.0 .* must lie in guidance_range"),
    (lambda: LCM(huber_c=0.0), LCM(huber_c=1e-5), "huber_c=0.0 must be positive"),
    (lambda: LCM(ema_decay=1.0), LCM(ema_decay=0.99), "ema_decay=1.0 must lie between 0"),
    (
        lambda: PCM(calls=4, teacher_steps=10),
        PCM(calls=4, teacher_steps=12),
        "teacher_steps=10 must be a positive multiple of the 4 phases",
    ),
    (lambda: DMD2(fake_steps=0), DMD2(fake_steps=1), "fake_steps=0 must be at least 1"),
    (lambda: DMD2(times=(0.5, 0.5)), DMD2(times=(0.5, 0.6)), "must be a rising pair"),
    (lambda: Guidance(guidance_scale=1.0), Guidance(guidance_scale=2.0), "nothing to learn"),
    (lambda: Guidance(guidance_scale=9.0, guidance_range=(1, 8)), Guidance(guidance_scale=8.0, guidance_range=(1, 8)), "must lie in"),
    (lambda: ConsistencyTraining(halve_every=0), ConsistencyTraining(halve_every=1), "halve_every=0 must be at least 1"),
    (lambda: ConsistencyTraining(huber_c=0.0), ConsistencyTraining(huber_c=1.0), "huber_c=0.0 must be positive"),
    (lambda: Progressive(start=8, end=3), Progressive(start=12, end=3), "start=8, end=3: start must be end times 2, 4, 8"),
    (lambda: Diffusion(distance="l2"), Diffusion(distance="mse"), "distance='l2' is not one of mse, l1, huber"),
]


@pytest.mark.parametrize(("wrong", "right", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_wrong_numbers_are_refused(wrong, right, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_what_a_model_cannot_be_trained_with_is_refused():
    unet, zero = tiny_unet(), dict(rescale_betas_zero_snr=True, steps=1000)
    epsilon, v = (family_of(DDPMPipeline(unet, scheduler(prediction_type=kind, **zero))) for kind in ("epsilon", "v_prediction"))
    for objective in (LCM(), PCM(), DMD2(), Progressive(start=8, end=4), Diffusion()):
        with pytest.raises(ValueError, match='prediction_type="epsilon" says nothing about the data at zero terminal SNR'):
            objective.settled(epsilon, lora=False)
        objective.settled(v, lora=False)
    with pytest.raises(ValueError, match=r"does not step exactly in 3 calls at 1000 train times; it does in \[1, 2, 4, 5, 8"):
        PCM(calls=3).settled(v, lora=False)
    with pytest.raises(ValueError, match="does not step exactly in 64 calls"):
        LCM(teacher_steps=64).settled(v, lora=False)
    with pytest.raises(ValueError, match="calls=64 of the student are more than the teacher_steps=50"):
        LCM(calls=64).settled(v, lora=False)
    LCM(calls=50).settled(v, lora=False)
    with pytest.raises(ValueError, match="cannot be guided"):
        Guidance().settled(v, lora=False)
    with pytest.raises(ValueError, match="cannot be told a guidance scale"):
        LCM(embed_guidance=True).settled(v, lora=False)
    with pytest.raises(ValueError, match="adapters cannot hold the new layer"):
        LCM(embed_guidance=True).settled(told_family(), lora=True)
    with pytest.raises(ValueError, match=r"ConsistencyTraining trains networks of ConsistencyModelPipeline.*has DDIMScheduler"):
        ConsistencyTraining().settled(v, lora=False)
    with pytest.raises(ValueError, match="preconditioned as EDM's, which ConsistencyTraining trains"):
        LCM().settled(edm_family(), lora=False)


@pytest.mark.parametrize(("steps", "calls", "lcm", "pcm"), [(1000, 4, 50, 40), (1000, 2, 50, 50), (1024, 4, 64, 64)])
def test_open_choices_are_settled_by_the_model(steps, calls, lcm, pcm):
    family = family_of(DDPMPipeline(tiny_unet(), scheduler(steps=steps)))
    whole = LCM(calls=calls).settled(family, lora=False)
    assert (whole.teacher_steps, whole.ema_decay, whole.embed_guidance) == (lcm, 0.95, False)
    assert LCM(calls=calls).settled(family, lora=True).ema_decay == 0
    assert PCM(calls=calls).settled(family, lora=False).teacher_steps == pcm
    told = told_family()
    assert LCM().settled(told, lora=False).embed_guidance and not LCM().settled(told, lora=True).embed_guidance
    assert whole.settled(family, lora=False) == whole


def test_under_adapters_the_fake_network_and_the_student_share_one_base():
    family = told_family()
    nets = networks(family, DMD2(fake_steps=1), Lora(rank=2))
    assert len(set(map(id, nets.modules.values()))) == 1
    b = told_batch()
    for step, role in ((0, "fake"), (1, "student")):
        losses = nets.objective.losses(nets, b, Moment(step, 0))
        nets.act_as(role)
        losses[role].per_example.mean().backward()
        grads = {name for name, weight in family.base.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0}
        assert all(f".{role}." in name for name in grads), (role, grads)
        assert role == "student" or grads  # at the start fake and teacher agree, so the student rests
        family.base.zero_grad()


# the seam: methods that are not here need nothing but a file of their own


@dataclass(frozen=True, kw_only=True)
class Reflow(Objective):
    """Straight lines between noise and where the teacher takes it (Liu et al. 2022)."""

    def losses(self, nets, batch, now):
        grid, x = nets.times.trailing(8), batch.draws.normal("noise", batch.x0)
        noise = x
        for k in range(8):
            here, there = (grid.at(np.full(len(batch), k + j)) for j in (0, 1))
            x = jump(nets.guided("teacher", x, here, batch.condition, np.ones(len(batch))), there)
        level = nets.times.at(np.ceil(batch.draws.uniform("time", 0, T)).clip(1))
        out = nets.output("student", noised(x, noise, level), level, batch.condition)
        return {"student": Loss((out - to_output(x, noise, level, "flow_prediction")).square().flatten(1).mean(1))}

    def inference(self, family):
        return deterministic(family, 1)


@dataclass(frozen=True, kw_only=True)
class Adversarial(Objective):
    """A student of one call against a judge that is no network of the family."""

    trains: ClassVar = ("student", "judge")

    def modules(self, family):
        torch.manual_seed(0)
        return {"judge": nn.Sequential(nn.Flatten(), nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))}

    def losses(self, nets, batch, now):
        level, judge = nets.times.trailing(1).at(np.zeros(len(batch), int)), nets.wrapped["judge"]
        x0 = nets.predict("student", batch.draws.normal("start", batch.x0), level, batch.condition).x0
        softplus = nn.functional.softplus
        if now.step % 2:
            return {"student": Loss(softplus(-judge(x0)).flatten())}
        return {"judge": Loss((softplus(-judge(batch.x0)) + softplus(judge(x0.detach()))).flatten())}

    def inference(self, family):
        return deterministic(family, 1)


def test_reflow_needs_only_its_own_file():
    nets = trained(exact("flow"), Reflow(), train_steps=200)
    level = nets.times.trailing(1).at(np.zeros(512, int))
    x0 = nets.predict("student", torch.randn(512, 1, 1, 1, generator=torch.Generator().manual_seed(0)), level, {}).x0.detach()
    assert x0.mean() == pytest.approx(0.7, abs=0.08) and x0.std() == pytest.approx(0.5, abs=0.08)  # one call; the teacher's has std 0


def test_an_adversarial_method_needs_only_its_own_file():
    nets = trained(exact(), Adversarial(), train_steps=20)
    moved = {role: any(weight.abs().sum() > 0 for weight in nets.parameters(role).values()) for role in ("student", "judge")}
    assert moved == {"student": True, "judge": True}
    assert {key.split("/")[0] for key in nets.state()} == {"student", "judge"}
