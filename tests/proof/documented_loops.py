"""The loop of Accelerate's documentation on gradient accumulation, certified as it is documented.

`python -m tests.proof.documented_loops` prints its certificates: of classes, and of tokens with
ragged counts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from accumexp.proof import Certificate, certify

from .wrong_loops import CLASSES, MICRO, TOKENS, Setting, samples


def accelerate(steps: int) -> Callable[..., Any]:
    """`with accelerator.accumulate(model)`, over a DataLoader of the window's micro-batches."""
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=steps, cpu=True)
    prepared: dict[int, tuple[Any, ...]] = {}

    def train_window(model: Any, optimizer: Any, batch: Any, steps: int) -> float:
        if id(optimizer) not in prepared:
            # Kept with the objects they are built from, so that ids stay unique.
            prepared[id(optimizer)] = (*accelerator.prepare(model, optimizer), model, optimizer)
        model, optimizer, *_ = prepared[id(optimizer)]
        loader = accelerator.prepare(DataLoader(TensorDataset(*batch), batch_size=MICRO))
        total_loss = torch.zeros(())
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                outputs = model(inputs)
                loss = cross_entropy(outputs, targets)
                total_loss += loss.detach().float()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return total_loss.item() / len(loader)

    return train_window


def divides() -> Setting:
    """Only windows that the steps divide: the ragged ones that the proof makes are of one step."""
    return Setting(CLASSES.model, lambda: samples(MICRO), steps=1)


SETTINGS = {"classes": CLASSES, "tokens": TOKENS, "one step": divides()}


def certified(name: str, updates: int = 100) -> Certificate:
    setting = SETTINGS[name]
    loop = accelerate(setting.steps)
    return certify(loop, setting.model(), setting.loss(), setting.batch(), setting.steps, updates=updates)


def main() -> int:
    for name in SETTINGS:
        certificate = certified(name)
        print(f"{name}: {certificate}")
        for check in certificate.checks:
            mark = "ok" if check.passed else "!!"
            print(f"  {mark}  {check.name:30} {check.figure:.3g} (at most {check.bound:.2g})  {check.detail}")
        for cause in certificate.causes:
            print(f"  cause: {cause.line}; effect {cause.effect:.3g}; {cause.shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
