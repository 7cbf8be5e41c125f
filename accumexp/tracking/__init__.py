"""The record in MLflow. The only package that imports it, and only when a run is opened."""

from .run import MLflowTracker, Tracker, reopen
from .store import Store

__all__ = ["MLflowTracker", "Store", "Tracker", "reopen"]
