"""torchvision, also where its binary does not match the installed torch."""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_declared: list[torch.library.Library] = []  # an operator lives as long as its library object


def import_torchvision(required: bool = True) -> ModuleType | None:
    """torchvision, or None if it is absent and not `required`.

    A torchvision built for CUDA cannot load its operators beside a CPU-only torch, and its import then fails for
    want of `torchvision::nms`. Data sets and transforms need none of them: declaring the two schemas is enough.

    Raises:
        ModuleNotFoundError: it is required and not installed.
        ImportError: it is required and cannot be imported.
    """
    try:
        import torchvision

        return torchvision
    except ModuleNotFoundError as error:
        if error.name != "torchvision" or required:
            raise
        return None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    if not _declared:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    import torchvision

    return torchvision
