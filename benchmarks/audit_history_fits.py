"""Fits for releases of the past: run by `audit_history.py` in each release's environment.

    python -m benchmarks.audit_history_fits <case> [key=value ...]

prints what the audit says as JSON, and with `--truth` what plain PyTorch says. Needs torch, the release and
whatever the release needs; the data are made here, equally for every release.
"""

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, SequentialSampler

from tests.audit.larger_batch import Task

VOCABULARY, PADDING, IGNORED, CLASSES, FEATURES, WIDTH, EPOCHS = 32, 0, -100, 4, 8, 16, 2
PROMPT, BETA = 4, 0.1
LLAMA_BOUND = 1e-5  # its normalisation and rotary embedding compute in fp32


@dataclass(frozen=True)
class Case:
    """A fit, and the task that says what is true of it."""

    fit: Callable[[Any, int, int], None]
    task: Task
    steps: int = 4
    micro: int = 8


def pad(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def sentences(samples: int, *, ragged: bool) -> list[Tensor]:
    """Token ids of 3 to 15 tokens, or all of 10."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 16, (samples,), generator=generator) if ragged else torch.full((samples,), 10)
    return [torch.randint(3, VOCABULARY, (int(length),), generator=generator) for length in lengths]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, attention_mask=(tokens != PADDING).long())["logits"]


def small(kind: str) -> nn.Module:
    """A model of transformers with random weights, in float64: llama, or bert to classify."""
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": PADDING}
    if kind == "bert":
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2))
    return model.double()


def train(
    trainer_class: type, config_class: type, model: nn.Module, rows: Any, steps: int, micro: int, **more: Any
):
    """Trains with a Trainer of transformers or trl, in the order of the rows."""

    class InOrder(trainer_class):
        def _get_train_sampler(self, *given: Any) -> SequentialSampler:
            return SequentialSampler(given[0] if given else self.train_dataset)

    config = more.pop("config", {})
    with tempfile.TemporaryDirectory() as folder:
        arguments = config_class(
            folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
            num_train_epochs=EPOCHS,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            bf16=False,
            optim="sgd",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **config,
        )
        InOrder(model=model, args=arguments, train_dataset=rows, **more).train()


def causal(samples: int, ragged: bool = True, updates: int = -1) -> Case:
    """The Trainer on next tokens; the first of each sequence are a prompt, whose labels are ignored.

    `updates`: after which the Trainer is told to stop, -1 for `EPOCHS` epochs.
    """
    from transformers import Trainer, TrainingArguments

    tokens = sentences(samples, ragged=ragged)
    labels = [row.masked_fill(torch.arange(len(row)) < (len(row) // 2), IGNORED) for row in tokens]
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]

    def collate(held: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = pad([row["input_ids"] for row in held], PADDING)
        wanted = pad([row["labels"] for row in held], IGNORED)
        return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": wanted}

    def fit(watch: Any, steps: int, micro: int) -> None:
        limit = {"max_steps": updates}
        train(
            Trainer,
            TrainingArguments,
            watch(small("llama")),
            rows,
            steps,
            micro,
            data_collator=collate,
            config=limit,
        )

    def loss(model: nn.Module, held: Sequence[int]) -> Tensor:
        batch = collate([rows[index] for index in held])
        return next_token_loss(logits_of(model, batch["input_ids"]), batch["labels"])

    return Case(fit, Task(tokens, loss, epochs=EPOCHS, bound=LLAMA_BOUND))


def classes(samples: int) -> Case:
    """The Trainer on BERT for sequence classification."""
    from transformers import Trainer, TrainingArguments

    tokens = sentences(samples, ragged=True)
    labels = torch.randint(CLASSES, (samples,), generator=torch.Generator().manual_seed(1))
    rows = list(zip(tokens, labels, strict=True))

    def collate(held: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        ids = pad([row for row, _ in held], PADDING)
        wanted = torch.stack([label for _, label in held])
        return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": wanted}

    def fit(watch: Any, steps: int, micro: int) -> None:
        train(Trainer, TrainingArguments, watch(small("bert")), rows, steps, micro, data_collator=collate)

    def loss(model: nn.Module, held: Sequence[int]) -> Tensor:
        logits = logits_of(model, pad([tokens[index] for index in held], PADDING))
        return functional.cross_entropy(logits, labels[list(held)])

    return Case(fit, Task(tokens, loss, epochs=EPOCHS))


def vectors(samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, FEATURES, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(CLASSES, (samples,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()


def evaluated(samples: int) -> Case:
    """Accelerate's loop, which evaluates on a prepared loader after each update."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    inputs, labels = vectors(samples)
    rows = list(zip(inputs, labels, strict=True))

    def fit(watch: Any, steps: int, micro: int) -> None:
        for state in (AcceleratorState, GradientState):  # a user has one Accelerator a process
            state._shared_state.clear()
        accelerator = Accelerator(gradient_accumulation_steps=steps, cpu=True)
        model = watch(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        given = (model, optimizer, DataLoader(rows, micro), DataLoader(rows[:16], 4))  # type: ignore[arg-type]
        model, optimizer, loader, evaluation = accelerator.prepare(*given)
        for _ in range(EPOCHS):
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(functional.cross_entropy(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    with torch.no_grad():
                        model.eval()
                        for held, _ in evaluation:
                            model(held)
                        model.train()

    def loss(model: nn.Module, held: Sequence[int]) -> Tensor:
        return functional.cross_entropy(model(inputs[list(held)]), labels[list(held)])

    return Case(fit, Task(list(inputs), loss, epochs=EPOCHS))


def preferences(samples: int) -> Case:
    """trl's DPOTrainer; prompts and answers all have the same length."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    base = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, **special)
    ids = torch.stack(sentences(2 * samples, ragged=False))

    def text(row: Tensor) -> str:
        return " ".join(f"w{int(token)}" for token in row)

    columns = {"prompt": [text(row[:PROMPT]) for row in ids[:samples]]}
    columns |= {"chosen": [" " + text(row[PROMPT:]) for row in ids[:samples]]}
    columns |= {"rejected": [" " + text(row[PROMPT:]) for row in ids[samples:]]}
    options = {"max_length": 32, "max_prompt_length": 16, "disable_dropout": False}

    def fit(watch: Any, steps: int, micro: int) -> None:
        model = small("llama")
        more = {"ref_model": copy.deepcopy(model), "processing_class": tokenizer, "config": options}
        train(DPOTrainer, DPOConfig, watch(model), Dataset.from_dict(columns), steps, micro, **more)

    end = torch.full((samples, 1), 2)
    chosen_ids = torch.cat([ids[:samples], end], dim=1)
    rejected_ids = torch.cat([ids[:samples, :PROMPT], ids[samples:, PROMPT:], end], dim=1)
    reference = small("llama")

    def loss(model: nn.Module, held: Sequence[int]) -> Tensor:
        both = torch.cat([chosen_ids[list(held)], rejected_ids[list(held)]])
        chosen, rejected = answer_chances(logits_of(model, both), both).sum(1).chunk(2)
        with torch.no_grad():
            before, after = answer_chances(logits_of(reference, both), both).sum(1).chunk(2)
        return -functional.logsigmoid(BETA * (chosen - rejected - before + after)).mean()

    return Case(fit, Task(list(chosen_ids), loss, epochs=EPOCHS, bound=LLAMA_BOUND))


def answer_chances(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the tokens after the prompt, of shape (sequences, tokens of an answer)."""
    chances = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return chances[:, PROMPT - 1 :]


CASES: dict[str, Callable[..., Case]] = {
    "causal": causal,
    "classes": classes,
    "evaluated": evaluated,
    "preferences": preferences,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("options", nargs="*", metavar="key=value", help="values in JSON")
    parser.add_argument("--truth", action="store_true", help="ask plain PyTorch and not the audit")
    given = parser.parse_args(arguments)
    options = {key: json.loads(value) for key, value in (option.split("=", 1) for option in given.options)}
    case = CASES[given.case](**options)
    if given.truth:
        from tests.audit.larger_batch import find_truth

        whole = find_truth(case.fit, case.task, 1, case.steps * case.micro)
        truth = find_truth(case.fit, case.task, case.steps, case.micro)
        answer = {"equal": truth.equal, "says": str(truth), "whole": str(whole), "valid": whole.equal}
    else:
        from accumexp.proof import audit

        certificate = audit(case.fit, case.steps, case.micro)
        answer = {"equal": certificate.proved, "says": str(certificate)}
    print("ANSWER " + json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
