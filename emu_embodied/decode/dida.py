"""DiDA: a whole state in a few parallel passes (Emu3.5, section 3.3; the sampler is discrete flow matching's).

Shape letters: S candidates, L tokens of a state, N codes, P proprio bins, M = N + P tokens that are decoded, K tokens
computed in a pass, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from emu_embodied.decode.grammar import StateLogits, state_logits
from emu_embodied.decode.order import (
    Order,
    check_order,
    entropies,
    log_probabilities,
    most_confident,
    settled_by,
    times,
    within_entropy,
)
from emu_embodied.decode.paths import MaskPath, MixturePath, StatePath
from emu_embodied.decode.sampling import sample
from emu_embodied.models.block_cache import BlockCache, chosen
from emu_embodied.models.cache import KVCache
from emu_embodied.models.masks import causal_then_parallel
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import MASKED, SequenceLayout, StateTokens

_READOUTS = 3
"""Positions at a state's end that every pass computes: those that reward and success are read at, and the last."""

_WORTH_LEAVING = 0.75
"""Stopped candidates are left out of a pass if no more than this share goes on: that costs a copy of the cache."""


@dataclass(frozen=True, slots=True)
class DecodedState:
    """S decoded states.

    Attributes:
        codes_SN: int64 [S, N].
        proprio_SP: int64 bins [S, P].
        logits: what they were read from: of every token, the last pass that computed it.
        pending_SLD: embeddings of those tokens of the state that are not in the cache yet; they go in with the next
            call.
    """

    codes_SN: torch.Tensor
    proprio_SP: torch.Tensor
    logits: StateLogits
    pending_SLD: torch.Tensor


class StateDecoder(Protocol):
    """Decodes the next state behind a cache."""

    def decode(
        self,
        cache: KVCache,
        pending_SLD: torch.Tensor,
        condition_SD: torch.Tensor,
        current: StateTokens,
        generator: torch.Generator | None,
    ) -> DecodedState:
        """Predict the next state.

        Args:
            cache: everything before ``pending_SLD``; grows by it.
            pending_SLD: embeddings [S, L, D] that come first: the last state, if it is not cached, and the action's.
            condition_SD: the action block's continuous embedding, added to every token of the state.
            current: the state before, [S, N] codes and [S, P] bins.
            generator: for noise and sampling.
        """
        ...


@dataclass(frozen=True, slots=True)
class ParallelDecoder:
    """All tokens of a state at once, refined over ``passes``.

    The first pass also writes the pending clean tokens into the cache, so that finishing one state and starting the
    next cost one forward between them.

    **What later passes compute.** A token is *open* until it settles: when ``order`` says so, or, with an order
    ``random``, when the noise process fills it for good (``mask``) or the last pass is over. From the second pass on a
    position is computed if it predicts an open token (the position before it does), or if its token is another than in
    the pass before; reward and success are read in every pass. All other positions keep the keys, values and
    predictions of the pass that computed them last. While everything is open that is the full computation; what is left
    out is that settled tokens do not look again at what the others have become.

    **When a candidate stops.** When nothing is open, or, at temperature 0, when a pass predicts for every open token
    what it already is: further passes would repeat it. On a CPU stopped candidates cost nothing and the shapes follow
    what is open; elsewhere shapes follow from the schedule alone, so that nothing waits for the device.

    Attributes:
        passes: upper limit; the last one settles all that is open.
        temperature: of sampling; 0 takes the most likely token.
        order: what settles when, see ``Order``.
        time_shift: above 1 the passes stay longer near noise, see ``times``.
        entropy_bound: of the order ``entropy``: tokens whose entropies sum up to it settle together [nats].

    Raises:
        ValueError: for a number out of its range, an unknown order, or a path over other ids than the model's.
    """

    backbone: EmuForCausalLM
    layout: SequenceLayout
    path: StatePath
    passes: int = 1
    temperature: float = 0.0
    order: Order = "random"
    time_shift: float = 1.0
    entropy_bound: float = 1.0

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise ValueError(f"passes must be >= 1, got {self.passes}")
        check_order(self.order, self.time_shift, self.entropy_bound)
        v = self.layout.vocabulary
        for kind, path, ids in (
            ("frame codes", self.path.frame, v.vision),
            ("proprio bins", self.path.proprio, v.state),
        ):
            if path.size != ids.size:
                raise ValueError(f"the noise process is over {path.size} {kind}, the model's vocabulary has {ids.size}")

    def decode(
        self,
        cache: KVCache,
        pending_SLD: torch.Tensor,
        condition_SD: torch.Tensor,
        current: StateTokens,
        generator: torch.Generator | None,
    ) -> DecodedState:
        """See ``StateDecoder.decode``."""
        # Common random numbers: all candidates start from one draw of noise, their costs differ by actions alone.
        if self.passes > 1:
            generator = _own(generator)
        tokens_SM = _joined(self.path.source(current, generator))
        start, clean = cache.total_length, pending_SLD.shape[1]
        embeds = torch.cat([pending_SLD, self._embed(tokens_SM, condition_SD)], 1)
        hidden_SLD = self.backbone.core(
            embeds,
            torch.arange(start, start + embeds.shape[1], device=embeds.device),
            mask=causal_then_parallel(clean, self.layout.state_tokens, embeds.device),
            cache=cache,
            keep=clean,
            first=clean,
        )
        unset = torch.zeros_like(tokens_SM, dtype=torch.bool)
        before_SP = current.proprio.expand(len(tokens_SM), -1)
        whole = _Candidates(cache, condition_SD, before_SP, tokens_SM, ~unset, hidden_SLD, unset)
        logits = self._settle(whole, 0, generator)
        some, rows_S = whole, torch.arange(len(tokens_SM), device=tokens_SM.device)
        for i in range(1, self.passes):
            if _on_host(hidden_SLD):
                going_S = some.open_SM.any(-1).nonzero()[:, 0]
                if len(going_S) == 0:
                    break
                if len(going_S) <= _WORTH_LEAVING * len(some.tokens_SM):
                    if some is not whole:
                        whole.take_over(some, rows_S)
                    some, rows_S = some.select(going_S), rows_S[going_S]
            self._compute(some, i)
            logits = self._settle(some, i, generator)
        if some is not whole:
            whole.take_over(some, rows_S)
            logits = state_logits(self.backbone, self.layout, whole.hidden_SLD, whole.before_SP)
        tokens = self._apart(whole.tokens_SM)
        return DecodedState(tokens.codes, tokens.proprio, logits, self._embed(whole.tokens_SM, condition_SD))

    def _settle(self, some: _Candidates, index: int, generator: torch.Generator | None) -> StateLogits:
        """Read out pass ``index`` and move the tokens to the time of the next one."""
        logits = state_logits(self.backbone, self.layout, some.hidden_SLD, some.before_SP)
        predicted = StateTokens(
            sample(logits.frame, self.temperature, generator), sample(logits.proprio, self.temperature, generator)
        )
        t, t_next = times(self.passes, self.time_shift)[index : index + 2]
        now_SM, open_SM, predicted_SM = some.tokens_SM, some.open_SM, _joined(predicted)
        moved_SM = now_SM
        if index + 1 == self.passes:
            settling_SM = open_SM
        elif self.order == "random":
            moved_SM = _joined(self.path.step(self._apart(now_SM), predicted, t, t_next, generator))
            settling_SM = moved_SM != MASKED if isinstance(self.path.frame, MaskPath) else torch.zeros_like(open_SM)
        else:
            if not isinstance(self.path.frame, MixturePath):  # of a mixture, what does not settle waits at its source
                moved_SM = _joined(self.path.step(self._apart(now_SM), predicted, t, t_next, generator))
            if self.order == "confidence":
                scores_SM = log_probabilities(logits, predicted)
                settling_SM = most_confident(scores_SM, open_SM, settled_by(t_next, open_SM.shape[1]))
            else:
                settling_SM = within_entropy(entropies(logits), open_SM, self.entropy_bound)
        if self.order != "random" or index + 1 == self.passes:
            moved_SM = torch.where(settling_SM, predicted_SM, moved_SM)
        some.tokens_SM = torch.where(open_SM, moved_SM, now_SM)
        some.changed_SM = some.tokens_SM != now_SM
        some.open_SM = open_SM & ~settling_SM
        if self.temperature == 0:
            some.open_SM = some.open_SM & (open_SM & (predicted_SM != now_SM)).any(-1, keepdim=True)
        return logits

    def _compute(self, some: _Candidates, index: int) -> None:
        """Run pass ``index`` over the positions that need it, and keep the hidden vectors of candidates not stopped."""
        length, start = self.layout.state_tokens, some.cache.total_length
        going_S11 = some.open_SM.any(-1)[:, None, None]
        needed_SL = self._needed(some)
        if _on_host(needed_SL):
            count, all_of_them = int(needed_SL.sum(-1).max()), bool(needed_SL.all())
        else:
            count, all_of_them = self._most_needed(index), self._never_settles
        embeds_SLD = self._embed(some.tokens_SM, some.condition_SD)
        everything = torch.ones(count, count, dtype=torch.bool, device=embeds_SLD.device)
        if all_of_them:
            positions = torch.arange(start, start + length, device=embeds_SLD.device)
            found = self.backbone.core(embeds_SLD, positions, everything, some.cache, keep=0)
            some.hidden_SLD = torch.where(going_S11, found, some.hidden_SLD)
            return
        places_SK = needed_SL.int().argsort(dim=-1, descending=True, stable=True)[:, :count]
        # Whoever needs fewer computes its last position, which everybody needs, several times over.
        places_SK = torch.where(needed_SL.gather(1, places_SK), places_SK, length - 1)
        rows_S1 = torch.arange(len(places_SK), device=places_SK.device)[:, None]
        block = BlockCache(some.cache, length, places_SK)
        found = self.backbone.core(embeds_SLD[rows_S1, places_SK], start + places_SK, everything, block, keep=0)
        some.hidden_SLD[rows_S1, places_SK] = torch.where(going_S11, found, some.hidden_SLD[rows_S1, places_SK])

    def _needed(self, some: _Candidates) -> torch.Tensor:
        """Bool [S, L]: which positions the next pass computes."""
        layout = self.layout
        needed_SL = F.pad(self._by_place(some.open_SM)[:, 1:], (0, 1)) | self._by_place(some.changed_SM)
        needed_SL[:, -_READOUTS:] = True
        # The last code of a camera stands before what opens the next one's, so it predicts nothing; nor is it left out.
        needed_SL[:, layout.camera_tokens : layout.reward_slot - layout.num_proprio - 1 : layout.camera_tokens + 1] = (
            True
        )
        return needed_SL

    @property
    def _never_settles(self) -> bool:
        """Whether every token stays open until the last pass (or until its candidate stops)."""
        return self.order == "random" and not isinstance(self.path.frame, MaskPath)

    def _most_needed(self, index: int) -> int:
        """How many positions any candidate can need in pass ``index``, from the schedule alone."""
        length, tokens = self.layout.state_tokens, len(self.layout.frame_slots) + self.layout.num_proprio
        if self.order != "confidence" or not isinstance(self.path.frame, MixturePath):
            return length
        # What is open, and what settled last.
        concerned = tokens - settled_by(times(self.passes, self.time_shift)[index - 1], tokens)
        return min(length, concerned + _READOUTS + len(self.layout.cameras) - 1)

    def _by_place(self, flags_SM: torch.Tensor) -> torch.Tensor:
        """Flags [S, M] of the decoded tokens where these stand in a state, [S, L]; False everywhere else."""
        places = torch.cat([self.layout.frame_slots, self.layout.proprio_slots]).to(flags_SM.device)
        return flags_SM.new_zeros(len(flags_SM), self.layout.state_tokens).index_copy_(-1, places, flags_SM)

    def _apart(self, tokens_SM: torch.Tensor) -> StateTokens:
        return StateTokens(*tokens_SM.split([len(self.layout.frame_slots), self.layout.num_proprio], -1))

    def _embed(self, tokens_SM: torch.Tensor, condition_SD: torch.Tensor) -> torch.Tensor:
        tokens = self._apart(tokens_SM)
        ids = self.layout.state_ids(tokens.codes, tokens.proprio)
        embeds: torch.Tensor = self.backbone.embed(ids) + condition_SD[:, None]
        return embeds


@dataclass(slots=True)
class _Candidates:
    """What the passes of one state have come to.

    Attributes:
        cache: everything before the state, and behind its end the state's tokens as they were computed last.
        condition_SD: the action's embedding.
        before_SP: int64 bins of the state before.
        tokens_SM: int64, as the next pass reads them.
        open_SM: bool, not settled yet.
        hidden_SLD: of every position, from the last pass that computed it.
        changed_SM: bool, other tokens than the last pass read.
    """

    cache: KVCache
    condition_SD: torch.Tensor
    before_SP: torch.Tensor
    tokens_SM: torch.Tensor
    open_SM: torch.Tensor
    hidden_SLD: torch.Tensor
    changed_SM: torch.Tensor

    def select(self, rows_S: torch.Tensor) -> _Candidates:
        """Some of them, copied."""
        return _Candidates(
            chosen(self.cache, rows_S),
            self.condition_SD[rows_S],
            self.before_SP[rows_S],
            self.tokens_SM[rows_S],
            self.open_SM[rows_S],
            self.hidden_SLD[rows_S],
            self.changed_SM[rows_S],
        )

    def take_over(self, some: _Candidates, rows_S: torch.Tensor) -> None:
        """Write back what some of them have come to."""
        self.tokens_SM[rows_S] = some.tokens_SM
        self.hidden_SLD[rows_S] = some.hidden_SLD


def _joined(tokens: StateTokens) -> torch.Tensor:
    return torch.cat([tokens.codes, tokens.proprio], -1)


def _on_host(tensor: torch.Tensor) -> bool:
    """Whether reading a number of it waits for nothing."""
    return tensor.device.type == "cpu"


def _own(generator: torch.Generator | None) -> torch.Generator | None:
    """A generator for one state, so that stopping early takes no numbers from the states after it."""
    if generator is None or generator.device.type != "cpu":
        return generator
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
