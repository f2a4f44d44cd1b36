import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from yopo_ext.training import methods
from yopo_ext.training.config import TrainConfig
from yopo_ext.training.trainer import Trainer

# One row per method, and per option that changes what is computed:
# (text, (forwards, input gradients, weight gradients), updates).
COSTS = [
    ("natural", (1, 1, 1), 1),
    ("pgd-10", (11, 11, 1), 1),
    ("pgd-2:bn-mode=train", (3, 3, 1), 1),
    ("free-3", (3, 3, 3), 3),
    ("fgsm-rs", (2, 2, 1), 1),
    ("n-fgsm", (2, 2, 1), 1),
    ("fgsm-mep", (2, 3, 2), 1),
    ("trades-4", (7, 6, 2), 1),
    ("trades-yopo-3-4", (6, 5, 2), 1),
    ("yopo-5-3", (5, 5, 5), 1),
    ("yopo-3-2:update-every=pass", (3, 3, 3), 3),
    ("yopo-3-2:train-on=last", (3, 3, 1), 1),
    ("yopo-2-2:persist", (2, 2, 2), 1),
    ("yopo-2-1:gradient=released", (2, 2, 2), 1),
]


class CountConvolutions(TorchDispatchMode):
    """Forwards, input gradients and weight gradients of the convolutions whose weight has this shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.counts = shape, [0, 0, 0]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function._overloadpacket
        if packet is torch.ops.aten.convolution and args[1].shape == self.shape:
            self.counts[0] += 1
        if packet is torch.ops.aten.convolution_backward and args[2].shape == self.shape:
            self.counts[1] += args[-1][0]
            self.counts[2] += args[-1][1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("text", "passes", "updates"), COSTS, ids=[row[0] for row in COSTS])
def test_a_batch_costs_what_the_method_declares(few_digits, text, passes, updates):
    trainer = Trainer(TrainConfig(method=text), dataset=few_digits, shown=False)
    learner = trainer.learner
    above_the_first = learner.module.second[0].weight.shape
    weights = [p.clone() for p in learner.module.parameters()]
    with CountConvolutions(above_the_first) as counter:
        learner.step(next(trainer.source.epoch(0)), 0, lr=0.1)
    cost = learner.method.cost()
    assert tuple(counter.counts) == passes == (cost.forwards, cost.input_grads, cost.weight_grads)
    assert learner.updates == updates
    assert all(not torch.equal(p, old) for p, old in zip(learner.module.parameters(), weights, strict=True))
    assert all(p.grad is None or not p.grad.any() for p in learner.module.parameters())


def test_every_method_has_its_row():
    assert {methods.parse(row[0]).name for row in COSTS} == set(methods.METHODS)


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("natural", 3),
        ("pgd-10", 23),
        ("pgd-6", 15),
        ("yopo-5-3", 15),
        ("free-8", 24),
        ("trades-10", 27),
        ("fgsm-mep", 7),
        ("trades-yopo-3-4", 13),
    ],
)
def test_units(text, total):
    assert methods.parse(text).cost().total == total


@pytest.mark.parametrize("text", [row[0] for row in COSTS])
def test_the_written_form_makes_the_same_method(text):
    method = methods.parse(text)
    assert methods.parse(method.spec) == method
    assert methods.parse(method.name, **vars(method)) == method


def test_numbers_options_and_defaults():
    assert methods.parse("yopo") == methods.parse("yopo-5-3")
    assert methods.parse("yopo-4").outer_steps == 4
    assert methods.parse("pgd", steps=7) == methods.parse("pgd-7")
    assert methods.parse("yopo-2-2:persist:step-size=2/255").step_size == 2 / 255
    assert methods.parse("yopo:persist=false").persist is False
    assert methods.parse("fgsm-rs").name == "fgsm-rs"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("sgd", {}, "method must be one of natural, .*; got 'sgd'"),
        ("pgd-x", {}, "method must look like pgd-STEPS; got 'pgd-x'"),
        ("yopo-5-3-1", {}, "method must look like yopo-OUTER_STEPS-INNER_STEPS"),
        ("natural-3", {}, "method must look like natural; got"),
        ("pgd-0", {}, "steps must be an integer >= 1; got 0"),
        (
            "pgd:outer-steps=3",
            {},
            "outer_steps is no option of method 'pgd', which takes bn_mode, init,",
        ),
        ("natural", {"steps": 3}, "steps is no option of method 'natural', which takes no options"),
        ("pgd-10", {"steps": 3}, "steps is 3 but method='pgd-10' says 10"),
        ("pgd:step-size=1/10", {"step_size": 0.2}, "step_size is 0.2 but method='pgd:step-size=1/10' says 0.1"),
        ("pgd:steps=2.5", {}, "steps must be an integer; got '2.5'"),
        ("pgd:init=random", {}, "init must be one of 'uniform', 'zero'; got 'random'"),
        ("yopo:persist=maybe", {}, "persist must be true or false; got 'maybe'"),
        ("yopo:step-size=big", {}, "step_size must be a number or a fraction such as 8/255; got 'big'"),
        ("yopo:update-every=pass:train-on=last", {}, "train_on must be 'all' with update_every='pass'"),
        ("trades:beta=-1", {}, "beta must be >= 0"),
    ],
)
def test_bad_methods_are_named(text, options, message):
    with pytest.raises(ValueError, match=message):
        methods.parse(text, **options)
