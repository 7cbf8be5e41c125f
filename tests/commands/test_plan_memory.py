"""The memory that a plan predicts is the memory that a run takes."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from accumexp.accum import extrapolated, held_bytes, measure_peak
from accumexp.accum.peak import Peak
from accumexp.config.loading import with_steps
from accumexp.environment.memory import _cgroup_free_bytes
from accumexp.environment.ranks import RankInfo
from accumexp.plan.auto_steps import measure_steps
from accumexp.plan.planner import Planner
from accumexp.plan.trial_run import trial_run
from accumexp.training.checkpoint import load, save

from ..support.experiments import composed
from ..support.planned import AUTO, LENET, RESNET, taken_by

pytestmark = pytest.mark.usefixtures("imports_are_kept_again")

CPU = torch.device("cpu")
MLP = [*AUTO, "model=mlp", "optimizer=adam", "data.eval_batch_size=8"]
NEEDS_BERT = pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="an extra")
DEEP = [*AUTO, "model=resnet18", "data.image_size=8", "data.batch_size=24", "data.eval_batch_size=1"]
BERT = [*AUTO, "experiment=text_bert", "scheduler.warmup_updates=0", "model.layers=1", "model.hidden=64"]
BERT += ["data.batch_size=24", "data.eval_batch_size=4"]


def test_a_peak_is_what_the_allocator_had_at_once() -> None:
    before = torch.zeros(1000)
    with measure_peak(CPU, held_bytes([before, before[:10], before])) as memory:
        first = torch.zeros(500)
        second = torch.zeros(500)
        view = second[:3]
        del first, second
        third = torch.zeros(250)
    assert memory.start == 4000
    assert memory.changes == [2000, 2000, -2000, 1000]
    assert memory.peak == 8000 and memory.end == memory.alive[-1] == 7000
    assert view.shape == (3,) and third.shape == (250,)


def test_a_prediction_is_the_largest_of_the_lines_at_every_place() -> None:
    def peak(changes: list[int]) -> Peak:
        memory = Peak(100)
        memory.changes = changes
        memory.peak = max(memory.alive)
        return memory

    # 10 n bytes at one place, 200 at another: the peak is elsewhere at small sizes.
    small, large = peak([20, -20, 200, -200]), peak([40, -40, 200, -200])
    assert small.peak == large.peak == 300
    assert [extrapolated((2, small), (4, large), n) for n in (8, 20, 50)] == [300, 300, 600]
    assert extrapolated((2, small), (4, large), 50, beside=7) == 607
    # Not the same things in the same order: the line through the peaks.
    assert extrapolated((2, peak([20, -20])), (4, peak([40])), 8) == 100 + 80


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([*LENET, "optimizer=sgd", "callbacks=ema"], id="lenet"),
        pytest.param([*MLP, "trainer.clip_norm=1", "accum=loss_scaled"], id="mlp"),
        pytest.param(RESNET, id="resnet18"),
        pytest.param(
            BERT,
            id="bert",
            marks=NEEDS_BERT,
        ),
    ],
)
def test_peaks_are_predicted_within_a_tenth_of_what_is_measured(overrides: list[str]) -> None:
    with trial_run(composed(*overrides)) as trial:
        planner = Planner(trial)
        batch = trial.data.batch_size
        for steps in (1, 2, batch // 4):
            point = planner.measure(steps)
            assert point.measured and abs(point.predicted / point.measured - 1) < 0.1, point
        activations = {steps: trial.whole(steps).activations for steps in (1, 4)}
        assert activations[1] > 2 * activations[4]
        parts = planner.parts(planner.measure(1))
        assert parts["saved activations"] == pytest.approx(activations[1], rel=0.1)
        weights = sum(p.numel() * p.element_size() for p in trial.experiment.model.parameters())
        assert parts["gradients"] == weights <= parts["parameters"]


@pytest.mark.parametrize(
    ("overrides", "shares"),
    [(LENET, (0.02, 0.5, 1.0)), pytest.param(BERT, (0.5,), marks=NEEDS_BERT)],
    ids=["lenet", "bert"],
)
def test_a_run_never_takes_more_than_the_limit(
    overrides: list[str], shares: tuple[float, ...], tmp_path: Path
) -> None:
    with trial_run(composed(*overrides)) as trial:
        planner = Planner(trial)
        most, least = planner.predicted_peak(1), planner.predicted_peak(24)
        floor = max(least, planner.evaluation(trial.data.evaluated))
        assert floor < most
    chosen = []
    for share in shares:
        limit = int(floor + share * (most - floor))
        config = composed(*overrides, f"accum.memory_limit={limit}")
        point, _ = measure_steps(config, RankInfo())
        chosen.append(point.steps)
        taken = taken_by(with_steps(config, point.steps), tmp_path / "trace")
        assert 0.6 * limit < taken <= limit, (limit, point)
    assert chosen == sorted(chosen, reverse=True) and len(set(chosen)) == len(shares)
    assert (chosen[-1] == 1) == (shares[-1] == 1.0)


@pytest.mark.slow
def test_a_rank_of_several_never_takes_more_than_was_predicted(tmp_path: Path) -> None:
    """Gradients beside ddp's buckets, and copies of buffers to go back to, are in no trial's run.

    How long ddp keeps its first buckets, and one that it has reduced, depends on the machine's load: without
    either, the run takes that much less.
    """
    from ..support.ranks import on_ranks

    for taken, predicted, measured, parts in on_ranks(2, tmp_path, _taken):
        certain = measured - parts["buckets of ddp"] - parts["a bucket of ddp under way"]
        assert 0.99 * certain < taken <= measured and abs(predicted / measured - 1) < 0.1
        assert parts["buckets of ddp"] == parts["gradients"] and parts["copies to go back to"] > 0


def _taken() -> Any:
    rank = torch.distributed.get_rank()
    config = composed(*DEEP, "accum=ddp", "accum.processes=2")
    with trial_run(config, RankInfo(rank, 2, rank, 2)) as trial:
        planner = Planner(trial)
        point = planner.measure(4)
        parts = planner.parts(point)
    with tempfile.TemporaryDirectory() as folder:
        taken = taken_by(with_steps(config, 4), Path(folder) / "trace", RankInfo(rank, 2, rank, 2))
    return taken, point.predicted, point.measured, parts


def holder_of(tensor: torch.Tensor) -> str:
    """The path of the mapping of this process's memory in which `tensor` lies; anonymous memory has none."""
    for mapping in psutil.Process().memory_maps(grouped=False):
        first, end = (int(address, 16) for address in mapping.addr.split("-"))
        if first <= tensor.data_ptr() < end:
            return mapping.path
    raise AssertionError("in no mapping")


@pytest.mark.skipif(not hasattr(psutil.Process, "memory_maps"), reason="this system does not tell")
def test_a_look_at_a_checkpoint_leaves_its_tensors_in_the_file(tmp_path: Path) -> None:
    weights, path = torch.randn(2**23), tmp_path / "one.pt"
    save(path, {"weights": weights})
    looked_at, loaded = (load(path, in_file)["weights"] for in_file in (True, False))
    assert Path(holder_of(looked_at)) == path.resolve() != Path(holder_of(loaded))
    assert torch.equal(looked_at, weights) and torch.equal(loaded, weights)


def test_a_container_may_have_less_than_the_machine(tmp_path: Path) -> None:
    for name, text in (("max", "1000"), ("current", "700"), ("stat", "anon 600\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert _cgroup_free_bytes(tmp_path) == [350]
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_free_bytes(tmp_path) == []
