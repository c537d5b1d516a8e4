"""A clip that waits for the update: a compiled one does both in one pass over the memory.

A clipper asks `defer` for each gradient. Who applies the update says, in `hyper[LATER]`, which ones
it takes; without such a word every clip is done at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

from keras import ops

from keras_gradclip._types import Gradient, Hyper, Tensor, Variable

#: Of a clip, of this gradient, variable and rule, that may wait for the update: the gradient as the
#: update will read it. None: do it at once.
Later: TypeAlias = "Callable[[Gradient, Variable, Rule], Gradient | None]"
#: The key of `hyper` for a `Later`.
LATER = "later"


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to clip one dense gradient; compiled programs are shared by it, so make few.

    Attributes:
        clip: a function of (gradient, seen, *arguments) that returns the clipped gradient.
        sees: what `clip` wants to know of the weight before the update, a function of it; None:
            nothing, and `seen` is None.
        is_told: whether another rule's `clip` takes what was seen as an argument.
        follows: one of the arguments is what another rule has seen.
        is_factor: `clip` multiplies the gradient by its one argument, a scalar.
        takes_norms: `clip` goes through the gradient twice.
        bounds_step: `clip` gets the step that the update is about to take in the gradient's place,
            and returns beside the bounded one which of its norms or elements were bounded.
    """

    clip: Callable[..., Tensor]
    sees: Callable[[Tensor], Tensor] | None = None
    is_told: bool = False
    follows: bool = False
    is_factor: bool = False
    takes_norms: bool = False
    bounds_step: bool = False


def _as_it_is(gradient: Tensor, seen: None) -> Tensor:
    del seen
    return gradient


#: Of a gradient that is clipped already.
AS_IT_IS = Rule(_as_it_is)


@dataclasses.dataclass(eq=False)
class Deferred:
    """A gradient and the clip that it is waiting for.

    Attributes:
        gradient: before the clip, dense.
        rule: the clip.
        arguments: its scalars or small tensors; a `Deferred` stands for what that one has `seen`.
        seen: what the rule saw of the weight, once the clip is done.
        bounded: of a rule that bounds steps, what it returned, once it is done: booleans.
    """

    gradient: Tensor
    rule: Rule
    arguments: tuple[Any, ...]
    seen: Tensor = None
    bounded: Tensor = None

    @property
    def fraction(self) -> Tensor:
        """The share that was bounded."""
        return ops.mean(ops.cast(self.bounded, "float32"))

    def resolved(self) -> tuple[Tensor, ...]:
        """The arguments, with what others have seen in their places."""
        return tuple(a.seen if isinstance(a, Deferred) else a for a in self.arguments)

    def now(self, weight: Tensor) -> Tensor:
        """The clipped gradient, by operations of its own."""
        self.seen = None if self.rule.sees is None else self.rule.sees(weight)
        return self.rule.clip(self.gradient, self.seen, *self.resolved())


def is_bound(gradient: Gradient | Deferred) -> bool:
    """Whether the update bounds its step by itself."""
    return isinstance(gradient, Deferred) and gradient.rule.bounds_step


def defer(
    hyper: Hyper, rule: Rule, gradient: Gradient, variable: Variable, *arguments: Any
) -> Deferred | None:
    """The gradient, to be clipped where it is applied; None if the clip must be done at once."""
    may_wait = hyper.get(LATER)
    gradient = None if may_wait is None else may_wait(gradient, variable, rule)
    return None if gradient is None else Deferred(gradient, rule, arguments)
