"""Adapters train what their setting says, with `steps` micro-batches of `micro` samples an update."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import torch
import yaml

from accumexp.audit import adapters
from accumexp.audit.settings import LEARNING_RATE, Setting
from accumexp.conf import conf_dir

from .watched import watched

CONF = Path(conf_dir()) / "audit"
NAMES = [module.name for module in iter_modules(adapters.__path__)]
STEPS, MICRO = 4, 8
# Trainers whose loaders leave out an epoch's smaller last micro-batch, with what they keep of 84 samples.
KEPT = {"torchtune": 80}


@pytest.fixture(params=NAMES, scope="module")  # one after the other: some change the state of the process
def adapter(request: pytest.FixtureRequest) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the trainer's package
        try:
            return import_module(f"accumexp.audit.adapters.{request.param}")
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("accumexp"):
                raise
            pytest.skip(f"{error.name} is not installed")


def setting_of(name: str) -> Setting:
    return Setting(**yaml.safe_load((CONF / f"{name}.yaml").read_text()))


def test_every_file_is_a_setting_of_its_name() -> None:
    names = [path.stem for path in CONF.glob("*.yaml")]
    assert len(names) > 10 and all(setting_of(name).name == name for name in names)


def test_every_setting_of_an_adapter_has_a_file(adapter: Any) -> None:
    assert len(adapter.SETTINGS) > 5 and all(setting_of(name) for name in adapter.SETTINGS)


def test_windows_hold_the_samples_of_the_larger_batch(adapter: Any) -> None:
    name = "tokens" if "tokens" in adapter.SETTINGS else "classes"
    split = watched(adapter, setting_of(name), STEPS, MICRO)
    whole = watched(adapter, setting_of(name), 1, STEPS * MICRO)
    assert split.trained == whole.trained == getattr(adapter, "DTYPE", torch.float64)
    assert split.updates == [[MICRO] * STEPS] * 6  # 96 samples in an epoch, 2 epochs
    assert whole.updates == [[STEPS * MICRO]] * 6
    assert split.samples == whole.samples
    assert len(set(split.samples)) > 1 and split.samples[:96] == split.samples[96:]


def test_every_sample_is_trained_in_an_epoch_that_does_not_divide(adapter: Any) -> None:
    split = watched(adapter, setting_of("epoch"), STEPS, MICRO)
    kept = KEPT.get(adapter.PACKAGE, 84)
    assert len(split.samples) == 2 * kept and split.samples[:kept] == split.samples[kept:]


def test_the_learning_rate_of_a_warm_up_rises(adapter: Any) -> None:
    if "schedule" not in adapter.SETTINGS:
        pytest.skip("has no schedule of its own")
    rates = [rates[0] for rates in watched(adapter, setting_of("schedule"), 1, STEPS * MICRO).rates]
    assert rates == sorted(rates) and len(set(rates)) > 3


def test_groups_learn_at_their_own_rates(adapter: Any) -> None:
    if "groups" not in adapter.SETTINGS:
        pytest.skip("has one group")
    rates = watched(adapter, setting_of("groups"), STEPS, MICRO).rates[0]
    assert rates == pytest.approx([LEARNING_RATE, LEARNING_RATE / 10])


def test_mixed_precision_trains_weights_of_fp32(adapter: Any) -> None:
    if "bf16" not in adapter.SETTINGS:
        pytest.skip("has no mixed precision on a CPU")
    assert watched(adapter, setting_of("bf16"), STEPS, MICRO).trained == torch.float32
