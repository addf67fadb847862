"""Own predictions as context, own samples as data."""

from dataclasses import replace

import pytest
import torch

from emu_embodied.data.batches import WindowBatch, encode_dataset
from emu_embodied.decode.autoregressive import SequentialDecoder
from emu_embodied.train.adapt import train_dida
from emu_embodied.train.noise import noisy_logits, sample_times
from emu_embodied.train.parallel import dida_loss
from emu_embodied.train.pretrain import WorldData, next_token_loss, prepare_data
from emu_embodied.train.rollout import imagined, own_samples, self_fed, with_own_samples
from emu_embodied.train.windows import window_tokens
from emu_embodied.world_model import WorldModel
from tests import tiny

STATES = 4
PATHS = ("uniform", "state_coupled")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    return tiny.make_world(paths=PATHS)


@pytest.fixture(scope="module")
def data(world, tmp_path_factory) -> WorldData:
    folder = tmp_path_factory.mktemp("rollout")
    tokens = encode_dataset(tiny.make_store(folder / "data"), world.frames, tiny.CAMERAS, folder / "codes.safetensors")
    return prepare_data(world, tokens, 0.25)


@pytest.fixture(scope="module")
def batch(data) -> WindowBatch:
    return data.train.sample(6, STATES, data.text_train_EL, generator())


def shown_states(world, window):
    """The clean stream's embedded states [B, T, L, D]."""
    return world.layout.parse(window.embeds_BLD)[1]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_share_of_the_windows_shows_what_the_model_predicts(world, batch, steps):
    config = replace(tiny.TRAINING, own_steps=steps, own_share=0.5, context_noise=0.0)
    path = world.path("state_coupled")  # its source is no chance: predictions can be repeated
    fed, own = self_fed(world, batch, config, [path], generator())
    plain = window_tokens(world, batch, 0.0, generator())
    assert own == 3 and fed.targets.codes_MN.equal(plain.targets.codes_MN)
    same = (shown_states(world, fed) == shown_states(world, plain)).all(-1).all(-1)
    assert bool(same[3:].all()) and bool(same[:, 0].all()) and not bool(same[:3].all())
    # Every state from some place on is the model's prediction from what the window showed then.
    before = plain
    for _ in range(steps):
        with torch.no_grad():
            found = noisy_logits(world, before, path.source(before.before, None)).noisy
        codes = found.frame.argmax(-1).unflatten(0, (6, STATES - 1))
        proprio = found.proprio.argmax(-1).unflatten(0, (6, STATES - 1))
        truth = world.proprio.encode(batch.proprio_BTP)
        shown = []
        for row in range(3):
            first = next(t for t in range(1, STATES) if not same[row, t] or t == STATES - 1)
            place = torch.arange(STATES)[:, None] >= first
            shown.append(
                (
                    torch.where(place, torch.cat([batch.codes_BTN[row, :1], codes[row]]), batch.codes_BTN[row]),
                    torch.where(place, torch.cat([truth[row, :1], proprio[row]]), truth[row]),
                )
            )
        stacked = [torch.stack(part) for part in zip(*shown, strict=True)]
        whole = type(plain.before)(torch.cat([stacked[0], batch.codes_BTN[3:]]), torch.cat([stacked[1], truth[3:]]))
        before = window_tokens(world, batch, 0.0, generator(), whole)
    torch.testing.assert_close(fed.embeds_BLD, before.embeds_BLD)
    assert torch.equal(fed.before.codes, before.before.codes)


def test_without_own_steps_windows_are_those_of_the_data(world, batch):
    for config in (tiny.TRAINING, replace(tiny.TRAINING, own_steps=1, own_share=0.0)):
        window, own = self_fed(world, batch, config, [world.path("mask")], generator(4))
        assert own == 0
        assert torch.equal(
            window.embeds_BLD, window_tokens(world, batch, config.context_noise, generator(4)).embeds_BLD
        )


def test_predictions_carry_no_gradient_and_say_nothing_of_next_tokens(world, batch):
    config = replace(tiny.TRAINING, own_steps=1, own_share=0.5, context_noise=0.0)
    backbone = world.backbone.requires_grad_(True)
    output = dida_loss(world, batch, config, [world.path("uniform")], generator())
    output.loss.backward()
    assert bool(backbone.lm_head.weight.grad.isfinite().all())
    true = WindowBatch(*(getattr(batch, name)[3:] for name in WindowBatch.__slots__))
    expected = next_token_loss(world, true, config, generator()).logs
    for name in ("frame", "reward", "changed_token_accuracy"):
        torch.testing.assert_close(output.logs[f"clean/{name}"], expected[name], atol=2e-5, rtol=1e-4)
    calls = []
    core = backbone.core
    backbone.core = lambda *a, **k: calls.append(torch.is_grad_enabled()) or core(*a, **k)
    dida_loss(world, batch, replace(config, own_steps=2), [world.path("uniform")], generator())
    del backbone.core
    backbone.requires_grad_(False)
    assert calls == [False, False, True]
    assert output.items == batch.codes_BTN.shape[0] * (
        world.layout.length(STATES) + (STATES - 1) * world.layout.state_tokens
    )


def test_the_plain_loss_is_that_of_the_clean_stream(world, batch):
    plain = next_token_loss(world, batch, tiny.TRAINING, generator())
    both = dida_loss(world, batch, tiny.TRAINING, [world.path("uniform")], generator())
    for name in ("frame", "reward", "token_accuracy"):
        torch.testing.assert_close(plain.logs[name], both.logs[f"clean/{name}"], atol=2e-5, rtol=1e-4)


def test_a_window_has_one_time_unless_times_are_asynchronous():
    apart = sample_times((50, 3), 3.0, 0.3, generator())
    together = sample_times((50, 3), 3.0, 0.3, generator(), asynchronous=False)
    assert together.shape == apart.shape == (50, 3)
    assert bool((together == together[:, :1]).all()) and not bool((apart == apart[:, :1]).all())
    assert 0.1 < float((together[:, 0] == 0).float().mean()) < 0.5


def test_imagined_windows_are_what_the_decoder_imagines_one_by_one(world, batch):
    decoder = SequentialDecoder(world.backbone, world.layout)
    found = imagined(world, decoder, batch, generator())
    assert torch.equal(found.actions_BTKA, batch.actions_BTKA) and not bool(found.imitate_B.any())
    assert torch.equal(found.codes_BTN[:, 0], batch.codes_BTN[:, 0])
    # Next-token prediction on the imagined stream finds its own tokens most likely.
    with torch.no_grad():
        window = window_tokens(world, found, 0.0, generator())
        loss = next_token_loss(world, found, replace(tiny.TRAINING, context_noise=0.0), generator())
    assert float(loss.logs["token_accuracy"]) == 1.0
    assert torch.equal(window.targets.codes_MN, found.codes_BTN[:, 1:].flatten(0, 1))
    for values in (found.reward_BT, found.proprio_BTP):
        assert bool(values.isfinite().all())
    drawn = imagined(world, SequentialDecoder(world.backbone, world.layout, 1.0), batch, generator(1))
    assert not torch.equal(drawn.codes_BTN, found.codes_BTN)


def test_own_samples_are_kept_for_resuming_and_fill_half_of_a_batch(world, data, batch, tmp_path):
    config = replace(tiny.TRAINING, distilled_windows=5)
    kept = tmp_path / "distilled.safetensors"
    pool = own_samples(world, data, config, kept, resume=False)
    assert pool.codes_BTN.shape == (5, STATES, 8) and kept.exists()
    (tmp_path / "training" / "dida").mkdir(parents=True)
    other = tiny.make_world(seed=1)
    again = own_samples(other, data, config, kept, resume=True)
    assert all(torch.equal(getattr(pool, name), getattr(again, name)) for name in WindowBatch.__slots__)
    with pytest.raises(ValueError, match="holds 5 windows, 7 are asked for"):
        own_samples(other, data, replace(config, distilled_windows=7), kept, resume=True)
    with pytest.raises(ValueError, match=r"gone\.safetensors is missing"):
        own_samples(other, data, config, tmp_path / "gone.safetensors", resume=True)
    mixed = with_own_samples(batch, pool, generator())
    assert torch.equal(mixed.codes_BTN[:3], batch.codes_BTN[:3]) and mixed.codes_BTN.shape == batch.codes_BTN.shape
    assert all(any(torch.equal(row, one) for one in pool.codes_BTN) for row in mixed.codes_BTN[3:])


def test_all_options_train_together_and_resume(tmp_path):
    store = tiny.make_store(tmp_path / "data")
    loop = replace(tiny.TRAINING.loop, steps=4, save_every=2)
    config = replace(
        tiny.TRAINING, loop=loop, own_steps=1, own_share=0.5, distilled_windows=3, async_times=False, subgoal_share=0.0
    )
    out = tmp_path / "out"
    tiny.make_world().save_pretrained(tmp_path / "start")
    train_dida(
        store, WorldModel.from_pretrained(tmp_path / "start"), config, out, resume=False, paths=("metric", "mask")
    )
    config = replace(config, loop=replace(loop, steps=6))
    result = train_dida(store, WorldModel.from_pretrained(out), config, out, resume=True, paths=("metric", "mask"))
    assert result.step == 6 and (out / "distilled.safetensors").exists()


@pytest.mark.parametrize(
    "field", [{"own_steps": -1}, {"distilled_windows": -1}, {"own_share": 1.5}, {"source_share": -0.1}]
)
def test_settings_out_of_range_are_named(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        replace(tiny.TRAINING, **field)
