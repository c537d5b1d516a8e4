"""Runs Keras's own tests with every optimizer wrapped: `make host-tests`.

The tests come from the source distribution of the installed version, by pip, into a temporary
folder. `cannot_pass.txt` names those that are left out, each with its reason.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
AREAS = ("optimizers", "trainers", "callbacks", "saving")


def fetch(version, folder):
    """Download the source distribution; the path of the archive."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-binary", ":all:", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, *options, f"keras=={version}"], check=True)
    return next(folder.glob("keras-*.tar.gz"))


def extract(archive, areas, folder):
    """The test files alone, without packages around them; their number."""
    number = 0
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            parts = Path(member.name).parts
            if len(parts) < 5 or parts[2] != "src" or parts[3] not in areas:
                continue
            if member.isfile() and member.name.endswith("_test.py"):
                target = folder.joinpath(*parts[3:])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
                number += 1
    return number


def left_out():
    """The names in `cannot_pass.txt`."""
    lines = (HERE / "cannot_pass.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def main():
    """Returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--areas", nargs="+", default=AREAS, help="folders of keras/src")
    arguments, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = fetch(version("keras"), folder)
        if not extract(archive, arguments.areas, folder / "tests"):
            sys.exit(f"{archive.name} holds no tests in {arguments.areas}: nothing was tested.")
        (folder / "pytest.ini").write_text("[pytest]\npython_files = *_test.py\n")
        command = [sys.executable, "-m", "pytest", "-q", "-c", str(folder / "pytest.ini")]
        command += ["--rootdir", str(folder / "tests"), "--import-mode=importlib", "-p", "plugin"]
        command += [f"--{'deselect' if '::' in t else 'ignore'}={t}" for t in left_out()]
        paths = os.pathsep.join([str(HERE), str(HERE.parent.parent), *sys.path[1:]])
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(
            [*command, *more, "."], cwd=folder / "tests", env=environment
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
