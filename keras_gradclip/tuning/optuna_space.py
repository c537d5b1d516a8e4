"""The search space for Optuna: `suggest(trial)` over the clippers' own declarations.

    def objective(trial):
        values = keras_gradclip.tuning.suggest(trial, learning_rate=(1e-4, 1e-2))
        model.compile(kgc.ClippedOptimizer(..., to_clipper(values)), ...)
        ...

Unused parameters of a trial are not suggested, and so do not reach Optuna's samplers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import optuna

from keras_gradclip.tuning.space import Value, clip_hyperparameters


def suggest(trial: optuna.trial.BaseTrial, **space: object) -> dict[str, Value]:
    """The hyper-parameters of an Optuna trial, for `to_clipper` and `to_gate`.

    Args:
        trial: an `optuna.Trial` or `optuna.trial.FixedTrial`.
        **space: arguments of `clip_hyperparameters`.

    Returns:
        A dict of the active hyper-parameters by name.

    Raises:
        ValueError: not a trial; or as `clip_hyperparameters`.
    """
    if not hasattr(trial, "suggest_float"):
        raise ValueError(f"suggest: `trial` must be an optuna.Trial, but is {trial!r}.")
    return clip_hyperparameters(_TrialParameters(trial), **space)  # type: ignore[arg-type]


class _TrialParameters:
    """An Optuna trial with the interface of `keras_tuner.HyperParameters`."""

    def __init__(self, trial: optuna.trial.BaseTrial) -> None:
        self._trial = trial
        self._active = True
        self._values: dict[str, Value] = {}

    @contextlib.contextmanager
    def conditional_scope(self, name: str, values: Sequence[Value]) -> Iterator[None]:
        before, self._active = self._active, self._active and self._values.get(name) in values
        try:
            yield
        finally:
            self._active = before

    def Choice(self, name: str, values: Sequence[Value], **options: object) -> Value | None:
        return self._keep(name, self._trial.suggest_categorical, values)

    def Boolean(self, name: str, **options: object) -> Value | None:
        return self._keep(name, self._trial.suggest_categorical, (False, True))

    def Float(
        self, name: str, low: float, high: float, *, sampling: str, **options: object
    ) -> Value | None:
        return self._keep(name, self._trial.suggest_float, low, high, log=sampling == "log")

    def Int(self, name: str, low: int, high: int, **options: object) -> Value | None:
        return self._keep(name, self._trial.suggest_int, low, high)

    def _keep(
        self, name: str, ask: Callable[..., Value], *arguments: object, **options: object
    ) -> Value | None:
        if not self._active:
            return None  # as in KerasTuner
        self._values[name] = ask(name, *arguments, **options)
        return self._values[name]
