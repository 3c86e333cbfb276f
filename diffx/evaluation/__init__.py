"""Is a sampler or a model good? Distances and shares with floors; ``compare`` from the same noise, ``evaluate`` against real pictures."""

from .compare import Comparison, Result, compare
from .emoji import Evaluator, GlyphEvaluator, all_prompts, evaluator_for, parse_prompt, prototypes, random_pictures, render
from .evaluate import evaluate, evaluate_pictures
from .features import FeatureExtractor, GlyphEncoder, GlyphFeatures, TransformersClassifier, TransformersFeatures
from .metrics import (
    Measure,
    alignment,
    density_coverage,
    frechet_distance,
    halves,
    inception_score,
    kernel_distance,
    near_copy_share,
    precision_recall,
    psnr,
    r_precision,
    rms,
)
from .pictures import PictureFolder, Pictures, PictureTensor
from .quality import Evaluation, Score
from .samplers import make_sampler

__all__ = [
    "Comparison", "Evaluation", "Evaluator", "FeatureExtractor", "GlyphEncoder", "GlyphEvaluator", "GlyphFeatures", "Measure",
    "PictureFolder", "PictureTensor", "Pictures", "Result", "Score", "TransformersClassifier", "TransformersFeatures", "alignment",
    "all_prompts", "compare", "density_coverage", "evaluate", "evaluate_pictures", "evaluator_for", "frechet_distance", "halves",
    "inception_score", "kernel_distance", "make_sampler", "near_copy_share", "parse_prompt", "precision_recall", "prototypes", "psnr",
    "r_precision", "random_pictures", "render", "rms",
]  # fmt: skip
