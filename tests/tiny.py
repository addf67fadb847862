"""Everything at toy size: a dot that moves over a table of 8 x 8 pixels, its dataset, and models of one layer.

Shape letters: see ``emu_embodied.records``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from emu_embodied.data.episodes import DatasetSpec, EpisodeStore
from emu_embodied.models.eye import Eye, EyeConfig
from emu_embodied.models.ibq import IBQ, IBQConfig, to_pixels
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.presets import Preset
from emu_embodied.records import Episode, Field, Observation
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.tokens.sequence import StateTokens
from emu_embodied.train.loop import LoopConfig
from emu_embodied.train.pretrain import WorldTraining
from emu_embodied.world_config import WorldModelConfig
from emu_embodied.world_model import WorldModel

SIZE, BLOCK, ACTIONS = 8, 2, 2
CAMERAS = ("front", "wrist")
FIELDS = (Field("x", "m", 0.0, 1.0), Field("y", "m", 0.0, 1.0), Field("grip", "1", -1.0, 1.0))
OBJECTS = (Field("dot_x", "m", 0.0, 1.0), Field("dot_y", "m", 0.0, 1.0))
IBQ_CONFIG = IBQConfig(
    ch=4, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), resolution=SIZE, z_channels=4, embed_dim=4,
    n_embed=12, norm_groups=2, patch=2,
)  # fmt: skip
PRESET = Preset(
    layers=1, width=16, mlp=32, heads=2, kv_heads=1, head_dim=8, ibq=IBQ_CONFIG, image_size=SIZE, cameras=CAMERAS,
    block=BLOCK, text_length=12, action_bins=8, state_bins=16, reward_bins=8, context_states=2, max_states=4,
)  # fmt: skip
TRAINING = WorldTraining(
    loop=LoopConfig(
        steps=30, learning_rate=1e-2, warmup_steps=2, ema_decay=0.5, log_every=5, eval_every=100, save_every=10,
        threads=1, device="cpu", dtype="float32",
    ),
    batch=4,
    held_out=0.25,
)  # fmt: skip


def draw(x: float, y: float) -> dict[str, np.ndarray]:
    """The dot from above, and on a dark table for the other camera."""
    frames = {"front": np.full((SIZE, SIZE, 3), 90, np.uint8), "wrist": np.full((SIZE, SIZE, 3), 20, np.uint8)}
    row, column = int(y * (SIZE - 2)), int(x * (SIZE - 2))
    frames["front"][row : row + 2, column : column + 2] = (255, 40, 0)
    frames["wrist"][column : column + 2, row : row + 2] = (0, 200, 255)
    return frames


def make_episode(seed: int = 0, blocks: int = 5, env_id: str = "Dot-v0", source: str = "expert") -> Episode:
    """A dot that drifts as its actions say; the reward grows to the right."""
    rng = np.random.default_rng(seed)
    place = rng.uniform(0.2, 0.8, 2)
    actions = rng.uniform(-1, 1, (blocks, BLOCK, ACTIONS)).astype(np.float32)
    places = [place]
    for action_KA in actions:
        places.append(np.clip(places[-1] + 0.2 * action_KA.sum(0), 0, 1))
    states = np.stack(places)
    frames = [draw(*state) for state in states]
    reward = states[:, 0].astype(np.float32)
    return Episode(
        env_id=env_id,
        seed=seed,
        source=source,
        instruction=f"go right {seed % 3}",
        frames={camera: np.stack([frame[camera] for frame in frames]) for camera in CAMERAS},
        proprio_TP=np.concatenate([states, rng.uniform(-1, 1, (blocks + 1, 1))], 1).astype(np.float32),
        actions_TKA=actions,
        rewards_TK=np.repeat(reward[1:, None], BLOCK, 1),
        reward_T=reward,
        success_T=reward > 0.8,
        phases=("drift",) * blocks,
        objects_TO=states.astype(np.float32),
    )


def make_store(folder: Path, episodes: int = 8, block: int = BLOCK) -> EpisodeStore:
    """A dataset of 5 blocks an episode."""
    sizes = dict.fromkeys(CAMERAS, (SIZE, SIZE))
    spec = DatasetSpec(
        env_ids=("Dot-v0",), block=block, action_dim=ACTIONS, cameras=sizes, proprio=FIELDS, objects=OBJECTS
    )
    store = EpisodeStore.create(folder, spec)
    for seed in range(episodes):
        episode = make_episode(seed, source=("expert", "noisy", "random", "play")[seed % 4])
        if block != BLOCK:
            actions, rewards = episode.actions_TKA[:, :1], episode.rewards_TK[:, :1]
            episode = replace(episode, actions_TKA=actions.repeat(block, 1), rewards_TK=rewards.repeat(block, 1))
        store.append(episode)
    return store


def make_tokenizer(seed: int = 0) -> IBQFrameTokenizer:
    """An untrained tokenizer whose codebook is spread over what it gives for dots."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ibq = IBQ(IBQ_CONFIG)
        frames = np.concatenate([make_episode(i).frames[camera] for i in range(4) for camera in CAMERAS])
        vectors = ibq.vectors(to_pixels(torch.from_numpy(frames))).detach()
        ibq.initialise_codebook(vectors, torch.Generator().manual_seed(seed))
    return IBQFrameTokenizer(ibq)


def make_world(seed: int = 0, **changes: object) -> WorldModel:
    """A world model of random weights, adapted in name; every part of its input moves its output."""
    values: dict = {
        "env_ids": ("Dot-v0",), "data_hash": "0" * 64, "cameras": CAMERAS, "image_size": SIZE, "camera_tokens": 4,
        "codebook": IBQ_CONFIG.n_embed, "block": BLOCK, "action_dim": ACTIONS, "proprio": FIELDS, "text_length": 12,
        "action_bins": 8, "state_bins": 16, "reward_bins": 8, "context_states": 2, "max_states": 4,
        "paths": ("uniform",), "decoding": "dida", "changes": True,
    }  # fmt: skip
    config = WorldModelConfig(**(values | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = PRESET.backbone(ACTIONS)
        shape.vocab_size = config.layout.vocabulary.size
        backbone = EmuForCausalLM(shape)
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    eye = None
    if config.objects:
        eye = make_eye(config.objects, seed, cameras=config.cameras, image_size=config.image_size)
    return WorldModel(config, backbone, make_tokenizer(seed), eye=eye)


def make_eye(
    objects: tuple[Field, ...] = OBJECTS,
    seed: int = 0,
    *,
    cameras: tuple[str, ...] = CAMERAS,
    image_size: int = SIZE,
) -> Eye:
    """An untrained eye: every part of its input moves what it says by a tiny model's bins, about the ranges' middle."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        eye = Eye(EyeConfig(cameras=cameras, image_size=image_size, objects=objects, text_length=12, width=8))
        for parameter in eye.parameters():
            torch.nn.init.normal_(parameter, std=0.26)
        grey = torch.zeros(1, 3 * len(cameras), image_size, image_size)
        *_, last = eye.head
        with torch.no_grad():
            last.bias -= eye(grey, eye.text(["reach the dot"]))[0]
    return eye


def observation(episode: Episode, t: int) -> Observation:
    """State ``t`` of an episode as it was seen."""
    frames = {camera: images[t] for camera, images in episode.frames.items()}
    return Observation(frames, episode.proprio_TP[t], episode.instruction)


def seen(world: WorldModel, observation: Observation) -> StateTokens:
    """An observation as a model without objects reads it, [N] and [P]."""
    return StateTokens(world.encode_frames(observation.frames), world.proprio.encode(torch.tensor(observation.proprio)))


def plans(count: int, horizon: int, seed: int = 0) -> torch.Tensor:
    """Random action sequences [S, H, K, A] in [-1, 1]."""
    return torch.rand(count, horizon, BLOCK, ACTIONS, generator=torch.Generator().manual_seed(seed)) * 2 - 1
