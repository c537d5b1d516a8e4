"""The activation gate, which scales gradients where a layer's input is very large."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import keras
from keras import ops, tree

from keras_gradclip import _arithmetic as arithmetic
from keras_gradclip import _compat
from keras_gradclip import _validation as validation
from keras_gradclip._types import Config, Tensor


@keras.saving.register_keras_serializable(package="keras_gradclip")
@dataclasses.dataclass(frozen=True)
class ActivationGate:
    """Scales the gradient at a layer's input where the input is very large.

    At the input x of each gated layer the forward pass is the identity, and in the backward pass

        dx' = γ·dx where |x| > c/(γ·lr₀), else dx.

    The layer's own weight gradients come from the un-gated gradient at its output.

    `ClippedModel.compile(..., activation_gate=ActivationGate())` gates that model in place, but no
    other model with the same layers. `model = ActivationGate().insert(model)` puts `GatedInput`
    layers into any functional or sequential model.

    Args:
        clip_value: c, a positive number.
        gamma: γ, a positive number.
        initial_learning_rate: lr₀, a positive number.
        layers: None for every layer with weights, or a regular expression (or a list of them) that
            matches a layer's whole name or path. Layers of nested models count, not sublayers: an
            LSTM or an attention is gated only at its own input.

    Raises:
        ValueError: a number is not above 0, or a regular expression is invalid; once the model is
            known, an expression matches no layer.
    """

    clip_value: float = 0.1
    gamma: float = 0.1
    initial_learning_rate: float = 1e-3
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("clip_value", "gamma", "initial_learning_rate"):
            value = validation.positive("ActivationGate", name, getattr(self, name))
            object.__setattr__(self, name, value)
        patterns = (self.layers,) if isinstance(self.layers, str) else self.layers
        if patterns is None:
            return
        if not isinstance(patterns, Sequence) or not patterns:
            raise ValueError(
                f"ActivationGate: `layers` must be None, a regex or a list of them, not "
                f"{patterns!r}."
            )
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    f"ActivationGate: `layers` has {pattern!r}, which is no regular expression: "
                    f"{error}."
                ) from error
        object.__setattr__(self, "layers", tuple(patterns))

    @property
    def threshold(self) -> float:
        """c/(γ·lr₀), the |input| above which the gradient is scaled; at most float32's maximum."""
        quotient = self.clip_value / (self.gamma * self.initial_learning_rate)
        return min(quotient, arithmetic.LARGEST)

    def __call__(self, x: Tensor) -> Tensor:
        """`x`, a float tensor of any shape, with the gated gradient."""
        threshold, gamma = self.threshold, self.gamma

        @ops.custom_gradient
        def gate(x: Tensor) -> Tensor:
            def grad(*args: Tensor, upstream: Tensor | None = None) -> Tensor:
                dx = args[0] if upstream is None else upstream
                large = ops.abs(ops.cast(x, "float32")) > threshold
                scaled = arithmetic.scale(dx, gamma)  # γ may be infinite in float16
                return ops.where(large, scaled, dx)

            return x, grad

        return gate(x)

    def selects(self, layer: keras.layers.Layer) -> bool:
        """Whether the input of `layer` is gated."""
        is_layer = isinstance(layer, keras.layers.Layer)  # in a graph operations stand among them
        if not is_layer or isinstance(layer, (keras.Model, GatedInput, keras.layers.InputLayer)):
            return False
        if self.layers is None:
            return bool(layer.weights)
        names = {layer.name, getattr(layer, "path", layer.name)}
        return any(re.fullmatch(p, name) for p in self.layers for name in names)

    def attach(self, model: keras.Model) -> None:
        """Gates the layers of any model in place, permanently.

        The gate is not saved, and other models with the same layers are gated as well. Prefer
        `compile(activation_gate=)` or `insert`.

        Raises:
            ValueError: the model is built and an expression matches none of its layers.
        """
        instrument(self, model)
        for layer in _gateable(model):
            layer.call.always = self

    def insert(self, model: keras.Model) -> keras.Model:
        """A model with a `GatedInput` layer before each gated layer of `model`.

        Args:
            model: a built functional or sequential model, which may contain others.

        Returns:
            A model of the same kind with the same layers, not compiled. It can be saved.

        Raises:
            ValueError: another kind of model (compile it as a `ClippedModel` instead), a model with
                a gate, or no layer to gate.
        """
        self._check_layers(model)
        if any(isinstance(layer, GatedInput) for layer in _compat.all_layers(model)):
            raise ValueError(f"ActivationGate: the model {model.name!r} is gated already.")
        return self._insert(model)

    def _insert(self, model: keras.Model) -> keras.Model:
        if isinstance(model, keras.Sequential):
            gated: list = [*model.inputs] if model.built else []  # whose dtype counts
            for layer in model.layers:
                if self.selects(layer):
                    gated.append(GatedInput(self, name=f"{layer.name}_gate"))
                gated.append(self._insert(layer) if isinstance(layer, keras.Model) else layer)
            return keras.Sequential(gated, name=model.name, trainable=model.trainable)
        if not isinstance(model, _compat.Functional):
            raise ValueError(
                f"ActivationGate: insert works on functional and sequential models, but "
                f"{model.name!r} is a {type(model).__name__}. Make it a ClippedModel and compile "
                "it with activation_gate=."
            )
        calls: dict[str, int] = {}

        def reuse(layer: keras.layers.Layer) -> Tensor:
            return self._insert(layer) if isinstance(layer, keras.Model) else layer

        def call(layer: keras.layers.Layer, *args: Tensor, **kwargs: Tensor) -> Tensor:
            if self.selects(layer):
                n = calls[layer.name] = calls.get(layer.name, 0) + 1
                name = f"{layer.name}_gate" + (f"_{n}" if n > 1 else "")
                args, kwargs = _map_floats(GatedInput(self, name=name), (args, kwargs))
            return layer(*args, **kwargs)

        return keras.models.clone_model(model, clone_function=reuse, call_function=call)

    def _check_layers(self, model: keras.Model) -> None:
        layers = _gateable(model)
        for pattern in self.layers or (None,):
            gate = dataclasses.replace(self, layers=pattern)
            if not any(gate.selects(layer) for layer in layers):
                raise ValueError(
                    f"ActivationGate: layers={pattern!r} selects no layer of {model.name!r}; its "
                    f"layers begin with {[layer.name for layer in layers][:8]}. An expression must "
                    "match the whole name."
                )

    def get_config(self) -> Config:
        """The JSON-able arguments."""
        config = dataclasses.asdict(self)
        config["layers"] = None if self.layers is None else list(self.layers)
        return config

    @classmethod
    def from_config(cls, config: Config) -> ActivationGate:
        """The gate with the arguments of `get_config`."""
        known = [f.name for f in dataclasses.fields(cls)]
        return cls(**validation.config(cls.__name__, config, known))


@keras.saving.register_keras_serializable(package="keras_gradclip")
class GatedInput(keras.layers.Identity):
    """The identity, with the gradient of an `ActivationGate`.

    Input and output are tensors of any shape and dtype; integers pass without a gate.
    """

    def __init__(self, gate: ActivationGate, **kwargs: Tensor) -> None:
        super().__init__(autocast=False, **kwargs)  # layers may differ from the global policy
        if isinstance(gate, Mapping):
            gate = keras.saving.deserialize_keras_object(dict(gate))
        self.gate = gate

    def call(self, inputs: Tensor) -> Tensor:
        """Returns `inputs`."""
        return _map_floats(self.gate, inputs)

    def get_config(self) -> Config:
        """The JSON-able arguments."""
        gate = keras.saving.serialize_keras_object(self.gate)
        return {**super().get_config(), "gate": gate}


def as_gate(value: object) -> ActivationGate | None:
    """`value` if it is a gate or None, or the gate of a saved config; else raises a ValueError."""
    if isinstance(value, Mapping) and "class_name" in value:
        value = keras.saving.deserialize_keras_object(dict(value))
    if value is None or isinstance(value, ActivationGate):
        return value
    raise ValueError(
        f"compile: `activation_gate` must be None or an ActivationGate, but is {value!r}. Write "
        "activation_gate=ActivationGate(clip_value=0.1, gamma=0.1)."
    )


# The gate of the model being called. Its layers may also belong to models without a gate.
_ACTIVE: contextvars.ContextVar[ActivationGate | None] = contextvars.ContextVar(
    "gate", default=None
)


@contextlib.contextmanager
def active(gate: ActivationGate) -> Iterator[None]:
    """A context that gates the layers prepared by `instrument`."""
    token = _ACTIVE.set(gate)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def instrument(gate: ActivationGate, model: keras.Model) -> None:
    """Prepares the layers of a model for `active`, also layers created since the last call."""
    layers = _gateable(model)
    if model.built:
        gate._check_layers(model)
    for layer in layers:
        if not isinstance(layer.__dict__.get("call"), _GatedCall):
            object.__setattr__(layer, "call", _GatedCall(layer))


class _GatedCall:
    """A layer's `call` that gates its float inputs while a gate is active."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        self._layer = layer
        self._call = layer.call
        self.always: ActivationGate | None = None
        functools.update_wrapper(self, layer.call)

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        gate = _ACTIVE.get() or self.always
        if gate is None or not gate.selects(self._layer):
            return self._call(*args, **kwargs)
        args, kwargs = _map_floats(gate, (args, kwargs))
        # Sublayers such as an LSTM's cell are not gated again.
        token = _ACTIVE.set(None)
        try:
            return self._call(*args, **kwargs)
        finally:
            _ACTIVE.reset(token)


def _gateable(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers of a model and of its nested models, without sublayers."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"ActivationGate: `model` must be a keras.Model, but is {model!r}.")
    layers = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            layers += _gateable(layer)
        elif not isinstance(layer, (GatedInput, keras.layers.InputLayer)):
            layers.append(layer)
    return layers


def _map_floats(fn: Callable[[Tensor], Tensor], structure: Tensor) -> Tensor:
    """A nested structure with `fn` applied to its dense float tensors."""

    def one(x: Tensor) -> Tensor:
        is_tensor = ops.is_tensor(x) or isinstance(x, keras.KerasTensor)
        # Custom gradients do not support sparse and ragged tensors. A graph's `sparse` is no help:
        # Keras sets it for x * 0.1, too.
        special = getattr(x, "ragged", False) or any(
            hasattr(x, name) for name in ("dense_shape", "row_splits", "nse")
        )
        if is_tensor and not special and "float" in keras.backend.standardize_dtype(x.dtype):
            return fn(x)
        return x

    return tree.map_structure(one, structure)
