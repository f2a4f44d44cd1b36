import pytest
import torch
from torch import nn

from yopo_ext.training.adversaries import AutoAttack, PgdAttack, parse_attack, passes
from yopo_ext.training.data import Split
from yopo_ext.training.deadline import Deadline
from yopo_ext.training.evaluation import evaluate, evaluate_in_parts, true_fp32
from yopo_ext.training.methods import ThreatModel

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
        Threshold(), Split(pixels.view(-1, 1, 1, 1), labels, 1 / 255), THREAT,
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
    assert passes([], 5) == 5
    assert passes([PgdAttack(20)], 3) == 3 * 42
    assert passes([PgdAttack(20), PgdAttack(5, 2)], 1) == 42 + 1 + 2 * 11
    assert passes([PgdAttack(20, samples=2), PgdAttack(1, samples=9)], 3) == 3 + 2 * 41 + 3 * 3


def test_an_attack_on_the_first_images_only():
    pixels = torch.tensor([255, 140, 0, 0, 140, 140, 255], dtype=torch.uint8)
    labels = torch.tensor([1, 1, 0, 0, 1, 1, 1])
    split = Split(pixels.view(-1, 1, 1, 1), labels, 1 / 255)
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
