"""One line for each error of Hydra's composition: the key, choice or file, and the remedy."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import first_line, unknown_key
from .loading import explain_omegaconf
from .schema import Config
from .sizes import AUTO

GLOBAL = "# @package _global_"


def explain(error: BaseException, takes_config_dir: bool = True) -> str:
    """The one-line message for an error of Hydra's composition, or of a YAML file that it read.

    Args:
        takes_config_dir: whether the command takes `--config-dir`, with the user's own files.
    """
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not an override, give key=value, in quotes where the value needs them"
    if isinstance(error, yaml.YAMLError):
        return _bad_yaml(error)
    if isinstance(error, MissingConfigException):
        choice = re.search(r"Could not find '([^']*)/([^'/]*)'", text)
        if choice:
            options = sorted(set(getattr(error, "options", None) or ()) - {"schema"})
            listed = f"{choice[1]} is one of {', '.join(options)}" if options else "see --help"
            line = f"{choice[1]}={choice[2]}: no such choice, {listed}"
            return f"{line}{_own_file(choice[1], choice[2], text) if takes_config_dir else ''}"
    # Hydra raises some of its errors while it handles the one that says why, without naming it as the cause.
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    cause = cause if isinstance(cause, OmegaConfBaseException) else None
    file = re.match(r"In '([^']+)': ", text)
    if file:
        return _in_file(file[1], text, cause)
    override = re.search(r"(?:Could not override|Error merging override) '?([^'\s]+)'?", text)
    if override and cause is not None:
        return _bad_override(override[1], text, cause)
    if missing := re.search(r"(?:Could not override|Key) '([^']+)'", text):
        return _unknown(missing[1], cause)
    if cause is not None:
        return explain_omegaconf(cause)
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or type(error).__name__


def _bad_override(override: str, text: str, cause: OmegaConfBaseException) -> str:
    """The message for `key=value` that the composed configuration does not take."""
    key, _, value = override.partition("=")
    full_key = str(cause.full_key or "")
    # A key inside of a dict that was given whole.
    inner = full_key if full_key.startswith(f"{key.lstrip('+')}.") else ""
    if "Could not override" in text:
        return _unknown(inner or key, cause)
    if inner:
        return explain_omegaconf(cause)
    reason = str(cause.msg or cause).splitlines()[0]
    if key == "accum.steps" and "type hint" in reason:
        reason = f"a whole number, or {AUTO}"
    return f"{key}={value}: {reason}"


def _in_file(name: str, text: str, cause: OmegaConfBaseException | None) -> str:
    """The message for an error in the configuration file `name`, such as experiment/mine."""
    group = name.rpartition("/")[0].replace("/", ".")
    missing = re.search(r"Could not override '([^']+)'", text)
    key = missing[1] if missing else str((cause and cause.full_key) or "")
    if group and (key == group or f"@{group}" in key):
        return (
            f"{name}.yaml: its keys are taken as {group}.*, which there is not; begin the file with the line "
            f"{GLOBAL}"
        )
    unknown = missing or "not in" in text
    if not unknown and cause is None:
        return " ".join(line.strip() for line in text.splitlines() if line.strip())
    line = explain_omegaconf(cause) if cause is not None and not unknown else _unknown(key, cause)
    return f"{line} (in {name}.yaml)"


def _own_file(group: str, name: str, text: str) -> str:
    """Where a choice of the user's own is looked for, by Hydra's list of folders in `text`."""
    given = re.search(r"provider=command-line, path=(?:file://)?(.+)", text)
    if given:
        return f"; {given[1].strip()} has no {group}/{name}.yaml"
    return f"; for a file of your own add --config-dir=<the folder with {group}/{name}.yaml>"


def _unknown(key: str, cause: OmegaConfBaseException | None) -> str:
    """The message for a key that the composed configuration does not have; names its first wrong part."""
    node: Any = None
    if cause is not None and cause.parent_node is not None:
        node = cause.parent_node._get_root()
    if node is None:  # a group of a file's defaults list
        fields = dataclasses.fields(Config)
        return unknown_key(key, [one.name for one in fields if one.default is dataclasses.MISSING])
    parts = key.split(".")
    for depth, part in enumerate(parts, 1):
        if not OmegaConf.is_dict(node) or part not in node:
            choices = [str(name) for name in node or ()] if OmegaConf.is_dict(node) else []
            if depth == 1:
                choices = [name for name in choices if name != "hydra"]
            line = unknown_key(".".join(parts[:depth]), choices)
            # What users bring takes further keys, and so may the configuration of a run that is resumed.
            return f"{line} (++{key}=... adds it)" if depth > 1 and _is_free(node) else line
        node = node[part]
    return unknown_key(key, [])


def _is_free(node: Any) -> bool:
    """Whether `node` may have any keys: it is of no dataclass of the schema."""
    return OmegaConf.is_dict(node) and OmegaConf.get_type(node) is dict


def _bad_yaml(error: yaml.YAMLError) -> str:
    """The message for a file that is no YAML: its path, the line, and what is wrong there."""
    mark, began = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    if mark is None:
        return f"configuration: {first_line(error)}"
    path = Path(mark.name)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    line = f"{shown}, line {mark.line + 1}: {getattr(error, 'problem', None) or first_line(error)}"
    context = getattr(error, "context", None)
    if context and began is not None and began.line != mark.line:
        return f"{line}, {context} that begins in line {began.line + 1}"
    return line
