"""The setup of a run: devices, data, model and optimizer, built from the options."""

import contextlib
import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

import keras_gradclip as kgc
from keras_gradclip.clippers import selectable
from keras_gradclip.clippers.units import units_of
from recipes import models
from recipes.data import Data, Feed, load_named
from recipes.errors import RecipeError, first_line, plain_errors
from recipes.training import evaluation, multiworker
from recipes.training.losses import SmoothedCrossentropy
from recipes.training.options import Options
from recipes.training.recipe import Recipe
from recipes.words import counted

# The longest warm-up, as a share of the run.
_LONGEST_WARMUP = 0.2


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything a run trains with.

    Attributes:
        feed: the batches of `data`.
        strategy: the tf.distribute strategy, or None on a single device.
        cluster: the workers on several machines, or None.
        writes: whether this process writes the files; of several workers only the chief does.
        model: the compiled `keras_gradclip.ClippedModel`.
        exported: the model to save. It shares the weights, loads without this package, and has no
            optimizer.
    """

    recipe: Recipe
    options: Options
    data: Data
    feed: Feed
    clipper: kgc.Clipper | None
    strategy: Any
    cluster: multiworker.Cluster | None
    writes: bool
    model: Any
    exported: Any

    def description(self) -> list[str]:
        """The opening lines: network, clipper, optimizer, data and devices."""
        options, data = self.options, self.data
        replicas = self.strategy.num_replicas_in_sync if self.strategy else 1
        warmup = warmup_updates(options, self.feed.steps)
        clip = "no clipping" if self.clipper is None else textwrap.shorten(repr(self.clipper), 160)
        gate = ", activation gate" if options.activation_gate else ""
        kind = device_kind() + ("s" if replicas > 1 else "")
        precision = keras.config.dtype_policy().name
        schedule = f"warm-up of {counted(warmup, 'update')}, then cosine" if warmup else "cosine"
        note = f" ({data.note})" if data.note else ""
        return [
            f"{self.recipe.name}: {self.exported.count_params():,} parameters, {clip}{gate}",
            f"  {options.optimizer} at {options.learning_rate:g} ({schedule}), "
            f"{counted(options.epochs, 'epoch')} of {counted(self.feed.steps, 'step')}, "
            f"batch {options.batch_size}, seed {options.seed}",
            f"  {data.name}: {data.train.size:,} training, {data.validation.size:,} validation, "
            f"{data.test.size:,} test examples{note}; on {replicas} {kind} in {precision}",
        ]

    def create_state(self) -> None:
        """Creates the variables of the metrics before the first step."""
        self.model.evaluate(self.feed.evaluation(self.data.validation), steps=1, verbose=0)

    def test(self, path: Path) -> dict[str, float]:
        """The metrics of a saved model on the test split, loaded as a user would.

        Also writes the per-class results of `recipes.training.evaluation` to the model's folder.
        """
        evaluation.write_names(path, self.data)
        model = keras.models.load_model(path, compile=False)
        batches = dataclasses.replace(self.feed, workers=None).evaluation(self.data.test)
        loss, metrics = build_loss(self.recipe, self.options), build_metrics(self.recipe)
        return evaluation.evaluate(model, batches, self.data, path.parent, loss, metrics)


@contextlib.contextmanager
def prepared(recipe: Recipe, options: Options) -> Iterator[Setup]:
    """Prepares a run up to its first step; the `Setup` is valid only inside the context.

    Raises:
        RecipeError: an invalid clipper, data set or device.
        WorkerLost: another worker died or hangs.
    """
    keras.backend.clear_session()
    if options.deterministic:
        tf.config.experimental.enable_op_determinism()
    clipper = build_clipper(options)
    cluster = multiworker.read_cluster() if options.strategy == "multiworker" else None
    strategy = make_strategy(options, cluster)
    with contextlib.ExitStack() as stack:
        stack.callback(keras.config.set_dtype_policy, keras.config.dtype_policy())
        if options.mixed_precision != "none":
            keras.config.set_dtype_policy(f"mixed_{options.mixed_precision}")
        if cluster:
            stack.enter_context(multiworker.named_losses(options, cluster))
        data = recipe.load_data(options) if recipe.load_data else load_named(options)
        sharded = strategy if cluster else None
        feed = Feed(data, options.batch_size, options.seed, options.limit_steps, sharded)
        steps = options.epochs * feed.steps
        if options.accumulate > steps:
            raise RecipeError(
                f"--accumulate {options.accumulate}: the run has {counted(steps, 'step')}, too few "
                "for one update; accumulate less, or give more --epochs"
            )
        # After the data, whose preparation may draw random numbers.
        keras.utils.set_random_seed(options.seed)
        with strategy.scope() if strategy else contextlib.nullcontext(), plain_errors():
            model = build_model(recipe, options, data, clipper, feed.steps)
            model.optimizer.build(model.trainable_variables)
            exported = models.inference_model(model)
        writes = cluster is None or cluster.is_chief
        yield Setup(
            recipe, options, data, feed, clipper, strategy, cluster, writes, model, exported
        )


def make_strategy(options: Options, cluster: multiworker.Cluster | None = None) -> Any:
    """The tf.distribute strategy, or None on a single device; waits for all workers of a cluster.

    Raises:
        RecipeError: too few devices, or a batch size that they do not divide.
    """
    count = options.devices
    if cluster is not None:
        return multiworker.join(options, cluster)
    if options.strategy == "none" or (options.strategy == "auto" and count == 1):
        return None
    kind = device_kind()
    if kind == "CPU" and count > 1:
        # Not possible after TensorFlow has started: use the existing devices.
        with contextlib.suppress(RuntimeError):
            tf.config.set_logical_device_configuration(
                tf.config.list_physical_devices("CPU")[0],
                [tf.config.LogicalDeviceConfiguration()] * count,
            )
        if options.jit:
            raise RecipeError(
                "--jit does not work on several CPU devices (XLA cannot reach the weights of one "
                "from another): leave out --jit or --devices"
            )
    names = [device.name for device in tf.config.list_logical_devices(kind)]
    if len(names) < count:
        raise RecipeError(f"--devices {count}: this machine has {counted(len(names), kind)}")
    # Between CPUs TensorFlow would use collective operations, which fix the size of their group
    # for the rest of the process; a search or a comparison uses several sizes.
    reduction = None if kind == "GPU" else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(names[:count], cross_device_ops=reduction)


def device_kind() -> str:
    """The kind of device that a run computes on: "GPU" where TensorFlow sees one, else "CPU"."""
    return "GPU" if tf.config.list_physical_devices("GPU") else "CPU"


def warnings(options: Options) -> list[str]:
    """Warnings about unusual options."""
    lines = []
    if options.optimizer == "sgd" and options.momentum == 0:
        lines.append("plain SGD: the authors of the method advise an adaptive optimizer, as adamw")
    if options.mixed_precision == "float16" and device_kind() == "CPU":
        lines.append("float16 on a CPU is many times slower than float32")
    return lines


def build_clipper(options: Options) -> kgc.Clipper | None:
    """The clipper that the options ask for, or None.

    Raises:
        RecipeError: an invalid threshold, or a config that is not a clipper's.
    """
    with plain_errors():
        if options.clip_config is not None:
            try:
                return kgc.get(options.clip_config)
            except (ValueError, TypeError) as error:
                raise RecipeError(f"--clip-config: {first_line(error)}") from error
        if options.clipper == "none":
            return None
        return selectable()[options.clipper](**options.clipping)


def build_network(recipe: Recipe, options: Options, num_outputs: int) -> Any:
    """The recipe's network, an uncompiled `keras_gradclip.ClippedModel`."""
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
        given: dict[str, Any] = {"clip_value": options.gate_clip_value, "gamma": options.gate_gamma}
        given = {name: value for name, value in given.items() if value is not None}
        gate = kgc.ActivationGate(initial_learning_rate=options.learning_rate, **given)
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
    """The number of warm-up updates: as given, but at most a fifth of the run."""
    updates = max(1, options.epochs * steps // options.accumulate)
    asked = round(options.warmup_epochs * steps / options.accumulate)
    return min(asked, int(_LONGEST_WARMUP * updates))


def build_optimizer(options: Options, model: Any, steps: int) -> Any:
    """The inner optimizer: warm-up and cosine, no weight decay on the model's biases and norms.

    `steps` is the number of batches per epoch.
    """
    updates = max(1, options.epochs * steps // options.accumulate)
    warmup = warmup_updates(options, steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        # Above zero, so that the first update changes the weights.
        initial_learning_rate=options.learning_rate / (warmup + 1),
        decay_steps=max(1, updates - warmup),
        warmup_target=options.learning_rate if warmup else None,
        warmup_steps=warmup,
    )
    config: dict[str, object] = {"learning_rate": schedule}
    if options.weight_decay or options.optimizer == "adamw":  # whose own default is not 0
        config["weight_decay"] = options.weight_decay
    if options.optimizer == "sgd":
        config["momentum"] = options.momentum
    optimizer = type(keras.optimizers.get(options.optimizer))(**config)
    if options.weight_decay:
        variables = model.trainable_variables
        units = zip(variables, units_of(variables), strict=True)
        rest = [variable for variable, unit in units if not unit.is_kernel]
        optimizer.exclude_from_weight_decay(var_list=rest)
    return optimizer


def build_loss(recipe: Recipe, options: Options) -> Any:
    """The recipe's loss, else the cross-entropy of integer labels [n] and probabilities."""
    if recipe.loss:
        return recipe.loss(options)
    if options.label_smoothing:
        return SmoothedCrossentropy(label_smoothing=options.label_smoothing)
    return keras.losses.SparseCategoricalCrossentropy()


def build_metrics(recipe: Recipe) -> list[Any]:
    """The recipe's metrics; by default the accuracy."""
    if recipe.metrics:
        return recipe.metrics()
    return [keras.metrics.SparseCategoricalAccuracy(name="accuracy")]
