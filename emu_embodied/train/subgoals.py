"""The planner's role: naming the next subtask and picturing its completion, learned beside the world's role.

A share of every batch are windows ``text state (sentence keyframe)^n`` (``tokens/sequence.py``). They are scored as the
others are: next token on everything, and in stage ``dida`` noisy copies of the keyframes, so that one parallel pass
decodes a keyframe as it decodes any state. No action leads to a keyframe, so none is added to its tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from emu_embodied.data.subgoals import DONE, SubgoalBatch, SubgoalIndex, Subtasks
from emu_embodied.decode.grammar import expected_bin
from emu_embodied.decode.paths import StatePath
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import SequenceLayout, StateTokens
from emu_embodied.train.loop import LossOutput
from emu_embodied.train.losses import LossWeights, StateTargets, state_loss
from emu_embodied.train.noise import draw_copies, noisy_logits, sample_times
from emu_embodied.train.windows import WindowTokens, clean_logits, disturbed
from emu_embodied.world_model import WorldModel

if TYPE_CHECKING:
    from emu_embodied.train.pretrain import WorldData, WorldTraining

HELD_OUT_WINDOWS = 128
"""Held-out windows an evaluation reads."""


@dataclass(frozen=True, slots=True)
class SentenceLogits:
    """What a clean stream says of subtasks, M = B * n of them, window-major.

    Attributes:
        follow: [B, T, 2], whether a subtask (0) follows each state or nothing (1).
        text: [M, text_length, text ids + 1], the last of them ends a sentence.
    """

    follow: torch.Tensor
    text: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """Windows of one part of a dataset.

    Attributes:
        index: where they come from.
        text_EL: text segments of its episodes.
        sentences_SL: text segments of its sentences.
    """

    index: SubgoalIndex
    text_EL: torch.Tensor
    sentences_SL: torch.Tensor

    def sample(self, batch: int, steps: int, generator: torch.Generator) -> SubgoalBatch:
        return self.index.sample(batch, steps, self.text_EL, self.sentences_SL, generator)


class SubgoalTraining:
    """Draws windows of subtasks and scores a world model on them; with ``windows`` 0 it does nothing.

    Attributes:
        windows: of a batch, how many are of subtasks.
        steps: subtasks n in a window; 0 if there are no windows.
    """

    def __init__(self, world: WorldModel, data: WorldData, config: WorldTraining, subtasks: Subtasks | None) -> None:
        self.world, self.config = world, config
        self.windows = self.steps = 0
        self._train = self._held_out = None
        share = config.subgoal_share
        if not 0 <= share < 1:
            raise ValueError(f"subgoal_share is {share}, it has to lie in [0, 1)")
        if subtasks is None or share == 0:
            return
        train, held_out = (SubgoalIndex.build(part, subtasks) for part in (data.train, data.held_out))
        if len(train.sentences) == 1 or len(held_out.sentences) == 1:
            warnings.warn("the dataset shows no subtasks that are known: training without subgoals", stacklevel=3)
            return
        self._train = _Part(train, data.text_train_EL, _sentence_ids(world, train.sentences))
        self._held_out = _Part(held_out, data.text_held_EL, _sentence_ids(world, held_out.sentences))
        self.windows = min(max(1, round(share * config.batch)), config.batch - 1)
        if not self.windows:
            raise ValueError("a batch of 1 window has no room for subgoals: use a larger batch or a subgoal_share of 0")
        self.steps = config.subgoal_steps

    @property
    def describe(self) -> dict[str, list[float]]:
        """What has to be the same when a run is resumed."""
        return {"subgoals": [self.windows, self.steps]} if self.windows else {}

    def mix(self, output: LossOutput, step_generator: torch.Generator, paths: Sequence[StatePath] = ()) -> LossOutput:
        """Add what ``windows`` windows of subtasks cost to the loss of the rest of a batch, each window counting alike.

        Args:
            output: of the ``batch - windows`` windows of actions.
            step_generator: of the step.
            paths: noise processes of stage ``dida``; none: next token only.
        """
        if self._train is None:
            return output
        batch = self._train.sample(self.windows, self.steps, step_generator).to(self.world.device)
        own = subgoal_loss(self.world, batch, self.config, step_generator, paths)
        share = self.windows / self.config.batch
        logs = {**output.logs, **{f"subgoal/{name}": value for name, value in own.logs.items()}}
        return LossOutput((1 - share) * output.loss + share * own.loss, logs, output.items + own.items)

    @torch.no_grad()
    def figures(self, path: StatePath | None = None) -> dict[str, float]:
        """Figures on the same held-out windows every time.

        Args:
            path: noise process whose source keyframes are decoded from in one parallel pass; None: next token, every
                earlier token given.
        """
        if self._held_out is None:
            return {}
        world, generator = self.world, torch.Generator().manual_seed(0)
        training = world.backbone.training
        world.backbone.eval()
        sums: dict[str, list[torch.Tensor]] = {}
        for _ in range(max(1, HELD_OUT_WINDOWS // self.config.batch)):
            batch = self._held_out.sample(self.config.batch, self.steps, generator).to(world.device)
            for name, values in _judge(world, batch, path, generator).items():
                sums.setdefault(name, []).append(values.flatten().float())
        world.backbone.train(training)
        return {f"subgoal/{name}": float(torch.cat(values).mean()) for name, values in sums.items()}


def subgoal_tokens(
    world: WorldModel, batch: SubgoalBatch, context_noise: float, generator: torch.Generator
) -> WindowTokens:
    """Tokenise and embed a batch of subtasks; the targets are those of all keyframes, shown or not.

    Args:
        world: whose layout, tokenizers and backbone are used.
        batch: on the backbone's device.
        context_noise: see ``train.windows.disturbed``.
        generator: CPU generator.
    """
    layout, backbone = world.layout, world.backbone
    proprio_BTP = world.proprio.encode(batch.proprio_BTP)
    context_BTN = disturbed(batch.codes_BTN, layout.vocabulary.vision.size, context_noise, generator)
    embeds = layout.interleave(
        backbone.embed(batch.text_BL),
        backbone.embed(layout.state_ids(context_BTN, proprio_BTP)),
        backbone.embed(batch.subtasks_BTL),
    )
    rows, steps = batch.subtasks_BTL.shape[:2]
    keyframes = slice(1, None)
    targets = StateTargets(
        batch.codes_BTN[:, keyframes].flatten(0, 1),
        proprio_BTP[:, keyframes].flatten(0, 1),
        world.reward.encode(batch.reward_BT[:, keyframes]).flatten(),
        batch.success_BT[:, keyframes].long().flatten(),
        (batch.codes_BTN[:, 1:] != batch.codes_BTN[:, :-1]).flatten(0, 1),
    )
    return WindowTokens(
        embeds_BLD=embeds,
        starts=tuple(layout.keyframe_offset(k) for k in range(steps)),
        condition_BTD=embeds.new_zeros(rows, steps, embeds.shape[-1]),
        action_bins_BTA=batch.subtasks_BTL.new_zeros(rows, steps, 0),
        before=StateTokens(context_BTN[:, :-1], proprio_BTP[:, :-1]),
        targets=targets,
    )


def sentence_logits(backbone: EmuForCausalLM, layout: SequenceLayout, hidden_BLD: torch.Tensor) -> SentenceLogits:
    """What the hidden vectors of a clean stream of subtasks say of what follows, and in which words."""
    _, states_BTLD, subtasks_BTLD = layout.parse_subgoals(hidden_BLD)
    follow, text = layout.follow_ids, layout.sentence_ids
    return SentenceLogits(
        backbone.head(states_BTLD[:, :, -1], slice(follow.start, follow.stop)),
        backbone.head(subtasks_BTLD[:, :, :-1].flatten(0, 1), slice(text.start, text.stop)),
    )


def subgoal_loss(
    world: WorldModel,
    batch: SubgoalBatch,
    config: WorldTraining,
    generator: torch.Generator,
    paths: Sequence[StatePath] = (),
) -> LossOutput:
    """Weighted loss of a batch of subtasks: what follows each state, its sentence, its keyframe.

    Args:
        world: the model.
        batch: on its device.
        config: weights, context noise and the law of noise times.
        generator: CPU generator.
        paths: noise processes of the keyframes' noisy copies; none: next token only.
    """
    backbone, layout, weights = world.backbone, world.layout, config.weights
    window = subgoal_tokens(world, batch, config.context_noise, generator)
    shown_M = batch.shown_BT.flatten()
    items = window.embeds_BLD[..., 0].numel()
    if paths:
        rows, steps = batch.shown_BT.shape
        times = sample_times(
            (rows, steps), config.noise_shift, config.source_share, generator, asynchronous=config.async_times
        )
        views = noisy_logits(world, window, draw_copies(paths, window, times, generator), flex=config.flex_attention)
        hidden, keyframes = views.hidden_BLD, {"": views.noisy, "clean/": views.clean}
        items += times.numel() * layout.state_tokens
    else:
        hidden = _run(world, window)
        keyframes = {"": clean_logits(backbone, layout, hidden, window)}
    loss, logs = _sentence_loss(sentence_logits(backbone, layout, hidden), batch, layout, weights)
    if bool(shown_M.any()):
        for name, logits in keyframes.items():
            part, part_logs = state_loss(logits.at(shown_M), window.targets.at(shown_M), weights)
            loss = loss + part
            logs |= {f"{name}{key}": value for key, value in part_logs.items()}
    return LossOutput(loss, {"loss": loss.detach(), **logs}, items)


def _sentence_loss(
    logits: SentenceLogits, batch: SubgoalBatch, layout: SequenceLayout, weights: LossWeights
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    known_BT = batch.follows_BT >= DONE
    ends_BT = (batch.follows_BT == DONE).long()
    follow = F.cross_entropy(logits.follow[known_BT], ends_BT[known_BT])
    bytes_ML, asked_ML = _asked_bytes(batch, layout)
    nll_ML = F.cross_entropy(logits.text.movedim(-1, 1), bytes_ML, reduction="none")
    text = (nll_ML * asked_ML).sum() / asked_ML.sum().clamp(min=1)
    return weights.follow * follow + weights.text * text, {"follow": follow.detach(), "text": text.detach()}


def _asked_bytes(batch: SubgoalBatch, layout: SequenceLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes [M, text_length] as places in ``sentence_ids``, and which are asked for: the sentences and their ends."""
    ids = layout.sentence_ids
    bytes_ML = batch.subtasks_BTL[:, :, 1:].flatten(0, 1) - ids.start
    over_ML = bytes_ML == ids.size - 1
    after_end_ML = F.pad(over_ML, (1, -1))
    return bytes_ML, batch.shown_BT.flatten()[:, None] & ~after_end_ML


def _run(world: WorldModel, window: WindowTokens) -> torch.Tensor:
    positions = torch.arange(window.embeds_BLD.shape[1], device=world.device)
    hidden: torch.Tensor = world.backbone.core(window.embeds_BLD, positions, mask=None)
    return hidden


def _judge(
    world: WorldModel, batch: SubgoalBatch, path: StatePath | None, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Figures of one batch, one value for each thing that was asked."""
    layout = world.layout
    window = subgoal_tokens(world, batch, 0.0, generator)
    shown_M = batch.shown_BT.flatten()
    if path is None:
        hidden = _run(world, window)
        logits = clean_logits(world.backbone, layout, hidden, window)
    else:
        copies = draw_copies([path], window, torch.zeros(batch.shown_BT.shape), generator)
        views = noisy_logits(world, window, copies)
        hidden, logits = views.hidden_BLD, views.noisy
    said = sentence_logits(world.backbone, layout, hidden)
    known_BT = batch.follows_BT >= DONE
    ends_BT = batch.follows_BT == DONE
    bytes_ML, asked_ML = _asked_bytes(batch, layout)
    right_ML = said.text.argmax(-1) == bytes_ML
    hits_MN = logits.frame.argmax(-1) == window.targets.codes_MN
    places = [i for i, field in enumerate(world.config.proprio) if field.unit == "m"]  # the tool's
    felt = world.proprio.decode(expected_bin(logits.proprio))
    miss_M = (felt - batch.proprio_BTP[:, 1:].flatten(0, 1))[:, places].norm(dim=-1)
    moved_M = (batch.proprio_BTP[:, 1:] - batch.proprio_BTP[:, :-1]).flatten(0, 1)[:, places].norm(dim=-1)
    return {
        "follow_accuracy": ((said.follow.argmax(-1) == 1) == ends_BT)[known_BT],
        "text_accuracy": right_ML[asked_ML],
        "sentence_accuracy": (right_ML | ~asked_ML).all(1)[shown_M],
        "token_accuracy": hits_MN[shown_M],
        "changed_token_accuracy": hits_MN[shown_M][window.targets.changed_MN[shown_M]],
        "proprio_error_m": miss_M[shown_M],
        "proprio_moved_m": moved_M[shown_M],
    }


def _sentence_ids(world: WorldModel, sentences: tuple[str, ...]) -> torch.Tensor:
    """Text segments [S, text_tokens]; the first is what stands where nothing follows."""
    layout = world.layout
    try:
        return torch.stack([layout.end_ids(), *(layout.text_ids(world.text.encode(s)) for s in sentences[1:])])
    except ValueError as error:
        longest = max(sentences, key=len)
        raise ValueError(f"subtask {longest!r} does not fit: {error}") from error
