"""Models of our own; any other class is a `model._target_` away."""

from .bert import Bert
from .lenet5 import LeNet5
from .mlp import MLP

__all__ = ["MLP", "Bert", "LeNet5"]
