"""The tiny pipelines: one function each, which gives the pipeline of a family with the scheduler its checkpoints come with."""

from typing import Any

from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from . import parts
from .parts import IMAGE_SIZE, WIDTH

LATENT_SIZE = IMAGE_SIZE // 2
BETAS: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def tiny_stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline: epsilon, scaled-linear betas, DDIM.

    For image to image and inpainting: ``StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)``.
    """
    with parts.weights_from(seed):
        components = _stable_diffusion_components()
    return parts.quiet(StableDiffusionPipeline(**components, requires_safety_checker=False))


def tiny_controlnet(seed: int = 0) -> StableDiffusionControlNetPipeline:
    """The same with a ControlNet whose zero convolutions are random, as after training, so that the picture matters."""
    with parts.weights_from(seed):
        components = _stable_diffusion_components()
        controlnet = ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(8, 8)).eval()
        for block in (controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block, controlnet.controlnet_cond_embedding.conv_out):
            for weights in block.parameters():
                nn.init.normal_(weights, std=0.3)
    return parts.quiet(StableDiffusionControlNetPipeline(**components, controlnet=controlnet, requires_safety_checker=False))


def tiny_latent_consistency(seed: int = 0) -> LatentConsistencyModelPipeline:
    """A Latent Consistency Model: the network of Stable Diffusion that is told the guidance scale, LCM."""
    with parts.weights_from(seed):
        components = _stable_diffusion_components(time_cond_proj_dim=8)
    components["scheduler"] = LCMScheduler(**BETAS, steps_offset=1)
    return parts.quiet(LatentConsistencyModelPipeline(**components, requires_safety_checker=False))


def _stable_diffusion_components(**of_unet: Any) -> dict[str, Any]:
    # Diffusers' annotations know neither its own scheduler classes nor that these components may be absent: hence the dict.
    tokenizer = parts.byte_tokenizer()
    text_encoder = parts.clip(CLIPTextModel, tokenizer)
    unet, vae = parts.unet(cross_attention_dim=WIDTH, **of_unet), parts.vae(latent_channels=4)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return dict(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, image_encoder=None,
    )  # fmt: skip


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL pipeline: two text encoders, epsilon, scaled-linear betas, Euler."""
    with parts.weights_from(seed):
        tokenizer = parts.byte_tokenizer()
        one, two = parts.clip(CLIPTextModel, tokenizer), parts.clip(CLIPTextModelWithProjection, tokenizer)
        num_size_ids, size_width = 6, 4
        unet = parts.unet(
            cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=size_width,
            projection_class_embeddings_input_dim=num_size_ids * size_width + WIDTH, use_linear_projection=True,
        )  # fmt: skip
        vae = parts.vae(latent_channels=4)
    scheduler = EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)
    components: dict[str, Any] = dict(
        vae=vae, text_encoder=one, tokenizer=tokenizer, text_encoder_2=two, tokenizer_2=tokenizer, unet=unet, scheduler=scheduler
    )
    return parts.quiet(StableDiffusionXLPipeline(**components, add_watermarker=False))


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """A Stable Diffusion 3 pipeline: two CLIP encoders and a T5, rectified flow, shift 3."""
    return _stable_diffusion_3(seed, num_layers=1)


def tiny_sd35(seed: int = 0) -> StableDiffusion3Pipeline:
    """The same as Stable Diffusion 3.5 medium has it: normed queries and keys, and a second attention in the first block."""
    return _stable_diffusion_3(seed, num_layers=2, dual_attention_layers=(0,), qk_norm="rms_norm")


def _stable_diffusion_3(seed: int, **of_transformer: Any) -> StableDiffusion3Pipeline:
    with parts.weights_from(seed):
        tokenizer = parts.byte_tokenizer()
        one, two = parts.clip(CLIPTextModelWithProjection, tokenizer), parts.clip(CLIPTextModelWithProjection, tokenizer)
        tokenizer_3, three = parts.t5(width=2 * WIDTH)
        transformer = SD3Transformer2DModel(
            sample_size=LATENT_SIZE, patch_size=2, in_channels=4, out_channels=4, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=LATENT_SIZE,
            **of_transformer,
        ).eval()  # fmt: skip
        vae = parts.vae(latent_channels=4)
    return parts.quiet(
        StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, text_encoder=one, tokenizer=tokenizer,
            text_encoder_2=two, tokenizer_2=tokenizer, text_encoder_3=three, tokenizer_3=tokenizer_3,
        )
    )  # fmt: skip


def tiny_flux(seed: int = 0) -> FluxPipeline:
    """A Flux pipeline: a CLIP encoder and a T5, rectified flow, dynamic shift."""
    with parts.weights_from(seed):
        tokenizer = parts.byte_tokenizer()
        one, (tokenizer_2, two) = parts.clip(CLIPTextModel, tokenizer), parts.t5(width=WIDTH)
        transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
        ).eval()  # fmt: skip
        vae = parts.vae(latent_channels=1)
    return parts.quiet(
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), vae=vae, transformer=transformer,
            text_encoder=one, tokenizer=tokenizer, text_encoder_2=two, tokenizer_2=tokenizer_2,
        )
    )  # fmt: skip


def tiny_pixart(seed: int = 0) -> PixArtAlphaPipeline:
    """A PixArt-alpha pipeline: a T5, epsilon and a learned variance in twice the channels, linear betas, DPM-Solver++."""
    with parts.weights_from(seed):
        tokenizer, text_encoder = parts.t5(width=WIDTH)
        transformer = PixArtTransformer2DModel(
            sample_size=LATENT_SIZE, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, cross_attention_dim=16, caption_channels=WIDTH,
        ).eval()  # fmt: skip
        vae = parts.vae(latent_channels=4)
    components: dict[str, Any] = dict(text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=DPMSolverMultistepScheduler())
    return parts.quiet(PixArtAlphaPipeline(tokenizer=tokenizer, **components))


def tiny_dit(seed: int = 0) -> DiTPipeline:
    """A DiT pipeline: 1000 classes, epsilon and a learned variance in twice the channels, linear betas, DDIM."""
    with parts.weights_from(seed):
        transformer = DiTTransformer2DModel(
            sample_size=LATENT_SIZE, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8, num_attention_heads=2
        ).eval()
        vae = parts.vae(latent_channels=4)
    components: dict[str, Any] = dict(transformer=transformer, vae=vae, scheduler=DDIMScheduler(clip_sample=False))
    return parts.quiet(DiTPipeline(**components))


def tiny_svd(seed: int = 0) -> StableVideoDiffusionPipeline:
    """A Stable Video Diffusion pipeline: two frames from a picture, v prediction, karras sigmas from 700 to 0.002, Euler."""
    frames, size_width, channels = 2, 4, 32  # these networks norm their channels in groups of 32
    with parts.weights_from(seed):
        vision = CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2,
            image_size=IMAGE_SIZE, patch_size=IMAGE_SIZE // 2,
        )  # fmt: skip
        image_encoder = CLIPVisionModelWithProjection(vision).eval()
        unet = UNetSpatioTemporalConditionModel(
            sample_size=LATENT_SIZE, in_channels=8, out_channels=4, block_out_channels=(channels,) * 2, layers_per_block=1,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), num_attention_heads=2, cross_attention_dim=WIDTH,
            addition_time_embed_dim=size_width, projection_class_embeddings_input_dim=3 * size_width, num_frames=frames,
        ).eval()  # fmt: skip
        two: dict[str, Any] = dict(block_out_channels=(channels,) * 2, down_block_types=("DownEncoderBlock2D",) * 2)
        vae = AutoencoderKLTemporalDecoder(sample_size=IMAGE_SIZE, latent_channels=4, **two).eval()
    scheduler = EulerDiscreteScheduler(
        **BETAS, prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002, sigma_max=700.0,
        timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    crop: dict[str, Any] = dict(size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    components: dict[str, Any] = dict(
        image_encoder=image_encoder, unet=unet, vae=vae, scheduler=scheduler, feature_extractor=CLIPImageProcessor(**crop)
    )
    return parts.quiet(StableVideoDiffusionPipeline(**components))


def tiny_audioldm2(seed: int = 0) -> AudioLDM2Pipeline:
    """An AudioLDM2 pipeline without what turns prompts into embeddings, which it is called with: epsilon, DDIM.

    The two language models are there, since the pipeline asks them for their dtype, and a vocoder, since it asks it for sizes.
    ``from_pretrained`` wants to be told what is absent: text_encoder=None, tokenizer=None, projection_model=None, feature_extractor=None.
    """
    two: dict[str, Any] = dict(
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=(WIDTH,) * 2,
    )  # fmt: skip
    with parts.weights_from(seed):
        tokenizer_2, text_encoder_2 = parts.t5(width=WIDTH)
        words: dict[str, Any] = dict(vocab_size=8, bos_token_id=0, eos_token_id=0)
        language_model = GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_layer=1, n_head=2, n_positions=16, **words)).eval()
        unet = AudioLDM2UNet2DConditionModel(
            sample_size=LATENT_SIZE, in_channels=4, out_channels=4, layers_per_block=1, attention_head_dim=8, norm_num_groups=4, **two
        ).eval()
        vae = parts.vae(latent_channels=4, in_channels=1, out_channels=1)
        vocoder = SpeechT5HifiGan(
            SpeechT5HifiGanConfig(
                model_in_dim=IMAGE_SIZE, upsample_initial_channel=8, upsample_rates=[2], upsample_kernel_sizes=[4],
                resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], normalize_before=False,
            )
        ).eval()  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    components: dict[str, Any] = dict(
        vae=vae, text_encoder=None, text_encoder_2=text_encoder_2, projection_model=None, language_model=language_model, tokenizer=None,
        tokenizer_2=tokenizer_2, feature_extractor=None, unet=unet, scheduler=scheduler, vocoder=vocoder,
    )  # fmt: skip
    return parts.quiet(AudioLDM2Pipeline(**components))


def tiny_latent_upscale(seed: int = 0) -> StableDiffusionLatentUpscalePipeline:
    """A latent upscaler, to twice the size: preconditioned by the pipeline itself, Euler on sample predictions."""
    noise_levels, channels = 128, 32  # of the pipeline; these blocks norm their channels in groups of 32
    with parts.weights_from(seed):
        tokenizer = parts.byte_tokenizer()
        text_encoder = parts.clip(CLIPTextModel, tokenizer)
        blocks: dict[str, Any] = dict(
            block_out_channels=(channels,) * 2, time_embedding_dim=channels, down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
            up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"), mid_block_type=None, resnet_time_scale_shift="scale_shift",
            time_embedding_type="fourier", timestep_post_act="gelu", act_fn="gelu", norm_num_groups=None, conv_in_kernel=1,
            conv_out_kernel=1, layers_per_block=1, attention_head_dim=8, only_cross_attention=False,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            in_channels=8, out_channels=5, cross_attention_dim=WIDTH, time_cond_proj_dim=noise_levels + WIDTH, **blocks
        ).eval()
        vae = parts.vae(latent_channels=4)
    components: dict[str, Any] = dict(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, prediction_type="sample"),
    )
    return parts.quiet(StableDiffusionLatentUpscalePipeline(**components))
