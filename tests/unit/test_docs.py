"""docs/architecture.md names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b[a-z_]+(?:/[a-z_0-9]+)+\.py\b", ARCHITECTURE))))
def test_every_module_in_the_architecture_is_there(path: str) -> None:
    assert any((ROOT / folder / path).is_file() for folder in (".", "accumexp"))


def test_every_package_has_a_floor() -> None:
    table = ARCHITECTURE.partition("## From a configuration")[0]
    for part in (ROOT / "accumexp").glob("[a-z]*"):
        assert part.name in table, part.name
    for group in re.findall(r"`accumexp/conf/([a-z]+)/", ARCHITECTURE):
        assert (ROOT / "accumexp" / "conf" / group).is_dir(), group


def test_the_tutorial_shows_the_files_of_the_example() -> None:
    tutorial = (ROOT / "docs" / "tutorial.md").read_text()
    shown = re.findall(r'^```[a-z]+ title="(.*?)"\n(.*?)^```', tutorial, flags=re.DOTALL | re.MULTILINE)
    example = ROOT / "examples" / "own_project"
    assert all((example / name).read_text() == text for name, text in shown)
    files = {str(path.relative_to(example)) for path in example.rglob("*") if path.suffix in (".py", ".yaml")}
    assert {name for name in files if "__init__" not in name} == {name for name, _ in shown}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_every_page_is_in_the_navigation_and_its_links_lead_somewhere(page: Path) -> None:
    name = str(page.relative_to(ROOT / "docs"))
    assert re.search(rf": {re.escape(name)}$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE), name
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "first_steps.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}, timeout=120).execute()
    assert list(tmp_path.glob("multirun/**/report.html"))
