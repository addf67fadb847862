"""Imagination against what happened: every figure against its plain definition, and the picture."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from emu_embodied.data.recording import record_episode
from emu_embodied.metrics.horizons import HorizonScores, record_fresh, score_horizons
from emu_embodied.metrics.image import psnr
from emu_embodied.records import Imagination
from emu_embodied.viz.horizons import SCALE, draw_horizons
from tests import tiny
from tests.data.fakes import DotSimulator, Seek, Wander

HORIZON = 3
EPISODES = [tiny.make_episode(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def world():
    return tiny.make_world()


@pytest.fixture(scope="module")
def scores(world) -> HorizonScores:
    return score_horizons(world, EPISODES, HORIZON, seed=0)


class Oracle:
    """Foretells what was recorded."""

    def __init__(self, world, spoil=lambda imagination: imagination):
        self.world, self.spoil, self.truth = world, spoil, iter(EPISODES)
        self.config, self.frames, self.encode_frames = world.config, world.frames, world.encode_frames
        self.observe, self.render = world.observe, world.render

    def imagine(self, belief, actions, generator):
        episode = next(self.truth)
        assert np.array_equal(actions[0], episode.actions_TKA[:HORIZON])
        codes = [self.encode_frames({n: f[t] for n, f in episode.frames.items()}) for t in range(1, HORIZON + 1)]
        future = slice(1, HORIZON + 1)
        return self.spoil(
            Imagination(
                torch.stack(codes)[None],
                torch.from_numpy(episode.proprio_TP[future])[None],
                torch.from_numpy(episode.reward_T[future])[None],
                torch.from_numpy(episode.success_T[future]).float()[None],
            )
        )


def test_a_perfect_model_has_perfect_figures(world):
    scores = score_horizons(Oracle(world), EPISODES, HORIZON, seed=0)
    assert [row.h for row in scores.rows] == [1, 2, 3]
    for row in scores.rows:
        assert row.token_accuracy == row.changed_token_accuracy == 1 and row.proprio_mae == 0
        assert row.reward_corr == pytest.approx(1)
        assert row.psnr == pytest.approx(row.tokenizer_psnr)


def test_figures_are_those_of_their_definitions(world, scores):
    for h, row in enumerate(scores.rows):
        real = [episode.frames["front"][h + 1] for episode in EPISODES]
        first = [episode.frames["front"][0] for episode in EPISODES]
        assert row.copy_last_psnr == pytest.approx(
            np.mean([min(float(psnr(a, b)), 60) for a, b in zip(first, real, strict=True)])
        )
        codes = torch.stack([torch.cat([world.frames.encode(e.frames[c]) for c in tiny.CAMERAS], 1) for e in EPISODES])
        still = codes[:, h + 1] == codes[:, 0]
        assert row.copy_last_token_accuracy == pytest.approx(float(still.float().mean()))
    generator = torch.Generator().manual_seed(0)
    imagined = []
    for episode in EPISODES:
        actions_SHKA = torch.from_numpy(episode.actions_TKA[:HORIZON])[None]
        imagined.append(world.imagine(world.observe([tiny.observation(episode, 0)]), actions_SHKA, generator))
    for h, row in enumerate(scores.rows):
        foretold = np.array([float(i.reward_SH[0, h]) for i in imagined])
        rewards = np.array([e.reward_T[h + 1] for e in EPISODES])
        assert row.reward_corr == pytest.approx(np.corrcoef(foretold, rewards)[0, 1], abs=1e-4)
        felt = np.stack([i.proprio_SHP[0, h].numpy() for i in imagined])
        felt -= np.stack([e.proprio_TP[h + 1] for e in EPISODES])
        assert row.proprio_mae == pytest.approx(np.abs(felt).mean(), rel=1e-4)
        right = np.stack([i.tokens_SHN[0, h].numpy() for i in imagined]) == codes_at(world, h + 1)
        assert row.token_accuracy == pytest.approx(right.mean())
        moved = codes_at(world, h + 1) != codes_at(world, 0)
        assert row.changed_token_accuracy == pytest.approx(right[moved].mean())
        same = [(codes_at(world, h + 1)[e] == codes_at(world, h)[e]).all() for e in range(len(EPISODES))]
        assert row.real_repeated_share == np.mean(same)
        before = codes_at(world, 0) if h == 0 else np.stack([i.tokens_SHN[0, h - 1].numpy() for i in imagined])
        found = np.stack([i.tokens_SHN[0, h].numpy() for i in imagined])
        assert row.repeated_share == (found == before).all(1).mean()


def codes_at(world, t: int) -> np.ndarray:
    return np.stack([world.encode_frames({n: f[t] for n, f in e.frames.items()}).numpy() for e in EPISODES])


def test_what_is_not_defined_is_none_and_json_ready(world):
    constant = Oracle(world, lambda found: replace(found, reward_SH=torch.full_like(found.reward_SH, 0.5)))
    row = score_horizons(constant, EPISODES, 1 + 2, seed=0).rows[0]
    assert row.reward_corr is None
    single = score_horizons(world, EPISODES[:1], 1, seed=0).rows[0]
    assert single.reward_corr is None
    frozen = replace(EPISODES[0], frames={n: np.repeat(f[:1], len(f), 0) for n, f in EPISODES[0].frames.items()})
    row = score_horizons(world, [frozen, frozen], 2, seed=0).rows[1]
    assert row.real_repeated_share == 1
    copied = Oracle(world, lambda found: replace(found, tokens_SHN=found.tokens_SHN[:, :1].expand(-1, 3, -1)))
    assert [row.repeated_share for row in score_horizons(copied, EPISODES, 3, seed=0).rows][1:] == [1, 1]
    assert row.changed_token_accuracy is None and row.copy_last_token_accuracy == 1 and row.copy_last_psnr == 60
    content = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    named = (
        "h token_accuracy changed_token_accuracy copy_last_token_accuracy psnr copy_last_psnr reward_corr proprio_mae"
    )
    assert set(named.split()) <= content.keys()


def test_short_episodes_are_refused(world):
    with pytest.raises(ValueError, match="an episode has 5 blocks, fewer than the horizon of 6"):
        score_horizons(world, EPISODES, 6, seed=0)


def test_same_seed_same_figures(world, scores):
    assert score_horizons(world, EPISODES, HORIZON, seed=0).rows == scores.rows


def test_the_table_has_a_line_for_each_horizon(world, scores):
    lines = scores.table().splitlines()
    assert len(lines) == 1 + HORIZON and len({len(line) for line in lines}) == 1
    assert lines[1].split()[:2] == ["1", f"{scores.rows[0].token_accuracy:.3f}"]
    frozen = score_horizons(world, EPISODES[:1], 1, seed=0)
    assert "-" in frozen.table().splitlines()[1].split()


def test_fresh_episodes_take_behaviours_and_seeds_in_turn():
    simulator = DotSimulator("Dot-v0")
    found = record_fresh(simulator, {"wander": Wander, "seek": Seek}, record_episode, "Dot-v0", 5, seed=40)
    assert [(e.source, e.seed) for e in found] == [
        ("wander", 40), ("seek", 41), ("wander", 42), ("seek", 43), ("wander", 44),
    ]  # fmt: skip
    again = record_fresh(simulator, {"wander": Wander, "seek": Seek}, record_episode, "Dot-v0", 5, seed=40)
    assert all(np.array_equal(a.actions_TKA, b.actions_TKA) for a, b in zip(found, again, strict=True))
    assert not np.array_equal(found[0].actions_TKA[:3], found[2].actions_TKA[:3])


def test_the_picture_shows_real_above_imagined(scores, tmp_path):
    path = draw_horizons(scores, tmp_path / "new" / "imagine.png")
    picture = np.asarray(Image.open(path))
    cell, gap = tiny.SIZE * SCALE, 4
    assert picture.shape == (len(EPISODES) * (2 * cell + 2 * gap), (HORIZON + 1) * cell + 2 * gap, 3)

    def tile(episode: int, row: int, column: int) -> np.ndarray:
        top = episode * (2 * cell + 2 * gap) + gap + row * cell
        return picture[top : top + cell : SCALE, gap + column * cell : gap + (column + 1) * cell : SCALE]

    for e in range(len(EPISODES)):
        assert np.array_equal(tile(e, 0, 0), tile(e, 1, 0))  # the observed state stands in both rows
        assert np.array_equal(tile(e, 0, 2), EPISODES[e].frames["front"][2])
        assert np.array_equal(tile(e, 1, 3), scores.imagined[e, 3])
