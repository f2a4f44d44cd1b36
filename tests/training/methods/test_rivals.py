"""Rival methods against transcriptions of their formulas: the same perturbations and gradients over five batches.

Two batches make an epoch, so that borders of epochs are among them, and images are cropped and mirrored. Each transcription is
written from the paper's formulas with its own model, optimizer, and state per sample; it draws the same random numbers.
"""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from yopo_ext.training.config.schema import TrainConfig
from yopo_ext.training.loop.trainer import Trainer
from yopo_ext.training.methods.converge_smooth import ConvergeSmooth
from yopo_ext.training.models import MODELS, ModelEntry
from yopo_ext.training.run.seeds import mix_seed

EPOCHS, LR = 4, 0.05


class Transcription:
    """Plain SGD on a copy of the model; `attack_and_loss` sets `self.u` (the attacked images) and returns the loss."""

    def __init__(self, trainer):
        self.model = copy.deepcopy(trainer.learner.module)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
        self.eps, self.samples = trainer.config.eps, trainer.dataset.train.images.shape

    def step(self, batch, number):
        self.generator = torch.Generator().manual_seed(mix_seed(0, 0, number, 1))
        loss = self.attack_and_loss(batch.x, batch.y, batch.index, batch.epoch, batch.number)
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [p.grad.clone() for p in self.model.parameters()]
        self.optimizer.step()
        return gradients

    def input_gradient(self, u, loss_of):
        u = u.detach().requires_grad_()
        logits = self.model(u)
        (gradient,) = torch.autograd.grad(loss_of(logits), u, retain_graph=True)
        self.attack_gradient = gradient
        return logits, gradient

    def rand(self, *shape):
        return torch.rand(shape, generator=self.generator)


def soft_cross_entropy(logits, labels):
    return -(labels * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


def labels_of(y, weight, classes=10):
    labels = torch.full((len(y), classes), (1 - weight) / (classes - 1))
    labels[range(len(y)), y] = weight
    return labels


class FgsmPgi(Transcription):
    def __init__(self, trainer):
        super().__init__(trainer)
        self.reset = trainer.learner.method.reset_every

    def attack_and_loss(self, x, y, index, epoch, number):
        if number == 0 and epoch % self.reset == 0:
            seed = mix_seed(0, 2, epoch) if epoch else mix_seed(0, 2)
            draw = torch.rand(self.samples, generator=torch.Generator().manual_seed(seed))
            self.delta = self.eps * torch.sign(draw - 0.5)
            self.momentum = torch.zeros(self.samples)
        delta, labels = self.delta[index], labels_of(y, 0.6)
        first, g = self.input_gradient(x + delta, lambda logits: soft_cross_entropy(logits, labels))
        momentum = g / torch.linalg.vector_norm(g, ord=1) + 0.3 * self.momentum[index]

        def moved(direction):
            step = (delta + self.eps * direction.sign()).clamp(-self.eps, self.eps)
            return torch.minimum(torch.maximum(step, -x), 1 - x)

        self.momentum[index], self.delta[index] = momentum, moved(momentum)
        self.u = x + moved(g)
        second = self.model(self.u)
        return soft_cross_entropy(second, labels) + 10 * ((second - first) ** 2).mean()


class FgsmRsCs(Transcription):
    def __init__(self, trainer):
        super().__init__(trainer)
        self.losses, self.before, self.weights = [], 0.0, []

    def attack_and_loss(self, x, y, index, epoch, number):
        if number == 0 and self.losses:
            self.before, self.losses = sum(self.losses) / len(self.losses), []
        noisy = (x + self.eps * (2 * self.rand(*x.shape) - 1)).clamp(0, 1)
        _, g = self.input_gradient(noisy, lambda logits: soft_cross_entropy(logits, labels_of(y, 1.0)))
        self.u = (noisy + self.eps * g.sign()).clamp(0, 1)
        loss = soft_cross_entropy(self.model(self.u), labels_of(y, 0.91))  # 0.1 spread over ten classes
        at_start = soft_cross_entropy(self.model(noisy), labels_of(y, 0.91))
        self.losses.append(at_start.item())
        weight = 0
        if 2 <= epoch < EPOCHS - 1 and abs(at_start.item() - self.before) > 0.03:
            weight = 1 if at_start.item() > self.before else -1
        self.weights.append(weight)
        return loss + weight * at_start


class Liet(Transcription):
    def random_labels(self, y, classes=10):
        draw = self.rand(len(y), classes)
        draw[range(len(y)), y] = 0
        labels = 0.6 * draw / draw.sum(1, keepdim=True)
        labels[range(len(y)), y] = 0.4
        return labels

    def attack_and_loss(self, x, y, index, epoch, number):
        if number % 10 == 0:
            self.model.eval()
            grey, classes = torch.full((10, *x.shape[1:]), 0.5), torch.arange(10)
            labels = self.random_labels(classes)
            _, g = self.input_gradient(grey, lambda logits: soft_cross_entropy(logits, labels))
            self.pattern = self.eps * g.sign()
            self.model.train()
        wide = self.eps > 8 / 255
        mask, noise = self.rand(*x.shape), (2 * self.rand(*x.shape) - 1) * self.eps * (2 if wide else 1)
        share, coin = self.rand(2)
        start = self.pattern[y]
        start = torch.where(mask < 0.1 + 0.4 * share, noise, start)
        u = (x - start if coin < 0.5 else x + start).clamp(0, 1)
        labels = self.random_labels(y)
        first, g = self.input_gradient(u, lambda logits: soft_cross_entropy(logits, labels))
        u = u + self.eps * g.sign()
        self.u = u.clamp(0, 1) if wide else (x + (u - x).clamp(-self.eps, self.eps)).clamp(0, 1)
        second = self.model(self.u)
        p, q = first.softmax(1), second.softmax(1)
        middle = (p + q) / 2
        divergence = 0.5 * (p * (p / middle).log() + q * (q / middle).log()).sum(1).mean()
        return soft_cross_entropy(second, self.random_labels(y)) + 100 * (epoch + 1) / EPOCHS * divergence


@pytest.fixture
def net_with_norm(monkeypatch):
    def build(channels, classes):
        layers = [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(512, classes))

    monkeypatch.setitem(MODELS, "norm-net", ModelEntry(build, "0"))
    return "norm-net"


def test_converge_smooth_weighs_a_change_by_its_sign(few_digits):
    """Losses 1, 3 in an epoch of mean 2; then w for losses within and beyond the threshold of it."""
    trainer = Trainer(TrainConfig(method="fgsm-rs-cs"), dataset=few_digits, shown=False)
    learner, batch = trainer.learner, next(trainer.source.epoch(0))
    learner.progress = 0.5

    def weight(loss, epoch, number):
        now = dataclasses.replace(batch, epoch=epoch, number=number)
        return ConvergeSmooth(learner, now, 0.03).weight(torch.tensor(loss)).item()

    assert [weight(1.0, 1, 0), weight(3.0, 1, 1)] == [0, 0]
    assert [weight(loss, 2, n) for n, loss in enumerate((2.02, 2.04, 1.96, 1.98))] == [0, 1, -1, 0]
    assert [weight(loss, 3, n) for n, loss in enumerate((2.04, 1.96))] == [1, -1]  # the mean of epoch 2 is 2.0
    learner.progress = 1.0
    assert [weight(loss, 4, n) for n, loss in enumerate((3.0, 1.0))] == [0, 0]


RIVALS = [
    ("fgsm-pgi", FgsmPgi, 0.15),
    ("fgsm-pgi:reset-every=2", FgsmPgi, 0.15),
    ("fgsm-rs-cs", FgsmRsCs, 0.15),
    ("liet", Liet, 8 / 255),
    ("liet", Liet, 0.15),
]


@pytest.mark.parametrize(("method", "transcription", "eps"), RIVALS, ids=[f"{m}-{e:.3f}" for m, _, e in RIVALS])
def test_five_batches_follow_the_formulas(few_digits, net_with_norm, method, transcription, eps):
    config = TrainConfig(
        method=method, model=net_with_norm, eps=eps, batch_size=64, epochs=EPOCHS, augment=True, label_smoothing=0.1
    )
    trainer = Trainer(config, dataset=few_digits, shown=False)
    learner = trainer.learner
    assert trainer.source.batches == 2
    rival = transcription(trainer)
    inputs, gradients = [], []
    learner.module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach().clone()))
    update = learner.update

    def recorded_update():
        gradients.append([p.grad.clone() for p in learner.module.parameters()])
        update()

    learner.update = recorded_update
    batches = [batch for epoch in range(3) for batch in trainer.source.epoch(epoch)][:5]
    assert [batch.epoch for batch in batches] == [0, 0, 1, 1, 2]
    for number, batch in enumerate(batches):
        learner.progress = (batch.epoch + 1) / EPOCHS
        learner.step(batch, number, lr=LR)
        expected = rival.step(batch, number)
        # Where a gradient is as good as zero its sign is rounding's to choose.
        clear = rival.attack_gradient.abs() > 1e-5 * rival.attack_gradient.abs().max()
        assert clear.double().mean() > 0.99
        torch.testing.assert_close(inputs[-1][clear], rival.u[clear], rtol=0.0, atol=1e-6)
        for found, wanted in zip(gradients[-1], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * max(wanted.abs().max().item(), 1e-3))
    assert len(gradients) == 5
    if isinstance(rival, FgsmRsCs):
        assert set(rival.weights[:4]) == {0}
        assert rival.weights[4] != 0
        assert rival.before > 0.03
    if isinstance(rival, FgsmPgi):
        for name, wanted in (("momentum", rival.momentum), ("perturbation", rival.delta)):
            found = learner.kept[name].values
            assert ((found - wanted).abs() <= 1e-3 * wanted.abs().max()).double().mean() > 0.999
    assert math.isfinite(sum(g.abs().sum().item() for g in gradients[-1]))


def test_label_information_is_in_the_pattern_of_the_label(few_digits, net_with_norm):
    """The carried patterns are of the size eps everywhere, and differ between classes."""
    trainer = Trainer(TrainConfig(method="liet", model=net_with_norm), dataset=few_digits, shown=False)
    trainer.learner.step(next(trainer.source.epoch(0)), 0, lr=0.1)
    patterns = trainer.learner.carried["patterns"]
    assert patterns.shape == (10, 1, 8, 8)
    assert patterns.abs().unique().tolist() == pytest.approx([0.15])
    assert len(patterns.flatten(1).unique(dim=0)) == 10
