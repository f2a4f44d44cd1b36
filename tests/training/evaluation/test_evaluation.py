import json

import pytest
import torch
from torch import nn

from yopo_ext.training.attacks.apgd import Apgd
from yopo_ext.training.attacks.autoattack import AutoAttack
from yopo_ext.training.attacks.base import passes_on
from yopo_ext.training.attacks.image_wise import FixedBatches, Starts
from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.attacks.registry import parse_attack
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.data.splits import Split
from yopo_ext.training.evaluation.evaluate import evaluate, evaluate_in_parts, true_fp32
from yopo_ext.training.evaluation.journal import Journal
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.methods import ThreatModel
from yopo_ext.training.run.deadline import Deadline

THREAT = ThreatModel(0.1)


class Threshold(nn.Module):
    """Predicts 1 where the only pixel exceeds one half."""

    def forward(self, x):
        pixel = x.flatten(1).sum(1)
        return torch.stack([0.5 - pixel, pixel - 0.5], 1)


def test_accuracies_of_a_model_that_can_be_worked_out_by_hand():
    pixels = torch.tensor([0, 100, 115, 120, 135, 140, 155, 255], dtype=torch.uint8)  # / 255; one half is 127.5
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    found = evaluate(
        Threshold(), Split(pixels.view(-1, 1, 1, 1), labels, 255), THREAT,
        [PgdAttack(10), PgdAttack(5, 2, "margin")], batch_size=3,
    )  # fmt: skip
    # eps is 25.5 grey levels: 0, 100, 155 and 255 stay on their side; 120 is wrong from the start.
    assert found.clean == pytest.approx(100 * 7 / 8)
    assert found.robust == {"pgd-10": pytest.approx(50.0), "cw-5-2": pytest.approx(50.0)}
    assert found.worst == pytest.approx(50.0)
    assert found.samples == 8


def test_it_restores_modes_and_repeats_itself(few_digits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 10))
    model[3].eval()
    first = evaluate(model, few_digits.test, THREAT, [PgdAttack(3)])
    assert first == evaluate(model, few_digits.test, THREAT, [PgdAttack(3)])
    assert model[2].training
    assert not model[3].training


def test_normalisation_is_the_threat_models_business(few_digits):
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    normalised = ThreatModel(0.1, mean=(0.3,), std=(0.5,))

    class Normalised(nn.Module):
        def forward(self, x):
            return linear((x - 0.3) / 0.5)

    attacks = [PgdAttack(3)]
    assert evaluate(linear, few_digits.test, normalised, attacks) == evaluate(
        Normalised(), few_digits.test, THREAT, attacks
    )


@pytest.mark.parametrize(
    ("text", "attack"),
    [
        ("pgd-20", PgdAttack(20)),
        ("pgd-50-10", PgdAttack(50, 10)),
        ("cw-50-10", PgdAttack(50, 10, "margin")),
        ("cw-5", PgdAttack(5, 1, "margin")),
        ("cw-5@100", PgdAttack(5, 1, "margin", samples=100)),
        ("pgd-40:0.01@9", PgdAttack(40, step_size=0.01, samples=9)),
        ("cw-4-2:0.5", PgdAttack(4, 2, "margin", 0.5)),
        ("autoattack@1000", AutoAttack(samples=1000)),
    ],
)
def test_attacks_by_name(text, attack):
    assert parse_attack(text) == attack
    assert attack.name == text


@pytest.mark.parametrize(
    "text",
    [
        "pgd",
        "pgd-0",
        "pgd-5-3-2",
        "fgsm-3",
        "pgd-x",
        "",
        "pgd-20@",
        "pgd-20@0",
        "pgd-20@x",
        "apgd-t-3",
        "apgd-t:0.1",
        "x",
    ],
)
def test_bad_attack_names(text):
    with pytest.raises(ValueError, match="attack must look like pgd-20"):
        parse_attack(text)


def test_a_bad_step_size():
    with pytest.raises(ValueError, match="step size in attack 'pgd-20:fast' must be a number"):
        parse_attack("pgd-20:fast")
    with pytest.raises(ValueError, match="step size in attack 'pgd-20:-1' must be > 0"):
        parse_attack("pgd-20:-1")
    assert parse_attack("pgd-20:2/255").name == "pgd-20:0.007843137255"


def test_passes():
    assert passes_on([], 5) == 5
    assert passes_on([PgdAttack(20)], 3) == 3 * 42
    assert passes_on([PgdAttack(20), PgdAttack(5, 2)], 1) == 42 + 1 + 2 * 11
    assert passes_on([PgdAttack(20, samples=2), PgdAttack(1, samples=9)], 3) == 3 + 2 * 41 + 3 * 3


def test_an_attack_on_the_first_images_only():
    pixels = torch.tensor([255, 140, 0, 0, 140, 140, 255], dtype=torch.uint8)
    labels = torch.tensor([1, 1, 0, 0, 1, 1, 1])
    split = Split(pixels.view(-1, 1, 1, 1), labels, 255)
    found = evaluate(Threshold(), split, THREAT, [PgdAttack(10), PgdAttack(10, samples=4)], batch_size=3)
    assert found.robust == {"pgd-10": pytest.approx(100 * 4 / 7), "pgd-10@4": pytest.approx(75.0)}
    assert found.worst == pytest.approx(75.0)  # of the four images that met both
    assert found.worst_samples == 4
    assert found.clean == 100.0


def test_fp32_is_fp32_inside_the_block_only():
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    convolution.fp32_precision = "tf32"
    try:
        with true_fp32():
            assert convolution.fp32_precision == "ieee"
        assert convolution.fp32_precision == "tf32"
    finally:
        convolution.fp32_precision = before


def test_an_evaluation_in_parts_ends_like_a_whole_one(few_digits, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    tried = [PgdAttack(3), PgdAttack(2, 2, "margin")]
    whole = evaluate(model, few_digits.test, THREAT, tried, batch_size=15)
    journal = tmp_path / "evaluation.jsonl"

    def part(deadline, model=model):
        return evaluate_in_parts(
            model, few_digits.test, THREAT, tried, batch_size=15, journal=journal, deadline=deadline
        )

    assert part(Deadline(0.0)) is None
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1) if len(calls) < 7 else pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):  # a run that dies in the middle
        part(None)
    hook.remove()
    with journal.open("a") as file:
        file.write('{"fingerprint": "cut sh')
    written = journal.read_text()
    assert part(None) == whole
    assert journal.read_text().startswith(written)
    first = evaluate(model, few_digits.test.first(15), THREAT, [PgdAttack(3)], batch_size=15)
    model.register_forward_hook(lambda *_: pytest.fail("nothing is left to run"))
    assert part(Deadline(0.0)) == whole
    limited = evaluate_in_parts(
        model,
        few_digits.test,
        THREAT,
        [PgdAttack(3, samples=15)],
        batch_size=15,
        journal=journal,
        deadline=Deadline(0.0),
    )
    assert limited.robust["pgd-3@15"] == first.robust["pgd-3"]  # from the notes of pgd-3 on all
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert part(Deadline(0.0), other) is None  # other weights share nothing


def test_a_deadline_that_has_passed_lets_every_call_attack_one_batch(few_digits, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    whole = evaluate(model, few_digits.test, THREAT, [PgdAttack(1)], batch_size=15)
    calls, found = 0, None
    while found is None:
        calls += 1
        found = evaluate_in_parts(
            model, few_digits.test, THREAT, [PgdAttack(1)], batch_size=15, journal=tmp_path / "evaluation.jsonl",
            deadline=Deadline(0.0),
        )  # fmt: skip
        assert calls < 50
    assert found == whole
    assert calls == 6  # three batches, clean and attacked


@pytest.fixture(scope="module")
def half_robust(digits):
    """A network of which the attacks below find something new one after the other."""
    return Trainer(TrainConfig(method="fgsm-rs", epochs=3), dataset=digits, shown=False).fit().network


def test_attacking_survivors_only_finds_the_worst_case_of_attacking_all(half_robust, digits, tmp_path):
    tried = [PgdAttack(3), Apgd(steps=10), PgdAttack(3, 3, "margin", samples=80), Apgd(targeted=True, steps=10)]
    split, threat = digits.test.first(100), ThreatModel(0.15)
    images = []
    hook = half_robust.register_forward_hook(lambda module, arguments, output: images.append(len(arguments[0])))
    found, spent, notes = {}, {}, {}
    for survivors_only in (False, True):
        images.clear()
        path = tmp_path / f"{survivors_only}.jsonl"
        found[survivors_only] = evaluate_in_parts(
            half_robust, split, threat, tried, survivors_only=survivors_only, journal=path
        )
        spent[survivors_only] = sum(images)
        (fingerprint,) = {json.loads(line)["fingerprint"] for line in path.read_text().splitlines()}
        notes[survivors_only] = Journal(path, fingerprint).known
    hook.remove()
    assert found[True].worst == found[False].worst
    for attack, results in notes[True].items():  # image by image
        assert results.items() <= notes[False][attack].items()
    assert len(notes[True]["apgd-t"]) < len(notes[False]["apgd-t"]) == 100
    assert spent[True] < 0.95 * spent[False]
    left = list(found[True].robust.values())
    assert left == sorted(left, reverse=True)
    assert left[0] > left[-1] > 0.0


@pytest.mark.parametrize(
    "attack", [PgdAttack(5), PgdAttack(5, 2, "margin"), Apgd(steps=10), Apgd(targeted=True, steps=5)]
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_attack_finds_the_same_perturbation_beside_any_other_images(half_robust, digits, attack, norm):
    threat = ThreatModel({"linf": 0.15, "l2": 1.0}[norm], norm=norm)
    model = FixedBatches(half_robust.eval(), 32)

    def perturbations(images):
        x, y = digits.test.x(images), digits.test.labels[images]
        starts = Starts(threat.around(x), images, seed=5)
        return attack(model, x, y, threat, starts)

    images = torch.arange(32)
    whole = perturbations(images)
    assert whole.abs().amax() > 0.0
    assert not torch.equal(whole[0], whole[1])
    for some in (images[3:4], images[[30, 2, 17]], torch.cat([images[20:], torch.arange(100, 110)])):
        known = some < 32
        assert torch.equal(perturbations(some)[known], whole[some[known]])


def test_an_attack_that_looks_at_whole_batches_gets_them(half_robust, digits):
    class Neighbours(AutoAttack):
        """Succeeds on images whose batch holds more than nine."""

        kind = "neighbours"

        def __call__(self, model, x, y, threat, starts):
            return torch.full_like(x, 9.0 if len(x) > 9 else 0.0)

    split = digits.test.first(40)
    tried = [PgdAttack(10), Neighbours()]
    found = [evaluate_in_parts(half_robust, split, THREAT, tried, survivors_only=some) for some in (False, True)]
    assert found[0].worst == found[1].worst
