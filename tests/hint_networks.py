"""Tiny networks of transformers with random weights, saved as users have them: one for each kind that a hint may be given."""

import torch
import transformers as tf
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.vitpose.image_processing_pil_vitpose import VitPoseImageProcessorPil
from transformers.models.zoedepth.image_processing_pil_zoedepth import ZoeDepthImageProcessorPil

SMALL = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32)
STAGES = ["stage1", "stage2", "stage3", "stage4"]
NECK = dict(neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8)


def depth_anything():
    backbone = tf.Dinov2Config(**SMALL, image_size=28, patch_size=14, out_features=STAGES, reshape_hidden_states=False)
    config = tf.DepthAnythingConfig(backbone_config=backbone, reassemble_hidden_size=16, patch_size=14, head_hidden_size=8, **NECK)
    size = dict(size={"height": 56, "width": 56}, ensure_multiple_of=14, keep_aspect_ratio=True)
    return tf.DepthAnythingForDepthEstimation(config), DPTImageProcessorPil(**size)


def dpt():
    config = tf.DPTConfig(**SMALL, image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False, **NECK)
    return tf.DPTForDepthEstimation(config), DPTImageProcessorPil(size={"height": 32, "width": 32})


def zoedepth():
    backbone = tf.BeitConfig(**SMALL, image_size=32, patch_size=8, out_features=STAGES, reshape_hidden_states=False)
    heads = dict(bottleneck_features=8, num_relative_features=8, bin_embedding_dim=8, num_attractors=[4, 2, 2, 1])
    patches = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    heads |= {f"patch_transformer_{key}": value for key, value in patches.items()}
    config = tf.ZoeDepthConfig(backbone_config=backbone, backbone_hidden_size=16, **NECK, **heads)
    return tf.ZoeDepthForDepthEstimation(config), ZoeDepthImageProcessorPil(size={"height": 32, "width": 32}, ensure_multiple_of=8)


def segformer():
    widths = dict(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16)
    config = tf.SegformerConfig(**widths, num_labels=5)
    return tf.SegformerForSemanticSegmentation(config), SegformerImageProcessorPil(size={"height": 32, "width": 32})


def mask2former():
    backbone = tf.SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, image_size=32, out_features=STAGES)
    widths = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16)
    config = tf.Mask2FormerConfig(
        backbone_config=backbone, **widths, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5, num_labels=4
    )
    return tf.Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessorPil(size={"height": 64, "width": 64})


def sam():
    sides = dict(image_size=64, patch_size=16)
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, output_channels=8, mlp_dim=32, window_size=2)
    config = tf.SamConfig(
        vision_config={**vision, **sides, "global_attn_indexes": [1], "num_pos_feats": 4},
        prompt_encoder_config={**sides, "hidden_size": 8, "mask_input_channels": 4},
        mask_decoder_config=dict(hidden_size=8, mlp_dim=16, num_attention_heads=2, iou_head_hidden_dim=8),
    )
    sizes = dict(size={"longest_edge": 64}, mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16})
    return tf.SamModel(config), tf.SamProcessor(SamImageProcessorPil(**sizes, pad_size={"height": 64, "width": 64}))


def vitpose(experts=1):
    small = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, num_experts=experts, part_features=8)
    backbone = tf.VitPoseBackboneConfig(**small, image_size=[64, 48], patch_size=[16, 16], out_features=["stage2"])
    network = tf.VitPoseForPoseEstimation(tf.VitPoseConfig(backbone_config=backbone, num_labels=17))
    return network, VitPoseImageProcessorPil(size={"height": 64, "width": 48})


def vitpose_plus():
    return vitpose(experts=6)


def rt_detr():
    backbone = tf.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, layer_type="basic", out_features=STAGES[1:]
    )
    widths = dict(encoder_hidden_dim=16, encoder_in_channels=[8, 16, 16], encoder_ffn_dim=16, d_model=16, decoder_ffn_dim=16)
    heads = dict(decoder_in_channels=[16] * 3, encoder_attention_heads=2, decoder_attention_heads=2, decoder_layers=1)
    labels = {"id2label": {0: "car", 1: "person"}, "label2id": {"car": 0, "person": 1}}
    config = tf.RTDetrConfig(backbone_config=backbone, **widths, **heads, **labels, num_queries=8, num_denoising=0)
    return tf.RTDetrForObjectDetection(config), RTDetrImageProcessorPil(size={"height": 64, "width": 64})


NETWORKS = {make.__name__: make for make in (depth_anything, dpt, zoedepth, segformer, mask2former, sam, vitpose, vitpose_plus, rt_detr)}


def save(name, folder):
    """The folder of that network, made on first use."""
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        for part in NETWORKS[name]():
            part.save_pretrained(path)
    return str(path)
