"""A search: its folder, space, oracle and tuner, and its output."""

import contextlib
import itertools
import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras_tuner as kt
from rich.console import Console

from keras_gradclip.files import read_json, write_json
from keras_gradclip.tuning.hypermodel import as_objective
from keras_gradclip.tuning.oracles import CONFIRMS, SearchOracle, make_oracle
from keras_gradclip.tuning.space import clip_hyperparameters, combinations
from recipes.errors import RecipeError, first_line
from recipes.registry import script_of
from recipes.training import Recipe
from recipes.training import options as opts
from recipes.training.folder import differences, locked
from recipes.words import counted
from tuning import plots, results, workers
from tuning.flags import SMALL, search_space, searched_options
from tuning.trial import PROJECT, RecipeTuner, trial_settings

SEARCH = "search.json"
TRIALS = 10  # of a random or Bayesian search
_SEED = 1_000  # KerasTuner reads a seed of 0 as None
_SPACE = "search space: "  # prefix of hyper-parameter names in search.json


class Search:
    """A search of a recipe's thresholds.

    `given` are the recipe options that the user set, `args` the search's own flags.

    Raises:
        RecipeError: options that contradict each other.
        ValueError: an objective of unknown direction, or an invalid search space.
    """

    def __init__(self, recipe: Recipe, given: Mapping[str, Any], args: Namespace, folder: Path):
        self.recipe, self.given, self.args, self.folder = recipe, given, args, folder
        self.role = workers.role()
        if self.role == "chief" and args.workers:
            raise RecipeError("--workers starts a chief of its own: unset KERASTUNER_TUNER_ID")
        name, direction = args.objective or recipe.monitor, args.direction
        if direction is None and name == recipe.monitor:
            direction = recipe.mode
        self.objective = as_objective(name, direction)
        self.space = {**self._space_before(), **search_space(args, recipe, given)}
        self.hyperparameters = kt.HyperParameters()
        clip_hyperparameters(self.hyperparameters, **self.space)
        self.console: Console | None = None
        self.oracle: SearchOracle

    # --------------------------------------------------------------------------------- the search

    def run(self) -> int:
        """Runs the search, or its trials in a worker; returns the exit status.

        Raises:
            RecipeError: the folder holds another search, or damaged files.
            RuntimeError: no trial completed, or all workers failed.
        """
        if self.role == "worker":
            with workers.heartbeat(self.folder), _causes():
                self._tuner(self._new_oracle()).search()
            return 0
        if (self.folder / SEARCH).exists():
            self._check_folder()  # before any file is written
        with locked(self.folder, "search"):
            self._check_folder()
            out = sys.stdout
            width = None if out.isatty() else 120
            plain: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
            self.console = Console(file=out, width=width, **plain)
            errors: contextlib.AbstractContextManager = contextlib.nullcontext()
            # KerasTuner's own output goes to a file.
            with open(self.folder / "kerastuner.log", "a", encoding="utf-8") as log:
                if not self.args.traceback:
                    errors = contextlib.redirect_stderr(log)
                with contextlib.redirect_stdout(log), errors, _causes():
                    self._run_trials()
                    return self._report()

    def _run_trials(self) -> None:
        args = self.args
        with workers.started(args.workers, self.folder) as processes:
            self.oracle = self._new_oracle()
            tuner = self._tuner(self.oracle)
            self.oracle.on_change = self._on_change
            self._introduce()
            if processes or self.role == "chief":
                workers.lead(
                    tuner.search, self.oracle, self.folder, args.worker_timeout, processes, self.say
                )
            else:
                tuner.search()

    def _new_oracle(self) -> SearchOracle:
        args, options = self.args, self.recipe.options(**self.given)
        number = args.max_trials
        if number is None and args.tuner in ("random", "bayesian"):
            number = TRIALS
        oracle = make_oracle(
            args.tuner,
            self.objective,
            number,
            confirm=args.confirm_runs > 0,
            seed=_SEED + options.seed,
            hyperparameters=self.hyperparameters.copy(),
            **({"max_epochs": options.epochs} if args.tuner == "hyperband" else {}),
        )
        oracle.verbose = 0
        return oracle

    def _tuner(self, oracle: SearchOracle) -> RecipeTuner:
        options = (self.recipe, self.given, self.space, self.objective, self.args)
        try:
            return RecipeTuner(*options, self.say, oracle, self.folder)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RecipeError(
                f"{self.folder / PROJECT}: the saved search is damaged "
                f"({type(error).__name__}: {first_line(error)}); give another --output"
            ) from error

    # ---------------------------------------------------------------------------------- the folder

    def _saved(self) -> dict[str, Any]:
        path = self.folder / SEARCH
        if not path.exists():
            return {}
        before = read_json(path)
        if not isinstance(before, dict):
            raise self._damaged()
        return before

    def _damaged(self) -> RecipeError:
        path = self.folder / SEARCH
        return RecipeError(f"{path}: is not the file of a search; give another --output")

    def _space_before(self) -> dict[str, Any]:
        """The range of `beta` in a search of an older version, which varied it by default."""
        before = self._saved()
        for name, config in before.items() if "engine" in before else ():
            if name.startswith(f"{_SPACE}exponential/beta"):
                try:
                    limits = config.get("values") or (config["min_value"], config["max_value"])
                    return {"exponential/beta": (min(limits), max(limits))}
                except (AttributeError, KeyError, TypeError):
                    raise self._damaged() from None
        return {}

    def _check_folder(self) -> None:
        """Writes the search's settings into its folder, or compares them with the saved ones."""
        fixed = dict(self.recipe.options(**self.given).saved)
        for name in (*searched_options(), "recipe"):
            fixed.pop(name, None)
        now = {
            "recipe": self.recipe.name,
            "tuner": self.args.tuner,
            "objective": self.objective.name,
            "direction": self.objective.direction,
            "executions": self.args.executions,
            "confirm_runs": self.args.confirm_runs,
            "groups": self.space["groups"],
            **{
                f"{_SPACE}{_with_conditions(hp)}": hp["config"]
                for hp in self.hyperparameters.get_config()["space"]
            },
            **{f"recipe option {name}": value for name, value in fixed.items()},
        }
        now = json.loads(json.dumps(now))
        before = self._saved()
        if not before:
            if (self.folder / PROJECT / "oracle.json").exists():
                raise RecipeError(f"{self.folder}: has trials but no {SEARCH}: give --output")
            write_json(self.folder / SEARCH, now)
            return
        space = [name for name in {**before, **now} if name.startswith(_SPACE)]
        changed = [name for name in space if before.get(name) != now.get(name)][:3]
        others = differences(before, now, free=space)
        if changed or others:
            raise RecipeError(
                f"{self.folder} holds another search; changed: "
                f"{', '.join(filter(None, [*changed, others]))}. Give another --output, or the "
                "earlier options to resume it"
            )

    # --------------------------------------------------------------------------------------- output

    def say(self, text: str, **options: Any) -> None:
        """Prints a line for the user."""
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(text, **options)

    def _introduce(self) -> None:
        number = self.oracle.search_trials
        done = sum(trial.status != "RUNNING" for trial in self.oracle.trials.values())
        trials = f"at most {counted(number, 'trial')}" if number else "all trials"
        if self.args.tuner == "grid":
            grid = itertools.islice(combinations(self.oracle.get_space()), 1_000_000)
            trials += f" of {counted(sum(1 for _ in grid), 'combination')}"
        if self.args.confirm_runs:
            trials += f", then 2 again with {counted(self.args.confirm_runs, 'other seed')}"
        self.say(f"{self.recipe.name}: {self.args.tuner}, {trials}; results in {self.folder}")
        if done:
            are = "is" if done == 1 else "are"
            self.say(f"resuming: {counted(done, 'trial')} {are} done and will not run again")

    def _on_change(self, trial: Any, event: str) -> None:
        """Prints which trial begins or how it ended, and updates the files."""
        if event == "begin":
            values = trial.hyperparameters.values
            again = f" (trial {values[CONFIRMS]} with other seeds)" if CONFIRMS in values else ""
            text = results.describe(results.own_values(values)) + again
        else:
            rows = results.trial_rows(self.oracle)
            self._write(rows)
            row = next(row for row in rows if row.trial == trial.trial_id)
            show, best = results.formatter(self.objective.name), results.best_row(rows)
            text = show(row.score) if row.status == "completed" else row.status
            if row.status == "diverged":
                text += " (ranks last)"
            if row.status == "failed":
                lines = row.message.strip().splitlines() or ["see the worker's log"]
                text += f": {lines[-1].strip()}"
            text += f"; best so far {show(best.score)} (trial {best.trial})" if best else ""
        self.say(f"trial {trial.trial_id}: {text}")

    def _write(self, rows: Sequence[results.TrialRow]) -> dict[str, Any] | None:
        results.write_trials(rows, self.folder / "trials.csv")
        results.write_hparams(rows, self.folder / "tensorboard", self.objective)
        path, groups = self.folder / "best.json", self.space["groups"]
        return results.write_best(rows, path, self.objective, groups, self.recipe.name)

    def _report(self) -> int:
        assert self.console is not None
        objective, rows = self.objective, results.trial_rows(self.oracle)
        best, answer = self._write(rows), results.verdict(rows, objective)
        title = f"{self.recipe.name}: {counted(len(rows), 'trial')}"
        results.print_table(rows, objective, title, self.console)
        picture = self.folder / "search.png"
        plots.draw(rows, picture, objective, title, self.folder / PROJECT)
        for status, what in (("diverged", "diverged and rank last"), ("failed", "failed")):
            number = sum(row.status == status for row in rows)
            if number:
                self.say(f"{number} of {len(rows)} trials {what}")
        self.say(answer.text, style="bold")
        self.say(f"picture: {picture}, table: {self.folder}/trials.csv")
        self.say(f"TensorBoard's HParams: tensorboard --logdir {self.folder}/tensorboard")
        if best is None:
            raise RuntimeError("no trial completed")
        if answer.learned:
            self.say(f"train with it: {self._command(best['values'])}")
        return 0

    def _command(self, values: Mapping[str, Any]) -> str:
        """The command that trains with the best trial's values, for the recipe's own epochs."""
        settings = trial_settings(self.given, self.space, values)
        for name in ("clipper", "clip_config", "tensorboard", "verbose", "keep_backup"):
            settings.pop(name, None)
        settings = {n: v for n, v in settings.items() if n not in SMALL or v != SMALL[n]}
        program = self.args.recipe
        if not program.endswith(".py"):
            program = script_of(program)
        words = ["python", program, "--clip-config", str(self.folder / "best.json")]
        return shlex.join([*words, *opts.as_words(self.recipe, settings)])


@contextlib.contextmanager
def _causes() -> Iterator[None]:
    """KerasTuner's `FatalError`, as the error that `RecipeTuner.run_trial` raised it for."""
    try:
        yield
    except kt.errors.FatalError as error:
        raise error.__cause__ or error from None


def _with_conditions(hp: Mapping[str, Any]) -> str:
    conditions = hp["config"].get("conditions") or []
    where = "".join(f" ({c['config']['name']}={c['config']['values']})" for c in conditions)
    return hp["config"]["name"] + where
