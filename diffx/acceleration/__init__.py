"""Attention kernels for every model: which one, why, and exactly undone."""

from .attention import AttentionKernels, Choice, choose_attention, set_attention

__all__ = ["AttentionKernels", "Choice", "choose_attention", "set_attention"]
