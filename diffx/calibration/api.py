"""``diffx.calibrate``: one call from a pipeline to a scheduler that knows it."""

import difflib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ..schedulers.calibrated import SHARED, Calibrated, fingerprint
from .fixed import candidates
from .problem import PipelineProblem, Problem
from .stages import Calibrator, Cost, Settings, cost_of

LEAST_PROMPTS = 4
NEEDED = ("prompt", "latents", "generator", "num_inference_steps", "guidance_scale", "output_type", "return_dict")


def calibrate(
    pipe: Any,
    *,
    num_inference_steps: int,
    prompts: Sequence[str],
    guidance_scale: float,
    cache: str | Path | None = None,
    progress: bool = True,
    call_kwargs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Calibrated:
    """A scheduler for ``pipe`` whose ``num_inference_steps`` calls lie and weigh as they do best for this model and guidance.

    What is learned from are the ends of many-step runs from the same noises. Three stages, each starting from the best so far: known
    solvers on known grids, grids cut from recorded runs, and Gauss-Newton on the whole table. A fourth of the prompts and noises
    of their own are held out, and decide which stage's table is returned: never one that is worse there than what the search found.

    An interrupted call goes on where it was: references and checkpoints lie in ``cache``, named by all that they depend on.

    Args:
        pipe: a Diffusers text-to-image pipeline; its weights and scheduler are as before afterwards.
        prompts: at least 4, of the kind the model will be used for; every fourth is held out.
        guidance_scale: at which the model will be used, 1 being none; a table does not fit a larger one.
        cache: None is ``$XDG_CACHE_HOME/diffx/calibration`` or ``~/.cache/diffx/calibration``.
        call_kwargs: passed to every call of the pipeline, for instance height and width.
        settings: ``Settings``, for instance num_samples, iterations, time_budget. The noises of ``seed`` are those that ``compare``
            takes for 2 * seed, and held out those for 2 * seed + 1: test with another.

    Raises:
        ValueError: too few prompts or samples, a reference with noise or too few steps, an unknown setting.
        FloatingPointError: a reference or a learned run holds NaN or infinity.
    """
    wanted = make_settings(num_inference_steps=num_inference_steps, **settings)
    learned, held_out = split_problem(pipe, prompts, guidance_scale, wanted.seed, call_kwargs or {})
    scheduler = calibrate_problems(learned, held_out, wanted, cache=cache, progress=progress)
    made = replace(scheduler.calibration, guidance_scale=float(guidance_scale), model=fingerprint(pipe))
    return Calibrated.from_config(pipe.scheduler.config, calibration=made.to_dict())


def calibrate_problems(
    learned: Problem, held_out: Problem, settings: Settings, *, cache: str | Path | None = None, progress: bool = True
) -> Calibrated:
    """``calibrate`` for anything that is a ``Problem``, for instance a bare network (``NetworkProblem``) in a loop of your own.

    Args:
        learned, held_out: the same model, with other conditions and another seed.
    """
    calibrator = Calibrator(learned, held_out, settings, Path(cache) if cache else default_cache(), progress)
    made, stages = calibrator.run()
    made = replace(
        made,
        process={key: learned.config[key] for key in SHARED if key in learned.config},
        mu=calibrator.mu,
        errors={stage.name: stage.held_out_error for stage in stages},
        made_with={**asdict(settings), "stages": [asdict(stage) for stage in stages]},
    )
    return Calibrated.from_config(learned.config, calibration=made.to_dict())


def cost(pipe: Any, *, num_inference_steps: int, **settings: Any) -> Cost:
    """What ``calibrate`` would spend with nothing in its cache, in network calls; nothing is run."""
    wanted = make_settings(num_inference_steps=num_inference_steps, **settings)
    mu = 1.0 if pipe.scheduler.config.get("use_dynamic_shifting") else None  # any: it does not change how many candidates there are
    return cost_of(wanted, len(candidates(pipe.scheduler.config, num_inference_steps, mu)))


def split_problem(
    pipe: Any, prompts: Sequence[str], guidance_scale: float, seed: int, call_kwargs: Mapping[str, Any]
) -> tuple[PipelineProblem, PipelineProblem]:
    """The problem to learn from and the held-out one: every fourth prompt, and noises of another seed.

    Raises:
        ValueError: fewer than 4 different prompts, or a pipeline that cannot be started from given latents.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    if missing := [name for name in NEEDED if name not in parameters]:
        raise ValueError(
            f"{type(pipe).__name__} takes no {', '.join(missing)}; a text-to-image pipeline that starts from latents is needed"
        )
    if isinstance(prompts, str):
        raise ValueError("prompts is a list of strings, not one string")
    if len(set(prompts)) < LEAST_PROMPTS:
        raise ValueError(f"{len(set(prompts))} different prompts are too few: at least {LEAST_PROMPTS} are needed, one of them held out")
    prompts = list(dict.fromkeys(prompts))
    shown = [prompt for i, prompt in enumerate(prompts) if i % LEAST_PROMPTS != LEAST_PROMPTS - 1]
    hidden = prompts[LEAST_PROMPTS - 1 :: LEAST_PROMPTS]
    one = PipelineProblem(pipe, shown, float(guidance_scale), 2 * seed, call_kwargs)
    return one, PipelineProblem(pipe, hidden, float(guidance_scale), 2 * seed + 1, call_kwargs)


def make_settings(**given: Any) -> Settings:
    """``Settings``, or an error that names the nearest one.

    Raises:
        ValueError: an unknown name, or a value out of range.
    """
    known = [each.name for each in fields(Settings)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"unknown setting {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"))
    return Settings(**given)


def default_cache() -> Path:
    """Where references and checkpoints lie unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffx" / "calibration"
