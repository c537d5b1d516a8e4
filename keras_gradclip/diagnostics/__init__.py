"""Diagnostics: a monitor of the updates, reports, calibration, and a check of the installation."""

from keras_gradclip.diagnostics.calibration import Calibration, calibrate
from keras_gradclip.diagnostics.monitor import ClipMonitor
from keras_gradclip.diagnostics.page import report

__all__ = ["Calibration", "ClipMonitor", "calibrate", "report"]
