"""What a clipper tells the module that enforces it: `Limit`, and the types between the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from keras import ops

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip._types import Hyper, State, Tensor


class ClipStats(NamedTuple):
    """What a clip did, one entry a variable, in the order of the variables.

    Attributes:
        fractions: a function that returns a list of float32 scalars in 0..1, the share of the
            variable's elements (or norms) that were clipped; None where no rule applies. A
            function, because it costs operations that most updates do not need.
        weights: a list of floats, how much each variable counts in the overall fraction: its
            number of elements, or its share of a norm.
        unit: "elements" or "norms", what was counted.
        square_norms: a list of float32 scalars, the squared L2 norm before the clip, where it
            was computed anyway; else None.
    """

    fractions: Callable[[], list[Tensor | None]]
    weights: list[float]
    unit: str
    square_norms: list[Tensor | None] | None = None


class Weight:
    """The weights that one limit is about: those of a unit, a variable, a layer, or the model.

    Args:
        reads: for each variable in the scope a function that returns its weight.
        size: the number of elements.
        axes: of a unit: the axes that one unit spans.
        square: the squared norms, where they are known.

    Attributes:
        values: the first weight, of the gradient's shape.
        norm: the L2 norm, float32: a scalar; of units, one each, broadcastable to `values`.
        rms: the root mean square of `values`, a float32 scalar.
        size: the number of elements.
    """

    def __init__(
        self,
        reads: Sequence[Callable[[], Tensor]] = (),
        size: int = 0,
        axes: Sequence[int] | None = None,
        square: Tensor | None = None,
    ) -> None:
        self._reads, self._axes, self.size, self._square = reads, axes, size, square

    @property
    def values(self) -> Tensor:
        return self._reads[0]()

    @property
    def square(self) -> Tensor:
        """`norm` squared."""
        if self._square is None:
            weights = [read() for read in self._reads]
            axes = [
                tuple(range(len(w.shape))) if self._axes is None else self._axes for w in weights
            ]
            squares = [arithmetic.unit_squares(w, a) for w, a in zip(weights, axes, strict=True)]
            self._square = squares[0] if len(squares) == 1 else ops.sum(ops.stack(squares))
        return self._square

    @property
    def norm(self) -> Tensor:
        return ops.sqrt(self.square)

    @property
    def rms(self) -> Tensor:
        return arithmetic.rms(self.values)


class Assignment(NamedTuple):
    """One clipper and the variables that it limits.

    Attributes:
        name: what its hyper-parameters and its state are prefixed with, ending in "/"; "" of a
            clipper by itself.
        clipper: the clipper; not a `ClipMap` or a `Chain`.
        members: positions of the variables.
        calls_apply: the clipper has an `apply` of its own, which is called instead of a limit
            being enforced.
    """

    name: str
    clipper: Limit
    members: tuple[int, ...]
    calls_apply: bool = False


class Limit:
    """A limit on the size of gradients, or of weight updates; without a limit, an `apply`.

    The class attributes may be fields of a dataclass as well.
    """

    #: What one limit is about: "element", "unit" (what makes one output of a kernel), "variable",
    #: "layer" or "global". A field or a class attribute.
    scope: ClassVar[str] = "element"
    #: "gradient", or "update": the limit holds for the change of the weights that the inner
    #: optimizer computes. For SGD, whose update is η·g, that is a limit of limit/η on the gradient.
    stage: ClassVar[str] = "gradient"
    #: What biases and scales are limited by: "own", like any other variable; "unit", each element
    #: by the norm of its unit in the layer's kernel; None, nothing.
    biases: ClassVar[str | None] = "own"
    #: What is given back after the clip: None, "norm", "max" or "alpha". A field or an attribute.
    rescale: ClassVar[str | None] = None
    #: The axes of units, by path of the variable; () to ask the layers.
    axes: ClassVar[Sequence[tuple[str, tuple[int, ...]]] | None] = None
    #: Whether it needs `hyper["learning_rate"]`.
    needs_learning_rate: ClassVar[bool] = False

    def limit(self, weight: Weight, hyper: Hyper) -> Tensor:
        """The largest element (or L2 norm) that is allowed.

        Args:
            weight: the weights of the scope.
            hyper: the values of `hyperparameters()` at this update, as float32 scalars, and
                "learning_rate".

        Returns:
            A float32 scalar, or a tensor that broadcasts to the gradient (or to `weight.norm`).
        """
        raise NotImplementedError(f"{type(self).__name__} has neither `limit` nor `limits`")

    def growth(self, weight: Weight, hyper: Hyper) -> Tensor:
        """What `rescale="alpha"` multiplies by."""
        raise NotImplementedError(f"{type(self).__name__} has no rescale='alpha'")

    def memory(self, scopes: int) -> dict[str, object]:
        """The state before the first update, for this number of scopes: name to NumPy array."""
        del scopes
        return {}

    def advance(self, state: State, hyper: Hyper) -> tuple[State, Hyper]:
        """The new state, and the values that `limit` gets: once an update."""
        return state, hyper

    def limits(
        self, norms: Tensor, usable: Tensor, state: State, hyper: Hyper
    ) -> tuple[Tensor, State]:
        """The limit of each scope, and the new state.

        Args:
            norms: float32 `[scopes]`, before the clip; 0 where `usable` is false.
            usable: boolean `[scopes]`: the norm is finite and above 0, so that it may be
                remembered. No gradient, and a gradient of zero, are no evidence.
            state: what `memory` or the last `limits` returned.
            hyper: as in `limit`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no memory")
