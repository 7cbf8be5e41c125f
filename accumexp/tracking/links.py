"""Links to files that are never changed, such as checkpoints, in place of copies on the same disk."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


def local_folder(uri: str) -> Path | None:
    """The folder of a store's artifacts, None if they are not on this machine's file system."""
    parts = urlsplit(uri)
    return (
        Path(url2pathname(parts.path))
        if parts.scheme == "file" and parts.netloc in ("", "localhost")
        else None
    )


def link(path: Path, name: Path) -> bool:
    """Makes `name` another name of the file `path`, in one step; False where the file system cannot."""
    partial = name.with_name(f".{name.name}.{os.getpid()}.partial")
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        os.link(path, partial)
        os.replace(partial, name)
        partial.unlink(missing_ok=True)  # rename(2) leaves it where both are the same file already
    except OSError:
        return False
    return True
