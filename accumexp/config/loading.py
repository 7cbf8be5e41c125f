"""Conversion between Hydra's configuration, the dataclasses of `schema`, and plain dictionaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UsageError, unknown_key
from .schema import Config
from .validation import complete


def from_hydra(cfg: DictConfig | Mapping[str, Any]) -> Config:
    """The typed and resolved configuration. Raises a `UsageError` that names an unknown key or bad value."""
    return complete(typed(cfg))


def typed(cfg: DictConfig | Mapping[str, Any]) -> Config:
    """`from_hydra` without a check of values, for a configuration that an earlier launch has checked."""
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
        # What no model has asked for may be missing: text has no channels, a regression no classes.
        if isinstance(data := plain.get("data"), dict):
            shape = ("num_classes", "channels", "image_size", "length")
            data.update({key: None for key in shape if data.get(key) == MISSING})
        # Merging into the schema again refuses keys that `+` has added to typed nodes.
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(plain))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(explain_omegaconf(error)) from error
    assert isinstance(config, Config)
    return config


def explain_omegaconf(error: OmegaConfBaseException) -> str:
    """The one-line message for an error of omegaconf: the key and the reason."""
    key = error.full_key or "configuration"
    reason = str(error.msg or error).splitlines()[0]
    node = error.parent_node if isinstance(error.parent_node, DictConfig) else None
    if "not in" in reason and node is not None:
        return unknown_key(key, [str(name) for name in node])
    _, mandatory, missing = reason.partition("Missing mandatory value: ")
    if mandatory and missing not in ("", key):
        return f"{key}: needs {missing}, which is not given; give {missing}=..., or a model and data that fit"
    if mandatory:
        return f"{key}: a value is needed, give {key}=..."
    return f"{key}: {reason}"


def with_steps(config: Config, steps: int, batch_size: int | None = None) -> Config:
    """A copy of `config` with other `accum.steps` and `data.batch_size`, and the derived micro-batch size."""
    plain = to_plain(config)
    plain["accum"].update(steps=steps, micro_batch_size=None)
    plain["data"]["batch_size"] = batch_size or plain["data"]["batch_size"]
    return from_hydra(plain)


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of every leaf of a configuration, enums by name."""
    plain = to_plain(node)
    if isinstance(plain, dict) and plain:
        for key, value in plain.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, plain


def to_plain(node: Any) -> Any:
    """`node` as dicts, lists and scalars, as in a YAML file or a checkpoint."""
    if dataclasses.is_dataclass(node):
        return {item.name: to_plain(getattr(node, item.name)) for item in dataclasses.fields(node)}
    if isinstance(node, Mapping):
        return {str(key): to_plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [to_plain(value) for value in node]
    return node.name if isinstance(node, Enum) else node
