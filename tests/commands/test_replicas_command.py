"""`replicas=` from the command line: child runs, refusals, a stopped sweep and failed seeds."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from accumexp.sweeps.sweep import sweep_runs

from ..support.command import Case, journal, left_behind, only_run, only_sweep, records, run_command, run_many
from ..support.replicas import EXACT, MLP, SEEDS, SMALL
from ..support.trouble import trouble
from .test_sweep import table

COMMAND = [*MLP, *SMALL, "precision=fp64", "tracking.system_metrics=false", "report.write=false"]


class Plain(nn.Module):
    def __init__(self, inputs: int, num_classes: int, hidden: list[int], dropout: float) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, num_classes)
        self.projection = torch.ones(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.flatten(1) * self.projection)


class Looks(Plain):
    """Decides by its data."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs if inputs.sum() > -1e9 else -inputs)


class Aside(Plain):
    """Keeps random numbers where nobody sees them."""

    def __init__(self, inputs: int, num_classes: int, hidden: list[int], dropout: float) -> None:
        super().__init__(inputs, num_classes, hidden, dropout)
        self.projection = torch.randn(inputs, dtype=torch.float64)


class Drawn(TensorDataset):
    def __init__(self, train: bool, image_size: int) -> None:
        super().__init__(torch.randn(400, 1, image_size, image_size), torch.arange(400) % 10)


REFUSED = {
    "model.dropout=0.5": "layers.3 (Dropout) draws random numbers in training",
    f"model._target_={__name__}.Looks": "torch.func.vmap cannot run this model and loss for many seeds",
    f"model._target_={__name__}.Aside": "the gradient of layer.weight is not that of the run alone",
    f"data.train._target_={__name__}.Drawn": "the data draws from the run's seed",
    "data.resident=false": "this data is streamed",
    "accum=ddp": "take accum=standalone",
    "prove=true": "a certificate is of one run",
    "data.split_seed=${seed}": "data.split_seed follows from the seed",
    "optimizer.lr=fast": "optimizer",
    "accum.steps=0": "accum.steps=0: at least 1",
    "replicas=0": "replicas=0: at least 1",
}


@pytest.mark.slow
def test_what_cannot_be_trained_together_is_refused_in_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    line = ["replicas=2", *MLP, *SMALL, "precision=fp64"]
    refused = [
        *REFUSED.items(),
        (f"resume={tmp_path}", "no checkpoint"),
        ("replicas=0", "replicas=0: at least 1"),
    ]
    cases = [Case("run", [*line, one], str(tmp_path / str(k))) for k, (one, _) in enumerate(refused)]
    cases.append(Case("prove", line, str(tmp_path / "prove")))
    reasons = [*(reason for _, reason in refused), "a certificate is of one run"]
    for case, done, reason in zip(cases, run_many(cases, tmp_path / "scratch"), reasons, strict=True):
        assert reason in done.error(), (case, done)
        assert left_behind(Path(case.folder)) == [], case


def test_replicas_are_child_runs_each_as_its_seed_alone_leaves_it(tmp_path: Path) -> None:
    done = run_command("run", "replicas=3", "seed=3", "accum.steps=2", *COMMAND, folder=tmp_path / "many")
    assert done.code == 0 and not done.stderr, done
    assert [row[:2] for row in table(done.stdout)] == [["2", "3"]]  # accum.steps, seeds
    parent, *children = records(tmp_path / "many")
    assert parent.status == "FINISHED" and len(children) == 3
    assert parent.tags["accumexp.command"].startswith("python -m accumexp.run replicas=3 seed=3")
    (tmp_path / "alone").mkdir()
    run_command("run", "seed=4", "accum.steps=2", *COMMAND, folder=tmp_path / "alone")
    (alone,) = records(tmp_path / "alone")
    for seed, child in zip(SEEDS, children, strict=True):
        assert child.status == "FINISHED" and child.tags["mlflow.parentRunId"] == parent.run_id
        assert (child.params["seed"], child.params["replicas"]) == (str(seed), "1")
        assert child.tags["accumexp.replicas"] == "3" and f"seed={seed}" in child.name
    child, alone_folder = children[1], only_run(tmp_path / "alone")
    folder = Path(child.tags["accumexp.folder"])
    assert folder.name == "seed=4"
    configs = [(run / "config.yaml").read_text() for run in (folder, alone_folder)]
    uri = f"  uri: sqlite:///{tmp_path / 'many' / 'mlflow.db'}\n"  # a sweep keeps to the store it began in
    assert configs[0].replace(uri, "  uri: null\n") == configs[1]
    assert child.artifacts == alone.artifacts and child.datasets == alone.datasets
    assert child.points.keys() == alone.points.keys()
    for key, points in alone.points.items():
        assert [step for step, _ in child.points[key]] == [step for step, _ in points]
        if not key.startswith(("perf/", "final/s", "final/update_ms", "final/peak", "final/activation")):
            assert [v for _, v in child.points[key]] == pytest.approx([v for _, v in points], rel=EXACT)
    # A replica is a run: it goes on by itself, as the one that was alone does.
    for base, run in (("many", folder), ("alone", alone_folder)):
        more = run_command("run", f"resume={run}", "trainer.epochs=4", folder=tmp_path / base)
        assert more.code == 0, more
    rows = [
        {k: v for k, v in row.items() if k[:5] in ("updat", "train", "eval/")}
        for row in journal(alone_folder)
    ]
    assert len(rows) == 24
    for row, other in zip(rows, journal(folder), strict=True):
        assert {key: other[key] for key in row} == pytest.approx(row, rel=EXACT)
    states = [torch.load(run / "checkpoints" / "update-00000020.pt") for run in (alone_folder, folder)]
    assert torch.equal(*(state["random"]["torch"] for state in states))


def test_a_sweep_of_replicas_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    stop = trouble("SIGTERM", 7, steps=2, mark=Path("mark"))
    line = ["accum.steps=1,2", "replicas=2", stop, *COMMAND, "tracking=none"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "mark-0").touch()
    undisturbed = run_command("run", "-m", *line, folder=tmp_path / "whole")
    assert undisturbed.code == 0, undisturbed
    done = run_command("run", "-m", *line, folder=tmp_path / "cut")
    assert done.code == 128 + signal.SIGTERM, done
    whole, sweep = only_sweep(tmp_path / "whole"), only_sweep(tmp_path / "cut")
    assert [job.status for job in sweep_runs(sweep)] == ["FINISHED"] * 2 + ["KILLED"] * 2
    assert done.stdout.splitlines()[-1].endswith(f"sweep.resume={sweep} trust=[tests]")
    again = run_command("run", "-m", f"sweep.resume={sweep}", "trust=[tests]", folder=tmp_path / "cut")
    assert again.code == 0 and again.stdout.count("finished before") == 1, again
    jobs, expected = sweep_runs(sweep), sweep_runs(whole)
    assert [job.status for job in jobs] == ["FINISHED"] * 4
    assert [job.overrides for job in jobs] == [job.overrides for job in expected]
    assert [job.seed for job in jobs] == [0, 1, 0, 1]
    for job, other in zip(jobs, expected, strict=True):
        rows, others = (journal(one.folder) for one in (job, other))
        assert [row["update"] for row in rows] == [row["update"] for row in others]
        for row, expected_row in zip(rows, others, strict=True):
            for key in row.keys() & {"train/loss", "eval/loss", "eval/accuracy"}:
                assert row[key] == pytest.approx(expected_row[key], rel=EXACT)
    assert [row[:2] for row in table(again.stdout)] == [["1", "2"], ["2", "2"]]


def test_failed_replicas_are_named_by_their_seeds(tmp_path: Path) -> None:
    line = ["replicas=3", *COMMAND, "tracking=none", "trainer.epochs=1", "optimizer.lr=1e200"]
    done = run_command("run", *line, folder=tmp_path)
    assert done.code == 1 and "3 of 3 jobs failed" in done.stderr, done
    assert [job.status for job in sweep_runs(only_sweep(tmp_path))] == ["FAILED"] * 3
    for seed in range(3):
        assert f"seed={seed}: train/loss is" in done.stderr
