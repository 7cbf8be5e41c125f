"""The forward passes of a loop's window and the samples of each, seen by hooks on the model's modules."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from .compilation import outside_graphs
from .larger_batch import dense
from .module_tracker import in_backward, outside_transforms
from .nested import is_transformed, tensors
from .sample_ids import SampleIds, row_count


@dataclass
class ForwardPass:
    """A forward pass that autograd records.

    Attributes:
        samples: their numbers; None if its rows are not in the batch.
        size: number of samples.
        random_state: hash of torch's generator states before it.
        training: names of the model's modules in train mode.
        draws: whether it changes the generator; not known of a part of the model, and taken as so.
        backward: whether a gradient came back to its outputs.
    """

    samples: list[int] | None
    size: int
    random_state: bytes
    training: set[str]
    draws: bool = True
    backward: bool = False


class ForwardPasses:
    """Records the forward passes of `model`, or of its parts where a loop calls those by themselves.

    Not recorded: passes without gradients, the second pass of a checkpointed module, passes on other samples
    through which no gradient goes back (an evaluation), and those whose samples come again in a later pass
    that has the gradient.

    Args:
        on_pass: called with each pass when it begins, and the tensors that it receives.

    Attributes:
        hooks: removes the hooks on exit.
    """

    def __init__(
        self, model: nn.Module, ids: SampleIds, on_pass: Callable[[ForwardPass, list[Tensor]], Any]
    ) -> None:
        self._model = model
        self._ids = ids
        self._on_pass = on_pass
        self._device = next(model.parameters()).device
        self._modules = set(model.modules())
        self._open: list[ForwardPass | None] = []  # by module that computes
        self._whole: list[ForwardPass] = []
        self._of_parts: list[ForwardPass] = []
        # Passes by their inputs, to recognise the second pass of a checkpoint.
        self._recorded: Counter[bytes] = Counter()
        # Samples of a part's pass, until a part that is trained has computed on them.
        self._pending: list[int] | None = None
        self.hooks = ExitStack()
        hooks = PassHooks.of(model)
        hooks.passes = self
        self.hooks.callback(setattr, hooks, "passes", None)

    @property
    def passes(self) -> list[ForwardPass]:
        """Those of the whole model; of its parts if the loop never calls it."""
        passes = self._whole or self._of_parts
        kept: list[ForwardPass] = []
        again: set[int] = set()  # samples of later passes that have a gradient
        for each in reversed(passes):
            repeated = bool(each.samples) and again.issuperset(each.samples)
            if each.backward or (each.samples is not None and not repeated):
                kept.append(each)
            if each.backward:
                again.update(each.samples or ())
        return kept[::-1]

    def enter(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        """Called before `module` computes."""
        if module not in self._modules:
            return
        inputs = [arguments, keywords]
        with outside_transforms():
            if module is self._model:
                self._open.append(self._begin(inputs))
            elif self._open or in_backward():
                self._open.append(None)
            else:
                self._open.append(self._begin_part(inputs))

    def _begin(self, inputs: Any) -> ForwardPass | None:
        if not torch.is_grad_enabled():
            return None
        content = _content(inputs)
        if in_backward() and self._recorded[content]:
            self._recorded[content] -= 1
            return None
        self._recorded[content] += not in_backward()
        self._whole.append(self._pass(self._ids.find(inputs), inputs))
        return self._whole[-1]

    def _begin_part(self, inputs: Any) -> ForwardPass | None:
        samples = self._ids.find(inputs)
        if samples is not None:
            self._pending = samples
        elif self._pending is not None and row_count(inputs) == len(self._pending):
            samples = self._pending  # computed from them
        if not torch.is_grad_enabled() or (samples is None and self._of_parts):
            return None
        self._pending = None
        self._of_parts.append(self._pass(samples, inputs))
        return self._of_parts[-1]

    def _pass(self, samples: list[int] | None, inputs: Any) -> ForwardPass:
        size = row_count(inputs) if samples is None else len(samples)
        training = {name for name, module in self._model.named_modules() if module.training}
        begun = ForwardPass(samples, size, random_state(self._device), training)
        self._on_pass(begun, [tensor for tensor in tensors(inputs) if not is_transformed(tensor)])
        return begun

    def leave(self, module: nn.Module, outputs: Any) -> None:
        """Called after `module` has computed."""
        if module not in self._modules or not self._open:
            return
        begun = self._open.pop()
        if begun is not None:
            if module is self._model:
                with outside_transforms():
                    begun.draws = random_state(self._device) != begun.random_state
            for tensor in tensors(outputs):
                if is_transformed(tensor):
                    begun.backward = True  # a transform of torch.func always goes back
                elif tensor.grad_fn is not None:
                    tensor.register_hook(lambda _: setattr(begun, "backward", True))


class PassHooks:
    """The hooks of a model and its parts, which hand on to the `passes` that are recorded at the moment.

    They stay with the model: compiled code is compiled again for each new hook, until torch gives it up.
    """

    _of_models: WeakKeyDictionary[nn.Module, PassHooks] = WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        self.passes: ForwardPasses | None = None
        self._hooked: WeakSet[nn.Module] = WeakSet()
        self.add(model)

    def add(self, model: nn.Module) -> None:
        """Gives hooks to the parts of `model` that have none yet: a loop may add some between two windows."""
        for module in [module for module in model.modules() if module not in self._hooked]:
            self._hooked.add(module)
            # Those of a part are empty in compiled code; the model's own stay outside it.
            before, after = self._enter, self._leave
            if module is model:
                before, after = outside_graphs(before), outside_graphs(after)
            # Before the user's own hooks, which may change the inputs.
            module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
            module.register_forward_hook(after, with_kwargs=True, always_call=True)

    @classmethod
    def of(cls, model: nn.Module) -> PassHooks:
        """Those of `model`, made at the first call."""
        if model not in cls._of_models:
            cls._of_models[model] = cls(model)
        cls._of_models[model].add(model)
        return cls._of_models[model]

    def __deepcopy__(self, memo: Any) -> PassHooks:
        """Itself: a copy of the model, such as a loop's teacher, has the hooks too, which ignore it."""
        return self

    def _enter(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        if not torch.compiler.is_compiling() and self.passes is not None:
            self.passes.enter(module, arguments, keywords)

    def _leave(self, module: nn.Module, arguments: Any, keywords: Any, outputs: Any) -> None:
        if not torch.compiler.is_compiling() and self.passes is not None:
            self.passes.leave(module, outputs)


def random_state(device: torch.device) -> bytes:
    """A hash of the states of torch's generators on the CPU and `device`."""
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=16)
    if device.type == "cuda":
        digest.update(torch.cuda.get_rng_state(device).numpy().tobytes())
    return digest.digest()


def _content(inputs: Any) -> bytes:
    """A hash of a call's tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors(inputs):
        if not is_transformed(tensor):
            values = dense(tensor.detach())
            digest.update(str((values.dtype, values.shape)).encode())
            digest.update(values.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.digest()
