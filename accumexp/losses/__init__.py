"""Losses of several terms, and losses that couple samples, which a window computes as the larger batch does.

Each coupled loss is a function with `couples = True`, to be given to `Window` as it is, and a module of the
same formula with settings, for `_target_` nodes. All need torch alone.
"""

from .contrastive import InfoNCE, SupervisedContrastive, info_nce, supervised_contrastive
from .experts import LoadBalance, load_balance
from .from_output import FromOutput
from .sum import Sum
from .survival import Cox, cox

__all__ = [
    "Cox",
    "FromOutput",
    "InfoNCE",
    "LoadBalance",
    "Sum",
    "SupervisedContrastive",
    "cox",
    "info_nce",
    "load_balance",
    "supervised_contrastive",
]
