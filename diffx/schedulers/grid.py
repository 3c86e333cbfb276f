"""Which times a run visits, as Diffusers' config words say it.

``Grid.sigmas`` is the only source of time: edm_sigma (sigma / alpha) for models with betas, sigma for flow. The same words
give different grids in different Diffusers classes, so each scheduler class names its twin's ``Convention``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from .process import Process
from .spacing import (
    AYS,
    ays_sigmas,
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    logsnr_sigmas,
    polyexponential_sigmas,
    quadratic_timesteps,
)

# Diffusers' words for noise levels that replace those of the spaced times, between the same ends.
FILLS = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
    "use_lu_lambdas": exponential_sigmas,  # even in lam is even in log sigma
}
# Values of ``spacing``, which Diffusers lacks: the same with parameters, then those of models with betas.
OWN_FILLS = {"polyexponential": polyexponential_sigmas, "beta": beta_sigmas, "logsnr": exponential_sigmas}
PARAMETERS = {"spacing_rho": ("polyexponential", "rho"), "spacing_alpha": ("beta", "a"), "spacing_beta": ("beta", "b")}
OWN_SPACINGS = (*OWN_FILLS, "quadratic", *AYS)


@dataclass(frozen=True)
class Convention:
    """How a Diffusers class reads the grid words."""

    ends_on_point: bool = False  # N + 1 spaced points and the last one dropped (DPM, UniPC) instead of N points (DDIM, Euler)
    whole_t: bool = True  # the network is fed whole train times, which Euler does not ask for
    karras_between: Literal["table", "spaced"] = "table"  # the range that karras fills: the whole beta table, or the spaced points


@dataclass(frozen=True)
class Grid:
    """The times of a run of N intervals, float64 on the host."""

    t: np.ndarray  # (N,) what the network is fed
    sigmas: np.ndarray  # (N + 1,) falling

    def per_call(self, calls: int) -> "Grid":
        """The same grid with an entry per network call, for methods that call ``calls`` times in every interval but the last."""
        t, sigmas = (np.repeat(each, calls)[calls - 1 :] for each in (self.t, self.sigmas[:-1]))
        return Grid(t, np.append(sigmas, self.sigmas[-1]))


def make_grid(
    process: Process,
    convention: Convention,
    config: Mapping[str, Any],
    num_inference_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
) -> Grid:
    """The grid of a run. Give the number of steps, or ``timesteps``, or ``sigmas`` (with a number only if it agrees).

    ``timesteps`` (N) are used as they are. ``sigmas``: for models with betas N + 1 values of edm_sigma, the last being the
    end; for flow N values in (0, 1], shifted as the config says, 0 following (or N + 1 values ending in 0).

    Raises:
        ValueError: nothing or two things given, fewer than one step, more steps than train times, a list that does not fall
            strictly or leaves its range, a grid word nobody here knows, or dynamic shifting without ``mu``.
    """
    _refuse_unknown_words(config)
    if config["shift"] != 1 and process.frame != "flow":
        raise ValueError(
            f"shift={config['shift']} is for flow models, where pure noise stays pure noise; noise levels of a model with betas would "
            "leave the range of its training: set sigma_max, or spacing='beta' with spacing_alpha and spacing_beta"
        )
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps and sigmas were both given; pass one of them")
    given = timesteps if timesteps is not None else sigmas
    if given is None:
        if num_inference_steps is None:
            raise ValueError("pass num_inference_steps, timesteps or sigmas")
        if num_inference_steps < 1 or num_inference_steps != int(num_inference_steps):
            raise ValueError(f"num_inference_steps={num_inference_steps} must be a whole number of at least 1")
    if timesteps is not None:
        grid = _from_timesteps(process, convention, config, np.asarray(timesteps, dtype=np.float64))
    elif process.frame == "flow":
        grid = _flow(process, config, num_inference_steps, sigmas, mu)
    elif sigmas is not None:
        values = _checked(np.asarray(sigmas, dtype=np.float64), "sigmas", at_least=2)
        grid = Grid(_fed(process, convention, config, values[:-1]), values)
    else:
        grid = _spaced(process, convention, config, int(num_inference_steps or 0))
    if num_inference_steps is not None and len(grid.t) != num_inference_steps:
        raise ValueError(f"num_inference_steps={num_inference_steps}, but the given list makes {len(grid.t)} steps")
    return grid


def spaced_timesteps(spacing: str, num_steps: int, last: int, convention: Convention, *, offset: int = 0) -> np.ndarray:
    """(N,) train times, falling, spaced evenly over 0 .. last - 1.

    Source: Lin et al. 2023 (arXiv:2305.08891) table 2 names the three spacings.
    """
    points = num_steps + convention.ends_on_point
    match spacing:
        case "linspace":
            t = np.linspace(0, last - 1, points)[::-1]
            t = np.round(t) if convention.whole_t else t
        case "leading":
            t = np.arange(points)[::-1] * (last // points) + float(offset)
        case "trailing":
            return np.round(last - np.arange(num_steps) * (last / num_steps)) - 1
        case unknown:
            raise ValueError(f"timestep_spacing={unknown!r} is not one of leading, linspace, trailing")
    return t[:num_steps].copy()  # a reversed view has strides that torch refuses


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Flow sigmas moved towards noise by ``shift`` > 1 (1 leaves them); 0 and 1 stay where they are.

    Source: Esser et al. 2024 (arXiv:2403.03206) eq. 23.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def is_pipeline_default(sigmas: Sequence[float]) -> bool:
    """Whether flow ``sigmas`` are 1 - i / N, i = 0 .. N - 1: what pipelines pass on when their user gave none."""
    return len(sigmas) > 0 and np.allclose(sigmas, np.linspace(1, 1 / len(sigmas), len(sigmas)), rtol=0, atol=1e-6)


def sigmas_at(process: Process, grid: Grid | None, t: np.ndarray) -> np.ndarray:
    """Grid values at times ``t``: those of the grid where a time is of it, else those of the train times."""
    sigmas = process.sigma_at(t)
    if grid is None:
        return sigmas
    near = np.abs(grid.t[None] - t[:, None]).argmin(1)
    return np.where(np.isclose(grid.t[near], t, rtol=1e-6), grid.sigmas[near], sigmas)


def _spaced(process: Process, convention: Convention, config: Mapping[str, Any], steps: int) -> Grid:
    table = process.edm_sigmas
    assert table is not None
    last = len(table)
    if config["lambda_min_clipped"] > -np.inf:
        last = int(np.count_nonzero(-np.log(table) >= config["lambda_min_clipped"]))
    # More steps than whole train times would visit some of them twice.
    most = last - convention.ends_on_point
    if steps > most:
        raise ValueError(f"num_inference_steps={steps} is more than the {most} train times this grid can visit")
    spacing, fill = config.get("spacing"), _fill(config)
    if spacing == "quadratic":
        t = quadratic_timesteps(steps + convention.ends_on_point, last)[:steps]
    else:
        t = spaced_timesteps(config["timestep_spacing"], steps, last, convention, offset=config["steps_offset"])
    sigmas = process.sigma_at(np.minimum(t, len(table) - 1))
    if spacing in AYS:
        sigmas = ays_sigmas(steps, spacing)
        t = _fed(process, convention, config, sigmas)
    elif fill:
        ends = (table[-1], table[0]) if convention.karras_between == "table" else (sigmas[0], sigmas[-1])
        sigmas = _between(_levels(fill, config), *ends, steps, config)
        t = _fed(process, convention, config, sigmas)
    elif _continuous(config):
        t = _fed(process, convention, config, sigmas)
    return Grid(t, np.append(sigmas, _final_sigma(config, process)))


def _from_timesteps(process: Process, convention: Convention, config: Mapping[str, Any], t: np.ndarray) -> Grid:
    if (fill := _fill(config)) or config.get("spacing") or _continuous(config):
        word = f"spacing={config['spacing']!r}" if config.get("spacing") else f"{fill}=True" if fill else "timestep_type='continuous'"
        raise ValueError(f"timesteps cannot be combined with {word}; pass sigmas")
    t = _checked(t, "timesteps", at_least=1)
    top = process.num_train_timesteps - (process.frame != "flow")
    if t[0] > top or (convention.whole_t and process.frame != "flow" and np.any(t != np.round(t))):
        kind = "whole numbers" if convention.whole_t and process.frame != "flow" else "numbers"
        raise ValueError(f"timesteps must be {kind} between 0 and {top}, got {t.tolist()}")
    return Grid(t, np.append(process.sigma_at(t), _final_sigma(config, process)))


def _flow(process: Process, config: Mapping[str, Any], steps: int | None, sigmas: Sequence[float] | None, mu: float | None) -> Grid:
    """The grid of FlowMatchEulerDiscreteScheduler, its second shift of an already shifted default range included."""
    shift, dynamic, fill = _flow_shift(config), config["use_dynamic_shifting"], _fill(config)
    if fill == "use_lu_lambdas" or config.get("spacing") not in (None, *OWN_FILLS):
        word = f"spacing={config['spacing']!r}" if config.get("spacing") else f"{fill}=True"
        raise ValueError(
            f"{word} is for models with betas; flow models have use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas and "
            f"spacing={', '.join(OWN_FILLS)}"
        )
    if dynamic and mu is None:
        raise ValueError("use_dynamic_shifting=True needs mu; flow pipelines compute it from the picture's size")
    if sigmas is None:
        lowest = np.array(1 / process.num_train_timesteps)
        values = np.linspace(1.0, lowest if dynamic else shift_sigmas(lowest, shift), steps or 0)
    else:
        values = _checked(np.asarray(sigmas, dtype=np.float64), "sigmas", at_least=1)
        values = values[:-1] if len(values) > 1 and values[-1] == 0 else values
        if values[0] > 1 or values[-1] <= 0:
            raise ValueError(f"flow sigmas lie in (0, 1], got {values.tolist()}")
    if dynamic:
        assert mu is not None
        shift = float(np.exp(mu)) if config["time_shift_type"] == "exponential" else mu
    values = shift_sigmas(values, shift)
    if config["shift_terminal"]:
        values = 1 - (1 - values) * (1 - config["shift_terminal"]) / (1 - values[-1])
    if fill == "logsnr":  # pure noise has lam = -inf: the highest level is that of the last train time below it
        values = _between(logsnr_sigmas, min(values[0], 1 - 1 / process.num_train_timesteps), values[-1], len(values), config)
    elif fill:
        values = _between(_levels(fill, config), values[0], values[-1], len(values), config)
    return Grid(process.t_at(values), np.append(values, 0.0))


def _flow_shift(config: Mapping[str, Any]) -> float:
    """Diffusers writes one number under two names: ``shift`` (flow schedulers) and ``flow_shift`` (DPM, UniPC)."""
    told = {config[key] for key in ("shift", "flow_shift")} - {1.0}
    if len(told) > 1:
        raise ValueError(f"shift={config['shift']} contradicts flow_shift={config['flow_shift']}; set one of them")
    return told.pop() if told else 1.0


def _fill(config: Mapping[str, Any]) -> str | None:
    """The one word that is on and fills a range with levels, Diffusers' or ours, if any."""
    told = [word for word in FILLS if config[word]]
    if len(told) > 1:
        raise ValueError(f"{' and '.join(told)} are both on; set one of them")
    if told and config.get("spacing"):
        raise ValueError(f"spacing={config['spacing']!r} contradicts {told[0]}=True; set one of them")
    own = config.get("spacing")
    return told[0] if told else own if own in OWN_FILLS else None


def _levels(fill: str, config: Mapping[str, Any]) -> Callable[..., np.ndarray]:
    """The formula of a word that fills a range, its parameters set."""
    given = {name: config[option] for option, (_, name) in PARAMETERS.items() if config.get(option) is not None}
    return partial({**FILLS, **OWN_FILLS}[fill], **given)


def _between(levels: Callable[..., np.ndarray], high: float, low: float, steps: int, config: Mapping[str, Any]) -> np.ndarray:
    """Sigmas between the config's ``sigma_max`` and ``sigma_min``, or else between the ends of the grid they replace."""
    high = high if config["sigma_max"] is None else config["sigma_max"]
    low = low if config["sigma_min"] is None else config["sigma_min"]
    return levels(steps, sigma_min=low, sigma_max=high) if steps > 1 else np.array([float(high)])


def _fed(process: Process, convention: Convention, config: Mapping[str, Any], sigmas: np.ndarray) -> np.ndarray:
    """The times the network is fed at the given edm_sigmas."""
    if _continuous(config):
        return 0.25 * np.log(sigmas)
    t = process.t_at(sigmas)
    return np.round(t) if convention.whole_t else t


def _continuous(config: Mapping[str, Any]) -> bool:
    """Stable Video Diffusion's networks take log(edm_sigma) / 4 for a time."""
    return config["timestep_type"] == "continuous" and config["prediction_type"] == "v_prediction"


def _final_sigma(config: Mapping[str, Any], process: Process) -> float:
    match config["final_sigmas_type"]:
        case "zero":
            return 0.0
        case "sigma_min":
            return 0.0 if process.edm_sigmas is None else float(process.edm_sigmas[0])
        case unknown:
            raise ValueError(f"final_sigmas_type={unknown!r} is not one of zero, sigma_min")


def _checked(values: np.ndarray, name: str, *, at_least: int) -> np.ndarray:
    if values.ndim != 1 or len(values) < at_least:
        raise ValueError(f"{name} must be a flat list of at least {at_least} numbers, got shape {values.shape}")
    if not np.all(np.isfinite(values)) or np.any(values < 0) or np.any(np.diff(values) >= 0):
        raise ValueError(f"{name} must be finite, not negative, and fall strictly; got {values.tolist()}")
    return values


def _refuse_unknown_words(config: Mapping[str, Any]) -> None:
    """A grid word that would be ignored is refused."""
    if config["invert_sigmas"]:
        raise ValueError("invert_sigmas=True is not supported; timestep_spacing, timesteps and sigmas are")
    if config.get("spacing") not in (None, *OWN_SPACINGS):
        raise ValueError(f"spacing={config['spacing']!r} is not one of {', '.join(OWN_SPACINGS)}; timestep_spacing knows Diffusers' own")
    for option, (reader, _) in PARAMETERS.items():
        if config.get(option) is not None and config.get("spacing") != reader:
            raise ValueError(f"{option}={config[option]} has no effect without spacing={reader!r}; set both or neither")
    if config["interpolation_type"] != "linear":
        raise ValueError(f"interpolation_type={config['interpolation_type']!r} is not supported; only linear is")
