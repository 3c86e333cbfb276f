"""A checkpoint with its card, in a folder or in a repository of the Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import replacing
from ..loading import SHOWN
from .artifact import SAMPLES, Artifact, artifact_of
from .card import make_card
from .degrade import save_pretrained

CARD = "README.md"


@dataclass(frozen=True)
class Published:
    """What was published, or would be: ``files`` with their sizes in bytes, the card's text, and the commit's address (None: none)."""

    repo_id: str
    files: Mapping[str, int]
    card: str
    url: str | None = None


def write_repository(
    source: str | Path, folder: str | Path, repo_id: str, *, base_model: str | None = None, license: str | None = None,
    evaluation: Any = None, token: Any = None,
) -> Published:  # fmt: skip
    """Write what ``push_to_hub`` would upload into ``folder``, whole or not at all; arguments and errors as there.

    Raises:
        ValueError: ``folder`` is there and is not empty, besides.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{str(folder)!r} is there already; give a folder that is new or empty")
    made = _checked(source, repo_id, base_model, license, evaluation)
    with replacing(folder) as scratch:
        return _gather(made, scratch, repo_id, base_model, license, evaluation, token)


def push_to_hub(
    source: Any, repo_id: str, *, base_model: str | None = None, license: str | None = None, evaluation: Any = None,
    private: bool | None = None, revision: str | None = None, create_pr: bool = False, commit_message: str | None = None,
    token: str | bool | None = None, dry_run: bool = False,
) -> Published:  # fmt: skip
    """Upload a checkpoint with its card, in one commit: all of it is there, or nothing; the same call tries again.

    Only the export is uploaded, never checkpoints or the state of an optimizer. A README.md that the folder has is its card.

    Args:
        source: the folder of a run or of its export, of a scheduler or of a custom pipeline; or a pipeline, which is saved as
            ``diffx.save_pretrained`` does. (What ``diffx.train`` and ``diffx.distill`` return has a method of this name.)
        repo_id: "owner/name"; made if it is not there.
        base_model: Hub id of the model it was made of, or is loaded beside; None is the one that its run was begun with.
        license: as the Hub spells it; None is the base model's.
        evaluation: what ``diffx.evaluation.evaluate`` returned, or the folder where ``diffx evaluate`` wrote it, with a row of this very
            checkpoint: the card's table, and its model index.
        private: of a new repository; None is the account's default.
        revision: a branch; made if it is not there.
        create_pr: propose the commit as a pull request.
        token: None is the one that ``hf auth login`` or HF_TOKEN gave.
        dry_run: upload nothing, and ask the Hub for nothing but the base model's licence.

    Raises:
        ValueError: it cannot be published as it is, the licence or the base model is not known, or the Hub refused it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(source, DiffusionPipeline):
            given = {"model": {"from": source.config.get("_name_or_path"), "pipeline": type(source).__name__}}
            made = _checked(save_pretrained(source, Path(scratch) / "saved"), repo_id, base_model, license, evaluation)
            made = replace(made, described=given)
        else:
            made = _checked(source, repo_id, base_model, license, evaluation)
        folder = Path(scratch) / "repository"
        folder.mkdir()
        published = _gather(made, folder, repo_id, base_model, license, evaluation, token)
        if dry_run:
            return published
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision not in (None, "main"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
                commit_message=commit_message or f"Publish {made.kind} with diffx",
            )  # fmt: skip
        except Exception as error:  # each layer of the network has an exception class of its own; for the user they are one thing
            raise ValueError(
                f"{repo_id} was not published, and nothing in it has changed ({type(error).__name__}: {_first_line(error)}); the same call "
                "tries again. Where the Hub asks who you are: `hf auth login`, with a token that may write"
            ) from error
    return Published(published.repo_id, published.files, published.card, commit.pr_url or commit.commit_url)


def _checked(source: str | Path, repo_id: str, base_model: str | None, license: str | None, evaluation: Any) -> Artifact:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is no name of a repository: {_first_line(error)}") from error
    made = artifact_of(source)
    if CARD in made.files and any(value is not None for value in (base_model, license, evaluation)):
        raise ValueError(
            f"{str(made.folder)!r} has a {CARD}, which is published as its card; leave out base_model, license and evaluation, or remove it"
        )
    return made


def _gather(
    made: Artifact, folder: Path, repo_id: str, base_model: str | None, license: str | None, evaluation: Any, token: Any
) -> Published:
    """All that belongs into the repository, in ``folder``."""
    if CARD in made.files:
        card = (made.folder / CARD).read_text()
    else:
        card = str(make_card(made, repo_id, base_model=base_model, license=license, evaluation=evaluation, token=token))
    pictures = {SAMPLES: made.samples, SHOWN: made.shown}
    for name, file in {**{name: made.folder / name for name in made.files}, **{k: v for k, v in pictures.items() if v}}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
    (folder / CARD).write_text(card)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    return Published(repo_id, files, card)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
