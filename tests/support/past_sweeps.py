"""Sweeps that never ran: jobs with made-up results, in the form in which a report reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accumexp.config.schema import ReportConfig
from accumexp.report.analysis import Report, make_report
from accumexp.report.jobs import Job, Sweep, parse_overrides

Values = Callable[[int, int], float]  # (steps, seed)


def job(
    *overrides: str,
    status: str = "FINISHED",
    final: Mapping[str, float] | None = None,
    losses: Sequence[float] = (),
    tags: Mapping[str, str] | None = None,
    **params: Any,
) -> Job:
    """A job of 128 samples an update in fp32, whose params are its overrides and `params`."""
    written = parse_overrides(overrides)
    all_params = {"data.batch_size": "128", "accum.steps": "1", "accum.processes": "1", "precision": "fp32"}
    all_params.update({key: value for key, value in written.items() if "." in key or key == "seed"})
    all_params.update({key.replace("__", "."): str(value) for key, value in params.items()})
    curve = [(update, loss) for update, loss in enumerate(losses, 1)]
    return Job(
        run_id="run-" + "-".join(overrides),
        status=status,
        overrides=written,
        params=all_params,
        final=dict(final or {}),
        tags=dict(tags or {}),
        curve=lambda key: curve if key == "train/loss" else [],
    )


def sweep(*jobs: Job) -> Sweep:
    return Sweep("sweep", "python -m accumexp.run -m ...", "FINISHED", list(jobs))


def over_steps(
    accuracy: Values, steps: Sequence[int] = (1, 2, 4), seeds: int = 5, loss: Values | None = None
) -> Sweep:
    """A sweep over `accum.steps` and `seed` with these accuracies and, by update, `loss(steps, update)`."""
    return sweep(
        *[
            job(
                f"accum.steps={k}",
                f"seed={seed}",
                final={"accuracy": accuracy(k, seed), "loss": 0.1, "update_ms": 5.0 * k},
                losses=[loss(k, update) for update in range(1, 31)] if loss else (),
            )
            for k in steps
            for seed in range(seeds)
        ]
    )


def reported(jobs: Sweep, **settings: Any) -> Report:
    return make_report(jobs, ReportConfig(**settings))


def rounding(steps: int, update: int) -> float:
    """A loss that differs by rounding alone in other steps than 1."""
    return 2.0 / update * (1 + 1e-7 * (steps > 1) * (update % 3))


def half_rate(steps: int, update: int) -> float:
    """A loss that differs by 1 % in other steps than 1, from the second update on."""
    return 2.0 / update * (1 + 0.01 * (steps > 1) * (update > 1))


def like(steps: int, seed: int) -> float:
    """An accuracy that depends on the steps by less than 0.1 points."""
    return 0.97 + 0.001 * seed + 0.0004 * ((seed * 7 + steps) % 3 - 1)
