import pytest
import torch
from torch import nn

from yopo_ext.model_state import evaluating, frozen_parameters, preserved_modes, training


def half_frozen_model():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Conv2d(2, 2, 3))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    return model


def state(model):
    return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("manager", [preserved_modes, evaluating, training, frozen_parameters])
@pytest.mark.parametrize("fails", [False, True])
def test_every_mode_and_flag_comes_back(manager, fails):
    model = half_frozen_model()
    before = state(model)
    try:
        with manager(model):
            model.train()
            model[3].eval()
            for parameter in model.parameters():
                parameter.requires_grad_(not parameter.requires_grad)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert state(model) == before


def test_each_manager_sets_what_it_says():
    model = half_frozen_model()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    with training(model):
        assert all(m.training for m in model.modules())
    with frozen_parameters(model):
        assert not any(p.requires_grad for p in model.parameters())
        assert model.training
        assert not model[1].training


def test_nesting():
    model = half_frozen_model()
    before = state(model)
    with evaluating(model), frozen_parameters(model), training(model):
        assert model.training
    assert state(model) == before


def test_parametrised_weights_are_left_alone():
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with frozen_parameters(model):
        model(torch.zeros(1, 3))
    assert all(p.requires_grad for p in model.parameters())
