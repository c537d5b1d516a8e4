"""Clipper, optimizer, model, loss, metrics and data, built from the options."""

from typing import Any

import keras

import keras_gradclip as kgc
from keras_gradclip.clippers import selectable
from recipes import models
from recipes.data import Data, load
from recipes.errors import plain_errors
from recipes.training.losses import SmoothedCrossentropy
from recipes.training.option_table import Options
from recipes.training.recipe import Recipe

# A warm-up longer than this share of a run would leave it little but the warm-up.
_LONGEST_WARMUP = 0.2


def build_clipper(options: Options) -> kgc.Clipper | None:
    """The clipper that the options ask for, or None.

    Raises:
        RecipeError: a threshold that cannot be, or a config that is not a clipper's.
    """
    with plain_errors():
        if options.clip_config is not None:
            return kgc.get(options.clip_config)
        if options.clipper == "none":
            return None
        return selectable()[options.clipper](**options.clipping)


def build_network(recipe: Recipe, options: Options, num_outputs: int) -> Any:
    """The recipe's network, a `keras_gradclip.ClippedModel` that is not compiled."""
    if recipe.build:
        return recipe.build(num_outputs, options.image_size, kgc.ClippedModel, options)
    return models.build(
        recipe.network,
        num_classes=num_outputs,
        image_size=options.image_size,
        model_class=kgc.ClippedModel,
        **recipe.network_options,
    )


def build_model(recipe: Recipe, options: Options, data: Data, clipper: Any, steps: int) -> Any:
    """The compiled network, a `keras_gradclip.ClippedModel`; call it in the strategy's scope."""
    model = build_network(recipe, options, data.num_outputs)
    gate = None
    if options.activation_gate:
        extra: dict[str, Any] = {"clip_value": options.gate_clip_value, "gamma": options.gate_gamma}
        gate = kgc.ActivationGate(
            initial_learning_rate=options.learning_rate,
            **{name: value for name, value in extra.items() if value is not None},
        )
    optimizer = kgc.ClippedOptimizer(
        build_optimizer(options, model, steps),
        clipper,
        gradient_accumulation_steps=options.accumulate if options.accumulate > 1 else None,
        skip_nonfinite=options.skip_nonfinite,
        telemetry=True,
    )
    model.compile(
        optimizer=optimizer,
        loss=build_loss(recipe, options),
        metrics=build_metrics(recipe),
        activation_gate=gate,
        jit_compile=options.jit,
    )
    return model


def warmup_updates(options: Options, steps: int) -> int:
    """The updates of the warm-up: as asked for, but at most a fifth of the run's."""
    updates = max(1, options.epochs * steps // options.accumulate)
    asked = round(options.warmup_epochs * steps / options.accumulate)
    return min(asked, int(_LONGEST_WARMUP * updates))


def build_optimizer(options: Options, model: Any, steps: int) -> Any:
    """The inner optimizer: warm-up and cosine, no weight decay on biases and norms.

    Args:
        options: the run's options.
        model: its vectors (biases, gammas, betas) are excluded from weight decay.
        steps: int, batches an epoch.
    """
    updates = max(1, options.epochs * steps // options.accumulate)
    warmup = warmup_updates(options, steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        # Not from zero: the first update of a warm-up should move something.
        initial_learning_rate=options.learning_rate / (warmup + 1),
        decay_steps=max(1, updates - warmup),
        warmup_target=options.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    config: dict[str, object] = {"learning_rate": schedule}
    if options.weight_decay:
        config["weight_decay"] = options.weight_decay
    elif options.optimizer == "adamw":
        config["weight_decay"] = 0.0
    if options.optimizer == "sgd":
        config["momentum"] = options.momentum
    classes = {
        "adamw": keras.optimizers.AdamW,
        "adam": keras.optimizers.Adam,
        "sgd": keras.optimizers.SGD,
        "rmsprop": keras.optimizers.RMSprop,
        "lion": keras.optimizers.Lion,
        "adafactor": keras.optimizers.Adafactor,
        "nadam": keras.optimizers.Nadam,
    }
    optimizer = classes[options.optimizer](**config)
    if options.weight_decay:
        vectors = [v for v in model.trainable_variables if len(v.shape) < 2]
        optimizer.exclude_from_weight_decay(var_list=vectors)
    return optimizer


def load_data(recipe: Recipe, options: Options) -> Data:
    """The recipe's data, or the set that the options name."""
    if recipe.load_data:
        return recipe.load_data(options)
    return load(
        options.dataset,
        data_dir=options.data_dir,
        image_size=options.image_size,
        augment=options.augment,
        flip=options.flip,
        splits=options.splits,
        download=options.download,
        on_bad_data=options.on_bad_data,
    )


def build_loss(recipe: Recipe, options: Options) -> Any:
    """The recipe's loss, else `cross_entropy`."""
    return recipe.loss(options) if recipe.loss else cross_entropy(options.label_smoothing)


def cross_entropy(label_smoothing: float = 0.0) -> Any:
    """Cross-entropy between integer labels [n] and class probabilities [n, classes].

    Args:
        label_smoothing: ε; the target becomes (1 − ε)·one-hot + ε/classes (Szegedy et al. 2016).
    """
    if not label_smoothing:
        return keras.losses.SparseCategoricalCrossentropy()
    return SmoothedCrossentropy(label_smoothing)


def build_metrics(recipe: Recipe) -> list[Any]:
    """The recipe's metrics, else the accuracy."""
    if recipe.metrics:
        return recipe.metrics()
    return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
