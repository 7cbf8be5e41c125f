"""The record of each split for the tracker: its data set's name, source, size and digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..accum.batch import map_tensors, tensors
from ..config.loading import to_plain
from .batches import Batches, ResidentBatches, Splits


@dataclass(frozen=True)
class DatasetRecord:
    """A split as MLflow records it.

    Attributes:
        source: the `_target_` node that makes the data set, as JSON.
        context: "train", "eval" or "test".
    """

    name: str
    digest: str
    source: str
    context: str
    samples: int


def dataset_records(config: Mapping[str, Any], splits: Splits) -> list[DatasetRecord]:
    """The records of the three splits; `config` is the recorded `data`, as plain dicts."""
    records = []
    for context, node, batches in (
        ("train", config["train"], splits.train),
        *([("eval", config["eval"] or config["train"], splits.eval)] if splits.has_eval else []),
        ("test", config["test"], splits.test),
    ):
        source = json.dumps(to_plain(node))
        name = str(node["_target_"]).rpartition(".")[2].lower()
        records.append(DatasetRecord(name, digest(source, batches), source, context, batches.samples))
    return records


def digest(source: str, batches: Batches) -> str:
    """A hash of 32 bits, in hexadecimal, of the data set's source and its samples' indices.

    For samples in memory, all targets and 64 inputs are hashed too.
    """
    result = hashlib.blake2b(source.encode(), digest_size=4)
    result.update(batches.indices.numpy().tobytes())
    if isinstance(batches, ResidentBatches):
        first = map_tensors(lambda tensor: tensor[:64], batches.inputs)
        for tensor in [*tensors(batches.targets), *tensors(first)]:
            result.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return result.hexdigest()
