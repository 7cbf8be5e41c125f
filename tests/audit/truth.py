"""Which cells of the audit's matrix are right, by plain PyTorch: `python -m tests.audit.truth [trainer ...]`.

Runs an adapter's `fit` under a watch of its own and computes the larger batch's gradient itself, see
`larger_batch.py`. Losses, padding and windows are written here anew; an adapter's samples are taken as is.
Every cell also trains with one micro-batch an update, which has to be equal: else the cell says nothing.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from accumexp.audit import adapters
from accumexp.audit.cases import composed
from accumexp.audit.cells import CONF
from accumexp.audit.samples import samples_of
from accumexp.audit.settings import Setting
from tests.audit.larger_batch import Task, find_truth

STEPS, MICRO = 4, 8
NOT_JUDGED = {"dropout": "a draw by micro-batch has no larger batch"}
# Computed in fp32 whatever the weights are: losses of transformers' models, Llama's normalisation, Composer's
# weights of micro-batches, the outputs of a model of Fabric's and DeepSpeed's gradients. Autocast: bf16.
FP32 = {"composer", "deepspeed", "fabric", "trl", "torchtune", "bert", "bert_mlm", "gpt2", "llama"}


def pad(rows: Sequence[Tensor], value: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.stack([functional.pad(row, (0, longest - len(row)), value=value) for row in rows])


def mean_loss(setting: Setting, logits: Tensor, labels: Tensor) -> Tensor:
    """The setting's loss, a mean over samples or over the tokens whose label is not -100."""
    if setting.model in ("gpt2", "llama") and setting.task == "tokens":
        logits, labels = logits[:, :-1], labels[:, 1:]
    valid = labels != -100
    chances = logits[valid].log_softmax(-1)
    losses = -chances.gather(-1, labels[valid][:, None])[:, 0]
    if setting.own_loss:
        losses = (1 - (-losses).exp()).square() * losses
    smoothing = setting.label_smoothing
    return ((1 - smoothing) * losses - smoothing * chances.mean(-1)).mean()


def task_of(trainer: str, setting: Setting) -> Task:
    """The setting's data set and loss in plain PyTorch."""
    samples = samples_of(setting, torch.float32 if setting.precision == "bf16" else torch.float64)
    rows = [sample["inputs"] for sample in samples]
    labels = [sample["labels"] for sample in samples]

    def loss(model: nn.Module, held: Sequence[int]) -> Tensor:
        wanted = [labels[index] for index in held]
        target = pad(wanted, -100) if wanted[0].dim() else torch.stack(wanted)
        given = [rows[index] for index in held]
        tokens = pad(given, 0) if given[0].dtype == torch.int64 else torch.stack(given).double()
        if trainer == "torchtune":
            chunks = model(tokens)
            output = torch.cat(chunks, dim=1) if isinstance(chunks, list) else chunks
        elif setting.model != "mlp":
            output = model(input_ids=tokens, attention_mask=(tokens != 0).long())
        else:
            output = model(tokens)
        return mean_loss(setting, output if torch.is_tensor(output) else output["logits"], target)

    bound = 1e-5 if {trainer, setting.model} & FP32 else 1e-9
    if setting.precision == "bf16":
        bound = 0.03
    return Task(
        rows,
        loss,
        epochs=setting.epochs,
        processes=setting.processes,
        clip_norm=setting.clip_norm,
        bound=bound,
    )


def judge(trainer: str, setting: Setting, steps: int, micro: int) -> dict[str, Any]:
    """Judges one cell in this process, which is one of the setting's ranks."""
    adapter = import_module(f"accumexp.audit.adapters.{trainer}")
    if trainer in ("trl", "torchtune") and setting.model not in ("gpt2", "llama"):
        setting = replace(setting, model="llama", task="tokens")  # as their adapters do
    task = task_of(trainer, setting)

    def fit(watch: Any, steps: int, micro: int) -> None:
        adapter.fit(setting, watch, steps, micro)

    whole = find_truth(fit, task, 1, steps * micro)
    rates = [update.rates for update in whole.updates]
    truth = find_truth(fit, replace(task, rates=rates), steps, micro)
    return {
        "equal": truth.equal,
        "says": str(truth),
        "valid": whole.equal,
        "whole": str(whole),
        "updates": truth.as_json()["updates"],
        "made": truth.made,
        "due": truth.due,
    }


def run_rank(
    rank: int, port: int, folder: str, trainer: str, setting: Setting, steps: int, micro: int
) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting.processes, "MASTER_PORT": port}
    ranks |= {"LOCAL_WORLD_SIZE": setting.processes, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in ranks.items()} | {"TORCHELASTIC_RUN_ID": "truth"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    cell = judge(trainer, setting, steps, micro)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(cell))


def judge_ranks(trainer: str, setting: Setting, steps: int, micro: int) -> dict[str, Any]:
    """Judges a cell of several ranks, each in a process of its own; returns the first that is not equal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        given = (port, folder, trainer, setting, steps, micro)
        torch.multiprocessing.spawn(run_rank, given, nprocs=setting.processes)  # type: ignore[attr-defined]
        cells = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(setting.processes)]
    return next((cell for cell in cells if not (cell["valid"] and cell["equal"])), cells[0])


def settings() -> dict[str, Setting]:
    names = sorted(path.stem for path in (CONF / "setting").glob("*.yaml"))
    return {name: Setting(**composed([f"setting={name}"])["setting"]) for name in names}


def find_cells(trainers: Sequence[str], names: Sequence[str], steps: int, micro: int) -> list[dict[str, Any]]:
    """Judges every cell of the trainers that are installed; prints each as it is known."""
    cells = []
    for trainer in trainers:
        try:
            adapter = import_module(f"accumexp.audit.adapters.{trainer}")
        except ImportError as error:
            print(f"{trainer:13} not judged: {error}", flush=True)
            continue
        for name, setting in settings().items():
            if name not in adapter.SETTINGS or (names and name not in names):
                continue
            cell: dict[str, Any] = {"trainer": trainer, "setting": name, "version": version(adapter.PACKAGE)}
            if name in NOT_JUDGED:
                cell["says"] = f"not judged: {NOT_JUDGED[name]}"
            else:
                try:
                    judged = judge if setting.processes == 1 else judge_ranks
                    cell |= judged(trainer, setting, steps, micro)
                except Exception as error:  # a cell that cannot run is reported, and the next one is run
                    traceback.print_exc()
                    cell["says"] = f"not judged: {type(error).__name__}: {error}"
            if not cell.get("valid", True):
                cell["says"] = f"not judged: one micro-batch is not the larger batch: {cell['whole']}"
            cells.append(cell)
            print(f"{trainer:13} {cell['version']:9} {name:24} {cell['says']}", flush=True)
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    every_trainer = [module.name for module in iter_modules(adapters.__path__)]
    parser = argparse.ArgumentParser(prog="python -m tests.audit.truth", description=__doc__)
    parser.add_argument("trainers", nargs="*", default=every_trainer, metavar="trainer")
    parser.add_argument("--settings", default="", help="names, divided by commas; all by default")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--micro", type=int, default=MICRO)
    parser.add_argument("--write", type=Path, help="a JSON file")
    parser.add_argument(
        "--against", type=Path, help="a matrix's JSON; differing cells are printed, and exit 1"
    )
    given = parser.parse_args(arguments)
    names = [name for name in given.settings.split(",") if name]
    cells = find_cells(given.trainers, names, given.steps, given.micro)
    if given.write is not None:
        given.write.write_text(json.dumps(cells, indent=1) + "\n")
    wrong = sum(cell.get("equal") is False and cell["valid"] for cell in cells)
    right = sum(cell.get("equal") is True and cell["valid"] for cell in cells)
    print(f"{right} cells equal, {wrong} wrong, {len(cells) - right - wrong} not judged")
    if given.against is None:
        return 0
    return 1 if differing(cells, json.loads(given.against.read_text())) else 0


def differing(cells: Sequence[dict[str, Any]], audited: Sequence[dict[str, Any]]) -> int:
    """Prints the judged cells of which the audit says otherwise; returns their number."""
    verdicts = {(cell["trainer"], cell["setting"]): cell["verdict"] for cell in audited}
    judged = [cell for cell in cells if "equal" in cell and cell["valid"]]
    both = [cell for cell in judged if (cell["trainer"], cell["setting"]) in verdicts]
    other = [c for c in both if (verdicts[c["trainer"], c["setting"]] == "equal") != c["equal"]]
    for cell in other:
        audit = verdicts[cell["trainer"], cell["setting"]]
        print(f"{cell['trainer']} {cell['setting']}: the audit says {audit}, plain PyTorch {cell['says']}")
    print(f"{len(both) - len(other)} of {len(both)} cells agree with the audit")
    return len(other)


if __name__ == "__main__":
    sys.exit(main())
