"""The share that each threshold would have clipped: files, figures, a picture."""

import dataclasses
from pathlib import Path

import numpy as np

from recipes.plugin import files

#: What `PercentileClip` remembers: few enough to keep up with norms that fall in the first epoch.
WINDOW = 20
EIGHTHS = 8
#: More or less than this share of an eighth of the run, and a clip is called uneven.
FITS = (0.02, 0.3)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A file for `--clip-config`, and what it would have clipped of the updates watched.

    Attributes:
        name: the file's name.
        shares: share of (layer, update) pairs clipped, for each eighth of the run, in 0..1.
        overall: the same over the whole run.
    """

    name: str
    shares: list[float]
    overall: float

    @property
    def fits(self) -> bool:
        """Whether it clips at all times, and at no time too much."""
        return FITS[0] <= min(self.shares) and max(self.shares) <= FITS[1]


def choices(found, segments: int, output: Path) -> list[Choice]:
    """Writes the files for `--clip-config` and tells what each would have clipped."""
    import keras_gradclip as kgc

    result = []
    measured = [kind for kind in found.thresholds if any(found.thresholds[kind].values())]
    for parts in dict.fromkeys((1, segments)):
        for kind in measured:
            name = f"clip-{kind}{'-schedule' if parts > 1 else ''}.json"
            found.save(output / name, kind, parts)
            result.append(_choice(name, clipped(found, kind, parts)))
    follows = kgc.PercentileClip(found.percentile, window=WINDOW, scope="layer")
    files.write_json(output / "clip-percentile.json", {"clipper": kgc.serialize(follows)})
    hit = clipped_by_percentile(found.samples["norm"], found.percentile)
    result.append(_choice("clip-percentile.json", hit))
    return result


def _choice(name: str, hit: np.ndarray) -> Choice:
    parts = [part for part in np.array_split(hit, EIGHTHS) if len(part)]
    return Choice(name, [float(np.nanmean(p)) for p in parts], float(np.nanmean(hit)))


def clipped(found, kind: str, segments: int) -> np.ndarray:
    """Which samples lie above their threshold: `[updates, layers]`; NaN where none applies."""
    samples, limits = found.samples[kind], found.limits(kind, segments)
    return np.where(np.isnan(samples) | np.isnan(limits), np.nan, samples > limits)


def clipped_by_percentile(norms: np.ndarray, percentile: float, window: int = WINDOW):
    """What `PercentileClip` would clip of norms `[updates, layers]`."""
    hit = np.zeros(norms.shape)
    for i, row in enumerate(norms):
        hit[i] = row > np.percentile(norms[max(0, i - window + 1) : i + 1], percentile, axis=0)
    return hit


def steady(found_choices: list[Choice]) -> Choice:
    """The simplest of norm's three that clips at all times; else the percentile clipper."""
    by_name = {c.name: c for c in found_choices}
    for name in ("clip-norm.json", "clip-norm-schedule.json"):
        if name in by_name and by_name[name].fits:
            return by_name[name]
    return by_name["clip-percentile.json"]


def write_table(path: Path, found) -> None:
    """A row a layer: the spread of its norm, the percentile for each clipper, and what is saved."""
    spread = {"norm_min": 0, "norm_p10": 10, "norm_median": 50, "norm_p90": 90, "norm_max": 100}
    columns = ("layer", *spread, *found.thresholds, *(f"{kind}_saved" for kind in found.thresholds))
    rows = []
    for k, layer in enumerate(found.layers):
        norms = found.samples["norm"][:, k]
        values = {name: np.percentile(norms, q) for name, q in spread.items()}
        values |= {kind: of_layer[layer] for kind, of_layer in found.thresholds.items()}
        values |= {f"{kind}_saved": found.saved_threshold(kind, layer) for kind in found.thresholds}
        rows.append(
            {"layer": layer} | {n: "" if v is None else f"{v:.6g}" for n, v in values.items()}
        )
    files.write_csv(path, columns, rows)


def draw(path: Path, found, segments: int, title: str) -> None:
    """Each layer's spread and threshold; norms, and what is clipped, over the run."""
    from matplotlib.figure import Figure

    norms = found.samples["norm"]
    count = len(found.layers)
    shown = [k for k in ("update_ratio", "norm") if any((found.thresholds.get(k) or {}).values())]
    height = max(6.5, min(2 + 0.11 * count, 26))
    figure = Figure(figsize=(7 + 6 * len(shown), height), layout="constrained")
    grid = figure.add_gridspec(2, len(shown) + 1)
    panels = [figure.add_subplot(grid[:, i]) for i in range(len(shown))]
    for axis, kind in zip(panels, shown, strict=True):
        _draw_layers(axis, found, kind)

    over = figure.add_subplot(grid[0, -1])
    steps = np.arange(1, len(norms) + 1)
    alive = np.where(norms > 0, norms, np.nan)
    over.fill_between(
        steps, *np.nanpercentile(alive, (10, 90), axis=1), alpha=0.25, label="layers, 10 to 90 %"
    )
    over.plot(steps, np.nanmedian(alive, axis=1), lw=0.8, label="median layer")
    over.plot(steps, found.samples["global"], lw=0.8, color="black", label="all layers")
    over.set(ylabel="norm of the gradient", xlabel="update")
    over.legend(fontsize="small")
    over.set_yscale("log")

    share = figure.add_subplot(grid[1, -1])
    lines = {f"{kind}: one threshold a layer": clipped(found, kind, 1) for kind in shown}
    if segments > 1 and "norm" in shown:
        lines[f"norm: {segments} thresholds in a row"] = clipped(found, "norm", segments)
    lines[f"PercentileClip of the last {WINDOW}"] = clipped_by_percentile(norms, found.percentile)
    smooth = max(1, len(norms) // 40)
    for name, hit in lines.items():
        means = [100 * np.nanmean(hit[i : i + smooth]) for i in range(0, len(hit), smooth)]
        share.plot(steps[::smooth], means, label=name)
    share.axhspan(5, 15, color="grey", alpha=0.15)
    share.set(ylabel="layers clipped, % (grey: 5 to 15)", xlabel="update", ylim=(-3, 103))
    share.legend(fontsize="small")
    for axis in (*panels, over, share):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    files.replace_file(path, lambda scratch: figure.savefig(scratch, dpi=110))


def _draw_layers(axis, found, kind: str) -> None:
    """Each layer's spread of what a kind of clipper bounds, and the threshold that is saved."""
    from keras_gradclip.diagnostics.calibration import kinds

    names = [n for i, n in enumerate(found.layers) if np.isfinite(found.samples[kind][:, i]).all()]
    figures = found.samples[kind][:, [found.layers.index(name) for name in names]]
    at = np.arange(len(names))
    low, median, high = np.percentile(figures, (10, 50, 90), axis=0)
    axis.hlines(at, np.maximum(low, 1e-30), high, color="C0", alpha=0.5, label="10 to 90 %")
    axis.scatter(median, at, s=9, color="C0", label="median")
    saved = [found.saved_threshold(kind, name) or np.nan for name in names]
    label = f"clip-{kind}.json ({found.percentile:g}th percentile"
    label += ", capped)" if saved != [found.thresholds[kind][n] for n in names] else ")"
    axis.scatter(saved, at, s=14, color="C3", marker="|", label=label)
    every = -(-len(names) // 120)
    axis.set_yticks(at[::every], names[::every], fontsize=6 if len(names) > 40 else 9)
    axis.set(ylim=(len(names) - 0.5, -0.5), xlabel=kinds()[kind])
    axis.set_xscale("log")
    axis.legend(loc="best", fontsize="small")
