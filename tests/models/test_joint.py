"""Calls without ceremony and joint products: the same outputs, one copy of the weights, no hook or adapter missed."""

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from emu_embodied.models.joint import JointLinear, cheapest


class Pair(JointLinear):
    joint_names = ("one", "two")

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(6, 4, bias=False)
        self.two = nn.Linear(6, 3, bias=False)
        self.join()

    def look_up(self):
        joint = self.joint()
        return (self._apart if joint is None else partial(F.linear, weight=joint),)

    def _apart(self, x):
        return torch.cat([self.one(x), self.two(x)], -1)

    def forward(self, x):
        (project,) = self.bind() if self.calls is None or torch.is_grad_enabled() else self.calls
        return project(x)


class Doubled(nn.Linear):
    """An adapter: it has a weight, and does more than multiply by it."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.fixture
def pair() -> Pair:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Pair()


X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


def apart(pair: Pair) -> torch.Tensor:
    return F.linear(X, torch.cat([pair.one.weight.detach(), pair.two.weight.detach()]))


def check(pair: Pair, joined: bool = True) -> None:
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            pair.bind()
            torch.testing.assert_close(pair(X), apart(pair))
            assert (pair.joint() is not None) == joined
    places = {weight.untyped_storage().data_ptr() for weight in (pair.one.weight, pair.two.weight)}
    assert (len(places) == 1) == joined


def test_outputs_gradients_and_memory(pair):
    check(pair)
    state = pair.state_dict()
    assert list(state) == ["one.weight", "two.weight"]
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    assert sum(held.values()) == 4 * 6 * (4 + 3)  # no weight exists twice
    pair(X).sum().backward()  # bound without gradients, called with them
    assert pair.one.weight.grad.shape == (4, 6) and pair.one.weight.grad.any() and pair.two.weight.grad.any()


@pytest.mark.parametrize(
    "change, joined",
    [
        (lambda pair: torch.optim.SGD(pair.parameters(), lr=0.1).step(), True),
        (lambda pair: pair.load_state_dict({name: w + 1 for name, w in pair.state_dict().items()}), True),
        (lambda pair: pair.load_state_dict({name: w + 1 for name, w in pair.state_dict().items()}, assign=True), False),
        (lambda pair: pair.to(torch.float64).to(torch.float32), True),
        (lambda pair: setattr(pair, "one", nn.Linear(6, 4, bias=False)), False),
        (lambda pair: setattr(pair.two.weight, "data", torch.ones(3, 6)), False),
    ],
)
def test_changed_weights_are_seen(pair, change, joined):
    check(pair)
    pair(X).sum().backward()
    change(pair)
    check(pair, joined)
    pair.join()
    check(pair)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_is_independent_and_joined(pair, duplicate):
    check(pair)
    other = duplicate(pair)
    assert other.calls is None
    with torch.no_grad():
        other.one.weight.zero_()
    check(other)
    assert pair.one.weight.any()


def test_weights_that_are_joined_already_stay_where_they_are(pair):
    pair.share_memory()
    place = pair.one.weight.data_ptr()
    pair.join()
    assert pair.one.weight.data_ptr() == place and pair.two.weight.is_shared()
    twin = Pair()
    twin.load_state_dict(pair.state_dict(), assign=True)
    twin.join()
    assert twin.one.weight.data_ptr() == place
    check(twin)


def test_moved_weights_leave_no_memory_behind(pair):
    check(pair)
    pair.to("meta")
    assert pair.calls is None
    with torch.no_grad():
        assert pair(X.to("meta")).shape == (2, 5, 7)


def test_what_hooks_and_adapters_do_counts(pair):
    plus_one = apart(pair) + torch.tensor([1.0] * 4 + [0.0] * 3)
    doubled = apart(pair) * torch.tensor([2.0] * 4 + [1.0] * 3)
    plain = pair.one
    with torch.no_grad():
        handle = plain.register_forward_hook(lambda module, args, output: output + 1)
        pair.bind()
        torch.testing.assert_close(pair(X), plus_one)
        assert cheapest(plain) is plain
        handle.remove()
        check(pair)
        pair.one = adapter = Doubled(6, 4, bias=False)
        adapter.weight = plain.weight
        pair.bind()
        torch.testing.assert_close(pair(X), doubled)
        assert cheapest(adapter) is adapter
        pair.one = plain
        plain.forward = adapter.forward  # as accelerate does
        pair.bind()
        torch.testing.assert_close(pair(X), doubled)


def test_weights_can_be_trained_after_inference(pair):
    with torch.inference_mode():
        pair.join()
        pair.bind()
        pair(X)
    pair(X).sum().backward()
    torch.optim.SGD(pair.parameters(), lr=0.1).step()
    check(pair)
