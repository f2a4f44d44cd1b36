"""What happens to a model between two of its steps. Each change is applied alike to the model and to its twins.

A change returns False where the model has nothing to change, else None or the expectation from now on.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from custom_layers import Branches, Normalise, TwoConvs
from networks import Detour, InlineNormalise, Net
from parts import activation
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

CHANGES: dict[str, Callable[[Net, Random], Any]] = {}
ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU, nn.Sigmoid)


def change(apply: Callable[[Net, Random], Any]) -> Callable[[Net, Random], Any]:
    CHANGES[apply.__name__] = apply
    return apply


def _first_of(module: nn.Module, kind: Any) -> Any:
    return next((part for part in module.modules() if isinstance(part, kind)), None)


def _plain_conv(net: Net) -> Any:
    conv = _first_of(net.first, nn.Conv2d)
    return conv if conv is not None and isinstance(conv._parameters.get("weight"), Tensor) else None


def _replace(net: Net, old: nn.Module, new: nn.Module) -> None:
    for parent in net.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    new.to(next(net.parameters()).dtype).train(old.training)


@change
def optimizer_step(net, r):
    kind = r.choice([torch.optim.SGD, torch.optim.Adam])
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = kind(parameters, lr=0.05)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()


@change
def data_in_place(net, r):
    for p in net.parameters():
        p.data.mul_(0.7)


@change
def data_replaced(net, r):
    for p in net.parameters():
        p.data = p.data * 1.3


@change
def weights_loaded(net, r):
    net.load_state_dict(
        {k: v * 0.9 if v.is_floating_point() else v for k, v in net.state_dict().items()}, assign=r.random() < 0.5
    )


@change
def new_parameter_object(net, r):
    conv = _plain_conv(net)
    if conv is None:
        return False
    conv.weight = nn.Parameter(conv.weight.detach() * 0.8, requires_grad=conv.weight.requires_grad)


@change
def activation_replaced(net, r):
    old = _first_of(net.first, ACTIVATIONS)
    if old is None:
        return False
    _replace(net, old, activation(r))


@change
def conv_replaced(net, r):
    old = _plain_conv(net)
    if old is None or old is net.first or type(old) is not nn.Conv2d:
        return False
    new = nn.Conv2d(
        old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups
    )
    _replace(net, old, new)


@change
def first_layer_replaced(net, r):
    old = net.first
    if type(old) is not nn.Conv2d:
        return False
    net.first = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=r.choice([1, 2]), padding=1)
    net.first.to(next(net.body.parameters()).dtype).train(old.training)


@change
def batch_norm_replaced(net, r):
    old = _first_of(net.first, nn.BatchNorm2d)
    if old is None or old is net.first:
        return False
    _replace(net, old, r.choice([nn.Identity(), nn.BatchNorm2d(old.num_features, affine=False)]))


@change
def hook_added(net, r):
    module = r.choice([net.first, *net.first.children(), *net.body.children()])
    how = r.choice(["forward", "pre", "backward", "scaling"])
    if how == "forward":
        module.register_forward_hook(lambda m, i, o: None)
    elif how == "pre":
        module.register_forward_pre_hook(lambda m, i: None)
    elif how == "backward":
        module.register_full_backward_hook(lambda m, i, o: None)
    else:
        module.register_forward_hook(lambda m, i, o: o * 1.25)


@change
def hooks_removed(net, r):
    for module in net.modules():
        module._forward_hooks.clear()


@change
def tensor_hook_added(net, r):
    for p in net.parameters():
        if p.requires_grad:
            p.register_hook(lambda g: g * 0.5)


@change
def mode_switched(net, r):
    how = r.choice(["train", "eval", "batch_norm_eval", "first_eval"])
    net.train(how != "eval")
    if how == "first_eval":
        net.first.eval()
    for module in net.modules():
        if how == "batch_norm_eval" and isinstance(module, _BatchNorm):
            module.eval()


@change
def stride_changed(net, r):
    conv = _first_of(net.first, nn.Conv2d)
    if conv is None or isinstance(conv.padding, str) or isinstance(net.first, Branches | TwoConvs):
        return False
    conv.stride = (2, 1) if conv.stride != (2, 1) else (1, 1)


@change
def padding_changed(net, r):
    conv = _first_of(net.first, nn.Conv2d)
    if conv is None or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    conv.padding = (1, 2) if conv.padding != (1, 2) else (2, 2)


@change
def slope_changed(net, r):
    act = _first_of(net.first, nn.LeakyReLU)
    if act is None:
        return False
    act.negative_slope = 0.45


@change
def approximation_changed(net, r):
    act = _first_of(net.first, nn.GELU)
    if act is None:
        return False
    act.approximate = "none" if act.approximate == "tanh" else "tanh"


@change
def normalisation_changed(net, r):
    norm = _first_of(net, Normalise) or _first_of(net, InlineNormalise)
    if norm is None:
        return False
    name = "mean" if isinstance(norm, Normalise) else "shift"
    value = getattr(norm, name)
    how = r.choice(["in_place", "data", "replaced"])
    if not isinstance(value, Tensor):
        setattr(norm, name, [v + 0.15 for v in value])
    elif how == "in_place":
        value.add_(0.15)
    elif how == "data":
        value.data.add_(0.15)
    else:
        setattr(norm, name, value + 0.15)


@change
def forward_patched(net, r):
    module = r.choice([m for m in net.first.modules() if not list(m.children()) and m is not net.first] or [net.first])
    original = module.forward
    module.forward = lambda *inputs: original(*inputs) * 1.2


@change
def pruned(net, r):
    conv = _plain_conv(net)
    if conv is None or getattr(net.body, "borrowed", None) is conv.weight:
        return False
    prune.custom_from_mask(conv, "weight", (torch.rand_like(conv.weight) < 0.7).to(conv.weight.dtype))


@change
def parametrised(net, r):
    conv = _plain_conv(net)
    if conv is None or hasattr(conv, "weight_mask") or getattr(net.body, "borrowed", None) is conv.weight:
        return False
    wrap = r.choice([nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
    if net.checkpoint != "none" and net.scope == "all":  # a recomputed power iteration is another one
        wrap = nn.utils.parametrizations.weight_norm
    wrap(conv)


@change
def batch_norm_settings_changed(net, r):
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.eps, norm.momentum = 0.05, 0.5
    return None if norms else False


@change
def tracking_switched_off(net, r):
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    return None if norms else False


@change
def requires_grad_toggled(net, r):
    part = r.choice([net.first, net.body, _first_of(net.first, nn.Conv2d) or net.first])
    for p in part.parameters():
        if p.is_leaf:
            p.requires_grad_(not p.requires_grad)
    if not any(p.requires_grad for p in net.parameters()):
        net.body.requires_grad_(True)


@change
def second_path_added(net, r):
    net.detour = Detour()
    return "error"


@change
def called_again(net, r):
    net.again = True
    return "error"
