"""Public path of the callbacks; the code lies in `accumexp.training.callbacks`."""

from .training.callbacks import EMA, Best, Callback, EarlyStopping, LossMonitor

__all__ = ["EMA", "Best", "Callback", "EarlyStopping", "LossMonitor"]
