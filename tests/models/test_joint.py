"""Linear maps computed together: the same outputs, one copy of the weights, and nothing that hooks or adapters miss."""

import copy

import pytest
import torch
from torch import nn

from emu_embodied.models.joint import JointLinear, linear


class Pair(JointLinear):
    joint_names = ("one", "two")

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 4, bias=False)
        self.two = nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.project(x)


class Doubled(nn.Linear):
    """An adapter: it has a weight, and does more than multiply by it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.fixture
def pair() -> Pair:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pair()


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


def apart(pair: Pair, x: torch.Tensor = X) -> list[torch.Tensor]:
    return [nn.functional.linear(x, pair.one.weight.detach()), nn.functional.linear(x, pair.two.weight.detach())]


def check(pair: Pair, joined: bool) -> None:
    expected = apart(pair)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close([*pair(X)], expected)
    assert (pair._joint is not None) == joined
    same = pair.one.weight.untyped_storage().data_ptr() == pair.two.weight.untyped_storage().data_ptr()
    assert same == joined


def test_outputs_gradients_and_memory(pair):
    expected = apart(pair)
    torch.testing.assert_close([*pair(X)], expected)  # with gradients nothing moves
    assert pair._joint is None
    check(pair, joined=True)
    state = pair.state_dict()
    assert list(state) == ["one.weight", "two.weight"]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    assert sum(held.values()) == 4 * 6 * (4 + 3)  # no weight exists twice
    torch.testing.assert_close([*pair(X)], expected)
    sum(part.sum() for part in pair(X)).backward()
    assert pair.one.weight.grad.shape == (4, 6) and pair.two.weight.grad.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda pair: torch.optim.SGD(pair.parameters(), lr=0.1).step(),
        lambda pair: pair.load_state_dict({name: w + 1 for name, w in pair.state_dict().items()}),
        lambda pair: pair.load_state_dict({name: w + 1 for name, w in pair.state_dict().items()}, assign=True),
        lambda pair: pair.to(torch.float64).to(torch.float32),
        lambda pair: setattr(pair, "one", nn.Linear(6, 4, bias=False)),
        lambda pair: setattr(pair.two.weight, "data", torch.ones(3, 6)),
    ],
)
def test_changed_weights_are_seen(pair, change):
    check(pair, joined=True)
    sum(part.sum() for part in pair(X)).backward()
    change(pair)
    check(pair, joined=True)


def test_a_copy_is_independent(pair):
    check(pair, joined=True)
    other = copy.deepcopy(pair)
    with torch.no_grad():
        other.one.weight.zero_()
    check(other, joined=True)
    assert pair.one.weight.any()


def test_moved_weights_leave_no_memory_behind(pair):
    check(pair, joined=True)
    pair.to(torch.float64)
    assert pair._joint is None


def test_what_hooks_and_adapters_do_counts(pair):
    check(pair, joined=True)
    handle = pair.one.register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad():
        torch.testing.assert_close(pair(X)[0], apart(pair)[0] + 1)
        torch.testing.assert_close(linear(pair.one, X), apart(pair)[0] + 1)
        handle.remove()
        torch.testing.assert_close(pair(X)[0], apart(pair)[0])
        doubled = Doubled(6, 4, bias=False)
        doubled.weight = pair.one.weight
        pair.one = doubled
        torch.testing.assert_close([*pair(X)], [2 * apart(pair)[0], apart(pair)[1]])
        torch.testing.assert_close(linear(pair.one, X), 2 * apart(pair)[0])
        calls = []
        pair.register_forward_pre_hook(lambda *_: calls.append(1))
        pair(X)
        assert calls == [1]


def test_weights_can_be_trained_after_inference(pair):
    with torch.inference_mode():
        pair(X)
    sum(part.sum() for part in pair(X)).backward()
    torch.optim.SGD(pair.parameters(), lr=0.1).step()
    check(pair, joined=True)
