"""A pass of a window without gradients before that with backward, and the outputs of the whole window."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batch import Nested
from .forward_state import ForwardState, Generators
from .ranks import Ranks
from .refusals import ModelRefused
from .sync import Sync
from .window_batch import WindowBatch

# Difference of the two passes' outputs, relative to their norm, that rounding cannot explain.
TOLERANCE, TOLERANCE_FP64 = 1e-2, 1e-6


class FirstPass:
    """The forward passes of a window without gradients, which a later pass repeats with the same draws.

    Buffers and generators (torch's and Python's `random`, not NumPy's or a `torch.Generator` of the model's
    own) are restored before the later pass.

    Args:
        forward: called with the number of a micro-batch and its inputs; returns the model's outputs.
        precision: makes the context of forward and loss.
        modules: model and loss.
        agree: as of `Window.backward`.
        compare: whether `end` compares the outputs of the two passes.
    """

    def __init__(
        self,
        forward: Callable[[int, Nested], Any],
        precision: Callable[[], AbstractContextManager[Any]],
        sync: Sync,
        modules: list[object],
        batch: WindowBatch,
        agree: Callable[..., bool] | None,
        compare: bool,
    ) -> None:
        self.precision = precision
        self.batch = batch
        self.compare = compare
        self._forward = forward
        self._sync = sync
        self._agree = agree
        self._parameter = next(sync.module.parameters())
        self._start = ForwardState(modules, self._parameter.device)
        self._end: Generators | None = None
        self._squares: list[Tensor] = []  # by micro-batch: the sum of its squared outputs
        self._differences: list[Tensor] = []

    def run(self, each: Callable[[int, Any, Nested], None]) -> None:
        """Makes the forward passes; `each` is called with a micro-batch's number, outputs and targets."""
        if self._agree is None:
            self._sync.begin_without_sync()
        self._start.save()
        with torch.no_grad():
            for k, (inputs, targets) in enumerate(self.batch):
                with self._sync.micro_batch(False), self.precision():
                    outputs = self._forward(k, inputs)
                    each(k, outputs, targets)
                if self.compare:
                    self._squares.append(_squares(outputs))
                del outputs

    def agree(self) -> None:
        """Before a collective: fails on all ranks if a micro-batch of this pass has failed on another."""
        if self._agree is not None:
            self._agree(False, more=True)

    def rewind(self) -> None:
        """Restores buffers and generators for the later pass."""
        self._end = Generators(self._parameter.device)
        self._start.restore()

    def repeated(self, k: int, outputs: Any) -> None:
        """Compares the outputs of micro-batch `k` in the later pass with the first's."""
        if self.compare:
            first = self._squares[k]
            self._differences.append((_squares(outputs) - first).abs() / first.clamp(min=1e-300))

    def end(self) -> None:
        """Ends the later pass: the generators go on after all draws of both passes.

        Raises:
            RuntimeError: if the later pass gave other outputs than the first. Waits for the device to see it,
                with `compare` only.
        """
        if self._end is not None:
            self._end.restore()
        if not self._differences:
            return
        fp64 = self._parameter.dtype is torch.float64
        tolerance = TOLERANCE_FP64 if fp64 else TOLERANCE
        differences = torch.stack(self._differences).tolist()
        other = [k for k, difference in enumerate(differences) if difference > tolerance]
        if other:
            raise ModelRefused(
                f"micro-batch {other[0]}: its second forward pass gave other outputs than the first; the "
                "model draws from NumPy or a generator of its own, or changes what is neither a parameter "
                "nor a buffer"
            )


class WindowOutputs:
    """Nested tensors of a window's micro-batches, joined over micro-batches and ranks.

    The order is that of the batch: micro-batches, and in each of them the ranks.
    """

    def __init__(self, ranks: Ranks, sizes: list[int]) -> None:
        self.ranks = ranks
        self.sizes = sizes
        self._spec: Any = None
        self._leaves: list[list[Any]] = []  # by micro-batch
        self._whole: list[Any] = []

    def add(self, k: int, values: Any) -> None:
        """Adds the values of micro-batch `k`; those of padding have no rows."""
        leaves, spec = pytree.tree_flatten(values)
        if self._spec is not None and spec != self._spec:
            raise ModelRefused(f"micro-batch {k} has outputs or targets of another structure than the first")
        self._spec = spec
        self._leaves.append([self._rows(k, leaf) for leaf in leaves])

    def _rows(self, k: int, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.dim():
            raise ModelRefused(
                "the loss couples samples, so it is computed on the outputs of the whole window, and one of "
                "them has no dimension of samples: a number for each micro-batch cannot be joined"
            )
        # Below fp32 a sum over the window's items, and the gradient of a mean, need more bits.
        leaf = leaf.detach()
        leaf = leaf.float() if leaf.dtype in (torch.float16, torch.bfloat16) else leaf
        return leaf if self.sizes[k] else leaf[:0]

    def whole(self, requires_grad: bool = False) -> Any:
        """The joined values; with `requires_grad` floating-point tensors are leaves of a graph."""
        columns = list(zip(*self._leaves, strict=True))
        tensor_columns = [column for column in columns if isinstance(column[0], Tensor)]
        joined = iter(self._join(tensor_columns))
        self._whole = [next(joined) if isinstance(column[0], Tensor) else column[0] for column in columns]
        if requires_grad:
            for leaf in self._whole:
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    leaf.requires_grad_(True)
        self._leaves = []
        return pytree.tree_unflatten(self._whole, self._spec)

    def _join(self, columns: list[Any]) -> list[Tensor]:
        try:
            alone = [torch.cat(column) for column in columns]
        except RuntimeError as error:
            shapes = sorted({tuple(part.shape[1:]) for column in columns for part in column})
            raise ModelRefused(
                f"the loss couples samples, and the window's outputs cannot be joined: shapes {shapes} of "
                "one sample in its micro-batches; pad them alike"
            ) from error
        self._counts = [[[len(part) for part in column] for column in columns]]
        if self.ranks.size == 1 or not columns:
            self._counts = self._counts * self.ranks.size
            return alone
        counts = torch.tensor(self._counts[0], device=alone[0].device)
        self._counts = [rank.tolist() for rank in self.ranks.gather(counts)]
        return [self._over_ranks(index, rank_rows) for index, rank_rows in enumerate(alone)]

    def _over_ranks(self, index: int, rank_rows: Tensor) -> Tensor:
        """The rows of column `index` on all ranks, in the order of the batch."""
        counts = [rank[index] for rank in self._counts]
        most = max(sum(each) for each in counts)
        padded = rank_rows.new_zeros(most, *rank_rows.shape[1:])
        padded[: len(rank_rows)] = rank_rows
        gathered = self.ranks.gather(padded)
        parts = [rows[: sum(each)].split(each) for rows, each in zip(gathered, counts, strict=True)]
        return torch.cat([part for row in zip(*parts, strict=True) for part in row])

    def gradients(self) -> list[list[Tensor]]:
        """By micro-batch of this rank: the gradients of its leaves that `whole` made differentiable."""
        by_leaf = []
        columns = [leaf for leaf in self._whole if isinstance(leaf, Tensor)]
        for index, leaf in enumerate(columns):
            if not leaf.requires_grad:
                continue
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            counts = [rank[index] for rank in self._counts]
            sizes = [size for row in zip(*counts, strict=True) for size in row]
            if self.ranks.size == 1:
                sizes = counts[0]
            by_leaf.append(gradient.split(sizes)[self.ranks.rank :: self.ranks.size])
        return [list(row) for row in zip(*by_leaf, strict=True)]


class GivenGradients(torch.autograd.Function):
    """0, shape (), whose gradient by the first `count` tensors is that of the others, times its own."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.count = count
        ctx.dtypes = [tensor.dtype for tensor in tensors[:count]]
        ctx.save_for_backward(*tensors[count:])
        first = tensors[count]
        return first.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (seed,) = grad_outputs
        given = [
            (gradient * seed).to(dtype) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *given, *([None] * ctx.count)


def floating(values: Any) -> list[Tensor]:
    """The floating-point tensors of nested values, in order."""
    leaves = pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _squares(values: Any) -> Tensor:
    squares = [leaf.detach().double().square().sum() for leaf in floating(values)]
    return torch.stack(squares).sum()
