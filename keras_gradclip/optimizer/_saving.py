"""Loading of an optimizer's variables and arguments, also from files of earlier versions."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_gradclip import _validation as validation
from keras_gradclip._types import Config, Tensor
from keras_gradclip.clippers.base import deserialize_value


def load(
    own: Mapping[str, keras.Variable], store: Mapping[str, Tensor], built: bool, is_auto: bool
) -> None:
    """Loads the variables of the same name and shape; warns of the others if state is lost.

    `is_auto`: the optimizer's clipper is still to be chosen.
    """
    saved = {name: store[name] for name in store.keys()}  # noqa: SIM118 (HDF5)
    missing = {*own, *saved} - {"touched"}  # which is set from the sums
    for name, variable in own.items():  # in this order: on several workers it may be a reduction
        if name in saved and tuple(saved[name].shape) == tuple(variable.shape):
            variable.assign(saved[name])
            missing.discard(name)
    if not built:  # a counter, or a clipper that "auto" chooses again
        chosen_anew = {name for name in missing if is_auto and name.startswith("hyper:")}
        missing = missing - {"skipped"} - chosen_anew
    elif "skipped" not in saved:  # the saved optimizer was not built
        missing = missing - {*own}
    if missing:
        remedy = (
            "Use the clipper and the gradient_accumulation_steps that it was saved with."
            if built
            else "Build it first: optimizer.build(model.trainable_variables)."
        )
        warnings.warn(
            "ClippedOptimizer: not loaded, because this optimizer and the saved one differ in "
            f"them: {sorted(missing)[:6]}. {remedy}",
            stacklevel=3,
        )


def set_all(variables: Sequence[keras.Variable] | None, weights: Sequence[Tensor]) -> None:
    """Sets `variables` (None: the optimizer is not built) to `weights` of the same shapes."""
    if variables is None:
        raise ValueError(
            "ClippedOptimizer: `set_weights` needs a built optimizer. Call "
            "`optimizer.build(trainable_variables)` first."
        )
    weights = list(weights)
    shapes = [tuple(np.shape(w)) for w in weights]
    if shapes != [tuple(v.shape) for v in variables]:
        raise ValueError(
            f"ClippedOptimizer: `weights` must have the shapes of the {len(variables)} "
            f"variables, but there are {len(weights)}, of the shapes {shapes[:6]} ..."
        )
    for variable, weight in zip(variables, weights, strict=True):
        variable.assign(weight)


def arguments_of(
    cls: type[keras.optimizers.Optimizer], config: Config, custom_objects: Config | None
) -> Config:
    """The arguments of `cls` that `get_config` described."""
    owner = cls.__name__
    arguments = inspect.signature(cls).parameters
    takes_all = any(a.kind is a.VAR_KEYWORD for a in arguments.values())  # a subclass may
    known = ("paths", *arguments, *(config if takes_all else ()))
    validation.config(owner, config, known, needed=("inner_optimizer",))
    config = copy.deepcopy(dict(config))  # Keras writes into the config that it reads
    config.pop("paths", None)
    config["inner_optimizer"] = validation.made_of(
        owner,
        "inner_optimizer",
        config["inner_optimizer"],
        functools.partial(keras.saving.deserialize_keras_object, custom_objects=custom_objects),
    )
    config["clipper"] = deserialize_value(config.get("clipper"), owner, "clipper")
    return config
