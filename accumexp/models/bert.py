"""BERT for masked language modelling, from transformers, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError


class Bert(nn.Module):
    """transformers' BertForMaskedLM (Devlin et al., arXiv 1810.04805) without its loss.

    The window computes the loss, because the mean over a micro-batch is wrong to accumulate if token counts
    differ. Nothing is downloaded.

    Shapes: input_ids and attention_mask (n, length), 1 on tokens and 0 on padding, to logits
    (n, vocabulary, length), as torch.nn.CrossEntropyLoss takes them with targets (n, length).

    Args:
        vocabulary: number of tokens; token 0 is padding.
        length: tokens in the longest sample.
        hidden: width of the hidden layers.
        layers: number of layers.
        heads: attention heads in a layer.
        dropout: of hidden layers and attention; transformers' default is 0.1.
        attention: "eager", or "sdpa", which needs less memory but is not deterministic in backward on GPUs.

    Raises:
        UsageError: if transformers is not installed.
        ValueError: if `hidden` is no multiple of `heads`, or for another `attention`.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.0,
        attention: str = "eager",
    ) -> None:
        super().__init__()
        if attention not in ("eager", "sdpa"):  # transformers would fetch and run a kernel of another name
            raise ValueError(f"attention={attention}: eager or sdpa")
        try:
            from transformers import BertConfig, BertForMaskedLM
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise UsageError("needs transformers, pip install 'accumexp[text]'") from error
        config: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": length,
            "type_vocab_size": 1,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
            "pad_token_id": 0,
            "attn_implementation": attention,
        }
        self.bert = BertForMaskedLM(BertConfig(**config))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # transformers reads a mask (n, length) on the host in every forward, to see if it is needed.
        dtype = self.bert.dtype
        hidden = (attention_mask == 0)[:, None, None, :]
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
        logits = self.bert(input_ids=input_ids, attention_mask=mask).logits
        # Contiguous, because FSDP warns of a view and the loss would copy it anyway.
        return logits.transpose(1, 2).contiguous()
