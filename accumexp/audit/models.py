"""Models of a setting: a network of two layers, and small random models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .samples import CLASSES, FEATURES, PADDING, VOCABULARY
from .settings import Setting

WIDTH = 16
POSITIONS = 32
CAUSAL = ("gpt2", "llama")  # models that predict the next token


def model_of(setting: Setting, dtype: torch.dtype) -> nn.Module:
    """The model of `setting`, with weights from its seed. An mlp is called as `model(inputs)`."""
    torch.manual_seed(setting.seed)
    model = mlp(setting) if setting.model == "mlp" else transformer(setting)
    return model.to(dtype)


def mlp(setting: Setting) -> nn.Module:
    """Two layers; for tokens on an embedding. Outputs (samples, classes), or (samples, length, tokens)."""
    tokens = setting.task == "tokens"
    first: nn.Module = nn.Embedding(VOCABULARY, WIDTH) if tokens else nn.Linear(FEATURES, WIDTH)
    outputs = VOCABULARY if tokens else CLASSES
    return nn.Sequential(first, nn.GELU(), nn.Dropout(setting.dropout), nn.Linear(WIDTH, outputs))


class WithLoss(nn.Module):
    """A model that returns its own loss, as the Trainer of transformers expects of any module."""

    config = None  # the Trainer reads it for label smoothing

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(inputs)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


def transformer(setting: Setting) -> nn.Module:
    """A model of transformers with random weights: bert, roberta, distilbert, llama, gpt2 or bert_mlm.

    For the task "classes" it classifies sequences; for "tokens" it classifies tokens (bert, roberta,
    distilbert), fills in masked ones (bert_mlm) or predicts the next one (llama, gpt2).
    """
    import transformers

    kind = setting.model.removesuffix("_mlm")
    config = transformers.AutoConfig.for_model(kind, **_sizes(kind, setting.dropout))
    if setting.task == "classes":
        config.num_labels = CLASSES
        return transformers.AutoModelForSequenceClassification.from_config(config)
    if kind in CAUSAL:
        return transformers.AutoModelForCausalLM.from_config(config)
    if setting.model.endswith("_mlm"):
        return transformers.AutoModelForMaskedLM.from_config(config)
    config.num_labels = VOCABULARY
    return transformers.AutoModelForTokenClassification.from_config(config)


def _sizes(kind: str, dropout: float) -> dict[str, Any]:
    tokens = {"vocab_size": VOCABULARY, "pad_token_id": PADDING, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS}
        return {**tokens, **sizes, "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    if kind == "distilbert":
        sizes = {"dim": WIDTH, "n_layers": 1, "n_heads": 2, "hidden_dim": 2 * WIDTH}
        drops = {"dropout": dropout, "attention_dropout": dropout, "seq_classif_dropout": dropout}
        return {**tokens, **sizes, **drops, "max_position_embeddings": POSITIONS}
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 2 * WIDTH, "max_position_embeddings": POSITIONS}
    if kind == "llama":
        return {**tokens, **sizes, "num_key_value_heads": 2, "attention_dropout": dropout}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return {**tokens, **sizes, **drops}
