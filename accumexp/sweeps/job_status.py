"""The status of a job after an earlier launch: finished, resumable, or not begun."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..environment.ranks import RankInfo
from ..errors import UsageError
from ..tracking.run_folder import RunFolder


@dataclass(frozen=True)
class JobStatus:
    """A job that has finished, or can go on from `checkpoint`, or has to start from the beginning."""

    finished: bool = False
    monitored: float | None = None
    checkpoint: Path | None = None


def job_status(folder: RunFolder) -> JobStatus:
    """The status of the job in `folder`. Imports torch only for a job that can be resumed."""
    summary = folder.summary()
    if summary and summary.finished:
        return JobStatus(True, summary.monitored)
    if not any(folder.checkpoints.glob("update-*.pt")):
        return JobStatus()
    from ..training.checkpoint import load, saved_updates

    for candidate in reversed(saved_updates(folder.checkpoints)):
        try:
            load(candidate)
        except UsageError:
            continue
        return JobStatus(checkpoint=candidate)
    return JobStatus()


def agreed_status(status: JobStatus, rank_info: RankInfo, device: str) -> JobStatus:
    """The first rank's status, on every rank that torchrun or a cluster has started."""
    from ..environment.device import pick_device
    from ..environment.ranks import broadcast_from_first, device_of, process_group

    entries = [status.finished, status.monitored, str(status.checkpoint or "")]
    with process_group(rank_info, str(pick_device(device_of(device, rank_info)))):
        finished, monitored, checkpoint = json.loads(broadcast_from_first(json.dumps(entries), rank_info))
    return JobStatus(finished, monitored, Path(checkpoint) if checkpoint else None)
