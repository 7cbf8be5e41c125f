"""The state that forward passes change: buffers and the generators of random numbers."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Generators:
    """The state of torch's generators and Python's `random` on this process, but not NumPy's."""

    def __init__(self, device: torch.device) -> None:
        self._torch = torch.default_generator.get_state()
        self._python = random.getstate()
        self._device = device
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)


class ForwardState:
    """Saves the buffers of `modules` and the generators, and restores them.

    Args:
        modules: model and loss; those that are no modules have no buffers.
        device: of the forward passes.
    """

    def __init__(self, modules: list[object], device: torch.device) -> None:
        # The dicts of the modules' buffers: a module may get its first buffer later.
        self._held = [m._buffers for part in modules if isinstance(part, nn.Module) for m in part.modules()]
        self._device = device
        self._buffers: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        # Those that are not lazy, and copies of them.
        self._initialised: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._generators: Generators | None = None
        present = [buffer for held in self._held for buffer in held.values() if buffer is not None]
        self._allocate([buffer for buffer in present if not is_lazy(buffer)])

    def save(self) -> None:
        """Saves the state, without waiting for the device."""
        self._generators = Generators(self._device)
        self._buffers = [(held, name, buffer) for held in self._held if held for name, buffer in held.items()]
        self._initialised = [b for _, _, b in self._buffers if b is not None and not is_lazy(b)]
        if self._initialised:
            with torch.no_grad():  # a buffer may carry a graph
                self._allocate(self._initialised)
                torch._foreach_copy_(self._copies, self._initialised)  # pyright: ignore[reportPrivateImportUsage]

    def restore(self) -> None:
        assert self._generators is not None
        with torch.no_grad():
            for held, name, buffer in self._buffers:
                held[name] = buffer
            if self._initialised:
                torch._foreach_copy_(self._initialised, self._copies)  # pyright: ignore[reportPrivateImportUsage]
        self._generators.restore()

    def _allocate(self, buffers: list[Tensor]) -> None:
        if list(map(_kind, buffers)) != list(map(_kind, self._copies)):
            self._copies = [torch.empty_like(buffer) for buffer in buffers]


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
