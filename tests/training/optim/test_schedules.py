import pytest
import torch

from yopo_ext.training.optim.schedules import SCHEDULES, make_schedule


def test_shapes():
    triangular, cosine, constant = (make_schedule(name) for name in ("triangular", "cosine", "constant"))
    piecewise = make_schedule("piecewise", (0.5, 0.75))
    assert [triangular(p) for p in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]
    assert [cosine(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [piecewise(p) for p in (0, 0.49, 0.5, 0.75)] == pytest.approx([1, 1, 0.1, 0.01])
    assert constant(0.3) == 1


def test_one_cycle_is_pytorchs():
    weights = [torch.nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=101)
    ours = make_schedule("one-cycle")
    for step in range(101):
        # Its two parts meet at step 29.3 of 100; ours at 30.
        assert ours(step / 100) == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.03)
        optimizer.step()
        theirs.step() if step < 100 else None
    assert [ours(p) for p in (0, 0.3, 1)] == pytest.approx([0.04, 1, 0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_rises_from_zero_and_ends(name):
    milestones = (0.5, 0.8) if name == "piecewise" else ()
    plain, warmed = make_schedule(name, milestones), make_schedule(name, milestones, warmup=0.2)
    assert warmed(0) == 0
    assert warmed(0.1) == pytest.approx(0.5 * plain(0.1))
    assert warmed(0.6) == plain(0.6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear",), "schedule must be one of triangular"),
        (("piecewise", (0.7, 0.5)), "milestones must be increasing"),
        (("piecewise", (1.5,)), "milestones must be increasing fractions"),
        (("cosine", (), 1.0), "warmup must be a fraction"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)
