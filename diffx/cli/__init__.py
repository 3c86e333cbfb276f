"""The ``diffx`` command: it reads flags, calls the library and prints; nothing is computed here.

Exit codes: 0 done; 2 the input was wrong, said in one line on stderr; 130 stopped by Ctrl-C and 143 by SIGTERM, as shells have it
(128 and the signal's number), a training saved; 1 anything else.
"""

import signal
from typing import Annotated

import typer
from typer.core import TyperGroup

from . import attention, calibrate, compare, env, evaluate, hints, plan, publish, sample, train


class Commands(TyperGroup):
    """Commands for which a ``ValueError`` is one line on stderr, unless a traceback was asked for."""

    def list_commands(self, ctx):
        return list(self.commands)  # in the order of a first visit, not of the alphabet

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, FloatingPointError) as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"diffx: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error
        except KeyboardInterrupt as stop:
            typer.echo(f"diffx: {stop or 'interrupted'}", err=True)
            raise typer.Exit(128 + getattr(stop, "number", signal.SIGINT)) from stop


app = typer.Typer(
    name="diffx", cls=Commands, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    add_completion=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command("quickstart")(compare.quickstart)
app.command("sample")(sample.sample)
app.command("compare")(compare.compare)
app.command("plan")(plan.plan)
app.command("calibrate")(calibrate.calibrate)
app.command("evaluate")(evaluate.evaluate)
app.add_typer(train.distill, name="distill")
app.add_typer(train.train, name="train")
app.command("hints")(hints.hints)
app.command("export")(publish.export)
app.command("push")(publish.push)
app.command("attention")(attention.attention)
app.command("env")(env.env)


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", envvar="DIFFX_DEBUG", help="Show tracebacks; stands before the command.")] = False,
) -> None:
    """Samplers for Hugging Face Diffusers, compared on your model.

    Start with [bold]diffx quickstart[/bold]: it needs no network and no model of yours.
    A flag is the Python argument of the same name.
    """
