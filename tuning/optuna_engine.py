"""Optuna runs the search: one study in a database, any number of processes that take trials.

No process leads: each asks the study for its next trial. The heartbeat of a process that was
killed stops, and its trial waits for the next one who asks, in the folder where it was.
"""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from keras_gradclip.tuning.optuna_space import grid, suggest
from recipes.errors import RecipeError, first_line
from recipes.words import counted
from tuning import workers
from tuning.optuna_trials import (
    BASELINE,
    CONFIRMS,
    ERROR,
    METRICS,
    MOST_LOSSES,
    SURPLUS,
    VALUES,
    Trials,
    name_of,
    origin,
)
from tuning.rows import TrialRow, best_of_each
from tuning.session import Session

DATABASE = "optuna.db"
TRIALS = 10  # where nothing else is said


@dataclass(frozen=True)
class Objective:
    """What is optimised."""

    name: str
    direction: str


class _SurplusTrial(Exception):
    """Two processes asked for the last trial at once."""


class _FailedTrial(Exception):
    """One trial failed; the others go on."""


class OptunaEngine:
    """A search by Optuna.

    Args:
        session: the search.

    Raises:
        RecipeError: options that do not go together.
    """

    def __init__(self, session: Session):
        self.session, self.joins = session, session.args.join
        shared = self.joins or session.args.workers
        # A trial that takes its workers with it, say for want of memory, is given up; a search
        # that its user ended is not.
        self._on_loss = RetryHeartbeatStaleTrialCallback(MOST_LOSSES - 1 if shared else None)
        self._again = RetryHeartbeatStaleTrialCallback()
        self._told: set[tuple[str, str]] = set()
        optuna.logging.disable_propagation()
        optuna.logging.set_verbosity(logging.ERROR)

    def prepare(self) -> None:
        """The objective and the space."""
        name, direction = self.session.objective_named()
        for word, usual in (("accuracy", "max"), ("loss", "min")):
            if direction is None and word in name:
                direction = usual
        if direction not in ("max", "min"):
            raise RecipeError(f"--objective {name}: large or small? Say --direction max or min")
        self.objective = Objective(name, direction)
        if self.session.args.storage:
            with self._named_errors():
                make_url(self.session.args.storage).get_dialect()
        # The check; in memory.
        suggest(optuna.create_study().ask(), **self.session.space)

    def identity(self) -> dict[str, Any]:
        """Every argument of the space."""
        return {f"search space: {name}": value for name, value in self.session.space.items()}

    # ---------------------------------------------------------------------------------- the study

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Errors of the database, without its URL, which may hold a password."""
        own = self.session.folder / DATABASE
        try:
            yield
        except (ImportError, SQLAlchemyError) as error:
            what = "--storage" if self.session.args.storage else str(own)
            text = getattr(error, "orig", None) or first_line(error)
            raise RecipeError(f"{what}: the study cannot be opened: {text}") from error

    def _open(self) -> optuna.Study:
        with self._named_errors():
            return self._study()

    def _study(self) -> optuna.Study:
        args, folder = self.session.args, self.session.folder
        url = args.storage or f"sqlite:///{folder.resolve() / DATABASE}"
        storage = RDBStorage(
            url,
            # SQLite: wait for another process's write instead of giving up.
            engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
            heartbeat_interval=max(1, int(args.worker_timeout / 4)),
            grace_period=max(2, int(args.worker_timeout)),
            heartbeat_stale_trial_callback=self._on_loss,
        )
        study = optuna.create_study(
            study_name=f"{self.session.recipe.name}: {folder.name}",
            storage=storage,
            pruner=_pruner(self.session),
            direction="maximize" if self.objective.direction == "max" else "minimize",
            load_if_exists=True,
        )
        study.sampler = _sampler(self.session, self._limit(), len(study.get_trials(deepcopy=False)))
        return study

    def run(self) -> None:
        """Runs the search, in this process or in workers of this machine; then confirms."""
        with _no_experimental_warnings():
            self.trials = Trials(self._open())
            self._enqueue_first()
            done = self.trials.finished()
            self._told = {(name, event) for name in done for event in ("begin", "end")}
            self.session.introduce(f"at most {counted(self._limit(), 'trial')}", len(done))
            self._work_here_or_in_workers()
            if self.session.args.confirm_runs:
                self._enqueue_confirmations()
                self._work_here_or_in_workers()

    def _enqueue_first(self) -> None:
        """The baseline, and the combinations of a grid."""
        space, args = self.session.space, self.session.args
        first: dict[str, Any] = {"clipper": "none"}
        if space["activation_gate"]:
            first["activation_gate"] = False
        combinations = grid(**space) if args.tuner == "grid" else []
        if combinations:
            plain = [c for c in combinations if c.items() >= first.items()]
            rate = space.get("default_learning_rate")
            plain.sort(key=lambda c: abs(math.log(c["learning_rate"] / rate)) if rate else 0)
            first = plain[0]
        elif "learning_rate" in space:
            first["learning_rate"] = space["default_learning_rate"]
        study = self.trials.study
        if not any(BASELINE in trial.user_attrs for trial in study.get_trials(deepcopy=False)):
            study.enqueue_trial(first, user_attrs={BASELINE: True})
        for combination in combinations[: self._limit()]:
            study.enqueue_trial(combination, skip_if_exists=True)

    def _enqueue_confirmations(self) -> None:
        rows = self.rows()
        own = [row for row in rows if not row.confirms]
        confirmed = {row.confirms for row in rows}
        if not any(row.status == "completed" for row in own):
            return
        for row in sorted(filter(None, best_of_each(own)), key=own.index):
            if row.trial not in confirmed:
                params = self.trials.by_name()[row.trial].params
                self.trials.study.enqueue_trial(params, user_attrs={CONFIRMS: row.trial})

    def _limit(self) -> int:
        """Trials of the search itself."""
        args = self.session.args
        if args.tuner == "grid":
            return args.max_trials or len(grid(**self.session.space))
        return args.max_trials or TRIALS

    # ------------------------------------------------------------------------------- the processes

    def _work_here_or_in_workers(self) -> None:
        args, folder = self.session.args, self.session.folder
        if not args.workers:
            self._take_trials()
            return
        command = [*workers.worker_command(), *self.session.argv, "--join"]
        started = workers.start_workers(args.workers, command, folder, {})
        try:
            while any(process.poll() is None for process in started.values()):
                time.sleep(1)
                self._tell()
        finally:
            workers.stop_workers(started)
        self._tell()
        if not any(process.returncode == 0 for process in started.values()):
            raise RuntimeError(
                f"all workers have ended; see {folder}/worker-0.log. The same command goes on "
                "with the search"
            )

    def work(self) -> None:
        """Joins a search that runs."""
        folder = self.session.folder
        if not (folder / "search.json").exists():
            raise RecipeError(f"{folder}: no search runs here to --join")
        with _no_experimental_warnings():
            self.trials = Trials(self._open())
            with workers.heartbeat(folder):
                self._take_trials()

    def _take_trials(self) -> None:
        """Runs trials until there are none to run, nor any that may come back."""
        while True:
            fail_stale_trials(self.trials.study)
            trials = self.trials.by_name().values()
            states = [trial.state for trial in trials]
            own = sum(CONFIRMS not in trial.user_attrs for trial in trials)
            if TrialState.WAITING in states or own < self._limit():
                catch = (_SurplusTrial, _FailedTrial)
                self.trials.study.optimize(self._run_trial, n_trials=1, catch=catch)
                self._tell()
                self.trials.check_failures()
            elif TrialState.RUNNING in states:
                time.sleep(1)
            else:
                return

    def _run_trial(self, trial: optuna.Trial) -> float:
        own = [t for t in self.trials.by_name().values() if CONFIRMS not in t.user_attrs]
        before = sum(origin(other) < trial.number for other in own)
        again = origin(self.trials.frozen(trial)) != trial.number
        if before >= self._limit() and not again and CONFIRMS not in trial.user_attrs:
            trial.set_user_attr(SURPLUS, True)
            raise _SurplusTrial
        trial.set_user_attr(VALUES, suggest(trial, **self.session.space))
        self._tell()
        try:
            return self._train(trial)
        except optuna.TrialPruned:
            raise
        except (RecipeError, OSError, KeyboardInterrupt):
            # The end of this process, or the same in every trial, as a full disk: try it again.
            self._again(self.trials.study, self.trials.frozen(trial))
            raise
        except Exception as error:
            trial.set_user_attr(ERROR, f"{type(error).__name__}: {error}")
            raise _FailedTrial from error

    def _train(self, trial: optuna.Trial) -> float:
        prunable = not {CONFIRMS, BASELINE} & trial.user_attrs.keys()
        seen: set[int] = set()
        pruned = False

        def on_epoch(epoch: int, score: float) -> bool:
            nonlocal pruned
            if prunable and epoch not in seen:  # its first run decides
                seen.add(epoch)
                trial.report(score, epoch)
                pruned = pruned or trial.should_prune()
            return pruned

        metrics = self.session.runner().run(
            trial.user_attrs[VALUES],
            self.session.folder / "trials" / f"trial_{name_of(self.trials.frozen(trial))}",
            confirms=CONFIRMS in trial.user_attrs,
            on_epoch=on_epoch,
        )
        trial.set_user_attr(METRICS, metrics)
        if pruned:
            raise optuna.TrialPruned
        return metrics[self.objective.name]

    def _tell(self) -> None:
        """Says which trials began and ended since last time."""
        for name, trial in self.trials.by_name().items():
            attributes = trial.user_attrs
            if VALUES in attributes and (name, "begin") not in self._told:
                self._told.add((name, "begin"))
                values = attributes[VALUES]
                self.session.trial_begins(name, values, attributes.get(CONFIRMS, ""))
            if trial.state.is_finished() and (name, "end") not in self._told:
                self._told.add((name, "end"))
                if not self.joins:  # whose search it is writes the files
                    self.session.trial_ends(name)

    def rows(self) -> list[TrialRow]:
        """The study's trials."""
        return self.trials.rows(self.objective.direction)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Of the numbers that were suggested."""
        return self.trials.ranges()


def _sampler(session: Session, limit: int, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler; seeded by the number of trials, so that a resumed one repeats none."""
    args = session.args
    seed = session.recipe.options(**session.given).seed + trials
    if args.workers or args.join:
        seed = None  # each process its own
    if args.tuner in ("random", "grid"):
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=max(3, limit // 3),
        multivariate=True,
        group=True,
        constant_liar=True,  # trials that run elsewhere count as bad, so none is tried twice
    )


def _pruner(session: Session) -> optuna.pruners.BasePruner:
    if session.args.tuner != "hyperband":
        return optuna.pruners.NopPruner()
    epochs = session.recipe.options(**session.given).epochs
    return optuna.pruners.HyperbandPruner(1, epochs, 3)


@contextlib.contextmanager
def _no_experimental_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
