"""Searches for the clipping thresholds of a recipe, the unclipped baseline among the trials.

    python tuning/search.py

searches for AlexNet on the embedded MNIST digits in minutes. Options of the recipe are taken too:

    python tuning/search.py --recipe resnet50 --tuner hyperband --epochs 9 --devices 2

The same command goes on with a search that was interrupted; results are in the output folder.
"""

import argparse
import contextlib
import importlib.util
import json
import shlex
import signal
import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above tuning/ holds its packages
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from recipes.errors import RecipeError
from recipes.tools.zoo import RECIPES, find_recipe
from recipes.training import options as opts
from recipes.training.quiet import import_tensorflow
from tuning import workers as parallel

TUNERS = ("random", "bayesian", "hyperband", "grid")
SEARCH = "search.json"
PROJECT = "trials"
# Enough to tell thresholds apart, little enough for minutes on two cores. Explicit options win.
SMALL = {"epochs": 2, "limit_steps": 100}
_ORACLE_SEED = 1_000  # KerasTuner takes a seed of 0 for none
# What the search sets itself, and what to say instead.
_SEARCHED = {
    "clipper": "--clippers",
    "threshold": "--threshold-range",
    "beta": "--beta-range",
    "gamma": "--gamma-range",
    "max_norm": "--max-norm-range",
    "rescale": "--rescales",
    "weight": "--weights",
    "scope": "--scopes",
    "clip_config": "--clippers",
    "activation_gate": "--search-gate",
    "gate_clip_value": "--search-gate",
    "gate_gamma": "--search-gate",
    "resume": "the same command again, which goes on by itself",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise RecipeError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The command line; what it does not know is the recipe's."""
    parser = _Parser(
        prog="search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        default=3,
        metavar="N",
        help="at the end, the best clipped and unclipped trial with N other seeds (%(default)s)",
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

    add = parser.add_argument_group("search space").add_argument
    add(
        "--clippers",
        nargs="+",
        metavar="NAME",
        default=["absolute", "exponential", "norm"],
        help="of absolute, exponential, norm; none is always there (%(default)s)",
    )
    low_high = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    add(
        "--calibration",
        metavar="FILE",
        help="centre the three ranges below on what keras_gradclip.calibrate saved there",
    )
    add("--threshold-range", help="absolute: c, log (0.01 0.1)", **low_high)
    add("--gamma-range", help="exponential: γ, log (0.01 0.1)", **low_high)
    add("--max-norm-range", help="norm, log (0.1 10)", **low_high)
    add("--beta-range", default=[0.5, 1.0], help="exponential: β (%(default)s)", **low_high)
    add("--rescales", nargs="+", metavar="WORD", default=["none"], help="none norm max alpha")
    add("--weights", nargs="+", metavar="WORD", default=["elementwise"], help="exponential")
    add("--scopes", nargs="+", metavar="WORD", default=["layer"], help="norm")
    add("--search-gate", action="store_true", help="also search the activation gate")
    add("--groups", action="store_true", help="a threshold each for stem, stages and head")
    add("--learning-rate-range", help="log (a third to three times the recipe's)", **low_high)
    add("--fix-learning-rate", action="store_true", help="search at the recipe's alone")
    add("--points", type=int, default=4, help="grid: values a number (%(default)s)")
    return parser


def main(argv=None) -> int:
    """Runs a search from the command line.

    Returns:
        The exit status: 0; 1 where the search failed or no trial ended well; 2 for a mistake in
        flags or data; 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with _ended_by_sigterm():
            return _Search(argv).run()
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on with the search", 130, argv)
    except (RecipeError, ValueError) as error:
        return _fail(str(error), 2, argv)
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{name}", 1, argv)
    except RuntimeError as error:
        return _fail(str(error), 1, argv)


def _fail(message: str, status: int, argv) -> int:
    if "--traceback" in argv:
        import traceback

        traceback.print_exc()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    print(f"error: {lines[0] if lines else message}", file=sys.stderr)
    return status


@contextlib.contextmanager
def _ended_by_sigterm():
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


class _Search:
    """A search from its command line."""

    def __init__(self, argv):
        args, rest = build_parser().parse_known_args(argv)
        self.args, self.argv = args, argv
        self.role = parallel.role()
        if min(args.workers, args.executions - 1, args.confirm_runs) < 0:
            raise RecipeError("--workers, --executions and --confirm-runs take positive numbers")
        if args.max_trials is not None and args.max_trials < 2:
            raise RecipeError(
                f"--max-trials {args.max_trials}: at least 2, one of which is the baseline"
            )
        if self.role == "chief" and args.workers:
            raise RecipeError("--workers starts a chief of its own: unset KERASTUNER_TUNER_ID")
        self.recipe = load_recipe(args.recipe)
        self.given = self._recipe_options(rest)
        self.folder = Path(args.output or Path("runs") / f"search-{self.recipe.name}")

    def _recipe_options(self, rest) -> dict:
        parsed = opts.parse(self.recipe, rest)
        given = {**parsed.config, **parsed.given}
        for name in _SEARCHED:
            if name in parsed.given:
                raise RecipeError(
                    f"--{name.replace('_', '-')} is searched here: use {_SEARCHED[name]}"
                )
            given.pop(name, None)
        small = SMALL if self.args.budget == "small" else {}
        quiet = {"tensorboard": False, "verbose": "quiet"}
        given = {**small, **quiet, **given}
        self.recipe.options(**given)  # the check
        return given

    # ---------------------------------------------------------------------------------- running

    def run(self) -> int:
        self.folder.mkdir(parents=True, exist_ok=True)
        workers = {}
        if self.args.workers and self.role == "alone":
            if (self.folder / SEARCH).exists():
                self._prepare()  # refuse before anything is started
            command = [*parallel.worker_command(), *self.argv]
            workers = parallel.start_workers(self.args.workers, command, self.folder)
            self.role = "chief"
        try:
            return self._run(workers)
        finally:
            parallel.stop_workers(workers)

    def _prepare(self):
        """What takes TensorFlow: the space, the objective, and the check against the folder."""
        import_tensorflow()
        import keras_tuner as kt

        from keras_gradclip.tuning.hypermodel import as_objective
        from keras_gradclip.tuning.space import clip_hyperparameters

        args = self.args
        name = args.objective or self.recipe.monitor
        direction = args.direction
        if direction is None and name == self.recipe.monitor:
            direction = self.recipe.mode
        self.objective = as_objective(name, direction)
        self.space = self._space()
        self.hyperparameters = kt.HyperParameters()
        clip_hyperparameters(self.hyperparameters, **self.space)
        if self.role != "worker":
            self._check_folder()

    def _space(self) -> dict:
        from keras_gradclip.tuning.space import calibrated_ranges

        args = self.args
        clippers = ["none", *(name for name in args.clippers if name != "none")]
        centred = calibrated_ranges(args.calibration) if args.calibration else {}
        given = {
            "threshold": args.threshold_range,
            "gamma": args.gamma_range,
            "max_norm": args.max_norm_range,
        }
        space = {
            "clippers": clippers,
            "beta": args.beta_range,
            **centred,
            **{name: limits for name, limits in given.items() if limits},
            "rescale": args.rescales,
            "weight": args.weights,
            "scope": args.scopes,
            "activation_gate": args.search_gate,
            "points": args.points if args.tuner == "grid" else None,
            "groups": self._groups() if args.groups else None,
        }
        if args.fix_learning_rate:
            if args.learning_rate_range:
                raise RecipeError("--learning-rate-range and --fix-learning-rate: give one of them")
            return space
        rate = self.recipe.options(**self.given).learning_rate
        low, high = args.learning_rate_range or (rate / 3, rate * 3)
        if not low <= rate <= high:
            raise RecipeError(
                f"--learning-rate-range {low:g} {high:g}: must hold the baseline's learning rate, "
                f"{rate:g}; set that with --learning-rate"
            )
        return {**space, "learning_rate": (low, high), "default_learning_rate": rate}

    def _groups(self) -> dict:
        import keras_gradclip as kgc
        from keras_gradclip.tuning.space import layer_groups
        from recipes import models

        options = self.recipe.options(**self.given)
        if self.recipe.build:
            model = self.recipe.build(10, options.image_size, kgc.ClippedModel, options)
        else:
            model = models.build(
                self.recipe.network,
                num_classes=10,
                image_size=options.image_size,
                model_class=kgc.ClippedModel,
                **self.recipe.network_options,
            )
        return layer_groups(model)

    def _check_folder(self):
        """Refuses a folder with another search in it; notes which one it is now."""
        space = self.hyperparameters.get_config()["space"]
        fixed = opts.saved_options(self.recipe, self.recipe.options(**self.given))
        for name in (*_SEARCHED, "recipe"):
            fixed.pop(name, None)
        now = {
            "recipe": self.recipe.name,
            "tuner": self.args.tuner,
            "objective": str(self.objective),
            "executions": self.args.executions,
            "confirm_runs": self.args.confirm_runs,
            "groups": self.space["groups"],
            **{f"search space: {_name(hp)}": hp["config"] for hp in space},
            **{f"recipe option {name}": value for name, value in fixed.items()},
        }
        now = json.loads(json.dumps(now))
        path = self.folder / SEARCH
        if not path.exists():
            if (self.folder / PROJECT / "oracle.json").exists():
                raise RecipeError(f"{self.folder}: has trials but no {SEARCH}: give --output")
            opts.write_json(path, now)
            return
        before = opts.read_json(path)
        changed = [
            name
            for name in {**before, **now}
            if before.get(name, "absent") != now.get(name, "absent")
        ]
        if changed:
            some = ", ".join(changed[:3]) + (" ..." if len(changed) > 3 else "")
            raise RecipeError(
                f"{self.folder} holds another search; changed: {some}. Give another --output, or "
                "the options of before to go on"
            )

    def _run(self, workers) -> int:
        self._prepare()
        if self.role == "worker":
            with parallel.heartbeat(self.folder):
                self._tuner(self._oracle()).search()
            return 0
        import keras_tuner as kt

        # KerasTuner prints from inside its messages; what we have to say goes around it.
        out, errors = sys.stdout, contextlib.nullcontext()
        with open(self.folder / "kerastuner.log", "a") as log:
            if not self.args.traceback:
                errors = contextlib.redirect_stderr(log)
            try:
                with contextlib.redirect_stdout(log), errors:
                    return self._search(workers, out)
            except kt.errors.FatalError as error:
                raise RecipeError(str(error)) from error

    def _search(self, workers, out) -> int:
        from rich.console import Console

        width = None if out.isatty() else 120
        console = Console(file=out, highlight=False, soft_wrap=True, width=width)
        oracle = self._oracle()
        tuner = self._tuner(oracle, console)
        self._watch_trials(oracle, console)
        self._introduce(oracle, console)
        if self.role == "chief":
            watchdog = parallel.Watchdog(
                oracle, self.folder, self.args.worker_timeout, workers, console.print
            )
            try:
                with watchdog:
                    tuner.search()
            except KeyboardInterrupt:
                if watchdog.deserted:
                    raise RuntimeError(
                        f"all workers have ended; see {self.folder}/worker-0.log. The same command "
                        "goes on with the search"
                    ) from None
                if not watchdog.finished:
                    raise
        else:
            tuner.search()
        return self._report(oracle, console)

    def _oracle(self):
        from keras_gradclip.tuning.oracles import make_oracle

        args = self.args
        options = self.recipe.options(**self.given)
        extra = {"max_epochs": options.epochs} if args.tuner == "hyperband" else {}
        number = args.max_trials
        if number is None and args.tuner in ("random", "bayesian"):
            number = 10
        oracle = make_oracle(
            args.tuner,
            self.objective,
            number,
            confirm=args.confirm_runs > 0,
            seed=_ORACLE_SEED + options.seed,
            hyperparameters=self.hyperparameters.copy(),
            **extra,
        )
        oracle.verbose = 0
        return oracle

    def _tuner(self, oracle, console=None):
        from tuning.recipe_tuner import RecipeTuner

        return RecipeTuner(
            self.recipe,
            self.given,
            self.space,
            self.objective,
            oracle,
            executions=self.args.executions,
            confirm_executions=self.args.confirm_runs,
            keep_weights=self.args.keep_weights,
            keep_backups=self.args.tuner == "hyperband",
            report=console.print if console else print,
            directory=str(self.folder),
            project_name=PROJECT,
        )

    # -------------------------------------------------------------------------------- reporting

    def _introduce(self, oracle, console):
        from keras_gradclip.tuning.oracles import product_size

        total = {"grid": f"{product_size(oracle.get_space())} combinations"}.get(self.args.tuner)
        number = oracle.search_trials
        trials = f"at most {number} trials" if number else "all trials"
        if oracle.confirm:
            trials += " and 2 that confirm"
        text = ", ".join(part for part in (self.args.tuner, trials, total) if part)
        console.print(f"[bold]{self.recipe.name}[/]: {text}; results in {self.folder}")
        done = len(oracle.end_order)
        if done:
            console.print(f"going on: {done} trials are done and are not run again")

    def _watch_trials(self, oracle, console):
        from keras_gradclip.tuning.oracles import CONFIRMS
        from tuning import results

        show = results.formatter(self.objective.name)

        def on_change(trial, event):
            count = f"{trial.trial_id}"
            if event == "begin":
                repeated = trial.hyperparameters.values.get(CONFIRMS)
                text = f" (trial {repeated} with other seeds)" if repeated else ""
                console.print(f"trial {count}: {results.describe(_values(trial))}{text}")
                return
            rows = results.trial_rows(oracle)
            self._write(rows)
            row = next(row for row in rows if row["trial"] == trial.trial_id)
            best = results.best_row(rows)
            text = show(row["score"]) if row["status"] == "completed" else row["status"]
            if row["status"] == "diverged":
                text += " (ranks last)"
            if row["status"] == "failed":
                text += f": {_last_line(trial.message)}"
            best = f"; best so far {show(best['score'])} (trial {best['trial']})" if best else ""
            console.print(f"trial {count}: {text}{best}", markup=False)

        oracle.on_change = on_change

    def _write(self, rows):
        from tuning import results

        results.write_csv(rows, self.folder / "trials.csv")
        groups = self.space["groups"]
        path = self.folder / "best.json"
        return results.write_best(rows, path, self.objective, groups, self.recipe.name)

    def _report(self, oracle, console) -> int:
        from keras_gradclip.tuning.space import ranges
        from tuning import plots, results

        rows = results.trial_rows(oracle)
        best = self._write(rows)
        title = f"{self.recipe.name}: {len(rows)} trials"
        results.print_table(rows, self.objective, title, console)
        plots.draw(
            rows,
            self.folder / "search.png",
            self.objective,
            title,
            self.folder / PROJECT,
            ranges(self.hyperparameters),
        )
        diverged = sum(row["status"] == "diverged" for row in rows)
        failed = sum(row["status"] == "failed" for row in rows)
        for number, what in ((diverged, "diverged and rank last"), (failed, "failed")):
            if number:
                console.print(f"{number} of {len(rows)} trials {what}")
        console.print(f"[bold]{results.verdict(rows, self.objective)}[/]")
        console.print(f"picture: {self.folder}/search.png, table: {self.folder}/trials.csv")
        if best is None:
            raise RuntimeError("no trial ended well")
        console.print(f"train with it: {self._command(best)}", markup=False)
        return 0

    def _command(self, best) -> str:
        """The command line that trains with the best trial's values, for the recipe's epochs."""
        from tuning.recipe_tuner import trial_settings

        settings = trial_settings(self.given, self.space, best["values"])
        program = self.args.recipe
        if not program.endswith(".py"):
            program = f"{RECIPES[program][0].replace('.', '/')}.py"
        words = ["python", program, "--clip-config", str(self.folder / "best.json")]
        known = opts.table(self.recipe.extra_options)
        for name, value in settings.items():
            hidden = ("clipper", "clip_config", "tensorboard", "verbose")
            if name in hidden or (name in SMALL and value == SMALL[name]):
                continue
            if known[name].kind is bool:
                words.append(known[name].flag if value else f"--no-{name.replace('_', '-')}")
            else:
                words += [known[name].flag, str(value)]
        return shlex.join(words)


def load_recipe(name: str):
    """A recipe by its name, or from a file that defines RECIPE.

    Raises:
        RecipeError: no such recipe or file.
    """
    if not name.endswith(".py"):
        return find_recipe(name)
    path = Path(name)
    if not path.is_file():
        raise RecipeError(f"--recipe {name}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "RECIPE"):
        raise RecipeError(f"--recipe {name}: defines no RECIPE")
    return module.RECIPE


def _name(hp) -> str:
    conditions = hp["config"].get("conditions") or []
    where = "".join(f" ({c['config']['name']}={c['config']['values']})" for c in conditions)
    return hp["config"]["name"] + where


def _values(trial) -> dict:
    return {k: v for k, v in trial.hyperparameters.values.items() if not k.startswith("tuner/")}


def _last_line(text) -> str:
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "see the worker's log"


if __name__ == "__main__":
    sys.exit(main())
