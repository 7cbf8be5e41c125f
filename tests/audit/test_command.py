"""`python -m accumexp.audit`: verdicts, exit codes, pages, and one line for what it cannot do."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..support.command import records, run_command

DOCS = Path(__file__).resolve().parents[2] / "docs"
USER_MODULE = '''
import torch
from torch import nn


def fit(watch, steps, micro, divide=True):
    """A loop as many are written, of 88 samples: the last window of an epoch has 3 micro-batches."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(88, 6, generator=generator, dtype=watch.dtype)
    labels = torch.randint(0, 3, (88,), generator=generator)
    torch.manual_seed(0)
    model = watch(nn.Linear(6, 3).to(watch.dtype))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        batches = list(zip(inputs.split(micro), labels.split(micro)))
        for number, (x, y) in enumerate(batches, 1):
            in_window = steps
            if divide and number > len(batches) // steps * steps:
                in_window = len(batches) % steps
            (nn.functional.cross_entropy(model(x), y) / in_window).backward()
            if number % steps == 0 or number == len(batches):
                optimizer.step()
                optimizer.zero_grad()


def always_by_steps(watch, steps, micro):
    fit(watch, steps, micro, divide=False)


def unwatched(watch, steps, micro):
    pass
'''


@pytest.fixture
def training_folder(tmp_path: Path) -> Path:
    (tmp_path / "my_training.py").write_text(USER_MODULE)
    return tmp_path


def test_an_own_loop_that_is_the_larger_batch_is_equal(training_folder: Path) -> None:
    done = run_command("audit", "my_training:fit", folder=training_folder)
    assert done.code == 0, done
    assert "equal" in done.stdout and "proved" in done.stdout


def test_an_own_loop_that_is_not_exits_with_1_and_its_cause(training_folder: Path) -> None:
    done = run_command(
        "audit", "my_training:always_by_steps", "--folder", "kept", "--mlflow", folder=training_folder
    )
    assert done.code == 1, done
    assert "0.75 times the larger batch's" in done.stdout
    certificate = json.loads((training_folder / "kept" / "certificate.json").read_text())
    assert certificate["verdict"] == "not proved"
    assert "0.75" in (training_folder / "kept" / "certificate.html").read_text()
    (record,) = records(training_folder)
    assert "0.75" in record.tags["accumexp.certificate"] and "certificate.html" in record.artifacts


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("my_training:missing",), "my_training:missing: my_training has no function missing"),
        (("no_such_module:fit",), "no_such_module:fit: no module no_such_module in this folder"),
        (("nobody",), "nobody: no trainer of this name; there are accelerate, accumexp,"),
        (("accumexp", "setting=causal_lm"), "setting=causal_lm: accumexp cannot do it; it can do classes,"),
        (("accumexp", "setting=none"), "setting=none: no such choice, setting is one of bf16,"),
        (("accumexp", "setting.sample=8"), "setting.sample: no such key, did you mean setting.samples?"),
        (("accumexp", "steps=0"), "steps=0: a whole number of at least 1"),
        (("my_training:fit", "setting=classes"), "setting=classes: settings are of the project's trainers"),
        (("accumexp", "classes"), "classes: one trainer, all, or module:function; others are key=value"),
    ],
)
def test_bad_input_is_one_line(training_folder: Path, arguments: tuple[str, ...], line: str) -> None:
    assert run_command("audit", *arguments, folder=training_folder).error().startswith(line)


def test_a_trainer_that_cannot_be_watched_exits_with_2(training_folder: Path) -> None:
    done = run_command("audit", "my_training:unwatched", folder=training_folder)
    assert done.code == 2 and "not audited" in done.stdout, done
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.skipif(find_spec("ignite") is not None, reason="pytorch-ignite is installed")
def test_a_trainer_that_is_not_installed_is_one_line(tmp_path: Path) -> None:
    error = run_command("audit", "ignite", folder=tmp_path).error()
    assert error == "ignite: needs the package ignite; pip install pytorch-ignite"


def test_every_setting_of_accumexp_is_equal(tmp_path: Path) -> None:
    done = run_command("audit", "accumexp", "--write", "page.md", "--json", "cells.json", folder=tmp_path)
    assert done.code == 0, done
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert {cell["verdict"] for cell in cells} == {"equal"} and len(cells) >= 10
    page = (tmp_path / "page.md").read_text()
    assert "Two processes, each with its share of the samples | equal |" in page and "Nothing." in page


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_the_transformers_trainer_is_not_the_larger_batch_of_sequence_classification(tmp_path: Path) -> None:
    settings = "setting=sequence_classification,causal_lm"
    done = run_command("audit", "transformers", settings, "--json", "cells.json", folder=tmp_path)
    assert done.code == 1, done
    sequences, causal = json.loads((tmp_path / "cells.json").read_text())
    assert sequences["verdict"] == "not equal" and "4 times the larger batch's" in sequences["lines"][0]
    assert causal["verdict"] == "equal", causal


@pytest.mark.slow
def test_all_installed_trainers_are_audited_as_the_matrix_says(tmp_path: Path) -> None:
    done = run_command("audit", "all", "--write", "matrix.md", folder=tmp_path)
    assert done.code == 1, done  # transformers is installed for the tests
    matrix = json.loads((DOCS / "audit.json").read_text())
    expected = {(cell["trainer"], cell["version"], cell["setting"]): cell["verdict"] for cell in matrix}
    cells = json.loads((tmp_path / "matrix.json").read_text())
    assert {"accumexp", "accelerate", "transformers"} <= {cell["trainer"] for cell in cells}
    other = {
        place: cell["verdict"]
        for cell in cells
        if cell["verdict"]
        != expected.get(place := (cell["trainer"], cell["version"], cell["setting"]), cell["verdict"])
    }
    assert other == {}
    assert not any(cell["verdict"] == "not audited" for cell in cells)
