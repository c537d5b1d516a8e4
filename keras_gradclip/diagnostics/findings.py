"""Findings about a run in plain sentences, the worst first."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence

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
    result = [*_unusable(run), *_nonfinite(run)]
    finite = run.finite
    if len(finite.steps):
        is_off = run.description["clipper"] is None
        if is_off:
            result.append(Finding("note", "Clipping is off: the gradients were only watched."))
        else:
            result += _how_often(finite)
        result += [*_spikes(finite, is_off), *_zero(finite)]
    return sorted(result, key=lambda f: LEVELS.index(f.level))


def _unusable(run: Run) -> Iterator[Finding]:
    if len(run.problems) == 1:
        yield Finding("bad", f"Part of the files was left out: {run.problems[0]}.")
    elif run.problems:
        parts = f"{len(run.problems)} parts of the files were left out"
        yield Finding("bad", f"{parts}, as after a run that was killed.", run.problems)


def _nonfinite(run: Run) -> Iterator[Finding]:
    share = np.nan_to_num(run.figures["nonfinite"])
    hit = worst(share.sum(axis=0), share.max(axis=0) > 0)
    if hit:
        samples = np.any(share > 0, axis=1)
        yield Finding(
            "bad",
            f"Gradients that are not finite, first seen at step {run.steps[samples][0]}, in "
            f"{samples.sum()} of {len(run.steps)} samples: {some([run.layers[i] for i in hit])}. "
            "Lower the learning rate, or look at the loss; skip_nonfinite=True leaves such updates "
            "out.",
        )


def _zero(run: Run) -> Iterator[Finding]:
    largest = over_samples(np.nanmax, run.figures["norm_before"])
    names = [n for n, size in zip(run.layers, largest, strict=True) if size < ZERO]
    if names:
        text = f"{some(names)}: the gradient is zero in every sample; nothing is learnt there."
        yield Finding("bad", text)


@dataclasses.dataclass(frozen=True)
class Clipping:
    """Statistics of the clip over the samples of a run, by layer; arrays `[layers]`.

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
    def of(cls, run: Run) -> Clipping:
        """The statistics of a run."""
        return cls(
            run.clipped.sum(axis=0) / np.maximum(run.measured.sum(axis=0), 1),
            over_samples(np.nanmean, run.figures["clip_fraction"]),
            left_of(run.figures["norm_before"], run.figures["norm_after"]),
            over_samples(np.nanmean, run.figures["angle"]),
        )

    def too_often(self, partial: np.ndarray) -> np.ndarray:
        """A mask of the layers that are clipped too often, or in too many elements."""
        return (self.share > TOO_OFTEN) & (~partial | (self.fraction > TOO_MANY_ELEMENTS))


def _how_often(run: Run) -> Iterator[Finding]:
    limits_updates = run.limits_updates
    if not run.clipped.any():
        reason = "the clip does nothing. Lower the threshold"
        if limits_updates.all():
            reason = "every weight update was below the limit. Lower the limit"
        elif run.limits_norms.all():
            norm = np.percentile(run.global_before, 90)
            reason += f" (the 90th percentile of the global norm is {norm:.3g})"
        yield Finding("bad", f"No layer was ever clipped: {reason}, or leave it out.")
        return
    whole, late = Clipping.of(run), Clipping.of(run.only(slice(len(run.steps) // 2, None)))
    # The warm-up's large gradients say nothing about the threshold to use later.
    too_often = whole.too_often(run.partial) & late.too_often(run.partial) & ~limits_updates
    yield from _too_low(run, whole, too_often)
    yield from _uneven(run)
    yield from _turned(run, np.where(limits_updates, 0.0, whole.angle))
    if limits_updates.any() and whole.share[limits_updates].any():
        # Most steps may reach such a limit by design.
        is_usual = whole.share[limits_updates].mean() > TOO_OFTEN
        works = " That is how such a limit works: it sets how far a step may move the weights."
        yield Finding(
            "note",
            f"Weight updates of {int(limits_updates.sum())} of {len(run.layers)} layers are "
            f"limited, {_on_steps(run, whole.share, limits_updates)}.{works if is_usual else ''}",
        )
    if not too_often.any() and not limits_updates.all():
        text = f"A layer was clipped {_on_steps(run, whole.share, ~limits_updates)}."
        yield Finding("good", text)


def _on_steps(run: Run, share: np.ndarray, mask: np.ndarray) -> str:
    most = worst(share, mask)[0]
    return (
        f"on {percent(share[mask].mean())} of steps on average, at most on {percent(share[most])} "
        f"({run.layers[most]})"
    )


def _too_low(run: Run, clipping: Clipping, too_often: np.ndarray) -> Iterator[Finding]:
    indices = worst(clipping.share * (1 - clipping.left), too_often)
    if len(indices) > SINGLY:
        names = [f"{run.layers[i]} ({percent(clipping.share[i])})" for i in indices]
        yield Finding(
            "bad",
            f"{len(indices)} of {len(run.layers)} layers are clipped on more than "
            f"{percent(TOO_OFTEN)} of steps, and {percent(clipping.left[indices].mean())} of their "
            "norm is left on average: their thresholds are too low. Worst: "
            f"{some(names, SINGLY)}; the table of layers has them all.",
        )
        return
    for i in indices:
        elements = f" ({percent(clipping.fraction[i])} of its elements)" if run.partial[i] else ""
        hint = ""
        if run.limits_norms[i] and not run.partial[i]:
            norm = np.nanpercentile(run.figures["norm_before"][:, i], 90)
            hint = f" The 90th percentile of its norm is {norm:.3g}."
        yield Finding(
            "bad",
            f"{run.layers[i]}: clipped on {percent(clipping.share[i])} of steps{elements}, and "
            f"{percent(clipping.left[i])} of its norm is left: the threshold is too low.{hint}",
        )


def _uneven(run: Run) -> Iterator[Finding]:
    """Reports a clip that acts at one end of the run: in a warm-up, or because norms drift."""
    clipped = run.clipped[:, ~run.limits_updates]
    if len(clipped) < 10 or not clipped.size:
        return
    fifths = np.array_split(clipped.mean(axis=1), 5)
    first, last = (float(part.mean()) for part in (fifths[0], fifths[-1]))
    if not (max(first, last) > UNEVEN[0] and min(first, last) < UNEVEN[1]):
        return
    end = "start" if first > last else "end"
    sizes = np.array_split(run.global_before, 5)
    ratio = max(np.median(sizes[0]), TINY) / max(np.median(sizes[-1]), TINY)
    drift = f"falls {ratio:.0f}-fold" if ratio > 1 else f"grows {1 / ratio:.0f}-fold"
    reason = f" The global norm {drift} in between." if max(ratio, 1 / ratio) >= 2 else ""
    advice = " A schedule or PercentileClip follows such a drift."
    yield Finding(
        "note",
        f"The clip acts at the {end} of the run: on {percent(first)} of the layers in its "
        f"first fifth, on {percent(last)} in its last.{reason}"
        + ("" if run.description.get("remembers") else advice),
    )


def _turned(run: Run, angle: np.ndarray) -> Iterator[Finding]:
    indices = worst(angle, angle > TOO_FAR)
    if indices:
        names = some([f"{run.layers[i]} ({angle[i]:.0f}°)" for i in indices], SINGLY)
        text = f"The clip turns the gradient by more than {TOO_FAR:.0f}° on average: {names}."
        yield Finding("note", f"{text} A norm clip keeps the direction.")


def _spikes(run: Run, is_off: bool) -> Iterator[Finding]:
    before, after = run.global_before, run.global_after
    reach = max(3, len(before) // 20)
    around = np.array(
        [np.median(before[max(0, i - reach) : i + reach + 1]) for i in range(len(before))]
    )
    times = before / np.maximum(around, TINY)
    spikes = (times > SPIKE) & (around > 0)
    if spikes.any():
        top = int(np.where(spikes, times, 0).argmax())
        where = f"step {run.steps[top]}: {times[top]:.0f} times the norm around it"
        text = f"{int(spikes.sum())} of {len(before)} samples are spikes, the largest at {where}"
        clip = f"; after the clip {after[top] / around[top]:.1f} times."
        yield Finding("note", text + (". A clip would bound them." if is_off else clip))


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
