"""A callback that logs values of its own."""

from typing import Any

from torch.nn.utils import get_total_norm

from accumexp.callbacks import Callback


class PartNorms(Callback):
    """Logs `norm/<part>`, the norm of the weights of every part of the model, as often as the loss."""

    def measured(self, trainer: Any, values: dict[str, float]) -> None:
        for name, part in trainer.model.named_children():
            values[f"norm/{name}"] = float(get_total_norm(part.parameters()))
