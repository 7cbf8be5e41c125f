"""Data sets, their splits, and the batches of an epoch."""

from .batches import Batch, Batches, ResidentBatches, Share, Splits
from .digit_tasks import DigitTasks, DigitViews, TwoViews
from .digits import Digits
from .in_memory import InMemory
from .padding import pad
from .splits import Placement, build_splits
from .text import PythonSources
from .transforms import BatchAugment, Scale, ShiftAndFlip
from .worker_batches import StreamedBatches

__all__ = [
    "Batch",
    "BatchAugment",
    "Batches",
    "DigitTasks",
    "DigitViews",
    "Digits",
    "InMemory",
    "Placement",
    "PythonSources",
    "ResidentBatches",
    "Scale",
    "Share",
    "ShiftAndFlip",
    "Splits",
    "StreamedBatches",
    "TwoViews",
    "build_splits",
    "pad",
]
