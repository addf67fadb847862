"""Stage ``policy``: behaviour cloning, on top of a world model and without losing it.

The policy role learns from decisions (one situation, the block that a good behaviour chose there): a fraction of a
window's tokens, so a batch holds many more of them. Beside them a few windows of states keep the world role alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from emu_embodied.acting import Situations, by_length, past_embeds
from emu_embodied.data.batches import IMITATED, TokenDataset, encode_dataset
from emu_embodied.data.episodes import EpisodeStore, IndexEntry
from emu_embodied.decode.actions import ActionDecoder
from emu_embodied.hardware import pick_device
from emu_embodied.records import Stream
from emu_embodied.train.adapt import check_same_recording
from emu_embodied.train.evaluation import Judge
from emu_embodied.train.loop import LoopConfig, LoopResult, LossOutput, run_loop
from emu_embodied.train.losses import ordinal_cross_entropy
from emu_embodied.train.meta import write_training_meta
from emu_embodied.train.numbers import NumberTraining
from emu_embodied.train.parallel import dida_loss
from emu_embodied.train.pretrain import WorldData, WorldTraining, next_token_loss, prepare_data
from emu_embodied.train.state import has_state
from emu_embodied.train.windows import disturbed, misjudged
from emu_embodied.world_model import WorldModel

ASTRAY = "random"
"""Phase of blocks in which a behaviour worth imitating did something else on purpose (``noisy`` strays)."""

HELD_OUT_DECISIONS = 512
"""Held-out decisions an evaluation reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyTraining:
    """How the policy role is cloned."""

    loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=2000, learning_rate=1e-3, warmup_steps=20, ema_decay=0.98)
    )
    """Length, rate and device."""
    batch: int = 64
    """Decisions in a batch."""
    sources: tuple[str, ...] = IMITATED
    """Behaviours that are imitated."""
    env_ids: tuple[str, ...] = ()
    """Environments whose episodes are imitated; none: all of the dataset."""
    episodes: int | None = None
    """Imitate only the first so many episodes of each environment, for policies of chosen strength."""
    solved_only: bool = False
    """Imitate only episodes that end in success."""
    stream: Stream = "pictures"
    """What a decision looks at: frames and numbers, or numbers alone, where an eye reads them."""
    context_states: int = 1
    """Latest states a decision looks at [states]; see ``acting.Actor``."""
    smoothing: float = 1.0
    """Targets are Gaussians over neighbouring bins of this width [bins]; 0 is plain cross-entropy. Widths up to one
    bin (1/32 of the range at 64 bins) cost no precision worth having and pass on that bins are ordered."""
    context_noise: float = 0.05
    """Largest share of frame codes of a situation replaced by random ones."""
    held_out: float = 0.05
    """Share of the imitated episodes kept for evaluation."""
    world_windows: int = 2
    """Windows of states in each batch that the world role is trained on; 0 lets it be forgotten, and reads only the
    episodes that are imitated."""
    world_weight: float = 0.5
    """Weight of their loss beside that of the decisions."""
    world: WorldTraining = field(default_factory=lambda: WorldTraining(subgoal_share=0.0))
    """How the world role is trained on them (its ``loop`` and ``batch`` are not looked at)."""

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: naming the field and its range.
        """
        for name, least in (("batch", 1), ("context_states", 1), ("world_windows", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be at least {least}")
        if self.episodes is not None and self.episodes < 2:
            raise ValueError(f"episodes is {self.episodes}, it has to be at least 2: one is held out for judging")
        for name in ("smoothing", "world_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be at least 0")
        if not 0 <= self.context_noise <= 1:
            raise ValueError(f"context_noise is {self.context_noise}, it has to lie in [0, 1]")


@dataclass(frozen=True, slots=True)
class Decisions:
    """The decisions of some episodes: every block chosen on purpose in a state that is not solved yet.

    Attributes:
        tokens: the episodes.
        text_EL: their text segments.
        rows: of each environment, int64 rows of ``tokens`` in which a decision was made.
        episode_M: int64, the episode of each row of ``tokens`` (-1 for rows of other episodes).
    """

    tokens: TokenDataset
    text_EL: torch.Tensor
    rows: tuple[torch.Tensor, ...]
    episode_M: torch.Tensor

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    @classmethod
    def build(cls, world: WorldModel, tokens: TokenDataset) -> Decisions:
        """Find the decisions.

        Raises:
            ValueError: if there are none, or an instruction is too long.
        """
        texts = [world.layout.text_ids(world.text.encode(told)) for told in tokens.instructions]
        episode_M = torch.full((len(tokens.codes_MN),), -1)
        found: dict[int, list[int]] = {}
        for e, (first, env) in enumerate(zip(tokens.first_E.tolist(), tokens.env_E.tolist(), strict=True)):
            episode_M[first : first + int(tokens.length_E[e])] = e
            rows = [first + t for t, phase in enumerate(tokens.phases[e]) if phase != ASTRAY]
            found.setdefault(env, []).extend(row for row in rows if not bool(tokens.success_M[row]))
        rows_of = tuple(torch.tensor(rows) for _, rows in sorted(found.items()) if rows)
        if not rows_of:
            raise ValueError("no decision to imitate: every state of these episodes is solved")
        return cls(tokens, torch.stack(texts), rows_of, episode_M)

    def sample(
        self, world: WorldModel, count: int, config: PolicyTraining, generator: torch.Generator, *, noise: bool = True
    ) -> tuple[Situations, torch.Tensor]:
        """Draw decisions, every environment as often as any other.

        Args:
            world: whose tokens the situations are made of.
            count: B.
            config: how many states a situation has, and how much it is disturbed.
            generator: CPU generator.
            noise: disturb what is seen.

        Returns:
            Situations and the action bins int64 [B, A] that were chosen, both on the CPU.
        """
        sizes = torch.tensor([len(rows) for rows in self.rows])
        env = torch.randint(len(self.rows), (count,), generator=generator)
        place = (torch.rand(count, generator=generator) * sizes[env]).long()
        row_B = torch.stack([self.rows[e][p] for e, p in zip(env.tolist(), place.tolist(), strict=True)])
        episode_B = self.episode_M[row_B]
        first_B = self.tokens.first_E[episode_B]
        back_T = torch.arange(1 - config.context_states, 1)
        rows_BT = torch.maximum(row_B[:, None] + back_T, first_B[:, None])
        codes_BTN = self.tokens.codes_MN[rows_BT].long()
        proprio_BTP = world.proprio.encode(self.tokens.proprio_MP[rows_BT])
        if noise:
            codes_BTN = disturbed(codes_BTN, world.config.codebook, config.context_noise, generator)
            proprio_BTP = misjudged(proprio_BTP, world, config.world.object_noise, generator)
        situations = Situations(
            self.text_EL[episode_B],
            codes_BTN,
            proprio_BTP,
            self.tokens.actions_MKA[rows_BT[:, :-1]],
            (row_B - first_B + 1).clamp(max=config.context_states),
        )
        return situations, world.actions.encode(self.tokens.actions_MKA[row_B])


def imitated(store: EpisodeStore, config: PolicyTraining) -> EpisodeStore:
    """The part of a dataset that is imitated, in the order of recording.

    Raises:
        ValueError: if an environment is not in the dataset, or fewer than two episodes are left.
    """
    known = store.spec.env_ids
    if unknown := sorted(set(config.env_ids) - set(known)):
        raise ValueError(f"{store.folder} has no episodes of {', '.join(unknown)}: it was recorded from {known}")
    taken: list[IndexEntry] = []
    counts = dict.fromkeys(config.env_ids or known, 0)
    for entry in sorted(store.entries, key=lambda entry: entry.file):
        wanted = entry.source in config.sources and (entry.success or not config.solved_only)
        if not wanted or entry.env_id not in counts or counts[entry.env_id] == config.episodes:
            continue
        counts[entry.env_id] += 1
        taken.append(entry)
    if len(taken) < 2:
        have = ", ".join(sorted({entry.source for entry in store.entries}))
        raise ValueError(
            f"{store.folder} has {len(taken)} episodes to imitate (of {', '.join(config.sources)}), at least 2 are "
            f"needed; it holds {have or 'none'}"
        )
    return EpisodeStore(store.folder, store.spec, taken)


def train_policy(
    store: EpisodeStore, world: WorldModel, config: PolicyTraining, out: Path, *, resume: bool
) -> LoopResult:
    """Clone the behaviours of a dataset into a world model's policy role and keep the result in ``out``.

    Args:
        store: recorded like the model's own data.
        world: to start from.
        config: how.
        out: checkpoint folder.
        resume: go on with a run that was stopped in ``out``.

    Raises:
        ValueError: if ``out`` holds a world model and ``resume`` is off, the dataset was recorded with other blocks,
            cameras or environments than the model's, or has nothing to imitate.
        TrainingFailed: on NaN or divergence.
    """
    check_same_recording(store, world)
    if not 1 <= config.context_states < world.config.max_states:
        raise ValueError(
            f"context_states is {config.context_states}: these weights act on 1 to {world.config.max_states - 1} states"
        )
    chosen = imitated(store, config)
    if (out / "world.json").exists() and not (resume and has_state(out / "training" / "policy")):
        raise ValueError(f"{out} holds a world model: train into another --out, or --resume a run that was stopped")
    device = pick_device(config.loop.device)
    world.frames.ibq.to(device)
    world.backbone.to(device)
    known = store.data_hash if world.config.data_hash == "none" else world.config.data_hash
    world.config = replace(
        world.config, data_hash=known, policy_states=config.context_states, policy_stream=config.stream
    )
    learner = _Learner(store, chosen, world, config, out)
    backbone = world.backbone.requires_grad_(True)

    def save(step: int) -> None:
        world.save_pretrained(out)

    result = run_loop(
        config.loop,
        backbone,
        learner.loss,
        out,
        stage="policy",
        resume=resume,
        describe={
            "data": chosen.data_hash,
            "backbone": backbone.config.to_diff_dict(),
            "batch": config.batch,
            "context": config.context_states,
            "world": [config.world_windows, config.world_weight],
            **({} if config.stream == "pictures" else {"stream": config.stream}),
        },
        save=save,
        evaluate=learner.figures,
        unit="tokens",
    )
    write_training_meta(out, "policy", config, chosen, result)
    return result


class _Learner:
    """Draws the batches of the stage, scores them, and judges on what was held out."""

    def __init__(
        self, store: EpisodeStore, chosen: EpisodeStore, world: WorldModel, config: PolicyTraining, out: Path
    ) -> None:
        self.world, self.config = world, config
        self.actor = world.with_stream(config.stream)
        self.decoder = ActionDecoder(world.backbone, self.actor.layout)
        cameras, objects = world.config.cameras, bool(world.config.objects)
        tokens = encode_dataset(chosen, world.frames, cameras, out / "imitated.safetensors", objects=objects)
        parts = tokens.split(config.held_out)
        if config.stream == "numbers":
            parts = (parts[0].without_frames(), parts[1].without_frames())
        self.train, self.held_out = (Decisions.build(world, part) for part in parts)
        self.paths = [world.path(name) for name in world.config.paths]
        self.windows: WorldData | None = None
        if config.world_windows and config.world_weight:
            tokens = encode_dataset(store, world.frames, cameras, out / "tokens.safetensors", objects=objects)
            self.windows = prepare_data(world, tokens, config.world.held_out)
            self.numbers = NumberTraining(world, self.windows, config.world, self.paths)

    def loss(self, step: int, generator: torch.Generator) -> LossOutput:
        """Of one batch of decisions, and of the windows beside them."""
        world, config = self.world, self.config
        situations, bins_BA = self.train.sample(self.actor, config.batch, config, generator)
        imitation, tokens = self._imitation(situations, bins_BA)
        if self.windows is None:
            return LossOutput(imitation, {"action": imitation.detach()}, tokens)
        data = self.windows
        batch = data.train.sample(config.world_windows, world.config.max_states, data.text_train_EL, generator)
        batch = batch.to(world.device)
        if self.paths:
            own = dida_loss(world, batch, config.world, self.paths, generator)
            own = self.numbers.mix(own, generator)
        else:
            own = next_token_loss(world, batch, config.world, generator)
        logs = {f"world/{name}": value for name, value in own.logs.items() if name != "action"}
        logs |= {"action": imitation.detach(), "world": own.loss.detach()}
        return LossOutput(imitation + config.world_weight * own.loss, logs, tokens + own.items)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Of held-out decisions, undisturbed: loss, mean error of the likeliest bins, entropy; and the world role's."""
        world, config = self.world, self.config
        generator = torch.Generator().manual_seed(0)
        right, error, entropy, loss = [], [], [], []
        for _ in range(max(1, HELD_OUT_DECISIONS // config.batch)):
            situations, bins_BA = self.held_out.sample(self.actor, config.batch, config, generator, noise=False)
            logits_BAV, bins_BA = self._logits(situations, bins_BA)
            loss.append(ordinal_cross_entropy(logits_BAV, bins_BA, config.smoothing))
            off_BA = (logits_BAV.argmax(-1) - bins_BA).abs()
            right.append((off_BA <= 1).float())
            error.append(off_BA * 2.0 / world.config.action_bins)
            found = torch.log_softmax(logits_BAV, -1)
            entropy.append(-(found.exp() * found).sum(-1))
        figures = {
            "action": float(torch.stack(loss).mean()),
            "action_within_a_bin": float(torch.cat(right).mean()),
            "action_mae": float(torch.cat(error).mean()),
            "action_entropy": float(torch.cat(entropy).mean()),
        }
        if self.windows is not None:
            judge = Judge(world, self.windows, config.world)
            found_too = judge.parallel() | self.numbers.figures() if self.paths else judge.next_token()
            figures |= {f"world/{name}": value for name, value in found_too.items()}
        return figures

    def _imitation(self, situations: Situations, bins_BA: torch.Tensor) -> tuple[torch.Tensor, int]:
        logits_BAV, bins_BA = self._logits(situations, bins_BA)
        tokens = len(bins_BA) * (self.world.layout.length(self.config.context_states) + bins_BA.shape[1])
        return ordinal_cross_entropy(logits_BAV, bins_BA, self.config.smoothing), tokens

    def _logits(self, situations: Situations, bins_BA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the chosen bins given those before, and these bins, in the order of the situations' lengths."""
        logits, chosen = [], []
        for rows, part in by_length(situations):
            here = bins_BA[rows].to(self.world.device)
            logits.append(self.decoder.logits(past_embeds(self.actor, part), here))
            chosen.append(here)
        return torch.cat(logits), torch.cat(chosen)
