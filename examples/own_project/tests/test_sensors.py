"""The window is the larger batch, and the experiment trains."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from sensors.data import Recordings, pad
from sensors.loss import FaultLoss
from sensors.model import FaultDetector

from accumexp.accum import Window
from accumexp.proof import certify
from accumexp.run import run

SEARCH = "hydra.searchpath=[pkg://sensors.conf]"


def train_window(model, optimizer, batch, steps):
    optimizer.zero_grad()
    result = Window(model, FaultLoss(), steps).backward(*batch)
    optimizer.step()
    return result.loss


def test_the_window_is_the_larger_batch() -> None:
    torch.manual_seed(0)
    batch = pad([Recordings(32, seed=0)[k] for k in range(32)])
    inputs = {"readings": batch["readings"], "machine": batch["machine"]}
    certificate = certify(train_window, FaultDetector(), FaultLoss(), (inputs, batch["faults"]), steps=4)
    assert certificate.proved, certificate


def test_the_experiment_trains(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = [SEARCH, "experiment=sensors", "tracking=none", "device=cpu", "trainer.progress=false"]
    with initialize_config_module("accumexp.conf", version_base="1.3"):
        config = compose("config", overrides)
    result = run(config, folder="run")
    assert result.metrics["f1"] > 0.9
    assert not result.load_model().training
