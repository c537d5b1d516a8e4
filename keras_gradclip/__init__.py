"""Per-layer gradient clipping for Keras 3: what is clipped is what is applied."""

import sys

if getattr(sys, "argv", [])[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == "keras_gradclip":
    from keras_gradclip import command_line  # of `python -m keras_gradclip`

    command_line.answer_before_keras(sys.argv[1:])

from keras_gradclip.clippers.base import Clipper, ClipStats, get, register, serialize
from keras_gradclip.clippers.composite import Chain, ClipMap
from keras_gradclip.clippers.elementwise import AbsoluteClip, ExponentialClip
from keras_gradclip.clippers.norm import NormClip, RMSClip
from keras_gradclip.clippers.relative import AdaptiveClip, UpdateRatioClip
from keras_gradclip.clippers.stateful import AdaClip, PercentileClip, ZScoreClip
from keras_gradclip.clippers.units import unit_axes
from keras_gradclip.declarations import parameter
from keras_gradclip.diagnostics.calibration import Calibration, calibrate
from keras_gradclip.diagnostics.monitor import ClipMonitor
from keras_gradclip.diagnostics.page import report
from keras_gradclip.gate import ActivationGate, GatedInput
from keras_gradclip.model import ClippedModel, ClippedTrainStep
from keras_gradclip.optimizer.clipped_optimizer import ClippedOptimizer

__version__ = "0.2.0"

__all__ = [
    "AbsoluteClip",
    "ActivationGate",
    "AdaClip",
    "AdaptiveClip",
    "Calibration",
    "Chain",
    "ClipMap",
    "ClipMonitor",
    "ClipStats",
    "ClippedModel",
    "ClippedOptimizer",
    "ClippedTrainStep",
    "Clipper",
    "ExponentialClip",
    "GatedInput",
    "NormClip",
    "PercentileClip",
    "RMSClip",
    "UpdateRatioClip",
    "ZScoreClip",
    "calibrate",
    "get",
    "parameter",
    "register",
    "report",
    "serialize",
    "unit_axes",
]
