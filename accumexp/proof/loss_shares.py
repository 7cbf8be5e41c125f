"""What samples add to the larger batch's gradient where the loss is no mean over items of the samples.

The larger batch's loss is linearised. By the sums of its terms, with total T and weight W of each, it is
`dL = sum_t c_t (dT_t / W_t - T_t dW_t / W_t^2)`; by the outputs, where it couples samples,
`dL = sum_i <dL/do_i, do_i>`. Both are sums over samples, so a micro-batch's share is the gradient of a loss
of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .larger_batch import call, loss_and_terms
from .loss_terms import Term
from .nested import batch_size, cloned, map_tensors, tensors
from .problem import Problem, WholeBatch, rows
from .rounding import prepared_pass

# The name of the only term of a loss of one term.
LOSS = "loss"
ShareLoss = Callable[[Any, Any], Tensor]


class LossShares(ABC):
    """The larger batch's loss, linearised at a window's outputs.

    Attributes:
        terms: names of its terms.
    """

    terms: tuple[str, ...]

    @abstractmethod
    def of(self, numbers: Sequence[int], terms: Collection[str] | None = None) -> ShareLoss:
        """A function of the outputs and targets of samples `numbers`: its gradient is what they add.

        Args:
            terms: counts these alone.
        """


class SharesByTerm(LossShares):
    """Of a loss of several terms.

    Attributes:
        totals, weights: of each term, over the whole batch, shape ().
        part_weights: weight of each term in each part of the batch.
        coefficients: of each term.
    """

    def __init__(self, loss: Any, parts: Sequence[tuple[dict[str, Term], int]]) -> None:
        self.loss = loss
        first = {name: term for terms, _ in reversed(parts) for name, term in terms.items()}
        self.terms = tuple(dict.fromkeys(name for terms, _ in parts for name in terms))
        sums = {name: [_sums(terms.get(name), first[name], n) for terms, n in parts] for name in self.terms}
        self.totals = {name: torch.stack([total for total, _ in each]).sum() for name, each in sums.items()}
        self.weights = {name: torch.stack([w for _, w in each]).sum() for name, each in sums.items()}
        self.part_weights = {name: [float(w) for _, w in each] for name, each in sums.items()}
        self.coefficients = {name: first[name].coefficient for name in self.terms}

    def of(self, numbers: Sequence[int], terms: Collection[str] | None = None) -> ShareLoss:
        def share(outputs: Any, targets: Any) -> Tensor:
            _, every = loss_and_terms(self.loss, outputs, targets)
            counted = [name for name in every if terms is None or name in terms]
            values = [self._share(name, every[name], len(numbers)) for name in counted]
            return torch.stack(values).sum()

        return share

    def _share(self, name: str, term: Term, samples: int) -> Tensor:
        whole = float(self.weights[name]) or 1.0
        value = term.total * ((samples if term.weight is None else 1) / whole)
        if isinstance(term.weight, Tensor) and term.weight.requires_grad:
            value = value - term.weight * (float(self.totals[name]) / whole**2)
        return term.coefficient * value


class SharesByOutput(LossShares):
    """Of a loss that couples samples.

    Args:
        outputs: of the window, with the samples in the batch's order.
        gradients: by term: of the loss with respect to the floating point outputs, in their order.
    """

    def __init__(self, loss: Any, batch: WholeBatch, outputs: Any, context: Callable[[], Any]) -> None:
        self.loss = loss
        self.batch = batch
        self.outputs = outputs
        self._context = context
        self.gradients = self.on_groups([range(batch_size(batch))])
        self.terms = tuple(self.gradients)

    def on_groups(self, groups: Sequence[Sequence[int]], alike: bool = False) -> dict[str, list[Tensor]]:
        """The gradients at the outputs, by term, of the mean of the loss over groups of samples.

        Args:
            alike: whether the groups count alike, and not by their samples.
        """
        samples = batch_size(self.batch)
        gradients_by_term: dict[str, list[Tensor]] = {}
        for numbers in groups:
            index = torch.tensor(list(numbers))
            share = 1 / len(groups) if alike else len(numbers) / samples
            for name, gradients in self._gradients_of(index).items():
                totals = gradients_by_term.setdefault(
                    name, [torch.zeros_like(leaf) for leaf in _floats(self.outputs)]
                )
                for total, gradient in zip(totals, gradients, strict=True):
                    if _by_sample(total, samples):
                        total[index.to(total.device)] += share * gradient
        return gradients_by_term

    def _gradients_of(self, index: Tensor) -> dict[str, list[Tensor]]:
        """By term: the gradients of the loss of samples `index` at their outputs."""
        samples = batch_size(self.batch)
        leaves: list[Tensor] = []

        def leaf(tensor: Tensor) -> Tensor:
            part = tensor[index.to(tensor.device)] if _by_sample(tensor, samples) else tensor
            part = part.detach().clone()
            if part.is_floating_point():
                leaves.append(part.requires_grad_())
                # A copy, which the loss may write into.
                return part.clone()
            return part

        with torch.enable_grad(), self._context():
            outputs = map_tensors(leaf, self.outputs)
            targets = rows(self.batch, index.to(tensors(self.batch)[0].device))[1]
            value, terms = loss_and_terms(self.loss, outputs, cloned(targets))
        values = {name: term.value for name, term in terms.items()} or {LOSS: value}
        return {
            name: [
                torch.zeros_like(each) if gradient is None else gradient
                for each, gradient in zip(leaves, _gradients(value, leaves), strict=True)
            ]
            for name, value in values.items()
        }

    def of(self, numbers: Sequence[int], terms: Collection[str] | None = None) -> ShareLoss:
        counted = [self.gradients[name] for name in self.terms if terms is None or name in terms]
        return self.along([torch.stack(each).sum(0) for each in zip(*counted, strict=True)], numbers)

    def along(self, gradients: Sequence[Tensor], numbers: Sequence[int]) -> ShareLoss:
        """As `of`, of a loss with these `gradients` at the whole window's outputs."""
        samples = batch_size(self.batch)
        index = torch.tensor(list(numbers))

        def share(outputs: Any, targets: Any) -> Tensor:
            values = [
                (output * gradient[index.to(gradient.device)]).sum()
                for output, gradient in zip(_floats(outputs), gradients, strict=True)
                if _by_sample(gradient, samples) and output.requires_grad
            ]
            return torch.stack(values).sum()

        return share


def loss_shares(
    problem: Problem,
    model: nn.Module,
    batch: WholeBatch,
    micro_batches: Sequence[Sequence[int]],
    autocast: torch.dtype | None = None,
) -> LossShares | None:
    """The shares of `micro_batches`, sample numbers, in the larger batch's loss; None for a loss of one term.

    Sums and outputs are those of the micro-batches' own forward passes if these have every sample once.
    """
    if not problem.terms and not problem.couples:
        return None
    parts = [list(numbers) for numbers in micro_batches if len(numbers)]
    samples = batch_size(batch)
    if sorted(number for part in parts for number in part) != list(range(samples)):
        parts = [list(range(samples))]

    def context() -> Any:
        return nullcontext() if autocast is None else torch.autocast(problem.device.type, autocast)

    with prepared_pass(problem, model, batch) as (model, loss, batch):
        outputs: list[Any] = []
        terms: list[tuple[dict[str, Term], int]] = []
        for numbers in parts:
            inputs, targets = cloned(rows(batch, torch.tensor(numbers, device=problem.device)))
            # With gradients, which a model may take in its forward pass.
            with context():
                outputs_k = call(model, inputs)
                if not problem.couples:
                    terms.append((loss_and_terms(loss, outputs_k, targets)[1], len(numbers)))
            outputs.append(map_tensors(Tensor.detach, outputs_k) if problem.couples else None)
        if not problem.couples:
            return SharesByTerm(loss, terms)
        return SharesByOutput(loss, batch, _joined(outputs, parts), context)


def _joined(outputs: Sequence[Any], parts: Sequence[Sequence[int]]) -> Any:
    """The outputs of `parts` of a batch as those of the whole batch; below fp32 in fp32.

    Tensors without a dimension of samples are those of the first part.
    """
    order = torch.tensor([number for part in parts for number in part]).argsort()
    columns = iter(list(zip(*[tensors(each) for each in outputs], strict=True)))

    def join(first: Tensor) -> Tensor:
        column = next(columns)
        if not all(_by_sample(t, len(part)) for t, part in zip(column, parts, strict=True)):
            return first
        joined = torch.cat([_wide(t) for t in column])
        return joined[order.to(joined.device)]

    return map_tensors(join, outputs[0])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _by_sample(tensor: Tensor, samples: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == samples


def _floats(values: Any) -> list[Tensor]:
    return [tensor for tensor in tensors(values) if tensor.is_floating_point()]


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)


def _sums(term: Term | None, like: Term, samples: int) -> tuple[Tensor, Tensor]:
    """(total, weight) of a term in a part of the batch, zeros if the part has no such term."""
    if term is not None:
        return term.sums(samples)
    total, weight = like.sums(samples)
    return torch.zeros_like(total), torch.zeros_like(weight)
