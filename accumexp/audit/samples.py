"""Samples of a setting: made from its seed, in an order that never changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from .settings import IGNORED, Setting

FEATURES = 8
CLASSES = 4
VOCABULARY = 32
PADDING = 0
LENGTHS = (3, 16)  # of a sequence; the upper bound is excluded

Sample = dict[str, Tensor]


def samples_of(setting: Setting, dtype: torch.dtype) -> list[Sample]:
    """The samples of an epoch.

    Returns:
        "inputs", of shape (FEATURES,) and `dtype` for classes of an mlp, else token ids (length,);
        "labels", a class, or for the task "tokens" the ids (length,), of which a prompt is ignored.
    """
    generator = torch.Generator().manual_seed(setting.seed)
    return [_sample(setting, dtype, generator) for _ in range(setting.samples)]


def _sample(setting: Setting, dtype: torch.dtype, generator: torch.Generator) -> Sample:
    if setting.task == "classes":
        labels = torch.randint(CLASSES, (), generator=generator)
        if setting.model == "mlp":
            return {"inputs": torch.randn(FEATURES, generator=generator, dtype=dtype), "labels": labels}
        return {"inputs": _token_ids(generator), "labels": labels}
    inputs = _token_ids(generator)
    labels = inputs.clone()
    labels[: int(torch.randint(1, len(inputs), (), generator=generator))] = IGNORED
    return {"inputs": inputs, "labels": labels}


def _token_ids(generator: torch.Generator) -> Tensor:
    length = int(torch.randint(*LENGTHS, (), generator=generator))
    return torch.randint(PADDING + 1, VOCABULARY, (length,), generator=generator)


def collate(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a micro-batch, sequences padded to the longest one."""
    return _stack([s["inputs"] for s in samples], PADDING), _stack([s["labels"] for s in samples], IGNORED)


def _stack(rows: list[Tensor], fill: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=fill) if rows[0].dim() else torch.stack(rows)


def loader_of(setting: Setting, micro: int, dtype: torch.dtype, *, sharded: bool = False) -> DataLoader:
    """Micro-batches of `micro` samples, without shuffling; with `sharded`, this rank's."""
    samples = samples_of(setting, dtype)
    sampler = DistributedSampler(samples, shuffle=False) if sharded else None  # type: ignore[arg-type]
    return DataLoader(samples, micro, sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]
