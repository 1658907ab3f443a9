"""The `opensora-fast` command.

Every file of this folder whose name does not start with an underscore is a subcommand of that name, and the first line
of its docstring is its line in `--help`. A file holds one of:

- `command`: a function with typer-annotated parameters (`opensora-fast train ...`);
- `app`: a `typer.Typer` with a callback, for commands with words below them (`opensora-fast data probe ...`).

It may also hold `MULTIPLE_VALUES = ("--prompt", ...)`: options that take several values after one name, as argparse's
`nargs="+"` does (`--prompt a b` is read as `--prompt a --prompt b`). With `TAKES_OVERRIDES = True` a further value that
reads `key.sub=value` is none: it is an override, wherever it stands.

A command that torchrun may start as several processes, which share its work, is listed in SEVERAL_PROCESSES; the others
are refused there, since each process would do the whole work again, into the same files.

Only the file of the subcommand that was asked for is imported, so `--help` stays fast and needs no torch. A mistake of
the user is raised as `ValueError` or `OSError` with a message that names the thing and the fix; `main` prints it as one
message and exits with 1 (2 for wrong usage, 130 for Ctrl-C). `--debug`, anywhere on the line, shows the traceback.
"""

import ast
import importlib
import os
import pkgutil
import re
import sys
import traceback
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import typer

from opensora_fast.cli._options import OVERRIDES_HELP
from opensora_fast.terminal import escape_on_stdout

PROGRAM = "opensora-fast"
SEVERAL_PROCESSES = ("train", "sample")
# Folders beside `opensora_fast/` in a checkout, which only an installation makes its packages.
PARTS_ELSEWHERE = ("kernels", "train", "benchmarks")
INSTALL_CHECKOUT = "`pip install --no-deps --no-build-isolation -e .`"
# Options that say where a command writes.
TARGETS = ("--out", "--save-dir")
OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


def main(arguments: list[str] | None = None) -> None:
    """Run one command line (default: `sys.argv`) and exit with its code."""
    escape_on_stdout()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; nothing but `--debug` lets a traceback reach the terminal."""
    arguments, debug = _take_debug_flag(list(arguments))
    try:
        _refuse_several_processes(_find_subcommand(arguments))
        _refuse_empty_targets(arguments)
        command = typer.main.get_command(_build_app(arguments))
        code = command(_repeat_options(arguments), prog_name=PROGRAM, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort) as stop:
        if isinstance(stop.__cause__, EOFError):  # typer takes that of a file that is cut off for the end of the input
            return _fail(describe_error(stop.__cause__), 1, debug)
        return _fail("stopped by Ctrl-C", 130, debug)
    except Exception as error:
        # Usage errors of click know how to print themselves; typer carries its own copy of click, so no class is named.
        if hasattr(error, "exit_code") and hasattr(error, "show"):
            error.show()
            unknown_option = hasattr(error, "possibilities") and error.ctx is not None
            if unknown_option and any(parameter.name == "overrides" for parameter in error.ctx.command.params):
                print(f"Keys of the configuration are given without dashes, {OVERRIDES_HELP}", file=sys.stderr)
            return error.exit_code
        return _fail(describe_error(error), 1, debug)


def describe_error(error: Exception) -> str:
    """One message for a person: the text of a user mistake as it is, anything else with its class and what to do."""
    if isinstance(error, OSError) and error.filename is not None:
        needs_folder = isinstance(error, (FileExistsError, NotADirectoryError))
        fix = "; a folder is needed where a file stands, give another name" if needs_folder else ""
        return f"{error.strerror}: {error.filename}{fix}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package, _, part = error.name.partition(".")
        if package == "opensora_fast" and part.partition(".")[0] in PARTS_ELSEWHERE:
            return f"{error.name} is not installed: {INSTALL_CHECKOUT} in the checkout makes its folders packages"
        if package != "opensora_fast":
            return f"{package} is not installed: pip install {package}; `{PROGRAM} doctor` lists all that is missing"
    if isinstance(error, (ValueError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {error}\n(unexpected: run again with --debug for the traceback)"


def list_subcommands() -> dict[str, str]:
    """Names of the subcommands and their one-line help, read from the files without importing them."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return {name: _read_summary(name) for name in names}


@cache
def _read_summary(name: str) -> str:
    source = (Path(__path__[0]) / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


class _Commands(typer.core.TyperGroup):
    """Hands Ctrl-C on to `run`; typer would make an exit code of it, without a word."""

    def invoke(self, context: typer.Context) -> object:
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            raise typer.Abort from error


def _build_app(arguments: list[str]) -> typer.Typer:
    app = typer.Typer(
        name=PROGRAM,
        cls=_Commands,
        help="Train, run and measure the ST-DiT-2 of Open-Sora 1.1.",
        epilog="Every command has its own --help. --debug, anywhere on the line, shows the traceback of an error.",
        no_args_is_help=True,
        add_completion=False,
    )

    @app.callback()
    def root() -> None:
        pass

    wanted = _find_subcommand(arguments)
    for name, summary in list_subcommands().items():
        if name != wanted:
            app.command(name, help=summary)(_not_imported)
            continue
        module = _import_subcommand(name)
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name, help=summary)
        else:
            app.command(name, help=module.command.__doc__ or summary)(module.command)
    return app


def _not_imported() -> None:
    """Stands for a subcommand that this command line does not call, in `--help` and in the list of near names."""


def _find_subcommand(arguments: list[str]) -> str | None:
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _refuse_several_processes(name: str | None) -> None:
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and name in list_subcommands() and name not in SEVERAL_PROCESSES:
        raise ValueError(
            f"{name} is the work of one process, but WORLD_SIZE={count} says that torchrun has started {count}: run "
            f"`{PROGRAM} {name} ...` without torchrun, which is for {' and '.join(SEVERAL_PROCESSES)}, or unset "
            "WORLD_SIZE"
        )


def _refuse_empty_targets(arguments: list[str]) -> None:
    """An empty name would be the current folder, and is more likely a shell variable that is not set."""
    for option in TARGETS:
        if f"{option}=" in arguments or (option, "") in pairwise(arguments):
            raise ValueError(f'{option} "": name the place, or write . for the current folder')


def _import_subcommand(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def _take_debug_flag(arguments: list[str]) -> tuple[list[str], bool]:
    end = arguments.index("--") if "--" in arguments else len(arguments)
    kept = [argument for argument in arguments[:end] if argument != "--debug"]
    return kept + arguments[end:], len(kept) < end


def _repeat_options(arguments: list[str]) -> list[str]:
    """Rewrite `--name a b` as `--name a --name b` for the options that the subcommand lists in MULTIPLE_VALUES."""
    name = _find_subcommand(arguments)
    module = _import_subcommand(name) if name in list_subcommands() else None
    options = getattr(module, "MULTIPLE_VALUES", ())
    takes_overrides = getattr(module, "TAKES_OVERRIDES", False)
    rewritten: list[str] = []
    open_option, values = None, 0
    for argument in arguments:
        if argument.startswith("--"):
            open_option, values = (argument if argument in options else None), 0
        elif open_option is not None and not (values and takes_overrides and OVERRIDE.match(argument)):
            if values:
                rewritten.append(open_option)
            values += 1
        rewritten.append(argument)
    return rewritten


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    # The processes of torchrun write to one terminal.
    rank = os.environ.get("RANK") if os.environ.get("WORLD_SIZE", "1") != "1" else None
    name = PROGRAM if rank is None else f"{PROGRAM}, rank {rank}"
    print(f"{name}: error: {message}", file=sys.stderr)
    return code
