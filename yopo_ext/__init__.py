"""yopo_ext: fast adversarial training with YOPO ("You Only Propagate Once", NeurIPS 2019) for PyTorch.

The names below are imported when they are first used, so that what needs no tensor (`yopo-ext --help`) does not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .functional import FirstLayerUpdate, adversary_steps, build_info, explain, first_layer_update
    from .step import StepResult, trades_yopo_step, yopo_step

__all__ = [
    "FirstLayerUpdate",
    "StepResult",
    "__version__",
    "adversary_steps",
    "build_info",
    "explain",
    "first_layer_update",
    "trades_yopo_step",
    "yopo_step",
]

_HOMES = {
    "FirstLayerUpdate": "functional",
    "StepResult": "step",
    "adversary_steps": "functional",
    "build_info": "functional",
    "explain": "functional",
    "first_layer_update": "functional",
    "trades_yopo_step": "step",
    "yopo_step": "step",
}
_MODULES = ("attacks", "functional", "step", "threat")  # that are attributes without being imported by name


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
