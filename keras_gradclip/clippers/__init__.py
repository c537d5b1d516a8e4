"""The clippers, one declaration each; the registry in `base` knows them all."""

from keras_gradclip.clippers.base import (
    Clipper,
    ClipStats,
    get,
    register,
    selectable,
    serialize,
    threshold_of,
)
from keras_gradclip.clippers.composite import Chain, ClipMap
from keras_gradclip.clippers.elementwise import AbsoluteClip, ExponentialClip
from keras_gradclip.clippers.norm import NormClip, RMSClip
from keras_gradclip.clippers.relative import AdaptiveClip, UpdateRatioClip
from keras_gradclip.clippers.stateful import AdaClip, PercentileClip, ZScoreClip
from keras_gradclip.clippers.units import unit_axes
from keras_gradclip.declarations import Card, Parameter, parameter, parameters

__all__ = [
    "AbsoluteClip",
    "AdaClip",
    "AdaptiveClip",
    "Card",
    "Chain",
    "ClipMap",
    "ClipStats",
    "Clipper",
    "ExponentialClip",
    "NormClip",
    "Parameter",
    "PercentileClip",
    "RMSClip",
    "UpdateRatioClip",
    "ZScoreClip",
    "get",
    "parameter",
    "parameters",
    "register",
    "selectable",
    "serialize",
    "threshold_of",
    "unit_axes",
]
