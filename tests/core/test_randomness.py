"""Draws depend on the sample and nothing else; seeds are the same on every machine."""

import pytest
import torch

from robustbench_x.randomness import SampleRandom, derive_seed


def test_seeds_are_the_same_on_every_machine() -> None:
    assert derive_seed(0, "pgd", "img1") == 4122671864752959912
    assert derive_seed("0", "pgd", "img1") == derive_seed(0, "pgd", "img1")


def test_seeds_differ_where_the_parts_differ_and_fit_torch() -> None:
    seeds = {derive_seed(a, b) for a in range(30) for b in range(30)} | {derive_seed("a", "bc"), derive_seed("ab", "c")}
    assert len(seeds) == 902
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize("kind", ["uniform", "normal", "signs"])
def test_a_draw_does_not_hang_on_the_batch(kind: str) -> None:
    seeds = [derive_seed(i) for i in range(6)]
    together = getattr(SampleRandom(seeds), kind)((3, 4))
    alone = torch.cat([getattr(SampleRandom([seed]), kind)((3, 4)) for seed in seeds])
    assert together.shape == (6, 3, 4)
    assert torch.equal(together, alone)


def test_who_leaves_the_batch_does_not_change_the_others() -> None:
    seeds = [derive_seed(i) for i in range(5)]
    whole, part = SampleRandom(seeds), SampleRandom(seeds)
    first = whole.uniform((2,)), part.uniform((2,))
    assert torch.equal(*first)
    index = torch.tensor([3, 1])
    assert torch.equal(part.normal((2,), index), whole.normal((2,))[index])
    assert part.uniform((2,), torch.tensor([], dtype=torch.long)).shape == (0, 2)


def test_draws_are_distributed_as_they_are_called() -> None:
    random = SampleRandom([derive_seed("distribution")])
    uniform, normal, signs = (draw((20000,)) for draw in (random.uniform, random.normal, random.signs))
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(normal.mean()) == pytest.approx(0, abs=0.03)
    assert float(normal.std()) == pytest.approx(1, abs=0.03)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert float(signs.mean()) == pytest.approx(0, abs=0.03)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    random = SampleRandom([1, 2])
    random.uniform((4,))
    random.signs((4,))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.seed == SampleRandom([1, 2]).seed != SampleRandom([2, 1]).seed
