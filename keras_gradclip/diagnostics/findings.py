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
        details: a line for each of several damaged parts of the files; else empty.
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
    whole, late = (Clipping.of(run, part) for part in (samples, samples[len(samples) // 2 :]))
    # The warm-up's large gradients say nothing about the threshold to use later.
    too_often = whole.too_often(run.partial) & late.too_often(run.partial) & ~limits_updates
    result = _too_low(run, is_finite, whole, too_often)
    result += _uneven(run, is_finite)
    result += _turned(run, np.where(limits_updates, 0.0, whole.angle))
    if limits_updates.any() and whole.share[limits_updates].any():
        # Most steps may reach such a limit by design.
        is_usual = whole.share[limits_updates].mean() > TOO_OFTEN
        works = " That is how such a limit works: it sets how far a step may move the weights."
        text = (
            f"Weight updates of {int(limits_updates.sum())} of {len(run.layers)} layers are "
            f"limited, {_on_steps(run, whole.share, limits_updates)}.{works if is_usual else ''}"
        )
        result.append(Finding("note", text))
    if not too_often.any() and not limits_updates.all():
        text = f"A layer was clipped {_on_steps(run, whole.share, ~limits_updates)}."
        result.append(Finding("good", text))
    return result


def _on_steps(run: Run, share: np.ndarray, mask: np.ndarray) -> str:
    most = worst(share, mask)[0]
    return (
        f"on {percent(share[mask].mean())} of steps on average, at most on {percent(share[most])} "
        f"({run.layers[most]})"
    )


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


def _too_low(
    run: Run, is_finite: np.ndarray, clipping: Clipping, too_often: np.ndarray
) -> list[Finding]:
    norms = run.figures["norm_before"][is_finite]

    def describe(i: int) -> str:
        elements = f" ({percent(clipping.fraction[i])} of its elements)" if run.partial[i] else ""
        hint = ""
        if run.limits_norms[i] and not run.partial[i]:
            hint = f" The 90th percentile of its norm is {np.nanpercentile(norms[:, i], 90):.3g}."
        return (
            f"{run.layers[i]}: clipped on {percent(clipping.share[i])} of steps{elements}, and "
            f"{percent(clipping.left[i])} of its norm is left: the threshold is too low.{hint}"
        )

    indices = worst(clipping.share * (1 - clipping.left), too_often)
    if len(indices) <= SINGLY:
        return [Finding("bad", describe(i)) for i in indices]
    names = some([f"{run.layers[i]} ({percent(clipping.share[i])})" for i in indices], SINGLY)
    return [
        Finding(
            "bad",
            f"{len(indices)} of {len(run.layers)} layers are clipped on more than "
            f"{percent(TOO_OFTEN)} of steps, and {percent(clipping.left[indices].mean())} of their "
            f"norm is left on average: their thresholds are too low. Worst: {names}; the table of "
            "layers has them all.",
        )
    ]


def _uneven(run: Run, is_finite: np.ndarray) -> list[Finding]:
    """Reports a clip that acts at one end of the run: in a warm-up, or because norms drift."""
    clipped = run.clipped[is_finite][:, ~run.limits_updates]
    if len(clipped) < 10 or not clipped.size:
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
    if not indices:
        return []
    names = some([f"{run.layers[i]} ({angle[i]:.0f}°)" for i in indices], SINGLY)
    text = f"The clip turns the gradient by more than {TOO_FAR:.0f}° on average: {names}."
    return [Finding("note", f"{text} A norm clip keeps the direction.")]


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
