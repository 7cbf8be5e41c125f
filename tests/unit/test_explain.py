"""Errors of a composition, in the user's own files too: one line with the key or file, and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from yaml import YAMLError

from accumexp.conf import conf_dir
from accumexp.config.explain import explain

GLOBAL = "# @package _global_\n"
EXPERIMENT = GLOBAL + "defaults:\n  - override /model: null\nmodel: {_target_: mine.Model, width: 3}\n"


def explained(*overrides: str, files: Path | None = None) -> str:
    search_path = [] if files is None else [f"hydra.searchpath=[file://{files}]"]
    with (
        pytest.raises((HydraException, YAMLError)) as raised,
        initialize_config_dir(conf_dir(), version_base="1.3"),
    ):
        compose("config", [*search_path, *overrides])
    line = explain(raised.value)
    assert "\n" not in line
    return line


def written(folder: Path, content: str) -> Path:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("model=mlp", "model.hiden=3"),
            "model.hiden: no such key, did you mean model.hidden? (++",
        ),
        (
            ("optimizer=adam", "optimizer.beta=3"),
            "optimizer.beta: no such key, did you mean optimizer.betas?",
        ),
        (("modle=mlp",), "modle: no such key, did you mean mode?"),
        (("foo.bar=1",), "foo: no such key, the configuration has accum, callbacks, data, device, loss"),
        (("experiment=mine",), "experiment=mine: no such choice, experiment is one of batch_size_question"),
    ],
)
def test_a_key_is_compared_with_those_of_the_composed_configuration(
    overrides: tuple[str, ...], says: str
) -> None:
    assert explained(*overrides).startswith(says)


def test_a_key_is_compared_with_those_of_the_users_own_files(tmp_path: Path) -> None:
    line = explained("experiment=mine", "model.widht=3", files=written(tmp_path, EXPERIMENT))
    assert line.startswith("model.widht: no such key, did you mean model.width?")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            GLOBAL + "accum: {step: 4}",
            "accum.step: no such key, did you mean accum.steps?",
        ),
        (
            GLOBAL + "trainer: {epochs: many}",
            "trainer.epochs: Value 'many' of type 'str' could not be converted to Integer",
        ),
        (
            GLOBAL + "defaults:\n  - override /modle: mlp",
            "modle: no such key, did you mean model?",
        ),
    ],
)
def test_a_wrong_key_in_a_file_has_its_whole_path(content: str, says: str, tmp_path: Path) -> None:
    assert (
        explained("experiment=mine", files=written(tmp_path, content)) == f"{says} (in experiment/mine.yaml)"
    )


@pytest.mark.parametrize("content", ["accum: {steps: 4}", EXPERIMENT.removeprefix(GLOBAL)])
def test_a_file_without_a_package_line_is_told_of_it(content: str, tmp_path: Path) -> None:
    line = explained("experiment=mine", files=written(tmp_path, content))
    assert line.startswith("experiment/mine.yaml: ") and line.endswith("with the line # @package _global_")


def test_a_file_that_is_no_yaml_is_named_with_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = explained("experiment=mine", files=written(tmp_path, EXPERIMENT + "accum: {steps: 4\nseed: 3\n"))
    assert line.startswith("experiment/mine.yaml, line 6: expected ',' or '}', but got ':'")
    assert line.endswith("that begins in line 5")


def test_a_choice_that_is_not_there_leads_to_the_option_for_own_files() -> None:
    line = explained("model=mine")
    assert line.endswith("; for a file of your own add --config-dir=<the folder with model/mine.yaml>")
