"""Reads shards without running code from them: torch unpickles their metadata and non-tensors freely.

Imports torch.distributed.checkpoint, which takes as long as half of torch.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from .checkpoint_file import check_entries, check_storages

METADATA = ".metadata"
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "collections": {"OrderedDict"},
}


def _member(kind: Any, name: str) -> Any:
    """The member of an enumeration, which Python before 3.11.4 pickles as a call of `getattr`."""
    if not isinstance(kind, EnumMeta):
        raise RuntimeError(f"{METADATA} names getattr of {kind!r}, which is no part of it")
    return kind[name]


class _Metadata(pickle._Unpickler):  # in Python: C's would allocate its memo by a number in the pickle
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in ALLOWED.get(module, ()):
            raise RuntimeError(f"{METADATA} names {module}.{name}, which is no part of it")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """torch's reader of a folder of shards, for metadata of the known types and files of that folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        metadata = _Metadata(io.BytesIO((self.folder / METADATA).read_bytes())).load()
        for info in getattr(metadata, "storage_data", {}).values():
            name = str(info.relative_path)
            if Path(name).name != name or not (self.folder / name).is_file():
                raise RuntimeError(f"{METADATA} names {name}, which is no file beside it")
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        path = self.folder / str(sinfo.relative_path)
        if not 0 <= sinfo.offset <= sinfo.offset + sinfo.length <= path.stat().st_size:
            raise RuntimeError(f"{METADATA} names bytes that {path.name} does not have")
        file.seek(sinfo.offset)
        part = io.BytesIO(file.read(sinfo.length))
        with zipfile.ZipFile(part) as archive:
            check_entries(path, archive, sinfo.length)
            check_storages(path, archive)
        part.seek(0)
        return part


class SafeLoadPlanner(DefaultLoadPlanner):
    """torch's planner, which reads numbers and text by `weights_only`."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        made = torch.load(value, weights_only=True)
        value.seek(0)
        value.truncate()
        torch.save(made, value)
        value.seek(0)
        super().load_bytes(read_item, value)
