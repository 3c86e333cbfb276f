"""Schedulers from one word: a diffx class, a class of Diffusers, a folder or a Hub id."""

import difflib
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SCHEDULER_CONFIG_NAME, SchedulerMixin

from ..loading import EMBEDDED_SAMPLERS
from ..schedulers import SAMPLERS, Calibrated
from ..schedulers.process import is_flow

STOCK = "diffusers:"
SPEC = re.compile(r"(?P<name>(?:diffusers:)?[A-Za-z_]\w*)(?:[:?](?P<options>.*))?")
COUNTED = re.compile(r"(?P<spec>.+)@(?P<count>[^@/?]*)")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A sampler folder must have been made for the same training process; other keys are the sampler's own business.
PROCESS_KEYS = ("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end")


def make_sampler(spec: str, config: Mapping[str, Any]) -> SchedulerMixin:
    """A scheduler for the model whose scheduler config is ``config``.

    Args:
        spec: "UniPC" (a diffx class), "diffusers:DDIMScheduler" (any of Diffusers'), or a folder or Hub id that holds a
            scheduler_config.json, itself or in its folder "scheduler", of one of those classes. Options follow a colon or a
            question mark: "DPMSolver:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true" (after a folder or id only "?").
            "emoji_calibrated_6" is the folder of that name in the package, the embedded model's table. Of a student's folder it is
            the scheduler alone; ``make_candidate`` brings the weights, too.

    Raises:
        ValueError: an unknown class or option (the message names the nearest and lists all), an option of the wrong kind, a
            folder or id without a readable config, or one made for another noise process than ``config``. No code from a
            folder or repository is ever run.
    """
    found = SPEC.fullmatch(spec)
    if found and found["name"] in EMBEDDED_SAMPLERS:
        source, text = found["name"], found["options"] or ""
    elif found and (found["name"] in class_names() or not Path(spec).is_dir()):
        cls = _class(found["name"])
        return _build(cls, dict(config), _options(cls, found["options"] or ""), spec)
    else:
        source, _, text = spec.partition("?")
    saved = _saved_config(source)
    saved_class = saved.get("_class_name", "")
    saved_class = saved_class[-1] if isinstance(saved_class, list) else saved_class
    known = {**class_names(), Calibrated.__name__: Calibrated}  # which without a table is no sampler
    if saved_class not in known and STOCK + str(saved_class) not in known:
        raise ValueError(f"sampler {source!r}: its class {saved_class!r} is no scheduler of Diffusers or diffx, and no other code is run")
    cls = known[saved_class] if saved_class in known else known[STOCK + saved_class]
    if saved_class not in known and "_diffx" in saved:  # written by diffx.save_pretrained: ours is meant
        from ..hub.degrade import restore

        ours = restore(_build(cls, saved, {}, spec))
        cls, saved = type(ours), dict(ours.config)
    if is_flow(saved) != is_flow(config):
        raise ValueError(f"sampler {source!r} is for models of {_kind(saved)}, this one has {_kind(config)}")
    for key in PROCESS_KEYS:
        if key in saved and key in config and saved[key] != config[key]:
            raise ValueError(f"sampler {source!r} was made for {key}={saved[key]!r}, the model has {config[key]!r}")
    return _build(cls, saved, _options(cls, text), spec)


def split_count(word: str) -> tuple[str, int | None]:
    """A sampler of a comparison as ``make_sampler`` takes it, and the number of steps that follows its "@"; None where none does.

    Raises:
        ValueError: what follows is no number from 1 on.
    """
    found = COUNTED.fullmatch(word)
    if not found or Path(word).expanduser().is_dir():
        return word, None
    if not re.fullmatch(r"[1-9][0-9]*", found["count"]):
        raise ValueError(f"sampler {word!r}: after @ comes a number of steps from 1 on, as in {found['spec']}@6")
    return found["spec"], int(found["count"])


def class_names() -> dict[str, type[SchedulerMixin]]:
    """Every class that a spec can name: diffx's by their own names, Diffusers' as "diffusers:ClassName"."""
    stock = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    usable = {STOCK + name: cls for name, cls in stock.items() if isinstance(cls, type) and issubclass(cls, SchedulerMixin)}
    return {cls.__name__: cls for cls in SAMPLERS} | usable


def folder_of(source: str) -> Path:
    """The folder that a word names, there or not: one of the package's, or the user's own."""
    return EMBEDDED_SAMPLERS.get(source, Path(source).expanduser())


def is_control(spec: str) -> bool:
    """Whether a sampler is Diffusers' own, beside which ours are measured."""
    return spec.startswith(STOCK)


def _class(name: str) -> type[SchedulerMixin]:
    known = class_names()
    if name in known:
        return known[name]
    words = [*known, *EMBEDDED_SAMPLERS]
    listed = [other for other in words if is_control(other) == is_control(name)]
    nearest = difflib.get_close_matches(name, words, 1, 0.0)[0]
    raise ValueError(
        f"unknown sampler {name!r}; the nearest is {nearest!r}; known: {', '.join(listed)}"
        + ("" if is_control(name) else "; Diffusers' own as diffusers:ClassName; or a folder or Hub id with a scheduler_config.json")
    )


def _build(cls: Any, config: dict, options: dict, spec: str) -> SchedulerMixin:
    try:
        return cls.from_config(config, **options)
    except (TypeError, NotImplementedError) as error:  # Diffusers' classes raise these for values they do not know
        raise ValueError(f"sampler {spec!r}: {cls.__name__} refuses its options: {error}") from error


def _options(cls: type[SchedulerMixin], text: str) -> dict[str, Any]:
    """The options in "key=value,key=value", checked against the names and the kinds of defaults in ``cls.__init__``."""
    known = {k: p for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self" and p.kind is not p.VAR_KEYWORD}
    options: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals or key in options:
            raise ValueError(f"sampler option {part!r} must be key=value, each key once")
        if key not in known:
            raise ValueError(f"{cls.__name__} has no option {key!r}{_nearest(key, known)}; it has {', '.join(known)}")
        options[key] = _value(value)
        default = known[key].default
        wanted = {bool: (bool,), int: (int,), float: (int, float), str: (str, type(None))}.get(type(default))
        if wanted and type(options[key]) not in wanted:
            raise ValueError(f"{cls.__name__}: {key}={value!r} must be of the kind of its default, {default!r}")
    return options


def _value(text: str) -> Any:
    """True, 2, 0.5 or None as such, anything else as a string."""
    lower = text.strip().lower()
    try:
        return json.loads({"none": "null"}.get(lower, lower))
    except json.JSONDecodeError:
        return text.strip()


def _kind(config: Mapping[str, Any]) -> str:
    return "flow" if is_flow(config) else "betas"


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _saved_config(source: str) -> dict[str, Any]:
    folder = folder_of(source)
    if folder.is_dir():
        files = [file for file in (folder / SCHEDULER_CONFIG_NAME, folder / "scheduler" / SCHEDULER_CONFIG_NAME) if file.is_file()]
        if not files:
            raise ValueError(f"sampler folder {source!r} holds no {SCHEDULER_CONFIG_NAME}, nor does its folder 'scheduler'")
        file = files[0]
    elif HUB_ID.fullmatch(source):
        file = Path(_downloaded(source))
    else:
        hint = "; only comparisons take steps after @" if "@" in source else ""
        raise ValueError(f"sampler {source!r} is no folder here, no class, and a Hub id has the form owner/name{hint}")
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"sampler {source!r}: {file.name} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"sampler {source!r}: {file.name} holds a {type(config).__name__}, not an object with options")
    return config


def _downloaded(repo_id: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        try:
            return hf_hub_download(repo_id, SCHEDULER_CONFIG_NAME)
        except EntryNotFoundError:  # also "not in the cache" while offline, where the other place may be
            return hf_hub_download(repo_id, SCHEDULER_CONFIG_NAME, subfolder="scheduler")
    except (EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(f"sampler {repo_id!r}: no {SCHEDULER_CONFIG_NAME} there, or the Hub is out of reach: {error}") from error
