"""Damaged and hostile checkpoints, made of a run's own, and commands over them with their memory.

Code that runs from one leaves a file, `CANARY`, in the folder of the command.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import resource
import shutil
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accumexp.training.checkpoint import FORMAT

from .command import Done, environment
from .forked import as_main, forked

CANARY = "canary"
TOUCH = f"touch {CANARY}"
PACKAGE = f"""
from pathlib import Path
Path({CANARY!r}).touch()

class Model:
    def __init__(self, *arguments, **settings):
        Path({CANARY!r}).touch()
"""
NAME = "update-00000013.pt"
GIB = 2**30


@dataclass(frozen=True)
class Hostile:
    """A checkpoint at `path` that `make` writes from the content of a sound one."""

    name: str
    make: Callable[[Path, dict[str, Any]], None]


def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Hostile:
    """The checkpoint with its content changed in place, or replaced by what `change` gives."""

    def make(path: Path, content: dict[str, Any]) -> None:
        content = copy.deepcopy(content)
        made = change(content)
        torch.save(content if made is None else made, path)

    return Hostile(name, make)


def put(*where: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change that puts `value` at the keys `where`."""

    def change(content: dict[str, Any]) -> None:
        node: Any = content
        for key in where[:-1]:
            node = node[key]
        node[where[-1]] = value

    return change


def target(key: str, node: Any) -> Hostile:
    """The checkpoint with `node` at the dotted key of its configuration."""
    path = node["_target_"] if isinstance(node, dict) and "_target_" in node else str(node)
    return changed(f"{key}: {path}"[:90], put("config", *key.split("."), value=node))


class Runs:
    """Unpickling one runs a shell command."""

    def __reduce__(self) -> Any:
        return os.system, (TOUCH,)


def targets() -> list[Hostile]:
    """Configurations that would run code where they are built."""
    shell = {"command": TOUCH}
    pickled = {"f": "evil.pkl", "weights_only": False}
    evil = [
        {"_target_": "os.system", **shell},
        {"_target_": "posix.system", **shell},
        {"_target_": "torch.os.system", **shell},
        {"_target_": "torch.nn.modules.module.os.system", **shell},
        {"_target_": "accumexp.training.checkpoint.os.system", **shell},
        {"_target_": "accumexp.environment.code_version.subprocess.getoutput", "cmd": TOUCH},
        {"_target_": "subprocess.Popen", "args": TOUCH, "shell": True},
        {"_target_": "builtins.exec", "_args_": [f"open({CANARY!r}, 'w')"]},
        {"_target_": "eval", "_args_": [f"open({CANARY!r}, 'w')"]},
        {"_target_": "runpy.run_path", "path_name": "own_code.py"},
        {"_target_": "importlib.import_module", "name": "own_code"},
        {"_target_": "own_code.Model"},
        {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [CANARY]}]},
        {"_target_": "hydra.utils.call", "config": {"_target_": "os.system", **shell}},
        {
            "_target_": "functools.partial",
            "_args_": [{"_target_": "hydra.utils.get_method", "path": "os.system"}],
        },
        {"_target_": "torch.load", **pickled},
        {"_target_": "torch.serialization.load", **pickled},
        {"_target_": "torch.hub.load", "repo_or_dir": ".", "model": "evil", "source": "local"},
        {"_target_": "torch.utils.cpp_extension.load_inline", "name": "x", "cpp_sources": "int x;"},
        {"_target_": "torch.ops.load_library", "path": "evil.so"},
        {"_target_": "torch.jit.load", "f": "evil.pkl"},
        {"_target_": "torch.utils.data.datapipes.iter.FileOpener", "datapipe": [CANARY]},
        {"_target_": "torchvision.datasets.lsun.LSUNClass", "root": "."},
        {"_target_": "transformers.AutoModel.from_pretrained", "_args_": ["."], "trust_remote_code": True},
        {"_target_": "numpy.save", "file": CANARY, "arr": [1]},
    ]
    nested = {"_target_": "os.system", **shell}
    return [
        *(target("model", node) for node in evil),
        target("loss", {"_target_": "accumexp.training.losses.Regression", "criterion": nested}),
        target(
            "model", {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.ReLU"}, nested]}
        ),
        target("optimizer", {"_target_": "shutil.copy", "src": "own_code.py", "dst": CANARY}),
        target("optimizer.groups", [{"params": "*", "_target_": "os.system", **shell}]),
        target("scheduler", {"_target_": "torch.optim.lr_scheduler.LambdaLR", "lr_lambda": nested}),
        target("metrics.accuracy", {"_target_": "own_code.Model"}),
        target("callbacks.mine", nested),
        target("data.collate", {"_target_": "os.system", "_partial_": True}),
        target("data.sampler", {"_target_": "torch.utils.data.SubsetRandomSampler", "indices": nested}),
        target("data.transform", {"_target_": "torchvision.transforms.Lambda", "lambd": nested}),
        target(
            "data.train", {"_target_": "torchvision.datasets.DatasetFolder", "root": ".", "loader": nested}
        ),
        target("data.test", {"_target_": ["os.system"]}),
        target("data.root", "${oc.env:HOME}"),
        target("data.root", "\\${oc.env:HOME}"),
        target("model.hidden", "${oc.create:'[1, 2]'}"),
        target("data.root", "${place:.,0,0,canary,[]}"),
        target("trust", True),
        changed("interpolations: environment", put("interpolations", "device", value="${oc.env:HOME}")),
    ]


PARTS = ("config", "progress", "model", "optimizer", "scheduler", "callbacks", "evaluated", "run", "random")


def parts() -> list[Hostile]:
    """Checkpoints that lack a part, or have one of a wrong type or shape."""
    weight = "layers.1.weight"
    cases = [
        changed(f"without {part}", lambda content, part=part: content.pop(part) and None) for part in PARTS
    ]
    for part in (*PARTS, "loss_scale", "interpolations"):
        values = [None, 7, [1, 2], torch.ones(3), "text"] if part in ("model", "config") else [None, [1]]
        kinds = {f"{part}: {type(value).__name__}": value for value in values}
        cases += [changed(name, put(part, value=value)) for name, value in kinds.items()]
    other = {
        "a weight is text": (("model", weight), "text"),
        "a weight of another shape": (("model", weight), torch.ones(2, 2)),
        "a weight of another dtype": (("model", weight), torch.ones(128, 1024, dtype=torch.complex64)),
        "a weight on no device": (("model", weight), torch.ones(128, 1024, device="meta")),
        "a weight with an odd name": (("model", 5), torch.ones(2)),
        "the optimizer's groups": (("optimizer", "param_groups"), [{}]),
        "the optimizer's state": (("optimizer", "state"), {0: None}),
        "the optimizer's momentum": (("optimizer", "state", 0, "momentum_buffer"), "text"),
        "the schedule's state": (("scheduler", "last_epoch"), "text"),
        "the callbacks' state": (("callbacks", "checkpoint"), {}),
        "the callbacks' weights": (("callbacks", "ema", "module.layers.1.weight"), torch.ones(3)),
        "the update is text": (("progress", "update"), "13"),
        "the update is negative": (("progress", "update"), -1),
        "the update is huge": (("progress", "update"), 2**70),
        "the epoch is a bool": (("progress", "epoch"), True),
        "an unknown progress": (("progress", "more"), 1),
        "an evaluated text": (("evaluated", "eval/loss"), "1"),
        "random: torch": (("random", "torch"), torch.zeros(3)),
        "random: python": (("random", "python"), (3, (1, 2), None)),
        "random: numpy": (("random", "numpy"), "text"),
        "random_others": (("random_others",), {"a": 1}),
        "shards elsewhere": (("shards",), "../../somewhere"),
        "shards of a number": (("shards",), 3),
        "ended_by": (("ended_by",), ["text"]),
        "the run": (("run",), {"uri": "sqlite:///mlflow.db"}),
        "the shortage": (("shortage",), {"recovery": 5}),
        "a model without a target": (("config", "model"), {}),
        "a model of text": (("config", "model"), "accumexp.models.MLP"),
        "data of a number": (("config", "data"), 3),
        "a batch of text": (("config", "data", "batch_size"), "many"),
        "epochs of a tensor": (("config", "trainer", "epochs"), torch.ones(2)),
        "callbacks in a list": (("config", "callbacks"), [1]),
        "a callback of text": (("config", "callbacks", "checkpoint"), "text"),
        "metrics of text": (("config", "metrics", "accuracy"), "text"),
        "the samples' target": (("config", "data", "target"), {"a": 1}),
        "a huge model": (("config", "model", "hidden"), [100_000, 100_000]),
        "a momentum of another shape": (("optimizer", "state", 0, "momentum_buffer"), torch.ones(3)),
        "the best value": (("callbacks", "checkpoint", "best"), "text"),
        "a key of the schema is unknown": (("config", "trainer", "epohcs"), 3),
    }
    cases += [changed(name, put(*where, value=value)) for name, (where, value) in other.items()]

    def deep(content: dict[str, Any]) -> None:
        for _ in range(300):
            content["config"]["model"] = {"a": content["config"]["model"]}

    cases += [
        changed("deep", deep),
        changed("another format", put("format", value="accumexp checkpoint 9")),
        changed("no dict", lambda content: [content]),
        changed("a tensor", lambda content: torch.ones(3)),
    ]
    return cases


def files() -> list[Hostile]:
    """Files that are no checkpoint, or declare more than they hold."""

    def sound(content: dict[str, Any]) -> bytes:
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    def rewritten(compression: int, change: Callable[[str, bytes], bytes]) -> Callable[..., None]:
        def make(path: Path, content: dict[str, Any]) -> None:
            with zipfile.ZipFile(io.BytesIO(sound(content))) as old:
                with zipfile.ZipFile(path, "w", compression, compresslevel=1) as new:
                    for entry in old.infolist():
                        new.writestr(entry.filename, change(entry.filename, old.read(entry)))

        return make

    def bomb(name: str, data: bytes) -> bytes:
        return bytes(2 * GIB - 1) if name.endswith("data/0") else data

    def shortened(name: str, data: bytes) -> bytes:
        return data[:16] if name.endswith("data/0") else data

    def without(name: str, data: bytes) -> bytes:
        return b"" if name.endswith("data.pkl") else data

    def written(data: bytes) -> Callable[..., None]:
        return lambda path, content: path.write_bytes(data) and None

    def cut(path: Path, content: dict[str, Any]) -> None:
        data = sound(content)
        path.write_bytes(data[: len(data) // 2])

    def flipped(path: Path, content: dict[str, Any]) -> None:
        data = bytearray(sound(content))
        data[len(data) // 2] ^= 255
        path.write_bytes(bytes(data))

    def bound(path: Path, content: dict[str, Any]) -> None:
        where, here = os.getcwd(), socket.socket(socket.AF_UNIX)
        os.chdir(path.parent)  # the name of a socket is short
        try:
            here.bind(path.name)
        finally:
            here.close()
            os.chdir(where)

    plain = pickle.dumps(Runs())
    return [
        Hostile("a zip bomb", rewritten(zipfile.ZIP_DEFLATED, bomb)),
        Hostile("a tensor longer than its entry", rewritten(zipfile.ZIP_STORED, shortened)),
        Hostile("no pickle", rewritten(zipfile.ZIP_STORED, without)),
        changed("an expanded tensor", put("optimizer", "state", 0, value={"m": torch.ones(1).expand(2**40)})),
        changed(
            "a shared storage", put("callbacks", "ema", "m", value=[torch.ones(2**18)[:] for _ in range(9)])
        ),
        changed("a pickle that runs code", put("model", "layers.1.weight", value=Runs())),
        Hostile("a bare pickle", written(plain)),
        Hostile("an empty file", written(b"")),
        Hostile("text", written(b"hello\n" * 50)),
        Hostile("an empty zip", written(b"PK\x05\x06" + bytes(18))),
        Hostile("the first half", cut),
        Hostile("a flipped byte", flipped),
        Hostile("a pipe", lambda path, content: os.mkfifo(path)),
        Hostile("a folder", lambda path, content: path.mkdir()),
        Hostile("a socket", bound),
        Hostile("a device", lambda path, content: path.symlink_to("/dev/zero")),
        Hostile("a link to nothing", lambda path, content: path.symlink_to("/nowhere/at/all")),
    ]


def cases() -> list[Hostile]:
    return [*targets(), *parts(), *files()]


def run_hostile(
    command: str, case: Hostile, content: dict[str, Any], folder: Path
) -> tuple[Done, float, bool]:
    """How a command over the checkpoint ends, its memory in GiB above the start's, and whether code ran."""
    shutil.rmtree(folder, ignore_errors=True)
    path = folder / "run" / "checkpoints" / NAME
    path.parent.mkdir(parents=True)
    (folder / "own_code.py").write_text(PACKAGE)
    (folder / "evil.pkl").write_bytes(pickle.dumps(Runs()))
    (folder / "hubconf.py").write_text(PACKAGE + "\nevil = Model\n")
    case.make(path, {"format": FORMAT, **content})
    arguments = (
        [f"checkpoint={path}"] if command == "evaluate" else [f"resume={path}", "trainer.max_updates=15"]
    )
    env = environment(folder)
    done = Done(*forked(_measured, command, arguments, folder=folder, env=env, seconds=100))
    grown = float((folder / "peak").read_text()) / GIB
    return done, grown, (folder / CANARY).exists()


def _measured(command: str, arguments: list[str]) -> None:
    # Far above what is allowed, and below what would hurt the machine.
    resource.setrlimit(resource.RLIMIT_AS, (40 * GIB, 40 * GIB))
    Path("peak").write_text("0")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        as_main(f"accumexp.{command}", arguments)
    finally:
        Path("peak").write_text(str(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def faults(done: Done, grown: float, ran: bool) -> list[str]:
    """What a command over a hostile checkpoint may not do; it may end well, if the damage was not needed."""
    lines = done.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    checks = {
        "code ran": ran,
        "a traceback": "Traceback" in done.stderr + done.stdout,
        "no code of an error": done.code not in (0, 1, 2),
        "not one line": done.code != 0 and (len(errors) != 1 or lines[-1:] != errors),
        f"{grown:.2f} GiB": grown > 1,
    }
    return [name for name, wrong in checks.items() if wrong]
