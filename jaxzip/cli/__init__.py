"""The ``jaxzip`` command, one file a command; ``console`` is the terminal, ``main`` turns errors into exit codes."""

from __future__ import annotations

import sys

import typer

from jaxzip.cli import convert, demo, generate, inspect, restore, tune, verify
from jaxzip.cli.console import fail
from jaxzip.errors import JaxzipError

app = typer.Typer(
    name="jaxzip",
    help="Make large language models smaller and faster without changing one bit of their weights.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("convert")(convert.convert_command)
app.command("inspect")(inspect.inspect_command)
app.command("verify")(verify.verify_command)
app.command("restore")(restore.restore_command)
app.command("generate")(generate.generate_command)
app.command("tune")(tune.tune_command)
app.command("demo")(demo.demo_command)


def main() -> None:
    """Entry point: exit code 0 only on success; an error is one line on standard error, not a traceback."""
    try:
        app()
    except (JaxzipError, ValueError, NotImplementedError, OSError) as error:  # ValueError: an option's value
        sys.exit(fail(str(error)).exit_code)
    except KeyboardInterrupt:
        sys.exit(fail("interrupted; run the same command again to go on").exit_code)


__all__ = ["app", "main"]
