"""Per-layer gradient clipping for Keras 3: what is clipped is what is applied."""

from keras_gradclip.adaptive import AdaptiveClip, RMSClip, unit_axes
from keras_gradclip.base import Clipper, ClipStats, get, register, serialize
from keras_gradclip.calibrate import Calibration, calibrate
from keras_gradclip.clip_map import ClipMap
from keras_gradclip.clippers import AbsoluteClip, Chain, ExponentialClip, NormClip
from keras_gradclip.gate import ActivationGate, GatedInput
from keras_gradclip.model import ClippedModel, ClippedTrainStep
from keras_gradclip.monitor import ClipMonitor
from keras_gradclip.optimizer import ClippedOptimizer
from keras_gradclip.report import report
from keras_gradclip.stateful import AdaClip, PercentileClip, ZScoreClip

__version__ = "0.1.0"

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
    "ZScoreClip",
    "calibrate",
    "get",
    "register",
    "report",
    "serialize",
    "unit_axes",
]
