import copy
import dataclasses
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from yopo_ext.training import methods
from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.loop.trainer import Trainer

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
    ("fgsm-pgi", (2, 3, 2), 1),
    ("fgsm-pgi:frame=image:reset-every=none", (2, 3, 2), 1),
    ("fgsm-rs-cs", (2, 3, 2), 1),
    ("liet", (2, 3, 2), 1),
    ("trades-4", (7, 6, 2), 1),
    ("trades-yopo-3-4", (6, 5, 2), 1),
    ("yopo-5-3", (5, 5, 5), 1),
    ("yopo-3-2:update-every=pass", (3, 3, 3), 3),
    ("yopo-3-2:train-on=last", (3, 3, 1), 1),
    ("yopo-2-2:persist", (2, 2, 2), 1),
    ("yopo-2-2:persist:train-on=last:frame=input:reset-every=3", (2, 2, 1), 1),
    ("yopo-2-1:smooth=0.03", (2, 2, 2), 1),
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
    first, second = list(trainer.source.epoch(0))[:2]
    learner.step(first, 0, lr=0.1)  # what is computed once for several batches is no part of a batch's cost
    weights = [p.clone() for p in learner.module.parameters()]
    with CountConvolutions(above_the_first) as counter:
        learner.step(second, 1, lr=0.1)
    cost = learner.method.cost()
    assert tuple(counter.counts) == passes == (cost.forwards, cost.input_grads, cost.weight_grads)
    assert learner.updates == 2 * updates
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
        ("fgsm-pgi:label-weight=0", {}, r"label_weight must be in \(0, 1\]; got 0"),
        ("fgsm-pgi:reset-every=0", {}, "reset_every must be an integer >= 1; got 0"),
        ("fgsm-rs-cs:smooth=none", {}, "smooth must be > 0; got None"),
        ("liet:low=0.6", {}, "low and high must be increasing shares"),
        ("yopo:reset-every=3", {}, "persist must be true with reset_every"),
        ("yopo:smooth=0", {}, "smooth must be > 0"),
        ("yopo:smooth=0.03:train-on=last", {}, "smooth needs train_on='all'"),
        ("yopo-1-1:smooth=0.03", {}, "smooth needs .* outer_steps >= 2"),
    ],
)
def test_bad_methods_are_named(text, options, message):
    with pytest.raises(ValueError, match=message):
        methods.parse(text, **options)


def test_one_pass_with_kept_perturbations_is_warned_of():
    threat = methods.ThreatModel(8 / 255)
    with pytest.warns(UserWarning, match="set outer_steps to 2"):
        methods.parse("yopo-1-3:persist").check(threat)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        methods.parse("yopo-2-3:persist").check(threat)
        methods.parse("yopo-1-3").check(threat)


def recorded_step(few_digits, text, **options):
    """(learner, the model before the step, the batch, inputs of every forward, outcome) of one batch."""
    trainer = Trainer(TrainConfig(method=text, augment=True, **options), dataset=few_digits, shown=False)
    learner, batch = trainer.learner, next(trainer.source.epoch(0))
    inputs = []
    learner.module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach().clone()))
    model = copy.deepcopy(learner.module)
    outcome = learner.step(batch, 0, lr=0.1)
    return learner, model, batch, inputs, outcome


def test_what_is_kept_starts_afresh_every_so_many_epochs(few_digits):
    trainer = Trainer(TrainConfig(method="yopo-2-1:persist:reset-every=2"), dataset=few_digits, shown=False)
    learner, values = trainer.learner, trainer.learner.kept["perturbation"].values
    start = values.clone()
    for epoch in range(3):
        batches = list(trainer.source.epoch(epoch))
        before = values.clone()
        learner.step(batches[0], epoch, lr=0.1)
        rest = torch.cat([batch.index for batch in batches[1:]])
        assert torch.equal(values[rest], before[rest]) == (epoch < 2)
    assert (values[rest].abs() <= 0.15).all()
    assert not torch.equal(values[rest], start[rest])


@pytest.mark.parametrize("frame", ["image", "input"])
def test_kept_perturbations_move_with_the_image_or_stay(few_digits, frame):
    text = f"yopo-2-1:persist:train-on=last:frame={frame}"
    start = Trainer(TrainConfig(method=text), dataset=few_digits, shown=False).learner.kept["perturbation"].values
    _, _, batch, inputs, _ = recorded_step(few_digits, text)
    eta = inputs[-2] - batch.x
    expected = start[batch.index]
    if frame == "image":
        expected = batch.placement.apply(expected)
    torch.testing.assert_close(eta, expected, rtol=0.0, atol=1e-6)


def test_the_smoothing_term_is_a_weighted_loss_of_the_early_passes(few_digits):
    """The weights get dL(x + eta_2) + w (dL(x + eta_0) + dL(x + eta_1)) / 2, w = 1 after smaller losses, -1 after larger."""
    text = "yopo-3-1:smooth=0.03:gradient=full"
    trainer = Trainer(TrainConfig(method=text), dataset=few_digits, shown=False)
    learner, batch = trainer.learner, dataclasses.replace(next(trainer.source.epoch(0)), epoch=2, number=1)
    learner.progress = 0.5
    for before, weight in ((0.0, 1.0), (100.0, -1.0)):
        learner.carried["losses"] = torch.tensor([0.0, 0.0, before], dtype=torch.float64)
        inputs, gradients = [], []
        hook = learner.module.register_forward_pre_hook(lambda _, a, inputs=inputs: inputs.append(a[0].detach()))
        model = copy.deepcopy(learner.module)
        learner.update = lambda g=gradients: g.extend(p.grad.clone() for p in learner.module.parameters())
        learner.step(batch, 0, lr=0.1)
        learner.optimizer.zero_grad()
        hook.remove()
        losses = [torch.nn.functional.cross_entropy(model(u), batch.y) for u in inputs[-3:]]
        total = losses[2] + weight * (losses[0] + losses[1]) / 2
        expected = torch.autograd.grad(total, list(model.parameters()))
        torch.testing.assert_close(gradients, list(expected), rtol=1e-4, atol=1e-6)


def test_alignment_is_the_agreement_of_the_last_two_gradients_signs(few_digits):
    learner, model, batch, inputs, outcome = recorded_step(few_digits, "yopo-2-1:train-on=last:step-size=0.15")
    signs = []
    for u in inputs[-2:]:
        u = u.requires_grad_()
        signs.append(torch.autograd.grad(torch.nn.functional.cross_entropy(model(u), batch.y), u)[0].sign())
    cosine = (signs[0] * signs[1]).mean()
    assert outcome.alignment.item() == pytest.approx(cosine.item(), abs=0.02)
    assert learner.method.watches_inputs
