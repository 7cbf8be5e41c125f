"""When a run is evaluated, and that an evaluation counts every sample once."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import window_loss
from accumexp.data import ResidentBatches
from accumexp.training.evaluation import Evaluator
from accumexp.training.metrics import Metrics

from ..support.experiments import trainer_of


class Outliving(nn.Module):
    """Counts its earlier outputs that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.alive = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.alive += sum(output() is not None for output in self.made)
        outputs = inputs.repeat(1, 3)
        self.made.append(weakref.ref(outputs))
        return outputs


def test_an_evaluation_keeps_no_outputs_through_the_next_forward() -> None:
    model, batches = Outliving(), ResidentBatches(torch.rand(9, 1), torch.zeros(9).long(), torch.arange(9), 2)
    evaluate = Evaluator(window_loss(nn.CrossEntropyLoss()), Metrics({}))
    assert evaluate(model, batches)["loss"] == pytest.approx(math.log(3))
    assert len(model.made) == 5 and not model.alive


def test_evaluation_comes_every_eval_every_epochs_and_at_the_end() -> None:
    trainer, memory = trainer_of("trainer.epochs=5", "trainer.eval_every=2", "data.batch_size=500")
    trainer.fit()
    assert [update for update, _ in memory.series("eval/accuracy")] == [6, 12, 15]
    trainer, memory = trainer_of("trainer.max_updates=4", "data.batch_size=500")
    trainer.fit()
    assert [update for update, _ in memory.series("eval/accuracy")] == [3, 4]


def test_evaluation_counts_every_sample_once_and_leaves_the_model_training() -> None:
    trainer, _ = trainer_of("data.eval_batch_size=7", "model.dropout=0.5")
    inputs = torch.cat([batch.inputs for batch in trainer.splits.test.epoch(0)])  # pyright: ignore
    targets = torch.cat([batch.targets for batch in trainer.splits.test.epoch(0)])  # pyright: ignore
    trainer.model.train()
    values = trainer.evaluate("test")
    assert trainer.model.training
    with torch.no_grad():
        outputs = trainer.model.eval()(inputs)
    assert len(inputs) == 360
    assert values["test/loss"] == pytest.approx(
        nn.functional.cross_entropy(outputs, targets).item(), rel=1e-12
    )
    assert values["test/accuracy"] == pytest.approx((outputs.argmax(1) == targets).double().mean().item())
