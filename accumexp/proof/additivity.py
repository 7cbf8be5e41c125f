"""stub until merged"""

from typing import Any


def loss_average(loss: Any, outputs: Any, targets: Any) -> Any:
    return None
