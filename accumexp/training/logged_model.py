"""Opens the models that runs have logged in MLflow: named in their files, called by `mlflow.load_model`.

`mlflow.pytorch.load_model` hands `model.pth` to `torch.load`, with this module in the place of pickle. What
it holds is a checkpoint: data, read by torch's restricted unpickler, of which accumexp builds the model by
the rules of any checkpoint. `trust` allows classes of the user's packages:

    mlflow.pytorch.load_model("models:/m-...", trust=["my_package"])
    mlflow.pyfunc.load_model("models:/m-...", model_config={"trust": ["my_package"]})
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, _weights_only_unpickler, nn

from ..accum import call
from ..accum.batch import map_tensors
from ..environment.device import pick_device
from .checkpoint import FORMAT
from .trained_model import load_trained, model_of

WEIGHTS = "model.pth"


class Unpickler:
    """What `torch.load` takes from a pickle module; `load` returns the model."""

    persistent_load: Any = None  # set by torch.load

    def __init__(self, file: Any, *, trust: Any = None, **options: Any) -> None:
        self._reader: Any = _weights_only_unpickler.Unpickler(file, **options)
        self._trust = trust

    def load(self) -> nn.Module:
        # On the CPU, wherever it was trained: (kind, type, key, location, size).
        self._reader.persistent_load = lambda storage: self.persistent_load(
            (*storage[:3], "cpu", *storage[4:])
        )
        content = self._reader.load()
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise pickle.UnpicklingError(f"{WEIGHTS} is no checkpoint of accumexp")
        return model_of(content, Path(WEIGHTS), self._trust)


def load(file: Any, **options: Any) -> Any:
    """Refuses files of torch's old format, of which `torch.load` reads the parts by this function."""
    raise pickle.UnpicklingError(f"{WEIGHTS} is no checkpoint of accumexp")


class ArrayModel:
    """A model that takes and returns NumPy arrays: `mlflow.pyfunc`'s view of it.

    Args:
        device: of the computation, by default the GPU if there is one.
    """

    def __init__(self, model: nn.Module, device: str | None = None) -> None:
        self.device = pick_device(device or "auto")
        self.model = model.to(self.device)
        floats = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
        self._dtype = floats[0] if floats else torch.get_default_dtype()

    def get_raw_model(self) -> nn.Module:
        return self.model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """The outputs for an array, a dict of arrays, or a table of numbers, as arrays.

        A model of several inputs without names takes them as `input_0`, `input_1`, ...
        """
        if hasattr(model_input, "to_numpy"):
            model_input = model_input.to_numpy()
        inputs: Any = model_input
        if isinstance(inputs, Mapping):
            inputs = {name: self._tensor(value) for name, value in inputs.items()}
            positions = [f"input_{number}" for number in range(len(inputs))]
            if set(inputs) == set(positions):
                inputs = tuple(inputs[name] for name in positions)
        else:
            inputs = self._tensor(inputs)
        with torch.no_grad():
            return _arrays(call(self.model, inputs))

    def _tensor(self, values: Any) -> Tensor:
        tensor = torch.as_tensor(values, device=self.device)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def _arrays(outputs: Any) -> Any:
    def array(tensor: Tensor) -> Any:
        tensor = tensor.cpu()
        return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()

    return map_tensors(array, outputs)


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> ArrayModel:
    """The model in the folder `path`; the name that MLflow calls."""
    config = model_config or {}
    return ArrayModel(load_trained(Path(path) / WEIGHTS, trust=config.get("trust")), config.get("device"))
