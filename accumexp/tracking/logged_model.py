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

import torch
from torch import Tensor

LOADER = "accumexp.training.logged_model"
DATA, WEIGHTS, PICKLE_MODULE = "data", "model.pth", "pickle_module_info.txt"
EXAMPLE, REQUEST = "input_example.json", "serving_input_example.json"
# Parts of a checkpoint that only a resumed run needs.
OF_TRAINING = ("optimizer", "scheduler", "callbacks", "random", "loss_scale", "shortage")


def described_inputs(inputs: Any, outputs: Any, ragged: bool = False) -> dict[str, Any]:
    """The signature and the input example of a model, as JSON takes them; empty for inputs without one.

    Args:
        inputs: a batch of samples as the model takes it: a tensor, a dict, or a tuple of tensors.
        outputs: of the model, None if they are not known.
        ragged: whether samples differ in their shape.
    """
    columns = _columns(inputs, "input")
    if columns is None:
        return {}
    of_outputs = None if outputs is None else _columns(outputs, "output")
    values = {name: _array(tensor[:1]).tolist() for name, tensor in columns.items()}
    return {
        "signature": {
            "inputs": [_spec(name, tensor, ragged) for name, tensor in columns.items()],
            "outputs": [_spec(name, tensor, ragged) for name, tensor in (of_outputs or {}).items()],
        },
        "example": values[""] if "" in values else values,
    }


def _columns(batch: Any, prefix: str) -> dict[str, Tensor] | None:
    """The tensors by name, one alone by an empty name; None for anything but tensors in one container."""
    if isinstance(batch, Tensor):
        return {"": batch}
    if isinstance(batch, Mapping):
        columns = {str(name): value for name, value in batch.items()}
    elif isinstance(batch, tuple | list):
        columns = {f"{prefix}_{number}": value for number, value in enumerate(batch)}
    else:
        return None
    flat = all(isinstance(value, Tensor) and value.dim() for value in columns.values())
    return columns if columns and flat else None


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()  # NumPy has no bfloat16


def _spec(name: str, tensor: Tensor, ragged: bool) -> dict[str, Any]:
    shape = [-1] * tensor.dim() if ragged else [-1, *tensor.shape[1:]]
    spec = {"type": "tensor", "tensor-spec": {"dtype": str(_array(tensor[:1]).dtype), "shape": shape}}
    return {"name": name, **spec} if name else spec


def write_description(folder: Path, model_id: str, run_id: str, described: Mapping[str, Any]) -> None:
    """Writes all files of a logged model into `folder` but for the checkpoint.

    Args:
        described: what `described_inputs` returned.
    """
    entries: dict[str, Any] = {
        "flavors": {
            # The values of `config` can be given as `mlflow.pyfunc.load_model(..., model_config=...)`.
            "python_function": {
                "loader_module": LOADER,
                "data": DATA,
                "python_version": platform.python_version(),
                "config": {"device": None, "trust": None},
            },
            "pytorch": {"model_data": DATA, "pytorch_version": torch.__version__, "code": None},
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
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    torch.save(
        {**content, **{part: {} for part in OF_TRAINING if content.get(part)}, "random_others": []}, path
    )
