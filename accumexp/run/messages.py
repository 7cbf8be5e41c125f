"""The printed lines of a run: its start, warnings, and its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..accum import Inequality
from ..config.no_effect import no_effect_lines
from ..config.ranges import unusual_settings
from ..config.schema import Config, LossScaling
from ..environment.console import amount, console, duration, number, scores, show_values
from ..environment.device import device_name
from ..environment.memory import MIB
from ..tracking import Tracker
from ..tracking.run_folder import RunFolder
from ..training.checkpoint import load, saved_updates
from ..training.experiment import Experiment
from ..training.trained_model import best_values
from ..training.trainer import Trainer


def announce(experiment: Experiment, trainer: Trainer, unequal: Sequence[Inequality]) -> None:
    """Prints model, data, window and device, and warns where the window is not the larger batch."""
    config, train, device = experiment.config, experiment.splits.train, experiment.device
    steps = trainer.window.steps
    window = f"{steps} micro-batches of {config.accum.micro_batch_size}" if steps > 1 else "one micro-batch"
    if experiment.rank_info.size > 1:
        window += f" on each of {experiment.rank_info.size} ranks"
    precision = config.precision.name if config.precision else ""
    if config.accum.loss_scale is not LossScaling.none:
        precision = f"loss-scaled {precision}"
    console.print(
        f"{config.model['_target_'].rpartition('.')[2]} on {train.samples} samples, "
        f"{trainer.total_updates} updates of {train.batch_size} samples in {window}, {precision} "
        f"on {device} ({device_name(device)})",
        highlight=False,
        soft_wrap=True,
    )
    doubtful = [*_doubtful_settings(config), *_doubtful_choice(config.monitor, experiment.splits.has_eval)]
    if train.samples < train.batch_size:
        doubtful.append(
            f"data.batch_size={train.batch_size}: there are {train.samples} samples, every update takes the "
            "whole set"
        )
    for line in doubtful:
        console.print(f"warning: {line}", style="yellow", soft_wrap=True)
    warn(unequal)


def _doubtful_settings(config: Config) -> list[str]:
    groups = ("optimizer", "scheduler", "loss", "model", "callbacks")
    lines = [line for group in groups for line in unusual_settings(getattr(config, group), group)]
    if config.mode == "max" and config.monitor.endswith("loss"):
        lines.append(f"monitor={config.monitor}: with mode=max the largest is the best, usual is mode=min")
    return [*lines, *no_effect_lines(config)]


def _doubtful_choice(monitor: str, has_eval: bool) -> list[str]:
    """A line where the best model is chosen on the test split, as was asked for, or not at all."""
    if monitor.startswith("test/"):
        return [
            f"monitor={monitor}: the best model is chosen on the test split, whose score it makes too good"
        ]
    if not has_eval:
        on_test = monitor.replace("eval/", "test/", 1)
        return [
            "data.eval_fraction=0: no eval split: the last checkpoint is the model, without a best.pt; hold "
            f"samples out, give data.eval, or choose on the test split by monitor={on_test}"
        ]
    return []


def warn(unequal: Sequence[Inequality]) -> None:
    """Prints where the window is not the larger batch, three modules at most."""
    for cause in unequal[:3]:
        console.print(f"not the larger batch: {cause.module} ({cause.kind}): {cause.reason}", style="yellow")
    if len(unequal) > 3:
        console.print(f"not the larger batch: and {len(unequal) - 3} more modules like these", style="yellow")


def final_values(trainer: Trainer, best: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The values of `final/*`: loss and metrics of the test split, and the run's time and memory.

    Returns them, and the loss and metrics of `best`, the best checkpoint.
    """
    progress = trainer.progress
    seconds = max(progress.seconds, 1e-9)
    last = {key.removeprefix("test/"): value for key, value in trainer.evaluate("test").items()}
    final = {
        **last,
        **{key.replace("eval/", "eval_"): v for key, v in trainer.latest.items() if key.startswith("eval/")},
        "test_samples": float(trainer.splits.test.samples),
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
    return final, best_values(trainer, best, last)


def show_summary(
    final: dict[str, float],
    best: dict[str, float],
    trainer: Trainer,
    tracker: Tracker,
    folder: RunFolder,
    monitor: str,
) -> None:
    """Prints the result of a finished run, its folder, and its models and page in MLflow.

    Args:
        final, best: as `final_values` returns them.
    """
    peak = (
        f", {_bytes(final['peak_memory_mib'])} of tensors at the peak" if "peak_memory_mib" in final else ""
    )
    terms = [f"{key[5:]} {value:.4f}" for key, value in final.items() if key.startswith("loss/")]
    values: dict[str, object] = {
        **_models(final, best, trainer, tracker, folder, monitor),
        "terms of the loss": ", ".join(terms) or None,
        "updates": f"{trainer.progress.update} in {duration(trainer.progress.seconds)}",
        "speed": f"{final['update_ms']:.2f} ms an update, {final['samples_per_second']:.0f} samples/s",
        "memory": f"{_bytes(final['activation_mib'])} of activations{peak}",
        "out of memory": next(reversed(trainer.out_of_memory.lines), None),
        "ended by": trainer.stop_reason,
        "folder": folder.path,
        **tracker.links(),
    }
    show_values("summary", {name: value for name, value in values.items() if value})


def _models(
    final: dict[str, float],
    best: dict[str, float],
    trainer: Trainer,
    tracker: Tracker,
    folder: RunFolder,
    monitor: str,
) -> dict[str, str | None]:
    """The last model and the best one, each with its scores, its checkpoint and its address in MLflow."""
    checkpoints = saved_updates(folder.checkpoints)
    newest = str(checkpoints[-1]) if checkpoints else "not saved"
    update = trainer.progress.update
    if not trainer.evaluated_splits:
        newest += " (no eval split: the last is the model)"
    at_last = f"update {update}{_monitored(monitor, trainer.latest)}"
    lines = [scores(final, monitor), at_last, newest, tracker.model_address(update) or ""]
    models: dict[str, str | None] = {"last model": "\n".join(filter(None, lines))}
    if folder.best.exists():
        content = load(folder.best, in_file=True)
        best_update = content["progress"]["update"]
        lines = [scores(best, monitor)]
        lines += [f"update {best_update}{_monitored(monitor, content['evaluated'])}"]
        lines += [str(folder.best), tracker.model_address(best_update) or ""]
        lines = ["the last one", str(folder.best)] if best_update == update else lines
        models["best model"] = "\n".join(filter(None, lines))
    return models


def _monitored(monitor: str, values: Mapping[str, float]) -> str:
    return f", {monitor.replace('/', ' ')} {number(values[monitor])}" if monitor in values else ""


def _bytes(mib: float) -> str:
    return amount(mib * MIB)
