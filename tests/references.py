"""Other implementations that the tests and the benchmark compare with."""

import importlib.util
from pathlib import Path


def timm_agc():
    """The module `timm.utils.agc`; it needs PyTorch alone, where the package needs torchvision.

    Raises:
        ImportError: timm or PyTorch is not installed.
    """
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        raise ImportError("timm is not installed: make venv-torch installs it")
    path = Path(package.origin).parent / "utils/agc.py"
    spec = importlib.util.spec_from_file_location("timm_agc", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
