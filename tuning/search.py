"""Searches for the clipping thresholds of a recipe, the unclipped baseline among the trials.

    python tuning/search.py
    python tuning/search.py --clippers absolute --threshold-range 0.01 1 --workers 2
    python tuning/search.py --recipe resnet50 --tuner hyperband --epochs 9 --devices 2

The first takes minutes: AlexNet on the embedded MNIST digits. Options of the recipe are accepted
too. Results go to the output folder; the same command resumes an interrupted search.
"""

import signal
import sys
from collections.abc import Sequence

try:
    from recipes.command_line import exit_status, import_tensorflow
    from recipes.errors import RecipeError, RunFailed, first_line
    from recipes.plugin import command_line
    from recipes.training.folder import RUNS, folder_named
    from recipes.training.options import import_modules
    from tuning.flags import build_parser, check, load_recipe, recipe_options
except ModuleNotFoundError as error:
    sys.exit(f"error: no module {error.name}: run `make venv`, then .venv/bin/python (README.md)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a search from the command line.

    Returns:
        The exit status: 0; 1 if the search failed or no trial completed; 2 for a mistake in flags
        or data; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)

    def work() -> int:
        for modules in command_line.imports_of(argv):  # they add flags
            import_modules(modules)
        parser = build_parser(__doc__ or "", argv)
        args, rest = parser.parse_known_args(argv)
        try:
            check(args)
            recipe = load_recipe(args.recipe)
            given = recipe_options(args, recipe, rest, parser.flags)
            folder = folder_named(args.output or str(RUNS / f"search-{recipe.name}"))
            import_tensorflow()
            from tuning.search_run import Search

            return Search(recipe, given, args, folder).run()
        except ValueError as error:
            raise RecipeError(first_line(error)) from error
        except RuntimeError as error:
            raise RunFailed(first_line(error)) from error

    return exit_status(work, argv, interrupted="; the same command resumes the search")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers as Ctrl-C does
    sys.exit(main())
