"""What `resume=` finds in a run's folder, refuses of it, and may change of the run's configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from accumexp.conf import conf_dir
from accumexp.config.loading import from_hydra, to_plain
from accumexp.config.overrides import with_overrides
from accumexp.errors import UsageError
from accumexp.run.arguments import resume_arguments
from accumexp.run.spec import resumed
from accumexp.tracking.metrics_file import Journal
from accumexp.training.checkpoint import find, load, save

# Checkpoints on the disk -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """A run's configuration as its checkpoint holds it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return to_plain(from_hydra(compose("config", ["accum.steps=4", "tracking=none"])))


@pytest.fixture
def run(tmp_path: Path, plain: dict[str, Any]) -> Path:
    """A run's folder with checkpoints of updates 5 and 10."""
    for update in (5, 10):
        progress = {"update": update, "epoch": 0, "epoch_update": update}
        content = {"config": plain, "progress": progress, "model": {"weight": torch.arange(1000.0) + update}}
        empty = ("optimizer", "scheduler", "callbacks", "evaluated", "run", "random")
        content |= {part: {} for part in empty}
        save(tmp_path / "checkpoints" / f"update-{update:08d}.pt", content)
    return tmp_path


@pytest.fixture
def resume() -> Callable[..., Any]:
    """`resumed` as a command with these overrides calls it."""

    def call(where: Path, *overrides: str) -> Any:
        return resumed(OmegaConf.create({"resume": str(where)}), overrides)

    return call


def damage(path: Path) -> None:
    """Flips bits in the middle of a file."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 255 for byte in content[middle : middle + 8])
    path.write_bytes(content)


def updates(folder: Path) -> list[int]:
    return [load(path)["progress"]["update"] for path in sorted((folder / "checkpoints").glob("*.pt"))]


@pytest.mark.parametrize("name", ["update-00000010.pt", "update-00000015.pt"], ids=["same name", "new name"])
def test_a_write_that_fails_halfway_leaves_what_was_there(
    name: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(content: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 half of a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        save(run / "checkpoints" / name, {"progress": {"update": 15}})
    assert updates(run) == [5, 10]
    assert len(list((run / "checkpoints").iterdir())) == 2


def test_a_write_that_was_killed_halfway_is_no_checkpoint(run: Path) -> None:
    (run / "checkpoints" / ".update-00000015.pt.4711.partial").write_bytes(b"PK\x03\x04")
    assert find(run).name == "update-00000010.pt"


def test_a_checkpoint_has_its_name_only_when_it_is_whole(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run / "checkpoints" / "update-00000010.pt"
    seen: list[int] = []
    real = os.fsync

    def look(descriptor: int) -> None:
        seen.append(load(path)["progress"]["update"])
        real(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    save(path, {"progress": {"update": 11}})
    assert seen[0] == 10  # the new content is being written, the name still means the old
    assert load(path)["progress"]["update"] == 11


def test_resume_of_a_folder_goes_on_from_the_newest_readable_checkpoint(
    run: Path, resume: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert resume(run).update == 10
    damage(run / "checkpoints" / "update-00000010.pt")
    resume_from = resume(run)
    assert (resume_from.update, resume_from.path.name) == (5, "update-00000005.pt")
    assert "update-00000010.pt is damaged" in caplog.text


def test_resume_of_a_damaged_file_itself_is_refused(run: Path, resume: Callable[..., Any]) -> None:
    newest = run / "checkpoints" / "update-00000010.pt"
    damage(newest)
    with pytest.raises(UsageError, match=r"update-00000010\.pt: damaged"):
        resume(newest)


def test_resume_is_refused_if_no_checkpoint_is_readable(run: Path, resume: Callable[..., Any]) -> None:
    for path in (run / "checkpoints").iterdir():
        damage(path)
    with pytest.raises(UsageError, match="damaged"):
        resume(run)


class Intruder:
    """Unpickling one writes a file."""

    def __init__(self, written: Path) -> None:
        self.written = written

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.written, "code ran")


def test_load_runs_no_code_from_a_file(tmp_path: Path) -> None:
    written, path = tmp_path / "written", tmp_path / "update-00000001.pt"
    torch.save({"format": "accumexp checkpoint 1", "model": Intruder(written)}, path)
    with pytest.raises(UsageError, match="not a checkpoint of accumexp"):
        load(path)
    assert not written.exists()
    torch.load(path, weights_only=False)  # the file would indeed have done it
    assert written.read_text() == "code ran"


@pytest.mark.parametrize("update", [10, 11])
def test_a_change_is_refused_once_later_updates_are_logged(
    update: int, run: Path, resume: Callable[..., Any]
) -> None:
    rows = Journal(run / "metrics.jsonl")
    rows.write(update, {"train/loss": 1.0})
    rows.close()
    assert resume(run).update == 10
    if update > 10:
        with pytest.raises(UsageError, match="updates after 10 are logged already, so optimizer.lr=0.5"):
            resume(run, "optimizer.lr=0.5")
    else:
        assert resume(run, "optimizer.lr=0.5").config.optimizer["lr"] == 0.5


def test_a_finished_run_is_resumed_only_for_more(run: Path, resume: Callable[..., Any]) -> None:
    (run / "summary.json").write_text('{"status": "FINISHED"}')
    with pytest.raises(UsageError, match="is finished; more of it with trainer.epochs"):
        resume(run)
    assert resume(run, "trainer.epochs=40").config.trainer.epochs == 40


def test_a_resumed_run_says_what_was_changed(run: Path, resume: Callable[..., Any]) -> None:
    assert resume(run, "trainer.epochs=40").tags() == {"accumexp.resumed.10": "trainer.epochs=40"}
    assert resume(run).tags() == {"accumexp.resumed.10": "unchanged"}


@pytest.mark.parametrize("of", [".", "checkpoints", "checkpoints/update-00000005.pt"])
def test_a_run_is_resumed_in_its_own_folder(of: str, run: Path) -> None:
    arguments = resume_arguments([f"resume={run / of}", "trainer.epochs=40"])
    assert arguments[:2] == [f"resume={run / of}", "trainer.epochs=40"]
    assert f"hydra.run.dir='{run.resolve()}'" in arguments


@pytest.mark.parametrize("nothing", [[], ["resume="], ["resume=null"]])
def test_without_a_run_to_resume_the_arguments_stay_as_they_are(nothing: list[str]) -> None:
    assert resume_arguments(["model=mlp", *nothing]) == ["model=mlp", *nothing]


# Changes of a run's own configuration ------------------------------------------------------------------


def test_a_value_is_changed_and_the_rest_stays(plain: dict[str, Any]) -> None:
    config = with_overrides(plain, ["trainer.epochs=40", "optimizer.lr=0.5", "+tracking.tags.why=longer"])
    assert (config.trainer.epochs, config.optimizer["lr"]) == (40, 0.5)
    assert config.tracking.tags == {"why": "longer"}
    assert to_plain(with_overrides(plain, [])) == plain


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        (["accum.steps=8"], (128, 8, 16)),
        (["accum.micro_batch_size=64"], (128, 2, 64)),
        (["data.batch_size=64"], (64, 4, 16)),
        (["data.batch_size=64", "accum.steps=2"], (64, 2, 32)),
        (["accum.micro_batch_size=16", "accum.steps=8"], (128, 8, 16)),
    ],
    ids=str,
)
def test_a_changed_size_gives_the_third(
    overrides: list[str], sizes: tuple[int, int, int], plain: dict[str, Any]
) -> None:
    config = with_overrides(plain, overrides)
    assert (config.data.batch_size, config.accum.steps, config.accum.micro_batch_size) == sizes


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model=resnet18"], "model=resnet18: only values"),
        (["experiment=equal_batch"], "experiment=equal_batch: only values"),
        (["trainer.epohcs=4"], "trainer.epohcs=4: only values"),
        (["+trainer.epohcs=4"], "trainer.epohcs"),
        (["~seed"], "~seed: a single value"),
        (["accum.steps=1,2"], "accum.steps=1,2: a single value"),
        (["accum.steps=0"], "accum.steps=0: at least 1"),
        (["trainer.epochs=many"], "trainer.epochs"),
        (["accum.micro_batch_size=16", "accum.steps=4"], "disagrees"),
        (["accum.steps=4", "accum.micro_batch_size=16"], "disagrees"),
        (["a b"], "a b"),
    ],
    ids=str,
)
def test_what_is_no_single_value_of_the_run_is_refused(
    overrides: list[str], says: str, plain: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as refused:
        with_overrides(plain, overrides)
    assert says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
