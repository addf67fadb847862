"""The stream of numbers: the same weights on states without frames."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from emu_embodied.acting import Actor
from emu_embodied.cli import main
from emu_embodied.decode.grammar import expected_bin, state_logits
from emu_embodied.model_card import searched
from emu_embodied.models.masks import causal_then_parallel
from emu_embodied.policies.evaluate import policy_settings
from emu_embodied.policies.guides import TokenGuide
from emu_embodied.policies.planning import ImaginedSource
from emu_embodied.policies.registry import PolicySpec, make_policy
from emu_embodied.train.adapt import train_dida
from emu_embodied.train.policy import PolicyTraining, train_policy
from emu_embodied.world_model import WorldModel
from tests import tiny

EPISODE = tiny.make_episode(3, blocks=6)
SEEN = [tiny.observation(EPISODE, t) for t in range(3)]
NUMBERS = len(tiny.FIELDS) + len(tiny.OBJECTS)
NAMES = ("proprio_SHP", "objects_SHO", "reward_SH", "success_SH")


@pytest.fixture(scope="module")
def pictures() -> WorldModel:
    return tiny.make_world(objects=tiny.OBJECTS, streams=("pictures", "numbers"))


@pytest.fixture(params=["dida", "autoregressive"])
def numbers(request, pictures) -> WorldModel:
    return pictures.with_decoding(request.param).with_stream("numbers")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_stream_is_that_of_pictures_without_their_codes(pictures):
    world = pictures.with_stream("numbers")
    assert world.backbone is pictures.backbone and world.with_stream("pictures").layout == pictures.layout
    assert world.layout.state_tokens == pictures.layout.state_tokens - 8 == len(tiny.CAMERAS) + NUMBERS + 2
    belief = world.observe(SEEN[:1])
    assert belief.cache.total_length == world.layout.length(1)
    assert belief.objects_O.equal(pictures.observe(SEEN[:1]).objects_O)


def test_imagination_has_no_pictures_and_all_the_rest(numbers):
    found = numbers.imagine(numbers.observe(SEEN[:1]), tiny.plans(3, 6), generator())
    assert found.tokens_SHN is None
    assert [getattr(found, name).shape for name in NAMES] == [(3, 6, 3), (3, 6, 2), (3, 6), (3, 6)]
    assert not torch.allclose(found.objects_SHO[0], found.objects_SHO[1])
    with pytest.raises(ValueError, match="no frame tokens"):
        numbers.render(found, [0], [0])


@torch.inference_mode()
def test_one_pass_equals_one_forward_over_the_stream_written_out(pictures):
    world = pictures.with_stream("numbers")
    layout, actions = world.layout, tiny.plans(2, 1)
    belief = world.observe(SEEN[:2], EPISODE.actions_TKA[:1])
    found = world.imagine(belief, actions, generator(5))
    text = layout.text_ids(world.text.encode(EPISODE.instruction))[None]
    numbers = [torch.cat([torch.as_tensor(seen.proprio), world.see([seen])[0]]) for seen in SEEN[:2]]
    bins = [world.proprio.encode(each)[None] for each in numbers]
    none = torch.zeros(1, 0, dtype=torch.long)
    embed, led_to = world.backbone.embed, world.backbone.action_embedding
    done = torch.from_numpy(EPISODE.actions_TKA[:1])
    clean = [
        embed(text),
        embed(layout.state_ids(none, bins[0])),
        embed(layout.action_ids(world.actions.encode(done))),
        embed(layout.state_ids(none, bins[1])) + led_to(done)[:, None],
    ]
    acted = embed(layout.action_ids(world.actions.encode(actions[:, 0])))
    clean = torch.cat([torch.cat(clean, 1).expand(2, -1, -1), acted], 1)
    source = world.decoder.path.source(world._latest(belief).expand(2), generator(5))
    noisy = embed(layout.state_ids(source.codes, source.proprio)) + led_to(actions[:, 0])[:, None]
    stream = torch.cat([clean, noisy], 1)
    mask = causal_then_parallel(clean.shape[1], noisy.shape[1])
    hidden = world.backbone.core(stream, torch.arange(stream.shape[1]), mask)[:, -layout.state_tokens :]
    logits = state_logits(world.backbone, layout, hidden, bins[1].expand(2, -1))
    expected = world.proprio.decode(expected_bin(logits.proprio))
    torch.testing.assert_close(found.objects_SHO[:, 0], expected[:, 3:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.proprio_SHP[:, 0], expected[:, :3], atol=2e-5, rtol=1e-4)


def test_plans_are_imagined_apart_as_together(numbers):
    belief, plans = numbers.observe(SEEN[:1]), tiny.plans(3, 5)
    together = numbers.imagine(belief, plans, generator())
    for s in range(3):
        alone = numbers.imagine(belief, plans[s : s + 1], generator())
        for name in NAMES:
            torch.testing.assert_close(getattr(alone, name)[0], getattr(together, name)[s], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("order", ["random", "confidence", "entropy"])
def test_several_passes_decode_numbers_too(pictures, order):
    world = pictures.with_decoding("dida", passes=3, order=order).with_stream("numbers")
    found = world.imagine(world.observe(SEEN[:1]), tiny.plans(3, 2), generator())
    assert bool(found.objects_SHO.isfinite().all())


def test_weights_that_do_not_know_it_are_refused():
    with pytest.raises(ValueError, match="know the stream of pictures, not of numbers"):
        tiny.make_world(objects=tiny.OBJECTS).with_stream("numbers")
    with pytest.raises(ValueError, match="without objects"):
        tiny.make_world(streams=("pictures", "numbers"))


@pytest.mark.parametrize("spoilt", [{"objective": "goal"}, {"name": "subgoals"}])
def test_numbers_are_not_compared_with_pictures(pictures, spoilt):
    from tests.point_mass import PointMass

    spec = PolicySpec(**{"name": "imagined", "objective": "objects", "stream": "numbers", **spoilt})
    with pytest.raises(ValueError, match="cannot be compared with a goal picture"):
        make_policy(spec, PointMass(), world_model=pictures.with_stream("numbers"))


def test_a_row_names_the_stream_it_imagined_in(tmp_path, monkeypatch):
    from emu_embodied.policies import registry

    asked = []
    monkeypatch.setattr(registry, "_load_world_model", lambda *key: asked.append(key))
    monkeypatch.setattr(registry, "check_fits", lambda *_: None)
    monkeypatch.setattr(registry, "make_policy", lambda *_, **__: None)
    spec = PolicySpec(name="imagined", objective="objects", stream="numbers")
    spec.build(None, 0)
    assert asked == [("nano", "cpu", "numbers")]
    assert policy_settings(spec, 0)["stream"] == "numbers"
    assert searched(policy_settings(spec, 0)) == ", in numbers"
    # Rows measured before there were two streams stay what they were.
    assert "stream" not in policy_settings(replace(spec, stream="pictures"), 0)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted") / "world"
    loop = replace(tiny.TRAINING.loop, steps=80)
    config = replace(tiny.TRAINING, loop=loop, batch=1, number_windows=24, subgoal_share=0.0)
    train_dida(store, tiny.make_world(objects=tiny.OBJECTS), config, out, resume=False)
    return out


def test_windows_of_numbers_are_learned_and_kept(trained, store):
    world = WorldModel.from_pretrained(trained)
    assert world.config.streams == ("pictures", "numbers") and world.config.stream == "pictures"
    *lines, judged = [json.loads(line) for line in (trained / "train_dida.jsonl").read_text().splitlines()]
    assert lines[-1]["numbers/proprio"] < 0.9 * lines[0]["numbers/proprio"]
    assert "eval/numbers/object_mae" in judged and "eval/numbers/token_accuracy" not in judged

    def error(model: WorldModel) -> float:
        own, gaps = model.with_stream("numbers"), []
        for e in range(len(store)):
            episode = store[e]
            belief = own.observe([tiny.observation(episode, 0)])
            plan = torch.from_numpy(episode.actions_TKA[None, :2])
            found = own.imagine(belief, plan, generator())
            gaps.append((found.proprio_SHP[0, :, :2] - torch.from_numpy(episode.proprio_TP[1:3, :2])).abs().mean())
        return float(torch.stack(gaps).mean())

    untrained = tiny.make_world(objects=tiny.OBJECTS, streams=("pictures", "numbers"))
    assert error(world) < error(untrained)


def test_a_policy_in_numbers_looks_at_no_codes(trained, store, tmp_path, monkeypatch):
    config = PolicyTraining(
        loop=replace(tiny.TRAINING.loop, steps=4), batch=8, stream="numbers", held_out=0.3,
        world=replace(tiny.TRAINING, number_windows=2, subgoal_share=0.0),
    )  # fmt: skip
    train_policy(store, WorldModel.from_pretrained(trained), config, tmp_path / "policy", resume=False)
    world = WorldModel.from_pretrained(tmp_path / "policy")
    assert world.config.policy_stream == "numbers"
    assert "world/numbers/proprio" in (tmp_path / "policy" / "train_policy.jsonl").read_text()
    actor = Actor(world)
    monkeypatch.setattr(world.frames, "encode", None)
    situations = actor.see(SEEN[:2])
    assert situations.codes_BTN.shape == (2, 1, 0)
    assert actor.act(situations).actions_BKA.shape == (2, tiny.BLOCK, tiny.ACTIONS)
    monkeypatch.undo()
    # It proposes from imagined states in either stream.
    for stream in ("pictures", "numbers"):
        source, guide = ImaginedSource(world.with_stream(stream)), TokenGuide(actor)
        for follower in (source, guide):
            follower.reset(SEEN[0])
        proposals = guide.proposals(source.dynamics(), generator())
        block = proposals(tiny.plans(3, 1), generator(1))
        assert block.shape == (3, tiny.BLOCK, tiny.ACTIONS)


def test_a_policy_keeps_the_numbers_it_was_taught(trained, store, tmp_path, capsys):
    flags = f"--data {store.folder} --steps 2 --batch 4 --world-windows 2"
    assert main(f"train policy {flags} --init {trained} --out {tmp_path / 'both'}".split()) == 0
    assert "world/numbers/proprio" in (tmp_path / "both" / "train_policy.jsonl").read_text()
    tiny.make_world(objects=tiny.OBJECTS).save_pretrained(tmp_path / "pictures")
    flags += f" --init {tmp_path / 'pictures'} --out {tmp_path / 'refused'}"
    assert main(f"train policy {flags} --number-windows 2".split()) == 2
    assert "does not know the stream of numbers" in capsys.readouterr().err
    assert main(f"train policy {flags} --stream numbers".split()) == 2
    assert "train dida --number-windows" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_windows_of_numbers_need_an_eye(store, tmp_path, capsys):
    tiny.make_world().save_pretrained(tmp_path / "blind")
    flags = f"--data {store.folder} --init {tmp_path / 'blind'} --out {tmp_path / 'out'} --number-windows 4"
    assert main(f"train dida {flags}".split()) == 2
    assert "has no eye" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_policy_that_looks_at_pictures_needs_them_imagined(pictures):
    source, guide = ImaginedSource(pictures.with_stream("numbers")), TokenGuide(Actor(pictures))
    for follower in (source, guide):
        follower.reset(SEEN[0])
    with pytest.raises(ValueError, match="imagine them"):
        guide.proposals(source.dynamics(), generator())(tiny.plans(3, 1), generator(1))
