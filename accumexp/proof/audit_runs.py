"""The runs of one training loop that an audit compares."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .audit_calls import clipping_calls, scaler_steps
from .audit_causes import find_causes
from .audit_checks import all_checks
from .audit_pairs import Comparison
from .audit_records import AuditError, FitRecord
from .audit_refusals import check_order, check_pairs, level_or_refuse, unwatchable
from .audit_rerun import Rounding, Starts
from .audit_watch import Watch
from .ranks import all_gather


class Result:
    """What one comparison found."""

    def __init__(self, comparison: Comparison, steps: int) -> None:
        self.comparison = comparison
        self.checks, self.series = all_checks(comparison)
        failed = any(not check.passed for check in self.checks)
        self.causes, self.counts = find_causes(comparison, steps)
        if not failed:
            self.causes = [cause for cause in self.causes if cause.excused]


class Runs:
    """The runs of one loop."""

    def __init__(
        self,
        fit: Callable[..., Any],
        steps: int,
        micro: int,
        loss: Callable[..., Any] | None,
        updates: int,
        seed: int,
        dtype: torch.dtype,
        progress: Callable[[str], None],
    ) -> None:
        self.fit, self.steps, self.micro, self.loss = fit, steps, micro, loss
        self.updates, self.seed, self.dtype, self.progress = updates, seed, dtype, progress
        self.fix_draws = False

    def run(
        self,
        steps: int,
        micro: int,
        samples: int | None,
        starts: Starts | None = None,
        rounding: Rounding | None = None,
    ) -> list[FitRecord]:
        """The records of all ranks' runs. A collective call."""
        loss = self.loss if starts is not None and rounding is None else None
        watch = Watch(self.dtype, self.updates, self.seed, starts, self.fix_draws, rounding, loss)
        keywords = {} if samples is None else {"samples": samples}
        try:
            with watching(watch, self.seed):
                self.fit(watch, steps, micro, **keywords)
        finally:
            record = watch.finish()
        error = unwatchable(watch)
        if errors := [each for each in all_gather(error) if each]:
            raise AuditError(errors[0])
        return all_gather(record)

    def compare(self, samples: int | None) -> Result:
        """Compares the runs on an epoch of `samples` samples, or as many as the loop has."""
        steps, micro = self.steps, self.micro
        self.progress(f"{steps} micro-batches of {micro}")
        run = self.run(steps, micro, samples)
        if not self.fix_draws and any(record.draws for record in run):
            self.fix_draws = True
            self.progress("the same, with random draws held fixed by sample")
            run = self.run(steps, micro, samples)
        self.progress(f"one micro-batch of {steps * micro}")

        def larger(rounding: Rounding | None = None) -> list[FitRecord]:
            comparison = Comparison(run, [])
            return self.run(1, steps * micro, samples, Starts(comparison.updates), rounding)

        comparison = Comparison(run, larger())
        check_order(comparison)
        check_pairs(comparison)
        self.progress("its rounding")
        names = {(True, True): "another order of the samples and scale of the loss"}
        names |= {(True, False): "another order of the samples", (False, True): "another scale of the loss"}
        attempts = [
            (how, lambda kind=kind: larger(Rounding(*kind, seed=self.seed))) for kind, how in names.items()
        ]
        comparison.levels = level_or_refuse(comparison, attempts)
        return Result(comparison, steps)


@contextmanager
def watching(watch: Watch, seed: int) -> Iterator[None]:
    """Makes `watch` see the steps of all optimizers, with Python's, NumPy's and torch's generators seeded."""
    state = random.getstate()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        random.seed(seed)
        stack.callback(random.setstate, state)
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
            numpy.random.seed(seed)
        for handle in (
            register_optimizer_step_pre_hook(watch.before_step),
            register_optimizer_step_post_hook(watch.after_step),
        ):
            stack.callback(handle.remove)
        stack.enter_context(clipping_calls(watch.clipping))
        stack.enter_context(scaler_steps(watch.skipped_step, watch.record))
        yield
