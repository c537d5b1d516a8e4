"""optax, compiled by JAX, and this library on the JAX backend."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

import keras_gradclip as kgc

SIGMA, THRESHOLD, MAX_NORM = 0.1, 0.1, 1.0

CLIPS = {
    "optax clip": lambda: optax.clip(THRESHOLD),
    "optax clip_by_global_norm": lambda: optax.clip_by_global_norm(MAX_NORM),
    "optax clip_by_block_rms": lambda: optax.clip_by_block_rms(SIGMA / 2),
    "optax adaptive_grad_clip": lambda: optax.adaptive_grad_clip(0.01),
}
OURS = {
    "AbsoluteClip on JAX": lambda: kgc.AbsoluteClip(THRESHOLD),
    "ExponentialClip on JAX": lambda: kgc.ExponentialClip(0.7, gamma=THRESHOLD),
    "NormClip global on JAX": lambda: kgc.NormClip(MAX_NORM, scope="global"),
}


def _arrays(shapes):
    rng = np.random.default_rng(0)
    gradients = [jnp.asarray(rng.normal(scale=SIGMA, size=s).astype("float32")) for s in shapes]
    weights = [jnp.asarray(rng.normal(scale=0.05, size=s).astype("float32")) for s in shapes]
    return gradients, weights


def clip(which: str, shapes):
    """The clip alone."""
    del which
    gradients, weights = _arrays(shapes)
    variables = [keras.Variable(w, name=f"layer_{i}") for i, w in enumerate(weights)]

    def calling(fn, *arguments):
        compiled = jax.jit(fn)
        return lambda: jax.block_until_ready(compiled(*arguments))

    def theirs(make):
        transform = make()
        state = transform.init(weights)
        return calling(lambda g, w: transform.update(g, state, w)[0], gradients, weights)

    def ours(make):
        clipper = make()
        hyper = {k: jnp.asarray(v) for k, v in clipper.hyperparameters().items()}

        def apply(g, w):
            mapping = list(zip(variables, w, strict=True))
            with keras.StatelessScope(state_mapping=mapping):
                return clipper.apply(g, variables, {}, hyper)[0]

        return calling(apply, gradients, weights)

    return {
        "copy on JAX": calling(lambda g: [jnp.copy(x) for x in g], gradients),
        **{name: theirs(make) for name, make in CLIPS.items()},
        **{name: ours(make) for name, make in OURS.items()},
    }


def update(which: str, shapes):
    """The clip and the update of SGD with momentum, buffers donated."""
    del which
    gradients, weights = _arrays(shapes)

    def training(make):
        sgd = optax.sgd(1e-9, momentum=0.9)
        transform = sgd if make is None else optax.chain(make(), sgd)

        def step(g, w, state):
            updates, state = transform.update(g, state, w)
            return optax.apply_updates(w, updates), state

        compiled = jax.jit(step, donate_argnums=(1, 2))
        held = [[jnp.array(w) for w in weights], None]
        held[1] = transform.init(held[0])

        def run():
            held[:] = compiled(gradients, *held)
            jax.block_until_ready(held[0])

        return run

    return {
        "no clip, optax": training(None),
        **{name: training(make) for name, make in CLIPS.items()},
    }


def versions() -> str:
    """The versions of what is measured."""
    return f"optax {optax.__version__} on JAX {jax.__version__}"
