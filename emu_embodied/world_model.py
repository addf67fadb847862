"""observe -> imagine -> render: the one object that planners, environments and people use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from emu_embodied.decode.autoregressive import SequentialDecoder
from emu_embodied.decode.dida import ParallelDecoder, StateDecoder
from emu_embodied.decode.grammar import StateLogits, check_finite, expected_bin
from emu_embodied.decode.order import Order
from emu_embodied.decode.paths import StatePath, known_path, make_path
from emu_embodied.decode.subgoals import SubgoalDecoder
from emu_embodied.files import write_json
from emu_embodied.models.cache import KVCache
from emu_embodied.models.eye import Eye
from emu_embodied.models.reward_model import RewardModel
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.records import Belief, Frames, Imagination, Observation, Stream, Subgoal
from emu_embodied.tokens.actions import ActionTokenizer
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.tokens.sequence import StateTokens
from emu_embodied.tokens.states import ProprioTokenizer, RewardTokenizer
from emu_embodied.tokens.text import ByteTokenizer, TextTokenizer
from emu_embodied.world_config import WorldModelConfig, checkpoint_folder
from emu_embodied.world_files import check_pieces, official_text, read_pieces, write_pieces
from emu_embodied.world_official import is_official, read_official


class WorldModel:
    """Emu3.5-style world model: one transformer over instruction, state and action tokens.

    Args:
        config: what it was trained for.
        backbone: the transformer.
        frames: the vision tokenizer.
        text: the text tokenizer, where the configuration names Emu3.5's ids; bytes otherwise.
        eye: reads the objects that the configuration names off a picture; None where it names none.
        reward_model: judges foretold numbers; without one, reward and success are read out of the backbone.
    """

    def __init__(
        self,
        config: WorldModelConfig,
        backbone: EmuForCausalLM,
        frames: IBQFrameTokenizer,
        text: TextTokenizer | None = None,
        eye: Eye | None = None,
        reward_model: RewardModel | None = None,
    ) -> None:
        check_pieces(config, backbone, frames, text, eye, reward_model)
        self.config = config
        self.backbone = backbone.eval().requires_grad_(False)
        self.frames = frames
        self.eye = None if eye is None else eye.eval().requires_grad_(False)
        self.reward_model = None if reward_model is None else reward_model.eval().requires_grad_(False)
        self.layout = config.layout
        self.text: ByteTokenizer | TextTokenizer = ByteTokenizer() if text is None else text
        self.actions = ActionTokenizer(config.action_bins, config.block)
        self.proprio = ProprioTokenizer((*config.proprio, *config.objects), config.state_bins)
        self.reward = RewardTokenizer(config.reward_bins)
        self._spares: dict[int, KVCache] = {}

    @property
    def block(self) -> int:
        """Env steps K in an action block."""
        return self.config.block

    @property
    def horizon(self) -> int:
        """Blocks that one stretch of imagination covers behind a full context."""
        return self.config.max_states - self.config.context_states

    @property
    def device(self) -> torch.device:
        """Where tokens and actions go in."""
        return self.backbone.entry

    @cached_property
    def decoder(self) -> StateDecoder:
        """The decoder that the configuration names.

        Raises:
            ValueError: if it asks for DiDA and the weights were never adapted.
        """
        config = self.config
        if config.decoding == "autoregressive":
            return SequentialDecoder(self.backbone, self.layout, config.temperature)
        if not config.paths:
            raise ValueError("these weights were trained by next token only; run `emu-embodied train dida` first")
        return ParallelDecoder(
            self.backbone,
            self.layout,
            self.path(config.paths[0]),
            config.passes,
            config.temperature,
            config.order,
            config.time_shift,
            config.entropy_bound,
        )

    def path(self, name: str) -> StatePath:
        """A noise process over this model's codes and proprio bins.

        Raises:
            ValueError: if there is none of that name (with the nearest).
        """
        config = self.config
        return make_path(known_path(name), self.frames.ibq.codebook, config.state_bins, config.source_noise)

    def with_decoding(
        self,
        decoding: Literal["autoregressive", "dida"],
        *,
        path: str | None = None,
        passes: int = 1,
        temperature: float = 0.0,
        order: Order | None = None,
        time_shift: float | None = None,
        entropy_bound: float | None = None,
        source_noise: float | None = None,
    ) -> WorldModel:
        """The same weights behind another decoder.

        Args:
            decoding: token by token, or in parallel.
            path: noise process of parallel decoding, one of those the weights were adapted with; the first of them if
                left out.
            passes: of parallel decoding.
            temperature: of sampling; 0 takes the most likely token.
            order: which tokens settle first when there are several passes; the checkpoint's if left out, as below.
            time_shift: above 1 the passes stay longer near noise.
            entropy_bound: of the order ``entropy`` [nats].
            source_noise: of ``state_coupled``, share of tokens that start from noise instead of the state before.

        Raises:
            ValueError: if the weights were not adapted with ``path``, or a number is out of its range.
        """
        paths = self.config.paths
        if path is not None:
            if known_path(path) not in paths:
                adapted = f"adapted with {', '.join(paths)}" if paths else "never adapted"
                raise ValueError(
                    f"these weights were {adapted}, not with {path!r}: run `emu-embodied train dida --path {path}`"
                )
            paths = (path, *(name for name in paths if name != path))
        config = replace(
            self.config,
            decoding=decoding,
            paths=paths,
            passes=passes,
            temperature=temperature,
            order=self.config.order if order is None else order,
            time_shift=self.config.time_shift if time_shift is None else time_shift,
            entropy_bound=self.config.entropy_bound if entropy_bound is None else entropy_bound,
            source_noise=self.config.source_noise if source_noise is None else source_noise,
        )
        return self._configured(config)

    def with_stream(self, stream: Stream) -> WorldModel:
        """The same weights on another stream; of numbers alone, imagination costs a fifth and can not be pictured.

        Raises:
            ValueError: if the weights were not trained on it.
        """
        return self if stream == self.config.stream else self._configured(replace(self.config, stream=stream))

    def _configured(self, config: WorldModelConfig) -> WorldModel:
        return WorldModel(config, self.backbone, self.frames, official_text(self.text), self.eye, self.reward_model)

    # -- observe -----------------------------------------------------------------------------------------------------

    def encode_frames(self, frames: Frames) -> torch.Tensor:
        """Frames of one state (camera -> uint8 [h, w, 3]) -> codes int64 [N], none in the stream of numbers.

        Raises:
            ValueError: if a camera of the model is missing.
        """
        missing = [camera for camera in self.config.cameras if camera not in frames]
        if missing:
            raise ValueError(f"the model reads cameras {self.config.cameras}; the observation has {tuple(frames)}")
        if self.config.stream == "numbers":
            return torch.zeros(0, dtype=torch.long, device=self.device)
        stacked = np.stack([frames[camera] for camera in self.config.cameras])
        return self.frames.encode(stacked).flatten().to(self.device)

    @torch.inference_mode()
    def observe(self, history: Sequence[Observation], actions: Sequence[np.ndarray] = ()) -> Belief:
        """Encode a history and the action blocks [K, A] between its observations.

        Only the latest ``context_states`` observations are read, so that ``horizon`` imagined blocks behind them still
        lie in the window that the weights were trained on.

        Raises:
            ValueError: if the history is empty, the number of actions does not fit, or an observation or action is not
                what the model was trained on.
        """
        if not history or len(actions) != len(history) - 1:
            raise ValueError(f"{len(history)} observations need {max(len(history) - 1, 0)} blocks, got {len(actions)}")
        kept = tuple(history)[-self.config.context_states :]
        between = tuple(np.asarray(action, dtype=np.float32) for action in actions[len(history) - len(kept) :])
        text = self._text(kept[-1].instruction)
        cache = self._cache(text, self.layout.length(len(kept)))
        seen = self._perceive(cache, text, kept[0], torch.zeros_like(text[:, 0]))
        for action_KA, observation in zip(between, kept[1:], strict=True):
            action_embeds, condition = self._act_once(action_KA)
            seen = self._perceive(cache, action_embeds, observation, condition)
        return Belief(cache, *seen, kept, between)

    @torch.inference_mode()
    def extend(self, belief: Belief, action_KA: np.ndarray, observation: Observation) -> Belief:
        """Append what really happened.

        Nothing is recomputed while the belief leaves room for ``horizon`` imagined blocks in the trained window; after
        that, and when the instruction has changed, the latest ``context_states`` observations are encoded afresh.

        Raises:
            ValueError: if the observation or action is not what the model was trained on.
        """
        history = (*belief.history, observation)
        actions = (*belief.actions, np.asarray(action_KA, dtype=np.float32))
        told_anew = observation.instruction != belief.history[-1].instruction
        if told_anew or len(history) > self.config.context_states:
            return self.observe(history, actions)
        cache = belief.cache.fork(room=self.layout.step_tokens)
        action_embeds, condition = self._act_once(actions[-1])
        return Belief(cache, *self._perceive(cache, action_embeds, observation, condition), history, actions)

    # -- imagine -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def imagine(
        self, belief: Belief, actions_SHKA: torch.Tensor, generator: torch.Generator | None = None
    ) -> Imagination:
        """Imagine S futures of H blocks, one for each action sequence in [-1, 1].

        All candidates share the belief's cache. Beyond the trained window the imagination goes on from its own latest
        ``context_states`` states. Imagined pixels are never encoded again.

        Raises:
            ValueError: if the actions do not fit or are not finite, or the model produced NaN (naming the first
                candidate and block).
        """
        config = self.config
        if actions_SHKA.ndim != 4 or 0 in actions_SHKA.shape or not self._is_block(actions_SHKA[0, 0]):
            raise ValueError(
                f"actions must be [S, H, {config.block}, {config.action_dim}], got {list(actions_SHKA.shape)}"
            )
        if not bool(actions_SHKA.isfinite().all()):
            raise ValueError("actions hold NaN or infinity")
        num_plans, horizon = actions_SHKA.shape[:2]
        actions_SHKA = actions_SHKA.to(self.device, torch.float32)
        states: list[StateTokens] = []
        numbers: list[torch.Tensor] = []
        worth: list[torch.Tensor] = []
        fine: list[torch.Tensor] = []
        num_states = len(belief.history)
        cache = self._branches(num_plans, belief.cache)
        current = self._latest(belief).expand(num_plans)
        pending, condition = self._act(actions_SHKA[:, 0])
        for h in range(horizon):
            state = self.decoder.decode(cache, pending, condition, current, generator)
            current = StateTokens(state.codes_SN, state.proprio_SP)
            states.append(current)
            numbers.append(self.proprio.decode(expected_bin(state.logits.proprio)))
            worth.append(self._worth(state.logits, numbers[-1], belief.history[-1].instruction))
            fine.append(state.logits.finite())
            num_states += 1
            if h + 1 == horizon:
                break
            action_embeds, condition = self._act(actions_SHKA[:, h + 1])
            if num_states < config.max_states:
                pending = torch.cat([state.pending_SLD, action_embeds], 1)
            else:
                recent = states[-config.context_states :]
                num_states = len(recent)
                cache.restart(self._prefix(self._text(belief.history[-1].instruction)))
                stream = self._restream(recent, actions_SHKA[:, h + 2 - num_states : h + 1])
                pending = torch.cat([stream, action_embeds], 1)
        check_finite(torch.stack(fine))
        self._spares = {num_plans: cache}
        proprio_SHP, objects_SHO = self._split(torch.stack(numbers, 1))
        reward_SH, success_SH = torch.stack(worth, -1)
        return Imagination(
            torch.stack([tokens.codes for tokens in states], 1) if config.stream == "pictures" else None,
            proprio_SHP,
            reward_SH,
            success_SH,
            objects_SHO if self.config.objects else None,
        )

    def render(self, imagination: Imagination, plans: Sequence[int], horizons: Sequence[int]) -> Frames:
        """Decode imagined frames: camera -> uint8 [len(plans), len(horizons), height, width, 3].

        Raises:
            ValueError: if the imagination holds no frame tokens.
        """
        if imagination.tokens_SHN is None:
            raise ValueError("no frame tokens to picture: a simulator ran without rendering, or a model in numbers")
        chosen = imagination.tokens_SHN[list(plans)][:, list(horizons)]
        per_camera = chosen.unflatten(-1, (len(self.config.cameras), self.config.camera_tokens))
        rendered = {}
        for i, camera in enumerate(self.config.cameras):
            flat = self.frames.decode(per_camera[:, :, i].flatten(0, 1))
            rendered[camera] = flat.reshape(len(plans), len(horizons), *flat.shape[1:])
        return rendered

    # -- propose -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def propose(
        self, observation: Observation, steps: int, generator: torch.Generator | None = None
    ) -> tuple[Subgoal, ...]:
        """Name the next subtasks and picture their completion, as ``SubgoalModel`` says.

        Only this observation is read: the windows that it was learned from begin with the present state.

        Raises:
            ValueError: if the weights were never trained on subtasks, or the observation is not what they were trained
                on.
        """
        if not self.config.subgoals:
            raise ValueError(
                "these weights know no subtasks: adapt them with `emu-embodied train dida --subgoal-share 0.25`"
            )
        if steps < 1:
            raise ValueError(f"{steps} subtasks: ask for at least 1")
        instruction = self.layout.text_ids(self.text.encode(observation.instruction))[None].to(self.device)
        current = self._latest(self.observe([observation])).expand(1)
        decoder = SubgoalDecoder(self.backbone, self.layout, self.decoder, self.config.temperature)
        found = decoder.decode(instruction, current, steps, generator)
        if found:
            check_finite(torch.stack([subgoal.state.logits.finite() for subgoal in found]))
        subgoals = []
        for subgoal in found:
            numbers = self.proprio.decode(expected_bin(subgoal.state.logits.proprio))
            reward, success = self._worth(subgoal.state.logits, numbers, observation.instruction)[:, 0].tolist()
            proprio_P = self._split(numbers[0])[0]
            sentence = self.text.decode(subgoal.text)
            subgoals.append(Subgoal(sentence, subgoal.state.codes_SN[0], proprio_P, reward, success))
        return tuple(subgoals)

    # -- pieces of the stream ----------------------------------------------------------------------------------------

    def _text(self, instruction: str) -> torch.Tensor:
        ids = self.layout.text_ids(self.text.encode(instruction)).to(self.device)
        embeds: torch.Tensor = self.backbone.embed(ids[None])
        return embeds

    def _perceive(
        self, cache: KVCache, before_1LD: torch.Tensor, observation: Observation, condition_1D: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write what stands before an observation and the observation itself into a cache.

        The objects, of which an observation says nothing, are read off its picture (``see``).

        Returns:
            Codes [N], proprio [P] and objects [O] of the state.
        """
        codes_N = self.encode_frames(observation.frames)
        proprio_P = torch.as_tensor(observation.proprio, dtype=torch.float32, device=self.device)
        known = len(self.config.proprio)
        if proprio_P.shape != (known,) or not bool(proprio_P.isfinite().all()):
            raise ValueError(
                f"proprio must be {known} finite numbers ("
                f"{', '.join(field.name for field in self.config.proprio)}), got {proprio_P.tolist()}"
            )
        objects_O = self.see([observation])[0]
        ids = self.layout.state_ids(codes_N, self.proprio.encode(torch.cat([proprio_P, objects_O])))
        self._write(cache, torch.cat([before_1LD, self.backbone.embed(ids[None]) + condition_1D[:, None]], 1))
        return codes_N, proprio_P, objects_O

    def see(self, observations: Sequence[Observation]) -> torch.Tensor:
        """Where the things are that the task is about: float32 [B, O], O = 0 for a model that knows of none.

        Raises:
            ValueError: if an observation is not what the eye was trained on.
        """
        if self.eye is None:
            return torch.zeros(len(observations), 0, device=self.device)
        return self.eye.see(observations).to(self.device)

    def _split(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Proprio [..., P] and objects [..., O] of the numbers in a state."""
        known = len(self.config.proprio)
        return numbers[..., :known], numbers[..., known:]

    def _worth(self, logits: StateLogits, numbers: torch.Tensor, instruction: str) -> torch.Tensor:
        """Reward and chance of success [2, S] of states: what their numbers are worth, where a model judges these."""
        if self.reward_model is not None:
            return torch.stack(self.reward_model.judge(numbers, instruction)).to(self.device)
        return torch.stack([self.reward.decode(expected_bin(logits.reward)), torch.softmax(logits.success, -1)[:, 1]])

    def _latest(self, belief: Belief) -> StateTokens:
        """The state that a belief ends with."""
        numbers = torch.cat([belief.proprio_P, belief.objects_O])
        return StateTokens(belief.tokens_N, self.proprio.encode(numbers))

    def _act(self, actions_SKA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The action tokens' embeddings [S, L, D] and the block's continuous embedding [S, D]."""
        ids = self.layout.action_ids(self.actions.encode(actions_SKA))
        return self.backbone.embed(ids), self.backbone.action_embedding(actions_SKA)

    def _act_once(self, action_KA: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for one executed block, checked."""
        action = torch.as_tensor(action_KA, dtype=torch.float32, device=self.device)
        if not self._is_block(action) or not bool(action.isfinite().all()):
            raise ValueError(
                f"an action block must be {self.config.block} x {self.config.action_dim} finite numbers, got "
                f"{action.tolist()}"
            )
        return self._act(action[None])

    def _is_block(self, action: torch.Tensor) -> bool:
        return tuple(action.shape) == (self.config.block, self.config.action_dim)

    def _restream(self, states: Sequence[StateTokens], actions_STKA: torch.Tensor) -> torch.Tensor:
        """Embeddings [S, L, D] of imagined states and the blocks between them, as if the first began a sequence."""
        embeds = [self.backbone.embed(self.layout.state_ids(state.codes, state.proprio)) for state in states]
        pieces = embeds[:1]
        for t, state_embeds in enumerate(embeds[1:]):
            action_embeds, condition = self._act(actions_STKA[:, t])
            pieces += [action_embeds, state_embeds + condition[:, None]]
        return torch.cat(pieces, 1)

    def _write(self, cache: KVCache, embeds: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(cache.total_length, cache.total_length + embeds.shape[1], device=self.device)
        hidden: torch.Tensor = self.backbone.core(embeds, positions, mask=None, cache=cache)
        return hidden

    def _cache(self, like: torch.Tensor, room: int) -> KVCache:
        """An empty cache for one sequence of ``room`` tokens, in the dtype of some embeddings."""
        return KVCache(self.backbone.config, 1, room, device=self.backbone.devices, dtype=like.dtype)

    def _prefix(self, embeds: torch.Tensor) -> KVCache:
        """A cache that holds one sequence [1, L, D]."""
        cache = self._cache(embeds, embeds.shape[1])
        self._write(cache, embeds)
        return cache

    def _branches(self, num_plans: int, prefix: KVCache) -> KVCache:
        """A cache in which ``num_plans`` sequences continue a prefix up to the end of the trained window.

        The memory of the last imagination serves again if it was for as many: decisions ask for the same every time.
        """
        spare = self._spares.pop(num_plans, None)
        if spare is not None and spare.devices == prefix.devices and spare.keys[0].dtype == prefix.keys[0].dtype:
            spare.restart(prefix)
            return spare
        room = self.layout.length(self.config.max_states) - self.layout.text_tokens
        return KVCache(self.backbone.config, num_plans, room, prefix=prefix)

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, world.json, tokenizer/, any eye/, reward/ and ``emu3.tiktoken``."""
        folder = Path(folder)
        write_pieces(folder, self.backbone, self.frames, official_text(self.text), self.eye, self.reward_model)
        write_json(folder / "world.json", asdict(self.config))

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        device: str | torch.device = "cpu",
        *,
        embodiment: WorldModelConfig | None = None,
        **backbone: Any,
    ) -> WorldModel:
        """Load a shipped checkpoint by name (``"nano"``), one from a folder, or Emu3.5's own folder as it is.

        Args:
            name_or_folder: where.
            device: where to compute; with a ``device_map`` only the vision tokenizer goes there.
            embodiment: for Emu3.5's folder, which knows no robot: cameras, actions, proprio and the length of windows;
                None takes those of the shipped ``nano``, a Panda. Its ids, images and decoding follow from the folder.
                The robot's tokens and the action embedding, which at first changes nothing, have then to be learned.
            **backbone: to ``EmuForCausalLM.from_pretrained`` (``dtype``, ``device_map`` ...: see ``models.loading``).
                ``dtype`` is float32 by default, and as stored for Emu3.5's folder.

        Raises:
            ValueError: for an unknown name (with the nearest), or a folder with a missing, damaged or foreign file.
        """
        folder = checkpoint_folder(name_or_folder)
        if not (folder / "world.json").is_file() and is_official(folder):
            return cls(*read_official(folder, device, embodiment, backbone))
        config = WorldModelConfig.load(folder / "world.json")
        if embodiment is not None:
            raise ValueError(f"{folder} names its own embodiment in world.json: leave embodiment out")
        pieces = read_pieces(folder, config.tokens, device, backbone)
        try:
            return cls(config, *pieces)
        except ValueError as error:
            raise ValueError(f"the files in {folder} do not belong together: {error}") from error
