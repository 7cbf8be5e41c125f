"""Exact gradient accumulation for any PyTorch loop. Depends on torch only.

```python
from accumexp.accum import Window

window = Window(model, torch.nn.CrossEntropyLoss(), steps=4)
for inputs, targets in loader:             # the whole batch of the update
    optimizer.zero_grad()
    result = window.backward(inputs, targets)
    optimizer.step()
```
"""

from .batch import batch_size, call, map_tensors, rank_share, split, split_sizes, steps_for, tensors
from .graph import CudaGraphs, GraphedStep, GraphedWindow, GraphRecorder, rates_as_numbers
from .inequality import Inequality, inequalities
from .loss import WindowLoss, window_loss
from .memory import SavedActivations, is_out_of_memory, measure_activations
from .peak import Peak, extrapolated, held_bytes, measure_peak
from .ranks import Agreement, Ranks
from .recovery import OutOfMemory, Recovery
from .scale import LossScale
from .step import OptimizerStep, StepResult
from .sync import Sync, data_parallel, fully_sharded
from .terms import Term, TermsLoss
from .window import MicroBatch, Reduction, Window, WindowResult
from .window_norm import WindowBatchNorm1d, WindowBatchNorm2d, WindowBatchNorm3d, window_batch_norm

Record = GraphRecorder  # its former name

__all__ = [
    "Agreement",
    "CudaGraphs",
    "GraphRecorder",
    "GraphedStep",
    "GraphedWindow",
    "Inequality",
    "LossScale",
    "MicroBatch",
    "OptimizerStep",
    "OutOfMemory",
    "Peak",
    "Ranks",
    "Recovery",
    "Reduction",
    "SavedActivations",
    "StepResult",
    "Sync",
    "Term",
    "TermsLoss",
    "Window",
    "WindowBatchNorm1d",
    "WindowBatchNorm2d",
    "WindowBatchNorm3d",
    "WindowLoss",
    "WindowResult",
    "batch_size",
    "call",
    "data_parallel",
    "extrapolated",
    "fully_sharded",
    "held_bytes",
    "inequalities",
    "is_out_of_memory",
    "map_tensors",
    "measure_activations",
    "measure_peak",
    "rank_share",
    "rates_as_numbers",
    "split",
    "split_sizes",
    "steps_for",
    "tensors",
    "window_batch_norm",
    "window_loss",
]
