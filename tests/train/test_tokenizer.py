"""Tokenizer training on a small square that moves over a patterned table."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from emu_embodied.data.episodes import DatasetSpec, EpisodeStore
from emu_embodied.data.split import held_out_episodes
from emu_embodied.models.ibq import IBQ, IBQConfig
from emu_embodied.records import Episode, Field
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.train import tokenizer as stage
from emu_embodied.train.loop import LoopConfig, TrainingFailed
from emu_embodied.train.tokenizer import TokenizerTraining, load_frames, train_tokenizer

SIZE, BLOCKS = 16, 4
IBQ_CONFIG = IBQConfig(
    ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), resolution=SIZE, z_channels=8, embed_dim=4,
    n_embed=16, norm_groups=4, patch=2,
)  # fmt: skip
CONFIG = TokenizerTraining(
    loop=LoopConfig(
        steps=120, learning_rate=3e-3, warmup_steps=5, ema_decay=0.9, log_every=20, eval_every=40, save_every=40,
        threads=1, device="cpu",
    ),
    batch=16,
    warmup_plain=40,
    revive_every=10,
    collapse_grace=20,
    held_out=0.2,
)  # fmt: skip


def film(rng, camera):
    table = np.full((SIZE, SIZE, 3), (90, 110, 130) if camera == "front" else (40, 40, 40), np.uint8)
    frames = np.stack([table] * (BLOCKS + 1))
    colour = np.array([(255, 0, 0), (0, 200, 0), (250, 240, 0)], np.uint8)[rng.integers(3)]
    for frame in frames:
        row, column = rng.integers(0, SIZE - 5, 2)
        frame[row : row + 5, column : column + 5] = colour
    return frames


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    spec = DatasetSpec(
        env_ids=("Dot-v0",), block=2, action_dim=1, proprio=(Field("x", "m", -1.0, 1.0),),
        cameras={"front": (SIZE, SIZE), "wrist": (SIZE, SIZE)},
    )  # fmt: skip
    store = EpisodeStore.create(tmp_path_factory.mktemp("data") / "dots", spec)
    rng = np.random.default_rng(0)
    for seed in range(20):
        store.append(
            Episode(
                env_id="Dot-v0", seed=seed, source="random", instruction="go", phases=("move",) * BLOCKS,
                frames={camera: film(rng, camera) for camera in ("front", "wrist")},
                proprio_TP=np.zeros((BLOCKS + 1, 1), np.float32),
                actions_TKA=np.zeros((BLOCKS, 2, 1), np.float32),
                rewards_TK=np.zeros((BLOCKS, 2), np.float32),
                reward_T=np.zeros(BLOCKS + 1, np.float32),
                success_T=np.zeros(BLOCKS + 1, bool), objects_TO=np.zeros((BLOCKS + 1, 0), np.float32),
            )
        )  # fmt: skip
    return store


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, train_tokenizer(store, IBQ_CONFIG, ("front",), CONFIG, out, resume=False)[0]


def evaluations(out):
    lines = [json.loads(line) for line in (out / "train_tokenizer.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/psnr" in line]


def test_learns_what_moves_and_uses_its_codes(trained):
    out, _ = trained
    first, second, last = evaluations(out)
    # Evaluated before the codebook starts there is no figure about codes.
    assert "eval/codes_used" not in first and "eval/codes_used" in second
    assert last["eval/psnr_moving"] > 12
    assert last["eval/codes_used"] > 0.6
    assert last["eval/perplexity"] > 4
    assert 0 <= last["eval/idempotence"] <= 1


def test_saves_what_it_returns(trained, store):
    out, tokenizer = trained
    loaded = IBQFrameTokenizer.from_pretrained(out / "tokenizer")
    frames = store[0].frames["front"]
    codes = tokenizer.encode(frames)
    assert torch.equal(codes, loaded.encode(frames))
    figures = evaluations(out)[-1]
    held = np.concatenate([store[i].frames["front"] for i in np.flatnonzero(held_out_episodes(20, 0.2))])
    error = (tokenizer.decode(tokenizer.encode(held)).astype(float) - held) / 255
    # Decoded frames are cut to whole levels, the figure is not.
    assert -10 * np.log10((error**2).mean()) == pytest.approx(figures["eval/psnr"], abs=0.1)


def test_resume_is_bit_equal(trained, store, tmp_path, monkeypatch):
    out, whole = trained
    loss = stage.TokenizerTrainer.loss

    def killed(self, step, generator):
        if step == 90:
            raise KeyboardInterrupt
        return loss(self, step, generator)

    monkeypatch.setattr(stage.TokenizerTrainer, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(store, IBQ_CONFIG, ("front",), CONFIG, tmp_path, resume=False)
    monkeypatch.undo()
    resumed, _ = train_tokenizer(store, IBQ_CONFIG, ("front",), CONFIG, tmp_path, resume=True)
    for name, tensor in whole.ibq.state_dict().items():
        assert torch.equal(tensor, resumed.ibq.state_dict()[name]), name
    assert evaluations(tmp_path) == evaluations(out)


def test_existing_tokenizer_is_resumed_or_refused(trained, store, monkeypatch):
    out, _ = trained

    def work(*args):
        raise AssertionError("worked before refusing")

    monkeypatch.setattr(stage, "load_frames", work)
    with pytest.raises(ValueError, match=r"--resume .* --out"):
        train_tokenizer(store, IBQ_CONFIG, ("front",), CONFIG, out, resume=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="ibq"):
        train_tokenizer(store, replace(IBQ_CONFIG, n_embed=32), ("front",), CONFIG, out, resume=True)


def test_collapse_stops_the_run(store, tmp_path, monkeypatch):
    def collapse(self, vectors, generator):
        self.codebook.zero_()
        self.codebook[0] = 1000 * vectors.flatten(0, 2).mean(0)

    monkeypatch.setattr(IBQ, "initialise_codebook", collapse)
    config = replace(CONFIG, revive_until=0.0, min_used=0.2, entropy_weight=0.0)
    with pytest.raises(TrainingFailed, match=r"codebook collapsed: \d+\.\d% of 16"):
        train_tokenizer(store, IBQ_CONFIG, ("front",), config, tmp_path, resume=False)


def test_frames_are_bounded_and_episodes_apart(store):
    training, held_out = load_frames(store, ("front", "wrist"), replace(CONFIG, max_frames=30, eval_frames=12))
    assert len(training.frames_MHWC) == 30 and len(held_out.frames_MHWC) == 12
    assert set(training.camera_M.tolist()) == {0, 1}
    background = training.background_CHWC
    assert background[0, 0, 0].tolist() == [90, 110, 130] and background[1, 0, 0].tolist() == [40, 40, 40]
    all_training, all_held = load_frames(store, ("front",), CONFIG)
    assert len(all_training.frames_MHWC) == 16 * (BLOCKS + 1) and len(all_held.frames_MHWC) == 4 * (BLOCKS + 1)
    seen = {frame.numpy().tobytes() for frame in all_training.frames_MHWC}
    expected = {
        store[i].frames["front"][t].tobytes() for i in np.flatnonzero(~held_out_episodes(20, 0.2)) for t in range(5)
    }
    assert seen == expected


def test_moving_pixels_are_those_that_left_the_background(store):
    training, _ = load_frames(store, ("front",), CONFIG)
    moving = training.moving(torch.arange(6), threshold=16)
    assert moving.shape == (6, SIZE, SIZE)
    assert moving.flatten(1).sum(1).tolist() == [25] * 6


@pytest.mark.parametrize(
    ("cameras", "ibq", "match"),
    [
        (("side",), IBQ_CONFIG, r"'side' .* front, wrist"),
        (("front",), replace(IBQ_CONFIG, resolution=32), "16 x 16 pixels.*32 x 32"),
    ],
)
def test_cameras_that_do_not_fit_are_refused(store, tmp_path, cameras, ibq, match):
    with pytest.raises(ValueError, match=match):
        train_tokenizer(store, ibq, cameras, CONFIG, tmp_path, resume=False)


@pytest.mark.parametrize("count", [2, 8, 20, 400])
def test_split_is_spread_over_alternating_environments(count):
    held = np.flatnonzero(held_out_episodes(count, 0.05))
    assert len(held) == max(1, round(0.05 * count))
    assert count < 100 or 0.3 < (held % 2).mean() < 0.7
    with pytest.raises(ValueError, match="at least 2"):
        held_out_episodes(1, 0.05)
