"""Checkpoints: written atomically, read without running code, and sufficient to resume bit for bit."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..accum import Ranks
from ..config.ranges import require
from ..environment.console import amount
from ..environment.random_state import restore_random_state
from ..errors import TrainingError, UsageError, first_line
from ..tracking.run_folder import BEST, CHECKPOINTS
from . import shards
from .callbacks import Best, Callback, RunState
from .checkpoint_content import check_savable, needed_bytes, not_written, without_views
from .checkpoint_file import check_entries, check_storages, check_tensors
from .finite import FiniteCheck
from .optimizers import in_eval_mode
from .trainer_state import restore_trainer_state, trainer_state

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger(__name__)
FORMAT = "accumexp checkpoint 1"
# What loading a state of another type or shape raises.
DAMAGED = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError)


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` atomically: to a temporary file that is flushed to disk and then renamed to `path`."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({"format": FORMAT, **without_views(content)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path, in_file: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the CPU. Runs no code from the file.

    Args:
        in_file: map the tensors from the file instead of reading them; the file must outlive them.

    Raises:
        UsageError: if it is missing, damaged (every byte is checked against its CRC), declares more than it
            holds, or is no checkpoint.
    """
    if not path.is_file():  # opening a pipe would wait
        raise UsageError(f"checkpoint {path}: {'is no file' if path.exists() else 'no such file'}")
    try:
        with zipfile.ZipFile(path) as archive:
            check_entries(path, archive, path.stat().st_size)
            if damaged := archive.testzip():
                raise UsageError(
                    f"checkpoint {path}: damaged in {damaged}; take an earlier one from its folder"
                )
            check_storages(path, archive)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Validating sparse tensor invariants")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=in_file)
    except UsageError:
        raise
    except zipfile.BadZipFile as error:
        raise UsageError(f"checkpoint {path}: damaged, or not a checkpoint ({error})") from error
    except Exception as error:
        raise UsageError(f"checkpoint {path}: not a checkpoint of accumexp ({first_line(error)})") from error
    format_name = content.get("format") if isinstance(content, dict) else type(content).__name__
    if not isinstance(format_name, str) or format_name != FORMAT:
        kind = repr(format_name)[:60] if isinstance(format_name, str | None) else type(format_name).__name__
        raise UsageError(f"checkpoint {path}: of format {kind}, not {FORMAT!r}")
    check_tensors(path, content)
    return content


def find(where: str | Path, best: bool = False) -> Path:
    """The checkpoint at `where`: the file itself, or the newest (or best) in a run's folder.

    Raises:
        UsageError: if there is none.
    """
    path = Path(where)
    if not path.is_dir():
        if path.is_file():
            return path
        raise UsageError(f"checkpoint {path}: no such file or folder")
    folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
    if best and (folder / BEST).is_file():
        return folder / BEST
    checkpoints = saved_updates(folder)
    if not checkpoints:
        raise UsageError(f"checkpoint {path}: no checkpoint in {folder}")
    return checkpoints[-1]


def saved_updates(folder: Path) -> list[Path]:
    """The checkpoints by update, oldest first."""
    return sorted(folder.glob("update-*.pt"))


class Checkpoints(Callback):
    """Saves at intervals and on a stop; keeps the newest `keep_last` checkpoints and the best.

    Args:
        every_epochs, every_updates: the intervals, or None.
        keep_last: number of the newest checkpoints that are kept.
        monitor, mode: the evaluated value, and whether "max" or "min", that makes `best.pt`.

    A trainer of which a saved number is inf or nan is not saved: that ends the run, or with
    `trainer.check_finite=false` is warned of once.
    """

    order = 1
    saves = True

    def __init__(
        self,
        every_epochs: int | None = 1,
        every_updates: int | None = None,
        keep_last: int = 2,
        monitor: str = "eval/accuracy",
        mode: str = "max",
    ) -> None:
        for name, value in (
            ("every_epochs", every_epochs),
            ("every_updates", every_updates),
            ("keep_last", keep_last),
        ):
            require(name, value, at_least=1, at_most=2**31 - 1, whole=True)
        self.every_epochs = every_epochs
        self.every_updates = every_updates
        self.keep_last = keep_last
        self.best = Best(monitor, mode)
        self.run = RunState(Path(), {}, lambda: None)
        self._evaluated: dict[str, float] = {}
        self._improved = False
        self._verified = False
        self._finite = FiniteCheck()
        self._best_saved: float | None = None
        self._saved_at: tuple[int, int] | None = None

    @property
    def folder(self) -> Path:
        return self.run.folder / CHECKPOINTS

    def check(self, trainer: Trainer, key: str) -> None:
        for name, callback in trainer.callbacks.items():
            check_savable(f"callbacks.{name}", callback.state_dict())
        check_savable("scheduler", trainer.scheduler.state_dict())

    def run_opened(self, trainer: Trainer, run: RunState) -> None:
        self.run = run
        self._finite.begin(trainer.model)
        self._best_saved = self.best.value
        self._warn_of_room(trainer)
        if run.saved:
            self._saved_at = _position(trainer)

    def _warn_of_room(self, trainer: Trainer) -> None:
        """Warns if the disk has no room for the checkpoints that are kept, with two moments a parameter."""
        each = 3 * needed_bytes(list(trainer.model.parameters()))
        free = shutil.disk_usage(self.run.folder).free
        most = self.keep_last + 2  # the best one, and the one that is being written
        if most * each > free:
            log.warning(
                "%s: %d checkpoints of about %s do not fit into the %s that are free",
                *(self.run.folder, most, amount(each), amount(free)),
            )

    def update_end(self, trainer: Trainer) -> None:
        if self.every_updates and trainer.progress.update % self.every_updates == 0:
            self._save(trainer, {})

    def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
        if split in trainer.evaluated_splits:
            self._evaluated.update(values)
            self._improved |= split == self.best.split and self.best.improved(values)

    def epoch_end(self, trainer: Trainer) -> None:
        due = self.every_epochs and trainer.progress.epoch % self.every_epochs == 0
        if due or trainer.finished or self._improved:
            self._save(trainer, self._evaluated)
            self._evaluated = {}

    def run_end(self, trainer: Trainer) -> None:
        if trainer.stop_reason and self._saved_at != _position(trainer):
            self._save(trainer, {})

    def _save(self, trainer: Trainer, evaluated: dict[str, float]) -> None:
        with trainer.off_the_clock(), in_eval_mode(trainer.optimizer):
            state = trainer_state(trainer)
            ranks = trainer.window.sync.ranks
            gathered = _all_gather((trainer.random_state(), self._finite(trainer)), ranks)
            improved, self._improved = self._improved, False
            self._saved_at = _position(trainer)
            if faulty := next((name for _, name in gathered if name), None):
                self.best.value = self._best_saved
                self._finite.refuse(faulty, trainer, saved_updates(self.folder))
                return
            random, *others = (state for state, _ in gathered)
            path = self.folder / f"update-{trainer.progress.update:08d}.pt"
            shard_folder = shards.save(trainer, path) if trainer.window.sync.sharded else None
            if ranks.rank:
                return
            self.run.before_save()
            ended_by = trainer.stop_reason if trainer.stop_code == 1 else None  # 1: not by a signal
            for name, saved in state["callbacks"].items():
                check_savable(f"callbacks.{name}", saved)
            content = {**state, **self.run.identity, "evaluated": evaluated, "ended_by": ended_by}
            content |= {"random": random, "random_others": others, shards.KEY: shard_folder}
            try:
                save(path, content)
            except (OSError, RuntimeError) as error:  # torch hides what the system said of a full disk
                whole = next(reversed(saved_updates(self.folder)), None)
                raise TrainingError(not_written(path, content, error, whole)) from error
            if not self._verified:
                load(path, in_file=True)  # fails if a user's class has state that cannot be read back
                self._verified = True
            if improved:
                _link(path, self.folder / BEST)
                self._best_saved = self.best.value
            for old in saved_updates(self.folder)[: -self.keep_last]:
                old.unlink(missing_ok=True)
            self._remove_unused_shards()

    def _remove_unused_shards(self) -> None:
        """Removes the shards to which no kept checkpoint refers."""
        best = self.folder / BEST
        stems = {path.stem for path in saved_updates(self.folder)}
        for folder in self.folder.glob(f"update-*{shards.SUFFIX}"):
            if folder.stem in stems or best.exists() and load(best, True).get(shards.KEY) == folder.name:
                continue
            shutil.rmtree(folder, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        return self.best.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state)


def restore(trainer: Trainer, content: Mapping[str, Any], path: Path) -> None:
    """Restores the trainer and the random state from `content`.

    Raises:
        UsageError: if the model or optimizer has another shape than the checkpoint's.
    """
    shard_folder = shards.folder_of(path, content)
    if trainer.window.sync.sharded and shard_folder is None:
        raise UsageError(
            f"checkpoint {path}: holds a whole model; accum=fsdp goes on from a checkpoint of accum=fsdp"
        )
    try:
        if shard_folder is not None:
            shards.load(trainer, shard_folder)
        restore_trainer_state(trainer, content)
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UsageError(f"checkpoint {path}: does not fit this configuration: {reason}") from error
    states = [content["random"], *content.get("random_others", [])]
    rank = trainer.window.sync.ranks.rank
    if rank < len(states):  # an additional rank keeps the state that its seed gave it
        try:
            restore_random_state(states[rank])
        except DAMAGED as error:
            reason = f"its random state is damaged: {first_line(error)}"
            raise UsageError(f"checkpoint {path}: {reason}") from error


def _position(trainer: Trainer) -> tuple[int, int]:
    return trainer.progress.update, trainer.progress.epoch


def _all_gather(state: Any, ranks: Ranks) -> list[Any]:
    """`state` of every rank, by rank."""
    if ranks.size == 1:
        return [state]
    import torch.distributed as dist

    states: list[Any] = [None] * ranks.size
    dist.all_gather_object(states, state, ranks.group)
    return states


def _link(path: Path, name: Path) -> None:
    """Links `name` to `path` atomically; copies where the file system has no links."""
    partial = name.with_name(f".{name.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    os.replace(partial, name)
