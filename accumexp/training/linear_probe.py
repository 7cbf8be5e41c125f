"""The accuracy of a linear classifier on what a module of the model gives: the worth of a representation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..accum import call, tensors
from ..config.ranges import require
from ..data import Batches
from ..errors import UsageError
from .callbacks import Callback
from .evaluation import precision

if TYPE_CHECKING:
    from .trainer import Trainer


class LinearProbe(Callback):
    """Logs `probe_accuracy` of each evaluated split.

    A linear classifier is fitted to the features of the training samples (augmented, as they are trained on),
    by least squares on one-hot labels with a ridge, which has one solution: no further training, no seed.
    Features and labels are added up over all ranks. It changes neither model nor training.

    Args:
        module: name of the module whose output, flattened to (n, features), is the representation.
        num_classes: classes of the labels (n,), the data set's targets.
        ridge: the penalty on the weights, relative to the mean square of the features.
    """

    order = -1
    evaluates = ("probe_accuracy",)

    def __init__(self, module: str, num_classes: int, ridge: float = 1e-3) -> None:
        require("num_classes", num_classes, at_least=2, at_most=2**20, whole=True)
        require("ridge", ridge, above=0)
        self.module = module
        self.num_classes = num_classes
        self.ridge = ridge

    def check(self, trainer: Trainer, key: str) -> None:
        names = [name for name, _ in trainer.model.named_modules() if name]
        if self.module not in names:
            top = ", ".join(name for name in names if "." not in name)
            raise UsageError(f"{key}.module={self.module}: the model has no such module, it has {top}")

    @torch.no_grad()
    def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            weights = self._fit(trainer)
            batches = trainer.splits.test if split == "test" else trainer.splits.eval
            counts = torch.zeros(2, dtype=torch.float64, device=trainer.device)
            for features, labels in self._features(trainer, batches, 0):
                right = (features @ weights).argmax(1) == labels
                counts += torch.stack([right.sum(), torch.tensor(len(labels), device=right.device)])
        finally:
            trainer.model.train(was_training)
        correct, total = trainer.window.sync.ranks.sum(counts).tolist()
        values[f"{split}/probe_accuracy"] = correct / max(total, 1.0)

    def _fit(self, trainer: Trainer) -> Tensor:
        """The weights of the classifier, (features + 1, classes), float64."""
        squares: Any = 0.0
        products: Any = 0.0
        for features, labels in self._features(trainer, trainer.splits.train, trainer.progress.epoch):
            one_hot = nn.functional.one_hot(labels, self.num_classes).double()
            squares = squares + features.T @ features
            products = products + features.T @ one_hot
        ranks = trainer.window.sync.ranks
        squares, products = ranks.sum(squares), ranks.sum(products)
        ridge = self.ridge * squares.diagonal().mean()
        penalty = torch.full_like(squares.diagonal(), 1.0) * ridge
        penalty[-1] = 0.0  # not on the constant
        return torch.linalg.solve(squares + penalty.diag(), products)

    def _features(self, trainer: Trainer, batches: Batches, epoch: int) -> Any:
        """Pairs of features with a constant 1, (n, features + 1) float64, and labels (n,)."""
        captured: list[Any] = []
        module = trainer.model.get_submodule(self.module)
        handle = module.register_forward_hook(lambda module, inputs, outputs: captured.append(outputs))
        try:
            for batch in batches.epoch(epoch):
                with precision(trainer.window.autocast, tensors(batch.targets)[0].device):
                    call(trainer.model, batch.inputs)
                rows = len(tensors(batch.targets)[0])
                features = captured.pop().reshape(rows, -1)[: batch.samples].double()
                captured.clear()
                ones = features.new_ones(len(features), 1)
                yield torch.cat([features, ones], 1), tensors(batch.targets)[0][: batch.samples]
        finally:
            handle.remove()
