"""Out of memory in a run: split the window finer, or fail with an error that names a remedy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from ..accum import OutOfMemory, Recovery, Window, WindowResult, is_out_of_memory
from ..data import Batch
from ..environment.console import print_line
from ..errors import TrainingError, first_line

_log = logging.getLogger(__name__)
# MLflow tag of a run in which a window was split finer.
OUT_OF_MEMORY = "accumexp.out_of_memory"


class OutOfMemoryHandler:
    """Runs windows and handles those that run out of memory.

    Args:
        recover: split such a window finer, on all ranks, and all that follow. Without it, or for a window
            that `Recovery.refusal` refuses, the run fails.
        backward: replaces `Window.backward`, of windows that cannot be split.

    Attributes:
        lines: a message for each split, with update, place and the new split.
        listeners: called with `tags` after each split.
        steps: by update, the micro-batches of the windows that were split; `MetricsLog` removes entries.
    """

    def __init__(
        self, window: Window, recover: bool, backward: Callable[..., WindowResult] | None = None
    ) -> None:
        self.window = window
        self._backward = backward or window.backward
        refusal = Recovery.refusal(window)
        # A recorded window cannot be split.
        self._could_recover = refusal is None and backward is None
        if recover and refusal is not None:
            _log.info("a window that runs out of memory ends the run: %s", refusal)
        self.recovery = Recovery(window, self._on_split) if recover and refusal is None else None
        self.lines: list[str] = []
        self.listeners: list[Callable[[dict[str, str]], None]] = []
        self.steps: dict[int, int] = {}
        self._update = 0

    def backward(self, update: int, batch: Batch, observe: Any) -> WindowResult:
        """The window of `batch` in `update`.

        Raises:
            TrainingError: if there is no memory, and no finer split helps or is allowed.
        """
        self._update = update
        splits = len(self.lines)
        backward = self._backward if self.recovery is None else self.recovery.backward
        try:
            result = backward(
                batch.inputs,
                batch.targets,
                steps=batch.steps,
                samples=batch.samples,
                observe=observe,
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise TrainingError(self._failure(error)) from error
            raise
        if len(self.lines) > splits:
            self.steps[update] = result.steps
        return result

    @property
    def tags(self) -> dict[str, str]:
        """The tags that describe all splits."""
        return {OUT_OF_MEMORY: "; ".join(self.lines)[:5000]} if self.lines else {}

    def _on_split(self, event: OutOfMemory) -> None:
        rank = f" on rank {event.rank}" if self.window.sync.ranks.size > 1 else ""
        place = f"micro-batch {event.micro_batch + 1} of {event.steps}{rank}"
        self.lines.append(
            f"update {self._update}: out of memory in {place}; "
            f"from here on micro-batches of {event.at_most} samples at most"
        )
        print_line(self.lines[-1], style="yellow")
        for listener in self.listeners:
            listener(self.tags)

    def steps_of(self, samples: int) -> int:
        """Micro-batches of a window of which a rank has at most `samples`."""
        at_most = self.recovery.at_most if self.recovery else None
        return self.window.steps if at_most is None else max(self.window.steps, -(-samples // at_most))

    def _failure(self, error: Exception) -> str:
        window = self.window
        rank = f" on rank {window.sync.ranks.rank}" if window.sync.ranks.size > 1 else ""
        text = f"update {self._update}: out of memory{rank} ({first_line(error)})"
        if self.recovery is not None:
            return f"{text}; no finer split helps: take a smaller model, precision=bf16 or accum=fsdp"
        halves = f"{text}: accum.steps={2 * window.steps} halves the micro-batches"
        return f"{halves}, and accum.recover=true does it by itself" if self._could_recover else halves

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self.lines), "recovery": self.recovery.state_dict() if self.recovery else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lines[:] = state["lines"]
        if self.recovery is not None and state["recovery"]:
            self.recovery.load_state_dict(state["recovery"])


class NoMemoryFor:
    """A reusable context that turns out of memory in `what` into an error with `advice`.

    Raises:
        TrainingError: in place of the original error.
    """

    def __init__(self, what: str, advice: str) -> None:
        self.what = what
        self.advice = advice

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and is_out_of_memory(error):
            text = f"out of memory in {self.what} ({first_line(error)}): {self.advice}"
            raise TrainingError(text) from error
