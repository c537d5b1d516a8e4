"""Findings about a run in plain sentences, the worst first."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from keras_gradclip._arithmetic import TINY
from keras_gradclip.diagnostics.samples import Run

#: A layer clipped on more than this share of the steps is reported: the clip then acts as a
#: smaller learning rate (Seetharaman et al., arXiv 2007.14469, do so on purpose).
TOO_OFTEN = 0.5
#: For clippers of elements: a larger mean share of clipped elements is reported.
TOO_MANY_ELEMENTS = 0.1
#: Degrees by which the clip may turn a layer's gradient on average, before it is reported.
TOO_FAR = 45.0
#: A global norm this many times the median of the samples around it is a spike.
SPIKE = 10.0
#: A clip that acts on more than the first share of the layers in one fifth of the run, and on less
#: than the second in another, is reported as uneven.
UNEVEN = (0.3, 0.05)
#: More layers than this with one finding share one sentence.
SINGLY = 3
#: A gradient whose norm stays below this is called zero.
ZERO = 1e-12

LEVELS = ("bad", "note", "good")


@dataclasses.dataclass(frozen=True)
class Finding:
    """A statement about a run.

    Attributes:
        level: "bad", "note" or "good".
        text: one or two sentences.
        details: one line for each of many layers; else empty.
    """

    level: str
    text: str
    details: tuple[str, ...] = ()


def findings(run: Run) -> list[Finding]:
    """The findings about a run, the worst first."""
    is_finite = np.isfinite(run.global_before)
    result = _unusable(run) + _nonfinite(run)
    if is_finite.any():
        is_off = run.description["clipper"] is None
        if is_off:
            result.append(Finding("note", "Clipping is off: the gradients were only watched."))
        else:
            result += _how_often(run, is_finite)
        result += _spikes(run, is_finite, is_off)
        result += _zero(run, is_finite)
    return sorted(result, key=lambda f: LEVELS.index(f.level))


def _unusable(run: Run) -> list[Finding]:
    if not run.problems:
        return []
    if len(run.problems) == 1:
        return [Finding("bad", f"Part of the files was left out: {run.problems[0]}.")]
    text = f"{len(run.problems)} parts of the files were left out, as after a run that was killed."
    return [Finding("bad", text, run.problems)]


def _nonfinite(run: Run) -> list[Finding]:
    share = np.nan_to_num(run.figures["nonfinite"])
    hit = worst(share.sum(axis=0), share.max(axis=0) > 0)
    if not hit:
        return []
    samples = np.any(share > 0, axis=1)
    first = int(run.steps[np.argmax(samples)])
    return [
        Finding(
            "bad",
            f"Gradients that are not finite, first seen at step {first}, in {samples.sum()} of "
            f"{len(run.steps)} samples: {some([run.layers[i] for i in hit])}. Lower the learning "
            "rate, or look at the loss; skip_nonfinite=True leaves such updates out.",
        )
    ]


def _zero(run: Run, is_finite: np.ndarray) -> list[Finding]:
    largest = over_samples(np.nanmax, run.figures["norm_before"][is_finite])
    names = [n for n, size in zip(run.layers, largest, strict=True) if size < ZERO]
    if not names:
        return []
    text = f"{some(names)}: the gradient is zero in every sample; nothing is learnt there."
    return [Finding("bad", text)]


@dataclasses.dataclass(frozen=True)
class Clipping:
    """Statistics of the clip in some samples, by layer; arrays `[layers]`.

    Attributes:
        share: the share of samples in which it clips.
        fraction: the mean share of clipped elements.
        left: the mean ratio of the norm after the clip to that before.
        angle: the mean angle in degrees.
    """

    share: np.ndarray
    fraction: np.ndarray
    left: np.ndarray
    angle: np.ndarray

    @classmethod
    def of(cls, run: Run, samples: np.ndarray) -> Clipping:
        """The statistics of the samples that a mask or indices select."""
        figures = {name: values[samples] for name, values in run.figures.items()}
        measured = np.maximum(run.measured[samples].sum(axis=0), 1)
        return cls(
            run.clipped[samples].sum(axis=0) / measured,
            over_samples(np.nanmean, figures["clip_fraction"]),
            left_of(figures["norm_before"], figures["norm_after"]),
            over_samples(np.nanmean, figures["angle"]),
        )

    def too_often(self, partial: np.ndarray) -> np.ndarray:
        """A mask of the layers that are clipped too often, or in too many elements."""
        return (self.share > TOO_OFTEN) & (~partial | (self.fraction > TOO_MANY_ELEMENTS))


def _how_often(run: Run, is_finite: np.ndarray) -> list[Finding]:
    limits_updates = run.limits_updates
    if not run.clipped[is_finite].any():
        return [_never(run, is_finite, bool(limits_updates.all()))]
    samples = np.flatnonzero(is_finite)
    whole = Clipping.of(run, samples)
    late = Clipping.of(run, samples[len(samples) // 2 :])
    too_often = whole.too_often(run.partial) & ~limits_updates
    # The warm-up's large gradients say nothing about the threshold to use later.
    at_the_start = too_often & ~late.too_often(run.partial)
    result = _too_low(run, is_finite, whole, too_often & ~at_the_start)
    result += _uneven(run, is_finite) or _at_the_start(run, samples, at_the_start)
    result += _turned(run, np.where(limits_updates, 0.0, whole.angle))
    result += _limited(run, whole.share, limits_updates)
    if not too_often.any() and not limits_updates.all():
        share = np.where(limits_updates, np.nan, whole.share)
        most = int(np.nanargmax(share))
        result.append(
            Finding(
                "good",
                f"On average a layer was clipped on {percent(float(np.nanmean(share)))} of steps, "
                f"at most on {percent(share[most])} ({run.layers[most]}).",
            )
        )
    return result


def _never(run: Run, is_finite: np.ndarray, limits_updates: bool) -> Finding:
    if limits_updates:
        reason = "every weight update was below the limit. Lower the limit, or leave it out."
    else:
        suggestion = np.percentile(run.global_before[is_finite], 90)
        reason = (
            "the clip does nothing. Lower the threshold (the 90th percentile of the global norm "
            f"is {suggestion:.3g}), or leave it out."
        )
    return Finding("bad", f"No layer was ever clipped: {reason}")


def _limited(run: Run, share: np.ndarray, limits_updates: np.ndarray) -> list[Finding]:
    """Reports how often a limit on weight updates acts; most steps may reach it by design."""
    indices = worst(share, limits_updates & (share > 0))
    if not indices:
        return []
    average, most = float(share[limits_updates].mean()), indices[0]
    works = " That is how such a limit works: it sets how far a step may move the weights."
    return [
        Finding(
            "note",
            f"Weight updates of {int(limits_updates.sum())} of {len(run.layers)} layers are "
            f"limited, on {percent(average)} of steps on average, at most on "
            f"{percent(share[most])} ({run.layers[most]}).{works if average > TOO_OFTEN else ''}",
            tuple(f"{run.layers[i]}: on {percent(share[i])} of steps" for i in indices)
            if len(indices) > SINGLY
            else (),
        )
    ]


def _too_low(
    run: Run, is_finite: np.ndarray, clipping: Clipping, too_often: np.ndarray
) -> list[Finding]:
    norms = run.figures["norm_before"][is_finite]

    def describe(i: int) -> str:
        elements = f" ({percent(clipping.fraction[i])} of its elements)" if run.partial[i] else ""
        return (
            f"{run.layers[i]}: clipped on {percent(clipping.share[i])} of steps{elements}, and "
            f"{percent(clipping.left[i])} of its norm is left"
        )

    def hint(i: int, text: str) -> str:
        is_norm = run.limits_norms[i] and not run.partial[i]
        return text.format(np.nanpercentile(norms[:, i], 90)) if is_norm else ""

    indices = worst(clipping.share * (1 - clipping.left), too_often)
    if len(indices) <= SINGLY:
        return [
            Finding(
                "bad",
                f"{describe(i)}: the threshold is too low."
                + hint(i, " The 90th percentile of its norm is {:.3g}."),
            )
            for i in indices
        ]
    names = some([f"{run.layers[i]} ({percent(clipping.share[i])})" for i in indices], SINGLY)
    return [
        Finding(
            "bad",
            f"{len(indices)} of {len(run.layers)} layers are clipped on more than "
            f"{percent(TOO_OFTEN)} of steps, and {percent(clipping.left[indices].mean())} of their "
            f"norm is left on average: their thresholds are too low. Worst: {names}.",
            tuple(describe(i) + hint(i, "; 90th percentile of the norm: {:.3g}") for i in indices),
        )
    ]


def _at_the_start(run: Run, samples: np.ndarray, mask: np.ndarray) -> list[Finding]:
    half = len(samples) // 2
    early, late = (Clipping.of(run, part).share for part in (samples[:half], samples[half:]))
    indices = worst(early - late, mask)
    if not indices:
        return []

    def describe(of: int | list[int]) -> str:
        first, second = percent(np.mean(early[of])), percent(np.mean(late[of]))
        return f"on {first} of steps in the first half of the run, on {second} in the second"

    lines = tuple(f"{run.layers[i]}: {describe(i)}" for i in indices)
    return [
        Finding(
            "note",
            f"Clipped at the start above all, {describe(indices)}: "
            f"{some([run.layers[i] for i in indices], SINGLY)}. A warm-up or the first large "
            "gradients do this; the thresholds need not be too low.",
            lines if len(lines) > SINGLY else (),
        )
    ]


def _uneven(run: Run, is_finite: np.ndarray) -> list[Finding]:
    """Reports a clip that acts in only one part of the run, because the norms drift."""
    clipped = run.clipped[is_finite][:, ~run.limits_updates]
    if len(clipped) < 20 or not clipped.size:
        return []
    fifths = np.array_split(clipped.mean(axis=1), 5)
    first, last = (float(part.mean()) for part in (fifths[0], fifths[-1]))
    if not (max(first, last) > UNEVEN[0] and min(first, last) < UNEVEN[1]):
        return []
    end = "start" if first > last else "end"
    sizes = np.array_split(run.global_before[is_finite], 5)
    ratio = max(np.median(sizes[0]), TINY) / max(np.median(sizes[-1]), TINY)
    drift = f"falls {ratio:.0f}-fold" if ratio > 1 else f"grows {1 / ratio:.0f}-fold"
    reason = f" The global norm {drift} in between." if max(ratio, 1 / ratio) >= 2 else ""
    advice = " A schedule or PercentileClip follows such a drift."
    return [
        Finding(
            "note",
            f"The clip acts at the {end} of the run: on {percent(first)} of the layers in its "
            f"first fifth, on {percent(last)} in its last.{reason}"
            + ("" if run.description.get("remembers") else advice),
        )
    ]


def _turned(run: Run, angle: np.ndarray) -> list[Finding]:
    indices = worst(angle, angle > TOO_FAR)
    advice = "A norm clip keeps the direction."
    if len(indices) <= SINGLY:
        return [
            Finding(
                "note",
                f"{run.layers[i]}: the clip turns the gradient by {angle[i]:.0f}° on average. "
                f"{advice}",
            )
            for i in indices
        ]
    most = indices[0]
    return [
        Finding(
            "note",
            f"In {len(indices)} of {len(run.layers)} layers the clip turns the gradient by more "
            f"than {TOO_FAR:.0f}° on average, most in {run.layers[most]} ({angle[most]:.0f}°). "
            f"{advice}",
            tuple(f"{run.layers[i]}: {angle[i]:.0f}°" for i in indices),
        )
    ]


def _spikes(run: Run, is_finite: np.ndarray, is_off: bool) -> list[Finding]:
    before, after = run.global_before[is_finite], run.global_after[is_finite]
    reach = max(3, len(before) // 20)
    around = np.array(
        [np.median(before[max(0, i - reach) : i + reach + 1]) for i in range(len(before))]
    )
    times = before / np.maximum(around, TINY)
    spikes = (times > SPIKE) & (around > 0)
    if not spikes.any():
        return []
    top = int(np.where(spikes, times, 0).argmax())
    where = f"step {run.steps[is_finite][top]}: {times[top]:.0f} times the norm around it"
    text = f"{int(spikes.sum())} of {len(before)} samples are spikes, the largest at {where}"
    if is_off:
        return [Finding("note", f"{text}. A clip would bound them.")]
    return [Finding("note", f"{text}; after the clip {after[top] / around[top]:.1f} times.")]


def over_samples(
    function: Callable[..., np.ndarray], values: np.ndarray, axis: int = 0
) -> np.ndarray:
    """The result of a NumPy nan-function along an axis; NaN, without a warning, if all is NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "All-NaN slice" is expected
        return function(values, axis=axis)


def left_of(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The mean ratio of the norm after the clip to that before, every sample with equal weight."""
    share = np.divide(after, before, out=np.where(np.isnan(before), np.nan, 1.0), where=before > 0)
    return over_samples(np.nanmean, share)


def worst(badness: np.ndarray, mask: np.ndarray) -> list[int]:
    """The indices where `mask` is true, sorted from the worst."""
    return [int(i) for i in np.argsort(-badness, kind="stable") if mask[i]]


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and the number of the others."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def percent(share: float) -> str:
    """A share as text in per cent; two digits if below one per cent."""
    value = 100 * float(share)
    if np.isnan(value):
        return "–"
    return f"{value:.0f} %" if value >= 1 or value == 0 else f"{value:.2g} %"
