"""The context of a run or a proof on several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ..config.schema import Config, Strategy
from ..environment.console import console
from ..environment.device import pick_device
from ..environment.ranks import RankInfo, broadcast_from_first, device_of, process_group
from ..tracking.run_folder import RunFolder


@contextmanager
def run_context(config: Config, folder: RunFolder, rank_info: RankInfo) -> Iterator[RunFolder]:
    """Joins the ranks' process group, silences all ranks but the first, and yields the first rank's folder.

    Under torchrun every rank composes a folder of its own.
    """
    if not rank_info.first:
        console.quiet = True
    alone = config.accum.strategy is Strategy.standalone
    device = str(pick_device(device_of(config.device, rank_info)))
    with nullcontext() if alone else process_group(rank_info, device):
        yield RunFolder(Path(broadcast_from_first(str(folder.path), rank_info)))
