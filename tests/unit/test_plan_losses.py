"""The plan of a loss that couples samples: a window keeps its outputs and computes the loss on all."""

from __future__ import annotations

from pathlib import Path

import pytest

from accumexp.config.loading import with_steps
from accumexp.plan.planner import Planner
from accumexp.plan.trial_run import trial_run

from ..support.experiments import composed
from ..support.planned import AUTO, taken_by

MLP = [*AUTO, "model=mlp", "model.hidden=[8]", "data.image_size=8", "metrics=none", "monitor=eval/loss"]
PAIRS = [*MLP, "loss=supervised_contrastive", "data.eval_batch_size=16"]


@pytest.mark.parametrize(
    "overrides",
    [
        # The similarities of all pairs are the peak.
        pytest.param([*PAIRS, "data.batch_size=256"], marks=pytest.mark.slow),
        # The outputs are.
        [*PAIRS, "data.batch_size=64", "model.num_classes=1000"],
    ],
)
def test_the_peak_of_a_coupled_loss_is_predicted(tmp_path: Path, overrides: list[str]) -> None:
    config = composed(*overrides)
    with trial_run(config) as trial:
        planner = Planner(trial)
        points = [planner.measure(steps) for steps in (2, 16)]
        alone = planner._line(planner._small[2], lambda one: one.update, points[1].micro_batch)
    for point in points:
        assert point.measured is not None
        assert point.measured <= 1.01 * point.predicted
        assert point.predicted <= 1.15 * point.measured
    assert points[1].measured is not None and points[1].measured > 1.05 * alone
    assert points[1].measured == pytest.approx(taken_by(with_steps(config, 16), tmp_path / "trace"), rel=0.02)
