import pytest

from yopo_ext.training.schedules import SCHEDULES, make_schedule


def test_shapes():
    triangular, cosine, constant = (make_schedule(name) for name in ("triangular", "cosine", "constant"))
    piecewise = make_schedule("piecewise", (0.5, 0.75))
    assert [triangular(p) for p in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.5, 0]
    assert [cosine(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert [piecewise(p) for p in (0, 0.49, 0.5, 0.75)] == pytest.approx([1, 1, 0.1, 0.01])
    assert constant(0.3) == 1


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
