"""A small policy to reinforce: it acts on what an eye reads off its pictures, and learns in minutes of one CPU core.

Two layers, four tokens a frame, which say little; what they would have to say an eye says (`train eye`). All else is as
it is: the token stream, the loops, the simulator.

emu-embodied train eye --data runs/data --out runs/eyes
python -m emu_embodied.experiments.small_policy --data runs/data --eye runs/eyes/eye --env PandaReach-v0 --minutes 1 \
    --out runs/small
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.models.eye import Eye
from emu_embodied.models.ibq import IBQ, IBQConfig, to_pixels
from emu_embodied.presets import Preset
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.train.loop import LoopConfig
from emu_embodied.train.policy import PolicyTraining, train_policy
from emu_embodied.train.pretrain import WorldTraining, new_world

PRESET = Preset(
    layers=2, width=96, mlp=192, heads=4, kv_heads=2, head_dim=24, action_bins=16, state_bins=32, reward_bins=32,
    context_states=1, max_states=3,
    ibq=IBQConfig(
        patch=16, ch=16, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(), z_channels=8, embed_dim=8, n_embed=32,
        norm_groups=4, resolution=64,
    ),
)  # fmt: skip
"""Four tokens a frame; bins of about a centimetre."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallPolicy:
    """What to clone."""

    data: Path
    """Dataset that tells where things are."""
    eye: Path
    """Folder of an eye for them."""
    env: str
    """Environment of it that is imitated."""
    episodes: int | None = None
    """Imitate only so many episodes, for policies of chosen strength."""
    sources: str = "expert,noisy"
    """Behaviours that are imitated, with commas between."""
    minutes: float | None = None
    """Time [min]."""
    steps: int = 2000
    """Optimizer steps."""
    world_windows: int = 4
    """Windows of states in a batch that the world role is trained on."""
    seed: int = 0
    """Of weights and batches."""
    out: Path
    """Checkpoint folder."""


def main(asked: SmallPolicy) -> None:
    """Clone and keep."""
    torch.set_num_threads(1)
    store = EpisodeStore.open(asked.data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(asked.seed)
        ibq = IBQ(PRESET.ibq)
        some = np.concatenate([store[i].frames["front"] for i in range(min(40, len(store)))])
        ibq.initialise_codebook(ibq.vectors(to_pixels(torch.from_numpy(some))).detach(), torch.Generator())
    frames = IBQFrameTokenizer(ibq)
    tokens = encode_dataset(store, frames, ("front",), asked.out / "tokens.safetensors", objects=True)
    world = new_world(store, PRESET, frames, tokens, asked.seed, Eye.from_pretrained(asked.eye))
    world.config = replace(world.config, paths=("uniform",), decoding="dida")
    training = PolicyTraining(
        loop=LoopConfig(
            steps=asked.steps, max_minutes=asked.minutes, learning_rate=3e-3, warmup_steps=20, ema_decay=0.98,
            optimizer="muon", eval_every=500, save_every=100_000, threads=1, seed=asked.seed,
        ),
        batch=64,
        sources=tuple(asked.sources.split(",")),
        env_ids=(asked.env,),
        episodes=asked.episodes,
        world_windows=asked.world_windows,
        context_noise=0.0,
        world=WorldTraining(subgoal_share=0.0, object_noise=0.0),
    )  # fmt: skip
    train_policy(store, world, training, asked.out, resume=False)


if __name__ == "__main__":
    main(tyro.cli(SmallPolicy, description=__doc__))
