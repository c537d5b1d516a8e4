"""What did the clip do? Watchers of the update, and what is read from their figures."""

from keras_gradclip.diagnostics.calibration import Calibration, calibrate
from keras_gradclip.diagnostics.monitor import ClipMonitor
from keras_gradclip.diagnostics.page import report

__all__ = ["Calibration", "ClipMonitor", "calibrate", "report"]
