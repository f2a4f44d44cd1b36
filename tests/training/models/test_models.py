from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import yopo_ext
from yopo_ext.training.models import MODELS, WideResNet, build_model, robustbench_model

# From the published definitions: the first and last keys, how many there are, and the number of parameters.
DEFINITIONS = {
    "smallcnn": ("feature_extractor.conv1.weight", "classifier.fc3.bias", 14, 312_202),
    "preactresnet18": ("conv1.weight", "linear.bias", None, 11_171_146),
    "resnet18": ("conv1.weight", "linear.bias", 122, 11_173_962),
    "preactresnet8": ("conv1.weight", "linear.bias", None, 173_986),
    "wrn-34-10": ("conv1.weight", "fc.bias", None, 46_160_474),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_state_dict_keys_and_sizes(name):
    with torch.device("meta"):
        model, _ = build_model(name, (1, 28, 28) if name == "smallcnn" else (3, 32, 32), 10)
    first, last, count, parameters = DEFINITIONS[name]
    keys = list(model.state_dict())
    assert (keys[0], keys[-1]) == (first, last)
    assert count is None or len(keys) == count
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_keys_in_full():
    with torch.device("meta"):
        resnet, wide = build_model("preactresnet18", (3, 32, 32), 10)[0], WideResNet(10, 2)
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    block = [f"bn1.{n}" for n in norm] + ["conv1.weight"] + [f"bn2.{n}" for n in norm] + ["conv2.weight"]
    expected = ["conv1.weight"]
    for layer in (1, 2, 3, 4):
        for number in (0, 1):
            expected += [f"layer{layer}.{number}.{key}" for key in block]
            expected += [f"layer{layer}.0.shortcut.0.weight"] if number == 0 and layer > 1 else []
    assert list(resnet.state_dict()) == [*expected, "linear.weight", "linear.bias"]
    expected = ["conv1.weight"]
    for stage in (1, 2, 3):
        expected += [f"block{stage}.layer.0.{key}" for key in [*block, "convShortcut.weight"]]
    assert list(wide.state_dict()) == [*expected, *(f"bn1.{n}" for n in norm), "fc.weight", "fc.bias"]


def test_the_function_that_export_names():
    """RobustBench has two functions with these keys: in this one a shortcut starts after the block's first activation."""
    torch.manual_seed(0)
    model = build_model("preactresnet18", (3, 32, 32), 10)[0].double().eval()
    for buffer in (b for name, b in model.named_buffers() if "running" in name):
        buffer.uniform_(0.5, 1.5)
    state = model.state_dict()

    def norm(x, name):
        mean, var, weight, bias = (state[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, weight, bias))

    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    out = F.conv2d(x, state["conv1.weight"], padding=1)
    for block in (f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)):
        stride = 2 if block in ("layer2.0", "layer3.0", "layer4.0") else 1
        active = norm(out, f"{block}.bn1")
        projection = state.get(f"{block}.shortcut.0.weight")
        shortcut = out if projection is None else F.conv2d(active, projection, stride=stride)
        inner = F.conv2d(active, state[f"{block}.conv1.weight"], stride=stride, padding=1)
        out = F.conv2d(norm(inner, f"{block}.bn2"), state[f"{block}.conv2.weight"], padding=1) + shortcut
    expected = F.linear(out.mean((2, 3)), state["linear.weight"], state["linear.bias"])
    torch.testing.assert_close(model(x), expected)
    assert robustbench_model("preactresnet18", 10) == (
        "resnet.PreActResNet(resnet.PreActBlockV2, [2, 2, 2, 2], num_classes=10)"
    )
    wide = "wide_resnet.WideResNet(depth=34, widen_factor=10, num_classes=100)"
    assert robustbench_model("wrn-34-10", 100) == wide
    assert robustbench_model("smallcnn", 10) is None


def test_smallcnn_round_trip_and_prefix():
    first, second = (nn.ModuleDict({"net": build_model("smallcnn", (1, 28, 28), 10)[0]}) for _ in range(2))
    assert "net.feature_extractor.conv1.weight" in first.state_dict()
    second.load_state_dict(first.state_dict())
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(first["net"].eval()(x), second["net"].eval()(x))


@pytest.mark.parametrize(
    ("name", "channels", "size"),
    [
        *(
            (n, 1 if n in ("digits-cnn", "smallcnn") else 3, {"digits-cnn": 8, "smallcnn": 28}.get(n, 32))
            for n in MODELS
        ),
        ("wrn-10-1", 3, 32),
        ("timm/resnet18", 1, 32),
        ("torchvision/resnet18", 3, 32),
        ("timm/test_vit", 3, 32),
    ],
)
def test_every_model_trains_with_yopo(name, channels, size):
    if "/" in name and find_spec(name.split("/")[0]) is None:  # not imported: build_model knows how
        pytest.skip(f"{name.split('/')[0]} is not installed")
    torch.manual_seed(0)
    model, first_layer = build_model(name, (channels, size, size), 7)
    x, y = torch.rand(2, channels, size, size), torch.tensor([3, 6])
    result = yopo_ext.yopo_step(model, x, y, first_layer=first_layer, outer_steps=2, inner_steps=2)
    assert result.logits.shape == (2, 7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet", "wrn-34", "wrn-34-x", "timm/no-such-net", "torchvision/no-such-net", "x/y"])
def test_unknown_models(name):
    with pytest.raises(ValueError, match="model must be one of digits-cnn"):
        build_model(name, (3, 32, 32), 10)


@pytest.mark.parametrize("depth", [4, 8, 33])
def test_wide_resnet_depths(depth):
    with pytest.raises(ValueError, match="depth must be 6n"):
        WideResNet(depth, 1)
