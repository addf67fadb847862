"""Token windows for training: every frame of a dataset encoded once, then windows drawn at random."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from emu_embodied.data.episodes import EpisodeStore
from emu_embodied.data.split import held_out_episodes
from emu_embodied.files import write_atomically
from emu_embodied.records import Episode
from emu_embodied.tokens.frames import IBQFrameTokenizer

IMITATED = ("expert", "noisy")
"""Behaviours whose actions the policy role learns from; random and play only teach what actions lead to."""


@dataclass(frozen=True, slots=True)
class WindowBatch:
    """B windows of T consecutive states and the T - 1 action blocks between them.

    Attributes:
        text_BL: int64 text segments.
        codes_BTN: int64 frame codes.
        proprio_BTP: float32, in the environment's units; the objects' numbers behind them, if the model learns those.
        actions_BTKA: float32 [B, T - 1, K, A].
        reward_BT: float32 in [0, 1].
        success_BT: bool.
        imitate_B: bool, whether the actions are worth imitating.
    """

    text_BL: torch.Tensor
    codes_BTN: torch.Tensor
    proprio_BTP: torch.Tensor
    actions_BTKA: torch.Tensor
    reward_BT: torch.Tensor
    success_BT: torch.Tensor
    imitate_B: torch.Tensor

    def to(self, device: torch.device) -> WindowBatch:
        """The same batch on another device."""
        return WindowBatch(*(getattr(self, name).to(device) for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class TokenDataset:
    """All states of some episodes, one row each, episodes back to back.

    Attributes:
        codes_MN: int16 or int32 frame codes of M states.
        proprio_MP: float32; the objects' numbers behind them, if the model learns those.
        actions_MKA: float32, the block taken in each state (zeros in an episode's last).
        reward_M: float32.
        success_M: bool.
        instructions: one for each episode.
        imitate_E: bool, one for each episode.
        first_E: int64, row of each episode's first state.
        length_E: int64, states of each episode.
        env_E: int64, number of the environment each episode was recorded from.
        phases: of each episode, what its behaviour was doing in each block.
    """

    codes_MN: torch.Tensor
    proprio_MP: torch.Tensor
    actions_MKA: torch.Tensor
    reward_M: torch.Tensor
    success_M: torch.Tensor
    instructions: tuple[str, ...]
    imitate_E: torch.Tensor
    first_E: torch.Tensor
    length_E: torch.Tensor
    env_E: torch.Tensor
    phases: tuple[tuple[str, ...], ...]

    def split(self, held_out: float) -> tuple[TokenDataset, TokenDataset]:
        """(training, held-out): whole episodes, chosen by ``held_out_episodes``.

        Raises:
            ValueError: if there are fewer than two episodes.
        """
        index = torch.arange(len(self.length_E))
        kept = torch.from_numpy(held_out_episodes(len(index), held_out))
        return self._episodes(index[~kept]), self._episodes(index[kept])

    def without_frames(self) -> TokenDataset:
        """The same states without codes, as the stream of numbers has them."""
        return replace(self, codes_MN=self.codes_MN[:, :0])

    def _episodes(self, chosen: torch.Tensor) -> TokenDataset:
        return TokenDataset(
            self.codes_MN,
            self.proprio_MP,
            self.actions_MKA,
            self.reward_M,
            self.success_M,
            tuple(self.instructions[i] for i in chosen.tolist()),
            self.imitate_E[chosen],
            self.first_E[chosen],
            self.length_E[chosen],
            self.env_E[chosen],
            tuple(self.phases[i] for i in chosen.tolist()),
        )

    def rows(self) -> torch.Tensor:
        """int64: the rows that belong to the episodes of this part."""
        return torch.cat([torch.arange(f, f + n) for f, n in zip(self.first_E, self.length_E, strict=True)])

    def places(self, num_states: int) -> torch.Tensor:
        """int64: how many windows of ``num_states`` states each episode holds.

        Raises:
            ValueError: if none holds one.
        """
        places = (self.length_E - num_states + 1).clamp(min=0)
        if not bool(places.any()):
            longest = int(self.length_E.max())
            raise ValueError(
                f"windows of {num_states} states do not fit: of {len(self.length_E)} episodes the longest has "
                f"{longest}; record longer ones or train with a smaller window"
            )
        return places

    def sample(self, batch: int, num_states: int, text_ids_EL: torch.Tensor, generator: torch.Generator) -> WindowBatch:
        """Draw windows: every environment as often as any other, and all its windows alike.

        Short episodes hold few windows; drawn evenly over all, the task with long episodes would drown the others.

        Args:
            batch: B.
            num_states: T.
            text_ids_EL: text segments of this part's episodes.
            generator: CPU generator.

        Raises:
            ValueError: if no episode is long enough.
        """
        places = self.places(num_states)
        of_env = torch.zeros(int(self.env_E.max()) + 1).index_add_(0, self.env_E, places.float())
        weight_E = places / of_env[self.env_E].clamp(min=1)
        episode = torch.multinomial(weight_E, batch, replacement=True, generator=generator)
        start = self.first_E[episode] + (torch.rand(batch, generator=generator) * places[episode]).long()
        rows_BT = start[:, None] + torch.arange(num_states)
        return WindowBatch(
            text_ids_EL[episode],
            self.codes_MN[rows_BT].long(),
            self.proprio_MP[rows_BT],
            self.actions_MKA[rows_BT[:, :-1]],
            self.reward_M[rows_BT],
            self.success_M[rows_BT],
            self.imitate_E[episode],
        )


def encode_dataset(
    store: EpisodeStore, tokenizer: IBQFrameTokenizer, cameras: tuple[str, ...], cache: Path, *, objects: bool = False
) -> TokenDataset:
    """Encode every readable episode, in the order they were numbered when recorded.

    The codes are kept in ``cache`` and reused episode by episode, while tokenizer and cameras are the same.

    Args:
        store: dataset.
        tokenizer: of the frames.
        cameras: which of them, in order.
        cache: file.
        objects: whether the objects' numbers follow the proprio.

    Raises:
        ValueError: if the dataset is empty or lacks a camera.
    """
    missing = [camera for camera in cameras if camera not in store.spec.cameras]
    if missing:
        raise ValueError(f"{store.folder} has cameras {tuple(store.spec.cameras)}, training needs {cameras}")
    maker = f"{fingerprint(tokenizer)} {' '.join(cameras)}"
    known = _load_codes(cache, maker)
    episodes: list[Episode] = []
    encoded: dict[str, torch.Tensor] = {}
    codes_ETN: list[torch.Tensor] = []
    # Not the order of the index, which depends on which worker was first.
    order = sorted(range(len(store)), key=lambda i: store.entries[i].file)
    for i in tqdm(order, desc="read episodes", unit="ep"):
        name = store.entries[i].sha256
        codes = known.get(name)
        for episode in store.iter_valid([i], frames=codes is None):
            if codes is None:
                frames = np.stack([episode.frames[camera] for camera in cameras], 1)
                codes = tokenizer.encode(frames.reshape(-1, *frames.shape[2:])).reshape(len(frames), -1)
                codes = codes.to("cpu", torch.int32)
            encoded[name] = codes
            codes_ETN.append(codes)
            episodes.append(replace(episode, frames={}))
    if not episodes:
        raise ValueError(f"{store.folder} has no readable episode: run `emu-embodied collect` first")
    if encoded.keys() != known.keys():
        _save_codes(cache, maker, encoded)
    length_E = torch.tensor([len(episode) + 1 for episode in episodes])
    actions = [np.concatenate([e.actions_TKA, np.zeros_like(e.actions_TKA[:1])]) for e in episodes]
    return TokenDataset(
        torch.cat(codes_ETN),
        torch.from_numpy(np.concatenate([_numbers(e, objects) for e in episodes])),
        torch.from_numpy(np.concatenate(actions)),
        torch.from_numpy(np.concatenate([e.reward_T for e in episodes])),
        torch.from_numpy(np.concatenate([e.success_T for e in episodes])),
        tuple(e.instruction for e in episodes),
        torch.tensor([e.source in IMITATED for e in episodes]),
        length_E.cumsum(0) - length_E,
        length_E,
        torch.tensor([store.spec.env_ids.index(episode.env_id) for episode in episodes]),
        tuple(episode.phases for episode in episodes),
    )


def _numbers(episode: Episode, objects: bool) -> np.ndarray:
    return np.concatenate([episode.proprio_TP, episode.objects_TO], 1) if objects else episode.proprio_TP


def fingerprint(tokenizer: IBQFrameTokenizer) -> str:
    """sha256 of a tokenizer's weights: codes mean nothing without it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.ibq.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _save_codes(cache: Path, maker: str, encoded: dict[str, torch.Tensor]) -> None:
    lengths = json.dumps({name: len(codes) for name, codes in encoded.items()})
    metadata = {"maker": maker, "episodes": lengths}
    tensors = {"codes": torch.cat(list(encoded.values()))}
    write_atomically(cache, lambda aside: save_file(tensors, aside, metadata=metadata))


def _load_codes(cache: Path, maker: str) -> dict[str, torch.Tensor]:
    """Episode's sha256 -> its codes; nothing if the file is absent, damaged or another tokenizer's."""
    try:
        with safe_open(cache, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("maker") != maker:
                return {}
            lengths: dict[str, int] = json.loads(metadata["episodes"])
            parts = file.get_tensor("codes").split(list(lengths.values()))
            return dict(zip(lengths, parts, strict=True))
    except (OSError, SafetensorError):
        return {}
