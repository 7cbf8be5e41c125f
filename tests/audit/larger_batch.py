"""Plain PyTorch: is the gradient handed to the optimizer the gradient of the larger batch?

Nothing here comes from `accumexp.proof`. For every update, the larger batch's gradient is computed anew: a
copy of the weights as they are before the update, and one forward and one backward in float64 over all the
samples that this update should hold, in the data set's order.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

Fit = Callable[[Any, int, int], Any]


@dataclass(frozen=True)
class Task:
    """What is trained, in the words of plain PyTorch.

    `rows` holds each sample's input, of shape (features,) or (length,), in the data set's order.
    `loss(model, indices)` is the loss of those samples as one batch, which calls `model` once.
    """

    rows: Sequence[Tensor]
    loss: Callable[[nn.Module, Sequence[int]], Tensor]
    epochs: int = 1
    processes: int = 1
    clip_norm: float | None = None
    # Largest relative difference that is rounding: 1e-9 in float64, more where a trainer computes in less.
    bound: float = 1e-9
    # Learning rate of each update, for each parameter group; None where the setting leaves it to the trainer.
    rates: Sequence[Sequence[float]] | None = None

    def windows(self, steps: int, micro: int) -> list[list[int]]:
        """Returns the samples of every update that is due, over all epochs."""
        batch = steps * micro * self.processes
        epoch = [
            list(range(len(self.rows)))[start : start + batch] for start in range(0, len(self.rows), batch)
        ]
        return epoch * self.epochs


@dataclass
class Update:
    """One step of the optimizer, held against the larger batch of the window that was due."""

    number: int
    due: int  # samples that the window should hold; 0 where no update was due
    held: list[int]  # samples of each micro-batch seen since the last step
    in_order: bool  # whether the samples seen are those due
    ratio: float  # norm of the gradient handed over, by the larger batch's
    difference: float  # norm of the difference, by the larger batch's
    rates: list[float]  # learning rates of the parameter groups
    rates_due: bool = True


@dataclass
class Truth:
    """The updates a trainer made and how many were due."""

    due: int
    bound: float
    updates: list[Update] = field(default_factory=list)

    @property
    def made(self) -> int:
        return len(self.updates)

    @property
    def equal(self) -> bool:
        right = all(update.difference <= self.bound and update.rates_due for update in self.updates)
        return right and self.made == self.due

    def as_json(self) -> dict[str, Any]:
        return {"equal": self.equal, "made": self.made, **asdict(self)}

    def __str__(self) -> str:
        if self.equal:
            return f"equal ({max(update.difference for update in self.updates):.1e}, {self.made} updates)"
        words = [] if self.made == self.due else [f"{self.made} updates, {self.due} due"]
        wrong = [update for update in self.updates if update.difference > self.bound]
        if wrong:
            worst = max(wrong, key=lambda update: update.difference)
            numbers = ", ".join(str(update.number) for update in wrong)
            words.append(
                f"gradient wrong in updates {numbers}: update {worst.number} {worst.ratio:.4f} times,"
                f" off by {worst.difference:.2g}, micro-batches {worst.held}"
                + ("" if worst.in_order else ", not the samples that were due")
            )
        if not all(update.rates_due for update in self.updates):
            first = next(update for update in self.updates if not update.rates_due)
            words.append(f"learning rate of update {first.number} is {first.rates}")
        return "; ".join(words)


class Watch:
    """What a fit calls on its model. Keeps the inputs of every micro-batch by forward hooks."""

    dtype = torch.float64

    def __init__(self) -> None:
        self.module: nn.Module | None = None
        self.inputs: list[Tensor] = []

    def __call__(self, model: nn.Module) -> nn.Module:
        # A function, not a method: a trainer that copies the model copies the hook and keeps this watch.
        def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if module.training and torch.is_grad_enabled():
                self.module = module
                given = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
                self.inputs.append(kwargs.get("input_ids", given[0]).detach().clone())

        model.register_forward_pre_hook(keep, with_kwargs=True)
        return model

    def loss(self, value: float) -> None:
        """Takes a trainer's logged loss. The truth is about gradients and leaves it aside."""


def find_samples(rows: Sequence[Tensor], batch: Tensor) -> list[int]:
    """Returns each row's index in the data set, -1 where there is none; padding may follow a row."""
    table = {tuple(sample.to(batch.dtype).tolist()): index for index, sample in enumerate(rows)}
    lengths = sorted({len(sample) for sample in rows}, reverse=True)
    numbers = []
    for row in batch.tolist():
        keys = (tuple(row[:length]) for length in lengths)
        numbers.append(next((table[key] for key in keys if key in table), -1))
    return numbers


def plain_copy(module: nn.Module) -> nn.Module:
    """Returns a float64 copy without hooks and with the class's own forward."""
    copied = copy.deepcopy(module).double()
    for part in copied.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
        part._backward_hooks.clear()
        part._backward_pre_hooks.clear()
        part.__dict__.pop("forward", None)
    return copied


def larger_batch(module: nn.Module, task: Task, indices: Sequence[int]) -> dict[str, Tensor]:
    """Returns the gradient by parameter of the samples as one batch, clipped where the task clips."""
    model = plain_copy(module)
    model.zero_grad(set_to_none=True)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        task.loss(model, indices).backward()
    if task.clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), task.clip_norm)
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@contextmanager
def optimizer_steps(before: Callable[[torch.optim.Optimizer], None]):
    """Calls `before` when an optimizer has its gradients, after its closure, and has not updated yet."""

    def hook(optimizer, args, kwargs):
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            before(optimizer)
            return None

        def wrapped():
            loss = closure()
            before(optimizer)
            return loss

        return (args[0], wrapped, *args[2:]), {
            key: value for key, value in kwargs.items() if key != "closure"
        }

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def find_truth(fit: Fit, task: Task, steps: int, micro: int) -> Truth:
    """Trains with `fit(watch, steps, micro)` and compares every update with the larger batch.

    Raises RuntimeError where the optimizer does not hold the watched model's parameters.
    """
    watch, windows = Watch(), task.windows(steps, micro)
    truth = Truth(due=len(windows), bound=task.bound)

    def before(optimizer: torch.optim.Optimizer) -> None:
        handed = {id(value) for group in optimizer.param_groups for value in group["params"]}
        if watch.module is None:
            return
        if not all(id(value) in handed for value in watch.module.parameters()):
            raise RuntimeError("the optimizer does not hold the watched model's parameters")
        number = truth.made
        window = windows[number] if number < len(windows) else []
        seen = [find_samples(task.rows, batch) for batch in watch.inputs]
        watch.inputs.clear()
        # Rows that are no sample: what a trainer puts beside one, as the rejected answer of a pair.
        samples = [index for batch in seen for index in batch if index >= 0]
        # A rank sees its share of the window.
        in_order = samples == window if task.processes == 1 else set(samples) <= set(window)
        wanted = larger_batch(watch.module, task, window or list(range(len(task.rows))))
        square = error = norm = 0.0
        for name, value in watch.module.named_parameters():
            want = wanted.get(name, torch.zeros_like(value, dtype=torch.float64))
            have = torch.zeros_like(want) if value.grad is None else value.grad.detach().double()
            square += have.square().sum().item()
            norm += want.square().sum().item()
            error += (have - want).square().sum().item()
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        due = task.rates[number] if task.rates is not None and number < len(task.rates) else None
        truth.updates.append(
            Update(
                number=number + 1,
                due=len(window),
                held=[len(batch) for batch in seen],
                in_order=in_order,
                ratio=(square / norm) ** 0.5,
                difference=(error / norm) ** 0.5,
                rates=rates,
                rates_due=due is None or torch.allclose(torch.tensor(rates), torch.tensor(list(due))),
            )
        )

    torch.manual_seed(0)
    with optimizer_steps(before):
        fit(watch, steps, micro)
    return truth
