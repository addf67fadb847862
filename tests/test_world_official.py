"""Emu3.5's own folder as a world model: its image blocks, its ids, and a robot that changes nothing yet."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tiktoken")

from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.presets import PRESETS
from emu_embodied.records import Observation
from emu_embodied.tokens.image_block import Markup
from emu_embodied.tokens.image_format import ImageFormat
from emu_embodied.tokens.sequence import SequenceLayout
from emu_embodied.tokens.text import TextTokenizer
from emu_embodied.world_config import WEIGHTS, WorldModelConfig
from emu_embodied.world_model import WorldModel
from tests import official, tiny

PANDA = WorldModelConfig.load(WEIGHTS / "nano" / "world.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("official")
    official.write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def world(folder) -> WorldModel:
    return WorldModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def text(folder) -> TextTokenizer:
    return TextTokenizer.from_pretrained(folder)


def seen(world: WorldModel, seed: int = 0) -> Observation:
    rng = np.random.default_rng(seed)
    size = world.config.image_size
    frames = {camera: rng.integers(0, 256, (size, size, 3)).astype(np.uint8) for camera in world.config.cameras}
    proprio = [rng.uniform(field.low, field.high) for field in world.config.proprio]
    return Observation(frames, np.array(proprio, np.float32), "Push the red cube.")


def plans(world: WorldModel, count: int, horizon: int, seed: int = 0) -> torch.Tensor:
    shape = (count, horizon, world.config.block, world.config.action_dim)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# -- image blocks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 3, 16])
def test_a_camera_is_an_official_image_block(side, text):
    markup = Markup.of(text, official.CODES)
    codes = torch.arange(side * side) % official.CODES
    found = ImageFormat.emu35(side * side)
    ids = torch.full((found.length(side * side),), -1)
    ids[found.slots(side * side)] = markup.vision.ids(codes)
    for place, token in found.fixed(side * side):
        assert ids[place] == -1
        ids[place] = token
    assert ids.tolist() == markup.block(codes.view(side, side))


def test_pictures_that_are_no_squares_are_refused():
    with pytest.raises(ValueError, match="5 codes are no square picture"):
        ImageFormat.emu35(5)


def test_states_hold_a_block_for_each_camera(text):
    config = replace(PANDA, tokens="emu3.5", camera_tokens=4, codebook=official.CODES, cameras=("front", "wrist"))
    layout, markup = config.layout, Markup.of(text, official.CODES)
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    proprio = torch.arange(len(PANDA.proprio))
    ids = layout.state_ids(codes, proprio)
    blocks = [*markup.block(codes[:4].view(2, 2)), *markup.block(codes[4:].view(2, 2))]
    assert ids.tolist()[: len(blocks)] == blocks
    assert ids[len(blocks) : -2].tolist() == layout.vocabulary.state.ids(proprio).tolist()
    assert [part.tolist() for part in layout.parse_state(ids)] == [codes.tolist(), proprio.tolist()]
    kinds = {kind: places for kind, places, _ in layout.readouts()}
    assert (kinds["frame"] + 1).tolist() == [i for i, token in enumerate(ids.tolist()) if token >= 151_854]


def test_our_own_layout_is_what_it_was():
    layout = PANDA.layout
    assert isinstance(layout, SequenceLayout) and layout.image is None
    codes, proprio = torch.arange(64), torch.zeros(len(PANDA.proprio), dtype=torch.long)
    v = layout.vocabulary
    expected = [v.special["boi"], *v.vision.ids(codes).tolist(), *v.state.ids(proprio).tolist()]
    assert layout.state_ids(codes, proprio).tolist() == [*expected, v.special["reward"], v.special["success"]]


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_folder_becomes_a_panda_s_world_model(world, folder):
    config = world.config
    assert (config.action_dim, config.block, config.proprio) == (PANDA.action_dim, PANDA.block, PANDA.proprio)
    assert (config.tokens, config.codebook, config.image_size, config.camera_tokens) == ("emu3.5", 16, 8, 4)
    assert (config.decoding, config.paths, config.subgoals) == ("autoregressive", (), 0)
    stored = EmuForCausalLM.from_pretrained(folder).state_dict()
    assert all(
        torch.equal(weight, stored[name]) for name, weight in world.backbone.state_dict().items() if name in stored
    )


def test_instructions_are_emu35_s_tokens(world, text):
    ids = world.text.encode("Push the red cube.")
    assert ids == text.encode("Push the red cube.") and max(ids) < 151_643
    assert world.layout.text_ids(ids)[: 1 + len(ids)].tolist() == [151_849, *ids]


def test_a_new_robot_changes_nothing_at_first(world, folder):
    observation = seen(world)
    belief = world.observe([observation])
    codes = world.encode_frames(observation.frames)
    ids = torch.cat(
        [
            world.layout.text_ids(world.text.encode(observation.instruction)),
            world.layout.state_ids(codes, world.proprio.encode(torch.as_tensor(observation.proprio))),
        ]
    )
    plain = EmuForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        keys = torch.stack([k[:, :, : belief.cache.length] for k in belief.cache.keys])
        cache = world._prefix(plain.embed(ids[None]))
    torch.testing.assert_close(keys, torch.stack([k[:, :, : cache.length] for k in cache.keys]))
    assert not world.backbone.action_embedding(plans(world, 3, 1)).any()


def test_it_observes_and_imagines(world):
    belief = world.observe([seen(world), seen(world, 1)], [plans(world, 1, 1)[0, 0].numpy()])
    found = world.imagine(belief, plans(world, 3, 4))  # beyond the window
    assert found.tokens_SHN.shape == (3, 4, 4) and int(found.tokens_SHN.max()) < 16
    assert found.proprio_SHP.isfinite().all() and bool(((found.reward_SH >= 0) & (found.reward_SH <= 1)).all())
    frames = world.render(found, [0, 2], [3])
    assert frames[world.config.cameras[0]].shape == (2, 1, 8, 8, 3)
    longer = world.extend(world.observe([seen(world)]), plans(world, 1, 1)[0, 0].numpy(), seen(world, 1))
    again = world.imagine(longer, plans(world, 3, 4))
    torch.testing.assert_close(again.reward_SH, found.reward_SH)


def test_saved_and_loaded_it_is_the_same(world, folder, tmp_path):
    world.save_pretrained(tmp_path)
    again = WorldModel.from_pretrained(tmp_path)
    assert again.config == world.config
    assert (tmp_path / "emu3.tiktoken").read_bytes() == (folder / "emu3.tiktoken").read_bytes()
    assert again.text.encode("a cup, ü") == world.text.encode("a cup, ü")
    observation, actions = seen(world), plans(world, 2, 2)
    first, second = (w.imagine(w.observe([observation]), actions) for w in (world, again))
    assert torch.equal(first.tokens_SHN, second.tokens_SHN) and torch.equal(first.reward_SH, second.reward_SH)
    assert all(
        torch.equal(weight, again.backbone.state_dict()[name]) for name, weight in world.backbone.state_dict().items()
    )
    with pytest.raises(ValueError, match="names its own embodiment"):
        WorldModel.from_pretrained(tmp_path, embodiment=PANDA)


def test_another_robot_and_another_format(folder):
    robot = replace(tiny.make_world().config, text_length=30)
    world = WorldModel.from_pretrained(folder, embodiment=robot, dtype=torch.bfloat16)
    assert world.config.cameras == robot.cameras and world.backbone.dtype == torch.bfloat16
    found = world.imagine(world.observe([seen(world)]), plans(world, 2, 2))
    assert found.tokens_SHN.shape == (2, 2, 8) and found.reward_SH.isfinite().all()


def test_pieces_that_are_not_of_one_model_are_refused(folder, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "vocab_size": 151_900}))
    with pytest.raises(ValueError, match="know 151900 ids, text and vision tokenizer make 151870"):
        WorldModel.from_pretrained(copied)
    (copied / "emu3.tiktoken").unlink()
    with pytest.raises(ValueError, match=r"the text tokenizer .* was not found"):
        WorldModel.from_pretrained(copied)


def test_a_checkpoint_of_ours_without_its_description_is_still_named(tmp_path):
    tiny.make_world().save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "world.json").unlink()
    with pytest.raises(ValueError, match=r"world\.json is missing"):
        WorldModel.from_pretrained(tmp_path / "ours")


def test_emu35_s_ids_and_text_belong_together(world):
    with pytest.raises(ValueError, match="belong together"):
        WorldModel(world.config, world.backbone, world.frames)


# -- the preset -------------------------------------------------------------------------------------------------------


def test_the_preset_is_the_released_model():
    row = PRESETS["emu3.5"]
    with torch.device("meta"):
        model = EmuForCausalLM(row.backbone(0))
        robot = EmuForCausalLM(row.backbone(4))
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e9, 2) == 34.10
    released = EmuForCausalLM.config_class()
    names = ("vocab_size", "hidden_size", "rope_theta", "rms_norm_eps", "max_position_embeddings", "bos_token_id")
    assert {name: getattr(model.config, name) for name in names} == {name: getattr(released, name) for name in names}
    assert robot.state_dict().keys() - model.state_dict().keys() == {
        f"action_embedding.{layer}.{kind}" for layer in ("up", "down") for kind in ("weight", "bias")
    }
