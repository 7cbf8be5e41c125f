"""The configuration groups, one YAML file a choice; `hydra.compose` finds them as `accumexp.conf`."""

from pathlib import Path

from . import resolvers as resolvers  # the YAML files use them


def conf_dir() -> str:
    """The folder of the YAML files."""
    return str(Path(__file__).resolve().parent)
