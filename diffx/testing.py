"""Tiny real Diffusers pipelines with random weights: the same classes, calls and files as the large ones, in milliseconds.

They are built from configurations alone (no network, no files), always with the same weights for the same ``seed``, in float32.
Images are 16 x 16 pixels, latents 8 x 8 (VAE factor 2). All have real (tiny) text encoders and take prompts.

Example:
    >>> pipe = tiny_flux()
    >>> pipe.scheduler = diffx.UniPC.from_config(pipe.scheduler.config)
    >>> latents = pipe(**call_inputs(pipe), num_inference_steps=6, output_type="latent").images
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

IMAGE_SIZE = 16  # pixels; half of it in latents
WIDTH = 16  # of each text encoder
MAX_TOKENS = 8


def tiny_stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline: epsilon, scaled-linear betas, DDIM.

    For image to image and inpainting: ``StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)``.
    """
    with _weights_from(seed):
        tokenizer = _byte_tokenizer()
        text_encoder, unet, vae = _clip(CLIPTextModel, tokenizer), _unet(cross_attention_dim=WIDTH), _vae(latent_channels=4)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    # Diffusers' annotations know neither its own scheduler classes nor that these components may be absent: hence the dict.
    components: dict[str, Any] = dict(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, image_encoder=None,
    )  # fmt: skip
    return _quiet(StableDiffusionPipeline(**components, requires_safety_checker=False))


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline: two text encoders, epsilon, scaled-linear betas, Euler."""
    with _weights_from(seed):
        tokenizer = _byte_tokenizer()
        one, two = _clip(CLIPTextModel, tokenizer), _clip(CLIPTextModelWithProjection, tokenizer)
        num_size_ids, size_width = 6, 4
        unet = _unet(
            cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=size_width,
            projection_class_embeddings_input_dim=num_size_ids * size_width + WIDTH, use_linear_projection=True,
        )  # fmt: skip
        vae = _vae(latent_channels=4)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    components: dict[str, Any] = dict(
        vae=vae, text_encoder=one, tokenizer=tokenizer, text_encoder_2=two, tokenizer_2=tokenizer, unet=unet, scheduler=scheduler
    )
    return _quiet(StableDiffusionXLPipeline(**components, add_watermarker=False))


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 pipeline: two CLIP encoders and a T5, rectified flow, shift 3."""
    with _weights_from(seed):
        tokenizer = _byte_tokenizer()
        one, two = _clip(CLIPTextModelWithProjection, tokenizer), _clip(CLIPTextModelWithProjection, tokenizer)
        tokenizer_3, three = _t5(width=2 * WIDTH)
        transformer = SD3Transformer2DModel(
            sample_size=IMAGE_SIZE // 2, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=IMAGE_SIZE // 2,
        ).eval()  # fmt: skip
        vae = _vae(latent_channels=4)
    return _quiet(
        StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=one, tokenizer=tokenizer,
            text_encoder_2=two, tokenizer_2=tokenizer, text_encoder_3=three, tokenizer_3=tokenizer_3,
        )
    )  # fmt: skip


def tiny_flux(seed: int = 0) -> FluxPipeline:
    """A Flux pipeline: a CLIP encoder and a T5, rectified flow, dynamic shift."""
    with _weights_from(seed):
        tokenizer = _byte_tokenizer()
        one, (tokenizer_2, two) = _clip(CLIPTextModel, tokenizer), _t5(width=WIDTH)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
        ).eval()  # fmt: skip
        vae = _vae(latent_channels=1)
    return _quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=vae, transformer=transformer,
            text_encoder=one, tokenizer=tokenizer, text_encoder_2=two, tokenizer_2=tokenizer_2,
        )
    )  # fmt: skip


def call_inputs(pipe: DiffusionPipeline, batch_size: int = 1, seed: int = 0) -> dict:
    """Keyword arguments for calling a pipeline above: ``batch_size`` different prompts (others for another seed) and sizes."""
    inputs = {"prompt": [f"no {seed * batch_size + i}" for i in range(batch_size)], "height": IMAGE_SIZE, "width": IMAGE_SIZE}
    # T5 pads to 256 or 512 tokens otherwise, which would take all the time
    return inputs | ({"max_sequence_length": MAX_TOKENS} if "transformer" in pipe.components else {})


def denoise(scheduler, network: Callable, x: Tensor, *, begin: int = 0, edit: Callable | None = None, **step_options) -> Tensor:
    """The end sample of the loop that pipelines write, over ``scheduler.timesteps[begin:]`` (``set_timesteps`` is the caller's).

    Args:
        network: (scaled sample, t) -> model output.
        x: (B, ...) the first sample, in the scheduler's own frame.
        edit: (index of the step just done, sample) -> sample, what a callback or a mask does.
        step_options: passed to ``scheduler.step``: generator, eta, ...
    """
    if begin:
        scheduler.set_begin_index(begin)
    scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)  # flow-matching Euler has none: flow models need none
    for k, t in enumerate(scheduler.timesteps[begin:], begin):
        x = scheduler.step(network(scale(x, t), t), t, x, return_dict=False, **step_options)[0]
        x = x if edit is None else edit(k, x)
    return x


@contextmanager
def _weights_from(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(**more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 2, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4, **more,
    ).eval()  # fmt: skip


def _vae(latent_channels: int) -> AutoencoderKL:
    config: dict[str, Any] = dict(
        sample_size=IMAGE_SIZE, latent_channels=latent_channels, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.0,
    )  # fmt: skip
    return AutoencoderKL(**config).eval()


def _byte_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer without merges: one token per byte, so that every text has tokens."""
    letters = sorted(ByteLevel.alphabet())
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=MAX_TOKENS)


def _clip(cls, tokenizer: CLIPTokenizer):
    special: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS, projection_dim=WIDTH, **special,
    )  # fmt: skip
    return cls(config).eval()


def _t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A T5 tokenizer that knows single letters, and an encoder of that width."""
    words = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    tokenizer = T5Tokenizer(vocab=[(word, -1.0) for word in words], extra_ids=0, model_max_length=MAX_TOKENS)
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_ff=width, d_kv=8, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()
