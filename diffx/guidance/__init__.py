"""Guidance while sampling: rules that make one prediction of two, in unmodified pipelines; ``objectives.Guidance`` is about training."""

from .apg import APG
from .around import DynamicThresholding, Interval, Rescale
from .cfg import CFG, CFGPlusPlus, CFGZeroStar
from .classifier import NoisyClassifier, train_classifier
from .gradient import ClassifierGuidance, LossGuidance
from .hook import Guide, guide
from .moment import Moment
from .rule import Ramp, Rule

__all__ = [
    "APG", "CFG", "CFGPlusPlus", "CFGZeroStar", "ClassifierGuidance", "DynamicThresholding", "Guide", "Interval", "LossGuidance", "Moment",
    "NoisyClassifier", "Ramp", "Rescale", "Rule", "guide", "train_classifier",
]  # fmt: skip
