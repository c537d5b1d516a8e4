"""The core clippers: absolute, exponential, by norm, and several in a row."""

from __future__ import annotations

import collections
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from keras import ops

from keras_gradclip import _kernels as kernels
from keras_gradclip import _validation as validation
from keras_gradclip.clippers.base import (
    Clipper,
    ClipStats,
    Composite,
    State,
    as_clipper,
    deserialize_value,
    layers_of,
    register,
    serialize_value,
    size_of,
)


class _PerVariable(Clipper):
    """A clipper that treats each variable by itself and bounds elements."""

    rescale: str | None

    def apply(self, grads, variables, state, hyper):
        """Clip each gradient by itself: see `Clipper.apply`."""
        present = [i for i, g in enumerate(grads) if g is not None]
        before = [kernels.values(grads[i]) for i in present]
        after = self._clip([grads[i] for i in present], [variables[i] for i in present], hyper)
        clipped: list[Any] = [None] * len(grads)
        for i, x, y in zip(present, before, after, strict=True):
            clipped[i] = kernels.with_values(grads[i], _rescale(self.rescale, x, y))

        def fractions():
            result: list[Any] = [None] * len(grads)
            limits = [self._limit(grads[i], variables[i], hyper) for i in present]
            sizes = [size_of(variables[i]) for i in present]
            shares = kernels.fractions_over(before, limits, sizes)
            for i, share in zip(present, shares, strict=True):
                result[i] = share
            return result

        weights = [
            0.0 if g is None else float(size_of(v)) for g, v in zip(grads, variables, strict=True)
        ]
        return clipped, state, ClipStats(fractions, weights, "elements")

    def _clip(self, grads, variables, hyper) -> list[Any]:
        """The values of the clipped gradients; the rescale "alpha" is done here as well."""
        raise NotImplementedError

    def _limit(self, gradient, variable, hyper) -> Any:
        """The threshold of one gradient's elements: a scalar, or of the shape of its values."""
        raise NotImplementedError


def _rescale(mode: str | None, before: Any, after: Any) -> Any:
    """Bring a clipped gradient back to a size; see the table of equations in the README."""
    if mode not in ("norm", "max"):
        return after
    size = kernels.max_abs if mode == "max" else lambda x: ops.sqrt(kernels.sum_of_squares(x))
    return kernels.scale(after, kernels.ratio(size(before), size(after)))


@register("absolute")
@dataclasses.dataclass(frozen=True)
class AbsoluteClip(_PerVariable):
    """Absolute clipping: g' = clip(g, −c, c), element by element.

    Args:
        threshold: c, a positive number or a LearningRateSchedule. Useful from 0.01 to 0.1.
        rescale: None, "norm" (the L2 norm of each variable's gradient comes back) or "max" (its
            largest element comes back).

    Raises:
        ValueError: a threshold that is not above 0, or an unknown rescale.
    """

    threshold: Any = 0.1
    rescale: str | None = None
    live: ClassVar[tuple[str, ...]] = ("threshold",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale == "alpha":
            raise ValueError(
                "AbsoluteClip: `rescale='alpha'` multiplies by exp(β·W) and belongs to "
                "ExponentialClip. Use None, 'norm' or 'max' here."
            )
        validation.choice("AbsoluteClip", "rescale", self.rescale, (None, "norm", "max"))

    def _clip(self, grads, variables, hyper):
        return kernels.clip_each([kernels.values(g) for g in grads], hyper["threshold"])

    def _limit(self, gradient, variable, hyper):
        return hyper["threshold"]


@register("exponential")
@dataclasses.dataclass(frozen=True)
class ExponentialClip(_PerVariable):
    """Exponential clipping: the threshold α grows exponentially with the weight W.

    α = γ·exp(β·W) element by element, g' = clip(g, −α, α). With γ = 1 the threshold is near 1
    for small weights and rarely clips: watch `clip_fraction`, and lower γ (0.01 to 0.1) if it
    stays at 0.

    Args:
        beta: β, positive number or LearningRateSchedule. Useful from 0.5 to 1, larger for
            deeper networks.
        gamma: γ, positive number or LearningRateSchedule.
        weight: "elementwise" (W is the weight itself), "rms" (one α a variable, from the root
            mean square of its weights) or "none" (the fixed coefficient α = γ·exp(β)).
        rescale: None, "norm", "max" (see `AbsoluteClip`) or "alpha": g'·exp(β·W), the exp of α
            without γ.

    Raises:
        ValueError: β or γ not above 0, an unknown weight mode or rescale.
    """

    beta: Any = 0.7
    gamma: Any = 1.0
    weight: str = "elementwise"
    rescale: str | None = None
    live: ClassVar[tuple[str, ...]] = ("beta", "gamma")

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.choice("ExponentialClip", "weight", self.weight, ("elementwise", "rms", "none"))
        validation.choice(
            "ExponentialClip", "rescale", self.rescale, (None, "norm", "max", "alpha")
        )

    def _clip(self, grads, variables, hyper):
        return kernels.clip_exponential(
            [kernels.values(g) for g in grads],
            [self._weight(v, g) for v, g in zip(variables, grads, strict=True)],
            hyper["beta"],
            hyper["gamma"],
            rescale=self.rescale == "alpha",
        )

    def _limit(self, gradient, variable, hyper):
        return hyper["gamma"] * kernels.exp_of(hyper["beta"], self._weight(variable, gradient))

    def _weight(self, variable, gradient) -> Any:
        """W of the equation: of the shape of the gradient's values, or a scalar."""
        if self.weight == "elementwise":
            return kernels.matching_weight(variable, gradient)
        if self.weight == "rms":
            return kernels.rms(ops.convert_to_tensor(kernels.read(variable)))
        return ops.ones((), "float32")


@register("norm")
@dataclasses.dataclass(frozen=True)
class NormClip(Clipper):
    """Norm clipping: g' = g·min(1, max_norm/‖g‖), ‖·‖ the L2 norm over the scope.

    Norms are taken in float32 whatever the gradient's dtype. Where the norm is not finite, the
    factor is 0: one infinite element does not turn the other gradients into NaN.

    Args:
        max_norm: positive number or LearningRateSchedule.
        scope: "layer" (all variables of a layer together), "variable" (as Keras's `clipnorm`) or
            "global" (as Keras's `global_clipnorm` and PyTorch's `clip_grad_norm_`).
        rescale: None, "norm" or "max". Both undo a norm clip, which changes nothing but the
            size; they are here for symmetry and warn.

    Raises:
        ValueError: max_norm not above 0, an unknown scope or rescale.
    """

    max_norm: Any = 1.0
    scope: str = "layer"
    rescale: str | None = None
    live: ClassVar[tuple[str, ...]] = ("max_norm",)

    def __post_init__(self) -> None:
        super().__post_init__()
        validation.choice("NormClip", "scope", self.scope, ("layer", "variable", "global"))
        if self.rescale == "alpha":
            raise ValueError(
                "NormClip: `rescale='alpha'` multiplies by exp(β·W) and belongs to "
                "ExponentialClip. Use None here."
            )
        validation.choice("NormClip", "rescale", self.rescale, (None, "norm", "max"))
        if self.rescale is not None:
            warnings.warn(
                f"NormClip: rescale={self.rescale!r} brings the norm back that the clip took "
                "away, so the gradient stays as it was. Use rescale=None.",
                stacklevel=3,
            )

    def apply(self, grads, variables, state, hyper):
        """Clip by the norm of each scope: see `Clipper.apply`."""
        present = [i for i, g in enumerate(grads) if g is not None]
        scopes = self._scopes([variables[i] for i in present])
        clipped: list[Any] = [None] * len(grads)
        squares: list[Any] = [None] * len(grads)
        weights = [0.0] * len(grads)
        if not present:
            return clipped, state, ClipStats(lambda: list(clipped), weights, "norms", squares)

        for i in present:
            squares[i] = kernels.sum_of_squares(kernels.values(grads[i]))
        factors = kernels.clip_factors(
            [squares[i] for i in present],
            [size_of(variables[i]) for i in present],
            scopes,
            hyper["max_norm"],
        )
        members = collections.Counter(scopes)
        for i, scope in zip(present, scopes, strict=True):
            x = kernels.values(grads[i])
            y = kernels.scale(x, factors[scope])
            clipped[i] = kernels.with_values(grads[i], _rescale(self.rescale, x, y))
            weights[i] = 1.0 / members[scope]

        def fractions():
            hit = ops.unstack(kernels.float32(ops.stack(factors) < 1.0), num=len(factors))
            result: list[Any] = [None] * len(grads)
            for i, scope in zip(present, scopes, strict=True):
                result[i] = hit[scope]
            return result

        return clipped, state, ClipStats(fractions, weights, "norms", squares)

    def _scopes(self, variables: Sequence[Any]) -> list[int]:
        """For each variable the number of the scope that it belongs to."""
        if self.scope == "global":
            return [0] * len(variables)
        if self.scope == "variable":
            return list(range(len(variables)))
        numbers: dict[str, int] = {}
        return [numbers.setdefault(layer, len(numbers)) for layer in layers_of(variables)]


@register("chain")
@dataclasses.dataclass(frozen=True)
class Chain(Composite):
    """Several clippers in a row, each clipping what the one before let through.

    Its live hyper-parameters are named by position: `clip_hyperparameters["0/threshold"]`. Its
    clip fraction is, for each variable, the largest among its clippers; where some count
    elements and others norms, a clipped norm counts as all its elements.

    Args:
        clippers: a list of clippers, at least one.

    Raises:
        ValueError: an empty list, or an entry that is not a clipper.
    """

    clippers: Any = ()

    def __post_init__(self) -> None:
        if isinstance(self.clippers, (Clipper, str, Mapping)) or not isinstance(
            self.clippers, Sequence
        ):
            raise ValueError(
                f"Chain: `clippers` must be a list of clippers, but is {self.clippers!r}. "
                "Write Chain([first, second])."
            )
        if not self.clippers:
            raise ValueError("Chain: `clippers` is empty. Pass at least one clipper.")
        parts = tuple(
            as_clipper("Chain", f"clippers[{i}]", c, optional=False)
            for i, c in enumerate(self.clippers)
        )
        object.__setattr__(self, "clippers", parts)

    def _parts(self):
        return [(str(i), c) for i, c in enumerate(self.clippers)]

    def _with_parts(self, parts):
        return Chain([parts[str(i)] for i in range(len(self.clippers))])

    def check_variables(self, variables):
        """Raise a ValueError if one of the clippers cannot serve these variables."""
        for clipper in self.clippers:
            clipper.check_variables(variables)

    def init(self, variables):
        """The clippers' running states."""
        return {
            f"{part}/{name}": value
            for part, clipper in self._parts()
            for name, value in clipper.init(variables).items()
        }

    def apply(self, grads, variables, state, hyper):
        """Clip by each clipper in turn: see `Clipper.apply`."""
        new_state: State = {}
        stats: list[ClipStats] = []
        states, hypers = self._split(state), self._split(hyper)
        for part, clipper in self._parts():
            grads, part_state, part_stats = clipper.apply(
                grads, variables, states[part], hypers[part]
            )
            new_state.update({f"{part}/{k}": v for k, v in part_state.items()})
            stats.append(part_stats)

        def fractions():
            per_clipper = [s.fractions() for s in stats]
            result = []
            for of_variable in zip(*per_clipper, strict=True):
                known = [f for f in of_variable if f is not None]
                largest = known[0] if known else None
                for f in known[1:]:
                    largest = ops.maximum(largest, f)
                result.append(largest)
            return result

        unit, weights = _common_unit(stats, variables)
        first = stats[0].square_norms
        return list(grads), new_state, ClipStats(fractions, weights, unit, first)

    def get_config(self):
        """The clippers, JSON-able."""
        return {"clippers": [serialize_value(c) for c in self.clippers]}

    @classmethod
    def from_config(cls, config):
        """The chain that `get_config` described."""
        return cls([deserialize_value(c) for c in config["clippers"]])

    def __str__(self) -> str:
        return " → ".join(str(c) for c in self.clippers)


def _common_unit(stats: Sequence[ClipStats], variables: Sequence[Any]) -> tuple[str, list[float]]:
    """The unit and the weights of stats that speak of the same variables."""
    if len({s.unit for s in stats}) == 1:
        return stats[0].unit, [
            max(of_variable) for of_variable in zip(*(s.weights for s in stats), strict=True)
        ]
    counted = [any(of_variable) for of_variable in zip(*(s.weights for s in stats), strict=True)]
    return "elements", [
        float(size_of(v)) if c else 0.0 for v, c in zip(variables, counted, strict=True)
    ]
