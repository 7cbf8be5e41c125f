"""The version of the code that runs: git's commit, or the installed package's version."""

from __future__ import annotations

import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command in `folder`; None without git or a checkout."""
    try:
        completed = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout


def code_version() -> tuple[str, str]:
    """(git sha, diff against it) of this package's checkout, or (version, "") of an installed wheel."""
    from .. import __version__

    package = Path(__file__).resolve().parents[1]
    tracked = git(package, "ls-files", "--error-unmatch", "__init__.py")
    sha = git(package, "rev-parse", "HEAD") if tracked else None
    if sha is None:
        return __version__, ""
    return sha.strip(), git(package, "diff", "HEAD") or ""
