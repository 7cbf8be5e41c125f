"""`python -m accumexp.evaluate`: metrics of a saved model on the test split."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

from .cli import command, command_options
from .errors import UsageError

HELP = """\
  checkpoint=<path>   a checkpoint; or a run's folder or its id in MLflow, or models:/... of MLflow
  which=best          of a run: its best checkpoint, or the last one
  split=test          the split to evaluate on: test or eval
  json=false          true prints the values as one line of JSON
  trust=[my_package]  packages of your own that the checkpoint's configuration may name classes of, or true
  key=value ...       changes to the run's own configuration: data.root=..., device=cpu, precision=fp32
"""


def main() -> None:
    options, changes = command_options(
        "evaluate",
        "Loss and metrics of a checkpoint's model, rebuilt from the checkpoint's configuration.",
        HELP,
        {"checkpoint": "", "split": "test", "json": "false", "trust": "false", "which": "best"},
    )
    checkpoint, split, as_json, trust, which = options.values()
    if not checkpoint:
        raise UsageError("checkpoint: a path is needed, give checkpoint=<run folder or file>")
    if split not in ("test", "eval"):
        raise UsageError(f"split={split}: test or eval")
    if as_json not in ("true", "false"):
        raise UsageError(f"json={as_json}: true or false")
    overrides = [f"{key}={value}" for key, value in changes.items()]
    evaluate(checkpoint, split, overrides, as_json=as_json == "true", trust=trust, which=which)


def evaluate(
    checkpoint: str,
    split: str,
    overrides: list[str],
    as_json: bool,
    trust: Any = False,
    which: str = "best",
) -> dict[str, float]:
    """Prints and returns loss and metrics of `checkpoint` on `split`; `trust` as in the schema."""
    from .config.trust import Trust
    from .tracking.run_folder import RunFolder

    trusted = Trust.given(trust)
    from .training.checkpoint import load
    from .training.checkpoint_parts import configuration
    from .training.trained_model import checkpoint_of

    uri = next((o.partition("=")[2] for o in overrides if o.startswith("tracking.uri=")), "")
    path = checkpoint_of(checkpoint, which, uri)
    content = load(path)
    RunFolder.of_checkpoint(path).close_if_dead()
    # One process evaluates, whatever has trained.
    alone = ["accum.strategy=standalone", "accum.processes=1"]
    config = configuration(content, path, [*alone, *overrides], trusted)

    from .environment.console import show_values
    from .training.experiment import Experiment
    from .training.preflight import try_example
    from .training.trained_model import load_weights

    experiment = Experiment.build(config)
    if split == "eval" and not experiment.splits.has_eval:
        raise UsageError("split=eval: data.eval_fraction=0 holds no samples out, take split=test")
    load_weights(experiment.model, content, path)
    try_example(experiment, split)
    batches = experiment.splits.test if split == "test" else experiment.splits.eval
    with closing(experiment.splits):
        values = experiment.evaluator(experiment.model, batches)
    if as_json:
        print(json.dumps({"checkpoint": str(path), "split": split, "samples": batches.samples, **values}))
    else:
        shown: dict[str, object] = {"checkpoint": path, "update": content["progress"]["update"]}
        shown["samples"] = f"{batches.samples} of the {split} split"
        shown.update({name: f"{value:.4f}" for name, value in values.items()})
        show_values("evaluation", shown)
    return values


if __name__ == "__main__":
    command(main)
