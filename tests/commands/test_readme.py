"""README holds: its loop runs, its commands compose, its tree is the tree, its numbers of laws have tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from ..support.experiments import composed

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCS = (ROOT / "docs" / "several_machines.md").read_text()
COMMANDS = re.findall(
    r"^python -m accumexp\.(?:run|prove|plan) (.*?)(?:\s+#.*)?$", README + DOCS, flags=re.MULTILINE
)


def test_the_loop_in_readme_trains(capsys: pytest.CaptureFixture[str]) -> None:
    loop, continued, *_ = re.findall(r"```python[ a-z]*\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(loop, "README.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(re.fullmatch(r"loss \d\.\d+ over 100 samples", line) for line in lines)
    before = names["model"].weight.clone()
    exec(compile(continued, "README.md", "exec"), names)
    assert not torch.equal(before, names["model"].weight) and int(names["window"].loss_scale.skipped) == 0


def test_the_loop_in_readme_is_not_certified_as_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    *_, loop, _ = re.findall(r"```python[ a-z]*\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(loop, "README.md", "exec"), {})
    (line,) = capsys.readouterr().out.splitlines()
    assert line in README.splitlines() and line.startswith("not proved")
    exec(compile(loop.replace("/ steps", "* len(y) / len(batch[1])"), "README.md", "exec"), {})
    assert capsys.readouterr().out == "proved\n"


def test_the_trainer_in_readme_is_audited_as_readme_says(capsys: pytest.CaptureFixture[str]) -> None:
    *_, loop, trainer = re.findall(r"```python[ a-z]*\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(loop, "README.md", "exec"), names)
    capsys.readouterr()
    exec(compile(trainer, "README.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line in README.splitlines() for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_in_readme_composes(command: str) -> None:
    overrides = [word for word in shlex.split(command) if "=" in word and "my_package" not in word]
    if overrides[0].startswith(("resume=", "sweep.resume=")):
        return
    single = [re.sub(r"^(accum\.steps|seed)=([^,]*),.*", r"\1=\2", word) for word in overrides]
    assert composed(*[word for word in single if not word.startswith("hydra")]).accum.steps


def test_readme_names_what_there_is() -> None:
    assert len(COMMANDS) >= 8
    tree = README.partition("## Where things are")[2]
    for name in re.findall(r"\b([a-z_]+\.py|[a-z]+/)", tree):
        path = name.rstrip("/")
        assert any((ROOT / folder / path).exists() for folder in (".", "accumexp")), name
    for part in (ROOT / "accumexp").glob("[a-z]*"):
        assert part.name in tree, part.name
    for group in (path.name for path in (ROOT / "accumexp" / "conf").iterdir() if path.is_dir()):
        if group in ("hydra", "trainer"):
            continue
        (row,) = re.findall(rf"^\| `{group}` \|(.*)\|$", README, flags=re.MULTILINE)
        for choice in (ROOT / "accumexp" / "conf" / group).glob("*.yaml"):
            assert f"`{choice.stem}`" in row, f"{group}={choice.stem}"


def test_every_law_in_readme_has_a_test_that_bears_its_number() -> None:
    laws = set(
        re.findall(r"^(\d+)\. ", README.partition("## The laws")[2].partition("\n## ")[0], flags=re.MULTILINE)
    )
    assert laws == {str(law) for law in range(1, 11)}
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for law in laws:
        assert re.search(rf"def test_law_{law}_", tests), law
