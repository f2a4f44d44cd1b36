import dataclasses
import json
import re

import pytest
import torch
from torch import nn

from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.config.resolve import resolve
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.data.batches import Batch
from yopo_ext.training.evaluation.evaluate import evaluate
from yopo_ext.training.loop.collapse_alarm import has_fallen, training_alarm
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.models import MODELS, ModelEntry


@pytest.fixture
def net_with_norm(monkeypatch):
    """A registered model with BatchNorm, for 8x8 images."""

    def build(channels, classes):
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, classes)
        )

    monkeypatch.setitem(MODELS, "norm-net", ModelEntry(build))
    return "norm-net"


def test_average_follows_weights_and_statistics(few_digits, net_with_norm):
    config = TrainConfig(method="natural", model=net_with_norm, ema=0.5, batch_size=40)
    trainer = Trainer(config, dataset=few_digits, shown=False)
    learner = trainer.learner
    expected = None
    for number, batch in enumerate(trainer.source.epoch(0)):
        learner.step(batch, number, lr=0.1)
        now = {name: value.clone() for name, value in learner.module.state_dict().items()}
        # torch.optim.swa_utils starts the average at the first weights it sees.
        expected = now if expected is None else {name: 0.5 * expected[name] + 0.5 * now[name] for name in now}
    found = learner.result.state_dict()
    assert learner.result is not learner.module
    for name in ("0.weight", "1.weight", "1.running_mean", "1.running_var", "4.bias"):
        torch.testing.assert_close(found[name], expected[name])
        assert not torch.equal(found[name], learner.module.state_dict()[name])


def test_an_average_spans_a_fraction_of_the_updates(few_digits, net_with_norm):
    """The weight of update s in the average after update t is 1 / (1 + c s) times what later updates left of it."""
    config = TrainConfig(method="natural", model=net_with_norm, average=0.25, batch_size=20)
    trainer = Trainer(config, dataset=few_digits, shown=False)
    seen = []
    for number, batch in enumerate(trainer.source.epoch(0)):
        trainer.learner.step(batch, number, lr=0.1)
        seen.append(trainer.learner.module[0].weight.detach().clone())
    shares = [1.0] + [1 / (1 + 0.25 * t) for t in range(2, len(seen) + 1)]
    expected = sum(
        share * torch.tensor([1.0 - later for later in shares[s + 1 :]]).prod() * weight
        for s, (share, weight) in enumerate(zip(shares, seen, strict=True))
    )
    torch.testing.assert_close(trainer.learner.result[0].weight.detach(), expected)


@pytest.mark.parametrize(
    ("options", "average", "smoothing"),
    [
        ({}, 0.05, 0.4),
        ({"ema": 0.99}, 0.0, 0.4),
        ({"average": 0.0, "label_smoothing": 0.0}, 0.0, 0.0),
        ({"dataset": "mnist"}, 0.0, 0.0),
    ],
)
def test_cifar_averages_and_smooths_by_default(options, average, smoothing):
    config, _ = resolve(TrainConfig(**{"dataset": "cifar10", **options}))
    assert (config.average, config.label_smoothing) == (average, smoothing)


def test_the_averaged_model_is_what_is_validated_and_returned(few_digits, net_with_norm):
    config = TrainConfig(method="natural", model=net_with_norm, ema=0.999, epochs=2)
    trainer = Trainer(config, dataset=few_digits, shown=False)
    network = trainer.fit().network
    assert network is trainer.learner.result
    assert not network.training
    assert trainer.learner.module.training


def test_clipping_bounds_the_step(few_digits):
    config = TrainConfig(method="natural", clip=1e-3, momentum=0.0, weight_decay=0.0)
    trainer = Trainer(config, dataset=few_digits, shown=False)
    before = [p.clone() for p in trainer.learner.module.parameters()]
    trainer.learner.step(next(trainer.source.epoch(0)), 0, lr=1.0)
    moved = torch.cat([(p - q).flatten() for p, q in zip(trainer.learner.module.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def in_double(trainer: Trainer) -> list[Batch]:
    """Make the model fp64, in which rounding decides no sign of a gradient; the first epoch's batches in fp64."""
    trainer.learner.module.double()
    for kept in trainer.learner.kept.values():
        kept.values = kept.values.double()
    return [dataclasses.replace(batch, x=batch.x.double()) for batch in trainer.source.epoch(0)]


@pytest.mark.parametrize("method", ["pgd-2", "fgsm-mep", "trades-2", "yopo-2-2", "trades-yopo-2-2"])
def test_channels_last_gives_the_same_step(few_digits, net_with_norm, method):
    losses = []
    for channels_last in (False, True):
        config = TrainConfig(method=method, model=net_with_norm, channels_last=channels_last)
        trainer = Trainer(config, dataset=few_digits, shown=False)
        losses.append(trainer.learner.step(in_double(trainer)[0], 0, lr=0.1).loss)
    torch.testing.assert_close(*losses)


class Normalising(nn.Module):
    """For a model of pixels: normalisation as its own first module."""

    def forward(self, x):
        return (x - 0.4) / 0.25


@pytest.mark.parametrize(
    "method", ["natural", "pgd-2", "free-2", "fgsm-rs", "n-fgsm", "fgsm-mep", "trades-2", "yopo-2-2", "trades-yopo-2-2"]
)
def test_normalisation_by_option_is_normalisation_in_the_model(few_digits, monkeypatch, method):
    def inside(channels, classes):
        conv = nn.Conv2d(channels, 8, 3, padding=1)
        head = [nn.Sequential(Normalising(), conv), nn.ReLU(), nn.Flatten(), nn.Linear(512, classes)]
        return nn.Sequential(*head)

    def outside(channels, classes):
        model = inside(channels, classes)
        model[0] = model[0][1]
        return model

    monkeypatch.setitem(MODELS, "inside", ModelEntry(inside, "0"))
    monkeypatch.setitem(MODELS, "outside", ModelEntry(outside, "0"))
    results = []
    for name, options in (("inside", {}), ("outside", {"mean": (0.4,), "std": (0.25,)})):
        config = TrainConfig(method=method, model=name, epochs=1, batch_size=80, **options)
        trainer = Trainer(config, dataset=few_digits, shown=False)
        for number, batch in enumerate(in_double(trainer)):
            trainer.learner.step(batch, number, lr=0.1)
        weights = [p.detach().clone() for p in trainer.learner.module.parameters()]
        found = evaluate(trainer.learner.result.float(), few_digits.test, trainer.learner.threat, [PgdAttack(3)])
        results.append((found.clean, found.worst, weights))
    (clean, worst, weights), others = results
    assert (clean, worst) == pytest.approx(others[:2], abs=5.0)  # in fp32, of 40 samples: two may be undecided
    torch.testing.assert_close(weights, others[2], rtol=1e-5, atol=1e-6)  # the learner takes logits in fp32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, "mean and std must have the same length"),
        ({"mean": (0.5,), "std": (0.0,)}, "std must be > 0"),
        ({"mean": (0.5, 0.5), "std": (0.2, 0.2)}, r"mean must have one value or one per channel \(1\)"),
    ],
)
def test_bad_normalisation(few_digits, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**options), dataset=few_digits, shown=False)


@pytest.mark.parametrize("method", ["pgd-2", "free-2", "fgsm-mep", "trades-2", "yopo-2-2", "trades-yopo-2-2"])
def test_bf16(few_digits, net_with_norm, method):
    config = TrainConfig(method=method, model=net_with_norm, precision="bf16-mixed")
    trainer = Trainer(config, dataset=few_digits, shown=False)
    for number, batch in enumerate(trainer.source.epoch(0)):
        outcome = trainer.learner.step(batch, number, lr=0.1)
    assert outcome.loss.isfinite()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in trainer.learner.module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pgd-2", "yopo-2-2"])
def test_compile_gives_the_same_step(few_digits, net_with_norm, method):
    losses = []
    for compile in (False, True):
        config = TrainConfig(method=method, model=net_with_norm, compile=compile)
        trainer = Trainer(config, dataset=few_digits, shown=False)
        losses.append(trainer.learner.step(in_double(trainer)[0], 0, lr=0.1).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("method", ["free-2", "fgsm-mep", "yopo-2-2:persist"])
def test_a_rehearsal_leaves_no_trace(few_digits, net_with_norm, method):
    config = TrainConfig(method=method, model=net_with_norm, ema=0.9)
    states = []
    for rehearsed in (False, True):
        trainer = Trainer(config, dataset=few_digits, shown=False)
        batches = list(trainer.source.epoch(0))
        trainer.learner.step(batches[0], 0, lr=0.1)
        if rehearsed:
            trainer.learner.rehearse(batches[1])
        trainer.learner.step(batches[2], 1, lr=0.1)
        trainer.learner.collect()
        states.append(trainer.learner.state_dict())
    torch.testing.assert_close(*states, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("method", ["natural", "yopo-2-2"])
def test_an_overflow_in_fp16_skips_the_update(few_digits, method):
    """Also where gradients are clipped, whose norm is then not finite."""
    config = TrainConfig(method=method, clip=1.0)
    trainer = Trainer(config, dataset=few_digits, shown=False)
    learner = trainer.learner
    from lightning_fabric.plugins import MixedPrecision  # not before the trainer has seen to torchvision

    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**127))
    learner.fabric.strategy.precision = learner.fabric._precision = precision
    learner.config = dataclasses.replace(learner.config, precision="16-mixed")
    before = [p.clone() for p in learner.module.parameters()]
    learner.step(next(trainer.source.epoch(0)), 0, lr=0.1)
    assert all(torch.equal(p, q) for p, q in zip(before, learner.module.parameters(), strict=True))
    assert precision.scaler.get_scale() == 2.0**126


def test_what_a_method_keeps_starts_in_the_ball_and_changes(few_digits):
    trainer = Trainer(TrainConfig(method="yopo-1-2:persist"), dataset=few_digits, shown=False)
    kept = trainer.learner.kept["perturbation"].values
    x = trainer.dataset.train.x()
    before = kept.clone()
    batch = next(trainer.source.epoch(0))
    trainer.learner.step(batch, 0, lr=0.1)
    changed = (kept != before).flatten(1).any(1)
    assert torch.equal(changed.nonzero().squeeze(1), batch.index.sort().values)
    for perturbations in (before, kept):
        assert perturbations.abs().max() <= torch.tensor(0.15)
        assert ((x + perturbations) >= -1e-6).all()
    momentum = Trainer(TrainConfig(method="fgsm-mep"), dataset=few_digits, shown=False).learner.kept["momentum"]
    assert not momentum.values.any()


BEFORE = {"validation_clean": 95.0, "validation_pgd": 50.0, "lr": 0.1}


@pytest.mark.parametrize(
    ("clean", "pgd", "train", "alarm"),
    [
        (90.0, 10.0, 90.0, "catastrophic overfitting: .* fell from 50.0 % to 10.0 %"),
        (10.0, 10.0, 10.0, "training collapsed: .* fell from 95.0 % to 10.0 %"),
        (90.0, 45.0, 90.0, None),
        (90.0, 10.0, 20.0, None),
    ],
)
def test_alarms_of_training(clean, pgd, train, alarm):
    record = {"validation_clean": clean, "validation_pgd": pgd, "train_accuracy": train, "lr": 0.05}
    assert training_alarm({}, record, 10, fallen=2) is None  # nothing to compare with yet
    assert training_alarm({"validation_clean": 15.0, "validation_pgd": 15.0}, record, 10, fallen=2) is None
    found = training_alarm(BEFORE, record, 10, fallen=2)
    assert found is None if alarm is None else re.search(alarm, found)


def test_a_fall_back_to_chance_in_the_warm_up_is_no_collapse():
    """A network that falls back while the rate rises learns again when it falls."""
    highest = {"validation_clean": 25.0, "validation_pgd": 15.0, "lr": 0.03}
    record = {"validation_clean": 10.0, "validation_pgd": 10.0, "train_accuracy": 10.0, "lr": 0.05}
    assert has_fallen(highest, record, 10)
    assert training_alarm(highest, record, 10, fallen=1) is None
    assert training_alarm(highest, record, 10, fallen=2) is None  # the rate still rises
    falling = {**record, "lr": 0.02}
    assert training_alarm(highest, falling, 10, fallen=1) is None  # one bad validation may be an accident
    assert "training collapsed" in training_alarm(highest, falling, 10, fallen=2)
    assert "training collapsed" in training_alarm(highest, falling, 10, fallen=1, last=True)
    assert "training collapsed" in training_alarm({**highest, "lr": 0.05}, record, 10, fallen=2)  # a constant rate


def test_the_alarm_of_an_attack_that_loses_its_way():
    record = {"train_accuracy": 50.0, "alignment": 0.1}
    assert training_alarm({"alignment": 0.19}, record, 10, fallen=0) is None
    assert "fell from 0.30 to 0.10" in training_alarm({"alignment": 0.3}, record, 10, fallen=0)
    assert training_alarm({"alignment": 0.3}, {"train_accuracy": 50.0}, 10, fallen=0) is None


def test_a_collapse_is_recorded(few_digits, tmp_path):
    config = TrainConfig(method="pgd-1", epochs=6, validate_every=1, lr=0.05, out=str(tmp_path / "run"))
    trainer = Trainer(config, dataset=few_digits, shown=False)
    trainer.at.highest = {"validation_clean": 199.0, "validation_pgd": 70.0, "lr": 0.1}
    trainer.fit()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "alarm" not in records[0]
    assert "training collapsed" in records[1]["alarm"]
