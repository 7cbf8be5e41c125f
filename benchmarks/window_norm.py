"""What BatchNorm over the window costs: exactness, peak memory, arithmetic and time of one update.

python -m benchmarks.window_norm --batch 32 --steps 4 --image 64 --json window_norm.json
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from accumexp.accum import Window
from accumexp.environment.device import pick_device, wait_for
from accumexp.environment.memory import MIB
from accumexp.models import resnet18, resnet50, window_batch_norm

from .measure import (
    at_least_1,
    check_names,
    device_options,
    environment,
    finish,
    output_options,
    prepare,
    table_of,
    words,
)
from .memory import tensor_peak

MODELS = {"resnet18": resnet18, "resnet50": resnet50}
PLAIN = "micro-batches"
Update = Callable[[], object]


class Checkpointed(nn.Module):
    """A block whose activations are computed again in the backward."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.block, inputs, use_reentrant=False)


def checkpointed(model: Any) -> nn.Module:
    """A ResNet with its residual blocks checkpointed."""
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for number, block in enumerate(stage):
            stage[number] = Checkpointed(block)
    return model


def windows(model: nn.Module, steps: int) -> dict[str, Window]:
    """By name: a window of a copy of `model`, which has BatchNorm."""
    loss = nn.CrossEntropyLoss()
    return {
        PLAIN: Window(copy.deepcopy(model), loss, steps),
        "norm=window": Window(window_batch_norm(copy.deepcopy(model)), loss, steps),
        "one batch": Window(copy.deepcopy(model), loss, 1),
        "one batch, checkpointed": Window(checkpointed(copy.deepcopy(model)), loss, 1),
    }


def gradient_errors(model: nn.Module, steps: int, batch: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    """In fp64, by name: the errors of the gradient and of the running statistics against one plain batch."""
    inputs, targets = batch[0].double(), batch[1]
    results = {}
    for name, window in windows(model.double(), steps).items():
        window.backward(inputs, targets)
        gradient = torch.cat([p.grad.flatten() for p in window.model.parameters() if p.grad is not None])
        names = [name for name, _ in window.model.named_buffers() if "running" in name]
        buffers = torch.cat([window.model.get_buffer(name) for name in names])
        results[name] = gradient, buffers
    exact = results["one batch"]
    return {
        name: [float((value - right).norm() / right.norm()) for value, right in zip(both, exact, strict=True)]
        for name, both in results.items()
    }


def measured(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """The rows of a model."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    model = MODELS[name](num_classes=10).to(device)
    batch = (
        torch.randn(options.batch, 3, options.image, options.image, device=device),
        torch.randint(0, 10, (options.batch,), device=device),
    )
    errors = gradient_errors(copy.deepcopy(model), options.steps, batch)
    rows, seconds, operations = [], {}, {}
    made = windows(model, options.steps)
    peaks = {}
    for loop, window in made.items():
        window.backward(*batch)  # makes the gradients, which are not counted

        def update(window: Window = window) -> None:
            window.model.zero_grad(set_to_none=False)
            window.backward(*batch)
            wait_for(device)

        peaks[loop] = tensor_peak(device, update)
        with FlopCounterMode(display=False) as counter:
            update()
        operations[loop] = counter.get_total_flops()
        seconds[loop] = []
        for _ in range(options.rounds):
            started = time.perf_counter()
            update()
            seconds[loop].append(time.perf_counter() - started)
    for loop in made:
        row: dict[str, Any] = {"model": name, "loop": loop, "gradient_error": errors[loop][0]}
        row |= {"running_error": errors[loop][1], "peak_mib": peaks[loop] / MIB}
        row |= {"peak_ratio": peaks[loop] / peaks[PLAIN], "seconds": statistics.median(seconds[loop])}
        row |= {"operations_ratio": operations[loop] / operations[PLAIN]}
        rows.append(row | {"ratio": row["seconds"] / statistics.median(seconds[PLAIN])})
    return rows


def show(report: dict[str, Any]) -> Table:
    settings = report["settings"]
    title = f"{settings['batch']} samples in {settings['steps']} micro-batches, {settings['image']} pixels"
    headings = "model,loop,gradient\nerror,running\nerror,peak\nMiB,peak\nratio,"
    headings += "operations\nratio,seconds,time\nratio"
    table = table_of(title, headings, "loop,model")
    for row in report["rows"]:
        figures = [f"{row['gradient_error']:.1e}", f"{row['running_error']:.1e}", f"{row['peak_mib']:.1f}"]
        figures += [f"{row['peak_ratio']:.2f}", f"{row['operations_ratio']:.1f}"]
        figures += [f"{row['seconds']:.2f}", f"{row['ratio']:.1f}"]
        table.add_row(row["model"], row["loop"], *figures)
    return table


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.window_norm", description=__doc__)
    parser.add_argument(
        "--model", type=words, default="resnet18", help=f"of {', '.join(MODELS)}; %(default)s"
    )
    for option, default, text in (
        ("--batch", 32, "samples an update"),
        ("--steps", 4, "micro-batches of an update"),
        ("--image", 64, "height and width"),
        ("--rounds", 3, "timed updates"),
    ):
        parser.add_argument(option, type=int, default=default, help=f"{text}; %(default)s")
    device_options(parser)
    output_options(parser)
    options = parser.parse_args(given)
    check_names(parser, "--model", options.model, MODELS)
    at_least_1(parser, (options.batch, options.steps, options.image, options.rounds, options.threads))
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    prepare(options.threads)
    rows = [row for name in options.model for row in measured(options, name)]
    settings = {key: getattr(options, key) for key in ("batch", "steps", "image", "rounds")}
    report = {"environment": environment(pick_device(options.device)), "settings": settings, "rows": rows}
    finish(report, [show(report)], options.json)


if __name__ == "__main__":
    main()
