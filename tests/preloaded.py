"""What the server of `processes.py` imports once, for all the processes that are forked from it."""

from contextlib import suppress

import torch._dynamo
import torch.distributed
import torch.testing

import yopo_ext

with suppress(ImportError):  # the training extra may be missing
    import sklearn.datasets

    import yopo_ext.training.cli.main
    import yopo_ext.training.loop.trainer
    from yopo_ext.training.torchvision_import import import_torchvision

    import_torchvision(required=False)
    import lightning.fabric

__all__ = ["lightning", "sklearn", "torch", "yopo_ext"]
