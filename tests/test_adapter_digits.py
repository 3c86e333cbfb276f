"""Adapters are followed on real pictures, 8x8 digits: measured on held-out ones, likeness to what was shown less that to what others were.

The base is the committed network that is told which digit to draw; here it is told nothing.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import diffx
from diffx.conditioning.hints.edges import Canny
from diffx.conditioning.image_encoders import ImageEncoder
from diffx.objectives import Diffusion
from diffx.testing.parts import weights_from
from diffx.training.config import TrainConfig
from diffx.training.loop import Training
from diffx.training.networks import Networks

ROOT = Path(__file__).parent.parent
NUM_TRAINED, NUM_HELD = 1500, 64  # the last digits are by other writers


@pytest.fixture(scope="module")
def digits():
    sys.path.insert(0, str(ROOT))
    yield importlib.import_module("benchmarks.digits")
    sys.path.remove(str(ROOT))


def pictures(x) -> list[Image.Image]:
    """Of digits (N, 1, 8, 8) in [-1, 1]."""
    levels = ((x[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    return [Image.fromarray(each).convert("RGB") for each in levels]


class Shown:
    """Training digits, and what an adapter is shown of each; the network is told nothing."""

    group_sizes = (NUM_TRAINED,)

    def __init__(self, digits, family):
        self.x0 = digits.digits()[0][:NUM_TRAINED]
        ((self.name, self.shown),) = family.encode_shown([family.shown(each, None) for each in pictures(self.x0)]).items()

    def read(self, indices):
        return self.x0[indices], {"encoder_hidden_states": torch.zeros(len(indices), 1, 16), self.name: self.shown[indices]}


def trained(digits, adapter, pipe, **options: Any) -> Training:
    family = adapter.wrap(digits.ToldDigits(pipe))
    nets = Networks(family, Diffusion(condition_dropout=0.0, ema_decay=0.98), None, size=(8, 8))
    made = Training(nets, Shown(digits, family), TrainConfig(batch_size=32, lr_schedule="linear", **options), Accelerator(cpu=True))
    list(made.steps())
    return made


@torch.no_grad()
def drawn(digits, made: Training, shown) -> list[Image.Image]:
    """A sample for each, by the loop of pipelines: theirs need a VAE beside a ControlNet."""
    family, network, scheduler = made.nets.family, made.nets.modules["target"], digits.vp_scheduler()
    condition = {"encoder_hidden_states": torch.zeros(len(shown), 1, 16), **family.encode_shown(shown)}
    scheduler.set_timesteps(20)
    x = torch.randn(len(shown), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        x = scheduler.step(family.forward(network, x, t.expand(len(x)).float(), condition), t, x, return_dict=False)[0]
    return pictures(x)


def test_a_controlnet_follows_edges(digits):
    canny = Canny(sigma=0.5, low=0.4, high=0.8)
    made = trained(digits, diffx.ControlNet(canny), digits.load("told"), train_steps=160, lr=2e-3)
    family = made.nets.family
    shown = [family.shown(each, None) for each in pictures(digits.digits()[0][-NUM_HELD:])]
    found = family.likeness(shown, drawn(digits, made, shown))
    # 0.29 when this was written, and 0.34 after 250 updates; a hint that is not read has 0.
    assert found[:, 0].mean() - found[:, 1:].mean() > 0.2


def test_an_ip_adapter_follows_what_a_reference_shows(digits):
    from sklearn.neural_network import MLPClassifier

    x, labels = digits.digits()
    # Half of the training digits teach the image encoder, the other half the judge: what one misreads the other need not.
    half = NUM_TRAINED // 2
    judge = MLPClassifier((64,), max_iter=300, random_state=0).fit(x[half:NUM_TRAINED].flatten(1).numpy(), labels[half:NUM_TRAINED])
    pipe = digits.load("told")
    pipe.register_modules(image_encoder=taught(x[:half], torch.as_tensor(labels[:half])), feature_extractor=processor())
    made = trained(digits, diffx.IPAdapter("plain", image_dropout=0.0, text_dropout=0.0), pipe, train_steps=200, lr=5e-3)
    held, own = pictures(x[-NUM_HELD:]), labels[-NUM_HELD:]
    seen = judge.predict(np.stack([np.asarray(each.convert("L"), np.float32).ravel() / 127.5 - 1 for each in drawn(digits, made, held)]))
    agreement = np.array([np.mean(seen == np.roll(own, k)) for k in range(5)])
    # 0.72 after 400 updates; chance is 0.1, and so 0 with what others were shown taken off.
    assert agreement[0] - agreement[1:].mean() > 0.3


def processor():
    return CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})


def taught(x, labels):
    """An image encoder whose embeddings tell digits apart."""
    with weights_from(0):
        sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        network = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=32, image_size=8, patch_size=2))
        head = torch.nn.Linear(32, 10)
    pixels = ImageEncoder(network, processor()).pixels(pictures(x))
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], 3e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        pick = torch.randint(0, len(x), (64,), generator=rng)
        loss = torch.nn.functional.cross_entropy(head(network(pixels[pick]).image_embeds), labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()
