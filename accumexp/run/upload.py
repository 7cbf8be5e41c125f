"""What a run sends to its store at its end: checkpoints, each evaluated one as a model, and the journal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..environment.ranks import RankInfo
from ..tracking import Tracker
from ..tracking.json_file import write_json
from ..tracking.run_folder import CHECKPOINTS, RunFolder
from ..training.checkpoint import load, save, saved_updates
from ..training.components import build_model, placement
from ..training.shards import KEY as SHARDS
from ..training.shards import folder_of
from ..training.trained_model import load_weights

# Of the names of checkpoints that have the whole model of one in shards.
WHOLE = "model-"


def upload(tracker: Tracker, folder: RunFolder, model_inputs: Mapping[str, Any], config: Config) -> None:
    """Uploads the best checkpoint and the newest ones, each update once, and the journal.

    Args:
        model_inputs: the signature and the input example of the models, empty for none.
        config: of the run.
    """
    if not tracker.run_id:
        return
    if model_inputs:
        write_json(folder.model_inputs, model_inputs)
    uploaded, made = set[int](), set[Path]()
    for path in filter(Path.exists, [folder.best, *reversed(saved_updates(folder.checkpoints))]):
        content = load(path)
        progress, shards = content["progress"], folder_of(path, content)
        if progress["update"] in uploaded:
            continue
        uploaded.add(progress["update"])
        evaluated, weights = content["evaluated"], path
        if shards is not None:
            tracker.artifact(shards, CHECKPOINTS)
            if evaluated:
                weights = _whole(path, content, config)
                made.add(weights)
        tags = {"accumexp.run": tracker.run_name, "accumexp.epoch": str(progress["epoch"])}
        tracker.checkpoint(path, progress["update"], evaluated, weights, tags)
    for earlier in set(folder.checkpoints.glob(f"{WHOLE}*.pt")) - made:
        earlier.unlink()
    tracker.keep_models(uploaded)
    tracker.artifact(folder.metrics)


def _whole(path: Path, content: Mapping[str, Any], config: Config) -> Path:
    """A checkpoint beside that of `path` that has the whole model instead of shards."""
    whole = path.with_name(f"{WHOLE}{path.name}")
    model = build_model(config).to(placement(config, RankInfo()).dtype)
    load_weights(model, content, path)
    save(whole, {**content, "model": model.state_dict(), SHARDS: None})
    return whole
