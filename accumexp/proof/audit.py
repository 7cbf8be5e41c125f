"""The audit: is somebody else's training loop, with N micro-batches, the same as with one?

The loop itself with one micro-batch is the larger batch. Both runs are watched by hooks, and compared update
by update, each from the same weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .audit_certificate import joined_certificate
from .audit_records import AuditError
from .audit_runs import Runs
from .certificate import Certificate
from .float64 import DOUBLE
from .ranks import world_size

# Updates whose gradients, weights and optimizer state are kept and compared.
UPDATES = 32


def audit(
    fit: Callable[..., Any],
    steps: int = 4,
    micro: int = 8,
    *,
    loss: Callable[..., Any] | None = None,
    updates: int = UPDATES,
    seed: int = 0,
    dtype: torch.dtype = DOUBLE,
    progress: Callable[[str], None] | None = None,
) -> Certificate:
    """Compares a training loop of `steps` micro-batches an update with the same loop and one micro-batch.

    ```python
    def fit(watch, steps, micro):
        model = watch(build_model().to(watch.dtype))
        Trainer(accumulate_grad_batches=steps).fit(model, loader(batch_size=micro))

    print(audit(fit, steps=4, micro=8))
    ```

    A collective call where torch.distributed is initialised: every rank runs its own `fit`.

    Args:
        fit: called as `fit(watch, steps, micro)`, several times. It must build model, data, optimizer and
            trainer anew, in the same order of samples whatever the micro-batch size, and pass the model
            through `model = watch(model)`. If it has a keyword parameter `samples`, it is called with numbers
            of samples of an epoch that leave every remainder of micro-batches.
        steps: micro-batches in a window on each rank.
        micro: samples in a micro-batch.
        loss: `loss(model, inputs, targets)`, the mean loss over a window, for faults that the loop makes with
            one micro-batch too. `inputs` is what the model receives (a tensor, a tuple, or a dict of
            keywords), `targets` what the loop gave to `watch.targets` last, else None.
        updates: the most updates of a run of which gradients and weights are compared.
        seed: of Python's, NumPy's and torch's generators before every run, and of draws that are held fixed.
        dtype: `watch.dtype`, in which the loop should train.
        progress: receives a line before each run.

    Raises:
        ValueError: if the loop cannot be watched, or if its runs cannot be compared; one line says why.
    """
    if steps < 2 or micro < 1:
        raise AuditError(f"the audit needs steps >= 2 and micro >= 1, got steps={steps} and micro={micro}")
    runs = Runs(fit, steps, micro, loss, updates, seed, dtype, progress or (lambda _: None))
    if "samples" not in inspect.signature(fit).parameters:
        return joined_certificate([(0, runs.compare(None))], runs)
    of_ranks = micro * world_size()
    sizes = epoch_sizes(steps, of_ranks)
    return joined_certificate([(-(-size // of_ranks), runs.compare(size)) for size in sizes], runs)


def epoch_sizes(steps: int, micro: int) -> list[int]:
    """Numbers of samples of an epoch whose micro-batches leave the remainders 0, 1, ... `steps` - 1.

    The last micro-batch of an epoch has half the samples, if there is a remainder.
    """
    whole = 2 * steps * micro
    return [whole, *(whole // 2 + rest * micro - micro // 2 for rest in range(1, steps))]
