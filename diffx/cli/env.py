"""``diffx env``: what is installed here."""

import json

import typer
from rich.console import Console
from rich.table import Table

from . import options


def env(as_json: options.Json = False) -> None:
    """Show versions, devices and extras, and warn about what stands in the way.

    [bold]Example:[/bold] diffx env --json
    """
    from diffx.environment import report

    found = report()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("what", "here", box=None, pad_edge=False)
    for name in ("diffx", "python", "platform"):
        table.add_row(name, found[name] or "not installed, run from its folder")
    for name, version in found["packages"].items():
        table.add_row(name, version or "missing")
    for name, device in found["devices"].items():
        table.add_row(name, device)
    for extra, packages in found["extras"].items():
        table.add_row(f"extra {extra}", ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items()))
    table.add_row("embedded model", "present" if found["embedded_model"] else "missing")
    Console().print(table)
    for warning in found["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
