"""The files of a logged model, by which `mlflow.pytorch` and `mlflow.pyfunc` open a checkpoint.

Imports no MLflow.
A logged model is a folder: `MLmodel` (its flavors, its signature), an input example, and `data` with the
checkpoint. The checkpoint is read by `accumexp.training.logged_model` in this process's accumexp: no code is
pickled, and none is copied.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

LOADER = "accumexp.training.logged_model"
DATA, WEIGHTS, PICKLE_MODULE = "data", "model.pth", "pickle_module_info.txt"
EXAMPLE, REQUEST = "input_example.json", "serving_input_example.json"
# Parts of a checkpoint that only a resumed run needs.
OF_TRAINING = ("optimizer", "scheduler", "callbacks", "random", "loss_scale", "shortage")


def write_description(folder: Path, model_id: str, run_id: str, described: Mapping[str, Any]) -> None:
    """Writes all files of a logged model into `folder` but for the checkpoint.

    Args:
        described: what `model_inputs.described_inputs` returned.
    """
    from torch import __version__ as torch_version

    entries: dict[str, Any] = {
        "flavors": {
            # The values of `config` can be given as `mlflow.pyfunc.load_model(..., model_config=...)`.
            "python_function": {
                "loader_module": LOADER,
                "data": DATA,
                "python_version": platform.python_version(),
                "config": {"device": None, "trust": None},
            },
            "pytorch": {"model_data": DATA, "pytorch_version": str(torch_version), "code": None},
        },
        "mlflow_version": version("mlflow"),
        "model_id": model_id,
        "model_uuid": model_id,
        "run_id": run_id,
        "utc_time_created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    if described:
        signature = {
            name: json.dumps(specs) if specs else None for name, specs in described["signature"].items()
        }
        entries["signature"] = {**signature, "params": None}
        kind = "ndarray"  # of a dict of arrays, too
        paths = {"artifact_path": EXAMPLE, "serving_input_path": REQUEST}
        entries["saved_input_example_info"] = {"type": kind, **paths}
        (folder / EXAMPLE).write_text(json.dumps(described["example"]))
        (folder / REQUEST).write_text(json.dumps({"inputs": described["example"]}))
    (folder / "MLmodel").write_text(json.dumps(entries, indent=2))  # JSON is YAML
    packages = [f"{name}=={version(name)}" for name in ("mlflow", "torch")]
    (folder / "requirements.txt").write_text("\n".join(packages) + "\n")
    (folder / DATA).mkdir()
    (folder / DATA / PICKLE_MODULE).write_text(LOADER)


def write_model_alone(checkpoint: Path, path: Path) -> None:
    """Writes the checkpoint to `path` without the states that only a resumed run needs, often half of it."""
    import torch

    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    torch.save(
        {**content, **{part: {} for part in OF_TRAINING if content.get(part)}, "random_others": []}, path
    )
