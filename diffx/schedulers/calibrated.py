"""Calibrated: a sampler whose grid and weights were learned for one model, number of calls and guidance, and lie in its config."""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch

from .grid import Convention, Grid, is_pipeline_default
from .multistep import dpmpp
from .process import Process
from .scheduler import TableScheduler
from .table import Row, Table

SHARED = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A learned run of N calls, in plain numbers, and what it was learned for.

    Raises:
        ValueError: lengths or numbers that cannot be a run; the message names the entry.
    """

    levels: Sequence[float]  # (N + 1,) sigma / (alpha + sigma), falling from at most 1 (pure noise) to 0 (clean); Heun's repeat
    timesteps: Sequence[float]  # (N,) what the network is fed
    rows: Sequence[Sequence[float]]  # N rows: weights of the sample, the newest x0 prediction, older ones
    guidance_scale: float | None = None
    model: str | None = None  # fingerprint of the network's config, see ``fingerprint``
    process: Mapping[str, Any] = field(default_factory=dict)  # how the model was noised, see ``SHARED``
    mu: float | None = None  # of flow models with dynamic shifting: the picture size it was learned at
    errors: Mapping[str, float] = field(default_factory=dict)  # mean RMS distance to the reference on held-out noises and prompts, by stage
    made_with: Mapping[str, Any] = field(default_factory=dict)  # reference, counts, seed

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Calibration":
        """The calibration in a config."""
        known = [f.name for f in fields(cls)]
        if not isinstance(content, Mapping) or set(content) - set(known) or not {"levels", "timesteps", "rows"} <= set(content):
            raise ValueError(f"calibration must be an object with levels, timesteps and rows, of {', '.join(known)}; got {content!r:.200}")
        return cls(**content)

    def __post_init__(self) -> None:
        calls = len(self.rows)
        for name, length in (("timesteps", calls), ("levels", calls + 1)):
            if len(getattr(self, name)) != length:
                raise ValueError(f"calibration: {calls} rows need {length} {name}, got {len(getattr(self, name))}")
            if not np.all(np.isfinite(np.asarray(getattr(self, name), np.float64))):
                raise ValueError(f"calibration: {name} must be finite numbers, got {list(getattr(self, name))}")
        if calls < 1 or not (1 >= self.levels[0] and self.levels[-1] == 0 and np.all(np.diff(self.levels) <= 0)):
            raise ValueError(f"calibration: levels must fall from at most 1 to 0, got {list(self.levels)}")
        if np.any(np.diff(self.timesteps) > 0):
            raise ValueError(f"calibration: timesteps must not rise, got {list(self.timesteps)}")
        for k, row in enumerate(self.rows):
            if not 2 <= len(row) <= k + 2:
                raise ValueError(f"calibration: row {k} has {len(row)} weights; it can weigh the sample and up to {k + 1} predictions")

    @property
    def num_inference_steps(self) -> int:
        """N, the number of network calls."""
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, without what is empty."""
        return {key: value for key, value in asdict(self).items() if value not in (None, {})}


class Calibrated(
    TableScheduler, options=dict(timestep_spacing="trailing", clip_sample=False, clip_sample_range=1.0), own=dict(calibration=None)
):
    """A learned table, for the model, the number of calls and the guidance scale that ``diffx.calibrate`` made it for.

    Another number of steps, or times of the caller's own, warns and runs DPM-Solver++ 2M. A run from the middle (image to image)
    keeps the weights, and gives those of predictions that are not there to the oldest that is.

    Source: learned multistep weights and grids are those of Tong et al. 2024 (arXiv:2405.15506, LD3), Shaul et al. 2024
    (arXiv:2403.01329, BNS) and Frankel et al. 2025 (arXiv:2502.17423, S4S); the parametrisation is ours.
    """

    zero_snr = 0.0
    convention = Convention(whole_t=False)

    def _check_options(self) -> None:
        super()._check_options()
        content = self.config.get("calibration")
        if content is None:
            raise ValueError("Calibrated needs a table: make one with diffx.calibrate(pipe, ...), or load one with from_pretrained(folder)")
        self._calibration = Calibration.from_dict(content)
        for key, value in self._calibration.process.items():
            if self.config[key] != value:
                raise ValueError(f"this table was calibrated for {key}={value!r}, the model has {self.config[key]!r}; calibrate that model")
        self._learned_table(*self._process.levels(self._learned_grid().sigmas), 0)  # refuses a table that leaves its noise levels

    @property
    def calibration(self) -> Calibration:
        """The learned numbers and what they were learned for."""
        return self._calibration

    def misfits(self, pipe: Any, *, guidance_scale: float | None = None) -> list[str]:
        """What differs between ``pipe`` at ``guidance_scale`` and what this table was calibrated for; empty where nothing does."""
        made, found, model = self._calibration, [], fingerprint(pipe)
        if guidance_scale is not None and made.guidance_scale is not None and not math.isclose(guidance_scale, made.guidance_scale):
            found.append(f"calibrated at guidance_scale={made.guidance_scale:g}, used at {guidance_scale:g}")
        if made.model is not None and made.model != model:
            found.append(f"calibrated for the network {made.model}, used with {model}")
        return found

    def warn_of_misfits(self, pipe: Any, guidance_scale: float) -> None:
        """A warning for each of ``misfits``: for callers that know what the scheduler cannot see."""
        for text in self.misfits(pipe, guidance_scale=guidance_scale):
            warnings.warn(f"{text}; a calibrated table is made for one model and guidance", stacklevel=2)

    def _make_grid(self, num_inference_steps=None, timesteps=None, sigmas=None, mu=None) -> Grid:
        made, flow = self._calibration, self._process.frame == "flow"
        steps = len(sigmas) if sigmas is not None else num_inference_steps
        own = timesteps is not None or (sigmas is not None and not (flow and is_pipeline_default(sigmas)))
        self._as_learned = steps == made.num_inference_steps and not own
        if self._as_learned:
            if mu is not None and made.mu is not None and not math.isclose(mu, made.mu, rel_tol=1e-3):
                warnings.warn(f"this table was calibrated for another picture size (mu={made.mu:g}, here mu={mu:g})", stacklevel=2)
            return self._learned_grid()
        asked = "times of the caller's own" if own else f"{steps} steps"
        warnings.warn(
            f"this table was calibrated for {made.num_inference_steps} steps, asked were {asked}: DPM-Solver++ 2M runs instead",
            stacklevel=2,
        )
        return super()._make_grid(num_inference_steps, timesteps, sigmas, mu)

    def _learned_grid(self) -> Grid:
        return Grid(np.asarray(self._calibration.timesteps, np.float64), sigmas_of(self._calibration.levels, self._process))

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        if self._as_learned:
            return self._learned_table(alpha[begin:], sigma[begin:], begin)
        orders = [min(2, i + 1) for i in range(len(sigma) - 1 - begin)]
        return Table(alpha[begin:], sigma[begin:], tuple(dpmpp(alpha[begin:], sigma[begin:], orders)))

    def _learned_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int) -> Table:
        rows = []
        for i, (keep, *weights) in enumerate(self._calibration.rows[begin:]):
            known, missing = weights[: i + 1], weights[i + 1 :]
            rows.append(Row((keep, *known[:-1], known[-1] + sum(missing))))
        return Table(alpha, sigma, tuple(rows))


def sigmas_of(levels: Sequence[float] | np.ndarray, process: Process) -> np.ndarray:
    """Grid values at levels sigma / (alpha + sigma): sigma / alpha for models with betas, the levels themselves for flow."""
    values = np.asarray(levels, np.float64)
    with np.errstate(divide="ignore"):  # pure noise has sigma / alpha = inf
        return values if process.frame == "flow" else values / (1 - values)


def network_of(pipe: Any) -> torch.nn.Module:
    """The network that a pipeline calls at every step.

    Raises:
        ValueError: it has neither unet nor transformer.
    """
    for name in ("unet", "transformer"):
        if isinstance(network := pipe.components.get(name), torch.nn.Module):
            return network
    raise ValueError(f"{type(pipe).__name__} has no unet or transformer; its components are {', '.join(pipe.components)}")


def fingerprint(pipe: Any) -> str:
    """The class of a pipeline's network and a hash of its config: the same for every checkpoint of one architecture."""
    network: Any = network_of(pipe)
    public = {key: value for key, value in network.config.items() if not key.startswith("_")}
    digest = hashlib.blake2b(json.dumps(public, sort_keys=True, default=str).encode(), digest_size=4)
    return f"{type(network).__name__}-{digest.hexdigest()}"
