"""The configurations that come with the package: each composes, and its targets exist."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from accumexp.conf import conf_dir
from accumexp.config.loading import from_hydra

from ..support.command import only_run, only_sweep, run_command

CONF = Path(conf_dir())
CHOICES = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF
)


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    """Hydra's compose with the commands' own configuration."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides, **options: compose("config", list(overrides), **options)


def test_no_file_of_the_project_sets_what_hydra_would_compose_twice_for() -> None:
    files = [yaml.safe_load(path.read_text()) for path in CONF.rglob("*.yaml")]
    assert len(files) > 30
    assert not [content for content in files if "mode" in ((content or {}).get("hydra") or {})]


@pytest.mark.slow
def test_a_mode_given_to_hydra_counts(tmp_path: Path) -> None:
    quick = ("model=mlp", "device=cpu", "tracking=none", "trainer.max_updates=1", "report.write=false")
    done = run_command("run", *quick, "hydra.mode=MULTIRUN", folder=tmp_path)
    assert done.code == 0 and only_sweep(tmp_path).is_dir(), done


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_choice_composes_to_a_configuration_whose_targets_exist(
    group: str, choice: str, composed: Callable[..., DictConfig]
) -> None:
    from hydra.utils import get_object

    # Text has no channels for the default model, and digits no length for this one.
    companion = {"text": ["model=bert"], "bert": ["data=text"]}.get(choice, [])
    cfg = composed(f"{group}={choice}", *companion, return_hydra_config=True)
    assert cfg.hydra.runtime.choices[group] == choice
    config = from_hydra(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))
    nodes = [config.model, config.loss, config.optimizer, config.scheduler, *config.callbacks.values()]
    nodes += [*config.metrics.values(), config.data.train, config.data.test]
    nodes += [node for node in (config.data.eval, config.data.transform, config.data.augment) if node]
    for target in (str(target) for node in nodes for target in targets(node)):
        assert callable(get_object(target)), target


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def test_the_default_configuration_is_one_step_of_digits(composed: Callable[..., DictConfig]) -> None:
    config = from_hydra(composed())
    assert config.data.train["_target_"] == "accumexp.data.Digits"
    assert (config.accum.steps, config.data.batch_size, config.accum.micro_batch_size) == (1, 128, 128)
    assert config.accum.reduction.name == "mean"


def test_tutorial_lenet_is_the_tutorials_run(composed: Callable[..., DictConfig]) -> None:
    config = from_hydra(composed("experiment=tutorial_lenet"))
    assert (config.accum.steps, config.accum.micro_batch_size, config.data.batch_size) == (4, 32, 128)
    assert config.accum.reduction.name == "sum"
    assert config.optimizer["_target_"] == "torch.optim.SGD"
    assert (config.optimizer["lr"], config.optimizer["momentum"]) == (0.01, 0.9)
    assert config.trainer.epochs == 10
    assert config.model["_target_"] == "accumexp.models.LeNet5"
    assert config.data.train["_target_"] == "torchvision.datasets.MNIST"
    assert config.loss["_target_"] == "torch.nn.CrossEntropyLoss"


def test_tutorial_lenet_trains_on_mnist_files_that_are_there(tmp_path: Path) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, samples in (("train", 300), ("t10k", 60)):
        images = generator.integers(0, 256, (samples, 28, 28), np.uint8)
        labels = generator.integers(0, 10, samples, np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / f"{split}-{name}-ubyte").write_bytes(head + array.tobytes())
    done = run_command(
        "run",
        *("experiment=tutorial_lenet", f"data.root={tmp_path / 'mnist'}", "trainer.epochs=1"),
        "tracking=none",
        folder=tmp_path,
    )
    assert done.code == 0, done
    assert "LeNet5 on 270 samples, 3 updates of 128 samples in 4 micro-batches of 32" in done.stdout
    final = json.loads((only_run(tmp_path) / "summary.json").read_text())["final"]
    assert (final["updates"], final["samples"]) == (3, 270)
