"""The Diffusers scheduler contract on top of process, grid, table and noise: one class, of which every solver is a few lines."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, ClassVar, Self
from weakref import ref

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .clip import make_x0_map
from .error import Tracker, error_weights
from .fitting import DISTILLED, NOISE_LEVEL, SCALED, fitted, refuse
from .grid import Convention, Grid, make_grid, sigmas_at
from .noise import keyed_normal, seeds_of
from .options import Configured
from .plan import Plan, make_plan
from .process import Frame, Process, cumulative_alphas, make_betas, make_process
from .table import State, Table, advance, combine
from .turn import ONE_RUN, SETTING, HandedOut, Run, Turn, in_turn

_NOT_PASSED: Any = object()


@dataclass
class StepOutput(BaseOutput):
    """The next sample, and the clean sample the network predicts, both in the dtype of the network's output."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class TableScheduler(Configured):
    """Base of every diffx scheduler; a drop-in for Diffusers pipelines of epsilon, sample, v and flow models.

    A subclass names its options (Diffusers' keywords and defaults of its twin), its frame and grid convention, and makes the
    table of a run; nothing else. See CONTRIBUTING for an example in ten lines.

    Options besides Diffusers' own:
        seed: whole number, or one per sample, that keys the noise of stochastic solvers in pipelines that hand no generator to
            ``step``. Without it the key is a checksum of each sample's first latent, hence of ``pipe(generator=...)``.
        spacing: a grid that Diffusers lacks, instead of ``timestep_spacing``. For models with betas "quadratic", or "ays_sd",
            "ays_sdxl", "ays_svd" (the schedules of Align Your Steps, for any number of steps); for all models "polyexponential",
            "beta" or "logsnr" (even in the log of alpha / sigma), between the ends that ``use_karras_sigmas`` would have.
        spacing_rho: the power of "polyexponential", by default 1, which is exponential; more puts more steps at low noise.
        spacing_alpha, spacing_beta: the shapes of "beta", by default 0.6 like those of Diffusers' ``use_beta_sigmas``; at most 10.
        track_error: estimate the error of every step from the predictions at hand, see ``errors`` (keeps up to four of them).
        check_finite: raise at the first network output that holds NaN or infinity (reads the device at every step).
    """

    order = 1  # network calls per interval, in Diffusers' sense of the word
    frame: ClassVar[Frame] = "vp"
    convention: ClassVar[Convention] = Convention()
    zero_snr: ClassVar[float] = 2.0**-24

    def _set_up(self) -> None:
        self._process = self._make_process()
        self._check_options()
        self.betas = make_betas(self.config)
        self.alphas_cumprod = cumulative_alphas(self.betas)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.config.num_train_timesteps - 1, -1, -1)
        table = self._process.edm_sigmas
        sigmas = (self._process.sigma_at(np.arange(self.config.num_train_timesteps)) if table is None else table)[::-1]
        self.sigmas = torch.tensor(np.append(sigmas, 0.0), dtype=torch.float32)
        self._grid: Grid | None = None
        self._turn = Turn()
        self._handed_out = HandedOut()

    def make_table(self, alpha: np.ndarray, sigma: np.ndarray, begin: int, **run_options: Any) -> Table:
        """The table of the calls ``begin`` .. N - 1; what a subclass defines.

        Args:
            alpha, sigma: (N + 1,) the noise levels of all N calls and of the end, in this class's frame.
            run_options: extra arguments of the subclass's ``step``.
        """
        raise NotImplementedError

    def _read_run_options(self) -> None:
        """Keep the options that every step needs; called by ``set_timesteps``, since pipelines rewrite the config before it."""
        self._check_finite = bool(self.config.get("check_finite"))
        self._track_error = bool(self.config.get("track_error"))
        self._x0_map = make_x0_map(self.config)

    def _check_options(self) -> None:
        """Refuse, at construction, option values that could only fail later."""
        spacing, told = self.config.get("spacing"), self.config.timestep_spacing
        if spacing is not None and told != self.options["timestep_spacing"]:
            raise ValueError(f"spacing={spacing!r} contradicts timestep_spacing={told!r}; set one of them")
        if self.config.stochastic_sampling:
            raise ValueError("stochastic_sampling=True is not supported; use DPMSolver(algorithm_type='sde-dpmsolver++')")

    def _make_process(self) -> Process:
        return make_process(self.config, self.frame, zero_snr=self.zero_snr)

    def _grid_config(self) -> Mapping[str, Any]:
        """The config in the words of ``grid``."""
        return self.config

    def _make_grid(self, *wanted: Any) -> Grid:
        """The grid of a run, one entry per interval, from the arguments of ``set_timesteps``."""
        return make_grid(self._process, self.convention, self._grid_config(), *wanted)

    # --- before the run ---------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = _NOT_PASSED,
    ) -> None:
        """Choose the times of the next run and forget the last one. See ``grid.make_grid`` for the arguments and errors.

        Raises:
            ValueError: ``original_inference_steps`` was passed, by a pipeline for distilled networks; only ``LCM`` takes it.
        """
        if original_inference_steps is not _NOT_PASSED:
            raise refuse(self, DISTILLED)
        with SETTING:
            self._turn = Turn(get_ident())  # first: a step that is going on in another thread sees that its turn is over
            self._make_run_ready(device, num_inference_steps, timesteps, sigmas, mu)

    def _make_run_ready(self, device, *wanted: Any) -> None:
        self._grid = None  # a refused grid leaves no run behind
        self._process = self._make_process()  # read now: pipelines rewrite the config after construction
        intervals = self._make_grid(*wanted)
        self.num_inference_steps = len(intervals.t)
        grid = intervals.per_call(self.order)
        flow = self._process.frame == "flow"
        dtype = torch.int64 if self.convention.whole_t and not flow and np.array_equal(grid.t, np.round(grid.t)) else torch.float32
        self._handed_out.add(self.timesteps)
        self.timesteps = torch.tensor(grid.t, dtype=dtype).to(device)
        # Diffusers keeps sigmas on the host, but for its flow schedulers.
        self.sigmas = torch.tensor(grid.sigmas, dtype=torch.float32).to(device if flow else "cpu")
        self._levels = self._process.levels(grid.sigmas)
        self._x0_weights = [self._process.x0_weights(a, s) for a, s in zip(*(level[:-1].tolist() for level in self._levels), strict=True)]
        self._read_run_options()
        self._grid = grid
        self._table(0)  # an impossible run is refused here, not after the first network call

    def fork(self) -> Self:
        """An independent scheduler with the same config and grid, at the start of its run: one for each thread or request."""
        other = copy.copy(self)
        other._internal_dict = copy.deepcopy(other._internal_dict)
        other.timesteps, other.sigmas = other.timesteps.clone(), other.sigmas.clone()
        other._turn = Turn(other._turn.thread)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """What copies are made of: the same place in the run, claimed by the first thread that uses the copy."""
        with SETTING:
            return {**vars(self), "_turn": self._turn.copy(), "_handed_out": HandedOut()}

    @in_turn
    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this index of ``timesteps`` (img2img)."""
        turn = self._turn.claim()
        if self._grid is not None and not 0 <= begin_index < len(self._grid.t):
            raise ValueError(f"begin_index={begin_index} must lie between 0 and {len(self._grid.t) - 1}")
        self._refuse_mid_interval(begin_index)
        if turn.run is not None and turn.run.under_way and begin_index != turn.begin_index:
            raise ValueError(ONE_RUN.format(f"begin_index={begin_index} was set while a run is at index {turn.run.index}"))
        turn.begin_index = begin_index

    @property
    def begin_index(self) -> int | None:
        return self._turn.begin_index

    @property
    def step_index(self) -> int | None:
        """Index of the next call, None before the first one."""
        run = self._turn.run
        return None if run is None else run.index

    @property
    def errors(self) -> tuple[Tensor | None, ...]:
        """Per call done in this run, (B,) float32: the RMS error of each sample's step as ``error.error_weights`` estimates it, or None.

        In units of the sample, on its device, which is not read. Zero where a model is as smooth as the solver takes it to be.

        Raises:
            ValueError: errors are not tracked.
        """
        if not self.config.get("track_error"):
            raise ValueError(f"errors are not tracked; {type(self).__name__}.from_config(config, track_error=True) tracks them")
        run = self._turn.run
        return () if run is None or run.tracker is None else run.tracker.errors

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation that pipelines give the initial latents."""
        if self._process.frame != "ve":
            return 1.0
        top = float(self.sigmas.max())
        return top if self.config.timestep_spacing in ("linspace", "trailing") else math.hypot(top, 1.0)

    def plan(self, begin_index: int = 0) -> Plan:
        """The whole run from ``begin_index`` on, before it starts: one line per network call; ``print(scheduler.plan())``."""
        grid = self._require_grid()
        return make_plan(type(self).__name__, grid, self._table(begin_index), begin_index)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- the run ----------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network is fed: in the VE frame sample / sqrt(edm_sigma^2 + 1) at the coming call, else the sample itself.

        Before ``set_timesteps`` any training time is meant.

        Raises:
            ValueError: a single number in another frame: a noise level, with which the pipeline computes as if alpha were 1.
        """
        if self._process.frame != "ve":
            if not sample.ndim:
                raise refuse(self, NOISE_LEVEL)
            return sample
        return self._scaled(sample, timestep)

    @in_turn
    def _scaled(self, sample: Tensor, timestep: float | Tensor | None) -> Tensor:
        if self._grid is None and timestep is not None:
            sigma = float(self._process.sigma_at(np.array([float(timestep)]))[0])
        else:
            sigma = self._require_grid().sigmas[self._index(timestep) if timestep is not None else self._expected()]
        scaled = sample * (1 / math.hypot(1.0, sigma))
        self._turn.scaled = ref(scaled)
        return scaled

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """The next sample after one network call, and the predicted clean sample.

        Args:
            model_output, sample: (B, ...) what the network returned, and the unscaled sample it was called on.
            timestep: an element of ``timesteps``, or its value. A plain number that is not the next time takes the nearest row
                as a single step without history.
            generator: draws the noise of stochastic solvers; without it the noise is keyed by sample and call.
            variance_noise: the noise itself, instead of drawing it.

        Raises:
            ValueError: a step out of order or past the end, no ``set_timesteps`` yet, or tensors that do not fit each other.
        """
        return self._step(model_output, timestep, sample, generator, variance_noise, return_dict, {})

    @in_turn
    def _step(
        self,
        out: Tensor,
        timestep,
        x: Tensor,
        generator,
        variance_noise,
        return_dict: bool,
        run_options: dict[str, Any],
        noise_scale: Callable[[int], Tensor] | None = None,  # index of the call -> (B, ...) factor on its noise
    ) -> StepOutput | tuple[Tensor, Tensor]:
        turn = self._turn.claim()  # again: another thread may have begun since the guard looked, and its run is not to be moved
        index = self._index(timestep)
        run = turn.run
        if run is None or index != run.index:
            run = self._start_or_refuse(turn, index, timestep, run_options)
        elif run_options and run.options != run_options:  # no row of such a table looks back, so the rest of the run can change
            run.table, run.options = self._table(run.begin, **run_options), run_options
        dtype = out.dtype
        # numel stands for the shape: comparing shapes costs half a kernel, and every mismatch that would broadcast differs here
        if not run.state.call or out.numel() != x.numel() or out.device != x.device:
            if turn.scaled is not None and turn.scaled() is x:
                raise refuse(self, SCALED)
            out = fitted(out, x, learned_variance=self.config.get("variance_type") in ("learned", "learned_range"))
        if x.dtype in _HALF:
            x = x.float()
        if out.dtype != x.dtype:
            out = out.to(x.dtype)
        if self._check_finite and not torch.isfinite(out).all():
            raise ValueError(f"the network's output at call {index} (t={float(timestep):g}) holds NaN or infinity")
        x0 = combine(self._x0_weights[index], x, (out,))
        if self._x0_map is not None:
            x0 = self._x0_map(x0)

        def draw() -> Tensor:
            z = self._draw(run, index, x, dtype, generator, variance_noise)
            return z if noise_scale is None else z * noise_scale(index)

        if run.tracker is not None:
            run.tracker = run.tracker.after(x0)
        sample, run.state = advance(run.table, run.state, x, x0, draw)
        if sample.dtype != dtype:
            sample, x0 = sample.to(dtype), x0.to(dtype)
        return StepOutput(prev_sample=sample, pred_original_sample=x0) if return_dict else (sample, x0)

    def _draw(self, run: Run, index: int, x: Tensor, dtype: torch.dtype, generator, variance_noise: Tensor | None) -> Tensor:
        if variance_noise is not None:
            return variance_noise.to(x)
        if generator is not None:
            return randn_tensor(x.shape, generator=generator, device=x.device, dtype=self._noise_dtype(dtype)).to(x.dtype)
        if run.seeds is None:
            run.seeds = seeds_of(x, self.config.get("seed"))
        return keyed_normal(run.seeds, index, x.shape).to(x)

    def _noise_dtype(self, output_dtype: torch.dtype) -> torch.dtype:
        """In which the twin draws from a generator."""
        return torch.float32

    # --- which call is this -----------------------------------------------------------------------------------------

    def _index(self, timestep: float | Tensor) -> int:
        """Index of ``timestep`` in the grid. For a view of our own ``timesteps`` it is the storage offset: no device is read."""
        if isinstance(timestep, Tensor):
            if timestep._base is self.timesteps and self._grid is not None:
                return int(timestep.storage_offset())
            storage = timestep.untyped_storage()._cdata  # views made in inference mode do not name their base
            if storage == self.timesteps.untyped_storage()._cdata and self._grid is not None:
                return int(timestep.storage_offset())
            if timestep in self._handed_out:
                raise ValueError(ONE_RUN.format("this timestep belongs to an earlier set_timesteps()"))
        times = self._require_grid().t
        value = float(timestep)
        expected = self._expected()
        if expected < len(times) and math.isclose(value, times[expected], rel_tol=1e-6, abs_tol=1e-6):
            return expected
        index = int(np.abs(times - value).argmin())
        index += -index % self.order  # of a time visited twice, the call that begins its interval
        if isinstance(timestep, Tensor) and not math.isclose(value, times[index], rel_tol=1e-6, abs_tol=1e-6):
            raise ValueError(f"timestep {value:g} is not among the {len(times)} times of this run; set_timesteps() chooses them")
        return index

    def _expected(self) -> int:
        turn = self._turn
        return turn.run.index if turn.run is not None else turn.begin_index or 0

    def _start_or_refuse(self, turn: Turn, index: int, timestep, run_options: dict[str, Any]) -> Run:
        """A new run from ``index``; a plain number out of order gets a run of its own that nobody continues."""
        calls = len(self._require_grid().t)
        if turn.run is None and turn.begin_index in (None, index):
            self._refuse_mid_interval(index)
            table = self._table(index, **run_options)
            turn.run = Run(index, table, State(), run_options, tracker=Tracker(error_weights(table)) if self._track_error else None)
            return turn.run
        if not isinstance(timestep, Tensor):
            return Run(index, self._table(index, **run_options), State())
        expected = self._expected()
        if expected == calls:
            raise ValueError(f"all {calls} steps of this run are done; call set_timesteps() to start a new run")
        raise ValueError(
            f"step out of order: got index {index} (t={self._grid.t[index]:g}), expected index {expected} "  # type: ignore[union-attr]
            f"(t={self._grid.t[expected]:g}); one scheduler serves one run at a time, and set_timesteps() starts a new one"  # type: ignore[union-attr]
        )

    def _refuse_mid_interval(self, index: int) -> None:
        if index % self.order:
            raise ValueError(
                f"index {index} is in the middle of an interval of {type(self).__name__}, which calls the network {self.order} times in "
                f"each: begin at a multiple of {self.order}, e.g. {index - index % self.order}"
            )

    def _table(self, begin: int, **run_options: Any) -> Table:
        alpha, sigma = self._levels
        return self.make_table(alpha, sigma, begin, **run_options)

    def _require_grid(self) -> Grid:
        if self._grid is None:
            raise ValueError("call set_timesteps() first: this scheduler has no run yet")
        return self._grid

    # --- the forward process ----------------------------------------------------------------------------------------

    @in_turn
    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(B, ...) alpha x0 + sigma noise in this scheduler's frame.

        In a run that a pipeline placed with ``set_begin_index`` the level is that of the coming call, as in Diffusers;
        otherwise ``timesteps`` (B,) are looked up, in the run's grid if they are of it, else among all training times.
        """
        if self.begin_index is not None and self._grid is not None:
            index = min(self._expected(), len(self._grid.t))
            alpha, sigma = (float(level[index]) for level in self._levels)
            return combine((alpha, sigma), original_samples, (noise.to(original_samples.dtype),))
        t = timesteps.detach().to("cpu", torch.float64).reshape(-1).numpy()
        alpha, sigma = map(torch.from_numpy, self._process.levels(sigmas_at(self._process, self._grid, t)))
        shape = (-1, *(1,) * (original_samples.ndim - 1))
        return alpha.to(original_samples).reshape(shape) * original_samples + sigma.to(original_samples).reshape(shape) * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """``add_noise`` with the argument order of Diffusers' flow schedulers."""
        return self.add_noise(sample, noise, timestep)


_HALF = (torch.float16, torch.bfloat16)
