import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from yopo_ext.training.attacks.pgd import PgdAttack
from yopo_ext.training.config.resolve import resolve
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.evaluation.evaluate import evaluate
from yopo_ext.training.loop import position
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.run.checkpoint import load_checkpoint

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def weights(trainer):
    return {name: value.clone() for name, value in trainer.learner.module.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["natural", "pgd-2", "free-2", "fgsm-mep", "trades-2", "yopo-2-2:persist"])
def test_a_seed_determines_the_run(few_digits, method):
    def run(seed):
        trainer = Trainer(TrainConfig(method=method, seed=seed, epochs=2), dataset=few_digits, shown=False)
        torch.rand(seed + 3)  # what a caller draws must not matter
        trainer.fit()
        return weights(trainer)

    first = run(0)
    assert same(first, run(0))
    assert not same(first, run(1))


def test_methods_start_from_the_same_weights_and_see_the_same_batches(few_digits):
    trainers = [
        Trainer(TrainConfig(method=m, seed=3), dataset=few_digits, shown=False)
        for m in ("natural", "pgd-2", "yopo-2-2")
    ]
    assert all(same(weights(trainers[0]), weights(t)) for t in trainers)
    orders = [torch.cat([b.index for b in t.source.epoch(1)]) for t in trainers]
    assert all(torch.equal(orders[0], order) for order in orders)


def test_natural_training_is_accurate_and_not_robust(digits):
    trainer = Trainer(TrainConfig(method="natural", epochs=8), dataset=digits, shown=False)
    result = trainer.fit()
    found = evaluate(result.network, result.dataset.test, trainer.learner.threat, [PgdAttack(10)])
    assert found.clean > 92
    assert found.robust["pgd-10"] < 40
    assert found.worst <= min(found.clean, found.robust["pgd-10"])


def test_yopo_makes_it_robust(digits):
    trainer = Trainer(TrainConfig(method="yopo-5-3", epochs=8), dataset=digits, shown=False)
    result = trainer.fit()
    found = evaluate(result.network, result.dataset.test, trainer.learner.threat, [PgdAttack(10)])
    assert found.clean > 90
    assert found.robust["pgd-10"] > 60


def test_the_folder_of_a_run(few_digits, tmp_path):
    config = TrainConfig(method="pgd-2", epochs=3, validate_every=2, out=str(tmp_path / "run"))
    trainer = Trainer(config, dataset=few_digits, shown=True)
    result = trainer.fit()
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        "last.pt", "metrics.jsonl", "model.pt", "result.json", "run.json",
    ]  # fmt: skip
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    assert ["validation_pgd" in r for r in records] == [False, True, True]  # every second epoch, and the last
    assert records[-1]["updates"] == 3 * trainer.source.batches
    run = json.loads((folder / "run.json").read_text())
    assert run["config"]["lr"] == trainer.config.lr
    assert run["environment"]["packages"]["torch"] == torch.__version__
    best = load_checkpoint(folder / "model.pt")
    assert same(best["model"], result.network.state_dict())
    assert best["validation"] == result.validation
    with pytest.raises(ValueError, match="out must be a folder without a run"):
        Trainer(config, dataset=few_digits, shown=False)


def test_selection_takes_the_best_validated_epoch_or_the_last(few_digits, tmp_path):
    results = {}
    for select in ("best", "last"):
        config = TrainConfig(
            method="natural", epochs=4, validate_every=1, lr=0.5, select=select, out=str(tmp_path / select)
        )
        trainer = Trainer(config, dataset=few_digits, shown=False)
        results[select] = trainer.fit()
    records = [json.loads(line) for line in (tmp_path / "best" / "metrics.jsonl").read_text().splitlines()]
    assert results["best"].validation["validation_clean"] == max(r["validation_clean"] for r in records)
    last = load_checkpoint(tmp_path / "last" / "last.pt")
    assert same(last["model"], results["last"].network.state_dict())
    records = [json.loads(line) for line in (tmp_path / "last" / "metrics.jsonl").read_text().splitlines()]
    model = load_checkpoint(tmp_path / "last" / "model.pt")
    for found in (results["last"].validation, model["validation"]):
        assert found == {name: records[-1][name] for name in ("validation_clean", "validation_pgd", "epoch")}
    assert same(model["model"], last["model"])


def test_time_budget_ends_the_run(few_digits, monkeypatch):
    """On a clock that goes on by a fixed amount whenever it is read."""
    ticks = itertools.count(step=2**-5)
    monkeypatch.setattr(position, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    trainer = Trainer(TrainConfig(method="natural", time_budget=0.5), dataset=few_digits, shown=False)
    result = trainer.fit()
    assert 0.5 <= result.seconds <= 0.5 + 4 * 2**-5
    assert result.updates > 5


def test_a_time_budget_leaves_no_number_of_epochs():
    config, _ = resolve(TrainConfig(time_budget=9.0))
    assert config.epochs is None
    assert resolve(config)[0] == config


@pytest.mark.parametrize("method", ["pgd-2", "yopo-2-2:persist", "trades-2", "fgsm-pgi", "trades-yopo-2-2", "free-2"])
def test_eps_rises_over_its_warm_up(few_digits, method):
    """No perturbation leaves the ball of its batch, and what is validated is validated at the full eps."""
    config = TrainConfig(method=method, epochs=4, eps_warmup=0.5, batch_size=40, validation_steps=1)
    trainer = Trainer(config, dataset=few_digits, shown=False)
    step, seen = trainer.learner.step, []

    def watched(batch, number, lr):
        found = step(batch, number, lr)
        seen.append(trainer.learner.threat.eps)
        for name, kept in trainer.learner.kept.items():
            if name == "perturbation":
                assert kept.values.abs().max() <= seen[-1] * (1 + 1e-6)
        return found

    trainer.learner.step = watched
    trainer.fit()
    expected = [0.15 * min(1.0, (number + 0.5) / 8) for number in range(16)]
    assert seen == pytest.approx(expected)
    assert trainer.threat.eps == 0.15


def test_label_smoothing_changes_the_loss(few_digits):
    trainer = Trainer(TrainConfig(label_smoothing=0.1), dataset=few_digits, shown=False)
    logits, y = torch.randn(4, 10), torch.arange(4)
    expected = torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.1)
    assert torch.equal(trainer.learner.loss(logits, y), expected)


def test_defaults_come_from_the_data_set_and_the_method():
    config, method = resolve(TrainConfig(method="trades"))
    assert (config.model, config.eps, config.method) == ("digits-cnn", 0.15, "trades-10")
    assert config.lr == pytest.approx(0.5 * resolve(TrainConfig(method="pgd-10"))[0].lr)
    again, same_method = resolve(config)
    assert again == config
    assert same_method == method
    assert resolve(TrainConfig(method="trades", lr=0.3))[0].lr == 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "letters"}, "dataset must be one of .*got 'letters'"),
        ({"model": "net"}, "model must be one of .*got 'net'"),
        ({"eps": -0.1}, "eps must be >= 0"),
        ({"eps": 8.0}, "looks like 0..255 units"),
        ({"norm": "l1"}, "norm must be one of"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1"),
        ({"batch_size": 1000}, "batch_size must be between 1 and the 160 training samples"),
        ({"lr": -1.0}, "lr must be in"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in"),
        ({"average": 1.0}, r"average must be in \[0, 1\)"),
        ({"average": 0.1, "ema": 0.9}, "average must be 0 with ema"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"milestones": (2.0,)}, "milestones must be"),
        ({"time_budget": 0.0}, "time_budget must be > 0"),
        ({"time_budget": 9.0, "epochs": 3}, "epochs must not be given with time_budget, which ends the run; got 3"),
        ({"eps_warmup": 1.5}, r"eps_warmup must be in \[0, 1\]; got 1.5"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"method": "n-fgsm", "norm": "l2"}, "norm must be 'linf' for method 'n-fgsm'"),
        ({"model": "smallcnn"}, r"model must take images of shape \[1, 8, 8\]; 'smallcnn' says"),
        pytest.param(
            {"accelerator": "cuda"}, "accelerator must be 'auto' or 'cpu' where PyTorch finds no GPU", marks=WITHOUT_GPU
        ),
    ],
)
def test_bad_configurations_are_named(few_digits, change, message):
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(**change), dataset=few_digits, shown=False)
