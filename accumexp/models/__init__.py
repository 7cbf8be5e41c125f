"""Models of our own; any other class is a `model._target_` away."""

from .lenet5 import LeNet5
from .mlp import MLP

__all__ = ["MLP", "LeNet5"]
