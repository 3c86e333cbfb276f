"""The contract matrix: the pipelines, the solvers, and what can be observed of one in the other. For tests and benchmarks."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from diffx.schedulers import (
    DDIM,
    DDPM,
    DEIS,
    LCM,
    LMS,
    DPMSolver,
    DPMSolverSinglestep,
    Euler,
    EulerAncestral,
    Heun,
    TableScheduler,
    UniPC,
)
from diffx.schedulers.process import is_flow

from . import pipelines as tiny
from .calls import call_inputs, end_of, sample_of
from .parts import quiet


@dataclass(frozen=True)
class Case:
    """A row: a pipeline, and the samplers that do not fit it."""

    name: str
    build: Callable[[], DiffusionPipeline]
    refusals: Mapping[type[TableScheduler], str] = field(default_factory=dict)  # what the error says


@dataclass(frozen=True)
class Solver:
    """A column: one of our classes with options, and the Diffusers classes in whose place it stands."""

    name: str
    ours: type[TableScheduler]
    stock: type
    stock_flow: type | None
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, config: Mapping[str, Any]) -> TableScheduler:
        """Ours, for the model that a scheduler config describes."""
        return self.ours.from_config(config, **self.options)

    def make_stock(self, config: Mapping[str, Any]) -> Any:
        """Diffusers' own, as its documentation has it made; None where it has none for flow models."""
        cls, options = self.stock, dict(self.options)
        if is_flow(config):
            cls = self.stock_flow
            if cls is self.stock:  # the two that serve both kinds of models
                options |= dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=config["shift"])
        return None if cls is None else cls.from_config(config, **options)


_SCALED = r"step\(\) was given what scale_model_input\(\) returned"
_UNITS = r"has other samples than x0 \+ sigma noise"
_DISTILLED = "takes no original_inference_steps"


def _from_pipe(cls: type, source: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    return lambda: quiet(cls.from_pipe(source()))  # type: ignore[attr-defined]  # pipelines have it


CASES = (
    Case("StableDiffusionPipeline", tiny.tiny_stable_diffusion),
    Case("StableDiffusionImg2ImgPipeline", _from_pipe(diffusers.StableDiffusionImg2ImgPipeline, tiny.tiny_stable_diffusion)),
    Case("StableDiffusionInpaintPipeline", _from_pipe(diffusers.StableDiffusionInpaintPipeline, tiny.tiny_stable_diffusion)),
    Case("StableDiffusionControlNetPipeline", tiny.tiny_controlnet),
    Case("StableDiffusionXLPipeline", tiny.tiny_sdxl),
    Case("StableDiffusionXLImg2ImgPipeline", _from_pipe(diffusers.StableDiffusionXLImg2ImgPipeline, tiny.tiny_sdxl)),
    Case("StableDiffusion3Pipeline", tiny.tiny_sd3),
    Case("StableDiffusion3Pipeline, SD 3.5", tiny.tiny_sd35),
    Case("StableDiffusion3Img2ImgPipeline", _from_pipe(diffusers.StableDiffusion3Img2ImgPipeline, tiny.tiny_sd3)),
    Case("FluxPipeline", tiny.tiny_flux),
    Case("FluxImg2ImgPipeline", _from_pipe(diffusers.FluxImg2ImgPipeline, tiny.tiny_flux)),
    Case("PixArtAlphaPipeline", tiny.tiny_pixart),
    Case("DiTPipeline", tiny.tiny_dit, dict.fromkeys((Euler, EulerAncestral, Heun, LMS), _SCALED)),
    Case(
        "LatentConsistencyModelPipeline",
        tiny.tiny_latent_consistency,
        dict.fromkeys((DDIM, DDPM, Euler, EulerAncestral, Heun, DPMSolver, DPMSolverSinglestep, UniPC, DEIS, LMS), _DISTILLED),
    ),
    Case("AudioLDM2Pipeline", tiny.tiny_audioldm2),
    Case("StableVideoDiffusionPipeline", tiny.tiny_svd, {LCM: "use_karras_sigmas=True does not fit LCM"}),
    Case(
        "StableDiffusionLatentUpscalePipeline",
        tiny.tiny_latent_upscale,
        dict.fromkeys((DDIM, DDPM, DPMSolver, DPMSolverSinglestep, UniPC, DEIS, LCM), _UNITS),
    ),
)

_DPM, _UNIPC = diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler
_DEIS = diffusers.DEISMultistepScheduler
_SINGLE = diffusers.DPMSolverSinglestepScheduler
_SDE = dict(algorithm_type="sde-dpmsolver++")
SOLVERS = (
    Solver("DDIM", DDIM, diffusers.DDIMScheduler, None),
    Solver("DDPM", DDPM, diffusers.DDPMScheduler, None),
    Solver("Euler", Euler, diffusers.EulerDiscreteScheduler, diffusers.FlowMatchEulerDiscreteScheduler),
    Solver("EulerAncestral", EulerAncestral, diffusers.EulerAncestralDiscreteScheduler, diffusers.LTXEulerAncestralRFScheduler),
    Solver("Heun", Heun, diffusers.HeunDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler),
    Solver("DPMSolver", DPMSolver, _DPM, _DPM),
    Solver("DPMSolver, order 3", DPMSolver, _DPM, _DPM, dict(solver_order=3)),
    Solver("DPMSolver, SDE", DPMSolver, _DPM, _DPM, _SDE),
    Solver("DPMSolver, SDE, order 3", DPMSolver, _DPM, _DPM, _SDE | dict(solver_order=3)),
    Solver("DPMSolverSinglestep", DPMSolverSinglestep, _SINGLE, _SINGLE),
    Solver("DPMSolverSinglestep, order 3", DPMSolverSinglestep, _SINGLE, _SINGLE, dict(solver_order=3)),
    Solver("UniPC", UniPC, _UNIPC, _UNIPC),
    Solver("UniPC, order 3", UniPC, _UNIPC, _UNIPC, dict(solver_order=3)),
    Solver("DEIS", DEIS, _DEIS, _DEIS),
    Solver("LMS", LMS, diffusers.LMSDiscreteScheduler, None),
    Solver("LCM", LCM, diffusers.LCMScheduler, diffusers.FlowMatchLCMScheduler),
)


def takes(pipe: DiffusionPipeline) -> set[str]:
    """The arguments with which a caller of the pipeline chooses the times: timesteps, sigmas, mu."""
    return {"timesteps", "sigmas", "mu"} & set(inspect.signature(type(pipe).__call__).parameters)


@dataclass(frozen=True)
class Observation:
    """What a scheduler did in a pipeline: three samples in one batch, twice, and each alone."""

    finite: bool
    repeats: bool  # the same seeds gave the same bits
    seeded: bool  # another seed gave another sample
    batch_difference: float  # of the batch and the samples alone, relative to the largest entry


def observe(pipe: DiffusionPipeline, scheduler: Any, num_inference_steps: int = 6) -> Observation:
    """What happens with that scheduler; whatever it or the pipeline raises is the caller's."""
    pipe.scheduler = scheduler  # type: ignore[attr-defined]  # every pipeline here has one
    inputs = call_inputs(pipe, batch_size=3)

    def run(inputs: dict[str, Any], *seeds: int) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        return end_of(pipe, **inputs, num_inference_steps=num_inference_steps, generator=generator)

    batch, again, other = run(inputs, 0, 1, 2), run(inputs, 0, 1, 2), run(sample_of(inputs, 0), 3)
    alone = torch.cat([run(sample_of(inputs, i), i) for i in range(3)])
    difference = ((batch - alone).abs().max() / batch.abs().max()).item()
    return Observation(bool(batch.isfinite().all()), torch.equal(batch, again), not torch.equal(other, alone[:1]), difference)
