"""Every place where an object or a class of Keras's gets another method or hidden attribute."""

import re
from pathlib import Path

import keras_gradclip

PACKAGE = Path(keras_gradclip.__file__).parent
PATCH = re.compile(
    r"setattr(__)?\(|\.__bases__ =|\._\w+\.\w+(\[.*\])? =|changed\("
    r"|\b(?!self\b)\w+\.(build|scale_loss|apply|call) ="
)
#: File and line; below it, why there is no other way.
PATCHES = """\
optimizer/_loss_scale.py setattr(outer, name, functools.partial(_apply_scaled, *ours))
    LossScaleOptimizer asks the first replica alone for infinities
optimizer/_loss_scale.py outer.scale_loss = functools.partial(_scale_loss, outer)
    its scale is made outside of the trace, which would else be done twice; Keras's takes a constant
_compat.py part.build = scope(part.build)
    the variables of loss and metrics are created outside of the trace
gate.py object.__setattr__(layer, "call", _GatedCall(layer))
    the gate is at a layer's input, and has no layer of its own
model.py cls.__bases__ = tuple(
    a subclass of ClippedModel may be functional, as one of keras.Model may
_compat.py model._compile_config.config["optimizer"] = optimizer
    a model that is saved has the optimizer that it was given
model.py object.__setattr__(self, "train_step", step)
    Keras compiles what it finds there; put back when that is made
model.py object.__setattr__(self, "train_step", own)
    what is put back
optimizer/_inner.py self._changes.enter_context(_compat.changed(inner, methods))
    for an update: the sum over replicas comes before the clip; one operation a variable; weight
    decay at one rate; a limit on the weight updates; averages in cross-replica context
"""
#: Beginnings of lines that are no patch: of an object of ours, or of public attributes.
OWN = (
    "_workers.py",
    "clippers/",
    "diagnostics/_put_back.py",
    "diagnostics/calibration.py object.__setattr__(self",
    "gate.py object.__setattr__(self",
    'model.py object.__setattr__(self, "_clipping"',
    "model.py self._clipping.gate =",
    "model.py setattr(self, attribute, ",  # train_function, as Keras does
    "optimizer/_inner.py with self._changed(",
    "optimizer/_loss_scale.py object.__setattr__(outer, name, variable)",  # as `build` does
    "optimizer/clipped_optimizer.py optimizer._clip.paths =",
    "optimizer/clipped_optimizer.py self._inner_update.limited =",
    "optimizer/clipped_optimizer.py self._telemetry.every =",
    "optimizer/clipped_optimizer.py super().__setattr__(",
)


def test_every_patch_of_keras_has_a_reason():
    found = set()
    for file in sorted(PACKAGE.rglob("*.py")):
        for line in file.read_text().splitlines():
            entry = f"{file.relative_to(PACKAGE)} {line.strip()}"
            if PATCH.search(line) and "def " not in line and not entry.startswith(OWN):
                found.add(entry)
    assert found == {line for line in PATCHES.splitlines() if not line.startswith(" ")}
