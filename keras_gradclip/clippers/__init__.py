"""What can clip? One declaration a clipper; the registry in `base` knows them all."""

from keras_gradclip.clippers.base import Clipper, ClipStats, get, register, serialize
from keras_gradclip.clippers.composite import ClipMap
from keras_gradclip.clippers.elementwise import AbsoluteClip, Chain, ExponentialClip, NormClip
from keras_gradclip.clippers.relative import AdaptiveClip, RMSClip, unit_axes
from keras_gradclip.clippers.stateful import AdaClip, PercentileClip, ZScoreClip

__all__ = [
    "AbsoluteClip",
    "AdaClip",
    "AdaptiveClip",
    "Chain",
    "ClipMap",
    "ClipStats",
    "Clipper",
    "ExponentialClip",
    "NormClip",
    "PercentileClip",
    "RMSClip",
    "ZScoreClip",
    "get",
    "register",
    "serialize",
    "unit_axes",
]
