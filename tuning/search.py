"""Searches for the clipping thresholds of a recipe, the unclipped baseline among the trials.

    python tuning/search.py

searches for AlexNet on the embedded MNIST digits in minutes. Options of the recipe are taken too:

    python tuning/search.py --recipe resnet50 --tuner hyperband --epochs 9 --devices 2

The same command goes on with a search that was interrupted; results are in the output folder.
"""

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a script: the folder above tuning/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import recipes.training  # noqa: F401  (changes to the environment that has what follows)

from recipes.command_line import Parser, exit_status
from recipes.errors import RecipeError, RunFailed, first_line
from recipes.registry import RECIPES
from recipes.training.clipper_options import import_modules
from tuning.session import SMALL, Engine, Session
from tuning.space_flags import add_flags
from tuning.verdict import LEAST_RUNS

TUNERS = ("random", "bayesian", "hyperband", "grid")


def build_parser() -> argparse.ArgumentParser:
    """The command line; what it does not know is the recipe's."""
    parser = Parser(
        "search",
        __doc__,
        epilog=f"Recipes: {', '.join(RECIPES)}. Their options: python recipes/NAME.py --help",
    )
    add = parser.add_argument_group("search").add_argument
    add("--recipe", default="alexnet", help="name, or a file that defines RECIPE (%(default)s)")
    add("--tuner", choices=TUNERS, default="random", help="(%(default)s)")
    add("--max-trials", type=int, metavar="N", help="baseline included (10; a grid: all)")
    add("--objective", metavar="METRIC", help="any logged metric (the recipe's: val_accuracy ...)")
    add("--direction", choices=("max", "min"), help="of an objective whose name does not tell")
    add(
        "--budget",
        choices=("small", "full"),
        default="small",
        help=f"small: {SMALL} unless given; full: the recipe's own epochs (%(default)s)",
    )
    add("--executions", type=int, default=1, metavar="N", help="runs a trial (%(default)s)")
    add(
        "--confirm-runs",
        type=int,
        default=5,
        metavar="N",
        help="at the end, the best clipped and unclipped trial with N other seeds: "
        f"{LEAST_RUNS} or more test whether clipping matters (%(default)s)",
    )
    add("--output", metavar="DIR", help="folder of the search (runs/search-RECIPE)")
    add("--keep-weights", action="store_true", help="keep best.keras of each run")
    add("--workers", type=int, default=0, metavar="N", help="processes on this machine")
    add(
        "--worker-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="a worker that is silent for so long has lost its trial to another (%(default)s)",
    )
    add("--traceback", action="store_true", help="errors with their traceback")
    add_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a search from the command line.

    Returns:
        The exit status: 0; 1 where the search failed or no trial ended well; 2 for a mistake in
        flags or data; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)

    def work() -> int:
        early = Parser("search", None, add_help=False)
        early.add_argument("--import", dest="modules")
        import_modules(early.parse_known_args(argv)[0].modules)  # their flags are flags here
        args, rest = build_parser().parse_known_args(argv)
        try:
            return Session(args, rest, argv, make_engine).run()
        except ModuleNotFoundError as error:
            remedy = "`make venv`, or pip install '.[recipes,tuning]' in the checkout"
            raise RecipeError(f"{error.name} is missing: {remedy}") from error
        except ValueError as error:
            raise RecipeError(first_line(error)) from error
        except RuntimeError as error:
            raise RunFailed(first_line(error)) from error

    with _ended_by_sigterm():
        return exit_status(work, argv, interrupted="; the same command goes on with the search")


def make_engine(session: Session) -> Engine:
    """What runs the trials; its library is imported here, TensorFlow before it."""
    from tuning.kerastuner_engine import KerasTunerEngine

    return KerasTunerEngine(session)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A polite kill ends the workers as Ctrl-C does."""

    def interrupt(*details):
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
