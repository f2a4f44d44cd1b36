"""yopo_ext: fast adversarial training with YOPO ("You Only Propagate Once", NeurIPS 2019) for PyTorch."""

from ._version import __version__
from .build import build_info
from .functional import FirstLayerUpdate, adversary_steps, explain, first_layer_update
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
