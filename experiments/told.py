"""A policy that is told where things are: reinforcement without the question of what a small model sees.

The shipped size takes hours of a CPU to find a ball in a picture, and a policy that does not see its goal is not
reinforced in a thousand rollouts. Here the numbers of the objects (``Observation.objects``), which a model of this
project otherwise reads out of its frames, come from the simulator; the frame is four tokens that say little. All else
is as it is: the token stream, the loops, the simulator.

python -m emu_embodied.experiments.told --data runs/data --env PandaReach-v0 --minutes 4 --out runs/told
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from emu_embodied.acting import Actor
from emu_embodied.data.batches import encode_dataset
from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.models.ibq import IBQ, IBQConfig, to_pixels
from emu_embodied.presets import Preset
from emu_embodied.records import Observation
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


class ToldActor(Actor):
    """Acts on what the simulator says of the objects instead of what the model sees of them."""

    def _tokens(self, text_BL: torch.Tensor, observations: Sequence[Observation]) -> tuple[torch.Tensor, torch.Tensor]:
        codes_BN, bins_BP = super()._tokens(text_BL, observations)
        objects = np.stack([observation.objects for observation in observations])
        known = len(self.world.config.proprio)
        numbers = torch.cat([self.world.proprio.decode(bins_BP)[:, :known].cpu(), torch.from_numpy(objects)], 1)
        return codes_BN, self.world.proprio.encode(numbers.to(self.device))

    def _with_objects(self, text_BL: torch.Tensor, codes_BN: torch.Tensor, bins_BP: torch.Tensor) -> torch.Tensor:
        return bins_BP


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What to clone."""

    data: Path
    """Dataset with objects."""
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


def main(told: Told) -> None:
    """Clone and keep."""
    torch.set_num_threads(1)
    store = EpisodeStore.open(told.data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(told.seed)
        ibq = IBQ(PRESET.ibq)
        some = np.concatenate([store[i].frames["front"] for i in range(min(40, len(store)))])
        ibq.initialise_codebook(ibq.vectors(to_pixels(torch.from_numpy(some))).detach(), torch.Generator())
    frames = IBQFrameTokenizer(ibq)
    tokens = encode_dataset(store, frames, ("front",), told.out / "tokens.safetensors", objects=True)
    world = new_world(store, PRESET, frames, tokens, told.seed)
    world.config = replace(world.config, paths=("uniform",), decoding="dida")
    training = PolicyTraining(
        loop=LoopConfig(
            steps=told.steps, max_minutes=told.minutes, learning_rate=3e-3, warmup_steps=20, ema_decay=0.98,
            optimizer="muon", eval_every=500, save_every=100_000, threads=1, seed=told.seed,
        ),
        batch=64,
        sources=tuple(told.sources.split(",")),
        env_ids=(told.env,),
        episodes=told.episodes,
        world_windows=told.world_windows,
        context_noise=0.0,
        world=WorldTraining(subgoal_share=0.0, object_noise=0.0),
    )  # fmt: skip
    train_policy(store, world, training, told.out, resume=False)


if __name__ == "__main__":
    main(tyro.cli(Told, description=__doc__))
