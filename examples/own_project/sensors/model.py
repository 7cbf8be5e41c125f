"""A network over time that also knows which machine it listens to."""

from torch import Tensor, nn
from torch.nn.functional import pad


class FaultDetector(nn.Module):
    """Shapes: readings (n, length, 2) and machine (n,) give logits (n, length).

    A step sees only earlier steps, so padding at the end of a recording changes nothing before it.
    """

    def __init__(self, machines: int = 4, width: int = 16) -> None:
        super().__init__()
        self.machine = nn.Embedding(machines, width)
        self.history = nn.Conv1d(2, width, kernel_size=4)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, readings: Tensor, machine: Tensor) -> Tensor:
        history = self.history(pad(readings.transpose(1, 2), (3, 0))).transpose(1, 2)
        hidden = self.norm(history + self.machine(machine)[:, None]).relu()
        return self.head(hidden).squeeze(-1)
