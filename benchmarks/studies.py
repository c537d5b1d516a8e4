"""What `make evidence` trains: each study is networks × clippers × learning rates × seeds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import keras_gradclip as kgc
from benchmarks.yardstick import TRIALS

#: What tells a run from the others.
KEY = (
    *("study", "network", "data", "label_noise", "optimizer", "schedule"),
    *("batch_size", "epochs", "clipper", "learning_rate", "seed"),
)
NONE = "none"
CALIBRATED = "calibrate"
CALIBRATED_RATIO = "calibrate update_ratio"
SEARCHED = f"best of {TRIALS} trials"


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs that stand in one table and one picture.

    Attributes:
        name: of the table.
        network: a key of `evidence.NETWORKS`.
        data: `NAME@SIDE`: `cifar10` or `mnist_embedded`, and the side of the images in pixels.
        clippers: clippers, or `NONE`, `CALIBRATED` or `CALIBRATED_RATIO` (what `calibrate` finds),
            or `SEARCHED` (what a search finds at each learning rate, with the first seed).
        rates: learning rates.
        seeds: of weights, order and noise.
        epochs: passes over the training images.
        optimizer: "momentum" (SGD, 0.9), "sgd" without it, or "adamw".
        schedule: "constant", or "cosine" (to 0).
        label_noise: share of the training labels that are drawn anew, 0 to 1.
        batch_size: images an update.
    """

    name: str
    network: str
    data: str
    clippers: tuple
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    optimizer: str = "momentum"
    schedule: str = "constant"
    label_noise: float = 0.0
    batch_size: int = 64

    def runs(self) -> Iterator[tuple[dict, object]]:
        """For each run its key columns and its clipper, clipper by clipper."""
        shared = {k: str(v) for k, v in vars(self).items() if k in KEY} | {"study": self.name}
        for clipper, seed, rate in itertools.product(self.clippers, self.seeds, self.rates):
            cell = {"clipper": str(clipper), "learning_rate": f"{rate:g}", "seed": str(seed)}
            yield shared | cell, clipper


RATIOS = (1e-3, 2e-3, 5e-3)
UNIT = tuple(kgc.UpdateRatioClip(ratio, biases=None) for ratio in RATIOS)
BIASES = kgc.UpdateRatioClip()
ANNEALED = kgc.UpdateRatioClip(anneal="learning_rate")
WIDE_BIASES = kgc.UpdateRatioClip(5e-3)
WIDE_ANNEALED = kgc.UpdateRatioClip(5e-3, anneal="learning_rate")
KERNEL = tuple(kgc.UpdateRatioClip(ratio, scope="variable", biases=None) for ratio in RATIOS)
FIELD = (
    kgc.NormClip(1.0, scope="global"),
    kgc.NormClip(0.1),
    kgc.AdaptiveClip(0.02),
    kgc.ExponentialClip(0.7, gamma=0.01),
    kgc.PercentileClip(90, window=20, scope="layer"),
    kgc.AbsoluteClip(0.01),
    kgc.ZScoreClip(),
    kgc.AdaClip(),
    kgc.RMSClip(1e-3),
    CALIBRATED,
    CALIBRATED_RATIO,
)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
ADAM_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEEDS = (1, 2, 3)
CIFAR: dict[str, Any] = {"network": "small_vgg", "data": "cifar10@16", "seeds": SEEDS, "epochs": 4}
#: For the headline, and for what differs by a point: a mean of three is a point off now and then.
MORE = {**CIFAR, "seeds": (*SEEDS, 4, 5, 6)}
MAIN = (
    *(NONE, UNIT[1], BIASES, FIELD[0], KERNEL[1], FIELD[4], FIELD[2], FIELD[3]),
    *(UNIT[0], UNIT[2], KERNEL[0], KERNEL[2], FIELD[1], *FIELD[5:]),
)
#: Momentum adds steps of one direction up to ten times: does the best κ know it?
WIDE = tuple(kgc.UpdateRatioClip(ratio, biases=None) for ratio in (1e-3, 2e-3, 5e-3, 2e-2))
#: Few enough for a reader who has a minute: the clippers, and the studies that have them.
HEADLINE = (NONE, BIASES, UNIT[1], FIELD[0], FIELD[2], FIELD[4])
HEADLINE_STUDIES = ("cifar", "high-rates")
#: What is found from data, beside the best of a search at the same learning rate.
FOUND = (CALIBRATED, CALIBRATED_RATIO, SEARCHED)
PRESETS: dict[str, tuple[Study, ...]] = {
    "small": (
        Study(
            "digits",
            "small_vgg",
            "mnist_embedded@14",
            (NONE, UNIT[1], BIASES, FIELD[0]),
            (0.01, 0.1, 0.3),
            SEEDS,
            2,
        ),
    ),
    "full": (
        Study("cifar", clippers=MAIN, rates=RATES, **MORE),
        Study("yardstick", clippers=(SEARCHED,), rates=RATES, **MORE),
        Study("high-rates", clippers=(NONE, UNIT[0], UNIT[1], BIASES), rates=(1.0, 3.0), **CIFAR),
        Study("no-momentum", clippers=(NONE, *WIDE), rates=(0.1,), optimizer="sgd", **CIFAR),
        Study(
            "adamw",
            clippers=(NONE, UNIT[1], BIASES, WIDE_BIASES, FIELD[0], FIELD[4], *FOUND),
            rates=ADAM_RATES,
            optimizer="adamw",
            **CIFAR,
        ),
        *(
            Study(
                f"noise-{round(100 * noise)}",
                "lenet5",
                "mnist_embedded@28",
                (NONE, UNIT[1], FIELD[0], FIELD[1]),
                (0.01, 0.1),
                SEEDS,
                8,
                label_noise=noise,
            )
            for noise in (0.0, 0.4, 0.6)
        ),
        Study(
            "cosine",
            clippers=(NONE, ANNEALED, BIASES, UNIT[1], FIELD[0], FIELD[4], *FOUND),
            rates=(*RATES, 1.0),
            schedule="cosine",
            **CIFAR,
        ),
        Study(
            "cosine-adamw",
            clippers=(NONE, ANNEALED, WIDE_ANNEALED, BIASES, WIDE_BIASES, FIELD[0], *FOUND),
            rates=ADAM_RATES,
            optimizer="adamw",
            schedule="cosine",
            **CIFAR,
        ),
        # Neither κ nor `biases` was chosen on it.
        Study(
            "digits-rates",
            "small_vgg",
            "mnist_embedded@14",
            (NONE, UNIT[1], BIASES, FIELD[0], FIELD[4], FIELD[6], *FOUND),
            (*RATES, 1.0),
            SEEDS,
            2,
        ),
    ),
}
