"""Seeding and refining codes: rare directions get codes, and the error falls."""

import pytest
import torch
import torch.nn.functional as F

from emu_embodied.models.kmeans import far_apart, refine, to_directions


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def crowd(num=2000, rare=8):
    """Most vectors close to one direction, a few along others."""
    plain = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]) + 0.005 * torch.randn(num, 8, generator=seeded(1))
    return F.normalize(torch.cat([plain, torch.randn(rare, 8, generator=seeded(2))]), dim=1)


def error(codes, directions):
    return (2 - 2 * (directions @ codes.T).amax(1)).mean()


def test_rare_directions_get_codes():
    directions = crowd()
    codes = far_apart(directions, 16, seeded())
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(16))
    assert (directions[-8:] @ codes.T).amax(1).min() > 0.95
    random = directions[torch.randperm(len(directions), generator=seeded())[:16]]
    assert (directions[-8:] @ random.T).amax(1).min() < 0.5


def test_taken_directions_are_avoided():
    directions = crowd()
    codes = far_apart(directions, 8, seeded(), taken=directions[:1])
    assert (codes @ directions[0]).median() < 0.9


def test_refining_lowers_the_error_and_keeps_idle_codes():
    directions = F.normalize(torch.randn(500, 4, generator=seeded()), dim=1)
    directions[:, 0] = directions[:, 0].abs()
    directions = F.normalize(directions, dim=1)
    idle = torch.tensor([[-1.0, 0, 0, 0]])
    start = torch.cat([far_apart(directions, 20, seeded(3)), idle])
    errors = [error(refine(start, directions, passes), directions) for passes in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]
    assert torch.equal(refine(start, directions)[-1:], idle)


@pytest.mark.parametrize("count", [3, 40])
def test_more_codes_than_vectors(count):
    directions = F.normalize(torch.randn(5, 4, generator=seeded()), dim=1)
    codes = far_apart(directions, count, seeded())
    assert codes.shape == (count, 4) and len(torch.unique(codes, dim=0)) == count
    assert torch.equal(codes, far_apart(directions, count, seeded()))


def test_directions_are_thinned():
    rows = to_directions(torch.randn(10, 10, 3, generator=seeded()), seeded(), most=30)
    assert rows.shape == (30, 3)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(30))
