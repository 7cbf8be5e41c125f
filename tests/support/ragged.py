"""Sequences of unequal lengths with two inputs by name: the classes that a user would bring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Sequences(Dataset):
    """Samples are dicts: `tokens` of 3 to 8 numbers, `label` by the first of them."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
        self.tokens = [torch.randint(1, 30, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.tokens[index], "label": int(self.tokens[index][0] % 3)}


def pad(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    tokens = nn.utils.rnn.pad_sequence([one["tokens"] for one in samples], batch_first=True)
    labels = torch.tensor([one["label"] for one in samples])
    return {"tokens": tokens, "mask": (tokens != 0).float(), "label": labels}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head((self.embedding(tokens) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


OVERRIDES = (
    *(f"~data.{split}.{key}" for split in ("train", "test") for key in ("train", "image_size")),
    *(f"++data.{split}._target_=tests.support.ragged.Sequences" for split in ("train", "test")),
    *("+data.train.count=90", "+data.train.seed=0", "+data.test.count=30", "+data.test.seed=1"),
    *("++data.collate={_target_: tests.support.ragged.pad}", "data.target=label"),
    *("data.inputs=[tokens,mask]", "data.num_classes=3", "data.workers=0", "data.batch_size=16"),
    *("~model", "+model._target_=tests.support.ragged.Classifier", "device=cpu"),
)
