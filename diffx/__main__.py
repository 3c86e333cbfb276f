"""``python -m diffx`` is the ``diffx`` command."""

from diffx.cli import app

app(prog_name="diffx")
