"""Files that cannot be written into a TOML file."""

import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from run_files import LAYERS

from keras_gradclip.diagnostics.samples import FIELDS

DATA = Path(__file__).resolve().parents[1] / "data"


def image(kind, side=8):
    file = io.BytesIO()
    Image.new("RGB", (side, side), 128).save(file, kind)
    return file.getvalue()


def bomb():
    """The head of a PNG file that says it has 10 billion pixels."""
    whole = bytearray(image("PNG"))
    whole[16:24] = (100_000).to_bytes(4, "big") * 2
    whole[29:33] = zlib.crc32(bytes(whole[12:29])).to_bytes(4, "big")
    return bytes(whole)


def archive(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        for name, text in files.items():
            content.writestr(f"{name}.json", text)
    return file.getvalue()


def arrays(**values):
    file = io.BytesIO()
    np.savez(file, **values)
    return file.getvalue()


def npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def backup(**head):
    return arrays(head=np.array(json.dumps(head)))


def drive(rows):
    """The log of a drive that stands still, its cameras all one file."""
    return "".join(f"a.png,a.png,a.png,{i % 3 / 10},0,0,0\n" for i in range(rows)).encode()


def monitored(step, variable):
    """A `monitor.csv` of one row."""
    figures = ",".join("0.5" for _ in FIELDS)
    return f"step,epoch,variable,{','.join(FIELDS)}\n{step},0,{variable},{figures}\n".encode()


VARIABLE = f"{next(iter(LAYERS))}/kernel"
FILES = {
    "png": lambda: image("PNG"),
    "half a png": lambda: image("PNG", 64)[:60],
    "half a jpeg": lambda: image("JPEG", 64)[:-200],
    "webp": lambda: image("WEBP"),
    "bomb": bomb,
    "long drive": lambda: drive(40),
    "short drive": lambda: drive(12),
    "long field": lambda: b"x" * 200_000,
    "long name": lambda: b"n" * 5000 + b",a.png,a.png,0,0,0,0\n",
    "zip": lambda: archive(notes="{}"),
    "zip without weights": lambda: archive(
        config='{"class_name": "Sequential", "config": {}}', metadata="{}"
    ),
    "zip of a list": lambda: archive(config="[]", metadata="{}"),
    "zip of half a config": lambda: archive(config='{"class', metadata="{}"),
    "array": lambda: npy(np.zeros(3)),
    "backup without a step": lambda: backup(paths=[], seconds=0.0),
    "backup of a word": lambda: backup(paths=[], seconds=0.0, step="three"),
    "backup of a list": lambda: backup(paths=3, seconds=0.0, step=1),
    "empty backup": lambda: backup(paths=[], seconds=0.0, step=1),
    "checkpoint of 0.1": lambda: (DATA / "checkpoint_0_1.data-00000-of-00001").read_bytes(),
    "keras file of 0.1": lambda: (DATA / "model_0_1.keras").read_bytes(),
    "samples of no step": lambda: monitored("first", VARIABLE),
    "samples of a huge step": lambda: monitored("9" * 40, VARIABLE),
    "samples of another layer": lambda: monitored(1, "conv9/kernel"),
}
