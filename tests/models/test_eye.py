"""The eye: what it reads and says, as files, and that it learns to find a dot."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu_embodied.models.eye import Eye, EyeConfig
from emu_embodied.train.eye import EyeTraining, train_eye
from emu_embodied.train.loop import LoopConfig
from tests import tiny

LOOP = LoopConfig(
    steps=120,
    learning_rate=3e-3,
    warmup_steps=2,
    ema_decay=0.9,
    eval_every=120,
    save_every=120,
    threads=1,
    device="cpu",
)
TRAINING = EyeTraining(loop=LOOP, batch=16, held_out=0.25)


def observations(count: int = 3):
    return [tiny.observation(tiny.make_episode(seed), 0) for seed in range(count)]


def test_it_says_numbers_within_their_units():
    eye = tiny.make_eye()
    found = eye.see(observations())
    assert found.shape == (3, 2) and found.dtype == torch.float32
    fields = tuple(replace(field, low=field.low + 7, high=field.high + 7) for field in tiny.OBJECTS)
    torch.testing.assert_close(tiny.make_eye(fields).see(observations()), found + 7)


def test_every_picture_is_read_alone():
    eye, seen = tiny.make_eye(), observations()
    torch.testing.assert_close(eye.see(seen), torch.cat([eye.see([one]) for one in seen]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("camera", tiny.CAMERAS)
def test_every_camera_counts(camera):
    eye, (seen,) = tiny.make_eye(), observations(1)
    other = replace(seen, frames={**seen.frames, camera: 255 - seen.frames[camera]})
    assert not torch.allclose(eye.see([seen]), eye.see([other]))


def test_the_instruction_counts_and_its_end_is_cut_off():
    eye, (seen,) = tiny.make_eye(), observations(1)
    length = eye.config.text_length
    told = [replace(seen, instruction=text) for text in ("a" * length, "b" * length, "a" * length + "c")]
    found = eye.see(told)
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_a_camera_or_size_that_it_does_not_know_is_named():
    eye, (seen,) = tiny.make_eye(), observations(1)
    with pytest.raises(ValueError, match="lacks wrist"):
        eye.see([replace(seen, frames={"front": seen.frames["front"]})])
    large = {camera: np.zeros((9, 9, 3), np.uint8) for camera in tiny.CAMERAS}
    with pytest.raises(ValueError, match=r"\(8, 8, 3\)"):
        eye.see([replace(seen, frames=large)])


def test_as_files_it_stays_the_same(tmp_path):
    eye, seen = tiny.make_eye(), observations()
    eye.save_pretrained(tmp_path)
    again = Eye.from_pretrained(tmp_path)
    assert again.config == eye.config
    assert torch.equal(again.see(seen), eye.see(seen))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "Emu3"}, "describes no eye"),
        ({"width": 12}, "describes no eye that can be built: .*width 12"),
        ({"width": 16}, "has shape"),
        ({"surprise": 1}, "describes no eye that can be built"),
    ],
)
def test_foreign_files_are_named(tmp_path, change, message):
    tiny.make_eye().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        Eye.from_pretrained(tmp_path)


def test_it_needs_something_to_read_and_to_say():
    with pytest.raises(ValueError, match="at least one camera"):
        EyeConfig(cameras=(), image_size=8, objects=tiny.OBJECTS)
    with pytest.raises(ValueError, match="at least one number"):
        EyeConfig(cameras=("front",), image_size=8, objects=())


def test_it_learns_where_the_dot_is(tmp_path):
    store = tiny.make_store(tmp_path / "dots", episodes=60)
    eye, result = train_eye(store, tiny.CAMERAS, tiny.SIZE, TRAINING, tmp_path / "out", resume=False)
    assert result.step == 120
    episodes = [tiny.make_episode(seed) for seed in range(1000, 1030)]
    found = eye.see([tiny.observation(episode, 0) for episode in episodes])
    places = torch.tensor(np.stack([episode.objects_TO[0] for episode in episodes]))
    guess = (places - places.mean(0)).abs().mean()
    assert float((found - places).abs().mean()) < 0.5 * float(guess)
    assert torch.equal(Eye.from_pretrained(tmp_path / "out" / "eye").see(observations()), eye.see(observations()))
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert set(meta["eye"]["extra"]["figures"]) >= {"eval/error/dot_x", "eval/error/dot_y"}


def test_an_eye_is_not_overwritten_and_goes_on(tmp_path):
    store = tiny.make_store(tmp_path / "dots")
    for resume, steps in ((False, 3), (True, 5)):
        config = replace(TRAINING, loop=replace(LOOP, steps=steps, save_every=1))
        _, result = train_eye(store, tiny.CAMERAS, tiny.SIZE, config, tmp_path / "out", resume=resume)
        assert result.step == steps
    with pytest.raises(ValueError, match="--resume"):
        train_eye(store, tiny.CAMERAS, tiny.SIZE, TRAINING, tmp_path / "out", resume=False)


def test_no_more_states_than_asked_for_are_kept(tmp_path, monkeypatch):
    from emu_embodied.train import eye as stage

    kept = []
    monkeypatch.setattr(stage, "_read", lambda *a, read=stage._read: kept.append(read(*a)) or kept[-1])
    config = replace(TRAINING, loop=replace(LOOP, steps=1), max_states=40)
    store = tiny.make_store(tmp_path / "dots", episodes=40)
    train_eye(store, tiny.CAMERAS, tiny.SIZE, config, tmp_path / "out", resume=False)
    assert 15 <= len(kept[0].objects_MO) <= 65  # 180 states, each kept with the same chance
    assert len(kept[0].objects_MO) == len(kept[0].frames_MCHWC) == len(kept[0].episode_M)


def test_a_dataset_that_tells_nothing_is_refused(tmp_path):
    store = tiny.make_store(tmp_path / "dots")
    with pytest.raises(ValueError, match="front 8 x 8"):
        train_eye(store, tiny.CAMERAS, 64, TRAINING, tmp_path / "out", resume=False)
    with pytest.raises(ValueError, match="above"):
        train_eye(store, ("above",), tiny.SIZE, TRAINING, tmp_path / "out", resume=False)
    store.spec = replace(store.spec, objects=())
    with pytest.raises(ValueError, match="does not tell where things are"):
        train_eye(store, tiny.CAMERAS, tiny.SIZE, TRAINING, tmp_path / "out", resume=False)
    assert not (tmp_path / "out").exists()
