"""README and the pages of docs/ hold: their code runs, their commands compose, they name what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from accumexp.conf import conf_dir

from ..support.command import environment
from ..support.experiments import composed
from ..support.forked import forked

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "own_project"
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
PAGES["README.md"] = README
COMMANDS = sorted(
    {
        command
        for text in PAGES.values()
        for command in re.findall(
            r"^python -m accumexp\.(?:run|prove|plan) (.*?)(?:\s+#.*)?$", text, flags=re.MULTILINE
        )
    }
)


def code(text: str) -> list[str]:
    """The Python blocks of a page, without those that show a file, which have a title."""
    return re.findall(r"^```python *\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def run_blocks(name: str, blocks: list[str]) -> None:
    names = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, name, "exec"), names)


WITH_CODE = {name for name, text in PAGES.items() if code(text)}
IN_README = {name for name in WITH_CODE - {"README.md"} if {*code(PAGES[name])} <= {*code(README)}}


@pytest.mark.parametrize("name", sorted(WITH_CODE - IN_README))
def test_the_code_of_a_page_runs_and_its_verdicts_are_as_the_page_says(name: str, tmp_path: Path) -> None:
    env = environment(EXAMPLE)
    exit_code, stdout, stderr = forked(
        run_blocks, name, code(PAGES[name]), folder=tmp_path, env=env, seconds=120
    )
    assert exit_code == 0, (stdout, stderr)
    verdicts = [line for line in stdout.splitlines() if line.startswith(("proved", "not proved"))]
    assert all(line in PAGES[name].splitlines() for line in verdicts), verdicts
    if name == "README.md":
        assert len(verdicts) == 2
        losses = [line for line in stdout.splitlines() if line.startswith("loss")]
        assert [line.partition(" over ")[2] for line in losses] == ["100 samples", "28 samples"]


def test_pages_with_the_code_of_readme_have_its_verdicts() -> None:
    assert {"docs/index.md", "docs/certificates.md"} <= IN_README
    for name in IN_README:
        verdicts = re.findall(r"^not proved: the gradient .*$", PAGES[name], flags=re.MULTILINE)
        assert len(verdicts) == len(code(PAGES[name])), name
        assert all(line in README.splitlines() for line in verdicts), name


def test_the_loop_in_readme_is_proved_once_its_division_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks("README.md", [code(README)[0].replace("/ steps", "* len(y) / len(batch[1])")])
    assert capsys.readouterr().out == "proved\n"


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_a_page_composes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    overrides = [word for word in shlex.split(command) if "=" in word and "my_" not in word]
    if any(word.startswith(("resume=", "sweep.resume=")) for word in overrides):
        return
    single = [re.sub(r"^(accum\.steps|seed)=([^,]*),.*", r"\1=\2", word) for word in overrides]
    kept = [word for word in single if not word.startswith("hydra") or word.startswith("hydra.searchpath")]
    assert composed(*kept).accum.steps


def test_the_experiment_in_readme_composes(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    overrides = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine", "accum.steps=4"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("config", overrides)
    assert dict(config.model) == {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2}
    assert config.data.batch_size == 64 and set(config.data.train) == {"_target_", "train"}


def test_the_documentation_names_what_there_is() -> None:
    assert len(COMMANDS) >= 20
    tree = PAGES["docs/architecture.md"].partition("## Where things are")[2].split("```")[1]
    for name in re.findall(r"\b([a-z_]+\.py|[a-z]+/)", tree):
        path = name.rstrip("/")
        assert any((ROOT / folder / path).exists() for folder in (".", "accumexp")), name
    for part in (ROOT / "accumexp").glob("[a-z]*"):
        assert part.name in tree, part.name
    for group in (path.name for path in (ROOT / "accumexp" / "conf").iterdir() if path.is_dir()):
        if group in ("hydra", "trainer", "__pycache__"):
            continue
        page = PAGES["docs/configuration.md"]
        (row,) = re.findall(rf"^\| `{group}` \|(.*)\|$", page, flags=re.MULTILINE)
        for choice in (ROOT / "accumexp" / "conf" / group).glob("*.yaml"):
            assert f"`{choice.stem}`" in row, f"{group}={choice.stem}"


def test_every_law_has_a_test_that_bears_its_number() -> None:
    section = PAGES["docs/concepts.md"].partition("## The laws")[2].partition("\n## ")[0]
    laws = re.findall(r"^(\d+)\. ", section, flags=re.MULTILINE)
    assert laws == [str(law) for law in range(1, 13)]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for law in laws:
        assert re.search(rf"def test_law_{law}_", tests), law
