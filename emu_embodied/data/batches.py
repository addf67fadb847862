"""Token windows for training: every frame of a dataset encoded once, then windows drawn at random."""

from __future__ import annotations

import hashlib
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
        proprio_BTP: float32, in the environment's units.
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
        proprio_MP: float32.
        actions_MKA: float32, the block taken in each state (zeros in an episode's last).
        reward_M: float32.
        success_M: bool.
        instructions: one for each episode.
        imitate_E: bool, one for each episode.
        first_E: int64, row of each episode's first state.
        length_E: int64, states of each episode.
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

    def split(self, held_out: float) -> tuple[TokenDataset, TokenDataset]:
        """(training, held-out): whole episodes, chosen by ``held_out_episodes``.

        Raises:
            ValueError: if there are fewer than two episodes.
        """
        index = torch.arange(len(self.length_E))
        kept = torch.from_numpy(held_out_episodes(len(index), held_out))
        return self._episodes(index[~kept]), self._episodes(index[kept])

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
        )

    def rows(self) -> torch.Tensor:
        """int64: the rows that belong to the episodes of this part."""
        return torch.cat([torch.arange(f, f + n) for f, n in zip(self.first_E, self.length_E, strict=True)])

    def sample(self, batch: int, num_states: int, text_ids_EL: torch.Tensor, generator: torch.Generator) -> WindowBatch:
        """Draw windows uniformly over all positions where ``num_states`` states fit.

        Args:
            batch: B.
            num_states: T.
            text_ids_EL: text segments of this part's episodes.
            generator: CPU generator.

        Raises:
            ValueError: if no episode is long enough.
        """
        places = (self.length_E - num_states + 1).clamp(min=0)
        total = int(places.sum())
        if total == 0:
            raise ValueError(f"no episode has {num_states} states; record longer ones or train with a smaller window")
        ends = places.cumsum(0)
        drawn = torch.randint(total, (batch,), generator=generator)
        episode = torch.searchsorted(ends, drawn, right=True)
        start = self.first_E[episode] + drawn - (ends[episode] - places[episode])
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
    store: EpisodeStore, tokenizer: IBQFrameTokenizer, cameras: tuple[str, ...], cache: Path
) -> TokenDataset:
    """Encode every readable episode; the codes are kept in ``cache`` and reused while data and tokenizer are the same.

    Raises:
        ValueError: if the dataset is empty or lacks a camera.
    """
    missing = [camera for camera in cameras if camera not in store.spec.cameras]
    if missing:
        raise ValueError(f"{store.folder} has cameras {tuple(store.spec.cameras)}, training needs {cameras}")
    key = hashlib.sha256(f"{store.data_hash} {_fingerprint(tokenizer)} {cameras}".encode()).hexdigest()
    known = _load_codes(cache, key)
    episodes: list[Episode] = []
    encoded: list[torch.Tensor] = []
    for episode in tqdm(store.iter_valid(), total=len(store), desc="read episodes", unit="ep"):
        if known is None:
            frames = np.stack([episode.frames[camera] for camera in cameras], 1)
            codes = tokenizer.encode(frames.reshape(-1, *frames.shape[2:]))
            encoded.append(codes.reshape(len(frames), -1).to(torch.int32))
        episodes.append(replace(episode, frames={}))
    if not episodes:
        raise ValueError(f"{store.folder} has no readable episode: run `emu-embodied collect` first")
    length_E = torch.tensor([len(episode) + 1 for episode in episodes])
    if known is not None and len(known) != int(length_E.sum()):
        cache.unlink()  # an episode that was readable when the codes were made is damaged now
        return encode_dataset(store, tokenizer, cameras, cache)
    codes_MN = torch.cat(encoded) if known is None else known
    if known is None:
        write_atomically(cache, lambda aside: save_file({"codes": codes_MN}, aside, metadata={"key": key}))
    actions = [np.concatenate([e.actions_TKA, np.zeros_like(e.actions_TKA[:1])]) for e in episodes]
    return TokenDataset(
        codes_MN,
        torch.from_numpy(np.concatenate([e.proprio_TP for e in episodes])),
        torch.from_numpy(np.concatenate(actions)),
        torch.from_numpy(np.concatenate([e.reward_T for e in episodes])),
        torch.from_numpy(np.concatenate([e.success_T for e in episodes])),
        tuple(e.instruction for e in episodes),
        torch.tensor([e.source in IMITATED for e in episodes]),
        length_E.cumsum(0) - length_E,
        length_E,
    )


def _fingerprint(tokenizer: IBQFrameTokenizer) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.ibq.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _load_codes(cache: Path, key: str) -> torch.Tensor | None:
    try:
        with safe_open(cache, "pt") as file:
            return file.get_tensor("codes") if (file.metadata() or {}).get("key") == key else None
    except (FileNotFoundError, SafetensorError):
        return None
