"""``diffx export`` and ``diffx push``: a checkpoint with its card, into a folder or onto the Hub."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options

if TYPE_CHECKING:
    from diffx.hub.publish import Published

Source = Annotated[
    str,
    typer.Argument(metavar="FOLDER", help="Of a run, of an export, of a scheduler or of a custom pipeline.", show_default=False),
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ID", help="Hub id of the model it was made of; else what its run says.", show_default=False),
]
License = Annotated[
    str | None, typer.Option("--license", help="As the Hub spells it (apache-2.0); else the base model's.", show_default=False)
]
Measured = Annotated[
    Path | None,
    typer.Option("--evaluation", help="Where `diffx evaluate --samplers FOLDER --output ...` wrote: the card's table.", show_default=False),
]


def export(
    source: Source,
    output: Annotated[Path, typer.Option("--output", file_okay=False, help="New folder.")] = Path("outputs/repository"),
    repo_id: Annotated[str, typer.Option("--repo-id", metavar="OWNER/NAME", help="Named in the card.")] = "owner/name",
    base_model: BaseModel = None,
    license: License = None,
    evaluation: Measured = None,
    as_json: options.Json = False,
) -> None:
    """Write what `diffx push` would upload into a folder: the checkpoint alone, and its card.

    [bold]Example:[/bold] diffx export runs/lcm --base-model your/model --evaluation outputs/evaluate --output lcm-repository

    Never in it: checkpoints, the state of an optimizer, pickles. A README.md that is there stays the card.
    """
    from diffx.hub.publish import write_repository

    made = write_repository(source, output, repo_id, base_model=base_model, license=license, evaluation=evaluation)
    tell(made, f"written: {output}", as_json)


def push(
    source: Source,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; made if it is not there.", show_default=False)],
    base_model: BaseModel = None,
    license: License = None,
    evaluation: Measured = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; else the account's default.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch; made if it is not there.", show_default=False)] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    commit_message: Annotated[str | None, typer.Option("--commit-message", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Upload nothing; print the files and the card.")] = False,
    as_json: options.Json = False,
) -> None:
    """Upload a checkpoint with its card to the Hugging Face Hub.

    [bold]Example:[/bold] diffx push runs/lcm you/lcm --private --evaluation outputs/evaluate --dry-run

    It is one commit: all of it is there, or nothing, and the same command tries again. The token is that of `hf auth login` or HF_TOKEN.
    """
    from diffx.hub.publish import push_to_hub

    made = push_to_hub(
        source, repo_id, base_model=base_model, license=license, evaluation=evaluation, private=private, revision=revision,
        create_pr=create_pr, commit_message=commit_message, dry_run=dry_run,
    )  # fmt: skip
    tell(made, f"published: {made.url}" if made.url else "nothing was uploaded", as_json)


def tell(made: "Published", end: str, as_json: bool) -> None:
    """The files with their sizes, the card, and what became of them."""
    if as_json:
        typer.echo(json.dumps({"repo_id": made.repo_id, "url": made.url, "files": dict(made.files), "card": made.card}, indent=2))
    else:
        for name, size in made.files.items():
            typer.echo(f"{size:>14,}  {name}")
        typer.echo(f"\n{made.card}\n{end}")
