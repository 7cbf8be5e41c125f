"""The record in MLflow. The only package that imports it, and only when a run is opened."""

from .store import Store
from .stored_runs import PastRun, curve, delete_sweep, jobs_of, newest_sweep, sweep_of
from .tracker import MLflowTracker, Tracker, reopen

__all__ = [
    "MLflowTracker",
    "PastRun",
    "Store",
    "Tracker",
    "curve",
    "delete_sweep",
    "jobs_of",
    "newest_sweep",
    "reopen",
    "sweep_of",
]
