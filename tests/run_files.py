"""Made-up runs in the files of ClipMonitor."""

import csv
import json

from keras_gradclip.diagnostics.samples import FIELDS

LAYERS = {"conv1": (72, 4), "conv2": (144, 4), "head": (40, 10)}


def write_run(
    folder, samples, clipper="NormClip(max_norm=1, scope=layer)", thresholds=(), limits=None
):
    """A run as ClipMonitor writes it.

    Args:
        folder: for the files.
        samples: step -> layer -> fields.
        clipper: its text; None for none.
        thresholds: rows.
        limits: layer -> what its clipper limits; None as in files of 0.1, which do not say it.
    """
    folder.mkdir(exist_ok=True)
    variables = []
    for layer, sizes in LAYERS.items():
        for name, size in zip(("kernel", "bias"), sizes, strict=True):
            text = clipper or "off"
            variables.append(
                {
                    "path": f"{layer}/{name}",
                    "layer": layer,
                    "shape": [size],
                    "rule": "*",
                    "clipper": text,
                    **({} if limits is None else {"limits": limits[layer]}),
                }
            )
    description = {
        "every": 1,
        "clipper": None if clipper is None else {"class_name": "x"},
        "clipper_text": clipper or "off",
        "variables": variables,
    }
    (folder / "monitor.json").write_text(json.dumps(description))
    with (folder / "monitor.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "variable", *FIELDS])
        for step, of_layer in enumerate(samples):
            for layer in LAYERS:
                fields = {
                    "norm_before": 1.0,
                    "norm_after": 1.0,
                    "max_abs": 0.5,
                    **of_layer.get(layer, {}),
                }
                for name in ("kernel", "bias"):
                    row = [fields.get(f, 0.0) for f in FIELDS]
                    writer.writerow([step, 0, f"{layer}/{name}", *row])
    with (folder / "thresholds.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["step", "name", "value"], *thresholds])
    return folder


#: The figures of a layer that is cut to a quarter.
CLIPPED = {"clip_fraction": 1.0, "norm_before": 4.0, "norm_after": 1.0}
