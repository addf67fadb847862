"""What is said of a checkpoint: every figure against its plain definition."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu_embodied.metrics import inspection, looking
from emu_embodied.metrics.image import psnr
from emu_embodied.metrics.inspection import (
    REENCODED,
    Inspection,
    encode_states,
    foretell,
    hidden_states,
    inspect_world,
    reading_place,
    tokenizer_figures,
)
from emu_embodied.metrics.probes import Split, kernel, places, probe
from emu_embodied.models.ibq import code_usage
from emu_embodied.records import Field, Imagination
from emu_embodied.viz.inspection import draw_inspection
from tests import tiny

HORIZON = 3
EPISODES = [tiny.make_episode(seed) for seed in range(12)]
PROPRIO = (Field("ee_x", "m", 0.0, 1.0), Field("ee_y", "m", 0.0, 1.0), Field("grip", "1", -1.0, 1.0))
OBJECTS = (Field("dot_x", "px", 0.0, 1.0), Field("dot_y", "px", 0.0, 1.0))


@pytest.fixture(scope="module", autouse=True)
def short_looks():
    """What a look finds is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(looking, "STEPS", looking.EVERY)
        yield


@pytest.fixture(scope="module")
def world():
    return tiny.make_world(proprio=PROPRIO)


@pytest.fixture(scope="module")
def seeing():
    """A model that says where it sees the dot."""
    return tiny.make_world(proprio=PROPRIO, objects=OBJECTS)


@pytest.fixture(scope="module")
def found(seeing) -> Inspection:
    return inspect_world(seeing, EPISODES, (PROPRIO, OBJECTS), HORIZON, seed=0)


class Stub:
    """A world whose imagination is put in place of the model's; ``pick`` makes one of two action sequences."""

    def __init__(self, world, imagine):
        self.world, self._imagine = world, imagine
        self.config, self.frames, self.device = world.config, world.frames, world.device
        self.observe, self.render, self.encode_frames = world.observe, world.render, world.encode_frames

    def imagine(self, belief, actions_SHKA, generator):
        return self._imagine(belief, actions_SHKA)


def what_happened(world, actions_SHKA) -> Imagination:
    """The true future, whichever actions are asked about, found by the first of them."""
    episode, start = next(
        (e, t)
        for e in EPISODES
        for t in range(len(e) - HORIZON + 1)
        if np.array_equal(e.actions_TKA[t : t + HORIZON], actions_SHKA[0])
    )
    future = slice(start + 1, start + 1 + HORIZON)
    codes = torch.stack([world.encode_frames({n: f[t] for n, f in episode.frames.items()})
                         for t in range(start + 1, start + 1 + HORIZON)])  # fmt: skip
    number = torch.zeros(2, HORIZON)
    return Imagination(
        codes.expand(2, -1, -1),
        torch.from_numpy(episode.proprio_TP[future]).expand(2, -1, -1),
        number,
        number,
        torch.from_numpy(episode.objects_TO[future]).expand(2, -1, -1),
    )


def test_the_short_answer_has_the_promised_names(found) -> None:
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    promised = {"gripper_probe_cm", "object_probe_cm", "codebook_used", "idempotent", "action_sensitivity_db"}
    assert promised <= content.keys()
    assert content["gripper_probe_cm"] == found.score("codes_and_words", "ee").error
    # Pixels are not called centimetres.
    assert content["object_probe_cm"] is None
    assert content["object_probe_px"] == found.score("codes_and_words", "dot").error
    assert content["object_guess_px"] == found.score("codes_and_words", "dot").guess
    assert content["states"] == 12 * 6 and content["held_states"] == 4 * 6
    assert "ee" in found.table() and "dot" in found.table()


def test_a_world_that_tells_of_no_objects_is_probed_for_the_gripper_alone(world) -> None:
    episodes = [replace(episode, objects_TO=episode.objects_TO[:, :0]) for episode in EPISODES]
    content = inspect_world(world, episodes, (PROPRIO, ()), HORIZON, seed=0).to_dict()
    assert content["object_probe_cm"] is None and content["gripper_probe_cm"] > 0
    assert set(content["ahead"][0]["errors"]) == {"ee"}


def test_the_dot_is_read_from_its_pictures(seeing) -> None:
    """Random weights, but a codebook spread over real frames: the place of the dot is in the codes."""
    states = encode_states(seeing, [tiny.make_episode(seed) for seed in range(150)])
    split = Split.of(states.episode_M, 0.33)
    vectors = seeing.frames.embed(states.codes_MN).flatten(1)
    [score] = probe(kernel(vectors, ~split.held_M), states.objects_MO, places(OBJECTS), split)
    assert score.error < 0.7 * score.guess


def test_states_are_encoded_as_the_model_encodes_them(seeing) -> None:
    states = encode_states(seeing, EPISODES[:2])
    for row, (episode, t) in enumerate((e, t) for e in EPISODES[:2] for t in range(6)):
        codes = seeing.encode_frames({name: images[t] for name, images in episode.frames.items()})
        assert torch.equal(states.codes_MN[row], codes)
        assert states.instructions[row] == episode.instruction
        assert np.array_equal(states.objects_MO[row], episode.objects_TO[t])
    assert states.episode_M.tolist() == [0] * 6 + [1] * 6


def test_hidden_states_are_told_nothing_of_objects(seeing) -> None:
    states = encode_states(seeing, EPISODES[:3])
    hidden = hidden_states(seeing, states)
    assert hidden.shape == (18, reading_place(seeing) + 1, tiny.PRESET.width)
    assert torch.equal(hidden, hidden_states(seeing, replace(states, objects_MO=states.objects_MO + 1)))
    other = hidden_states(seeing, replace(states, proprio_MP=1 - states.proprio_MP))
    assert not torch.allclose(hidden[:, -1], other[:, -1])
    # The same vectors as in the stream that the model itself writes.
    layout = seeing.layout
    numbers = torch.from_numpy(np.concatenate([states.proprio_MP, states.objects_MO], 1))
    state = layout.state_ids(states.codes_MN[:1], seeing.proprio.encode(numbers[:1]))
    ids = torch.cat([layout.text_ids(seeing.text.encode(states.instructions[0]))[None], state], 1)
    stream = seeing.backbone.core(seeing.backbone.embed(ids), torch.arange(ids.shape[1]))
    assert torch.allclose(hidden[0], stream[0, layout.text_tokens :][: hidden.shape[1]].detach(), atol=1e-5)


def test_figures_of_the_tokenizer(world) -> None:
    pictures = np.concatenate([episode.frames["front"] for episode in EPISODES[:2]])
    figures = tokenizer_figures(world.frames, pictures)
    codes = world.frames.encode(pictures)
    assert figures.codes_used == len(torch.unique(codes)) and figures.codes == tiny.IBQ_CONFIG.n_embed
    assert figures.used == figures.codes_used / figures.codes
    assert figures.perplexity == pytest.approx(code_usage(codes, 12).perplexity)
    assert figures.idempotence == pytest.approx(world.frames.idempotence(codes))
    shown = pictures
    for _ in range(REENCODED):
        shown = world.frames.decode(world.frames.encode(shown))
    assert figures.psnr_reencoded == pytest.approx(np.minimum(psnr(shown, pictures), 60).mean())


def test_a_perfect_model_has_no_errors_and_who_ignores_actions_no_sensitivity(seeing) -> None:
    stub = Stub(seeing, lambda belief, actions: what_happened(seeing, actions))
    rows = foretell(stub, EPISODES, HORIZON, places(PROPRIO), places(OBJECTS), seed=0)
    assert [row.h for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert row.errors == pytest.approx({"ee": 0, "dot": 0}, abs=1e-4)
        assert row.psnr == row.psnr_shuffled  # both futures are the true one
        assert row.stays["dot"] > 0
    assert rows[0].errors["ee"] == pytest.approx(0, abs=1e-5) and rows[0].errors["dot"] > 0  # as perceived


def test_sensitivity_is_what_foreign_actions_cost(seeing) -> None:
    """Here the true frames are imagined for an episode's own actions and black ones for another's."""
    stub = Stub(seeing, lambda belief, actions: what_happened(seeing, actions))
    truth = iter([(episode, i % (len(episode) - HORIZON + 1)) for i, episode in enumerate(EPISODES)])
    black = []

    def render(imagination, plans, horizons):
        episode, start = next(truth)
        real = {camera: frames[start + 1 : start + 1 + HORIZON] for camera, frames in episode.frames.items()}
        black.append(np.mean([psnr(np.zeros_like(frames), frames) for frames in real.values()], 0))
        return {camera: np.stack([frames, np.zeros_like(frames)]) for camera, frames in real.items()}

    stub.render = render
    rows = foretell(stub, EPISODES, HORIZON, places(PROPRIO), places(OBJECTS), seed=0)
    assert [row.psnr for row in rows[1:]] == [60] * HORIZON
    assert [row.psnr_shuffled for row in rows[1:]] == pytest.approx(np.mean(black, 0))
    found = Inspection({}, None, None, None, rows, 0, 0)
    assert found.sensitivity == pytest.approx(60 - np.mean(black))


def test_the_seed_decides(seeing, found) -> None:
    assert inspect_world(seeing, EPISODES, (PROPRIO, OBJECTS), HORIZON, seed=0).to_dict() == found.to_dict()


def test_short_episodes_are_refused(world) -> None:
    with pytest.raises(ValueError, match="fewer than the horizon of 9"):
        inspect_world(world, EPISODES, (PROPRIO, OBJECTS), 9, seed=0)


def test_the_picture_is_written(found, tmp_path) -> None:
    path = draw_inspection(found, "tiny", tmp_path / "inspect.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_cells_of_the_encoder_are_those_that_codes_are_chosen_for(world) -> None:
    pictures = torch.from_numpy(np.stack([EPISODES[0].frames[camera] for camera in tiny.CAMERAS], 1))
    cells = inspection.encoder_cells(world, pictures)
    codes = encode_states(world, EPISODES[:1]).codes_MN
    assert cells.shape == (*codes.shape, tiny.IBQ_CONFIG.embed_dim)
    assert torch.equal(world.frames.ibq.quantize.nearest(cells.flatten(0, 1)).view(codes.shape), codes)


def test_pictures_are_spread_over_episodes(world) -> None:
    frames = inspection.frames_of(world, EPISODES)
    assert len(frames) == inspection.PICTURES and np.array_equal(frames[0], EPISODES[0].frames["front"][0])
    assert np.array_equal(frames[-1], EPISODES[-1].frames["wrist"][-1])
