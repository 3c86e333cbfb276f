"""Which attention kernels a device is tried with, and whether one runs: Diffusers' requirements, then one call compared with PyTorch's.

What "auto" tries, in this order, before PyTorch's own (``native``), which all other devices have:

| device | compute capability | tried |
| --- | --- | --- |
| RTX 50 | 12.x | flash, xformers |
| B200 | 10.x, 11.x | _native_cudnn, flash, xformers |
| H100, H200 | 9.x | _flash_3, _native_cudnn, flash, xformers |
| A100, RTX 30, RTX 4090 | 8.x | flash, xformers |
| V100, T4 | 7.x | xformers |
| older, AMD, CPU, MPS, XPU | | |

``flash`` and ``_flash_3`` are the packages flash-attn and flash-attn-3. Kernels that round queries and keys to 8 bits (sage) or that are
downloaded and run from the Hub (``*_hub``) are used where they are named only.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from torch import Tensor

AUTO = "auto"
NATIVE = AttentionBackendName.NATIVE.value
KERNELS = tuple(sorted(kernel.value for kernel in AttentionBackendName))
# From this compute capability on; our judgement, not measured.
_AUTO = (
    ((12, 0), ("flash", "xformers")),
    ((10, 0), ("_native_cudnn", "flash", "xformers")),
    ((9, 0), ("_flash_3", "_native_cudnn", "flash", "xformers")),
    ((8, 0), ("flash", "xformers")),
    ((7, 0), ("xformers",)),
)
# Relative L2 difference to PyTorch's own. Exact kernels differ by the rounding of each weight and output: 2^-8 and 2^-11 of a
# number, and 2^-11 in float32 too, where a GPU multiplies in TF32; eight times that is allowed. 8-bit kernels differ by percents.
_TOLERANCE = {torch.bfloat16: 2**-5, torch.float16: 2**-8, torch.float32: 2**-8, torch.float64: 2**-8}
_TOLERANCE_8_BIT = 0.1
_QUERIES, _KEYS = 64, 77  # tokens of the trial; 77 of text are no multiple of 8, which some kernels do not take in a mask


@dataclass(frozen=True)
class Kind:
    """Attention calls that are alike: ``heads`` of width ``head_dim``; with ``training``, gradients are needed, too."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    training: bool = False


@dataclass(frozen=True)
class Found:
    """The kernel for calls of one kind, whether it serves those with a mask, and what was not taken before it, with the reason."""

    kernel: str
    why: str
    takes_masks: bool
    refused: dict[str, str]
    failed: tuple[str, ...] = ()  # of those, what seemed to fit and did not run as PyTorch's own


@dataclass(frozen=True)
class _Sizes:
    """What Diffusers' checks read of a tensor, without one."""

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]


def check_known(kernel: str) -> None:
    """Refuse what is no name of a kernel.

    Raises:
        ValueError: it is neither "auto" nor a name that Diffusers knows.
    """
    if kernel not in (AUTO, *KERNELS):
        near = difflib.get_close_matches(kernel, [AUTO, *KERNELS], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"attention kernel {kernel!r} is not one of {AUTO}, {', '.join(KERNELS)}{hint}")


def candidates(device: torch.device) -> tuple[str, ...]:
    """The kernels that "auto" tries on a device before PyTorch's own, best first."""
    if device.type != "cuda" or torch.version.hip:
        return ()
    capability = torch.cuda.get_device_capability(device)
    return next((names for least, names in _AUTO if capability >= least), ())


def find(names: tuple[str, ...], kind: Kind, *, download: bool = True) -> Found:
    """The first of those kernels that runs calls of that kind; PyTorch's own where none does.

    Args:
        download: fetch a Hub kernel that fits, and try it; otherwise it is taken untried.
    """
    refused: dict[str, str] = {}
    failed: list[str] = []
    for name in names:
        if name == NATIVE:
            break
        if reason := requirement(name, kind):
            refused[name] = reason
        elif is_from_hub(name) and not download:
            return Found(name, "it fits; it would be downloaded, and was not tried", False, refused, tuple(failed))
        elif reason := trial(name, kind):
            refused[name] = reason
            failed.append(name)
        else:
            return Found(name, "it fits, and a call agrees", trial(name, kind, masked=True) is None, refused, tuple(failed))
    why = "it was asked for" if NATIVE in names else "no other one runs" if names else f"no other one is tried on {kind.device.type}"
    return Found(NATIVE, why, True, refused, tuple(failed))


def requirement(name: str, kind: Kind) -> str | None:
    """What Diffusers says is missing for that kernel: a package, or another device, dtype or width. Nothing is downloaded."""
    kernel = AttentionBackendName(name)
    if not kind.head_dim:
        return "the width of its heads is not known"
    if kind.device.type != "cuda" and not name.startswith(("native", "_native", "flex")):  # which Diffusers asks of some only
        return f"it runs on CUDA devices, and this is {kind.device.type}"
    query, key = (_Sizes(kind.device, kind.dtype, (2, tokens, kind.heads, kind.head_dim)) for tokens in (_QUERIES, _KEYS))
    try:
        _check_attention_backend_requirements(kernel)
        for check in _AttentionBackendRegistry._constraints[kernel]:
            check(query=query, key=key, value=key, attn_mask=None, is_causal=False)
    except (RuntimeError, ValueError) as error:
        return _first_line(error)
    return None


def trial(name: str, kind: Kind, *, masked: bool = False) -> str | None:
    """Why one call with that kernel, and its gradients in training, is not PyTorch's own up to rounding; None where it is."""
    try:
        _maybe_download_kernel_for_backend(AttentionBackendName(name))
        goal, found = (_called(each, kind, masked) for each in (NATIVE, name))
        off = float(torch.stack([(one - other).norm() / other.norm() for one, other in zip(found, goal, strict=True)]).max())
    except Exception as error:  # a kernel raises whatever its makers chose
        return f"{type(error).__name__}: {_first_line(error)}"
    allowed = _TOLERANCE_8_BIT if "sage" in name else _TOLERANCE[kind.dtype]
    return None if off <= allowed else f"it differs from PyTorch's own by {off:.2g} of its length; {allowed:.2g} is allowed"


def is_from_hub(name: str) -> bool:
    """Whether that kernel is downloaded from the Hub and run."""
    return name.endswith("_hub")


def _called(name: str, kind: Kind, masked: bool) -> list[Tensor]:
    """(output, gradients) of one call on numbers that are always the same, in float32."""
    generator = torch.Generator().manual_seed(0)

    def drawn(tokens: int) -> Tensor:
        made = torch.randn(2, tokens, kind.heads, kind.head_dim, generator=generator, device="cpu")
        return made.to(kind.device, kind.dtype).requires_grad_(kind.training)

    inputs = drawn(_QUERIES), drawn(_KEYS), drawn(_KEYS)
    mask = None
    if masked:  # as Diffusers' networks make it of text
        mask = torch.zeros(2, kind.heads, 1, _KEYS, dtype=kind.dtype, device=kind.device)
        mask[1, ..., _KEYS // 2 :] = -10000.0
    with torch.set_grad_enabled(kind.training):
        output = dispatch_attention_fn(*inputs, attn_mask=mask, backend=AttentionBackendName(name))
        gradients = torch.autograd.grad(output.float().square().sum(), inputs) if kind.training else ()
    return [tensor.detach().float() for tensor in (output, *gradients)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
