"""The command line of a recipe."""

import contextlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes import STARTED
from recipes.command_line import exit_status
from recipes.errors import TrainingDiverged
from recipes.training import folder as folders
from recipes.training import options as opts
from recipes.training.recipe import Recipe
from recipes.training.session import run
from recipes.training.summary import print_result


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Runs a recipe from the command line.

    Returns:
        The exit status, as `recipes.command_line.exit_status` says.
    """
    started = STARTED if argv is None else None
    argv = sys.argv[1:] if argv is None else list(argv)
    folder: Path | None = None

    def work() -> None:
        nonlocal folder
        options, folder = folders.open_run(recipe, opts.parse(recipe, argv))
        try:
            result = run(recipe, options, folder, started=started)
        except TrainingDiverged as error:
            best = folder / folders.BEST
            left = f"; the last good model is in {best}" if best.exists() else ""
            raise TrainingDiverged(f"{error}{left}", error.step, error.layer) from error
        if result is not None:
            print_result(recipe, result)

    def how_to_resume() -> str:
        with contextlib.suppress(OSError):
            if folder is not None and (folder / folders.BACKUP).exists():
                where = shlex.quote(str(folder))
                return f"; go on with: {_command()} --resume --output {where}"
        return ""

    return exit_status(work, argv, interrupted=how_to_resume, hint=how_to_resume)


def _command() -> str:
    """How this program was started, less its options."""
    program = sys.argv[0]
    return f"python {shlex.quote(program)}" if program.endswith(".py") else "the same command"
