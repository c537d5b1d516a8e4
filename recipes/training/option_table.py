"""The options that every recipe has: flags, keys of `config.json` and a recipe's settings in one.

The clippers' own come from their declarations, see `clipper_options`.
"""

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recipes.errors import RecipeError
from recipes.training.clipper_options import flag_of

_LARGEST = 2**31 - 1  # what TensorFlow counts elements with


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: `--some-name VALUE` on the command line, `"some_name": value` in a config.

    Attributes:
        name: str, with underscores.
        kind: type of the value: int, float, str, bool, or dict (a JSON file on the command line).
        default: the value where nobody gives one; None: left to the library or not in use.
        help: str.
        group: str, heading in `--help`.
        choices: allowed words, or ().
        low, high: bounds of a number, inclusive.
        above: exclusive lower bound of a number.
        saved: bool, False for what does not belong to the run itself (where it is written ...).
        bare: value of the flag without an argument, or None where it needs one.
        flag: str, the name as on the command line.
    """

    name: str
    kind: type
    default: object
    help: str
    group: str = "training"
    choices: tuple = ()
    low: float | None = None
    high: float | None = None
    above: float | None = None
    saved: bool = True
    bare: object = None
    flag: str = ""

    def __post_init__(self):
        object.__setattr__(self, "flag", self.flag or flag_of(self.name))

    def check(self, value):
        """The value, an int widened to float where a float is due.

        Raises:
            RecipeError: wrong type, not among the choices, or out of bounds.
        """
        if value is None:
            if self.default is None:
                return None
            raise self._wrong(value, f"a value of type {self.kind.__name__}")
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if (self.kind is int and isinstance(value, bool)) or not isinstance(value, self.kind):
            raise self._wrong(value, f"a value of type {self.kind.__name__}")
        if value == "" and not self.choices:
            raise self._wrong(value, "a name of one character or more")
        if self.choices and value not in self.choices:
            raise self._wrong(value, f"one of {', '.join(self.choices)}")
        if self.kind in (int, float) and isinstance(value, (int, float)):
            if not math.isfinite(value):
                raise self._wrong(value, "a finite number")
            high = _LARGEST if self.high is None and self.kind is int else self.high
            if self.low is not None and value < self.low:
                raise self._wrong(value, f"{self.low:g} or more")
            if high is not None and value > high:
                raise self._wrong(value, f"{high:.10g} or less")
            if self.above is not None and value <= self.above:
                raise self._wrong(value, f"more than {self.above:g}")
        return value

    def _wrong(self, value, wanted: str) -> RecipeError:
        return RecipeError(f"{self.flag} {json.dumps(value, default=str)}: must be {wanted}")


def option(default: object, help: str, **more: Any) -> Any:
    """A field of `Options`; the arguments are those of `Option`."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a run: the table below, the clipper's values, and the recipe's own.

    Attributes:
        clipping: values of the chosen clipper's parameters, by name; its defaults are left out.
        extra: values of the recipe's `extra_options`, which are attributes too.
    """

    # clipping
    clipper: str = option("absolute", "the clipping rule", group="clipping")
    clip_config: dict | None = option(
        None,
        "JSON of a serialised clipper, also under a key 'clipper' as the tuner's best.json has it",
        group="clipping",
    )
    imports: str | None = option(
        None,
        "modules that register clippers of your own, separated by commas",
        group="clipping",
        flag="--import",
    )
    activation_gate: bool = option(
        False, "gate the gradient at large activations", group="clipping"
    )
    gate_clip_value: float | None = option(None, "activation gate: c", group="clipping")
    gate_gamma: float | None = option(
        None, "activation gate: factor beyond the gate", group="clipping"
    )
    # training
    optimizer: str = option(
        "adamw",
        "the optimizer that receives the clipped gradients (plain sgd is advised against)",
        choices=("adamw", "adam", "sgd", "rmsprop", "lion", "adafactor", "nadam"),
    )
    learning_rate: float = option(0.001, "peak learning rate, after the warm-up", above=0)
    warmup_epochs: float = option(1.0, "epochs of linear warm-up, before the cosine", low=0)
    momentum: float = option(0.0, "momentum of sgd", low=0, high=1)
    weight_decay: float = option(0.0, "decoupled; not on biases and norms", low=0)
    label_smoothing: float = option(0.0, "mass moved to the other classes", low=0, high=0.99)
    epochs: int = option(10, "passes over the training split", low=1)
    batch_size: int = option(64, "global batch, over all devices", low=1)
    accumulate: int = option(1, "micro-batches added up before an update", low=1)
    skip_nonfinite: bool = option(False, "skip updates whose gradients are not finite")
    seed: int = option(0, "order, augmentation, initial weights and dropout", low=0, high=2**32 - 1)
    limit_steps: int | None = option(
        None, "at most so many batches an epoch and in each evaluation", low=1
    )
    select_best: str = option(
        "improve",
        "which model is kept: improve, when validation gets better; beats-test, when validation"
        " accuracy exceeds test accuracy, which is not the default because it chooses by "
        "looking at the test set, so that the test set no longer measures anything",
        choices=("improve", "beats-test"),
    )
    # data
    dataset: str = option("mnist_embedded", "a TFDS name, or image_folder", group="data")
    data_dir: str | None = option(None, "folder of the prepared data set", group="data")
    splits: str | None = option(
        None, "train,validation,test in TFDS's slicing language", group="data"
    )
    download: bool = option(False, "let TFDS download and prepare the data set", group="data")
    image_size: int = option(224, "side of the images in pixels", group="data", low=8, high=16_384)
    augment: str = option(
        "auto",
        "imagenet: random crop in scale and aspect; shift: by up to an eighth",
        group="data",
        choices=("auto", "imagenet", "shift", "none"),
    )
    flip: bool | None = option(None, "mirror half of the training images", group="data")
    on_bad_data: str = option(
        "refuse",
        "an unreadable file or row, always reported: stop, or go on without it",
        group="data",
        choices=("refuse", "skip"),
    )
    # machine
    mixed_precision: str = option(
        "none",
        "compute in 16 bits",
        group="machine",
        choices=("none", "float16", "bfloat16"),
        bare="float16",
    )
    jit: bool = option(False, "compile the step with XLA", group="machine")
    deterministic: bool = option(
        False,
        "kernels that compute the same twice on a GPU too, at some cost; CPUs do without it",
        group="machine",
    )
    devices: int = option(
        1,
        "GPUs (of each worker), or logical CPU devices where there are none",
        group="machine",
        low=1,
        high=1024,
    )
    strategy: str = option(
        "auto",
        "auto: mirrored on more than one device; multiworker: several machines, as TF_CONFIG "
        "says (see docs/cluster.md)",
        group="machine",
        choices=("auto", "none", "mirrored", "multiworker"),
    )
    worker_timeout: int = option(
        600, "multiworker: seconds to wait for a worker before giving up", group="machine", low=1
    )
    # the run
    output: str | None = option(
        None, "folder of the results (default: runs/NAME)", group="run", saved=False
    )
    resume: bool = option(
        False, "go on with the run in the output folder", group="run", saved=False
    )
    backup_every: int = option(
        500, "steps between backups; one more each epoch", group="run", low=1
    )
    keep_backup: bool = option(
        False,
        "keep the backup after the last epoch, so that --resume with more epochs can go on from it",
        group="run",
    )
    tensorboard: bool = option(True, "write TensorBoard logs", group="run")
    monitor: int = option(
        0,
        "measure each variable's gradient every N updates and write monitor/report.html; 0: off",
        group="run",
        low=0,
    )
    verbose: str = option(
        "auto",
        "progress bar, one line an epoch, or nothing",
        group="run",
        choices=("auto", "bar", "line", "quiet"),
        saved=False,
    )
    traceback: bool = option(False, "errors with their traceback", group="run", saved=False)
    clipping: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            for values in (self.__dict__.get("extra", {}), self.__dict__.get("clipping", {})):
                if name in values:
                    return values[name]
            raise AttributeError(f"no option is called {name!r} here")


def _fixed_options() -> tuple[Option, ...]:
    hints = typing.get_type_hints(Options)
    result = []
    for field in dataclasses.fields(Options):
        if field.metadata:
            kinds = [k for k in typing.get_args(hints[field.name]) if k is not type(None)]
            kind = kinds[0] if kinds else hints[field.name]
            result.append(Option(field.name, kind, field.default, **field.metadata))
    return tuple(result)


OPTIONS = _fixed_options()
