"""Train the embedded model's text encoder and UNet on cached latents, by time budget, resumable; write a stock pipeline.

    python embedded/train_unet.py --vae runs/vae/vae --minutes 90 --state runs/unet

`--state` holds optimizer and EMA; without them training goes on from a pipeline folder alone (`--resume FOLDER`), with a
fresh optimizer. `<state>/pipeline` is a complete `StableDiffusionPipeline` folder, rewritten at every save.
The budget is wall-clock time, so a second run is alike, not equal.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from train_vae import to_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffx import glyphs

BATCH, LEARNING_RATE, WARMUP = 64, 1e-3, 300
EMA_DECAY = 0.9993
CONDITION_DROPOUT = 0.1
RENDERINGS_PER_GLYPH = 20
MAX_TOKENS = 20
WIDTH = 128  # of the text encoder
SEED = 0


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary was learned from ``captions``: frequent words are one token."""
    blank = CLIPTokenizer()
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    learner.normalizer, learner.pre_tokenizer = blank._tokenizer.normalizer, blank._tokenizer.pre_tokenizer
    learner.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=2048,
            min_frequency=1,
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learned = json.loads(learner.to_str())["model"]
    vocab, merges = learned["vocab"], [tuple(m) for m in learned["merges"]]
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):  # any text has tokens, at worst one per byte
        vocab.setdefault(byte + "</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def make_pipeline(vae: AutoencoderKL, captions: list[str]) -> StableDiffusionPipeline:
    tokenizer = make_tokenizer(captions)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=glyphs.SIZE // 4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=32, norm_num_groups=16,
    )  # fmt: skip
    # 1024 halves exactly; without the rescale white backgrounds leak at alpha_T = 0.07.
    scheduler = DDIMScheduler(
        num_train_timesteps=1024, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    return assemble(vae, text_encoder, tokenizer, unet, scheduler)


def assemble(vae, text_encoder, tokenizer, unet, scheduler) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def cached_latents(vae: AutoencoderKL, renderings, file: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and standard deviation of every rendering, each (N, 4, 8, 8), encoded once and kept in ``file``."""
    if not file.exists():
        means, stds = [], []
        for i in range(0, len(renderings), 256):
            images = np.stack([r.image() for r in renderings[i : i + 256]])
            posterior = vae.encode(to_tensor(images)).latent_dist
            means.append(posterior.mean), stds.append(posterior.std)
        torch.save((torch.cat(means), torch.cat(stds)), file)
    return torch.load(file, weights_only=True)


def tokenize(tokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


def main(vae_folder: Path, minutes: float, state: Path, resume: Path | None) -> None:
    torch.manual_seed(SEED)
    state.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    renderings = glyphs.training_renderings(RENDERINGS_PER_GLYPH, SEED)
    captions = [r.caption() for r in renderings]
    pipe = StableDiffusionPipeline.from_pretrained(resume) if resume else make_pipeline(vae, sorted(set(captions)))
    mean, std = cached_latents(vae, renderings, state / "latents.pt")
    tokens, empty = tokenize(pipe.tokenizer, captions), tokenize(pipe.tokenizer, [""])
    unet, text_encoder = pipe.unet.to(memory_format=torch.channels_last).train(), pipe.text_encoder.train()
    trained = torch.nn.ModuleList([unet, text_encoder])
    ema = copy.deepcopy(trained)
    optimizer = torch.optim.AdamW(trained.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    latest, step = state / "state.pt", 0
    if latest.exists():
        saved = torch.load(latest, weights_only=True)
        trained.load_state_dict(saved["trained"]), ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]

    def save() -> None:
        part = latest.with_suffix(".part")
        torch.save({"trained": trained.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, part)
        part.replace(latest)
        export(assemble(vae, copy.deepcopy(ema[1]), pipe.tokenizer, copy.deepcopy(ema[0]), pipe.scheduler), state / "pipeline")

    alphas_cumprod = pipe.scheduler.alphas_cumprod.clamp(min=0)
    start, log, total, first_step = time.monotonic(), (state / "log.jsonl").open("a"), 0.0, step
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        rng = torch.Generator().manual_seed(SEED + step)
        pick = torch.randint(0, len(mean), (BATCH,), generator=rng)
        x0 = mean[pick] + std[pick] * torch.randn(mean[pick].shape, generator=rng)
        ids = torch.where(torch.rand(BATCH, 1, generator=rng) < CONDITION_DROPOUT, empty, tokens[pick])
        t = torch.randint(0, len(alphas_cumprod), (BATCH,), generator=rng)
        eps = torch.randn(x0.shape, generator=rng)
        alpha, sigma = alphas_cumprod[t].sqrt()[:, None, None, None], (1 - alphas_cumprod[t]).sqrt()[:, None, None, None]
        x, v = alpha * x0 + sigma * eps, alpha * eps - sigma * x0
        loss = F.mse_loss(unet(x.contiguous(memory_format=torch.channels_last), t, text_encoder(ids)[0]).sample, v)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step - first_step + 1) / WARMUP) * max(0.01, 1 - done)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        step, total = step + 1, total + loss.item()
        with torch.no_grad():
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(ema.parameters()), list(trained.parameters()), 1 - decay)
        if step % 200 == 0:
            log.write(json.dumps({"step": step, "minutes": minutes * done, "loss": total / 200}) + "\n")
            log.flush()
            total = 0.0
        if step % 1000 == 0:
            save()
    save()
    print(f"{step} steps; pipeline in {state / 'pipeline'}")


def export(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """UNet and VAE in half precision; the text encoder stays float32, since transformers would keep float16 at loading."""
    pipe.unet.half().eval(), pipe.text_encoder.eval()
    pipe.vae = copy.deepcopy(pipe.vae).half()
    pipe.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="wall-clock budget; the learning rate falls to zero over it")
    parser.add_argument("--state", type=Path, required=True, help="folder for the training state, outside git")
    parser.add_argument("--resume", type=Path, help="a pipeline folder to go on from")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    main(args.vae, args.minutes, args.state, args.resume)
