"""The planner's role: from a state, sentences of the next subtasks and the states that complete them, alternating."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from emu_embodied.decode.dida import DecodedState, StateDecoder
from emu_embodied.decode.sampling import sample
from emu_embodied.models.cache import KVCache
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.tokens.sequence import SequenceLayout, StateTokens


@dataclass(frozen=True, slots=True)
class DecodedSubgoal:
    """One decoded subtask.

    Attributes:
        text: text ids of its sentence, without padding.
        state: the keyframe, S = 1.
    """

    text: tuple[int, ...]
    state: DecodedState


@dataclass(frozen=True, slots=True)
class SubgoalDecoder:
    """Decodes sentences token by token, keyframes as the model decodes any state.

    Attributes:
        backbone: the transformer.
        layout: order of tokens.
        decoder: of the keyframes.
        temperature: of the sentences; 0 takes the most likely token.
    """

    backbone: EmuForCausalLM
    layout: SequenceLayout
    decoder: StateDecoder
    temperature: float = 0.0

    def decode(
        self, instruction_1L: torch.Tensor, current: StateTokens, steps: int, generator: torch.Generator | None
    ) -> tuple[DecodedSubgoal, ...]:
        """At most ``steps`` subtasks; fewer where the model says that nothing is left to do after them.

        Args:
            instruction_1L: text segment, ids [1, text_tokens].
            current: the state to start from, S = 1.
            steps: how many subtasks at most.
            generator: for noise and sampling.
        """
        layout = self.layout
        ids = torch.cat([instruction_1L, layout.state_ids(current.codes, current.proprio)], 1)
        room = ids.shape[1] + steps * layout.subgoal_tokens
        cache = KVCache(self.backbone.config, 1, room, device=ids.device, dtype=self.backbone.lm_head.weight.dtype)
        hidden = self._read(cache, self.backbone.embed(ids))
        # A keyframe is led to by no action.
        condition = hidden.new_zeros(1, hidden.shape[-1])
        found: list[DecodedSubgoal] = []
        while len(found) < steps and self._goes_on(hidden):
            text, pending = self._sentence(cache, generator)
            state = self.decoder.decode(cache, pending, condition, current, generator)
            found.append(DecodedSubgoal(text, state))
            current = StateTokens(state.codes_SN, state.proprio_SP)
            if len(found) < steps:
                hidden = self._finish(cache, state)
        return tuple(found)

    def _goes_on(self, hidden_1LD: torch.Tensor) -> bool:
        """Whether a subtask is likelier to follow the state read last than the end."""
        ids = self.layout.follow_ids
        return int(self.backbone.head(hidden_1LD[:, -1], slice(ids.start, ids.stop)).argmax(-1)) == 0

    def _sentence(self, cache: KVCache, generator: torch.Generator | None) -> tuple[tuple[int, ...], torch.Tensor]:
        """The sentence's ids, and the embeddings [1, L, D] of those of its segment that are not in the cache yet."""
        layout, allowed = self.layout, self.layout.sentence_ids
        device, special = cache.keys[0].device, layout.vocabulary.special
        text: list[int] = []
        token = special["bos"]
        while len(text) < layout.text_length:
            hidden = self._read(cache, self.backbone.embed(torch.tensor([[token]], device=device)))
            logits = self.backbone.head(hidden[:, -1], slice(allowed.start, allowed.stop))
            token = allowed.start + int(sample(logits, self.temperature, generator))
            if token == special["pad"]:
                break
            text.append(token)
        rest = [special["pad"]] * (layout.text_length - len(text)) or [token]
        return tuple(text), self.backbone.embed(torch.tensor([rest], device=device))

    def _finish(self, cache: KVCache, state: DecodedState) -> torch.Tensor:
        """Hidden vector of a keyframe's last token, [1, L, D]; the cache holds the whole keyframe afterwards."""
        pending = state.pending_SLD
        if not pending.shape[1]:
            cache.truncate(cache.length - 1)
            ids = self.layout.state_ids(state.codes_SN, state.proprio_SP)
            pending = self.backbone.embed(ids[:, -1:])
        return self._read(cache, pending)

    def _read(self, cache: KVCache, embeds_1LD: torch.Tensor) -> torch.Tensor:
        start = cache.total_length
        positions = torch.arange(start, start + embeds_1LD.shape[1], device=embeds_1LD.device)
        hidden: torch.Tensor = self.backbone.core(embeds_1LD, positions, mask=None, cache=cache)
        return hidden
