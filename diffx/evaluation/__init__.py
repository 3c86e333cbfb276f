"""Is a sampler or a model good? Same-noise distances, features, shares and distances with floors, and ``compare``."""

from .compare import Comparison, Result, compare
from .emoji import Evaluator, GlyphEvaluator, all_prompts, evaluator_for, parse_prompt, prototypes, render
from .features import FeatureExtractor, GlyphEncoder, GlyphFeatures, TransformersFeatures
from .metrics import Measure, frechet_distance, halves, near_copy_share, precision_recall, psnr, r_precision, rms
from .samplers import make_sampler

__all__ = [
    "Comparison", "Evaluator", "FeatureExtractor", "GlyphEncoder", "GlyphEvaluator", "GlyphFeatures", "Measure", "Result",
    "TransformersFeatures", "all_prompts", "compare", "evaluator_for", "frechet_distance", "halves", "make_sampler", "near_copy_share",
    "parse_prompt", "precision_recall", "prototypes", "psnr", "r_precision", "render", "rms",
]  # fmt: skip
