"""No number that is inf or nan becomes a checkpoint, and no score that is one becomes the best."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accumexp.errors import TrainingError
from accumexp.training.callbacks import Best, Callback, RunState
from accumexp.training.checkpoint import Checkpoints, load
from accumexp.training.finite import FiniteCheck, not_finite
from accumexp.training.trainer import Trainer

from ..support.experiments import trainer_of

SHORT = ("callbacks=default", "trainer.progress=false", "trainer.epochs=3", "data.batch_size=512")


class Poisons(Callback):
    """Writes -inf after update `at`: into a weight, a state of the optimizer or a buffer."""

    def __init__(self, at: int, what: str) -> None:
        self.at, self.what = at, what

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update != self.at:
            return
        weight = next(trainer.model.parameters())
        state = trainer.optimizer.state[weight].get("momentum_buffer")
        tensors = {"weight": weight, "state": state, "buffer": trainer.model.get_buffer("kept")}
        with torch.no_grad():
            tensors[self.what].view(-1)[0] = -math.inf


def poisoned(folder: Path, what: str, *overrides: str, at: int = 5) -> Trainer:
    """A trainer that saves into `folder` after updates 3, 6 and 9, and is poisoned after `at`."""
    trainer, _ = trainer_of(*SHORT, *overrides)
    trainer.model.register_buffer("kept", torch.zeros(2))
    trainer.model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    trainer.callbacks["poison"] = Poisons(at, what)
    for callback in trainer.callbacks.values():
        callback.run_opened(trainer, RunState(folder, {}, lambda: None))
    return trainer


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


NAMES = {
    "weight": "layers.1.weight",
    "state": "momentum_buffer of layers.1.weight in the optimizer",
    "buffer": "kept",
}


@pytest.mark.parametrize("what", NAMES)
def test_a_model_that_is_not_finite_ends_the_run_and_is_not_kept(what: str, tmp_path: Path) -> None:
    trainer = poisoned(tmp_path, what, at=6)
    with pytest.raises(TrainingError, match=f"^{NAMES[what]} is inf or nan after update 6: no checkpoint"):
        trainer.fit()
    assert kept(tmp_path) == ["best.pt", "update-00000003.pt"]


@pytest.mark.parametrize("what", NAMES)
def test_with_check_finite_false_it_goes_on_and_keeps_the_last_that_was(
    what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = poisoned(tmp_path, what, "trainer.check_finite=false", at=6)
    trainer.fit()
    assert trainer.finished
    assert kept(tmp_path) == ["best.pt", "update-00000003.pt"]
    assert load(tmp_path / "checkpoints" / "best.pt")["progress"]["update"] == 3
    lines = [line for line in caplog.messages if "inf or nan" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{NAMES[what]} is inf or nan after update 6")
    checkpoints = trainer.callbacks["checkpoint"]
    assert isinstance(checkpoints, Checkpoints)
    assert (
        checkpoints.best.value
        == load(tmp_path / "checkpoints" / "best.pt")["callbacks"]["checkpoint"]["best"]
    )


def test_a_loss_scale_over_a_weight_of_inf_ends_with_an_error(tmp_path: Path) -> None:
    trainer = poisoned(
        tmp_path, "weight", "accum=loss_scaled", "trainer.check_finite=false", "trainer.epochs=9"
    )
    with pytest.raises(TrainingError, match="every window overflows: 1[0-9] of 1[0-9] were skipped"):
        trainer.fit()
    assert kept(tmp_path) == ["best.pt", "update-00000003.pt"]


@pytest.mark.parametrize("backoff", ["0.5", "0.9999"])
def test_windows_that_overflow_until_the_end_are_no_success(backoff: str) -> None:
    trainer, _ = trainer_of(
        "accum=loss_scaled", "data.batch_size=512", "trainer.epochs=5", f"accum.backoff_factor={backoff}"
    )
    overflows = iter([0.0] + [math.inf] * 100)
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient + next(overflows))
    with pytest.raises(TrainingError, match="14 of 15 were skipped, the last 14 in a row"):
        trainer.fit()


def test_a_mask_of_inf_and_frozen_weights_are_passed_over() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model.register_buffer("mask", torch.tensor([-math.inf]))
    frozen: Any = model[1].weight
    with torch.no_grad():
        frozen.requires_grad_(False)[0, 0] = math.nan
    check, trainer = (
        FiniteCheck(),
        type("", (), {"model": model, "optimizer": torch.optim.SGD(model.parameters())}),
    )
    check.begin(model)
    assert check(trainer) is None  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
    assert check(trainer) == "0.weight"  # pyright: ignore[reportArgumentType]


def test_all_dtypes_are_looked_at_and_the_largest_number_is_finite() -> None:
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    largest = {str(dtype): torch.full((3,), torch.finfo(dtype).max, dtype=dtype) for dtype in dtypes}
    whole = {"int": torch.ones(2, dtype=torch.int64), "empty": torch.empty(0)}
    assert not_finite({**largest, **whole}) == []
    for number in (math.inf, -math.inf, math.nan):
        wrong = {name: torch.cat([tensor, tensor.new_full((1,), number)]) for name, tensor in largest.items()}
        assert not_finite({**whole, **wrong}) == list(wrong)


@pytest.mark.parametrize("mode", ["max", "min"])
def test_a_score_that_is_not_finite_is_never_the_best(mode: str) -> None:
    best = Best("eval/loss", mode)
    for number in (math.nan, math.inf, -math.inf):
        assert not best.improved({"eval/loss": number})
    assert best.improved({"eval/loss": 1.0}) and best.value == 1.0
