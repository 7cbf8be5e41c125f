"""The commands from the command line: help, bad input, a run and what it records, a saved model."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from accumexp.conf import conf_dir
from accumexp.config.loading import from_hydra
from accumexp.environment.code_version import code_version
from accumexp.training.checkpoint import load

from ..support.command import (
    Case,
    Done,
    Record,
    environment,
    journal,
    left_behind,
    only_run,
    only_sweep,
    ranked_models,
    record_of,
    records,
    run_command,
    run_many,
)

UPDATES_AN_EPOCH = 11  # 1,293 digits in batches of 128
UPDATES = 3 * UPDATES_AN_EPOCH
CONF = Path(conf_dir())
CHOICES = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem)
    for path in CONF.rglob("*.yaml")
    if path.parent != CONF
)


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    """Hydra's compose with the commands' own configuration."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield lambda *overrides, **options: compose("config", list(overrides), **options)


# --help ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "evaluate", "report", "prove"])
def test_help_imports_none_of_the_slow_packages(command: str, tmp_path: Path) -> None:
    done = run_command(command, "--help", folder=tmp_path, flags=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.code == 0
    assert f"python -m accumexp.{command}" in done.stdout
    assert "accumexp" in imported
    assert imported.isdisjoint(
        {"torch", "torchvision", "torchmetrics", "mlflow", "sklearn", "scipy", "matplotlib"}
    )
    assert left_behind(tmp_path) == []


def test_a_run_imports_no_package_that_it_does_not_use(tmp_path: Path) -> None:
    quick = ("device=cpu", "tracking=none", "trainer.max_updates=1")
    done = run_command("run", *quick, folder=tmp_path, flags=["-X", "importtime"])
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.code == 0 and "torch" in imported
    assert imported.isdisjoint({"torchvision", "torchmetrics", "transformers", "mlflow", "matplotlib"})


def test_no_file_of_the_project_sets_what_hydra_would_compose_twice_for() -> None:
    files = [yaml.safe_load(path.read_text()) for path in CONF.rglob("*.yaml")]
    assert len(files) > 30
    assert not [content for content in files if "mode" in ((content or {}).get("hydra") or {})]


@pytest.mark.slow
def test_a_mode_given_to_hydra_counts(tmp_path: Path) -> None:
    quick = ("model=mlp", "device=cpu", "tracking=none", "trainer.max_updates=1", "report.write=false")
    done = run_command("run", *quick, "hydra.mode=MULTIRUN", folder=tmp_path)
    assert done.code == 0 and only_sweep(tmp_path).is_dir(), done


# Bad input ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A bad command line, and what its one line must say."""

    arguments: list[str]
    says: list[str]
    command: str = "run"


BAD = {
    "unknown key": Bad(["trainer.epoch=2"], ["trainer.epoch:", "did you mean trainer.epochs?"]),
    "unknown key with +": Bad(["+accum.stpes=2"], ["accum.stpes:", "did you mean accum.steps?"]),
    "unknown key of a class": Bad(
        ["optimizer.lrr=2"], ["optimizer.lrr:", "did you mean optimizer.lr? (++optimizer.lrr=... adds it)"]
    ),
    "unknown group": Bad(["modle=mlp"], ["modle:", "no such key"]),
    "unknown top-level key with +": Bad(["+sede=2"], ["sede:", "did you mean seed?"]),
    "unknown choice": Bad(["model=lenet6"], ["model=lenet6", "lenet5, mlp, resnet18"]),
    "unknown experiment": Bad(
        ["experiment=none"], ["experiment=none", "batch_size_question, contrastive, equal_batch"]
    ),
    "wrong type": Bad(["trainer.epochs=many"], ["trainer.epochs=many", "Integer"]),
    "fraction for a count": Bad(["accum.steps=1.5"], ["accum.steps=1.5", "a whole number, or auto"]),
    "unknown enum member": Bad(["precision=fp8"], ["precision=fp8", "fp32, bf16"]),
    "null where a value is needed": Bad(["seed=null"], ["seed=null"]),
    "no steps": Bad(["accum.steps=0"], ["accum.steps=0", "at least 1"]),
    "negative batch": Bad(["data.batch_size=-1"], ["data.batch_size=-1", "at least 1"]),
    "batch that cannot be split": Bad(
        ["data.batch_size=4", "accum.steps=8"],
        ["accum.steps=8", "data.batch_size=4", "at most accum.steps=4"],
    ),
    "three sizes that disagree": Bad(
        ["data.batch_size=128", "accum.steps=4", "accum.micro_batch_size=16"],
        ["accum.micro_batch_size=16", "data.batch_size=128", "accum.steps=4", "which give 32"],
    ),
    "no checkpoint to resume": Bad(["resume=nowhere"], ["resume=nowhere", "no such file or folder"]),
    "resume of a sweep": Bad(["-m", "resume=nowhere"], ["resume", "-m"]),
    "data that cannot be downloaded": Bad(
        ["data=mnist", "data.root=nowhere"], ["data.root=nowhere", "data.train", "connection"]
    ),
    "folder of images that is not there": Bad(
        ["data=image_folder", "data.root=nowhere"], ["data.root=nowhere", "data.train", "nowhere/train"]
    ),
    "no folder for the store": Bad(
        ["tracking.uri=sqlite:////nowhere/mlflow.db"], ["tracking.uri=", "/nowhere"]
    ),
    "bad target": Bad(["model._target_=torch.nn.Nothing"], ["model._target_=torch.nn.Nothing"]),
    "target of no package": Bad(["optimizer._target_=nowhere.Adam"], ["optimizer._target_=nowhere.Adam"]),
    "target that refuses its arguments": Bad(
        ["+loss.smooth=1"], ["loss (torch.nn.CrossEntropyLoss)", "smooth"]
    ),
    "unknown monitor": Bad(["monitor=eval/f1"], ["monitor=eval/f1", "eval/accuracy, eval/loss"]),
    "unknown device": Bad(["device=abacus"], ["device=abacus", "auto, cpu, cuda"]),
    "values of a sweep without -m": Bad(["accum.steps=1,2"], ["accum.steps=1,2", "--multirun"]),
    "typo in a sweep": Bad(["-m", "accum.stps=1,2"], ["accum.stps:", "did you mean accum.steps?"]),
    "no checkpoint to evaluate": Bad(
        ["checkpoint=nowhere"], ["checkpoint nowhere", "no such file or folder"], "evaluate"
    ),
    "no checkpoint named": Bad([], ["checkpoint", "give checkpoint="], "evaluate"),
    "no key": Bad(["outputs"], ["outputs", "key=value"], "evaluate"),
    "unknown split": Bad(["checkpoint=x", "split=train"], ["split=train", "test or eval"], "evaluate"),
}


@pytest.fixture(scope="module")
def bad_input(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Done, Path]]:
    """The end of every command line of `BAD`, and the folder it was started in."""
    base = tmp_path_factory.mktemp("bad")
    folders = [base / str(number) for number in range(len(BAD))]
    cases = [Case(bad.command, bad.arguments, str(f)) for bad, f in zip(BAD.values(), folders, strict=True)]
    done = run_many(cases, base / "scratch")
    return dict(zip(BAD, zip(done, folders, strict=True), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line_that_names_the_key_and_leaves_nothing(
    name: str, bad_input: dict[str, tuple[Done, Path]]
) -> None:
    done, folder = bad_input[name]
    message = done.error()
    for part in BAD[name].says:
        assert part in message
    assert left_behind(folder) == []


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        pytest.param(
            "tracking.uri=http://127.0.0.1:9",
            "tracking.uri=http://127.0.0.1:9: no server answers",
            marks=pytest.mark.slow,
        ),
        ("trainer.epoch=2", "trainer.epoch: no such key, did you mean trainer.epochs?"),
    ],
)
def test_bad_input_ends_a_process_of_its_own_in_one_line(argument: str, says: str, tmp_path: Path) -> None:
    done = run_command("run", argument, folder=tmp_path, fresh=True)
    assert says in done.error()
    assert left_behind(tmp_path) == []


def test_hydra_full_error_adds_the_traceback(tmp_path: Path) -> None:
    env = environment(HYDRA_FULL_ERROR="1")
    done = run_command("run", "accum.steps=0", folder=tmp_path, env=env, fresh=True)
    assert done.code == 2
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: accum.steps=0: at least 1"


def test_bad_input_to_a_resume_deletes_no_files_of_the_user(tmp_path: Path) -> None:
    kept = [tmp_path / "mine" / name for name in ("thesis.txt", "models/foreign.pt", "plain/model.pt")]
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not a checkpoint")
    cases = [
        Case("run", [f"resume={kept[1]}"], str(tmp_path / "a")),
        Case("run", [f"resume={kept[2].parent}"], str(tmp_path / "b")),
        Case("run", ["resume=foreign.pt"], str(kept[1].parent)),
    ]
    for done in run_many(cases, tmp_path / "scratch"):
        assert "checkpoint" in done.error()
        assert [path.read_text() for path in kept if path.exists()] == ["not a checkpoint"] * 3


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


# What users bring --------------------------------------------------------------------------------------

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


# Configurations ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda value: value)
def test_every_choice_composes_to_a_configuration_whose_targets_exist(
    group: str, choice: str, composed: Callable[..., DictConfig]
) -> None:
    from hydra.utils import get_object

    # Text has no channels for the default model, and digits no length for this one.
    companion = {"text": ["model=bert"], "bert": ["data=text"]}.get(choice, [])
    cfg = composed(f"{group}={choice}", *companion, return_hydra_config=True)
    assert cfg.hydra.runtime.choices[group] == choice
    config = from_hydra(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]))
    nodes = [config.model, config.loss, config.optimizer, config.scheduler, *config.callbacks.values()]
    nodes += [*config.metrics.values(), config.data.train, config.data.test]
    nodes += [node for node in (config.data.eval, config.data.transform, config.data.augment) if node]
    for target in (str(target) for node in nodes for target in targets(node)):
        assert callable(get_object(target)), target


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def test_the_default_configuration_is_one_step_of_digits(composed: Callable[..., DictConfig]) -> None:
    config = from_hydra(composed())
    assert config.data.train["_target_"] == "accumexp.data.Digits"
    assert (config.accum.steps, config.data.batch_size, config.accum.micro_batch_size) == (1, 128, 128)
    assert config.accum.reduction.name == "mean"


def test_tutorial_lenet_is_the_tutorials_run(composed: Callable[..., DictConfig]) -> None:
    config = from_hydra(composed("experiment=tutorial_lenet"))
    assert (config.accum.steps, config.accum.micro_batch_size, config.data.batch_size) == (4, 32, 128)
    assert config.accum.reduction.name == "sum"
    assert config.optimizer["_target_"] == "torch.optim.SGD"
    assert (config.optimizer["lr"], config.optimizer["momentum"]) == (0.01, 0.9)
    assert config.trainer.epochs == 10
    assert config.model["_target_"] == "accumexp.models.LeNet5"
    assert config.data.train["_target_"] == "torchvision.datasets.MNIST"
    assert config.loss["_target_"] == "torch.nn.CrossEntropyLoss"


def test_tutorial_lenet_trains_on_mnist_files_that_are_there(tmp_path: Path) -> None:
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, samples in (("train", 300), ("t10k", 60)):
        images = generator.integers(0, 256, (samples, 28, 28), np.uint8)
        labels = generator.integers(0, 10, samples, np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (raw / f"{split}-{name}-ubyte").write_bytes(head + array.tobytes())
    done = run_command(
        "run",
        *("experiment=tutorial_lenet", f"data.root={tmp_path / 'mnist'}", "trainer.epochs=1"),
        "tracking=none",
        folder=tmp_path,
    )
    assert done.code == 0, done
    assert "LeNet5 on 270 samples, 3 updates of 128 samples in 4 micro-batches of 32" in done.stdout
    final = json.loads((only_run(tmp_path) / "summary.json").read_text())["final"]
    assert (final["updates"], final["samples"]) == (3, 270)
