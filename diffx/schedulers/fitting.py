"""What does not fit a scheduler, said by name: pipelines that were written for other classes, and tensors of two shapes."""

from torch import Tensor

# What an error of each kind says after the name of the class; the pipelines are those of Diffusers that do it.
DISTILLED = (
    "takes no original_inference_steps, which pipelines for distilled networks pass, "
    "LatentConsistencyModelPipeline among them: diffx.LCM samples such networks"
)
NOISE_LEVEL = (
    "has other samples than x0 + sigma noise, and this pipeline does sums with their sigmas, "
    "as StableDiffusionLatentUpscalePipeline does: diffx.Euler, EulerAncestral, Heun and LMS fit"
)
SCALED = (
    "steps from the sample before it was scaled, and step() was given what scale_model_input() returned, as DiTPipeline does it: "
    "such a pipeline needs one that scales nothing: diffx.DDIM, DDPM, DPMSolver, DEIS or UniPC"
)


def refuse(scheduler: object, why: str) -> ValueError:
    """The error to raise: the name of the scheduler's class, then ``why``."""
    return ValueError(f"{type(scheduler).__name__} {why}")


def fitted(out: Tensor, x: Tensor, *, learned_variance: bool) -> Tensor:
    """``out`` without predicted variances, where the network has learned them.

    Raises:
        ValueError: shape, device or kind of numbers of ``out`` and the sample ``x`` do not go together.
    """
    if learned_variance and out.shape[1] == 2 * x.shape[1]:
        out = out[:, : x.shape[1]]
    if out.shape != x.shape:
        raise ValueError(f"model_output has shape {tuple(out.shape)}, sample {tuple(x.shape)}; they must be equal")
    if out.device != x.device:
        raise ValueError(f"model_output is on {out.device}, sample on {x.device}; move one of them")
    if not out.dtype.is_floating_point or not x.dtype.is_floating_point:
        raise ValueError(f"model_output has dtype {out.dtype}, sample {x.dtype}; both must be floating point")
    return out
