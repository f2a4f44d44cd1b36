import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yopo_ext.training.data.augment import Augmentation, Placement
from yopo_ext.training.data.batches import Batch, PerSample, SplitSource
from yopo_ext.training.data.datasets import load_dataset
from yopo_ext.training.data.splits import Split, stratified_split
from yopo_ext.training.run.seeds import mix_seed


def test_digits_splits_are_disjoint_stratified_and_fixed(digits):
    again = load_dataset("digits")
    parts = {name: getattr(digits, name) for name in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [1167, 180, 450]
    for name, part in parts.items():
        assert torch.equal(part.images, getattr(again, name).images)
        share = torch.bincount(part.labels, minlength=10) / len(part)
        assert ((share > 0.08) & (share < 0.12)).all()
        assert part.x().min() == 0.0
        assert part.x().max() == 1.0
    # No image of digits occurs twice, so that disjoint positions are disjoint images.
    images = torch.cat([part.images.flatten(1) for part in parts.values()])
    assert len(images.unique(dim=0)) == 1797


@given(st.lists(st.integers(0, 3), min_size=40, max_size=80), st.integers(4, 20))
@settings(deadline=None)
def test_stratified_split_partitions(labels, held_out):
    labels = torch.tensor(labels + [0, 1, 2, 3] * 3)
    rest, out = stratified_split(labels, held_out)
    assert len(out) == held_out
    assert torch.equal(torch.cat([rest, out]).sort().values, torch.arange(len(labels)))


def ramp(count, height=3, width=4):
    images = torch.arange(count * height * width, dtype=torch.int64).view(count, 1, height, width) % 256
    return Split(images.to(torch.uint8), torch.arange(count) % 10, 255)


def test_pixels_are_those_of_to_tensor():
    """Divided, not multiplied by a rounded reciprocal: 126 of the 256 values would differ in the last bit."""
    images = torch.arange(256).to(torch.uint8).view(-1, 1, 1, 1)
    expected = torch.from_numpy(images.numpy().astype("float32") / 255)
    assert torch.equal(Split(images, torch.zeros(256, dtype=torch.int64), 255).x(), expected)


def test_an_epoch_shows_each_sample_once_and_can_start_anywhere():
    source = SplitSource(ramp(20), 6, seed=3, augmentation=Augmentation(1))
    assert source.batches == 3
    whole = list(source.epoch(1))
    assert len(torch.cat([b.index for b in whole]).unique()) == 18
    for batch in whole:
        assert torch.equal(batch.y, ramp(20).labels[batch.index])
        assert torch.equal(batch.x, batch.placement.apply(ramp(20).x(batch.index)))
    resumed = list(source.epoch(1, start=2))
    assert len(resumed) == 1
    assert torch.equal(resumed[0].x, whole[2].x)
    other = next(source.epoch(2))
    assert not torch.equal(other.index, whole[0].index)


def test_processes_share_the_samples():
    sources = [SplitSource(ramp(21), 5, seed=0, rank=r, world=2) for r in (0, 1)]
    seen = [torch.cat([b.index for b in s.epoch(e)]) for s in sources for e in (0, 1)]
    assert torch.equal(seen[0].sort().values, seen[1].sort().values)  # a process keeps its share
    assert not set(seen[0].tolist()) & set(seen[2].tolist())


def test_batch_size_must_fit():
    with pytest.raises(ValueError, match="batch_size must be between 1 and the 20 training samples"):
        SplitSource(ramp(20), 21, seed=0)


def test_seeds_do_not_collide():
    seeds = {mix_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_placement_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])

    def place(top, left, mirrored):
        return Placement(1, torch.tensor([top]), torch.tensor([left]), torch.tensor([mirrored])).apply(x)[0, 0].tolist()

    assert place(1, 1, False) == [[1, 2], [3, 4]]
    assert place(0, 1, False) == [[0, 0], [1, 2]]
    assert place(1, 2, False) == [[2, 0], [4, 0]]
    assert place(1, 1, True) == [[2, 1], [4, 3]]


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(0, 3), st.booleans())
def test_undo_puts_visible_pixels_back_and_keeps_the_rest(seed, padding, mirror):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 2, 5, 4, generator=generator)
    placement = Augmentation(padding, mirror).draw(6, generator, torch.device("cpu"))
    moved = placement.apply(x)
    assert torch.equal(placement.undo(moved, x), x)
    onto = torch.full_like(x, 7.0)
    back = placement.undo(moved, onto)
    visible = placement.undo(torch.ones_like(x), torch.zeros_like(x)) == 1
    assert torch.equal(back[visible], x[visible])
    assert (back[~visible] == 7.0).all()


def test_kept_tensors_move_with_their_images():
    kept = PerSample(torch.rand(10, 1, 4, 4))
    before = kept.values.clone()
    index = torch.tensor([7, 2])
    placement = Placement(1, torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([True, False]))
    batch = Batch(torch.zeros(2, 1, 4, 4), torch.zeros(2), index, placement)
    seen = kept.get(batch)
    assert torch.equal(seen, placement.apply(before[index]))
    kept.put(batch, seen + 1.0)
    others = torch.tensor([i for i in range(10) if i not in (7, 2)])
    assert torch.equal(kept.values[others], before[others])
    torch.testing.assert_close(kept.values[2], before[2] + 1.0)
    assert (kept.values[7] == before[7]).any()  # pixels that were cropped away


def test_unknown_dataset():
    with pytest.raises(ValueError, match=r"dataset must be one of .*digits.*; got 'letters'"):
        load_dataset("letters")
