"""The ``adarankgrad`` command: its subcommands, and one line for every error and warning.

Exit codes: 0 done, 1 training broke off, 2 the request cannot be met, 3 training diverged,
128 + n stopped by signal n.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from adarankgrad.train.errors import DivergedError, Interrupted, TrainingError, UserError

_EXTRA = 'needs packages that are not installed: pip install "adarankgrad[train]"'
_COMMANDS = (
    ("adarankgrad.cli.train", "train"),
    ("adarankgrad.cli.finetune", "finetune"),
    ("adarankgrad.cli.compare", "compare"),
    ("adarankgrad.cli.tune", "tune"),
    ("adarankgrad.cli.plan", "plan"),
    ("adarankgrad.cli.sparsify", "sparsify"),
    ("adarankgrad.cli.fetch_model", "fetch_model"),
    ("adarankgrad.cli.generate", "generate"),
    ("adarankgrad.cli.demo", "demo"),
)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: Without the program's name; default ``sys.argv``.
    """
    usual, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        exit_code = _run(sys.argv[1:] if arguments is None else arguments)
    finally:
        warnings.formatwarning = usual
    sys.exit(exit_code)


def _run(arguments: list[str]) -> int:
    try:
        import typer  # noqa: F401 - to tell a missing extra from an error inside it
    except ModuleNotFoundError:
        return _fail(_EXTRA, 2)
    try:
        result = _app()(arguments, standalone_mode=False, prog_name="adarankgrad")
    except UserError as error:
        return _fail(str(error), 2)
    except DivergedError as error:
        return _fail(str(error), 3)
    except TrainingError as error:
        return _fail(str(error), 1)
    except Interrupted as stop:
        print(f"adarankgrad: {stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        return _fail("interrupted; a run with a checkpoint continues with --resume", 130)
    except OSError as error:
        return _fail(f"{error.strerror or error}: {error.filename or 'writing the run'}", 1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "adarankgrad":
            raise
        return _fail(f"{_EXTRA} (missing: {error.name})", 2)
    except Exception as error:
        # Typer's own errors (unknown option, not a number) carry their text and exit code.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        # Without arguments typer has printed the help already and has nothing to add.
        return _fail(f"{message} See --help.", 2) if message else 2
    return result if isinstance(result, int) else 0


def _one_line(message: Warning | str, *place: Any, **line: Any) -> str:
    """Return a warning without the line of the source that gave it."""
    return f"adarankgrad: warning: {' '.join(str(message).split())}\n"


def _fail(message: str, exit_code: int) -> int:
    print(f"adarankgrad: error: {' '.join(message.split())}", file=sys.stderr)
    return exit_code


def _app() -> Any:
    import typer

    app = typer.Typer(
        name="adarankgrad",
        help="Train language models in a fraction of AdamW's memory, without a rank to tune.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    @app.callback(invoke_without_command=True)
    def root(
        show_version: bool = typer.Option(False, "--version", help="Show the version and exit."),
    ) -> None:
        if show_version:
            typer.echo(f"adarankgrad {_version()}")
            raise typer.Exit

    for module_name, command in _COMMANDS:
        module = importlib.import_module(module_name)
        app.command(command.replace("_", "-"))(getattr(module, command))
    command_line = typer.main.get_command(app)
    _keep_brackets(command_line)
    return command_line


def _keep_brackets(command: Any) -> None:
    """Escape what rich would take for markup and leave out, in the help of all commands."""
    from rich.markup import escape

    for part in (command, *command.params):
        part.help = part.help and escape(part.help)
    for subcommand in getattr(command, "commands", {}).values():
        _keep_brackets(subcommand)


def _version() -> str:
    try:
        return version("adarankgrad")
    except PackageNotFoundError:
        return "unknown"
