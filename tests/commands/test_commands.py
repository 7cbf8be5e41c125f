"""The commands `run` and `evaluate`: what a run records, and how its checkpoints are evaluated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from accumexp.environment.code_version import code_version
from accumexp.training.checkpoint import load

from ..support.command import (
    Case,
    Done,
    Record,
    journal,
    only_run,
    ranked_models,
    record_of,
    records,
    run_command,
    run_many,
)
from ..support.experiments import UPDATES_AN_EPOCH

UPDATES = 3 * UPDATES_AN_EPOCH


# A run -------------------------------------------------------------------------------------------------

RUN = ["model=mlp", "accum.steps=4", "trainer.epochs=3"]


@dataclass(frozen=True)
class Trained:
    """A run of `RUN` that has ended."""

    done: Done
    base: Path
    folder: Path
    record: Record


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    base = tmp_path_factory.mktemp("trained")
    done = run_command("run", *RUN, folder=base, fresh=True)
    assert done.code == 0, done
    folder = only_run(base)
    return Trained(done, base, folder, record_of(folder))


def test_a_run_says_where_it_is_recorded(trained: Trained) -> None:
    record, stdout = trained.record, trained.done.stdout
    assert not trained.done.stderr
    assert f"{UPDATES} updates of 128 samples in 4 micro-batches of 32" in stdout
    assert str(trained.folder) in stdout
    assert f"#/experiments/{record.experiment_id}/runs/{record.run_id}" in stdout
    assert f"mlflow ui --backend-store-uri sqlite:///{trained.base / 'mlflow.db'}" in stdout


def test_a_run_is_finished_under_the_keys_of_its_configuration(trained: Trained) -> None:
    record = trained.record
    assert record.status == "FINISHED" and record.name == trained.folder.name
    assert len(records(trained.base)) == 1
    sizes = {"accum.steps": "4", "data.batch_size": "128", "accum.micro_batch_size": "32"}
    assert sizes.items() <= record.params.items()
    defaults = {"accum.reduction": "mean", "precision": "fp32", "optimizer._target_": "torch.optim.SGD"}
    assert defaults.items() <= record.params.items()
    assert record.tags["accumexp.command"] == "python -m accumexp.run " + " ".join(RUN)
    assert record.tags["accumexp.git_sha"] == code_version()[0]
    assert set(record.datasets) == {"train", "eval", "test"}


def test_a_run_logs_the_promised_metrics_by_update(trained: Trained) -> None:
    points = trained.record.points
    steps = {key: [step for step, _ in values] for key, values in points.items()}
    read = [10, 20, 30, UPDATES]  # trainer.log_every=10, and the last
    for key in ("train/loss", "train/lr"):
        assert steps[key] == list(range(1, UPDATES + 1)), key  # all of the first 100
    for key in ("train/grad_norm", "train/accuracy"):
        assert steps[key] == read, key
    for key in ("perf/samples_per_second", "perf/update_ms", "perf/peak_memory_mib"):
        assert steps[key] == read, key
    assert steps["perf/activation_mib"] == [10]
    epochs = [UPDATES_AN_EPOCH * epoch for epoch in (1, 2, 3)]
    assert {key: steps[key] for key in steps if key.startswith("eval/")} == {
        "eval/loss": epochs,
        "eval/accuracy": epochs,
    }
    finals = {key for key in steps if key.startswith("final/")}
    assert {"final/accuracy", "final/loss", "final/updates", "final/seconds"} <= finals
    assert all(steps[key] == [0] for key in finals)
    assert points["final/updates"] == [(0, UPDATES)]
    assert all(value > 0 for key in points if key.startswith("perf/") for _, value in points[key])


def test_training_on_digits_learns(trained: Trained) -> None:
    losses = [value for _, value in trained.record.points["eval/loss"]]
    assert losses == sorted(losses, reverse=True)
    assert trained.record.points["final/accuracy"][0][1] > 0.7  # of ten classes


def test_the_journal_has_every_update_once_and_agrees_with_mlflow(trained: Trained) -> None:
    rows = journal(trained.folder)
    losses = {row["update"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert [row["update"] for row in rows if "train/loss" in row] == list(range(1, UPDATES + 1))
    assert trained.record.points["train/loss"] == [(n, losses[n]) for n in range(1, UPDATES + 1)]
    evaluated = [(row["update"], row["eval/loss"]) for row in rows if "eval/loss" in row]
    assert trained.record.points["eval/loss"] == evaluated


def test_configuration_journal_and_checkpoints_are_artifacts(trained: Trained) -> None:
    artifacts = trained.record.artifacts
    root = trained.base / "mlartifacts" / trained.record.run_id / "artifacts"
    assert {"config.yaml", "metrics.jsonl"} <= set(artifacts)
    assert (root / "metrics.jsonl").read_bytes() == (trained.folder / "metrics.jsonl").read_bytes()
    saved = OmegaConf.load(root / "config.yaml").accum
    assert (saved.strategy, saved.processes, saved.steps, saved.micro_batch_size) == ("standalone", 1, 4, 32)
    uploaded = [root / name for name in artifacts if name.startswith("checkpoints/")]
    kept = {load(path)["progress"]["update"] for path in (trained.folder / "checkpoints").glob("*.pt")}
    assert {load(path)["progress"]["update"] for path in uploaded} == kept
    assert UPDATES in kept


def test_evaluated_checkpoints_are_models_ranked_by_accuracy(trained: Trained) -> None:
    models = ranked_models(trained.base, trained.record)
    by_update = dict(trained.record.points["eval/accuracy"])
    ranking = [metrics["eval/accuracy"] for _, metrics in models]
    assert len(models) == 2  # checkpoints are kept of the last two epochs, one of them is the best
    assert ranking == sorted(ranking, reverse=True)
    for name, metrics in models:
        assert metrics["eval/accuracy"] == by_update[int(name.removeprefix("update-"))]


# evaluate ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluations(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """`evaluate` of sound and unsound checkpoints of the run."""
    base = tmp_path_factory.mktemp("evaluated")
    last = trained.folder / "checkpoints" / f"update-{UPDATES:08d}.pt"
    content = last.read_bytes()
    middle = len(content) // 2
    flipped = bytes(byte ^ 255 for byte in content[middle : middle + 256])
    unsound: dict[str, bytes] = {
        "damaged": content[:middle] + flipped + content[middle + 256 :],
        "truncated": content[:middle],
        "text": b"weights\n",
    }
    for name, written in unsound.items():
        (base / f"{name}.pt").write_bytes(written)
    torch.save({"weight": torch.zeros(2)}, base / "foreign.pt")
    arguments = {name: [f"checkpoint={base / name}.pt"] for name in (*unsound, "foreign")}
    arguments["last"] = [f"checkpoint={last}", "json=true"]
    arguments["best"] = [f"checkpoint={trained.folder}", "split=eval", "json=true"]
    arguments["for people"] = [f"checkpoint={trained.folder}"]
    arguments["unknown key"] = [f"checkpoint={last}", "data.rot=x"]
    arguments["other model"] = [f"checkpoint={last}", "model=lenet5"]
    arguments["other shape"] = [f"checkpoint={last}", "model.hidden=[8]"]
    cases = [Case("evaluate", given, str(base)) for given in arguments.values()]
    return dict(zip(arguments, run_many(cases, base / "scratch"), strict=True))


def test_evaluate_repeats_the_final_values_of_the_run(trained: Trained, evaluations: dict[str, Done]) -> None:
    done = evaluations["last"]
    values = json.loads(done.stdout)
    assert done.code == 0 and not done.stderr
    assert values["samples"] == 360
    for name in ("loss", "accuracy"):
        assert [(0, values[name])] == trained.record.points[f"final/{name}"]


def test_evaluate_of_a_folder_takes_the_best_checkpoint(
    trained: Trained, evaluations: dict[str, Done]
) -> None:
    values = json.loads(evaluations["best"].stdout)
    best = max(trained.record.points["eval/accuracy"], key=lambda point: point[1])
    assert values["checkpoint"] == str(trained.folder / "checkpoints" / "best.pt")
    assert values["split"] == "eval"
    assert values["accuracy"] == best[1]
    done = evaluations["for people"]
    assert done.code == 0
    assert "360 of the test split" in done.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("damaged", "damaged"),
        ("truncated", "damaged, or not a checkpoint"),
        ("text", "damaged, or not a checkpoint"),
        ("foreign", "of format None"),
    ],
)
def test_evaluate_of_an_unsound_checkpoint_is_one_line(
    name: str, says: str, evaluations: dict[str, Done]
) -> None:
    message = evaluations[name].error()
    assert f"{name}.pt: " in message
    assert says in message


@pytest.mark.parametrize(
    ("name", "says"),
    [("unknown key", "data.rot"), ("other model", "model=lenet5"), ("other shape", "does not fit")],
)
def test_evaluate_refuses_changes_that_are_not_of_the_run(
    name: str, says: str, evaluations: dict[str, Done]
) -> None:
    assert says in evaluations[name].error()
