"""The model given back: by its folder, its run's id and its address in MLflow, as the summary scored it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import accumexp
from accumexp.config.trust import Trust
from accumexp.errors import UsageError
from accumexp.evaluate import evaluate
from accumexp.run import RunResult, run
from accumexp.run.spec import Resumed, all_overrides
from accumexp.tracking.run_folder import RunFolder
from accumexp.training.checkpoint import load as read
from accumexp.training.experiment import Experiment
from accumexp.training.logged_model import ArrayModel

from ..support import ragged

SMALL = ("tracking.system_metrics=false", "trainer.progress=false", "callbacks.monitor=null")
MLP = ("model=mlp", "device=cpu", "data.batch_size=256", "trainer.epochs=4")


# MLflow's own, of its imports and of what it calls in torch.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def uri(base: Path) -> str:
    return f"sqlite:///{base / 'mlflow.db'}"


@pytest.fixture
def store_of_mlflow(uri: str) -> Iterator[str]:
    """The store of these runs as MLflow's own functions use it."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def trained(base: Path, uri: str) -> RunResult:
    """A run whose best checkpoint is not its last: the rate is too large in its last epoch."""
    late = ("+callbacks.late._target_=tests.commands.test_load.Forget", "+callbacks.late.after=12")
    return run([*MLP, *SMALL, *late, f"tracking.uri={uri}"], folder=base / "run")


@pytest.fixture(scope="module")
def sequences(base: Path, uri: str) -> RunResult:
    return run(
        [*ragged.OVERRIDES, *SMALL, "trainer.epochs=2", f"tracking.uri={uri}"], folder=base / "sequences"
    )


class Forget(accumexp.Callback):
    """Halves the head after an update, so that the last model is not the best one."""

    def __init__(self, after: int) -> None:
        self.after = after

    def update_end(self, trainer: Any) -> None:
        if trainer.progress.update > self.after:
            with torch.no_grad():
                next(reversed(list(trainer.model.parameters()))).add_(torch.arange(10.0))


def accuracy(model: nn.Module) -> float:
    experiment = Experiment.build(model.accumexp_config)  # pyright: ignore[reportArgumentType]
    return experiment.evaluator(model, experiment.splits.test)["accuracy"]


def logged(result: RunResult, uri: str) -> dict[int, str]:
    """The addresses of a run's logged models, by update."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    models = client.search_logged_models(experiments, filter_string=f"source_run_id = '{result.run_id}'")
    return {int(model.name.removeprefix("update-")): f"models:/{model.model_id}" for model in models}


def test_last_and_best_are_what_the_run_scored(trained: RunResult, uri: str) -> None:
    final, best_scores = trained.metrics, trained.best_metrics
    assert best_scores["accuracy"] > final["accuracy"]
    assert trained.run_id
    for where in (trained.folder, trained.run_id):
        best, last = (accumexp.load(where, which, trust=["tests"], uri=uri) for which in ("best", "last"))
        assert accuracy(best) == best_scores["accuracy"] and accuracy(last) == final["accuracy"]
        assert not best.training and best.accumexp_config.seed == 0  # pyright: ignore
    assert evaluate(trained.run_id, "test", [f"tracking.uri={uri}"], True, ["tests"], "last")[
        "accuracy"
    ] == pytest.approx(final["accuracy"])


def test_the_log_has_the_summary_with_both_models(trained: RunResult) -> None:
    printed = [
        line.partition("console: ")[2] for line in (trained.folder / "run.log").read_text().split("\n")
    ]
    models = ("last", trained.metrics, "update-00000024.pt"), ("best", trained.best_metrics, "best.pt")
    for name, values, file in models:
        (at,) = [number for number, line in enumerate(printed) if line.startswith(f"  {name} model")]
        scores = [f"test {key} {values[key]:.4f}" for key in ("accuracy", "loss")]
        assert ", ".join(scores) in printed[at]
        assert "update " in printed[at + 1] and "eval accuracy 0." in printed[at + 1]
        assert printed[at + 2].strip() == str(trained.folder / "checkpoints" / file)


def test_a_single_run_keeps_its_overrides(trained: RunResult) -> None:
    overrides = json.loads((trained.folder / "summary.json").read_text())["overrides"]
    assert overrides[: len(MLP)] == list(MLP)
    path = trained.folder / "checkpoints" / "best.pt"
    again = all_overrides(
        RunFolder(trained.folder), ["resume=x", "trust=[a]", "seed=1"], Resumed.read(path, trust=Trust(True))
    )
    assert again == [*overrides, "seed=1"]


def test_the_summary_has_the_addresses_of_both_models(trained: RunResult, uri: str) -> None:
    printed = (trained.folder / "run.log").read_text()
    by_update = logged(trained, uri)
    best = read(trained.folder / "checkpoints" / "best.pt")["progress"]["update"]
    addresses = re.findall(r" (models:/m-\w+)$", printed, flags=re.MULTILINE)
    assert addresses == [by_update[max(by_update)], by_update[best]]


def test_a_run_whose_folder_is_gone_is_loaded_from_the_store(
    trained: RunResult, uri: str, tmp_path: Path
) -> None:
    shutil.move(trained.folder, tmp_path / "moved")
    try:
        for which, values in (("best", trained.best_metrics), ("last", trained.metrics)):
            model = accumexp.load(str(trained.run_id), which, trust=["tests"], uri=uri)  # pyright: ignore
            assert accuracy(model) == values["accuracy"]
    finally:
        shutil.move(tmp_path / "moved", trained.folder)


def test_mlflow_opens_every_logged_model(trained: RunResult, store_of_mlflow: str) -> None:
    import mlflow

    by_update = logged(trained, store_of_mlflow)
    best = read(trained.folder / "checkpoints" / "best.pt")["progress"]["update"]
    assert len(by_update) == 3 and best in by_update
    for update, address in by_update.items():
        model = mlflow.pytorch.load_model(address, trust=["tests"])  # pyright: ignore
        assert accuracy(accumexp.load(address, trust=["tests"])) == accuracy(model)
        if update in (best, max(by_update)):
            values = trained.best_metrics if update == best else trained.metrics
            assert accuracy(model) == values["accuracy"]
    function = mlflow.pyfunc.load_model(by_update[best], model_config={"trust": ["tests"]})
    example = function.input_example
    assert example is not None and function.metadata.signature.inputs.inputs[0].shape == (-1, 1, 32, 32)
    assert function.predict(example).shape == (1, 10)
    registered = mlflow.register_model(by_update[best], "digits")
    again = accumexp.load(f"models:/digits/{registered.version}", trust=["tests"])
    assert accuracy(again) == trained.best_metrics["accuracy"]


def test_checkpoints_are_stored_once(trained: RunResult, base: Path) -> None:
    files = [path.stat() for path in base.rglob("*.pt*") if path.stat().st_size > 10_000]
    kept = [path.stat().st_ino for path in (trained.folder / "checkpoints").glob("*.pt")]
    assert len({file.st_ino for file in files if file.st_ino in kept}) == len(set(kept))
    assert len([file for file in files if file.st_ino in kept]) > 2 * len(set(kept))


def test_a_model_of_own_classes_with_named_inputs_of_any_length(
    sequences: RunResult, store_of_mlflow: str
) -> None:
    import mlflow

    address = logged(sequences, store_of_mlflow)[max(logged(sequences, store_of_mlflow))]
    for opened in (accumexp.load, mlflow.pytorch.load_model, mlflow.pyfunc.load_model):  # pyright: ignore
        with pytest.raises(UsageError, match=r"no package that accumexp knows.*add trust=\[tests\]"):
            opened(address)
    model = mlflow.pytorch.load_model(address, trust=["tests"])  # pyright: ignore
    function = mlflow.pyfunc.load_model(address, model_config={"trust": "tests"})
    inputs = {"tokens": torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]), "mask": torch.ones(1, 11)}
    with torch.no_grad():
        expected = model(**inputs)
    predicted = function.predict({name: tensor.numpy() for name, tensor in inputs.items()})
    assert torch.equal(torch.from_numpy(predicted), expected)
    assert {spec.name for spec in function.metadata.signature.inputs} == {"tokens", "mask"}


def test_a_file_that_runs_code_is_not_unpickled(trained: RunResult, uri: str, tmp_path: Path) -> None:
    """What lies in the place of a logged model's checkpoint is read as data."""
    import pickle

    import mlflow

    class Runs:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    data = tmp_path / "data"
    data.mkdir()
    torch.save({"format": "accumexp checkpoint 1", "model": Runs()}, data / "model.pth")
    (data / "pickle_module_info.txt").write_text("accumexp.training.logged_model")
    flavor = {"pytorch": {"model_data": "data", "pytorch_version": torch.__version__}}
    (tmp_path / "MLmodel").write_text(json.dumps({"flavors": flavor}))
    with pytest.raises(pickle.UnpicklingError):
        mlflow.pytorch.load_model(str(tmp_path), trust=True)  # pyright: ignore
    assert not (tmp_path / "ran").exists()


def test_what_is_not_there_is_a_line(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=f"^{'0' * 32}: no such run in sqlite"):
        accumexp.load("0" * 32, uri=uri)
    with pytest.raises(UsageError, match="^models:/nothing/1: no such model in sqlite"):
        accumexp.load("models:/nothing/1", uri=uri)
    with pytest.raises(UsageError, match="^which=first: best or last"):
        accumexp.load("0" * 32, "first", uri=uri)  # pyright: ignore
    with pytest.raises(UsageError, match="^checkpoint nowhere: no such file or folder"):
        accumexp.load("nowhere")


def test_inputs_by_position_are_named_by_it() -> None:
    model = ArrayModel(nn.Bilinear(2, 3, 4), "cpu")
    inputs = {"input_0": torch.ones(5, 2).double().numpy(), "input_1": torch.ones(5, 3).numpy()}
    assert model.predict(inputs).shape == (5, 4)


def test_importing_accumexp_imports_no_torch() -> None:
    code = "import sys, accumexp; assert 'torch' not in sys.modules and 'load' in dir(accumexp)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert accumexp.Window.__module__ == "accumexp.accum.window"
    assert callable(accumexp.certify)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        accumexp.nothing  # noqa: B018  # pyright: ignore
