"""A user's own model, optimizer, metric and callback in a run, and a run that fails in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accumexp.training.checkpoint import load

from ..support.command import environment, only_run, record_of, run_command
from ..support.experiments import UPDATES_AN_EPOCH

USER_MODULE = """
import pathlib
import torch
from accumexp.callbacks import Callback

class Net(torch.nn.Module):
    def __init__(self, num_classes, inputs):
        super().__init__()
        self.layer = torch.nn.Linear(inputs, num_classes)

    def forward(self, images):
        return self.layer(images.flatten(1))

class Descent(torch.optim.SGD):
    def __init__(self, params, lr, **options):
        super().__init__(params, lr, **options)
        self.param_groups[0]["own"] = True

class Count(Callback):
    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.updates = 0

    def update_end(self, trainer):
        self.updates += 1

    def run_end(self, trainer):
        self.path.write_text(str(self.updates))

class Fault(Callback):
    def update_end(self, trainer):
        if trainer.progress.update == 12:
            raise RuntimeError("the fault of a user")
"""


@pytest.fixture
def own_modules(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own.py").write_text(USER_MODULE)
    return environment(tmp_path / "modules")


def test_own_model_optimizer_metric_and_callback_work_by_target(
    tmp_path: Path, own_modules: dict[str, str]
) -> None:
    done = run_command(
        "run",
        *("model=mlp", "model._target_=own.Net", "~model.hidden", "~model.dropout"),
        *("optimizer._target_=own.Descent", "+callbacks.count._target_=own.Count"),
        f"+callbacks.count.path={tmp_path / 'updates'}",
        "+metrics.f1._target_=torchmetrics.classification.MulticlassF1Score",
        *("+metrics.f1.num_classes=10", "monitor=eval/f1", "tracking=none", "trainer.epochs=1"),
        folder=tmp_path,
        env=own_modules,
    )
    assert done.code == 0, done
    run = only_run(tmp_path)
    best = load(run / "checkpoints" / "best.pt")
    assert set(best["model"]) == {"layer.weight", "layer.bias"}
    assert best["optimizer"]["param_groups"][0]["own"] is True
    assert best["callbacks"]["checkpoint"]["best"] == best["evaluated"]["eval/f1"]
    assert (tmp_path / "updates").read_text() == str(UPDATES_AN_EPOCH)
    assert not (tmp_path / "mlflow.db").exists()


def test_a_run_that_fails_is_failed_everywhere(tmp_path: Path, own_modules: dict[str, str]) -> None:
    fault = "+callbacks.fault._target_=own.Fault"
    done = run_command("run", "model=mlp", "trainer.epochs=2", fault, folder=tmp_path, env=own_modules)
    assert done.code == 1
    assert "RuntimeError: the fault of a user" in done.stderr
    run = only_run(tmp_path)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == ("FAILED", "the fault of a user")
    record = record_of(run)
    assert record.status == "FAILED"
    assert [step for step, _ in record.points["train/loss"]] == list(range(1, UPDATES_AN_EPOCH + 1))
    assert record.tags["accumexp.error"] == "the fault of a user"
    assert [step for step, _ in record.points["eval/loss"]] == [UPDATES_AN_EPOCH]
    assert not [key for key in record.points if key.startswith("final/")]
