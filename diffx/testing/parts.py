"""Tiny networks, text encoders and tokenizers that several pipelines share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

IMAGE_SIZE = 16  # pixels; half of it in latents
WIDTH = 16  # of each text encoder
MAX_TOKENS = 8


@contextmanager
def weights_from(seed: int) -> Iterator[None]:
    """Random weights made inside depend on ``seed`` alone, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def quiet(pipe):
    """The pipeline without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet(**more) -> UNet2DConditionModel:
    """The network of Stable Diffusion, two levels deep."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4, **more,
    ).eval()  # fmt: skip


def vae(latent_channels: int, **more: Any) -> AutoencoderKL:
    """A VAE that halves the picture's size."""
    config: dict[str, Any] = dict(
        sample_size=IMAGE_SIZE, latent_channels=latent_channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.0, **more,
    )  # fmt: skip
    return AutoencoderKL(**config).eval()


def byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per byte, so that every text has tokens."""
    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=MAX_TOKENS)


def clip(cls, tokenizer: CLIPTokenizer):
    """A CLIP text encoder of that class."""
    special: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH, **special,
    )  # fmt: skip
    return cls(config).eval()


def t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A T5 tokenizer that knows single letters, and an encoder of that width."""
    words = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0, model_max_length=MAX_TOKENS)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=width, d_kv=8, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()
