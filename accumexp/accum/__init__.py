"""Exact gradient accumulation for any PyTorch loop. Needs torch alone.

from accumexp.accum import Window

window = Window(model, torch.nn.CrossEntropyLoss(), steps=4)
for inputs, targets in loader:             # the whole batch of the update
    optimizer.zero_grad()
    result = window.backward(inputs, targets)
    optimizer.step()
"""

from .batch import batch_size, map_tensors, split, split_sizes, steps_for, tensors
from .exactness import Inequality, inequalities
from .loss import WindowLoss, window_loss
from .memory import SavedActivations, measure_activations
from .window import Reduction, Window, WindowResult, call

__all__ = [
    "Inequality",
    "Reduction",
    "SavedActivations",
    "Window",
    "WindowLoss",
    "WindowResult",
    "batch_size",
    "call",
    "inequalities",
    "map_tensors",
    "measure_activations",
    "split",
    "split_sizes",
    "steps_for",
    "tensors",
    "window_loss",
]
