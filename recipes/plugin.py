"""The modules of keras_gradclip that do not import Keras, for command lines.

`import keras_gradclip` imports Keras, which takes seconds: too long for `--help` or a mistake in a
flag. Here these modules are loaded a second time, without the package's `__init__`.
"""

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keras_gradclip import command_line, declarations, files
else:
    _package = types.ModuleType("keras_gradclip_without_keras")
    _package.__path__ = importlib.util.find_spec("keras_gradclip").submodule_search_locations
    sys.modules[_package.__name__] = _package
    command_line, declarations, files = (
        importlib.import_module(f"{_package.__name__}.{name}")
        for name in ("command_line", "declarations", "files")
    )

__all__ = ["command_line", "declarations", "files"]
