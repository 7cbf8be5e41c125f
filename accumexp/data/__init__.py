"""The samples: data sets, their splits, and the batches of an epoch."""

from .batches import Batch, Batches, ResidentBatches, Share, StreamedBatches
from .digits import Digits
from .splits import Placement, Splits, build_splits
from .transforms import BatchAugment, Scale, ShiftAndFlip

__all__ = [
    "Batch",
    "BatchAugment",
    "Batches",
    "Digits",
    "Placement",
    "ResidentBatches",
    "Scale",
    "Share",
    "ShiftAndFlip",
    "Splits",
    "StreamedBatches",
    "build_splits",
]
