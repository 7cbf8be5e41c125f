"""Gradient accumulation that is proved: the window in `accumexp.accum`, experiments around it.

`Window`, `certify`, `Callback` and `load` are imported when they are first used. The function that audits a
trainer is `accumexp.proof.audit`; `accumexp.audit` is the command.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accum import Window
    from .callbacks import Callback
    from .proof import certify
    from .training.trained_model import load_trained as load

__version__ = "0.1.0"
__all__ = ["Callback", "Window", "certify", "load"]
_LAZY = {
    "Callback": ("accumexp.callbacks", "Callback"),
    "Window": ("accumexp.accum", "Window"),
    "certify": ("accumexp.proof", "certify"),
    "load": ("accumexp.training.trained_model", "load_trained"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'accumexp' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    globals()[name] = value = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
