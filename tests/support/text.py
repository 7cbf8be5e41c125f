"""Small data of text: samples of the standard library's files, with unequal numbers of bytes to guess."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accumexp.accum import split_sizes
from accumexp.data import InMemory, PythonSources
from accumexp.data.text import IGNORED

SAMPLES = 23  # a prime: nothing divides it
LENGTH = 32
STEPS = [1, 2, 3, 5, 7]


def corpus(split: str = "train", samples: int = 300, **options: Any) -> PythonSources:
    return PythonSources(split, samples, **options)


def parts_of(text: InMemory) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and targets of the whole data set."""
    assert isinstance(text.inputs, dict) and isinstance(text.targets, Tensor)
    return text.inputs["input_ids"], text.inputs["attention_mask"], text.targets


def ragged() -> tuple[dict[str, Tensor], Tensor]:
    """Samples of 1 to 5 bytes to guess, and two of none, in no micro-batches of equal numbers of them."""
    ids, mask, targets = (t.clone() for t in parts_of(corpus(samples=SAMPLES, length=LENGTH, min_length=4)))
    targets[5:7] = IGNORED
    counts = (targets != IGNORED).sum(1)
    assert len(counts.unique()) >= 4 and int(counts.min()) == 0
    assert all(len({int(c.sum()) for c in counts.split(split_sizes(SAMPLES, n))}) > 1 for n in STEPS[1:])
    return {"input_ids": ids, "attention_mask": mask}, targets
