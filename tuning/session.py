"""A search from its command line: what is searched and where, what it says and what it leaves."""

import contextlib
import fcntl
import importlib.util
import json
import math
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from keras_gradclip.files import read_json, write_json
from recipes.errors import RecipeError
from recipes.registry import find_recipe, script_of
from recipes.training import Recipe
from recipes.training import options as opts
from recipes.training.folder import folder_named
from recipes.training.quiet import import_tensorflow
from recipes.words import counted
from tuning.rows import PROJECT, TrialRow, best_row, describe, formatter
from tuning.space_flags import replacements, search_space

SEARCH = "search.json"
# Enough to tell thresholds apart, little enough for minutes on two cores. Explicit options win.
SMALL = {"epochs": 2, "limit_steps": 100}
# What the search sets itself, beside the clippers' parameters, and what to say instead.
_SEARCHED = {
    "clipper": "--clippers",
    "clip_config": "--clippers",
    "activation_gate": "--search-gate",
    "gate_clip_value": "--search-gate",
    "gate_gamma": "--search-gate",
    "resume": "the same command again, which goes on by itself",
}


class Engine(Protocol):
    """What hands out the trials of a session."""

    #: With `name` and `direction`.
    objective: Any
    #: Whether this process serves a search that another one leads.
    joins: bool

    def prepare(self) -> None:
        """Loads what it needs and checks the space; writes nothing."""

    def identity(self) -> dict[str, Any]:
        """What may not change when a search goes on."""

    def work(self) -> None:
        """Runs trials until another process says that there are no more."""

    def run(self) -> None:
        """Runs or goes on with the search to its end, telling the session of each trial."""

    def rows(self) -> list[TrialRow]:
        """The trials so far, as `tuning.rows.ranked` orders them."""

    def ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of the numbers of the space."""


class Session:
    """A search.

    Args:
        args: of the search.
        rest: the recipe's options.
        argv: the whole command line.
        engine: makes what runs the trials of a session.

    Raises:
        RecipeError: options that do not go together.
    """

    def __init__(
        self,
        args: Namespace,
        rest: Sequence[str],
        argv: Sequence[str],
        engine: "Callable[[Session], Engine]",
    ):
        self.args, self.argv, self._engine = args, list(argv), engine
        for name, least in (("workers", 0), ("executions", 1), ("confirm_runs", 0)):
            if getattr(args, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise RecipeError(f"{flag} {getattr(args, name)}: must be {least} or more")
        if not 0 < args.worker_timeout < math.inf:
            raise RecipeError(
                f"--worker-timeout {args.worker_timeout:g}: must be a finite number above 0"
            )
        if args.max_trials is not None and args.max_trials < 2:
            raise RecipeError(
                f"--max-trials {args.max_trials}: at least 2, one of which is the baseline"
            )
        self.recipe = load_recipe(args.recipe)
        self.given = self._recipe_options(rest)
        self.folder = self._folder()
        self.console: Any = None
        self.space: dict[str, Any] = {}
        self.engine: Engine

    def _folder(self) -> Path:
        output = self.args.output
        if output is None:
            output = str(Path("runs") / f"search-{self.recipe.name}")
            if self.recipe.name != Path(self.recipe.name).name:
                raise RecipeError(f"--output {output!r}: no folder can have this name")
        return folder_named(output)

    def _recipe_options(self, rest: Sequence[str]) -> dict[str, Any]:
        parsed = opts.parse(self.recipe, rest)
        given = {**parsed.config, **parsed.given}
        self.searched = {**_SEARCHED, **dict(replacements())}
        for name, flag in self.searched.items():
            if name in parsed.given:
                raise RecipeError(f"--{name.replace('_', '-')} is searched here: use {flag}")
            given.pop(name, None)
        small = SMALL if self.args.budget == "small" else {}
        quiet: dict[str, Any] = {"tensorboard": False, "verbose": "quiet"}
        if self.args.tuner == "hyperband":
            quiet["keep_backup"] = True  # its next round goes on from there
        given = {**small, **quiet, **given}
        self.recipe.options(**given)  # the check
        return given

    def objective_named(self) -> tuple[str, str | None]:
        """The objective's name, and its direction where the command line or the recipe tells."""
        name, direction = self.args.objective or self.recipe.monitor, self.args.direction
        if direction is None and name == self.recipe.monitor:
            direction = self.recipe.mode
        return name, direction

    def runner(self):
        """What trains the trials."""
        from tuning.trial_runner import TrialRunner

        return TrialRunner(
            self.recipe,
            self.given,
            self.space,
            self.engine.objective,
            executions=self.args.executions,
            confirm_executions=self.args.confirm_runs,
            keep_weights=self.args.keep_weights,
            keep_backups=self.args.tuner == "hyperband",
            report=self.say,
        )

    # --------------------------------------------------------------------------------- the search

    def run(self) -> int:
        """Runs the search, or serves one; returns the exit status."""
        import_tensorflow()
        self.engine = self._engine(self)
        self.space = search_space(self.args, self.recipe, self.given)
        self.engine.prepare()
        if self.engine.joins:
            self.engine.work()
            return 0
        if (self.folder / SEARCH).exists():
            self._check_folder()  # refuse before anything is touched
        self.folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(self.folder):
            self._check_folder()
            return self._search()

    def _search(self) -> int:
        from rich.console import Console

        out = sys.stdout
        errors: contextlib.AbstractContextManager = contextlib.nullcontext()
        width = None if out.isatty() else 120
        self.console = Console(file=out, highlight=False, soft_wrap=True, width=width)
        # Engines print from inside their messages; what we have to say goes around it.
        with open(self.folder / "kerastuner.log", "a") as log:
            if not self.args.traceback:
                errors = contextlib.redirect_stderr(log)
            with contextlib.redirect_stdout(log), errors:
                self.engine.run()
                return self._report()

    def _check_folder(self) -> None:
        """Refuses a folder with another search in it; notes which one it is now."""
        fixed = opts.saved_options(self.recipe, self.recipe.options(**self.given))
        for name in (*self.searched, "recipe"):
            fixed.pop(name, None)
        now = {
            "recipe": self.recipe.name,
            "tuner": self.args.tuner,
            "objective": self.engine.objective.name,
            "direction": self.engine.objective.direction,
            "executions": self.args.executions,
            "confirm_runs": self.args.confirm_runs,
            "groups": self.space["groups"],
            "engine": "kerastuner",  # version 0.2 had another, too
            **self.engine.identity(),
            **{f"recipe option {name}": value for name, value in fixed.items()},
        }
        now = json.loads(json.dumps(now))
        path = self.folder / SEARCH
        if not path.exists():
            if (self.folder / PROJECT).exists():
                raise RecipeError(f"{self.folder}: has trials but no {SEARCH}: give --output")
            write_json(path, now)
            return
        before = read_json(path)
        if not isinstance(before, dict):
            raise RecipeError(f"{path}: is not what a search writes; give another --output")
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

    # --------------------------------------------------------------------------------- what it says

    def say(self, text: str, **options: Any) -> None:
        """A line for the user."""
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(text, **options)

    def introduce(self, trials: str, done: int) -> None:
        """Which search this is, and whether it goes on."""
        if self.args.confirm_runs:
            trials += f", then 2 again with {counted(self.args.confirm_runs, 'other seed')}"
        parts = f"{self.args.tuner}, {trials}"
        self.say(f"[bold]{self.recipe.name}[/]: {parts}; results in {self.folder}")
        if done:
            are = "is" if done == 1 else "are"
            self.say(f"going on: {counted(done, 'trial')} {are} done and not run again")

    def trial_begins(self, trial: str, values: Mapping, confirms: str) -> None:
        """Says which trial begins."""
        text = f" (trial {confirms} with other seeds)" if confirms else ""
        self.say(f"trial {trial}: {describe(values)}{text}", markup=False)

    def trial_ends(self, trial: str) -> None:
        """Says what a trial scored, and brings the files up to date."""
        show = formatter(self.engine.objective.name)
        rows = self.engine.rows()
        self._write(rows)
        row = next(row for row in rows if row.trial == trial)
        best = best_row(rows)
        text = show(row.score) if row.status == "completed" else row.status
        if row.status == "diverged":
            text += " (ranks last)"
        if row.status == "failed":
            text += f": {_last_line(row.message)}"
        so_far = f"; best so far {show(best.score)} (trial {best.trial})" if best else ""
        self.say(f"trial {trial}: {text}{so_far}", markup=False)

    def _write(self, rows: Sequence[TrialRow]):
        from tuning import results

        results.write_trials(rows, self.folder / "trials.csv")
        results.write_hparams(rows, self.folder / "tensorboard", self.engine.objective)
        groups = self.space["groups"]
        path = self.folder / "best.json"
        return results.write_best(rows, path, self.engine.objective, groups, self.recipe.name)

    def _report(self) -> int:
        from tuning import plots, results
        from tuning.verdict import verdict

        objective, rows = self.engine.objective, self.engine.rows()
        best = self._write(rows)
        title = f"{self.recipe.name}: {counted(len(rows), 'trial')}"
        results.print_table(rows, objective, title, self.console)
        picture = self.folder / "search.png"
        plots.draw(rows, picture, objective, title, self.folder / PROJECT, self.engine.ranges())
        for status, what in (("diverged", "diverged and rank last"), ("failed", "failed")):
            number = sum(row.status == status for row in rows)
            if number:
                self.say(f"{number} of {len(rows)} trials {what}")
        self.say(verdict(rows, objective).text, style="bold", markup=False)
        self.say(f"picture: {self.folder}/search.png, table: {self.folder}/trials.csv")
        self.say(f"TensorBoard's HParams: tensorboard --logdir {self.folder}/tensorboard")
        if best is None:
            raise RuntimeError("no trial ended well")
        self.say(f"train with it: {self._command(best)}", markup=False)
        return 0

    def _command(self, best: Mapping) -> str:
        """The command line that trains with the best trial's values, for the recipe's epochs."""
        from tuning.trial_runner import trial_settings

        settings = trial_settings(self.given, self.space, best["values"])
        for name in ("clipper", "clip_config", "tensorboard", "verbose"):
            settings.pop(name, None)
        settings = {n: v for n, v in settings.items() if n not in SMALL or v != SMALL[n]}
        program = self.args.recipe
        if not program.endswith(".py"):
            program = script_of(program)
        words = ["python", program, "--clip-config", str(self.folder / "best.json")]
        return shlex.join([*words, *opts.as_words(self.recipe, settings)])


def load_recipe(name: str):
    """A recipe by its name, or from a file that defines RECIPE.

    Raises:
        RecipeError: no such recipe or file, or one that does not run.
    """
    if not name.endswith(".py"):
        return find_recipe(name)
    path = Path(name)
    if "\0" in name or not path.is_file():
        raise RecipeError(f"--recipe {name}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RecipeError(f"--recipe {name}: {type(error).__name__}: {error}") from error
    if not hasattr(module, "RECIPE"):
        raise RecipeError(f"--recipe {name}: defines no RECIPE")
    if not isinstance(module.RECIPE, Recipe):
        raise RecipeError(f"--recipe {name}: its RECIPE is no Recipe")
    return module.RECIPE


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Refuses a folder in which another search runs; a kill frees it."""
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "?"
            raise RecipeError(
                f"{folder}: another search runs here (process {owner}); give another --output"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _last_line(text: str) -> str:
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "see the worker's log"
