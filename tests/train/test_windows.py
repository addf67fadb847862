"""The stream that is trained is the stream that is decoded: windows and noisy copies against the decoders' own."""

from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from emu_embodied.data.batches import encode_dataset
from emu_embodied.decode.autoregressive import SequentialDecoder
from emu_embodied.decode.dida import ParallelDecoder
from emu_embodied.decode.grammar import StateLogits, state_logits
from emu_embodied.decode.paths import PATHS, StatePath
from emu_embodied.models.masks import NoisyCopies
from emu_embodied.tokens.sequence import MASKED, StateTokens
from emu_embodied.train import noise
from emu_embodied.train.noise import draw_copies, noisy_logits, sample_times
from emu_embodied.train.windows import action_loss, clean_logits, window_tokens
from tests import tiny

STATES = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    return tiny.make_world(context_states=3)


@pytest.fixture(scope="module")
def batch(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    tokens = encode_dataset(tiny.make_store(folder / "data"), world.frames, tiny.CAMERAS, folder / "codes.safetensors")
    texts = torch.stack([world.layout.text_ids(world.text.encode(text)) for text in tokens.instructions])
    return tokens.sample(3, STATES, texts, generator())


def one(logits: StateLogits, row: int, t: int) -> StateLogits:
    """The logits of one window's state."""
    place = row * (STATES - 1) + t - 1
    return StateLogits(*(getattr(logits, field.name)[place : place + 1] for field in fields(StateLogits)))


def assert_same(found: StateLogits, expected: StateLogits) -> None:
    for field in fields(StateLogits):
        torch.testing.assert_close(getattr(found, field.name), getattr(expected, field.name), atol=2e-5, rtol=1e-4)


def noisy(world, window, times, seed=1, name="uniform"):
    """Both views of a window whose copies are drawn at the given times."""
    return noisy_logits(world, window, draw_copies([world.path(name)], window, times, generator(seed)))


def history(world, batch, row: int, upto: int) -> torch.Tensor:
    """The stream of a window's first states as ``observe`` writes it, ending with the action after them."""
    ids = world.layout.state_ids(batch.codes_BTN[row], world.proprio.encode(batch.proprio_BTP[row]))
    pieces = [world.backbone.embed(batch.text_BL[row : row + 1])]
    condition = None
    for t in range(upto):
        state = world.backbone.embed(ids[t : t + 1])
        pieces.append(state if condition is None else state + condition[:, None])
        action_embeds, condition = world._act(batch.actions_BTKA[row, t : t + 1])
        pieces.append(action_embeds)
    return torch.cat(pieces, 1)


@torch.no_grad()
def test_a_window_is_embedded_as_it_is_observed(world, batch):
    window = window_tokens(world, batch, 0.0, generator())
    assert window.embeds_BLD.shape[1] == world.layout.length(STATES)
    for row in range(3):
        stream = history(world, batch, row, STATES - 1)
        torch.testing.assert_close(window.embeds_BLD[row : row + 1, : stream.shape[1]], stream)
    # Targets are the states after the first, window by window.
    codes = batch.codes_BTN[:, 1:].flatten(0, 1)
    assert torch.equal(window.targets.codes_MN, codes)
    assert torch.equal(window.targets.changed_MN, codes != batch.codes_BTN[:, :-1].flatten(0, 1))
    assert torch.equal(window.targets.reward_M, world.reward.encode(batch.reward_BT[:, 1:]).flatten())
    assert torch.equal(window.targets.success_M.bool(), batch.success_BT[:, 1:].flatten())


@torch.no_grad()
def test_context_noise_disturbs_what_is_read_and_not_what_is_asked(world, batch):
    quiet = window_tokens(world, batch, 0.0, generator())
    loud = window_tokens(world, batch, 1.0, generator())
    assert torch.equal(quiet.targets.codes_MN, loud.targets.codes_MN)
    differs = (quiet.embeds_BLD != loud.embeds_BLD).any(-1)
    _, states, actions = world.layout.parse(differs)
    slots = world.layout.frame_slots
    assert bool(states[:, :, slots].any()) and not bool(actions.any())
    assert not bool(differs[:, : world.layout.text_tokens].any()) and not bool(states[:, :, slots[-1] + 1 :].any())


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("t", [1, STATES - 1])
@pytest.mark.parametrize("name", PATHS)
def test_noisy_copies_are_trained_as_the_parallel_decoder_reads_them(world, batch, row, t, name):
    window = window_tokens(world, batch, 0.0, generator())
    noisy = draw_copies([world.path(name)], window, torch.full((3, STATES - 1), 0.4), generator(1))
    trained = noisy_logits(world, window, noisy).noisy
    stream = history(world, batch, row, t)
    condition = world._act(batch.actions_BTKA[row, t - 1 : t])[1]
    told = world.layout.text_tokens
    cache = world._prefix(stream[:, :told])
    v = world.layout.vocabulary
    given = StatePath(
        "given", Given(noisy.codes[row, t - 1], v.vision.size), Given(noisy.proprio[row, t - 1], v.state.size)
    )
    decoder = ParallelDecoder(world.backbone, world.layout, given)
    current = StateTokens(batch.codes_BTN[row, t - 1 : t], world.proprio.encode(batch.proprio_BTP[row, t - 1 : t]))
    decoded = decoder.decode(world._branches(1, cache), stream[:, told:], condition, current, None)
    assert_same(decoded.logits, one(trained, row, t))


class Given:
    """A process that starts from given tokens."""

    def __init__(self, tokens, size):
        self.tokens, self.size = tokens[None], size

    def source(self, current, draws):
        return self.tokens

    def step(self, tokens, predicted, t, t_next, draws):
        return predicted


@torch.no_grad()
def test_the_clean_stream_is_trained_as_the_sequential_decoder_reads_it(world, batch):
    row, t = 1, 2
    stream = history(world, batch, row, t)
    condition = world._act(batch.actions_BTKA[row, t - 1 : t])[1]
    told = world.layout.text_tokens
    cache = world._prefix(stream[:, :told])
    decoder = SequentialDecoder(world.backbone, world.layout)
    current = StateTokens(batch.codes_BTN[row, t - 1 : t], world.proprio.encode(batch.proprio_BTP[row, t - 1 : t]))
    decoded = decoder.decode(world._branches(1, cache), stream[:, told:], condition, current, None)
    codes, proprio = batch.codes_BTN.clone(), batch.proprio_BTP.clone()
    codes[row, t], proprio[row, t] = decoded.codes_SN[0], world.proprio.decode(decoded.proprio_SP[0])
    window = window_tokens(world, replace(batch, codes_BTN=codes, proprio_BTP=proprio), 0.0, generator())
    hidden = world.backbone.core(window.embeds_BLD, torch.arange(world.layout.length(STATES)))
    trained = clean_logits(world.backbone, world.layout, hidden, window)
    assert_same(decoded.logits, one(trained, row, t))


@torch.no_grad()
def test_noisy_copies_equal_the_dense_mask(world, batch, monkeypatch):
    window = window_tokens(world, batch, 0.5, generator())
    times = sample_times((3, STATES - 1), 3.0, 0.5, generator())
    found = noisy(world, window, times)
    core = world.backbone.core
    seen = {}

    def dense(embeds, positions, mask):
        assert isinstance(mask, NoisyCopies)
        seen["positions"], seen["mask"] = positions, mask.dense()
        return core(embeds, positions, seen["mask"])

    monkeypatch.setattr(world.backbone, "core", dense)
    expected = noisy(world, window, times)
    assert_same(found.noisy, expected.noisy)
    assert_same(found.clean, expected.clean)
    # Emu3.5, figure 9: a copy has its original's positions, and sees what came before it and itself, nothing else.
    layout, length = world.layout, world.layout.length(STATES)
    for copy in range(STATES - 1):
        own = slice(length + copy * layout.state_tokens, length + (copy + 1) * layout.state_tokens)
        start = layout.state_offset(copy + 1)
        assert seen["positions"][own].tolist() == list(range(start, start + layout.state_tokens))
        visible = torch.zeros(len(seen["mask"]), dtype=torch.bool)
        visible[:start], visible[own] = True, True
        assert bool((seen["mask"][own] == visible).all())
    assert torch.equal(seen["mask"][:length, :length], torch.ones(length, length, dtype=torch.bool).tril())
    assert not bool(seen["mask"][:length, length:].any())


@torch.no_grad()
def test_the_clean_stream_does_not_see_its_copies(world, batch):
    window = window_tokens(world, batch, 0.0, generator())
    views = [noisy(world, window, torch.zeros(3, STATES - 1), seed) for seed in (1, 2)]
    assert_same(views[0].clean, views[1].clean)
    assert not torch.allclose(views[0].noisy.frame, views[1].noisy.frame, atol=1e-3)
    hidden = world.backbone.core(window.embeds_BLD, torch.arange(world.layout.length(STATES)))
    assert_same(views[0].clean, clean_logits(world.backbone, world.layout, hidden, window))


@torch.no_grad()
def test_a_copy_does_not_see_its_original(world, batch):
    window = window_tokens(world, batch, 0.0, generator())
    _, states, _ = world.layout.parse(torch.zeros(1, world.layout.length(STATES)))
    states[:, -1] = 1.0  # the last state, which only its own copy could leak from
    zeros = torch.zeros(1, STATES - 1, world.layout.action_tokens)
    last = world.layout.interleave(torch.zeros(1, world.layout.text_tokens), states, zeros)
    blank = replace(window, embeds_BLD=window.embeds_BLD + 9 * last[..., None])
    views = [noisy(world, view, torch.zeros(3, STATES - 1)) for view in (window, blank)]
    assert_same(views[0].noisy, views[1].noisy)
    assert not torch.allclose(views[0].clean.frame, views[1].clean.frame, atol=1e-3)


@torch.no_grad()
def test_copies_at_the_end_of_time_are_the_data(world, batch, monkeypatch):
    read = []
    embed = world.backbone.embed
    monkeypatch.setattr(world.backbone, "embed", lambda ids: read.append(ids) or embed(ids))
    window = window_tokens(world, batch, 0.0, generator())
    noisy(world, window, torch.ones(3, STATES - 1))
    codes, proprio = world.layout.parse_state(read[-1])
    assert torch.equal(codes.flatten(0, 1), window.targets.codes_MN)
    assert torch.equal(proprio.flatten(0, 1), window.targets.proprio_MP)


def test_times_follow_the_shifted_law():
    times = sample_times((20_000,), 3.0, 0.25, generator())
    assert 0 <= float(times.min()) <= float(times.max()) <= 1
    assert float((times == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    s = torch.linspace(0, 1, 20_001)
    law = (1 - 3 * s / (1 + 2 * s)).mean()
    assert float(times[times > 0].mean()) == pytest.approx(float(law), abs=0.01)
    flat = sample_times((20_000,), 1.0, 0.0, generator())
    assert float(flat.mean()) == pytest.approx(0.5, abs=0.01)
    assert noise.sample_times((2, 3), 3.0, 1.0, generator()).tolist() == [[0.0] * 3] * 2


@torch.no_grad()
def test_actions_are_predicted_where_the_policy_would_emit_them(world, batch):
    window = window_tokens(world, batch, 0.0, generator())
    layout, v = world.layout, world.layout.vocabulary
    hidden = world.backbone.core(window.embeds_BLD, torch.arange(layout.length(STATES)))
    logits = world.backbone.lm_head(hidden)[..., v.action.start : v.action.stop]
    nll = torch.zeros(3)
    for t in range(STATES - 1):
        for a in range(tiny.ACTIONS):
            place = layout.action_offset(t) + a  # boa predicts the first dimension
            nll += F.cross_entropy(logits[:, place], window.action_bins_BTA[:, t, a], reduction="none")
    nll /= (STATES - 1) * tiny.ACTIONS
    for imitate in ([1, 1, 1], [0, 1, 0], [0, 0, 0]):
        wanted = torch.tensor(imitate, dtype=torch.bool)
        expected = nll[wanted].mean() if wanted.any() else torch.tensor(0.0)
        torch.testing.assert_close(action_loss(world.backbone, layout, hidden, window, wanted), expected)


@torch.no_grad()
def test_every_logit_depends_on_the_action_that_leads_to_its_state(world, batch):
    turned = batch.actions_BTKA.clone()
    turned[:, 1] *= -1
    windows = [
        window_tokens(world, replace(batch, actions_BTKA=a), 0.0, generator()) for a in (batch.actions_BTKA, turned)
    ]
    first, second = (noisy(world, w, torch.zeros(3, STATES - 1)).noisy.frame for w in windows)
    first, second = (logits.unflatten(0, (3, STATES - 1)) for logits in (first, second))
    torch.testing.assert_close(first[:, 0], second[:, 0])  # the state before it
    assert bool(((first - second).abs().amax(-1)[:, 1] > 1e-4).all())


def test_readouts_of_a_state_are_its_own(world):
    hidden = torch.randn(2, world.layout.state_tokens, world.backbone.config.hidden_size, generator=generator())
    before = torch.zeros(2, world.layout.num_proprio, dtype=torch.long)
    found = state_logits(world.backbone, world.layout, hidden, before)
    logits = world.backbone.lm_head(hidden)
    v = world.layout.vocabulary
    boi, first_code = 0, v.vision
    torch.testing.assert_close(found.frame[:, 0], logits[:, boi, first_code.start : first_code.stop])
    torch.testing.assert_close(found.success, logits[:, world.layout.reward_slot, v.success.start : v.success.stop])


def test_every_copy_draws_its_path_and_its_time(world, batch):
    window = window_tokens(world, batch, 0.0, generator())
    shape = (3, STATES - 1)
    wide = replace(
        window,
        before=StateTokens(window.before.codes.repeat(40, 1, 1), window.before.proprio.repeat(40, 1, 1)),
        targets=replace(
            window.targets,
            codes_MN=window.targets.codes_MN.repeat(40, 1),
            proprio_MP=window.targets.proprio_MP.repeat(40, 1),
        ),
    )
    paths = [world.path(name) for name in ("mask", "state_coupled")]
    zeros = torch.zeros(120, STATES - 1)
    drawn = draw_copies(paths, wide, zeros, generator())
    masked = (drawn.codes == MASKED).all(-1)
    assert torch.equal(masked, (drawn.proprio == MASKED).all(-1)) and bool(((drawn.codes >= 0).all(-1) | masked).all())
    assert 0.4 < float(masked.float().mean()) < 0.6 and bool(masked.any(0).all())
    pure = ~masked & (drawn.codes == wide.before.codes).all(-1)
    assert 0.4 < float(pure.sum() / (~masked).sum()) < 0.75
    times = zeros.clone()
    times[:, 1] = 1.0
    drawn = draw_copies(paths, wide, times, generator())
    assert torch.equal(drawn.codes[:, 1], wide.targets.codes_MN.unflatten(0, (120, STATES - 1))[:, 1])
    again = draw_copies(paths, wide, times, generator())
    assert torch.equal(drawn.codes, again.codes) and torch.equal(drawn.proprio, again.proprio)
    one_path = draw_copies(paths[:1], window, torch.zeros(shape), generator())
    assert bool((one_path.codes == MASKED).all())


def test_a_slot_without_content_is_embedded_as_padding(world):
    codes, proprio = torch.full((1, 8), MASKED), torch.full((1, 3), MASKED)
    codes[0, 2] = 5
    ids = world.layout.state_ids(codes, proprio)[0]
    v = world.layout.vocabulary
    assert ids[world.layout.frame_slots].tolist() == [
        v.vision.start + 5 if n == 2 else v.special["pad"] for n in range(8)
    ]
    assert ids[world.layout.proprio_slots].tolist() == [v.special["pad"]] * 3
