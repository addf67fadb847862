"""Stage ``reward``: where the simulator says that everything is, and what it says that this is worth.

Shape letters: M states in memory, P proprio numbers, O object numbers, B batch, L bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.data.split import held_out_episodes
from emu_embodied.models.reward_model import RewardModel, RewardModelConfig
from emu_embodied.tokens.states import ProprioTokenizer
from emu_embodied.train.loop import LoopConfig, LoopResult, LossOutput, run_loop
from emu_embodied.train.meta import write_training_meta

_SPARE_BYTES = 8
"""Room for instructions longer than those of the dataset; reading text is most of a training step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTraining:
    """How a reward model is trained."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=4000, learning_rate=2e-3, ema_decay=0.99, weight_decay=1e-4)
    )
    """Length, rate and device."""
    batch: int = 1024
    """States in a batch [states]."""
    held_out: float = 0.05
    """Share of episodes kept for evaluation."""


@dataclass(frozen=True, slots=True)
class Verdicts:
    """States in memory, and what the simulator said of them.

    Attributes:
        numbers_MX: float32, proprio and objects in the fields' units.
        reward_M: float32 in [0, 1].
        success_M: float32, 0 or 1.
        instruction_M: int64, number of each state's instruction.
        env_M: int64, number of each state's environment.
        instructions: all of them.
    """

    numbers_MX: torch.Tensor
    reward_M: torch.Tensor
    success_M: torch.Tensor
    instruction_M: torch.Tensor
    env_M: torch.Tensor
    instructions: tuple[str, ...]

    def judged(self, model: RewardModel, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a model says of some states, logits [B, 2], and the reward and success it should say."""
        told, which_B = self.instruction_M[chosen].unique(return_inverse=True)
        text = model.text([self.instructions[i] for i in told.tolist()])
        logits_B2 = model(self.numbers_MX[chosen].to(model.device), model.told(text)[which_B.to(model.device)])
        wanted_B2 = torch.stack([self.reward_M[chosen], self.success_M[chosen]], 1)
        return logits_B2.float(), wanted_B2.to(model.device)


def train_reward_model(
    store: EpisodeStore, config: RewardTraining, out: Path, *, resume: bool
) -> tuple[RewardModel, LoopResult]:
    """Train a reward model on what a dataset tells of objects and rewards, and keep it in ``out/reward``.

    Args:
        store: dataset; every environment in it counts alike.
        config: how it is trained.
        out: the run's folder.
        resume: go on from an earlier run in ``out``.

    Returns:
        The model with the averaged weights, on the training device, and how the run ended.

    Raises:
        ValueError: if ``out`` holds one and ``resume`` is off, or the dataset tells of no objects.
        TrainingFailed: on NaN or divergence.
    """
    folder = out / RewardModel.kind
    if folder.exists() and not resume:
        raise ValueError(f"{folder} exists: pass --resume to train it further, or another --out")
    if not store.spec.objects:
        raise ValueError(f"{store.folder} does not tell where things are: collect it anew with this version")
    held = held_out_episodes(len(store), config.held_out)
    seen = _read(store, np.flatnonzero(~held))
    judged = _read(store, np.flatnonzero(held))
    low, high = np.quantile(seen.numbers_MX.numpy(), [0.001, 0.999], axis=0).tolist()
    fields = ProprioTokenizer.fit((*store.spec.proprio, *store.spec.objects), low, high, bins=2).fields
    known = len(store.spec.proprio)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.loop.seed)  # module initialisers know only the global generator
        model = RewardModel(
            RewardModelConfig(
                env_ids=store.spec.env_ids,
                proprio=fields[:known],
                objects=fields[known:],
                text_length=max(len(text.encode()) for text in seen.instructions) + _SPARE_BYTES,
            )
        )
    evenly_M = 1 / seen.env_M.bincount()[seen.env_M].float()

    def loss_fn(step: int, generator: torch.Generator) -> LossOutput:
        chosen = torch.multinomial(evenly_M, config.batch, replacement=True, generator=generator)
        loss = F.binary_cross_entropy_with_logits(*seen.judged(model, chosen))
        return LossOutput(loss, items=config.batch)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """Of held-out episodes: mean error of the reward, share of states told rightly whether they are solved."""
        rows = torch.arange(len(judged.reward_M))
        parts = [judged.judged(model, part) for part in rows.split(1024)]
        found, wanted = (torch.cat(part) for part in zip(*parts, strict=True))
        right = (found[:, 1] > 0) == (wanted[:, 1] > 0.5)
        error = (torch.sigmoid(found[:, 0]) - wanted[:, 0]).abs()
        return {"reward_mae": float(error.mean()), "success_accuracy": float(right.float().mean())}

    result = run_loop(
        config.loop,
        model,
        loss_fn,
        out,
        stage="reward",
        resume=resume,
        describe={"data": store.data_hash, "batch": config.batch, "reward": asdict(model.config)},
        save=lambda step: model.save_pretrained(folder),
        evaluate=evaluate,
        unit="states",
    )
    write_training_meta(out, "reward", config, store, result)
    return model.eval().requires_grad_(False), result


def _read(store: EpisodeStore, episodes: np.ndarray) -> Verdicts:
    numbers: list[np.ndarray] = []
    reward: list[np.ndarray] = []
    success: list[np.ndarray] = []
    told: list[np.ndarray] = []
    env: list[np.ndarray] = []
    texts: dict[str, int] = {}
    for episode in tqdm(store.iter_valid(episodes), desc="read numbers", total=len(episodes), unit="ep"):
        numbers.append(np.concatenate([episode.proprio_TP, episode.objects_TO], 1))
        reward.append(episode.reward_T)
        success.append(episode.success_T)
        states = len(episode) + 1
        told.append(np.full(states, texts.setdefault(episode.instruction, len(texts))))
        env.append(np.full(states, store.spec.env_ids.index(episode.env_id)))
    if not texts:
        raise ValueError(f"{store.folder} has no readable episode: run `emu-embodied collect` first")
    return Verdicts(
        torch.from_numpy(np.concatenate(numbers)).float(),
        torch.from_numpy(np.concatenate(reward)).float(),
        torch.from_numpy(np.concatenate(success)).float(),
        torch.from_numpy(np.concatenate(told)),
        torch.from_numpy(np.concatenate(env)),
        tuple(texts),
    )
