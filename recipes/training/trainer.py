"""The training run: from its folder, and its first step or backup, to the result."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.command_line import import_tensorflow
from recipes.plugin import files
from recipes.training import folder as folders
from recipes.training import multiworker
from recipes.training.options import Options
from recipes.training.recipe import Recipe, Result
from recipes.words import counted

if TYPE_CHECKING:  # flags need not wait for TensorFlow
    from recipes.training.build import Setup
    from recipes.training.checkpoint import Start


def run(
    recipe: Recipe,
    options: Options,
    folder: str | os.PathLike[str],
    callbacks: Sequence[Any] = (),
    started: float | None = None,
) -> Result | None:
    """Trains, and writes everything into `folder`.

    With `--strategy multiworker` every worker calls this. The chief writes and returns a `Result`,
    the others return None; to resume a run, all must see `folder`.

    Args:
        recipe: `Recipe`.
        options: from `recipe.options(...)`.
        folder: the folder of the results; with `options.resume`, of the run to continue.
        callbacks: more Keras callbacks, run after the recipe's own.
        started: `time.monotonic()` at the start of the run's time; None for now.

    Raises:
        RecipeError: an invalid clipper, data set or device, or a folder that is in use.
        TrainingDiverged: NaN; names the variable of the first gradient that was not finite.
        WorkerLost: another worker died or hangs.
        OSError: a full disk, a folder that cannot be written.
    """
    folder, started = Path(folder), time.monotonic() if started is None else started
    with contextlib.ExitStack() as stack:
        if options.strategy != "multiworker" or multiworker.read_cluster().is_chief:
            stack.enter_context(folders.claimed(folder, options.resume))
        import_tensorflow()
        from keras_gradclip import report
        from recipes.training import build, checkpoint
        from recipes.training import callbacks as cb

        setup = stack.enter_context(build.prepared(recipe, options))
        feed, shows = setup.feed, setup.writes and options.verbose != "quiet"
        for line in build.warnings(options):
            print(f"warning: {line}", file=sys.stderr)
        if shows:
            print("\n".join([*setup.description(), f"  results in {folder}"]), flush=True)
        setup.create_state()
        start, ends = checkpoint.find_start(setup, folder), options.epochs * feed.steps
        if shows and start.step:
            print(_progress(start.step, ends, feed.steps), flush=True)
        if setup.writes and not start.finished:
            files.write_json(folder / folders.CONFIG, options.saved)

        monitored = None
        if start.step < ends:
            if options.monitor:
                # A resumed run measures from there on, in a folder of its own.
                since = f"-from-{start.step}" if start.step else ""
                monitored = folder / f"{folders.MONITOR}{since}"
            chain = cb.chain(setup, start, folder, monitored, started)
            setup.model.fit(
                feed.training(start.step),
                validation_data=feed.evaluation(setup.data.validation),
                initial_epoch=start.step // feed.steps,
                epochs=options.epochs,
                steps_per_epoch=feed.steps,
                shuffle=False,  # the stream is
                callbacks=[*chain, *callbacks],
                verbose=0,
            )
        if not setup.writes:
            return None
        if monitored is not None:
            print(f"gradient report: {report(monitored)}")
        result = _result(setup, start, folder, started)
        if result.history[-1]["epoch"] >= options.epochs:
            files.write_json(folder / folders.RESULT, _summary(result))
            if not options.keep_backup:
                (folder / folders.BACKUP).unlink(missing_ok=True)
        return result


def _progress(done: int, ends: int, steps: int) -> str:
    """The line about a resumed run: `done` of `ends` steps, `steps` per epoch."""
    if done >= ends:
        return "  finished: all steps are done, and nothing is trained"
    epoch, step = divmod(done, steps)
    return f"  resuming at epoch {epoch + 1}, step {step + 1} ({counted(done, 'step')} done)"


def _result(setup: "Setup", start: "Start", folder: Path, started: float) -> Result:
    """The result of the run; draws its curves."""
    from recipes.training import plots

    recipe, rows = setup.recipe, start.history
    metric = recipe.monitor.removeprefix("val_")
    title = f"{recipe.name} on {setup.data.name}"
    plots.draw_curves(rows, start.layers, folder / "curves.png", title, metric)
    kept = recipe.kept_epoch(setup.options.select_best, rows)
    place = (recipe.kept_epoch("improve", rows) or 0) if kept is None else kept
    fractions = [row.get("clip_fraction", math.nan) for row in rows]
    fractions = [value for value in fractions if not math.isnan(value)]  # of epochs with updates
    return Result(
        recipe=recipe.name,
        output=folder,
        monitor=recipe.monitor,
        best=rows[place][recipe.monitor],
        best_epoch=place,
        kept=kept is not None,
        history=rows,
        test={} if kept is None else setup.test(folder / folders.BEST),
        parameters=setup.exported.count_params(),
        clip_fraction=sum(fractions) / len(fractions) if fractions else math.nan,
        seconds=start.seconds + (0 if start.finished else time.monotonic() - started),
        data=setup.data,
    )


def _summary(result: Result) -> dict[str, object]:
    """The content of `result.json`."""
    return {
        "recipe": result.recipe,
        "monitor": result.monitor,
        "best": result.best,
        "best_epoch": result.best_epoch + 1,
        "epochs": len(result.history),
        "test": dict(result.test),
        "parameters": result.parameters,
        "clip_fraction": None if math.isnan(result.clip_fraction) else result.clip_fraction,
        "seconds": round(result.seconds, 1),
    }
