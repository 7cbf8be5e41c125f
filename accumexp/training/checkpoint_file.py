"""What a checkpoint's file declares, checked before anything of it is inflated or allocated."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError

# What torch.load(weights_only=True) reads and allocates by a number in the pickle alone.
ALLOCATING = {("builtins", "bytearray"), ("__builtin__", "bytearray"), ("torch._utils", "_rebuild_qtensor")}

# The elements of torch's storages by name; a name that is not here is no part of a checkpoint.
ELEMENT_BYTES = {
    **{"ComplexDouble": 16, "ComplexFloat": 8, "Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2},
    **{"BFloat16": 2, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1, "Untyped": 1},
}


def check_entries(path: Path, archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Refuses an archive whose entries declare more than its file holds; torch writes them uncompressed.

    Raises:
        UsageError: naming the entry.
    """
    entries = archive.infolist()
    declared = sum(entry.file_size for entry in entries)
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UsageError(
                f"checkpoint {path}: {entry.filename} is compressed to {entry.compress_size} of "
                f"{entry.file_size} bytes; a checkpoint is not compressed"
            )
    if declared > file_bytes:
        raise UsageError(
            f"checkpoint {path}: declares {declared} bytes, and the file holds {file_bytes}; it is damaged"
        )


def check_storages(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuses tensors whose storage, an entry of its own, is shorter than the size that torch reads.

    Raises:
        UsageError: with both sizes.
        Exception: of the pickle, if it is damaged.
    """
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    names = [name for name in sizes if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1 or len(sizes) != len(archive.infolist()):
        raise UsageError(f"checkpoint {path}: not a checkpoint of accumexp (it has no data.pkl)")
    root = names[0].removesuffix("data.pkl")
    with archive.open(names[0]) as file:
        reader = _Declarations(file)
        reader.load()
    for name, needed in reader.storages.items():
        held = sizes.get(f"{root}data/{name}", 0)
        if needed > held:
            raise UsageError(
                f"checkpoint {path}: a tensor of {needed} bytes is declared, and the file holds {held} of it"
            )


class _Nothing:
    """In place of every object of a pickle."""

    def __init__(self, *arguments: Any) -> None: ...

    def __call__(self, *arguments: Any) -> _Nothing:
        return _Nothing()

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...

    def add(self, value: Any) -> None: ...

    def update(self, values: Any) -> None: ...


class _Storage(_Nothing):
    """The type of a storage, with the size of an element."""

    def __init__(self, name: str) -> None:
        self.element = ELEMENT_BYTES[name.removesuffix("Storage")]


class _Declarations(pickle._Unpickler):  # in Python: C's would allocate its memo by a number in the pickle
    """Reads the bytes of each storage from a pickle, and makes none of its objects."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOCATING:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")
        return _Storage(name) if name.endswith("Storage") else _Nothing()

    def persistent_load(self, pid: Any) -> Any:
        kind, storage, name, _, elements = pid
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(elements, int):
            raise pickle.UnpicklingError(f"no storage: {kind}")
        needed = elements * storage.element
        if needed < 0:
            raise pickle.UnpicklingError("a storage of a negative size")
        self.storages[str(name)] = max(needed, self.storages.get(str(name), 0))
        return _Nothing()


def check_tensors(path: Path, content: Any) -> None:
    """Refuses views with more elements than their storage, such as expanded ones, which a copy allocates.

    Raises:
        UsageError: naming the path, also if many tensors share a storage.
    """
    total, limit = 0, 4 * path.stat().st_size
    for tensor in _tensors(content):
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            if tensor.device.type == "meta" or tensor.numel() * tensor.element_size() > limit:
                raise UsageError(f"checkpoint {path}: a tensor {tuple(tensor.shape)} is not in the file")
            continue
        size = tensor.numel() * tensor.element_size()
        if size > tensor.untyped_storage().nbytes():
            raise UsageError(
                f"checkpoint {path}: a tensor {tuple(tensor.shape)} is larger than what the file holds of it"
            )
        total += size
    if total > limit:
        raise UsageError(f"checkpoint {path}: its tensors need {total} bytes, four times those of the file")


def _tensors(content: Any) -> Any:
    """The tensors in nested containers, without recursion."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple | set | frozenset) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, Mapping) else value)
