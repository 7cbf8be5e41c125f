"""A request to end a run before its last update, which takes effect at the same update on all ranks."""

from __future__ import annotations

from collections.abc import Callable

from ..accum import Agreement, Ranks


class StopRequest:
    """Collects the requests of all ranks to stop.

    Attributes:
        reason: why the run ends, or None as long as it goes on.
        code: the number of the signal that requested it, or 1; 0 without a request.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.reset()

    def add(self, reason: str, code: int) -> None:
        """Requests a stop on this rank; the first reason and the largest code count."""
        self._local_reason, self._local_code = self._local_reason or reason, max(self._local_code, code)

    def reset(self) -> None:
        """Drops all requests."""
        self.reason: str | None = None
        self.code = 0
        self._local_reason: str | None = None
        self._local_code = 0
        self._agreement = Agreement(self.ranks)

    def soon(self) -> None:
        """Sets `reason` and `code` alike on all ranks; of several ranks, from the call before."""
        self._agree(self._agreement.soon)

    def now(self) -> None:
        """Sets `reason` and `code` on all ranks alike. Waits for the other ranks."""
        self._agree(self._agreement.now)

    def _agree(self, largest: Callable[[int], int]) -> None:
        self.code = largest(self._local_code)
        if self.code and self.reason is None:
            self.reason = self._local_reason or "another rank stopped"
