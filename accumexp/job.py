"""One run, from its configuration to its summary."""

from __future__ import annotations

import logging
import shutil
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from .accum import Inequality, inequalities
from .assembly import Parts, build_parts, build_trainer
from .checkpoint import BEST, FOLDER, Checkpoints, restore, saved_updates
from .compose import WANTS_TRACEBACK, fail
from .config import Backend, Config, from_hydra, to_plain
from .display import console, duration, show_values
from .errors import TrainingError, UsageError
from .record import METRICS, RunRecord, open_tracker, write_config
from .resume import Resumed, resumed
from .signals import StopSignals
from .sweep import SweepJob
from .system import MIB, device_name, reset_peak_memory
from .tracking import Store, reopen
from .trainer import Trainer

log = logging.getLogger(__name__)


def run_job(cfg: DictConfig) -> float | None:
    """Hydra's job: trains, and ends the process with the right code unless it is one of a sweep.

    Returns:
        The monitored value at the end, for a sweeper that optimises it; None if the run failed.
    """
    from hydra.core.hydra_config import HydraConfig

    job = SweepJob.of(HydraConfig.get())
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        return Run(cfg, folder, job).execute()
    except Exception as error:
        expected = isinstance(error, UsageError | TrainingError)
        log.info("failed", exc_info=error)  # to run.log, not to the terminal
        if isinstance(error, UsageError) and not job and not cfg.resume:
            remove_unused(folder)
        if WANTS_TRACEBACK or not expected:
            traceback.print_exc()
        if job:
            job.failed(folder, error)
            return None
        sys.exit(fail(error) if expected else 1)


def remove_unused(folder: Path) -> None:
    """Removes a run's folder in which nothing has happened: it holds only what was made on the way in."""
    made = {".hydra", "run.log", METRICS}
    if not folder.is_dir() or not {entry.name for entry in folder.iterdir()} <= made:
        return
    if not (folder / METRICS).exists() or not (folder / METRICS).stat().st_size:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Run:
    """A run about to happen, in `folder`, alone or as a job of a sweep."""

    cfg: DictConfig
    folder: Path
    job: SweepJob | None

    def execute(self) -> float | None:
        back = resumed(self.cfg)
        config = back.config if back else from_hydra(self.cfg)
        if self.job:
            self.job.share_cores(config)
        with StopSignals() as signals:
            parts = build_parts(config)
            record = RunRecord(self.folder, upto=back.update if back else 0)
            trainer = build_trainer(config, parts, record)
            if back:
                restore(trainer, back.content, back.path)
            unequal = inequalities(parts.model.train(), parts.splits.train.batch_size, trainer.window.steps)
            self._open(config, back, parts, record, unequal)
            status = "FAILED"
            try:
                self._attach(trainer, config, record)
                announce(config, trainer, parts, unequal, record)
                reset_peak_memory(parts.device)
                signals.trainer = trainer
                trainer.fit()
                final = {} if signals.received else finals(trainer)
                record.tracker.final(final)
                status = "KILLED" if signals.received else "FINISHED"
                record.upload()
            except (KeyboardInterrupt, SystemExit):
                status = "KILLED"
                raise
            except Exception as error:
                self._summarise(record, config, status, {}, error)
                raise
            finally:
                record.close(status)
            self._summarise(record, config, status, final)
            if signals.received:
                text = f"stopped by {signals.received.name} after update {trainer.progress.update}"
                if saved_updates(self.folder / FOLDER):
                    text += f"; go on with\n  python -m accumexp.run resume={self.folder}"
                console.print(text, highlight=False, soft_wrap=True)
                sys.exit(signals.exit_code)
            self._show(final, record, trainer)
            return trainer.latest.get(config.monitor)

    def _open(
        self, config: Config, back: Resumed | None, parts: Parts, record: RunRecord, unequal: list[Inequality]
    ) -> None:
        if back:
            record.tracker = reopen(config.tracking, back.content["run"])
            record.tracker.tag(back.tags())
            write_config(self.folder, config)
            return
        store = None if config.tracking.backend is Backend.none else Store(config.tracking)
        write_config(self.folder, config)
        parent = self.job.parent(store) if self.job else None
        name = self.job.name if self.job else None
        record.tracker = open_tracker(config, store, self.folder, parts, unequal, name, parent)
        self._summarise(record, config, "RUNNING", {})

    def _attach(self, trainer: Trainer, config: Config, record: RunRecord) -> None:
        identity = {"config": to_plain(config), "run": record.tracker.identity()}
        for callback in trainer.callbacks.values():
            if isinstance(callback, Checkpoints):
                callback.attach(self.folder, identity, record.flush)

    def _summarise(
        self,
        record: RunRecord,
        config: Config,
        status: str,
        final: dict[str, float],
        error: Exception | None = None,
    ) -> None:
        record.summarise(
            status=status,
            error=None if error is None else str(error) or type(error).__name__,
            overrides=self.job.overrides if self.job else [],
            seed=config.seed,
            run_id=record.tracker.run_id,
            final=final,
        )

    def _show(self, final: dict[str, float], record: RunRecord, trainer: Trainer) -> None:
        if self.job:
            accuracy = f"test accuracy {final['accuracy']:.4f}, " if "accuracy" in final else ""
            console.print(
                f"job {self.job.number} {self.job.name}: {accuracy}test loss {final['loss']:.4f}, "
                f"{trainer.progress.update} updates in {duration(trainer.progress.seconds)}",
                highlight=False,
                soft_wrap=True,
            )
            return
        tracker = record.tracker
        values: dict[str, object] = {}
        if "accuracy" in final:
            values["test accuracy"] = f"{final['accuracy']:.4f}"
        values["test loss"] = f"{final['loss']:.4f}"
        values["updates"] = f"{trainer.progress.update} in {duration(trainer.progress.seconds)}"
        speed, rate = final["update_ms"], final["samples_per_second"]
        values["speed"] = f"{speed:.2f} ms an update, {rate:.0f} samples/s"
        values["memory"] = f"{final['activation_mib']:.2f} MiB of activations"
        if "peak_memory_mib" in final:
            values["memory"] += f", {final['peak_memory_mib']:.0f} MiB at the peak"
        if trainer.stop_reason:
            values["ended by"] = trainer.stop_reason
        values["folder"] = self.folder
        best = self.folder / FOLDER / BEST
        if best.exists():
            values["best model"] = best
        if tracker.run_id:
            values["run"] = tracker.run_id
            values["UI"] = tracker.address
        if tracker.ui_command:
            values["serve it with"] = tracker.ui_command
        show_values("summary", values)


def announce(
    config: Config, trainer: Trainer, parts: Parts, unequal: list[Inequality], record: RunRecord
) -> None:
    """One line of what is about to happen, and a warning where the window cannot be the larger batch."""
    steps, batch = trainer.window.steps, parts.splits.train.batch_size
    window = f"{steps} micro-batches of {config.accum.micro_batch_size}" if steps > 1 else "one micro-batch"
    console.print(
        f"{config.model['_target_'].rpartition('.')[2]} on {parts.splits.train.samples} samples, "
        f"{trainer.total_updates} updates of {batch} samples in {window}, {config.precision.name} "
        f"on {parts.device} ({device_name(parts.device)})",
        highlight=False,
        soft_wrap=True,
    )
    for found in unequal[:3]:
        console.print(f"not the larger batch: {found.module} ({found.kind}): {found.reason}", style="yellow")
    if len(unequal) > 3:
        console.print(f"not the larger batch: and {len(unequal) - 3} more modules like these", style="yellow")


def finals(trainer: Trainer) -> dict[str, float]:
    """What `final/*` holds: the test split's values and what the run cost."""
    tested = {key.removeprefix("test/"): value for key, value in trainer.evaluate("test").items()}
    progress = trainer.progress
    seconds = max(progress.seconds, 1e-9)
    final = {
        **tested,
        **{key.replace("eval/", "eval_"): v for key, v in trainer.latest.items() if key.startswith("eval/")},
        "updates": float(progress.update),
        "epochs": float(progress.epoch),
        "samples": float(progress.samples),
        "seconds": progress.seconds,
        "samples_per_second": progress.samples / seconds,
        "update_ms": 1e3 * seconds / max(progress.update, 1),
        "activation_mib": progress.activation_bytes / MIB,
    }
    if "perf/peak_memory_mib" in trainer.latest:
        final["peak_memory_mib"] = trainer.latest["perf/peak_memory_mib"]
    return final
