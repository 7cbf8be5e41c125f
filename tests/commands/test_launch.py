"""Runs of several processes by the real commands: started in every way, equal to one process, refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from accumexp.training.checkpoint import find

from ..support.command import Done, environment, journal, only_run, only_sweep, records, run_command
from ..support.experiments import composed, write_images
from ..support.launched import EXACT, SMALL, saved_weights
from ..support.reference import relative_error


def assert_equal_runs(run: Path, reference: Path) -> None:
    assert relative_error(saved_weights(run), saved_weights(reference)) <= 1e-9
    rows, expected = journal(run), journal(reference)
    assert [row["update"] for row in rows] == [row["update"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        shared = {k for k in other if k.startswith(("train/", "eval/"))}
        assert shared <= set(row)
        assert {k: row[k] for k in shared} == pytest.approx({k: other[k] for k in shared}, rel=1e-7)
    finals = [json.loads((folder / "summary.json").read_text())["final"] for folder in (run, reference)]
    for key in ("loss", "accuracy", "eval_loss", "eval_accuracy", "samples"):
        assert finals[0][key] == pytest.approx(finals[1][key], rel=1e-6), key


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_train_what_one_process_trains(tmp_path: Path, alone: Path, strategy: str) -> None:
    done = run_command("run", *EXACT, f"accum={strategy}", "accum.processes=2", folder=tmp_path)
    assert done.code == 0 and not done.stderr, done
    assert "on each of 2 ranks" in done.stdout and done.stdout.count("test accuracy") == 1
    run = only_run(tmp_path)
    assert_equal_runs(run, alone)
    (record,) = records(tmp_path)
    assert record.status == "FINISHED"
    assert record.params["accum.processes"] == "2" and record.params["accum.strategy"] == strategy
    assert record.points["eval/accuracy"][-1][0] == 2 * 13
    written = {entry.name for entry in run.iterdir()} - {"code.diff", "run.log", ".hydra"}
    assert written == {"checkpoints", "config.yaml", "metrics.jsonl", "summary.json"}
    assert {entry.name for entry in tmp_path.iterdir()} <= {
        "outputs", "mlflow.db", "mlflow.db.lock", "mlflow.db-shm", "mlflow.db-wal", "mlartifacts",
    }  # fmt: skip


def torchrun(*arguments: str, folder: Path, node: int = 0, nodes: int = 1, port: int = 0) -> Any:
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=1" if nodes > 1 else "--nproc-per-node=2",
    ]
    line += [
        f"--nnodes={nodes}",
        f"--node-rank={node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
    ]
    line += ["--rdzv-id=test", "-m", "accumexp.run", *arguments]
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        line, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    import socket

    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]


@pytest.mark.slow
def test_two_agents_of_torchrun_are_one_run(tmp_path: Path, alone: Path) -> None:
    """Two 'nodes' of one rank each, that only share a rendezvous and the folder they are started in."""
    port = free_port()
    agents = [
        torchrun(*EXACT, "accum=ddp", folder=tmp_path, node=node, nodes=2, port=port) for node in range(2)
    ]
    outputs = [agent.communicate(timeout=240) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("test accuracy" in out for out, _ in outputs) == 1, "one rank speaks"
    assert_equal_runs(only_run(tmp_path), alone)
    assert len(records(tmp_path)) == 1


@pytest.mark.slow
def test_shards_of_all_ranks_lie_in_the_first_ones_folder_under_torchrun(tmp_path: Path, alone: Path) -> None:
    agent = torchrun(*EXACT, "accum=fsdp", "tracking=none", folder=tmp_path)
    out, err = agent.communicate(timeout=240)
    assert agent.returncode == 0, (out, err)
    run = next(path.parent for path in tmp_path.glob("outputs/*/*/summary.json"))
    assert {part.name for part in find(run).with_suffix(".shards").iterdir()} == {
        ".metadata", "__0_0.distcp", "__1_0.distcp",
    }  # fmt: skip
    assert relative_error(saved_weights(run), saved_weights(alone)) <= 1e-9


@pytest.mark.slow
def test_a_sweep_under_torchrun_ends_with_its_first_failure(tmp_path: Path) -> None:
    """Ranks cannot go on to the next job when one of them may be gone."""
    options = [*SMALL, "accum=ddp", "trainer.max_updates=3", "trainer.clip_norm=0.1,-1,0.2"]
    agent = torchrun("-m", *options, folder=tmp_path)
    out, err = agent.communicate(timeout=240)
    assert agent.returncode == 1
    assert "trainer.clip_norm=-1" in err and "rank 1: error: trainer.clip_norm=-1" in err
    states = sorted((record.tags.get("accumexp.sweep", "job"), record.status) for record in records(tmp_path))
    assert states == [("job", "FINISHED"), ("true", "FAILED")], (states, out, err)
    jobs = sorted(path.parent.name for path in only_sweep(tmp_path).glob("*/summary.json"))
    assert [name[0] for name in jobs] == ["0", "1"]


def test_bad_input_found_by_the_ranks_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_command("run", *SMALL, "accum=ddp", "accum.processes=2", "+model.depth=3", folder=tmp_path)
    assert "model (accumexp.models.MLP)" in done.error() and "depth" in done.error()
    assert not list(tmp_path.glob("outputs/*/*")) and not (tmp_path / "mlflow.db").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_ranks_on_a_device_that_is_not_there_are_one_line(tmp_path: Path) -> None:
    done = run_command("run", *SMALL, "accum=ddp", "accum.processes=2", "device=cuda", folder=tmp_path)
    assert done.error().startswith("device=cuda")


@pytest.mark.slow
def test_joblibs_workers_start_ranks_of_their_own(tmp_path: Path) -> None:
    options = [
        *SMALL,
        "accum=ddp_loss_scaled",
        "accum.processes=2",
        "precision=fp32",
        "trainer.max_updates=4",
    ]
    parallel = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1"]
    done = run_command("run", "-m", *options, *parallel, folder=tmp_path)
    assert done.code == 0, done
    states = [(r.params.get("accum.processes"), r.status) for r in records(tmp_path)]
    assert sorted(states, key=str) == [("2", "FINISHED"), ("2", "FINISHED"), (None, "FINISHED")]


@pytest.mark.slow
def test_the_tasks_of_a_cluster_job_are_the_ranks(tmp_path: Path) -> None:
    """submitit's local executor starts the tasks as Slurm would: one process a rank."""
    pytest.importorskip("submitit")
    options = ["accum.steps=0,2", *SMALL, "accum=ddp", "trainer.max_updates=4"]
    tasks = [
        "hydra/launcher=submitit_local",
        "hydra.launcher.tasks_per_node=2",
        "hydra.launcher.cpus_per_task=3",
        "hydra.launcher.timeout_min=5",
    ]
    done: Done = run_command("run", "-m", *options, *tasks, folder=tmp_path)
    assert done.code == 1, done
    head, failed, *how = done.stderr.splitlines()
    assert how[0] == "go on with"
    assert head == "error: 1 of 2 jobs failed" and failed.endswith("accum.steps=0: at least 1")
    child, parent = sorted(records(tmp_path), key=lambda record: "accumexp.sweep" in record.tags)
    assert (child.status, parent.status) == ("FINISHED", "FAILED")
    assert child.tags["mlflow.parentRunId"] == parent.run_id
    assert (child.params["accum.processes"], child.params["trainer.threads"]) == ("2", "3")
    for record in (child, parent):
        assert record.tags["accumexp.command"].startswith(
            "python -m accumexp.run -m accum.steps=0,2 model=mlp"
        )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["accum.processes=2"], "accum.processes=2: this strategy is one process, take accum=ddp or fsdp"),
        (["accum=ddp", "accum.processes=0"], "accum.processes=0: at least 1"),
        (["accum=ddp", "accum.processes=8", "data.batch_size=4"], "at most accum.processes=4"),
        (["accum=ddp", "accum.processes=3", "accum.steps=50"], "on each of 3 processes than samples"),
        (["precision=fp16"], "precision=fp16: needs a loss scale"),
        (["accum=loss_scaled", "param_precision=fp16"], "param_precision=fp16"),
        (["accum=fsdp", "accum.fp32_buffers=true"], "accum.fp32_buffers=true"),
        (["accum=ddp", "accum.reduce_every_micro_batch=true"], "accum.reduce_every_micro_batch=true"),
        (["accum=ddp", "device=cuda:1", "accum.processes=2"], "device=cuda:1"),
        (["accum=loss_scaled", "accum.growth_interval=0"], "accum.growth_interval=0"),
    ],
)  # fmt: skip
def test_what_ranks_and_scales_cannot_be_is_said_by_key(overrides: list[str], expected: str) -> None:
    from accumexp.errors import UsageError

    with pytest.raises(UsageError) as error:
        composed(*overrides)
    assert expected in str(error.value)


def test_sizes_follow_from_each_other_over_ranks() -> None:
    config = composed("accum=ddp", "accum.processes=2", "accum.micro_batch_size=16", "accum.steps=4")
    assert config.data.batch_size == 128
    config = composed("accum=ddp", "accum.processes=4", "accum.micro_batch_size=16", "data.batch_size=101")
    assert (config.accum.steps, config.accum.micro_batch_size) == (2, 13)
    assert composed("accum=ddp", "accum.processes=2").accum.processes == 2


@pytest.mark.slow
def test_the_tutorials_resnet50_trains_on_two_ranks(tmp_path: Path) -> None:
    """At a small size, on generated images; its BatchNorms make it unequal, which it says."""
    write_images(tmp_path / "images", {"train": 8, "test": 2})
    sizes = ["data.image_size=32", "accum.steps=3", "accum.micro_batch_size=2", "accum.processes=2"]
    options = [
        "data=image_folder",
        f"data.root={tmp_path / 'images'}",
        "data.num_classes=2",
        "data.workers=1",
        "data.eval_fraction=0",
        "monitor=test/accuracy",
    ]
    done = run_command(
        "run",
        "experiment=tutorial_resnet50",
        *options,
        *sizes,
        "device=cpu",
        "trainer.epochs=1",
        folder=tmp_path,
    )
    assert done.code == 0, done
    assert (
        "resnet50 on 16 samples, 2 updates of 12 samples in 3 micro-batches of 2 on each of 2" in done.stdout
    )
    assert "not the larger batch: bn1 (BatchNorm2d): batch statistics over 2 of 12 samples" in done.stdout
    (record,) = records(tmp_path)
    assert (record.status, record.params["accum.reduction"]) == ("FINISHED", "sum")
    assert [update for update, _ in record.points["test/accuracy"]] == [2]
