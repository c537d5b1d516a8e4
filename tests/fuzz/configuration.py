"""Random configurations of an optimizer and of the gradients that come to it."""

import dataclasses
import warnings

import keras
from hypothesis import strategies as st

import keras_gradclip as kgc
from keras_gradclip.clippers import parameters, selectable

BACKEND = keras.backend.backend()
IS_TENSORFLOW = BACKEND == "tensorflow"
KERNELS = ("kernel", "embeddings", "depthwise_kernel", "gamma", "w")
LAYERS = ("dense", "conv2d_transpose", "query", "up", "norm", "depthwise.1", "bias_net", "über")
RATE = 0.1
#: What may be set between two calls, and by which factor; `threshold` is the clipper's first.
LIVE = ("learning_rate", "threshold")
CHANGES = (*LIVE, "momentum", "beta_1", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One example.

    Attributes:
        seed: of weights and gradients.
        shapes: path to shape.
        kinds: for each variable "dense", "sparse" (rows), "sometimes" (missing in some calls),
            "stops" (missing from the second call on), "freezes" (the same, and not trainable from
            then on) or "frozen" (never there).
        omit: what is missing is left out of the lists, and is not a None in them.
        dtypes: of the variables.
        sizes: for each call what its gradients are multiplied by.
        changes: triples (call, name, factor): what is set before a call.
        is_lowered: the sizes from which something is compiled are so small that all is large.
        clipper: a clipper or None.
        inner: a key of `INNER`.
        rate_falls: the learning rate is a schedule.
        replicas: 0 without a strategy.
        micro_steps: calls that make an update.
        scaling: of the loss: "none", "fixed" or "dynamic".
        skip: leave out what is not finite.
        spikes: σ or None.
        bad: (call, replica, number): an infinity or a NaN in a gradient, or None.
        compiled: as in `ClippedOptimizer`.
        graph: each call runs in one `tf.function`.
        telemetry: as in `ClippedOptimizer`.
        calls: how many calls of `apply`.
        saved_at: the call before which the state is saved, and loaded into a new optimizer.
        by: "store" (what `.keras` files do) or "checkpoint".
    """

    seed: int
    shapes: dict
    kinds: tuple
    omit: bool
    dtypes: tuple
    sizes: tuple
    changes: tuple
    is_lowered: bool
    clipper: object
    inner: str
    rate_falls: bool
    replicas: int
    micro_steps: int
    scaling: str
    skip: bool
    spikes: float | None
    bad: tuple | None
    compiled: object
    graph: bool
    telemetry: object
    calls: int
    saved_at: int
    by: str

    def __str__(self):
        return str({**vars(self), "clipper": str(self.clipper)})


def falling(start):
    """A number that halves every 2 updates."""
    return keras.optimizers.schedules.ExponentialDecay(start, 2, 0.5)


#: Name to a function of the learning rate.
INNER = {
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "plain sgd": lambda rate: keras.optimizers.SGD(rate),
    "nesterov": lambda rate: keras.optimizers.SGD(rate, momentum=0.8, nesterov=True),
    "amsgrad": lambda rate: keras.optimizers.Adam(rate, amsgrad=True),
    "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.1),
    "ema": lambda rate: keras.optimizers.SGD(
        rate, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "rmsprop": lambda rate: keras.optimizers.RMSprop(rate),
    "adagrad": lambda rate: keras.optimizers.Adagrad(rate),
    "adamax": lambda rate: keras.optimizers.Adamax(rate),
    "nadam": lambda rate: keras.optimizers.Nadam(rate),
    "adadelta": lambda rate: keras.optimizers.Adadelta(rate),
    "lion": lambda rate: keras.optimizers.Lion(rate),
    "ftrl": lambda rate: keras.optimizers.Ftrl(rate),
}


#: Those that the reference has in NumPy: JAX has no float64 to run Keras's own in.
INNERS = [k for k in INNER if BACKEND != "jax" or k in ("sgd", "plain sgd", "adam")]
#: A gradient whose square is beyond float32.
HUGE = 2.0**66


@st.composite
def clippers(draw):
    """Any clipper of the registry, by its declared parameters."""
    cls = draw(st.sampled_from(list(selectable().values())))
    values = {}
    for p in parameters(cls):
        if p.kind == "word":
            values[p.name] = draw(st.sampled_from(p.choices))
        elif p.kind == "count":
            values[p.name] = draw(st.integers(1, 4))
        elif p.kind == "number":
            low, high = p.range or (p.default * 0.5, p.default if p.below else p.default * 2)
            value = low + (high - low) * draw(st.integers(0, 8)) / 8
            values[p.name] = falling(value) if p.live and draw(st.integers(0, 4)) == 4 else value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a norm clip that is undone
        return cls(**values)


@st.composite
def composites(draw, shapes):
    """None, a clipper, a chain or a map by layer."""
    kind = draw(st.sampled_from(("one", "one", "one", "none", "chain", "map")))
    if kind == "none":
        return None
    if kind == "chain":
        return kgc.Chain([draw(clippers()), draw(clippers())])
    if kind == "map":
        layer = next(iter(shapes)).rpartition("/")[0]
        rules = [(f"{layer}/.*", draw(st.none() | clippers())), (".*/bias", draw(clippers()))]
        return kgc.ClipMap(rules, draw(st.none() | clippers()), allow_unmatched=True)
    return draw(clippers())


@st.composite
def variables(draw):
    """Path to shape: one to three layers, a kernel and perhaps a bias in each."""
    shapes = {}
    for i in range(draw(st.integers(1, 3))):
        layer = f"{draw(st.sampled_from(LAYERS))}_{i}"
        shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
        shapes[f"{layer}/{draw(st.sampled_from(KERNELS))}"] = shape
        if draw(st.booleans()):
            shapes[f"{layer}/bias"] = shape[-1:]
    return shapes


@st.composite
def configurations(draw):
    """See `Configuration`."""
    shapes = draw(variables())
    kinds = ["dense"]
    for path, shape in list(shapes.items())[1:]:
        del path
        has_rows = IS_TENSORFLOW and len(shape) > 1
        known = (
            "dense",
            "sometimes",
            "stops",
            "freezes",
            "frozen",
            *(["sparse"] if has_rows else []),
        )
        kinds.append(draw(st.sampled_from(known)))
    if IS_TENSORFLOW and len(next(iter(shapes.values()))) > 1 and draw(st.booleans()):
        kinds[0] = "sparse"
    known = ("float32",) * 3 + (("float64",) if BACKEND != "jax" else ()) + ("bfloat16",)
    dtypes = (draw(st.sampled_from(known)),) * len(shapes)
    if draw(st.integers(0, 2)) == 2:
        dtypes = tuple(draw(st.sampled_from(known)) for _ in shapes)
    replicas = draw(st.sampled_from((0,) * 27 + (1, 2, 4))) if IS_TENSORFLOW else 0
    # Elsewhere Keras itself drops what overflows, a micro-batch at a time.
    dynamic = "dynamic" if IS_TENSORFLOW else "none"
    scaling = draw(st.sampled_from(("none", "none", "fixed", dynamic)))
    skip, calls = draw(st.booleans()), draw(st.integers(1, 5))
    spikes = draw(st.sampled_from((None, None, 0.5, 2.0)))
    is_checked = skip or spikes or scaling == "dynamic"
    bad = None
    if is_checked and draw(st.booleans()):
        bad = (draw(st.integers(0, calls - 1)), draw(st.integers(0, max(replicas - 1, 0))))
        bad = (*bad, draw(st.sampled_from((float("inf"), float("-inf"), float("nan")))))
    # Rounding to 8 bits is all that the quotients of the others would show.
    inner = "plain sgd" if "bfloat16" in dtypes else draw(st.sampled_from(INNERS))
    sizes = [draw(st.sampled_from((0.0, 0.25, 1.0, 1.0, 4.0))) for _ in range(calls)]
    clipper = draw(composites(shapes))
    if inner == "plain sgd" and scaling == "none" and draw(st.integers(0, 3)) == 3:
        sizes[-1] = HUGE
    is_lowered = IS_TENSORFLOW and draw(st.integers(0, 29)) == 29
    graph = is_lowered or (IS_TENSORFLOW and draw(st.integers(0, 29)) == 29)
    if graph:  # a step that is traced without a gradient never learns of it
        kinds = ["dense" if kind in ("stops", "freezes") else kind for kind in kinds]
    changes = []
    if calls > 1 and draw(st.integers(0, 2)) == 2:
        # A function that TensorFlow has traced does not see a number of Python's that changes.
        name = draw(st.sampled_from(CHANGES if IS_TENSORFLOW and not graph else LIVE))
        changes.append((draw(st.integers(1, calls - 1)), name, draw(st.sampled_from((0.5, 0.8)))))
    return Configuration(
        seed=draw(st.integers(0, 2**16)),
        shapes=shapes,
        kinds=tuple(kinds),
        omit=draw(st.booleans()),
        dtypes=dtypes,
        sizes=tuple(sizes),
        changes=tuple(changes),
        is_lowered=is_lowered,
        clipper=clipper,
        inner=inner,
        rate_falls=draw(st.integers(0, 4)) == 4,
        replicas=replicas,
        micro_steps=draw(st.integers(1, 3)),
        scaling=scaling,
        skip=skip,
        spikes=spikes,
        bad=bad,
        compiled=draw(st.sampled_from(("auto", False))),
        graph=graph,
        telemetry=draw(st.sampled_from((False, True, 2))),
        calls=calls,
        saved_at=draw(st.integers(0, calls - 1)),
        by=draw(st.sampled_from(("store", "checkpoint"))) if IS_TENSORFLOW else "store",
    )
