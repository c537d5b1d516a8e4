"""KerasTuner runs the search: its oracle, its tuner, and its chief and workers."""

import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras_tuner as kt

from keras_gradclip.tuning._kerastuner import BaseTuner, mark_for_reload
from keras_gradclip.tuning.hypermodel import as_objective
from keras_gradclip.tuning.oracles import BASELINE, CONFIRMS, make_oracle, product_size
from keras_gradclip.tuning.space import clip_hyperparameters, ranges
from recipes.errors import RecipeError, first_line
from recipes.words import counted
from tuning import workers
from tuning.rows import PROJECT, TrialRow, ranked
from tuning.session import Session
from tuning.trial_runner import TrialRunner, trial_row

TRIALS = 10  # of a random or Bayesian search
_SEED = 1_000  # KerasTuner takes a seed of 0 for none


class KerasTunerEngine:
    """A search by KerasTuner, in this process or as a chief that workers ask for trials.

    Args:
        session: the search.

    Raises:
        RecipeError: variables or options that do not go together.
    """

    def __init__(self, session: Session):
        self.session = session
        self.role = workers.role()
        self.joins = self.role == "worker"
        if self.role == "chief" and session.args.workers:
            raise RecipeError("--workers starts a chief of its own: unset KERASTUNER_TUNER_ID")

    def prepare(self) -> None:
        """The objective and the space."""
        self.objective = as_objective(*self.session.objective_named())
        self.hyperparameters = kt.HyperParameters()
        clip_hyperparameters(self.hyperparameters, **self.session.space)

    def identity(self) -> dict[str, Any]:
        """Every hyper-parameter with its range."""
        space = self.hyperparameters.get_config()["space"]
        return {f"search space: {_with_conditions(hp)}": hp["config"] for hp in space}

    def _new_oracle(self):
        args = self.session.args
        options = self.session.recipe.options(**self.session.given)
        extra = {"max_epochs": options.epochs} if args.tuner == "hyperband" else {}
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
            **extra,
        )
        oracle.verbose = 0
        return oracle

    def _tuner(self, oracle) -> "RecipeTuner":
        folder = self.session.folder
        try:
            return RecipeTuner(self.session.runner(), oracle, folder, PROJECT)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise RecipeError(
                f"{folder / PROJECT}: what the search wrote there is damaged "
                f"({type(error).__name__}: {first_line(error)}); give another --output"
            ) from error

    def work(self) -> None:
        """Runs the trials that the chief hands out."""
        with workers.heartbeat(self.session.folder):
            self._tuner(self._new_oracle()).search()

    def run(self) -> None:
        """Runs the search, with workers on this machine where asked for."""
        args, folder = self.session.args, self.session.folder
        started: dict = {}
        if args.workers:
            command = [*workers.worker_command(), *self.session.argv]
            environment = workers.become_chief()
            started = workers.start_workers(args.workers, command, folder, environment)
        try:
            self.oracle = self._new_oracle()
            tuner = self._tuner(self.oracle)
            self.oracle.on_change = self._on_change
            self._introduce()
            if started or self.role == "chief":
                timeout, say = args.worker_timeout, self.session.say
                with workers.Watchdog(self.oracle, folder, timeout, started, say):
                    tuner.search()
            else:
                tuner.search()
        except kt.errors.FatalError as error:
            raise error.__cause__ or error from None
        finally:
            workers.stop_workers(started)

    def _introduce(self) -> None:
        number = self.oracle.search_trials
        trials = f"at most {counted(number, 'trial')}" if number else "all trials"
        if self.session.args.tuner == "grid":
            trials += f", {product_size(self.oracle.get_space())} combinations"
        self.session.introduce(trials, len(self.oracle.ended))

    def _on_change(self, trial, event: str) -> None:
        if event == "begin":
            values = trial.hyperparameters.values
            confirms = values.get(CONFIRMS, "")
            self.session.trial_begins(trial.trial_id, _own_values(values), confirms)
        else:
            self.session.trial_ends(trial.trial_id)

    def rows(self) -> list[TrialRow]:
        """The oracle's trials."""
        return oracle_rows(self.oracle)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Of the space's numbers."""
        return ranges(self.hyperparameters)


class RecipeTuner(BaseTuner):
    """Runs trials of a recipe.

    Hyperband's later rounds go on from a copy of the round before, optimizer state included.

    Args:
        runner: `TrialRunner`.
        oracle, directory, project_name: as of KerasTuner's tuners.
    """

    def __init__(
        self, runner: TrialRunner, oracle, directory: str | os.PathLike, project_name: str
    ):
        self.runner = runner
        self._asked = False
        mark_for_reload(Path(directory) / project_name)
        super().__init__(
            oracle, hypermodel=None, directory=str(directory), project_name=project_name
        )

    def pre_create_trial(self):
        """KerasTuner asks again at once where there is nothing to do yet."""
        if self._asked:
            time.sleep(1)
        self._asked = True

    def run_trial(self, trial, *args, **kwargs):
        """Trains the trial's runs, and reports the means of their metrics."""
        self._asked = False
        values = trial.hyperparameters.values
        parent = values.get("tuner/trial_id")
        try:
            return self.runner.run(
                values,
                Path(self.get_trial_dir(trial.trial_id)),
                confirms=CONFIRMS in values,
                last=values.get("tuner/epochs"),
                parent=Path(self.get_trial_dir(parent)) if parent else None,
            )
        except (RecipeError, OSError) as error:
            # The same in every trial: a full disk, a data set that is not there ...
            raise kt.errors.FatalError(str(error)) from error


def oracle_rows(oracle) -> list[TrialRow]:
    """An oracle's trials as `tuning.rows.ranked` orders them."""
    rows = []
    for trial_id, trial in oracle.trials.items():
        values, metrics = trial.hyperparameters.values, trial.metrics
        status = {"COMPLETED": "completed", "FAILED": "failed"}.get(trial.status, "running")
        rows.append(
            trial_row(
                trial_id,
                status,
                _own_values(values),
                math.nan if trial.score is None else float(trial.score),
                {name: float(metrics.get_last_value(name)) for name in metrics.metrics},
                baseline=BASELINE in values,
                confirms=values.get(CONFIRMS, ""),
                message=trial.message or "",
            )
        )
    return ranked(rows, oracle.objective.direction)


def _own_values(values: Mapping) -> dict[str, Any]:
    """The hyper-parameters without KerasTuner's own notes."""
    return {name: value for name, value in values.items() if not name.startswith("tuner/")}


def _with_conditions(hp: Mapping) -> str:
    conditions = hp["config"].get("conditions") or []
    where = "".join(f" ({c['config']['name']}={c['config']['values']})" for c in conditions)
    return hp["config"]["name"] + where
