"""Gradient accumulation that is proved: the window in `accumexp.accum`, experiments around it."""

__version__ = "0.1.0"
