"""Law 12 for numbers: every one that the project owns has a range, and is refused by name outside of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hydra.errors import HydraException

from accumexp.config.no_effect import no_effect_lines
from accumexp.config.ranges import Range, ranges, unusual_settings
from accumexp.config.schema import Config
from accumexp.data import StreamedBatches
from accumexp.environment.cores import cores, most_workers
from accumexp.errors import UsageError
from accumexp.training.experiment import Experiment
from accumexp.training.preflight import workers_warning

from ..support.experiments import composed, trainer_of

# Numbers or words, which `config.sizes` checks.
WORDS = {"accum.steps", "accum.memory_limit"}


def types(node: Any, prefix: str = "") -> dict[str, set[str]]:
    """The types of all fields of a dataclass that name a number, by dotted key."""
    by_key: dict[str, set[str]] = {}
    for item in dataclasses.fields(node):
        value, key = getattr(node, item.name), f"{prefix}{item.name}"
        named = set(str(item.type).replace("|", " ").split())
        if dataclasses.is_dataclass(value):
            by_key |= types(value, f"{key}.")
        elif {"int", "float"} & named:
            by_key[key] = named
    return by_key


def test_law_12_every_number_in_the_schema_has_a_range() -> None:
    assert set(types(Config())) - WORDS == {key for key, _, _ in ranges(Config())}


@pytest.mark.parametrize("key", [key for key, _, _ in ranges(Config())])
def test_law_12_a_number_far_out_of_range_is_refused_by_name(key: str) -> None:
    whole = "int" in types(Config())[key]
    for value in ("-1", "1" + "0" * 22 if whole else "inf"):
        with pytest.raises((UsageError, HydraException), match=key):
            composed(f"{key}={value}")


@pytest.mark.parametrize(
    "override",
    [
        "callbacks.checkpoint.keep_last=0",
        "callbacks.checkpoint.every_updates=0",
        "callbacks.monitor.every=-1",
        "callbacks.ema.decay=1.5",
        "callbacks.early_stopping.patience=0",
        "callbacks.noise_scale.decay=1",
        "scheduler.min_factor=2",
        "model.hidden=[0]",
    ],
)
def test_law_12_so_is_an_argument_of_what_the_project_ships(override: str) -> None:
    group = override.split(".")[1]
    choice = {"checkpoint": "default", "monitor": "default"}.get(group, group)
    chosen = [f"callbacks={choice}"] if override.startswith("callbacks") else []
    chosen += ["scheduler=cosine"] if override.startswith("scheduler") else []
    key = override.partition("=")[0]
    with pytest.raises(UsageError, match=f"{key}="):
        trainer_of(*chosen, override)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lr=nan", "optimizer.lr=nan: is no number"),
        ("optimizer.betas=[0.9,nan]", "optimizer.betas.1=nan: is no number"),
        ("callbacks.checkpoint.keep_last=99999999999999999999", "callbacks.checkpoint.keep_last=.*: at most"),
        ("+loss.ignore_index=99999999999999999999", "loss.ignore_index=.*: at most"),
    ],
)
def test_law_12_what_no_class_takes_for_a_number_is_refused_by_name(override: str, line: str) -> None:
    chosen = ["optimizer=adam"] if "betas" in override else []
    with pytest.raises(UsageError, match=line):
        composed(*chosen, override)


def test_more_workers_and_threads_than_the_machine_has_use_for_are_capped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    small = ("device=cpu", "model=mlp", "data.resident=false", "data.workers=1000", "trainer.threads=4000")
    experiment = Experiment.build(composed(*small))
    train = experiment.splits.train
    assert isinstance(train, StreamedBatches) and train._loader.num_workers == most_workers() < 1000
    assert f"{most_workers()} are started" in str(workers_warning(1000))
    assert threads == [cores()] and "trainer.threads=4000: this machine has" in caplog.text


def test_the_ends_of_a_range() -> None:
    half_open = Range(at_least=0, below=1)
    assert [half_open.refusal(x) for x in (0, 0.5)] == [None, None]
    assert half_open.refusal(-0.1) == "at least 0"
    assert half_open.refusal(1) == "below 1"
    assert half_open.refusal(float("nan")) == "a finite number"
    assert Range(above=0, at_most=2).refusal(0) == "above 0"
    assert Range(above=0, at_most=2).refusal(3) == "at most 2"


def test_what_no_training_goes_well_with_is_named() -> None:
    node = {"_target_": "x", "lr": float("inf"), "betas": [0.9, 0.9], "momentum": 1.5, "inner": {"alpha": 2}}
    assert unusual_settings(node, "optimizer") == [
        "optimizer.lr=inf: usual is a finite number",
        "optimizer.momentum=1.5: usual is below 1",
        "optimizer.inner.alpha=2: usual is below 1",
    ]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["accum.init_scale=4"], "accum.init_scale=4.0: has no effect with accum.loss_scale=none"),
        (
            ["accum.loss_scale=static", "accum.growth_interval=5"],
            "accum.growth_interval=5: has no effect with accum.loss_scale=static",
        ),
        (
            ["accum.find_unused_parameters=true"],
            "accum.find_unused_parameters=true: has no effect with accum.strategy=standalone",
        ),
        (
            ["accum.fp32_buffers=true"],
            "accum.fp32_buffers=true: has no effect with parameters of full precision",
        ),
        (["accum=loss_scaled", "accum.init_scale=4"], None),
        (["accum=ddp", "accum.find_unused_parameters=true"], None),
        (["param_precision=bf16", "accum.fp32_buffers=true"], None),
        ([], None),
    ],
)
def test_law_12_a_setting_without_effect_is_named(overrides: list[str], line: str | None) -> None:
    assert no_effect_lines(composed(*overrides)) == ([line] if line else [])
