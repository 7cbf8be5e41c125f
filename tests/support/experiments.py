"""Whole experiments composed as the command line composes them, run in this process."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from accumexp.conf import conf_dir
from accumexp.config.loading import from_hydra
from accumexp.config.schema import Config
from accumexp.training.experiment import Experiment
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.trainer import Trainer

UPDATES_AN_EPOCH = 11  # 1,293 digits in batches of 128


def composed(*overrides: str) -> Config:
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return from_hydra(compose("config", list(overrides)))


def trainer_of(*overrides: str) -> tuple[Trainer, MemoryMetricsSink]:
    """A trainer on digits in fp64 on the CPU, unless told otherwise, and what it records."""
    config = composed("device=cpu", "precision=fp64", "model=mlp", "callbacks=none", *overrides)
    memory = MemoryMetricsSink()
    return Experiment.build(config).trainer(memory), memory


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def write_images(root: Path, samples: Mapping[str, int]) -> None:
    """A folder of random PNG images, two classes, `samples` a class in each split."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in samples.items():
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels: Any = torch.randint(
                    0, 256, (40, 48, 3), dtype=torch.uint8, generator=generator
                ).numpy()
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
