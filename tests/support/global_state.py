"""The state of a process that one test could hand on to the next."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

STORE = "MLFLOW_TRACKING_URI"  # mlflow.set_tracking_uri sets it too


def global_state() -> dict[str, Any]:
    """What commands and libraries may change and have to set back, by name."""
    import torch

    accelerate: Any = sys.modules.get("accelerate.state")
    shared = accelerate.AcceleratorState._shared_state if accelerate else {}
    return {
        "directory": os.getcwd(),
        "handler of SIGTERM": signal.getsignal(signal.SIGTERM),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "process group": torch.distributed.is_initialized(),
        # Of the first Accelerator of the process, which all others share.
        "precision of Accelerate": shared.get("_mixed_precision", "no"),
        STORE: os.environ.get(STORE),
    }
