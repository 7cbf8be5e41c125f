"""The models of the config group `model`; `model._target_` accepts any other class."""

from ..accum import window_batch_norm
from .bert import Bert
from .contrastive import Contrastive
from .heads import Heads
from .lenet5 import LeNet5
from .mixture_of_experts import MixtureOfExperts
from .mlp import MLP
from .norms import NORMS, FrozenBatchNorm2d, GhostBatchNorm2d, matched_momentum, norm_layer
from .resnet import resnet18, resnet50

__all__ = [
    "MLP",
    "NORMS",
    "Bert",
    "Contrastive",
    "FrozenBatchNorm2d",
    "GhostBatchNorm2d",
    "Heads",
    "LeNet5",
    "MixtureOfExperts",
    "matched_momentum",
    "norm_layer",
    "resnet18",
    "resnet50",
    "window_batch_norm",
]
