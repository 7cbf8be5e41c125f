"""The classes and functions that a checkpoint's configuration may name: building one runs no foreign code.

A class is known by where it is defined and by its base, not by the path that leads to it: `torch.os.system`
lies below `torch`, too. Left out are those that read pickles or fetch code by a name, such as torch.hub,
torch.load, torchvision's LSUN, torchmetrics of text, audio and multimodal models, and all of transformers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset, Sampler

from ..config.instantiate import with_present_targets
from ..config.trust import PACKAGE, Refusal, Trust
from ..errors import first_line
from .callbacks import Callback

# Hydra's, for an argument that is a class or a dtype itself.
LOOKUPS = ("hydra.utils.get_class", "hydra.utils.get_method", "hydra.utils.get_object")
# The packages that anything is imported from without the user's word.
IMPORTED = ("accumexp.", "torch.nn.", "torch.optim.", "torch.utils.data.", "torchvision.", "torchmetrics.")
UNSAFE = ("torchvision.datasets.lsun", "torch.utils.data.datapipes")
METRICS = (
    *("aggregation", "classification", "clustering", "nominal", "regression", "retrieval"),
    "segmentation",
)
LOSSES = ("cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div")


@dataclass(frozen=True)
class Kind:
    """Classes that derive from `base` (any, if it is None) and are defined in `modules`."""

    name: str
    base: type | None
    modules: tuple[str, ...]

    def __contains__(self, value: Any) -> bool:
        if not isinstance(value, type) or value.__module__.startswith(UNSAFE):
            return False
        return f"{value.__module__}.".startswith(self.modules) and (
            self.base is None or issubclass(value, self.base)
        )


MODULE = Kind(
    "torch.nn.Module",
    nn.Module,
    (
        *("torch.nn.", "torchvision.models.", "torchvision.ops."),
        *("accumexp.models.", "accumexp.losses.", "accumexp.training.losses."),
    ),
)
TRANSFORM = Kind(
    "transform", None, ("torchvision.transforms.", "accumexp.data.transforms.", "accumexp.data.digit_tasks.")
)
DATASET = Kind("Dataset", Dataset, ("torch.utils.data.dataset.", "torchvision.datasets.", "accumexp.data."))
SAMPLER = Kind("Sampler", Sampler, ("torch.utils.data.sampler.", "torch.utils.data.distributed."))
OPTIMIZER = Kind("Optimizer", Optimizer, ("torch.optim.",))
SCHEDULER = Kind("LRScheduler", LRScheduler, ("torch.optim.",))
METRIC = Kind("Metric", None, ("accumexp.training.metrics.", *(f"torchmetrics.{name}." for name in METRICS)))
CALLBACK = Kind("Callback", Callback, ("accumexp.training.",))


def _builds_model(function: Any) -> bool:
    """Whether `function` is one of torchvision's registered builders, or one of the project's."""
    if getattr(function, "__module__", "").startswith("accumexp.models."):
        return True
    models = sys.modules.get("torchvision.models")
    if models is None:
        return False
    return function is models.get_model or any(
        function is models.get_model_builder(name) for name in models.list_models()
    )


def _schedules(function: Any) -> bool:
    from . import schedules

    return function in (schedules.constant, schedules.cosine, schedules.warmup_cosine)


def _collates(function: Any) -> bool:
    from torch.utils.data import default_collate

    from ..data import pad

    return function in (pad, default_collate)


def _is_functional(value: Any) -> bool:
    """Whether `value` is a function of `torch.nn.functional`, such as an activation."""
    return callable(value) and getattr(nn.functional, getattr(value, "__name__", ""), None) is value


def _is_loss(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    if getattr(function, "__module__", "").startswith("accumexp.losses."):
        return True
    return _is_functional(function) and (name.endswith("_loss") or name in LOSSES)


KINDS: dict[str, tuple[tuple[Kind, ...], Callable[[Any], bool] | None]] = {
    "model": ((MODULE,), _builds_model),
    "loss": ((MODULE,), _is_loss),
    "optimizer": ((OPTIMIZER,), None),
    "scheduler": ((SCHEDULER,), _schedules),
    "metrics": ((METRIC,), None),
    "callbacks": ((CALLBACK,), None),
    "data.train": ((DATASET,), None),
    "data.eval": ((DATASET,), None),
    "data.test": ((DATASET,), None),
    "data.transform": ((TRANSFORM, MODULE), None),
    "data.augment": ((TRANSFORM, MODULE), None),
    "data.collate": ((), _collates),
    "data.sampler": ((SAMPLER,), None),
}
# Keys whose nodes have names that the user chooses.
NAMED = ("metrics", "callbacks")
GROUPS = "optimizer.groups."


def refusal_of_targets(plain: Mapping[str, Any]) -> Callable[[str, str, Trust], Refusal | None]:
    """The `refusal_of` of `check_targets` for the configuration `plain`."""

    def why(key: str, target: str, trust: Trust) -> Refusal | None:
        if target in LOOKUPS:
            path = _node(plain, key).get("path")
            # An argument that is looked up is as good as one that is built.
            return None if _is_dtype(path) else _refusal("", str(path), trust)
        return _refusal(key, target, trust)

    return why


def _refusal(key: str, target: str, trust: Trust) -> Refusal | None:
    top = _top_key(key)
    package = target.partition(".")[0]
    allowed = trust.allows_package(target)
    if not PACKAGE.fullmatch(target) or "." not in target:
        return Refusal("it is no path of a class")
    if not allowed and not target.startswith(IMPORTED):
        if package in sys.stdlib_module_names or package in ("accumexp", "torch", "hydra", "omegaconf"):
            return Refusal(f"it is none of the classes that {top or 'a key'} takes")
        return Refusal(f"{package} is no package that accumexp knows", package)
    try:
        value = _located(target)
    except Exception as error:
        if allowed:  # building it says why
            return None
        return Refusal(f"there is no such class: {first_line(error)}")
    if _is_known(top, value):
        return None
    if not allowed:
        kinds = KINDS[top][0] if top else ()
        kind = " or ".join(kind.name for kind in kinds) or "function or class"
        named = package if package in ("torchvision", "torchmetrics") else None
        return Refusal(f"it is no {kind} of torch or accumexp that {top or 'an argument'} takes", named)
    module = str(getattr(value, "__module__", None) or type(value).__module__)
    if not trust.allows_package(module):
        package = None if module.startswith(IMPORTED) else module.partition(".")[0]
        return Refusal(f"it is of {module}", package)
    base = KINDS[top][0][0].base if top in ("model", "optimizer", "callbacks") else None
    if isinstance(value, type) and base is not None and not issubclass(value, base):
        return Refusal(f"{top} takes a {base.__name__}")
    return None


def _is_known(top: str, value: Any) -> bool:
    """Whether `value` is of the kind of key `top`, or of any kind for an argument below a key."""
    if not top and (value in (torch.tensor, torch.Generator) or _is_functional(value)):
        return True
    for kinds, is_function in [KINDS[top]] if top else KINDS.values():
        if any(value in kind for kind in kinds) or is_function is not None and is_function(value):
            return True
    return False


def _top_key(key: str) -> str:
    """The key in `KINDS` whose own node `key` is; empty for a node inside of another."""
    if key in KINDS:
        return key if key not in NAMED else ""
    first, *rest = key.split(".")
    if first in NAMED and len(rest) == 1:
        return first
    return "optimizer" if key.startswith(GROUPS) and key.count(".") == 2 else ""


def _node(plain: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    node: Any = with_present_targets(plain)
    for name in key.split("."):
        node = node[int(name)] if isinstance(node, list) else node[name]
    return node


def _is_dtype(path: Any) -> bool:
    name = str(path).removeprefix("torch.")
    return isinstance(getattr(torch, name, None), torch.dtype) if name.isidentifier() else False


def _located(target: str) -> Any:
    """What Hydra builds for `target`."""
    from hydra.utils import get_object

    hydra_log = logging.getLogger("hydra.utils")
    was_disabled, hydra_log.disabled = hydra_log.disabled, True
    try:
        return get_object(target)
    finally:
        hydra_log.disabled = was_disabled
