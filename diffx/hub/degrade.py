"""Checkpoints that load everywhere: a stock scheduler for those without diffx, and ours beside it under a key that nobody else reads.

Diffusers carries keys of a scheduler config that begin with an underscore through loading, swapping and saving, unread. Under
``_diffx`` lies {"class", "config"} of our scheduler, and under "beside" the stock one that it was written beside, so that a
later change of that one is noticed.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import diffusers.utils.logging
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..families import remade
from ..files import replacing
from ..loading import resolve
from ..schedulers import SAMPLERS, Calibrated, TableScheduler
from ..schedulers.process import is_flow
from .repository import check_index, check_weights, file_of, read_object

KEY = "_diffx"
CLASSES: dict[str, type[TableScheduler]] = {cls.__name__: cls for cls in (*SAMPLERS, Calibrated)}
# Who samples where diffx is absent. Pipelines of flow models hand their scheduler sigmas and mu, which not every stock class takes.
TWINS = {
    "DDIM": "DDIMScheduler",
    "DDPM": "DDPMScheduler",
    "DEIS": "DEISMultistepScheduler",
    "LCM": "LCMScheduler",
    "LMS": "LMSDiscreteScheduler",
    "Calibrated": "DPMSolverMultistepScheduler",
    "DPMSolver": "DPMSolverMultistepScheduler",
    "DPMSolverSinglestep": "DPMSolverSinglestepScheduler",
    "Euler": "EulerDiscreteScheduler",
    "EulerAncestral": "EulerAncestralDiscreteScheduler",
    "Heun": "HeunDiscreteScheduler",
    "UniPC": "UniPCMultistepScheduler",
}
FLOW_TWINS = {"LCM": "FlowMatchLCMScheduler"}
FLOW_TWIN = "FlowMatchEulerDiscreteScheduler"
GENERAL = ("DDIMScheduler", "EulerDiscreteScheduler")  # between them they know every option of models with betas
# The options that say which model it is: a class that lacks one, where it has not its usual value, would sample another.
PROCESS = {
    key: TableScheduler.options[key]
    for key in ("prediction_type", "rescale_betas_zero_snr", "timestep_type", "trained_betas", "use_flow_sigmas", "flow_shift")
}


def save_pretrained(pipe: DiffusionPipeline, folder: str | Path, **options: Any) -> Path:
    """Save a pipeline so that it loads everywhere: with a stock scheduler in Diffusers alone, with its own in diffx.

    What else lies at the top of ``folder`` stays; it is written whole or not at all. Other schedulers than diffx's are saved as
    they are. ``diffx.from_pretrained`` and ``diffx.upgrade`` restore what was saved.

    Args:
        options: of the pipeline's own ``save_pretrained``, but ``push_to_hub``.

    Raises:
        ValueError: no pipeline, no folder, pickles are asked for, or a scheduler class that is not one of diffx's own.
    """
    if options.pop("push_to_hub", False):
        raise ValueError("push_to_hub=True: use diffx.push_to_hub(pipe, repo_id), which names the repository")
    _refuse_pickles(options)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file; give a folder")
    if folder.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{str(folder)!r} is where this process works, and a folder is replaced as a whole; give one inside it")
    plain = degraded(pipe)
    with replacing(folder, keep=True) as scratch:
        plain.save_pretrained(scratch, **options)
    return folder


def from_pretrained(source: str | Path, **options: Any) -> DiffusionPipeline:
    """A pipeline from a folder or Hub id, with the scheduler that ``diffx.save_pretrained`` wrote; of any other checkpoint as it is.

    Args:
        options: of ``DiffusionPipeline.from_pretrained``. Weights are read from safetensors only, and code from a repository
            runs only with ``trust_remote_code=True``.

    Raises:
        ValueError: it does not load, or its scheduler was changed since, as ``upgrade`` says.
    """
    if options.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False reads pickles, which can run any code; diffx reads safetensors only")
    resolved = resolve(source)
    where = {key: options[key] for key in ("revision", "token", "cache_dir", "local_files_only", "force_download") if key in options}
    file = file_of(resolved, diffusers.DiffusionPipeline.config_name, **where)
    if file is None:
        raise ValueError(f"{resolved!r} holds no model_index.json; diffx.AutoScheduler loads a scheduler alone")
    index = read_object(file)
    check_index(index)
    check_weights(Path(resolved), index)
    try:
        pipe = DiffusionPipeline.from_pretrained(resolved, **{"use_safetensors": True, **options})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # each kind of broken file has its own
        raise ValueError(f"{str(source)!r} did not load ({type(error).__name__}: {error})") from error
    return upgrade(pipe) if _entries(pipe) else pipe


def upgrade(pipe: DiffusionPipeline, *, force: bool = False) -> DiffusionPipeline:
    """The same pipeline with the diffx schedulers that lie in the configs of its stock ones.

    Args:
        force: restore what was saved even where the stock scheduler was changed since.

    Raises:
        ValueError: there is nothing to restore, it cannot be read, or the stock scheduler has another class or other options
            than the one that was written; the message names them.
    """
    entries = _entries(pipe)
    if not entries and not _own(pipe):
        raise ValueError(
            f"no scheduler of this {type(pipe).__name__} was saved by diffx.save_pretrained; "
            "to swap one: pipe.scheduler = diffx.UniPC.from_config(pipe.scheduler.config)"
        )
    restored = {name: restore(scheduler, force=force) for name, scheduler in entries.items()}
    for name, scheduler in restored.items():
        setattr(pipe, name, scheduler)
    return pipe


def degraded(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with stock schedulers in the place of ours, and the same other components.

    Raises:
        ValueError: it is no pipeline, or has a scheduler class that is not one of diffx's own.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"a Diffusers pipeline is needed, got {type(pipe).__name__}")
    ours = _own(pipe)
    if not ours:
        return pipe
    with _quiet():
        plain = remade(pipe, **{name: stock_of(scheduler) for name, scheduler in ours.items()})
    for name, scheduler in ours.items():
        stock = getattr(plain, name)
        beside = {"class": type(stock).__name__, "config": _public(stock.config)}
        kept = {key: value for key, value in scheduler.config.items() if key not in (KEY, "_class_name", "_diffusers_version")}
        stock.register_to_config(**{KEY: _plain({"class": type(scheduler).__name__, "config": kept, "beside": beside})})
    return plain


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Schedulers and pipelines correct configs and say so. They do it here, so that whoever loads the result hears nothing."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def stock_of(scheduler: TableScheduler) -> Any:
    """The scheduler of Diffusers that samples the same model most nearly as ours does.

    Raises:
        ValueError: its class is not one of diffx's own, which alone can be restored by name.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if CLASSES.get(name) is not type(scheduler):
        raise ValueError(
            f"{name} is not one of diffx's own schedulers ({', '.join(CLASSES)}), so that diffx could not restore it; "
            "save it with its scheduler.py instead, as schedulers/gradient_estimation does"
        )
    # Flow models that came with DPM-Solver or UniPC keep one of them: their pipelines are made for its options.
    by_sigmas = is_flow(config) and not config.get("use_flow_sigmas")
    names = (FLOW_TWINS.get(name, FLOW_TWIN),) if by_sigmas else (TWINS[name], "UniPCMultistepScheduler", *GENERAL)
    made = (_made(getattr(diffusers, twin), config) for twin in names)
    stock = next((each for each in made if each is not None), None)
    if stock is None:
        raise ValueError(f"no scheduler of Diffusers samples what this {name} samples: {_public(config)}")
    return stock


def _made(cls: Any, config: Mapping[str, Any]) -> Any:
    """A stock scheduler with all of the config that it knows; None where that is not enough."""
    given = {key: value for key, value in _public(config).items() if key not in config.get("_use_default_values", ())}
    init = inspect.signature(cls.__init__).parameters
    by_sigmas = cls.__name__.startswith("FlowMatch")
    if not by_sigmas and any(given.get(key, default) != default for key, default in PROCESS.items() if key not in init):
        return None
    if cls is diffusers.EulerAncestralDiscreteScheduler and config.get("prediction_type") == "sample":
        return None  # which it refuses at its first step only
    # Keys of other stock classes ride along for later swaps, where the class lets them.
    known = {key for each in cls._compatibles for key in inspect.signature(getattr(diffusers, each).__init__).parameters}
    try:
        scheduler: Any = cls.from_config({key: value for key, value in given.items() if key in init or key in known})
        # A number that no order divides: at such a one Diffusers' single-step solvers correct their config.
        scheduler.set_timesteps(5, **({"mu": 1.0} if by_sigmas and config.get("use_dynamic_shifting") else {}))
    except (ValueError, NotImplementedError, TypeError, AssertionError):  # an option whose value this class refuses
        return None
    # Without a run, but with the correction, which would look like a change at the first run elsewhere.
    return cls.from_config(_public(scheduler.config))


def restore(scheduler: Any, *, force: bool = False) -> TableScheduler:
    """Our scheduler that lies in the config of a stock one.

    Raises:
        ValueError: as ``upgrade``.
    """
    entry = scheduler.config[KEY]
    cls, config, beside = _checked(entry)
    if not force and (changed := _changes(scheduler, beside)):
        raise ValueError(
            f"the scheduler was changed since diffx.save_pretrained wrote it: {'; '.join(changed)}. To keep the change: "
            f"pipe.scheduler = diffx.{cls.__name__}.from_config(pipe.scheduler.config); to undo it: diffx.upgrade(pipe, force=True)"
        )
    known = cls.options | cls.own_options
    try:
        restored = cls(**{key: value for key, value in config.items() if key in known})
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{KEY} of the scheduler config: {cls.__name__} refuses what was saved: {error}") from error
    restored.register_to_config(**config)  # which classes' defaults were used, and the options of others
    return restored


def _checked(entry: Any) -> tuple[type[TableScheduler], Mapping[str, Any], Mapping[str, Any]]:
    beside = entry.get("beside") if isinstance(entry, Mapping) else None
    if (
        not isinstance(entry, Mapping)
        or not isinstance(entry.get("class"), str)
        or not isinstance(entry.get("config"), Mapping)
        or not isinstance(beside, Mapping)
        or not isinstance(beside.get("class"), str)
        or not isinstance(beside.get("config"), Mapping)
    ):
        raise ValueError(
            f'{KEY} of the scheduler config must be {{"class": name, "config": {{...}}, "beside": {{"class": name, "config": {{...}}}}}}, '
            f"got {entry!r:.200}; it is written by diffx.save_pretrained, and without it the scheduler is a stock one"
        )
    if entry["class"] not in CLASSES:
        raise ValueError(
            f"{KEY} of the scheduler config names the class {entry['class']!r}, which this diffx does not have; "
            f"it has {', '.join(CLASSES)}. A newer diffx may; the stock scheduler works as it is"
        )
    return CLASSES[entry["class"]], entry["config"], beside


def _changes(scheduler: Any, beside: Mapping[str, Any]) -> list[str]:
    """What differs between a stock scheduler and the one that was written, in words."""
    now, name = _plain(_public(scheduler.config)), type(scheduler).__name__
    changed = [] if name == beside["class"] else [f"it is {name}, was {beside['class']}"]
    # Keys that only one has are of another class, or of another release of Diffusers.
    for key, was in beside["config"].items():
        if key in now and now[key] != was:
            changed.append(f"{key} is {now[key]!r}, was {was!r}")
    return changed


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key[0] != "_"}


def _plain(value: Any) -> Any:
    """The value as it comes back from a file."""
    return json.loads(json.dumps(value, default=lambda other: other.tolist()))


def _own(pipe: DiffusionPipeline) -> dict[str, TableScheduler]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, TableScheduler)}


def _entries(pipe: DiffusionPipeline) -> dict[str, Any]:
    """The stock schedulers of a pipeline that have one of ours in their config."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, diffusers.SchedulerMixin)}
    return {name: part for name, part in parts.items() if not isinstance(part, TableScheduler) and KEY in part.config}  # type: ignore[attr-defined]  # schedulers have a config


def _refuse_pickles(options: Mapping[str, Any]) -> None:
    if options.get("safe_serialization") is False:
        raise ValueError("safe_serialization=False writes pickles, which can run any code; diffx writes safetensors only")
