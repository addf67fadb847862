"""The policy role: the backbone emits the next action block, for many environments in one forward pass.

What a decision was made on (``Situations``) is kept as tokens: some 250 bytes for the shipped model, so that an update
evaluates thousands of decisions again without a simulator and without a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from emu_embodied.decode.actions import ActionDecoder, Generators
from emu_embodied.records import Observation
from emu_embodied.world_model import WorldModel


@dataclass(frozen=True, slots=True)
class Situations:
    """What B decisions rest on: the latest states that the policy looks at, as int16 tokens (or int32: larger ids).

    All rows have room for T states; of a younger episode only the last ``length`` are real, and zeros stand before.

    Attributes:
        text_BL: ids of the instruction's segment.
        codes_BTN: frame codes.
        proprio_BTP: proprio bins, and behind them where the model saw the objects, if it knows of any.
        actions_BTKA: float32 [B, T - 1, K, A], the blocks between the states.
        length_B: int64, real states of each row, in [1, T].
    """

    text_BL: torch.Tensor
    codes_BTN: torch.Tensor
    proprio_BTP: torch.Tensor
    actions_BTKA: torch.Tensor
    length_B: torch.Tensor

    def __len__(self) -> int:
        return len(self.length_B)

    @property
    def nbytes(self) -> int:
        """Memory of all of them [bytes]."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def rows(self, rows_B: torch.Tensor | slice | Sequence[int]) -> Situations:
        """Some of them."""
        return Situations(*(getattr(self, field.name)[rows_B] for field in fields(self)))

    def to(self, device: torch.device | str) -> Situations:
        """The same on another device."""
        return Situations(*(getattr(self, field.name).to(device) for field in fields(self)))

    @staticmethod
    def cat(parts: Sequence[Situations]) -> Situations:
        """All of some batches, in order."""
        return Situations(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Situations)))


@dataclass(frozen=True, slots=True)
class ActionSample:
    """B drawn action blocks.

    Attributes:
        bins_BA: int64, the action tokens as bins in [0, action bins).
        log_probs_BA: float32, of each bin given those before it, at the temperature of the draw (at 0, at 1).
        actions_BKA: float32 [B, K, A] in [-1, 1], the bins' centres held over the block.
    """

    bins_BA: torch.Tensor
    log_probs_BA: torch.Tensor
    actions_BKA: torch.Tensor


@dataclass(frozen=True, slots=True)
class ActionScores:
    """What the policy thinks of given action blocks, with gradient.

    Attributes:
        log_probs_BA: float32, of each bin given those before it.
        entropy_BA: float32, of the distribution that it was drawn from [nats].
    """

    log_probs_BA: torch.Tensor
    entropy_BA: torch.Tensor


class Actor:
    """Acts with a world model's backbone.

    Args:
        world: whose weights, tokens and embodiment act.
        context_states: latest states a decision looks at [states]; what the weights were cloned with by default, and
            that is one unless asked for: the tasks here show all that matters in one picture and its proprio, it is
            the cheapest, and a cloned policy that sees its own past actions learns to repeat them (the copycat
            problem). The weights know at most ``max_states - 1``.

    Raises:
        ValueError: if the weights cannot act (no action tokens, or none that were ever trained), or were not trained on
            so many states.
    """

    def __init__(self, world: WorldModel, *, context_states: int | None = None) -> None:
        config = world.config
        context_states = config.policy_states if context_states is None else context_states
        if config.action_bins < 2:
            raise ValueError("these weights have no action tokens (action_bins is 1): train a world model with some")
        if config.tokens == "emu3.5" and config.data_hash == "none" and not config.paths:
            raise ValueError(
                "Emu3.5's released weights never saw an action: run `emu-embodied train policy --init` on them first"
            )
        if not 1 <= context_states < config.max_states:
            raise ValueError(
                f"context_states is {context_states}: these weights act on 1 to {config.max_states - 1} states"
            )
        self.world = world.with_stream(config.policy_stream)
        self.context_states = context_states
        self._texts: dict[str, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.world.device

    # -- what a decision rests on ------------------------------------------------------------------------------------

    def see(self, observations: Sequence[Observation]) -> Situations:
        """Situations of B episodes that begin.

        Raises:
            ValueError: if an observation is not what the model was trained on.
        """
        config, layout = self.world.config, self.world.layout
        text_BL = self._text(observations)
        codes_BN, proprio_BP = self._tokens(observations)
        batch, past = len(observations), self.context_states - 1
        pad = (0, 0, past, 0)
        return Situations(
            text_BL,
            torch.nn.functional.pad(codes_BN[:, None], pad).to(_compact(config.codebook)),
            torch.nn.functional.pad(proprio_BP[:, None], pad).to(_compact(config.state_bins)),
            torch.zeros(batch, past, config.block, layout.action_dim, device=self.device),
            torch.ones(batch, dtype=torch.long, device=self.device),
        )

    def follow(
        self, before: Situations, actions_BKA: torch.Tensor | np.ndarray, observations: Sequence[Observation]
    ) -> Situations:
        """Situations one block later.

        Args:
            before: the last ones.
            actions_BKA: [B, K, A], the blocks that were executed.
            observations: what they led to; an instruction that has changed counts from now on.

        Raises:
            ValueError: if an observation is not what the model was trained on.
        """
        text_BL = self._text(observations)
        return self.follow_tokens(before, actions_BKA, *self._tokens(observations), text_BL)

    def follow_tokens(
        self,
        before: Situations,
        actions_BKA: torch.Tensor | np.ndarray,
        codes_BN: torch.Tensor,
        proprio_BP: torch.Tensor,
        text_BL: torch.Tensor | None = None,
    ) -> Situations:
        """The same where the states reached are tokens already, as imagination gives them.

        Args:
            before: the last situations.
            actions_BKA: [B, K, A].
            codes_BN: frame codes, not looked at by a policy in numbers.
            proprio_BP: proprio bins, and behind them those of the objects.
            text_BL: the instruction's segment, if it has changed.
        """
        codes_BN = codes_BN[:, : before.codes_BTN.shape[-1]]
        actions = torch.as_tensor(actions_BKA, dtype=torch.float32, device=before.actions_BTKA.device)
        length = before.length_B + 1
        return Situations(
            before.text_BL if text_BL is None else text_BL,
            torch.cat([before.codes_BTN, codes_BN[:, None].to(before.codes_BTN)], 1)[:, 1:],
            torch.cat([before.proprio_BTP, proprio_BP[:, None].to(before.proprio_BTP)], 1)[:, 1:],
            torch.cat([before.actions_BTKA, actions[:, None]], 1)[:, 1:],
            length.clamp(max=before.codes_BTN.shape[1]),
        )

    # -- acting ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def act(
        self, situations: Situations, generators: Generators | None = None, temperature: float = 0.0
    ) -> ActionSample:
        """The next block of every row.

        Args:
            situations: B of them.
            generators: one for all, or one for each row: a row's block is then a function of its situation and its
                generator alone. Not needed at temperature 0.
            temperature: of the draw; 0 takes the most likely bins.

        Raises:
            ValueError: if the temperature is negative, or generators are missing or of another number.
        """
        dims = self.world.layout.action_dim
        bins = torch.zeros(len(situations), dims, dtype=torch.long, device=self.device)
        log_probs = torch.zeros(len(situations), dims, device=self.device)
        for rows, part in by_length(situations):
            own = generators
            if isinstance(generators, Sequence) and len(generators) == len(situations):
                own = [generators[i] for i in rows.tolist()]
            past = past_embeds(self.world, part)
            bins[rows], log_probs[rows] = self._decoder().sample(past, temperature, own)
        return ActionSample(bins, log_probs, self.world.actions.decode(bins))

    def log_probs(self, situations: Situations, bins_BA: torch.Tensor, temperature: float = 1.0) -> ActionScores:
        """Log-probabilities of given blocks, equal to those of ``act`` at the same temperature, with gradient.

        Args:
            situations: B of them.
            bins_BA: action bins, of any integer type.
            temperature: that of the draw; 0 counts as 1.
        """
        bins_BA = bins_BA.to(self.device, torch.long)
        order, logits = [], []
        for rows, part in by_length(situations):
            order.append(rows)
            logits.append(self._decoder().logits(past_embeds(self.world, part), bins_BA[rows]))
        logits_BAV = torch.cat(logits)[torch.cat(order).argsort()] if len(logits) > 1 else logits[0]
        found_BAV = torch.log_softmax(logits_BAV / (temperature or 1.0), -1)
        entropy_BA = -(found_BAV.exp() * found_BAV).sum(-1)
        return ActionScores(found_BAV.gather(-1, bins_BA[..., None])[..., 0], entropy_BA)

    def _decoder(self) -> ActionDecoder:
        return ActionDecoder(self.world.backbone, self.world.layout)

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _text(self, observations: Sequence[Observation]) -> torch.Tensor:
        for told in {observation.instruction for observation in observations} - self._texts.keys():
            ids = self.world.layout.text_ids(self.world.text.encode(told))
            self._texts[told] = ids.to(self.device, _compact(self.world.layout.vocabulary.size))
        return torch.stack([self._texts[observation.instruction] for observation in observations])

    def _tokens(self, observations: Sequence[Observation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes int64 [B, N] and bins int64 [B, P + O]; all frames go through the tokenizer together."""
        config = self.world.config
        for observation in observations:
            if missing := [camera for camera in config.cameras if camera not in observation.frames]:
                raise ValueError(
                    f"the model reads cameras {config.cameras}; the observation lacks {', '.join(missing)}"
                )
        codes_BN = torch.zeros(len(observations), 0, dtype=torch.long, device=self.device)
        if config.stream == "pictures":
            frames = np.stack([seen.frames[camera] for seen in observations for camera in config.cameras])
            codes_BN = self.world.frames.encode(frames).reshape(len(observations), -1).to(self.device)
        proprio = np.stack([np.asarray(seen.proprio, np.float32) for seen in observations])
        if proprio.shape[1:] != (len(config.proprio),) or not np.isfinite(proprio).all():
            names = ", ".join(field.name for field in config.proprio)
            raise ValueError(f"proprio must be {len(config.proprio)} finite numbers ({names})")
        proprio_BP = torch.from_numpy(proprio).to(self.device)
        numbers = torch.cat([proprio_BP, self.world.see(observations)], 1)
        return codes_BN, self.world.proprio.encode(numbers)


def past_embeds(world: WorldModel, situations: Situations) -> torch.Tensor:
    """Embeddings [B, L, D] of situations of equal length, as training lays out a window; with gradient."""
    backbone, layout = world.backbone, world.layout
    states = int(situations.length_B[0])
    here = situations.to(world.device)
    actions_BTKA = here.actions_BTKA[:, here.actions_BTKA.shape[1] - (states - 1) :]
    codes_BTN, proprio_BTP = here.codes_BTN[:, -states:], here.proprio_BTP[:, -states:]
    embeds_BTLD = backbone.embed(layout.state_ids(codes_BTN.long(), proprio_BTP.long()))
    if states > 1:
        led_to_BTD = torch.nn.functional.pad(backbone.action_embedding(actions_BTKA), (0, 0, 1, 0))
        embeds_BTLD = embeds_BTLD + led_to_BTD[:, :, None]
    between_BTLD = backbone.embed(layout.action_ids(world.actions.encode(actions_BTKA)))
    return layout.interleave(backbone.embed(here.text_BL.long()), embeds_BTLD, between_BTLD)


def by_length(situations: Situations) -> Iterator[tuple[torch.Tensor, Situations]]:
    """Rows int64 of each number of real states, and their situations: those can be read in one batch."""
    for length in situations.length_B.unique().tolist():
        rows = (situations.length_B == length).nonzero()[:, 0]
        yield rows, situations if len(rows) == len(situations) else situations.rows(rows)


def _compact(values: int) -> torch.dtype:
    """The smallest of two integer types for ``values`` different ids."""
    return torch.int16 if values <= 2**15 else torch.int32
