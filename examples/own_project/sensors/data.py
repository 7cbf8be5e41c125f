"""Recordings of unequal lengths, and the batch that is made of them."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

PADDING = -1.0


class Recordings(Dataset):
    """Simulated recordings. A machine is at fault where the mean of its last readings exceeds its limit.

    A sample is a dict of "readings" (length, 2), "machine" () and "faults" (length,) of 0 and 1.
    """

    def __init__(self, count: int, seed: int, machines: int = 4) -> None:
        generator = torch.Generator().manual_seed(seed)
        limits = torch.linspace(0.2, 0.8, machines)
        self.samples = []
        for _ in range(count):
            length = int(torch.randint(12, 40, (), generator=generator))
            machine = int(torch.randint(machines, (), generator=generator))
            readings = torch.randn(length, 2, generator=generator)
            history = torch.cat([torch.zeros(3), readings.sum(1)])
            faults = history.unfold(0, 4, 1).mean(1) > limits[machine]
            self.samples.append(
                {"readings": readings, "machine": torch.tensor(machine), "faults": faults.float()}
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


def pad(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch: recordings are padded at their end, and padded steps have the target -1."""
    return {
        "readings": pad_sequence([sample["readings"] for sample in samples], batch_first=True),
        "machine": torch.stack([sample["machine"] for sample in samples]),
        "faults": pad_sequence([sample["faults"] for sample in samples], True, PADDING),
    }
