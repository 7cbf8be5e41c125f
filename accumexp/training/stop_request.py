"""The wish to end a run before its last update, which all ranks must have at the same one."""

from __future__ import annotations

from collections.abc import Callable

from ..accum import Agreement, Ranks


class StopRequest:
    """A wish of any rank to stop, made the reason of all.

    Attributes:
        reason: why the run ends, or None as long as it goes on.
        code: the number of the signal that asked, or 1; 0 as long as nobody did.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.discard()

    def wish(self, reason: str, code: int) -> None:
        """Asks; the first reason and the largest code count."""
        self._wish, self._wish_code = self._wish or reason, max(self._wish_code, code)

    def discard(self) -> None:
        """Begins anew, as if nobody had asked."""
        self.reason: str | None = None
        self.code = 0
        self._wish: str | None = None
        self._wish_code = 0
        self._agreement = Agreement(self.ranks)

    def soon(self) -> None:
        """Hears of a wish on all ranks alike, one call after it was made on one of several."""
        self._hear(self._agreement.soon)

    def now(self) -> None:
        """Hears of a wish on all ranks alike. Waits for them."""
        self._hear(self._agreement.now)

    def _hear(self, agree: Callable[[int], int]) -> None:
        self.code = agree(self._wish_code)
        if self.code and self.reason is None:
            self.reason = self._wish or "another rank stopped"
