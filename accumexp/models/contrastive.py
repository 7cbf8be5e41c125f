"""An encoder with a projection, for contrastive losses."""

from __future__ import annotations

from torch import Tensor, nn


class Contrastive(nn.Module):
    """Embeds the views of a sample (SimCLR, Chen et al. 2020, arXiv:2002.05709).

    The representation that is of use later is what `encoder` gives; the loss takes the projection of it.

    Args:
        encoder: of a view, gives (n, width).
        width: features that the encoder gives.
        embedding: numbers in an embedding.

    Shapes: (n, views, ...) to (n, views, embedding).
    """

    def __init__(self, encoder: nn.Module, width: int, embedding: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Sequential(
            nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embedding)
        )

    def forward(self, views: Tensor) -> Tensor:
        embeddings = self.projection(self.encoder(views.flatten(0, 1)))
        return embeddings.view(*views.shape[:2], -1)
