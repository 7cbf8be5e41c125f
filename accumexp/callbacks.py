"""Public path of the callbacks; the code is in `accumexp.training`."""

from .training.callbacks import EMA, Best, Callback, EarlyStopping
from .training.progress_display import LossMonitor

__all__ = ["EMA", "Best", "Callback", "EarlyStopping", "LossMonitor"]
