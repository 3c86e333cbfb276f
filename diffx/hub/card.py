"""Model cards: what a checkpoint is, how stock Diffusers loads it, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from .. import objectives
from ..conditioning.adapter import DESCRIPTION
from ..loading import HUB_ID
from .artifact import ADAPTERS, SAMPLES, Artifact
from .measured import measured, read_evaluation, results
from .snippet import snippet, task

TITLES = {
    "pipeline": "A pipeline",
    "lora": "A LoRA",
    "controlnet": "A ControlNet",
    "ip-adapter": "An IP-Adapter",
    "scheduler": "A scheduler",
    "custom pipeline": "A custom pipeline",
}


def make_card(
    made: Artifact, repo_id: str, *, base_model: str | None = None, license: str | None = None, evaluation: Any = None, token: Any = None
) -> ModelCard:
    """The card of ``made`` in the repository ``repo_id``.

    Args:
        base_model: Hub id of the model it was made of, or is loaded beside; None is the one that its run was begun with.
        license: as the Hub spells it, such as "apache-2.0"; None is the base model's.
        evaluation: an ``Evaluation`` with a row of this very folder, its report.json, or the folder that holds that.
        token: for the card of a private base model.

    Raises:
        ValueError: the base model or the licence is not known, or the evaluation measured something else.
    """
    base = base_of(made, base_model)
    report = None if evaluation is None else read_evaluation(evaluation)
    found, prompt, name = results(made, report), prompt_of(made, report), repo_id.split("/")[-1]
    drawn = made.samples is not None
    data = ModelCardData(
        license=license or inherited_license(made, base, token),
        library_name="diffusers",
        pipeline_tag=task(made),
        base_model=base,
        base_model_relation=None if base is None else "adapter" if made.kind in ADAPTERS else "finetune",
        datasets=[source] if (source := _hub_id(made.described.get("source"))) else None,
        tags=_tags(made),
        widget=[{"text": prompt, "output": {"url": SAMPLES}}] if drawn else None,
        model_name=name if found else None,
        eval_results=found or None,
    )
    parts = [
        f"# {name}",
        _what(made, base),
        f"![Samples]({SAMPLES})" if drawn else "",
        f"## Use\n\n```python\n{snippet(made, repo_id, base, prompt)}\n```",
        f"## Measured\n\n{measured(made, report)}",
        f"## Made\n\n{_training(made)}" if "train" in made.described else "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n")


def base_of(made: Artifact, base_model: str | None = None) -> str | None:
    """The Hub id of the model it was made of; None where a whole pipeline does not say.

    Raises:
        ValueError: it is no Hub id, or it is missing and what is published is loaded beside it.
    """
    given = made.described.get("model", {}).get("from")
    base = base_model or _hub_id(given)
    if base is not None and not HUB_ID.fullmatch(base):
        raise ValueError(f"base_model={base!r} is no Hub id, which has the form owner/name")
    if base is None and made.kind in ADAPTERS:
        known = f"its run was begun with {given!r}" if given else "its run does not name one"
        raise ValueError(f"{TITLES[made.kind]} is loaded beside its model, and {known}; say base_model=, the id of that model on the Hub")
    return base


def inherited_license(made: Artifact, base: str | None, token: Any = None) -> str:
    """The licence in the card of the model it was made of, a folder here or a repository of the Hub.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    folder = Path(str(made.described.get("model", {}).get("from"))) / "README.md"
    if base is None and not folder.is_file():
        raise ValueError("the licence is not known; say license=, as the Hub spells it, such as 'apache-2.0'")
    card: Any = folder if folder.is_file() else base
    try:
        found = ModelCard.load(card, token=token).data.get("license")
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise ValueError(f"the card of {card} cannot be read ({type(error).__name__}: {reason}); say license=") from error
    if not found:
        raise ValueError(f"the card of {card} names no licence; say license=, as the Hub spells it")
    return found


def prompt_of(made: Artifact, report: Mapping[str, Any] | None) -> str:
    """A prompt that it knows: of its samples, or of the evaluation."""
    known = [*made.report.get("prompts", []), *(report or {}).get("prompts", [])]
    return next(filter(None, known), "a photograph")


def _hub_id(word: Any) -> str | None:
    """``word`` if it is a Hub id; None where it is a folder, the embedded model or a pipeline that was handed in."""
    return word if isinstance(word, str) and "/" in word and HUB_ID.fullmatch(word) and not Path(word).exists() else None


def _method(made: Artifact) -> tuple[str | None, bool]:
    """(name of the objective that trained it, whether it distils)."""
    name = made.described.get("method", {}).get("name")
    return name, bool(name) and getattr(objectives, name).has_teacher


def _tags(made: Artifact) -> list[str]:
    name, distils = _method(made)
    own = [] if made.kind == "pipeline" else [made.kind.replace(" ", "-")]
    return ["diffusers", "diffx", *own, *(["distillation", str(name).lower()] if distils else [])]


def _what(made: Artifact, base: str | None) -> str:
    name, distils = _method(made)
    calls, guidance = (made.call_kwargs.get(key) for key in ("num_inference_steps", "guidance_scale"))
    said = TITLES[made.kind]
    if made.kind == "controlnet":
        said += f" ({made.read(DESCRIPTION)['adapter']['hint']['name']})"
    elif made.kind == "ip-adapter":
        said += f" ({made.read(DESCRIPTION)['adapter']['kind']})"
    if base:
        said += f" {'for' if made.kind in ADAPTERS else 'made of'} [{base}](https://huggingface.co/{base})"
    if distils:
        said += f", distilled by diffx ({name})"
    elif name:
        said += ", trained by diffx"
    if calls and distils:
        said += f": {calls} network calls" + (" without guidance" if guidance == 1 else f" at guidance {guidance:g}" if guidance else "")
    return said + (". diffx is not needed to use it." if made.kind != "scheduler" else ".")


def _training(made: Artifact) -> str:
    train, lora = made.described["train"], made.described.get("lora")
    options = dict(made.described["method"])
    name, kept = options.pop("name"), made.report.get("kept_step")
    said = [f"{train['train_steps']} updates of {train['batch_size']}, seed {train['seed']}"]
    if train["lr"] is not None:
        said.append(f"learning rate {train['lr']:g}")
    if kept not in (None, train["train_steps"]):
        said.append(f"the weights after step {kept} were the best and are these")
    if lora:
        said.append(f"LoRA of rank {lora['rank']}")
    told = ", ".join(f"`{key}={value}`" for key, value in options.items() if value is not None)
    return f"{'; '.join(said)}. `{name}`" + (f": {told}." if told else ".")
