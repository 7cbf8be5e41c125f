"""What earlier processes have logged of a run that goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

from .delivery import ready_models
from .outbox import Entry, read_unsent
from .run_folder import RunFolder
from .store import Store


@dataclass(frozen=True)
class Earlier:
    """What earlier processes have logged of a run.

    Attributes:
        times: milliseconds since 1970 of points, by key and step; of `system/*`, of one key.
        models: its complete logged models, name to id.
        final_updates: the update that `final/*` is of, None if there is none.
        unsent: the entries that its store may not have.
    """

    times: dict[tuple[str, int], int] = field(default_factory=dict)
    models: dict[str, str] = field(default_factory=dict)
    final_updates: float | None = None
    unsent: list[Entry] = field(default_factory=list)

    @property
    def system_step(self) -> int:
        """The step of the next sample of `system/*`."""
        return max((step for key, step in self.times if key.startswith("system/")), default=-1) + 1


def earlier_of(store: Store, run_id: str, folder: RunFolder | None) -> Earlier:
    """What the store and the run's `unsent.jsonl` hold, but for the end of the run, which goes on."""
    values = dict(store.client.get_run(run_id).data.metrics)
    of_system = [key for key in values if key.startswith("system/")]
    keys = [key for key in values if key not in of_system[1:]]  # all of `system/*` have the same steps
    histories = (store.client.get_metric_history(run_id, key) for key in keys)
    times = {(point.key, point.step): point.timestamp for points in histories for point in points}
    unsent = read_unsent(folder.unsent)[1] if folder else []
    for key, value, time_logged, step in (point for entry in unsent for point in entry.get("points", ())):
        times[key, step] = time_logged
        values[key] = value
    going_on = [entry for entry in unsent if "status" not in entry]
    return Earlier(times, ready_models(store, run_id), values.get("final/updates"), going_on)
