from importlib.util import find_spec

import pytest
import torch

from yopo_ext.threat import ThreatModel as Threat
from yopo_ext.training.attacks.apgd import Apgd, apgd, dlr_targeted
from yopo_ext.training.attacks.autoattack import AutoAttack
from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.attacks.registry import SUITES, parse_attack, parse_attacks
from yopo_ext.training.data.splits import Split
from yopo_ext.training.evaluation.evaluate import evaluate
from yopo_ext.training.evaluation.masking_alarm import alarms
from yopo_ext.training.methods import ThreatModel

THREAT = ThreatModel(0.15)


def test_apgd_is_at_least_as_strong_as_pgd(robust_model, digits):
    tried = [PgdAttack(20), PgdAttack(20, 3, "margin"), Apgd(steps=40), Apgd(targeted=True, steps=20)]
    found = evaluate(robust_model, digits.test.first(200), THREAT, tried)
    assert found.robust["apgd-ce"] <= found.robust["pgd-20"] + 0.5
    assert found.robust["apgd-t"] <= found.robust["cw-20-3"] + 0.5
    assert found.robust["apgd-t"] > 20.0  # the model is robust: an attack that breaks it fully is no fair attack
    assert found.worst <= min(found.robust.values())


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_stays_admissible_and_repeats_itself(robust_model, digits, targets, norm):
    x, y = digits.test.x(slice(0, 50)), digits.test.labels[:50]
    eps = {"linf": 0.1, "l2": 0.5}[norm]
    ball = Threat(eps, norm=norm).around(x)
    run = [
        apgd(robust_model, x, y, ball, lambda g=generator: ball.uniform(g), steps=10, targets=targets)
        for generator in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
    ]
    assert torch.equal(run[0], run[1])
    size = run[0].abs().amax((1, 2, 3)) if norm == "linf" else run[0].flatten(1).norm(dim=1)
    assert (size <= eps * (1 + 1e-5)).all()
    assert (x + run[0]).min() >= -1e-6
    assert (x + run[0]).max() <= 1 + 1e-6


def test_dlr_by_hand():
    logits = torch.tensor([[5.0, 3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0, 5.0]])
    found = dlr_targeted(logits, torch.tensor([0, 0]), torch.tensor([1, 4]))
    torch.testing.assert_close(found, torch.tensor([-2.0 / 3.5, 5.0 / 3.5]))
    shifted = dlr_targeted(7.0 * logits + 3.0, torch.tensor([0, 0]), torch.tensor([1, 4]))
    torch.testing.assert_close(shifted, found)


@pytest.mark.skipif(find_spec("foolbox") is None, reason="foolbox is not installed")
@pytest.mark.filterwarnings("ignore")
def test_foolbox_agrees_with_our_pgd(robust_model, digits):
    import foolbox

    x, y = digits.test.x(), digits.test.labels
    wrapped = foolbox.PyTorchModel(robust_model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=0.15 / 4, steps=20, random_start=True)
    torch.manual_seed(0)
    _, _, success = attack(wrapped, x, y, epsilons=0.15)
    theirs = 100.0 * (1.0 - success.float().mean().item())
    ours = evaluate(robust_model, digits.test, THREAT, [PgdAttack(20)]).robust["pgd-20"]
    assert abs(ours - theirs) < 1.5  # 450 samples attacked twice differ by a few


@pytest.mark.skipif(find_spec("pyautoattack") is None and find_spec("autoattack") is None, reason="no AutoAttack")
def test_autoattack_is_the_worst_case(robust_model, digits):
    few = digits.test.first(40)
    found = evaluate(robust_model, few, THREAT, [PgdAttack(20), AutoAttack()])
    assert found.robust["autoattack"] <= found.robust["pgd-20"]


@pytest.mark.skipif(find_spec("pyautoattack") is None and find_spec("autoattack") is None, reason="no AutoAttack")
@pytest.mark.parametrize("classes", [2, 3, 4, 7])
def test_autoattack_of_few_classes(digits, classes):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes)).eval()
    few = digits.test.first(6)
    predicted = Split(few.images, model(few.x()).argmax(1), few.white)  # every clean image is classified correctly
    tried = [PgdAttack(5), Apgd(targeted=True, steps=5), AutoAttack()]
    found = evaluate(model, predicted, ThreatModel(0.02), tried)
    assert found.clean == 100.0
    assert found.robust["autoattack"] <= found.robust["pgd-5"]


def test_without_the_package_the_message_says_what_to_install(robust_model, digits, monkeypatch):
    monkeypatch.setattr("yopo_ext.training.attacks.autoattack.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="attack 'square' needs a package: pip install pyautoattack"):
        evaluate(robust_model, digits.test.first(4), THREAT, [AutoAttack(square=True)])
    with pytest.raises(ModuleNotFoundError, match="attack 'autoattack' needs a package"):
        parse_attacks((*SUITES["full"][:5], "autoattack"))


def test_masked_gradients_raise_the_alarm():
    assert alarms({"pgd-20": 50.0, "pgd-50-10": 49.0, "square": 55.0}) == []
    assert "Square" in alarms({"pgd-20": 50.0, "square": 48.0})[0]
    assert alarms({"pgd-20": 50.0, "square@100": 48.0}) == []  # other images
    assert "Square" in alarms({"pgd-20": 60.0, "pgd-20@100": 50.0, "square@100": 48.0})[0]
    assert "PGD-50 leaves 10.0 points less" in alarms({"pgd-20": 50.0, "pgd-50-10": 40.0})[0]
    assert alarms({"pgd-20": 50.0, "pgd-500": 40.0, "pgd-50:0.001": 40.0, "cw-50": 40.0}) == []  # other attacks


def test_suites_are_made_of_known_attacks():
    for names in SUITES.values():
        assert [parse_attack(name).name for name in names] == list(names)
    assert set(SUITES["quick"]) <= set(SUITES["standard"]) <= set(SUITES["full"])
