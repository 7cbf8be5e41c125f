"""Law: a sweep's job runs with the configuration by which it was checked before the first job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from accumexp.cli import hydra_app
from accumexp.errors import UsageError

JOBS = ["seed=0,1", "accum.steps=1,2"]


def composed_for(given: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[Any]]:
    """(How often Hydra composed a configuration, what each job got) in a sweep with the `given` arguments."""
    calls, got = [], []
    compose = ConfigLoaderImpl.load_configuration

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return compose(*arguments, **named)

    def task(cfg: Any) -> None:
        hydra = OmegaConf.to_container(HydraConfig.get(), resolve=False)
        got.append((OmegaConf.to_container(cfg, resolve=False), hydra))

    monkeypatch.chdir(folder)
    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    monkeypatch.setattr(sys, "argv", ["run", "-m", *given])
    hydra_app(task)
    return len(calls), got


def test_each_job_is_composed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, got = composed_for(JOBS, tmp_path, monkeypatch)
    assert [(cfg["seed"], cfg["accum"]["steps"]) for cfg, _ in got] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [hydra["job"]["num"] for _, hydra in got] == [0, 1, 2, 3]
    assert calls == 1 + len(got)  # and the sweep's own


def test_jobs_of_equal_overrides_have_a_configuration_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, got = composed_for(["seed=0,0"], tmp_path, monkeypatch)
    assert [hydra["job"]["num"] for _, hydra in got] == [0, 1]
    assert len({hydra["runtime"]["output_dir"] for _, hydra in got}) == 2


def test_a_job_that_cannot_be_composed_is_refused_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", "-m", "model=lenet5,lenet9"])
    with pytest.raises(UsageError, match="lenet9"):
        hydra_app(ran.append)
    assert not ran
