"""Attention kernels for every model: which one, why, and exactly undone."""

from .attention import AttentionKernels, set_attention

__all__ = ["AttentionKernels", "set_attention"]
