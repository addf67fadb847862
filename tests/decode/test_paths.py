"""Noise processes: where they begin and end, and that a step leads from one marginal to the next."""

from itertools import pairwise

import pytest
import torch

from emu_embodied.decode.paths import PATHS, UniformPath
from emu_embodied.decode.sampling import sample

SIZE, COUNT = 5, 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(share: float, expected: float) -> bool:
    """Within 4.5 standard deviations of a share of COUNT draws."""
    return abs(share - expected) < 4.5 * (max(expected * (1 - expected), 1e-4) / COUNT) ** 0.5


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_path_ends_at_the_data_and_is_a_function_of_the_generator(path):
    x1 = torch.randint(SIZE, (3, 7), generator=generator())
    assert path.name in PATHS
    source = path.source((3, 7), SIZE, generator())
    assert source.dtype == torch.int64 and 0 <= int(source.min()) <= int(source.max()) < SIZE
    assert torch.equal(path.noise(x1, SIZE, torch.ones(3, 1), generator()), x1)
    assert torch.equal(path.step(source, x1, SIZE, 0.75, 1.0, generator()), x1)
    noisy = path.noise(x1, SIZE, torch.full((3, 1), 0.5), generator(1))
    assert torch.equal(noisy, path.noise(x1, SIZE, torch.full((3, 1), 0.5), generator(1)))
    assert not torch.equal(noisy, path.noise(x1, SIZE, torch.full((3, 1), 0.5), generator(2)))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_uniform_marginals(t):
    x1 = torch.full((COUNT,), 2)
    x_t = UniformPath().noise(x1, SIZE, torch.tensor(t), generator())
    for value in range(SIZE):
        expected = t * (value == 2) + (1 - t) / SIZE
        assert near(float((x_t == value).float().mean()), expected)


def test_uniform_noise_only_lessens_as_t_grows():
    x1 = torch.randint(SIZE, (COUNT,), generator=generator())
    kept = [UniformPath().noise(x1, SIZE, torch.tensor(t), generator(1)) == x1 for t in (0.0, 0.2, 0.5, 0.8, 1.0)]
    for less, more in pairwise(kept):
        assert bool((more | ~less).all()) and int(more.sum()) > int(less.sum())


def test_uniform_noise_has_one_t_for_each_row():
    x1 = torch.ones(2, COUNT, dtype=torch.long)
    x_t = UniformPath().noise(x1, SIZE, torch.tensor([[0.0], [0.8]]), generator())
    assert near(float((x_t[0] == 1).float().mean()), 1 / SIZE)
    assert near(float((x_t[1] == 1).float().mean()), 0.8 + 0.2 / SIZE)


@pytest.mark.parametrize(("t", "t_next"), [(0.0, 0.25), (0.25, 0.5), (0.5, 0.9)])
def test_a_uniform_step_leads_to_the_next_marginal(t, t_next):
    path, x1 = UniformPath(), torch.full((1, COUNT), 3)
    x_t = path.noise(x1, SIZE, torch.tensor(t), generator())
    x_next = path.step(x_t, x1, SIZE, t, t_next, generator(1))
    assert near(float((x_next == 3).float().mean()), t_next + (1 - t_next) / SIZE)
    assert bool(((x_next == x_t) | (x_next == x1)).all())


def test_a_step_is_the_same_for_all_candidates():
    x_t = torch.zeros(3, 50, dtype=torch.long)
    stepped = UniformPath().step(x_t, torch.ones(3, 50, dtype=torch.long), SIZE, 0.0, 0.5, generator())
    assert torch.equal(stepped, stepped[:1].expand(3, -1)) and 0 < int(stepped[0].sum()) < 50


def test_samples_follow_the_softmax_and_the_generator():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf]).expand(COUNT, -1)
    for temperature in (0.5, 1.0, 3.0):
        drawn = sample(logits, temperature, generator())
        for value, share in enumerate(torch.softmax(logits[0] / temperature, -1).tolist()):
            assert near(float((drawn == value).float().mean()), share)
        assert torch.equal(drawn, sample(logits, temperature, generator()))
    assert bool((sample(logits, 0.0, None) == 2).all())


def test_sampling_without_a_generator_or_below_zero_is_refused():
    with pytest.raises(ValueError, match="needs a seeded generator"):
        sample(torch.zeros(3), 1.0, None)
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        sample(torch.zeros(3), -1.0, generator())
