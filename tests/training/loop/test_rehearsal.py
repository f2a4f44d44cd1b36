"""The choice of arithmetic, layout and compilation: by a rule, without a trace, kept on resume, told to all processes."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import yopo_ext
from yopo_ext.training.comparison.comparison import Comparison
from yopo_ext.training.config.schema import CompareConfig, TrainConfig
from yopo_ext.training.loop import rehearsal, speed
from yopo_ext.training.loop.rehearsal import Mode, Trial, best, fastest_mode, modes_to_try, report, run_trials
from yopo_ext.training.loop.trainer import Trainer

CPU = torch.device("cpu")
FP32, BF16, LAST = Mode(), Mode("bf16-mixed"), Mode(channels_last=True)


@pytest.mark.parametrize(
    ("seconds", "loss_error", "cosine", "chosen"),
    [
        ((0.5, 0.5, 0.5), 0.01, 0.99, BF16),
        ((0.8, 0.8, 0.9), 0.01, 0.99, FP32),  # its slowest step is not 15 % faster than the fastest of fp32
        ((0.5, 0.5, 0.5), 0.2, 0.99, FP32),
        ((0.5, 0.5, 0.5), 0.01, 0.5, FP32),
        ((0.5, 0.5, 0.5), float("nan"), 0.99, FP32),
        ((0.5, 0.5, 0.5), 0.01, float("nan"), FP32),
    ],
)
def test_fp32_is_kept_unless_another_mode_is_faster_and_as_good(seconds, loss_error, cosine, chosen):
    trials = [Trial(FP32, (1.0, 1.0, 1.1)), Trial(BF16, seconds, loss_error, cosine), Trial(LAST, failure="no memory")]
    assert best(trials).mode == chosen
    text = "\n".join(report(trials, best(trials), "steps"))
    assert len(text.splitlines()) == 3
    assert "channels_last failed" in text
    assert f"--precision {chosen.precision} --no-channels-last --no-compile" in text


def test_only_what_is_not_given_is_tried(monkeypatch):
    monkeypatch.setattr(rehearsal, "supported_precisions", lambda device: ("32-true", "bf16-mixed"))
    assert modes_to_try(CPU, None, None) == [FP32, LAST, BF16, Mode("bf16-mixed", True)]
    assert modes_to_try(CPU, "16-mixed", True) == [Mode("16-mixed", True)]
    assert modes_to_try(CPU, None, None, convolutional=False) == [FP32, BF16]


def test_a_mode_that_fails_is_left_out_and_one_that_differs_is_measured():
    def build(gradient):
        def broken():
            raise RuntimeError("no compiler\nand more")

        return broken if gradient is None else lambda: lambda: (1.0, torch.tensor(gradient))

    exact, failed, other = run_trials([(FP32, build([1.0, 0.0])), (LAST, build(None)), (BF16, build([0.0, 1.0]))], CPU)
    assert (exact.cosine, other.cosine) == (1.0, 0.0)
    assert failed.failure == "no compiler"
    assert len(exact.seconds) == rehearsal.ROUNDS
    assert not other.agrees


def test_a_rehearsal_says_that_it_is_one_and_times_no_loser_twice(capsys, monkeypatch):
    """On a clock that the steps themselves move."""
    seconds, calls, now = {FP32: 1.0, BF16: 0.5, LAST: 2.0}, [], [0.0]
    monkeypatch.setattr(rehearsal, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def build(mode):
        def step():
            calls.append(mode)
            now[0] += seconds[mode]
            return 1.0, torch.ones(2)

        return lambda: step

    trials = run_trials([(mode, build(mode)) for mode in seconds], CPU, shown=True)
    assert [trial.seconds for trial in trials] == [(1.0,) * 3, (0.5,) * 3, (2.0,)]
    assert best(trials).mode == BF16
    assert calls.count(LAST) == 2
    assert "rehearsal: a few steps each in fp32, bf16, fp32 channels_last" in capsys.readouterr().err


@pytest.fixture
def a_long_run(monkeypatch):
    """Every run is long enough for a rehearsal, in which bf16 is always the fastest."""
    monkeypatch.setattr(speed, "SHORT_RUN", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(rehearsal, "supported_precisions", lambda device: ("32-true", "bf16-mixed"))
    calls = []

    def first_bf16(trials):
        calls.append(trials)
        return next((t for t in trials if t.mode.precision == "bf16-mixed"), trials[0])

    monkeypatch.setattr(speed, "best", first_bf16)
    return calls


CONFIG = {"epochs": 2, "batch_size": 40, "validation_steps": 1}


def weights(config, few_digits):
    trainer = Trainer(config, dataset=few_digits, shown=False)
    return trainer.config, list(trainer.fit().network.state_dict().values())


@pytest.mark.parametrize("method", ["yopo-2-2:persist", "free-2", "fgsm-pgi"])
def test_a_rehearsal_leaves_no_trace(few_digits, a_long_run, method):
    """Bit by bit the same run as one with the mode spelled out; the caller's random numbers are not touched."""
    before = torch.get_rng_state()
    config, found = weights(TrainConfig(**CONFIG, method=method), few_digits)
    assert (config.precision, config.channels_last, config.compile) == ("bf16-mixed", False, False)
    assert len(a_long_run) == 1
    assert all(trial.cosine > 0.9 for trial in a_long_run[0])
    spelled = TrainConfig(**CONFIG, method=method, precision="bf16-mixed", channels_last=False, compile=False)
    torch.set_rng_state(before)
    _, expected = weights(spelled, few_digits)
    assert len(a_long_run) == 1  # nothing is left to choose
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_digits_are_trained_in_fp32_without_a_rehearsal(few_digits, monkeypatch):
    monkeypatch.setattr(speed, "run_trials", lambda *_, **__: pytest.fail("a rehearsal"))
    trainer = Trainer(TrainConfig(), dataset=few_digits, shown=False)
    assert (trainer.config.precision, trainer.config.channels_last, trainer.config.compile) == ("32-true", False, False)
    assert speed.operations(trainer.config, trainer.method, trainer.dataset) > 1e9


def test_the_choice_is_written_and_kept_on_resume(few_digits, tmp_path, a_long_run, monkeypatch, capsys):
    config = TrainConfig(**CONFIG, method="natural", out=str(tmp_path / "run"), resume="auto")
    weights(config, few_digits)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["config"]["precision"] == "bf16-mixed"
    monkeypatch.setattr(speed, "best", lambda trials: pytest.fail("chosen again"))
    assert weights(config, few_digits)[0].precision == "bf16-mixed"
    assert "this machine" not in capsys.readouterr().err
    monkeypatch.setattr(speed, "processor", lambda device: "another one")
    Trainer(config, dataset=few_digits, shown=True)
    assert "this machine (another one) is not the one the run began on" in capsys.readouterr().err
    with pytest.raises(ValueError, match="precision was 'bf16-mixed', not '32-true'"):
        Trainer(TrainConfig(**{**vars(config), "precision": "32-true"}), dataset=few_digits, shown=False)


def test_a_comparison_chooses_once(few_digits, tmp_path, a_long_run, monkeypatch):
    monkeypatch.setattr("yopo_ext.training.comparison.comparison.dataset_of", lambda config: few_digits)
    train = TrainConfig(**CONFIG, out=str(tmp_path / "run"), resume="auto")
    config = CompareConfig(methods=("natural", "pgd-1"), seeds=(0, 1), test_attacks=("pgd-1",), train=train)
    Comparison(config, shown=False).run()
    assert len(a_long_run) == 1
    for path in (tmp_path / "run").glob("*/*/run.json"):
        assert json.loads(path.read_text())["config"]["precision"] == "bf16-mixed"
    assert json.loads((tmp_path / "run" / "comparison.json").read_text())["precision"] == "bf16-mixed"
    more = CompareConfig(methods=("natural", "pgd-1", "pgd-2"), seeds=(0, 1), test_attacks=("pgd-1",), train=train)
    Comparison(more, shown=False).run()
    assert len(a_long_run) == 1  # the mode of the runs that are there


def test_a_loop_of_ones_own(capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    before = [value.clone() for value in model.state_dict().values()]
    state = torch.get_rng_state()

    def step(model, x, y):
        return yopo_ext.yopo_step(model, x, y, eps=8 / 255, step_size=2 / 255, outer_steps=2).loss

    mode = fastest_mode(model, step, x, y)
    assert isinstance(mode, Mode)
    assert "the same again: --precision" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert fastest_mode(model, step, x, y, precision="32-true", channels_last=True, shown=False) == LAST
