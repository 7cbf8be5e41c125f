"""What a window of two passes costs: its time and peak memory beside a plain window's and the larger batch's.

python -m benchmarks.two_passes --model lenet5 --samples 512 --steps 8
"""

from __future__ import annotations

import argparse
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from accumexp.accum import Term, Window, held_bytes, measure_peak
from accumexp.data import Digits
from accumexp.environment.device import pick_device, wait_for
from accumexp.losses import SupervisedContrastive
from accumexp.models import LeNet5, resnet18

from .measure import (
    Rows,
    at_least_1,
    device_options,
    environment,
    finish,
    in_turns,
    output_options,
    prepare,
    ratio_of,
    table_of,
)

MIB = 2**20
CLASSES = 10
LARGER = "larger batch, coupled"


class Confident:
    """The mean loss of the samples that the model is sure of, whose number the outputs determine."""

    def terms(self, outputs: Tensor, targets: Tensor) -> dict[str, Term]:
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        sure = outputs.detach().softmax(1).amax(1) > 1.5 / CLASSES
        return {"sure": Term((losses * sure).sum(), sure.sum())}


def model_of(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = LeNet5(CLASSES) if name == "lenet5" else resnet18(CLASSES, channels=1, norm="group")
    return model.to(device)


def seconds_of(window: Window, inputs: Tensor, targets: Tensor) -> float:
    wait_for(inputs.device)
    started = perf_counter()
    window.model.zero_grad()
    window.backward(inputs, targets)
    wait_for(inputs.device)
    return perf_counter() - started


def peak_of(window: Window, inputs: Tensor, targets: Tensor) -> float:
    """MiB that a window allocates besides what is held before it."""
    window.model.zero_grad()
    held = held_bytes([*window.model.parameters(), inputs, targets])
    with measure_peak(inputs.device, held) as peak:
        window.backward(inputs, targets)
    return (peak.peak - peak.start) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=["lenet5", "resnet18"], default="lenet5")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    device_options(parser)
    output_options(parser)
    options = parser.parse_args()
    at_least_1(parser, [options.samples, options.steps, options.rounds])
    prepare(options.threads)
    device = pick_device(options.device)
    images, labels = (tensor.to(device) for tensor in Digits(train=True).tensors)
    count = options.samples
    inputs, targets = images[torch.arange(count) % len(images)], labels[torch.arange(count) % len(labels)]
    losses: dict[str, tuple[Any, int]] = {
        "plain": (nn.CrossEntropyLoss(), options.steps),
        "weights of the outputs": (Confident(), options.steps),
        "coupled": (SupervisedContrastive(), options.steps),
        LARGER: (SupervisedContrastive(), 1),
    }
    windows = {name: Window(model_of(options.model, device), *given) for name, given in losses.items()}
    peaks = {}
    for name, window in windows.items():
        seconds_of(window, inputs, targets)  # the first window compares its passes
        peaks[name] = peak_of(window, inputs, targets)
    seconds: dict[str, list[float]] = {name: [] for name in windows}

    def take(name: str, turn: int) -> None:
        seconds[name].append(seconds_of(windows[name], inputs, targets))

    in_turns(list(windows), range(options.rounds), take)
    rows: Rows = [
        {"loss": name, "passes": windows[name].passes, "peak_mib": peaks[name]}
        | ratio_of(seconds[name], seconds["plain"])
        for name in windows
    ]
    title = f"{options.model}, {count} samples in {options.steps} micro-batches"
    table = table_of(title, "loss,passes,time,quartiles,peak MiB", "loss")
    for row in rows:
        spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        table.add_row(
            row["loss"], str(row["passes"]), f"{row['ratio']:.2f}", spread, f"{row['peak_mib']:.1f}"
        )
    settings = {key: getattr(options, key) for key in ("model", "samples", "steps", "rounds")}
    finish({"settings": settings, "environment": environment(device), "rows": rows}, [table], options.json)


if __name__ == "__main__":
    main()
