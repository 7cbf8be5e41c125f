"""The experiments with several terms or a coupled loss: the window, the larger batch, and what most loops do.

python -m benchmarks.losses --experiments contrastive --seeds 0,1,2 --json losses.json
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from accumexp.conf import conf_dir
from accumexp.config.loading import from_hydra
from accumexp.config.schema import Config
from accumexp.environment.device import pick_device
from accumexp.training.callbacks import without_output
from accumexp.training.experiment import Experiment
from accumexp.training.metrics_sink import MemoryMetricsSink

from .measure import (
    Rows,
    check_names,
    device_options,
    environment,
    finish,
    numbers,
    output_options,
    prepare,
    say,
    table_of,
    words,
)

# The metric of each experiment, of the test split.
METRICS = {
    "contrastive": ("probe_accuracy", "loss"),
    "mixture_of_experts": ("accuracy", "loss/balance"),
    "two_tasks": ("accuracy", "parity"),
}
VARIANTS = {
    "window": [],
    "larger batch": ["accum.steps=1"],
    "by micro-batch": [],
    "separate updates": ["accum.steps=1"],
}


class ByMicroBatch(nn.Module):
    """A loss taken on each micro-batch, whose mean is the update's: another loss than that of the batch."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Any, targets: Any) -> torch.Tensor:
        return self.loss(outputs, targets)


def configuration(experiment: str, variant: str, *overrides: str) -> Config:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = from_hydra(compose("config", [f"experiment={experiment}", *VARIANTS[variant], *overrides]))
    if variant == "by micro-batch":
        config.loss = {"_target_": f"{__name__}.ByMicroBatch", "loss": config.loss}
    return config


def micro_batch(experiment: str) -> int:
    size = configuration(experiment, "window").accum.micro_batch_size
    assert size is not None
    return size


def measured(experiment: str, variant: str, *overrides: str) -> dict[str, Any]:
    """The losses of a run's updates, and its metrics on the test split."""
    config = configuration(experiment, variant, *overrides)
    # Evaluated once, at the end.
    config.trainer.eval_every = config.trainer.epochs
    memory = MemoryMetricsSink()
    trainer = Experiment.build(config).trainer(memory)
    trainer.callbacks = without_output(trainer.callbacks)
    started = perf_counter()
    trainer.fit()
    seconds = perf_counter() - started
    # Whatever was trained on, the loss that is evaluated is the experiment's own.
    evaluated = configuration(experiment, "window", *overrides)
    trainer.evaluator = Experiment.build(evaluated, splits=trainer.splits).evaluator
    values = trainer.evaluate("test")
    return {
        "experiment": experiment,
        "variant": variant,
        "seed": config.seed,
        "losses": [loss for _, loss in memory.series("train/loss")],
        "metrics": {name: values[f"test/{name}"] for name in METRICS[experiment]},
        "seconds": seconds,
    }


def run_all(experiment: str, seeds: list[int], variants: list[str], overrides: list[str]) -> Rows:
    rows: Rows = []
    for seed in seeds:
        for variant in variants:
            batch_overrides = (
                [f"data.batch_size={micro_batch(experiment)}"] if variant == "separate updates" else []
            )
            row = measured(experiment, variant, f"seed={seed}", *batch_overrides, *overrides)
            rows.append(row)
            shown = ", ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items())
            say(f"{experiment}, {variant}, seed {seed}: {shown}, {row['seconds']:.0f} s")
    return rows


def apart(rows: Rows) -> float:
    """The largest relative difference of a loss of the window to the larger batch's, over all updates."""
    by_variant = {row["variant"]: row["losses"] for row in rows}
    pairs = zip(by_variant["window"], by_variant["larger batch"], strict=True)
    return max(abs(one - other) / abs(other) for one, other in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--experiments", type=words, default=list(METRICS))
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--variants", type=words, default=list(VARIANTS))
    parser.add_argument("overrides", nargs="*", help="of the configuration, key=value")
    device_options(parser)
    output_options(parser)
    options = parser.parse_args()
    check_names(parser, "--experiments", options.experiments, METRICS)
    check_names(parser, "--variants", options.variants, VARIANTS)
    prepare(options.threads)
    device = pick_device(options.device)
    overrides = [f"device={options.device}", *options.overrides]
    table = table_of(
        "on the test split", "experiment,variant,metric,mean,least,most", "experiment,variant,metric"
    )
    rows: Rows = []
    curves: dict[str, float] = {}
    for experiment in options.experiments:
        if {"window", "larger batch"} <= set(options.variants):
            two = ["window", "larger batch"]
            curves[experiment] = apart(run_all(experiment, [0], two, ["precision=fp64", *overrides]))
            say(f"{experiment}: losses in float64 are at most {curves[experiment]:.1e} apart, relatively")
        experiment_rows = run_all(experiment, options.seeds, options.variants, overrides)
        rows += experiment_rows
        for variant in options.variants:
            for metric in METRICS[experiment]:
                values = [row["metrics"][metric] for row in experiment_rows if row["variant"] == variant]
                mean, least, most = statistics.mean(values), min(values), max(values)
                table.add_row(experiment, variant, metric, f"{mean:.4f}", f"{least:.4f}", f"{most:.4f}")
    report = {
        "settings": {"seeds": options.seeds, "overrides": overrides},
        "environment": environment(device),
        "apart": curves,
        "runs": rows,
    }
    finish(report, [table], options.json)


if __name__ == "__main__":
    main()
