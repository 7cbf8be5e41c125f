"""Right loops: ways to split, divide, accumulate and step that make the larger batch's update."""

import contextlib

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, grad_and_value, vmap

from tests.proof.unseen_common import (
    Book,
    adam,
    decaying,
    grouped,
    micro_batches,
    momentum,
    regressor,
    sgd,
    values,
)

BOOK = Book()


def accumulate(model, batch, steps):
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * (len(x) / len(batch[0]))).backward()


@BOOK.right("division")
def weighted_by_size(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    optimizer.step()


@BOOK.right("division", optimizer=momentum, drop_last=True)
def whole_windows_only(model, optimizer, batch, steps):
    optimizer.zero_grad()
    for x, y in zip(batch[0].chunk(steps), batch[1].chunk(steps), strict=True):
        (F.cross_entropy(model(x), y) / steps).backward()
    optimizer.step()


@BOOK.right("division", optimizer=decaying)
def gradient_divided_at_the_end(model, optimizer, batch, steps):
    for x, y in micro_batches(batch, steps):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    for p in model.parameters():
        p.grad.div_(len(batch[0]))
    optimizer.step()
    optimizer.zero_grad()


@BOOK.right("division", optimizer=sgd, steps=5)
def split_as_evenly_as_possible(model, optimizer, batch, steps):
    optimizer.zero_grad()
    count = min(steps, len(batch[0]))
    for x, y in zip(batch[0].tensor_split(count), batch[1].tensor_split(count), strict=True):
        (F.cross_entropy(model(x), y, reduction="sum") / len(batch[0])).backward()
    optimizer.step()


@BOOK.right("division", optimizer=sgd)
def interleaved(model, optimizer, batch, steps):
    optimizer.zero_grad()
    for k in range(min(steps, len(batch[0]))):
        x, y = batch[0][k::steps], batch[1][k::steps]
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()


@BOOK.right("division", optimizer=adam)
def last_micro_batch_first(model, optimizer, batch, steps):
    optimizer.zero_grad()
    for x, y in reversed(micro_batches(batch, steps)):
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
    optimizer.step()


@BOOK.right("division", batch=values, model=regressor, loss=F.mse_loss, optimizer=momentum)
def sorted_by_difficulty(model, optimizer, batch, steps):
    optimizer.zero_grad()
    order = batch[0].norm(dim=1).argsort()
    for index in order.split(-(-len(order) // steps)):
        (F.mse_loss(model(batch[0][index]), batch[1][index]) * len(index) / len(order)).backward()
    optimizer.step()


@BOOK.right("division", batch=values, model=regressor, loss=F.smooth_l1_loss, steps=6)
def shuffled(model, optimizer, batch, steps):
    optimizer.zero_grad()
    order = torch.randperm(len(batch[0]))
    for index in order.split(-(-len(order) // steps)):
        (F.smooth_l1_loss(model(batch[0][index]), batch[1][index]) * len(index) / len(order)).backward()
    optimizer.step()


@BOOK.right("division", optimizer=sgd, steps=3)
def sizes_by_need(model, optimizer, batch, steps):
    """Two micro-batches of a third of the samples less one, and what is left."""
    optimizer.zero_grad()
    n = len(batch[0])
    size = max(n // steps - 1, 1)
    edges = sorted({0, min(size, n), min(2 * size, n), n})
    for a, b in zip(edges, edges[1:], strict=False):
        (F.cross_entropy(model(batch[0][a:b]), batch[1][a:b]) * (b - a) / n).backward()
    optimizer.step()


@BOOK.right("step", optimizer=momentum)
def step_with_a_closure(model, optimizer, batch, steps):
    def closure():
        optimizer.zero_grad()
        total = 0.0
        for x, y in micro_batches(batch, steps):
            loss = F.cross_entropy(model(x), y) * len(x) / len(batch[0])
            loss.backward()
            total += loss.item()
        return total

    return optimizer.step(closure)


@BOOK.right("step", optimizer=grouped)
def step_by_counter(model, optimizer, batch, steps):
    optimizer.zero_grad()
    parts = micro_batches(batch, steps)
    for i, (x, y) in enumerate(parts):
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
        if (i + 1) % steps == 0 or i + 1 == len(parts):
            optimizer.step()
            optimizer.zero_grad()


@BOOK.right("step", optimizer=lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1, fused=True))
def fused_step(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    optimizer.step()


@BOOK.right(
    "step", optimizer=lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, foreach=True)
)
def foreach_step(model, optimizer, batch, steps):
    optimizer.zero_grad()
    accumulate(model, batch, steps)
    optimizer.step()


@BOOK.right("step", optimizer=lambda ps: torch.optim.RMSprop(ps, lr=0.003, momentum=0.5))
def gradients_kept_as_zeros(model, optimizer, batch, steps):
    accumulate(model, batch, steps)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


@BOOK.right("step", optimizer=decaying)
def zeroed_by_the_model(model, optimizer, batch, steps):
    model.zero_grad(set_to_none=True)
    accumulate(model, batch, steps)
    optimizer.step()


@BOOK.right("accumulate", optimizer=momentum)
def autograd_by_hand(model, optimizer, batch, steps):
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in micro_batches(batch, steps):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        for t, g in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            t.add_(g, alpha=1 / len(batch[0]))
    for p, t in zip(parameters, total, strict=True):
        p.grad = t
    optimizer.step()


@BOOK.right("accumulate", optimizer=sgd)
def gradient_of_a_function(model, optimizer, batch, steps):
    def objective(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x,)), y, reduction="sum")

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, y in micro_batches(batch, steps):
        part = grad(objective)(parameters, x, y)
        total = {name: total[name] + part[name] for name in part}
    for name, p in model.named_parameters():
        p.grad = total[name] / len(batch[0])
    optimizer.step()


@BOOK.right("accumulate", optimizer=adam)
def gradients_of_each_sample(model, optimizer, batch, steps):
    """As for gradients by sample: vmap over the samples of a micro-batch."""

    def objective(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    logged = 0.0
    for x, y in micro_batches(batch, steps):
        each, losses = vmap(grad_and_value(objective), in_dims=(None, 0, 0))(parameters, x, y)
        logged += losses.sum().item()
        for name, p in model.named_parameters():
            part = each[name].sum(0) / len(batch[0])
            p.grad = part if p.grad is None else p.grad + part
    optimizer.step()
    return logged / len(batch[0])


@BOOK.right("accumulate", optimizer=sgd)
def scaled_by_a_hook(model, optimizer, batch, steps):
    """Hooks on the parameters divide what arrives; they are removed after the window."""
    optimizer.zero_grad()
    n = len(batch[0])
    hooks = [p.register_hook(lambda g: g / n) for p in model.parameters()]
    for x, y in micro_batches(batch, steps):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    optimizer.step()


@BOOK.right("accumulate", optimizer=momentum)
def moved_aside_after_each(model, optimizer, batch, steps):
    """The gradient of each micro-batch is moved to buffers, as in offloading, and comes back at the end."""
    aside = {p: torch.zeros_like(p) for p in model.parameters()}
    for x, y in micro_batches(batch, steps):
        (F.cross_entropy(model(x), y) * len(x) / len(batch[0])).backward()
        for p, buffer in aside.items():
            buffer += p.grad
            p.grad = None
    for p, buffer in aside.items():
        p.grad = buffer
    optimizer.step()
    optimizer.zero_grad()


@BOOK.right("accumulate", optimizer=sgd)
def exchange_in_the_last_only(model, optimizer, batch, steps):
    optimizer.zero_grad()
    parts = micro_batches(batch, steps)
    for i, (x, y) in enumerate(parts):
        quiet = getattr(model, "no_sync", contextlib.nullcontext)
        with contextlib.nullcontext() if i == len(parts) - 1 else quiet():
            (F.cross_entropy(model(x), y) * (len(x) / len(batch[0]))).backward()
    optimizer.step()


@BOOK.right("memory", optimizer=sgd)
def losses_summed(model, optimizer, batch, steps):
    """One backward of the sum of all losses."""
    optimizer.zero_grad()
    losses = [F.cross_entropy(model(x), y, reduction="sum") for x, y in micro_batches(batch, steps)]
    (torch.stack(losses).sum() / len(batch[0])).backward()
    optimizer.step()


@BOOK.right("memory", batch=values, model=regressor, loss=F.mse_loss, steps=5, optimizer=momentum)
def outputs_concatenated(model, optimizer, batch, steps):
    optimizer.zero_grad()
    outputs = torch.cat([model(x) for x, _ in micro_batches(batch, steps)])
    F.mse_loss(outputs, batch[1]).backward()
    optimizer.step()


@BOOK.right("memory", optimizer=decaying)
def loss_kept_with_its_graph(model, optimizer, batch, steps):
    """The losses that are logged are kept with their graphs until the window's end."""
    optimizer.zero_grad()
    losses = []
    for x, y in micro_batches(batch, steps):
        losses.append(F.cross_entropy(model(x), y) * len(x) / len(batch[0]))
        losses[-1].backward(retain_graph=True)
    optimizer.step()
    return torch.stack(losses).sum().item()
