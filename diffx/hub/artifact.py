"""What a folder is that is to be published, and which of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..conditioning.adapter import DESCRIPTION
from ..loading import CALL_KWARGS, EMBEDDED_SAMPLERS, SHOWN
from .repository import PICKLES, read_object

Kind = Literal["pipeline", "lora", "controlnet", "ip-adapter", "scheduler", "custom pipeline"]
ADAPTERS = ("lora", "controlnet", "ip-adapter")  # that are loaded beside a model
PUBLISHED = (".py", ".json", ".md", ".safetensors", ".png", ".gif")
OF_TOKENIZERS = (".txt", ".model")  # in a folder of that name
SAMPLES = "samples.png"  # beside a card


@dataclass(frozen=True)
class Artifact:
    """A folder that can be published.

    ``files`` are all it holds, as paths in it; ``described`` and ``report`` are run.yaml and report.json of the run that made it, and
    ``run`` its folder, where they are known; ``call_kwargs`` what its pipeline is called with.
    """

    folder: Path
    kind: Kind
    files: tuple[str, ...]
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    run: Path | None = None
    described: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> Path | None:
        """Pictures that it made: its own, or the run's sheet of the step that was kept, else of the last."""
        if SAMPLES in self.files:
            return self.folder / SAMPLES
        sheets = {int(sheet.stem.removeprefix("step-")): sheet for sheet in self.run.glob("samples/step-*.png")} if self.run else {}
        return sheets.get(self.report.get("kept_step", -1)) or sheets.get(max(sheets, default=-1))

    @property
    def shown(self) -> Path | None:
        """What the first of them was shown, of an adapter."""
        if SHOWN in self.files:
            return self.folder / SHOWN
        return file if self.run and (file := self.run / SHOWN).is_file() else None

    def read(self, name: str) -> Any:
        """The content of one of its JSON files; raises ValueError where it has none."""
        return read_object(self.folder / name)


def artifact_of(source: str | Path) -> Artifact:
    """What ``source`` is: the folder of a run (then its result), an export, a scheduler, a pipeline, or a custom pipeline.

    Raises:
        ValueError: it is none of them, is not finished, or holds files that are not published: pickles, checkpoints, strange names.
    """
    folder = EMBEDDED_SAMPLERS.get(str(source), Path(source).expanduser())
    if not folder.is_dir():
        raise ValueError(f"{str(source)!r} is no folder here; give the folder of a run, or one that save_pretrained wrote")
    if (folder / "run.yaml").is_file():
        if not (folder / "model").is_dir():
            raise ValueError(f"the run {str(source)!r} has no result yet; the command that began it goes on, and writes {folder / 'model'}")
        folder = folder / "model"
    files = published_files(folder)
    run = folder.parent if folder.name == "model" and (folder.parent / "run.yaml").is_file() else None
    return Artifact(
        folder,
        _kind(folder, files),
        files,
        read_object(folder / CALL_KWARGS) if CALL_KWARGS in files else {},
        run,
        yaml.safe_load((run / "run.yaml").read_text()) if run else {},
        read_object(run / "report.json") if run and (run / "report.json").is_file() else {},
    )


def published_files(folder: Path) -> tuple[str, ...]:
    """The files below ``folder``, hidden ones aside.

    Raises:
        ValueError: one of them is not of a kind that is published, or is a link, which may lead out of the folder.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    shown = [path for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(folder).parts)]
    for path in shown:
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ValueError(f"{name!r} in {str(folder)!r} is a link, and only the folder's own files are published; put the file there")
        if path.suffix in PICKLES:
            raise ValueError(
                f"{name!r} in {str(folder)!r} is a pickle or may hold one, which runs code where it is loaded; save it as safetensors"
            )
        if path.suffix not in PUBLISHED and not (path.suffix in OF_TOKENIZERS and path.parent.name.startswith("tokenizer")):
            raise ValueError(f"{name!r} in {str(folder)!r} is not published; what is: {', '.join(PUBLISHED)}; move it out of the folder")
    return tuple(path.relative_to(folder).as_posix() for path in shown)


def _kind(folder: Path, files: tuple[str, ...]) -> Kind:
    if DESCRIPTION in files:
        return "controlnet" if read_object(folder / DESCRIPTION).get("adapter", {}).get("name") == "ControlNet" else "ip-adapter"
    if "pytorch_lora_weights.safetensors" in files:
        return "lora"
    if "model_index.json" in files:
        return "pipeline"
    if "pipeline.py" in files:
        return "custom pipeline"
    if "scheduler_config.json" in files:
        return "scheduler"
    raise ValueError(
        f"{str(folder)!r} holds nothing to publish (it has {', '.join(files[:8]) or 'no files'}); what can be: a run's folder, a pipeline "
        "(model_index.json), a LoRA or an adapter as diffx exports it, a scheduler (scheduler_config.json), a custom pipeline (pipeline.py)"
    )
