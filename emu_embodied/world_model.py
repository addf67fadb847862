"""observe -> imagine -> render: the one object that planners, environments and people use."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from emu_embodied.decode.autoregressive import SequentialDecoder
from emu_embodied.decode.dida import ParallelDecoder, StateDecoder
from emu_embodied.decode.paths import PATHS
from emu_embodied.files import write_json
from emu_embodied.models.cache import KVCache
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.records import Belief, Field, Frames, Imagination, Observation
from emu_embodied.tokens.actions import ActionTokenizer
from emu_embodied.tokens.frames import IBQFrameTokenizer
from emu_embodied.tokens.sequence import SequenceLayout
from emu_embodied.tokens.states import ProprioTokenizer, RewardTokenizer
from emu_embodied.tokens.text import ByteTokenizer
from emu_embodied.tokens.vocabulary import Vocabulary

WEIGHTS = Path(__file__).resolve().parent / "weights"
"""Checkpoints that ship inside the package, one folder each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldModelConfig:
    """What a checkpoint was trained for: the embodiment, the token stream and the decoding (``world.json``)."""

    env_ids: tuple[str, ...]
    """Environments in the training data."""
    data_hash: str
    """Identifies the training data."""
    cameras: tuple[str, ...]
    """Cameras whose frames are tokens, in order."""
    image_size: int
    """Side of a frame [pixels]."""
    camera_tokens: int
    """Codes of one frame."""
    codebook: int
    """Number of codes."""
    block: int
    """Env steps in an action block [control steps]."""
    action_dim: int
    """Action dimensions."""
    proprio: tuple[Field, ...]
    """Proprio fields with the range that the data covers."""
    text_length: int
    """Longest instruction [bytes]."""
    action_bins: int
    """Bins of an action dimension."""
    state_bins: int
    """Bins of a proprio field."""
    reward_bins: int
    """Bins of the reward."""
    context_states: int
    """Observed states kept when the window is full [states]."""
    max_states: int
    """States in a training window [states]."""
    paths: tuple[str, ...] = ()
    """Noise processes that the weights were adapted with (DiDA); none: next-token decoding only."""
    decoding: Literal["autoregressive", "dida"] = "autoregressive"
    """Decoder used unless another is asked for."""
    passes: int = 1
    """Parallel passes a state (DiDA)."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most likely token."""

    @property
    def layout(self) -> SequenceLayout:
        """Where everything stands in the token stream."""
        return SequenceLayout(
            vocabulary=Vocabulary.compact(
                text=ByteTokenizer.vocabulary_size,
                vision=self.codebook,
                action=self.action_bins,
                state=self.state_bins,
                reward=self.reward_bins,
            ),
            text_length=self.text_length,
            cameras=self.cameras,
            camera_tokens=self.camera_tokens,
            num_proprio=len(self.proprio),
            action_dim=self.action_dim,
        )

    @classmethod
    def load(cls, path: Path) -> WorldModelConfig:
        """Read ``world.json``.

        Raises:
            ValueError: if the file is missing, is not JSON or is not a world model's.
        """
        try:
            raw = json.loads(path.read_text())
            raw["proprio"] = tuple(Field(**field) for field in raw["proprio"])
            return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()})
        except FileNotFoundError:
            raise ValueError(f"{path.parent} is no world-model checkpoint: {path.name} is missing") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path} does not describe a world model: {error}") from None


class WorldModel:
    """Emu3.5-style world model: one transformer over instruction, state and action tokens.

    Args:
        config: what it was trained for.
        backbone: the transformer.
        frames: the vision tokenizer.
    """

    def __init__(self, config: WorldModelConfig, backbone: EmuForCausalLM, frames: IBQFrameTokenizer) -> None:
        layout = config.layout
        if backbone.config.vocab_size != layout.vocabulary.size:
            raise ValueError(
                f"backbone has {backbone.config.vocab_size} ids, world.json lays out {layout.vocabulary.size}"
            )
        if (frames.codebook_size, frames.image_size) != (config.codebook, config.image_size):
            raise ValueError(
                f"tokenizer has {frames.codebook_size} codes for {frames.image_size}-px frames, world.json names "
                f"{config.codebook} codes for {config.image_size}-px frames"
            )
        self.config = config
        self.backbone = backbone.eval().requires_grad_(False)
        self.frames = frames
        self.layout = layout
        self.text = ByteTokenizer()
        self.actions = ActionTokenizer(config.action_bins, config.block)
        self.proprio = ProprioTokenizer(config.proprio, config.state_bins)
        self.reward = RewardTokenizer(config.reward_bins)

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
        """Where the weights are."""
        return self.backbone.lm_head.weight.device

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
        return ParallelDecoder(self.backbone, self.layout, PATHS[config.paths[0]], config.passes, config.temperature)

    def with_decoding(
        self, decoding: Literal["autoregressive", "dida"], *, passes: int = 1, temperature: float = 0.0
    ) -> WorldModel:
        """The same weights behind another decoder."""
        config = replace(self.config, decoding=decoding, passes=passes, temperature=temperature)
        return WorldModel(config, self.backbone, self.frames)

    # -- observe -----------------------------------------------------------------------------------------------------

    def encode_frames(self, frames: Frames) -> torch.Tensor:
        """Frames of one state (camera -> uint8 [h, w, 3]) -> codes int64 [N].

        Raises:
            ValueError: if a camera of the model is missing.
        """
        missing = [camera for camera in self.config.cameras if camera not in frames]
        if missing:
            raise ValueError(f"the model reads cameras {self.config.cameras}; the observation has {tuple(frames)}")
        stacked = np.stack([frames[camera] for camera in self.config.cameras])
        return self.frames.encode(stacked).flatten().to(self.device)

    @torch.inference_mode()
    def observe(self, history: Sequence[Observation], actions: Sequence[np.ndarray] = ()) -> Belief:
        """Encode a history and the action blocks [K, A] between its observations.

        Only the latest ``max_states - 1`` observations are used: the window the weights were trained on.

        Raises:
            ValueError: if the history is empty or the number of actions does not fit.
        """
        if not history or len(actions) != len(history) - 1:
            raise ValueError(f"{len(history)} observations need {max(len(history) - 1, 0)} blocks, got {len(actions)}")
        keep = self.config.max_states - 1
        history, actions = tuple(history[-keep:]), tuple(actions)[-keep + 1 :] if keep > 1 else ()
        cache = KVCache(self.backbone.config, 1, self.layout.length(self.config.max_states), device=self.device)
        tokens_N, proprio_P = torch.empty(0), torch.empty(0)
        pending = [self._text(history[-1].instruction)]
        for t, observation in enumerate(history):
            condition = None
            if t > 0:
                action_embeds, condition = self._act(torch.as_tensor(actions[t - 1])[None])
                pending.append(action_embeds)
            tokens_N, proprio_P, state = self._state(observation, condition)
            pending.append(state)
        self._write(cache, torch.cat(pending, 1))
        return Belief(cache, tokens_N, proprio_P, history, actions)

    @torch.inference_mode()
    def extend(self, belief: Belief, action_KA: np.ndarray, observation: Observation) -> Belief:
        """Append what really happened.

        Nothing is recomputed while the belief leaves room for ``horizon`` imagined blocks in the trained window; after
        that the latest ``context_states`` observations are encoded afresh.
        """
        history = (*belief.history, observation)
        actions = (*belief.actions, np.asarray(action_KA, dtype=np.float32))
        if len(history) > self.config.context_states:
            kept = self.config.context_states
            return self.observe(history[-kept:], actions[len(actions) - kept + 1 :])
        cache = belief.cache.fork(room=self.layout.step_tokens)
        action_embeds, condition = self._act(torch.as_tensor(actions[-1])[None])
        tokens_N, proprio_P, state = self._state(observation, condition)
        self._write(cache, torch.cat([action_embeds, state], 1))
        return Belief(cache, tokens_N, proprio_P, history, actions)

    # -- imagine -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def imagine(
        self, belief: Belief, actions_SHKA: torch.Tensor, generator: torch.Generator | None = None
    ) -> Imagination:
        """Imagine S futures of H blocks, one for each action sequence in [-1, 1].

        All candidates share the belief's cache. Beyond the trained window the imagination goes on from its own latest
        ``context_states`` states. Imagined pixels are never encoded again.

        Raises:
            ValueError: if the actions' shape does not fit, or the model produced NaN (names candidate and block).
        """
        config = self.config
        if actions_SHKA.ndim != 4 or tuple(actions_SHKA.shape[2:]) != (config.block, config.action_dim):
            raise ValueError(
                f"actions must be [S, H, {config.block}, {config.action_dim}], got {tuple(actions_SHKA.shape)}"
            )
        num_plans, horizon = actions_SHKA.shape[:2]
        actions_SHKA = actions_SHKA.to(self.device, torch.float32)
        codes, proprio, reward, success, states = [], [], [], [], []
        num_states = len(belief.history)
        cache = self._own_cache(num_plans, belief.cache)
        pending, condition = self._act(actions_SHKA[:, 0])
        for h in range(horizon):
            decoded = self.decoder.decode(cache, pending, condition, generator)
            num_states += 1
            bins = torch.softmax(decoded.logits.proprio, -1) @ torch.arange(config.state_bins, device=self.device).float()
            expected = torch.softmax(decoded.logits.reward, -1) @ torch.arange(config.reward_bins, device=self.device).float()
            bad = ~(torch.isfinite(bins).all(-1) & torch.isfinite(expected))
            if bool(bad.any()):
                raise ValueError(f"the model produced NaN for candidate {int(bad.nonzero()[0, 0])} at block {h}")
            codes.append(decoded.codes_SN)
            proprio.append(self.proprio.decode(bins))
            reward.append(self.reward.decode(expected))
            success.append(torch.softmax(decoded.logits.success, -1)[:, 1])
            states.append((decoded.codes_SN, decoded.proprio_SP))
            if h + 1 == horizon:
                break
            action_embeds, condition = self._act(actions_SHKA[:, h + 1])
            if num_states < config.max_states:
                pending = torch.cat([decoded.pending_SLD, action_embeds], 1)
                continue
            text = KVCache(self.backbone.config, 1, self.layout.text_tokens, device=self.device)
            self._write(text, self._text(belief.history[-1].instruction))
            cache = self._own_cache(num_plans, text)
            recent = states[-config.context_states :]
            num_states = len(recent)
            pieces = []
            for i, (codes_SN, proprio_SP) in enumerate(recent):
                embeds = self.backbone.embed(self.layout.state_ids(codes_SN, proprio_SP))
                if i > 0:
                    between, leading = self._act(actions_SHKA[:, h - len(recent) + 1 + i])
                    pieces.append(between)
                    embeds = embeds + leading[:, None]
                pieces.append(embeds)
            pending = torch.cat([*pieces, action_embeds], 1)
        return Imagination(
            torch.stack(codes, 1), torch.stack(proprio, 1), torch.stack(reward, 1), torch.stack(success, 1)
        )

    def render(self, imagination: Imagination, plans: Sequence[int], horizons: Sequence[int]) -> Frames:
        """Decode imagined frames: camera -> uint8 [len(plans), len(horizons), height, width, 3].

        Raises:
            ValueError: if the imagination holds no frame tokens.
        """
        if imagination.tokens_SHN is None:
            raise ValueError("this imagination has no frame tokens: it came from a simulator that ran without rendering")
        chosen = imagination.tokens_SHN[list(plans)][:, list(horizons)]
        per_camera = chosen.unflatten(-1, (len(self.config.cameras), self.config.camera_tokens))
        rendered = {}
        for i, camera in enumerate(self.config.cameras):
            flat = self.frames.decode(per_camera[:, :, i].flatten(0, 1).cpu())
            rendered[camera] = flat.reshape(len(plans), len(horizons), *flat.shape[1:])
        return rendered

    # -- pieces of the stream ----------------------------------------------------------------------------------------

    def _text(self, instruction: str) -> torch.Tensor:
        ids = self.layout.text_ids(self.text.encode(instruction)).to(self.device)
        embeds: torch.Tensor = self.backbone.embed(ids[None])
        return embeds

    def _state(
        self, observation: Observation, condition_1D: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes_N = self.encode_frames(observation.frames)
        proprio_P = torch.as_tensor(observation.proprio, dtype=torch.float32, device=self.device)
        embeds = self.backbone.embed(self.layout.state_ids(codes_N, self.proprio.encode(proprio_P))[None])
        if condition_1D is not None:
            embeds = embeds + condition_1D[:, None]
        return codes_N, proprio_P, embeds

    def _act(self, actions_SKA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The action tokens' embeddings [S, L, D] and the block's continuous embedding [S, D]."""
        actions_SKA = actions_SKA.to(self.device, torch.float32)
        ids = self.layout.action_ids(self.actions.encode(actions_SKA))
        return self.backbone.embed(ids), self.backbone.action_embedding(actions_SKA)

    def _write(self, cache: KVCache, embeds: torch.Tensor) -> None:
        positions = torch.arange(cache.total_length, cache.total_length + embeds.shape[1], device=self.device)
        self.backbone.core(embeds, positions, mask=None, cache=cache)

    def _own_cache(self, num_plans: int, prefix: KVCache) -> KVCache:
        capacity = self.layout.length(self.config.max_states + 1) - prefix.length
        return KVCache(self.backbone.config, num_plans, capacity, prefix=prefix, device=self.device)

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, world.json and tokenizer/ into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backbone.save_pretrained(folder)
        self.frames.save_pretrained(folder / "tokenizer")
        write_json(folder / "world.json", asdict(self.config))

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, device: str | torch.device = "cpu") -> WorldModel:
        """Load a shipped checkpoint by name (``"nano"``) or one from a folder.

        Raises:
            ValueError: for an unknown name (with the nearest), or a folder with a missing, damaged or foreign file.
        """
        folder = checkpoint_folder(name_or_folder)
        config = WorldModelConfig.load(folder / "world.json")
        backbone = EmuForCausalLM.from_pretrained(folder).to(device)
        return cls(config, backbone, IBQFrameTokenizer.from_pretrained(folder / "tokenizer"))


def shipped() -> tuple[str, ...]:
    """Names of the checkpoints inside the package."""
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/world.json")))


def checkpoint_folder(name_or_folder: str | Path) -> Path:
    """The folder of a shipped name or of a path.

    Raises:
        ValueError: if there is neither.
    """
    names = shipped()
    if str(name_or_folder) in names:
        return WEIGHTS / str(name_or_folder)
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    near = difflib.get_close_matches(str(name_or_folder), names, n=1, cutoff=0.3)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"no checkpoint {str(name_or_folder)!r}: neither a folder nor a shipped name ({', '.join(names)}){hint}")
