"""Emu3.5's vision tokenizer at every size: a convolutional autoencoder with index backpropagation quantisation (IBQ).

A frame becomes a grid of codes; a code is the row of the codebook with the largest dot product. Training passes
gradients to the whole codebook through a softmax (Shi et al. 2024, as released with Emu3.5).

Shape letters: B batch, C channels, H/W pixels, h/w codes, N codes of a batch, D code dim, K codebook size.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from emu_embodied.files import write_atomically, write_json
from emu_embodied.models.autoencoder import Decoder, Encoder, IBQConfig
from emu_embodied.models.checkpoints import compare_shapes, read_config, read_folder_shapes
from emu_embodied.models.kmeans import far_apart, refine, to_directions
from emu_embodied.models.strips import Strips, whole
from emu_embodied.require import require

MODEL_TYPE = "emu_embodied_ibq"
_OFFICIAL_TYPES = ("Emu3p5VisionVQ", "Emu3VisionVQ")


@dataclass(frozen=True, slots=True)
class IBQOutput:
    """What a training step needs.

    Attributes:
        reconstruction: float [B, C, H, W], about [-1, 1].
        codes: int64 [B, h, w].
        quantise_loss: scalar; pulls code vectors and encoder outputs together.
        entropy_loss: scalar; mean entropy of a position minus entropy of the mean (low when sure and diverse) [nats].
        vectors: float [B, h, w, D], encoder outputs before quantisation, detached; what ``revive`` draws from.
    """

    reconstruction: torch.Tensor
    codes: torch.Tensor
    quantise_loss: torch.Tensor
    entropy_loss: torch.Tensor
    vectors: torch.Tensor


class Codebook(nn.Module):
    """K code vectors; a vector's code is the row with the largest dot product."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.n_embed, config.embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.n_embed, 1 / config.n_embed)

    def nearest(self, vectors: torch.Tensor, chunk: int = 1 << 26) -> torch.Tensor:
        """Codes int64 [N] of vectors [N, D], with at most ``chunk`` dot products held at once."""
        rows = max(1, chunk // len(self.embedding.weight))
        return torch.cat([(part @ self.embedding.weight.T).argmax(1) for part in vectors.split(rows)])


class IBQ(nn.Module):
    """The vision tokenizer: pixels <-> codes.

    Args:
        config: its shape.
    """

    chunk_pixels = 1 << 20
    """Pixels encoded or decoded at once; bounds memory. A larger batch goes through in parts; an image that is larger
    by itself in strips of rows of about so many pixels: the same codes in about twice the time, and memory
    for one activation of ``ch`` x H x W and a few strips [pixels]."""
    commitment = 0.25
    """Weight of pulling code vectors towards encoder outputs (beta of VQ-VAE, as released)."""
    entropy_temperature = 0.01
    """Temperature of the softmax whose entropies are compared (as released)."""

    def __init__(self, config: IBQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def codebook(self) -> torch.Tensor:
        """Code vectors [K, D]."""
        return self.quantize.embedding.weight

    def vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encoder outputs before quantisation: [B, C, H, W] in [-1, 1] -> [B, h, w, D].

        Raises:
            ValueError: if a side is no multiple of ``config.cell``.
        """
        cell, channels = self.config.cell, self.config.in_channels
        if (
            pixels.dim() != 4
            or pixels.shape[1] != channels
            or any(side % cell or not side for side in pixels.shape[2:])
        ):
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)}: expected [B, {channels}, H, W] with H and W multiples of "
                f"{cell}, the side of one code's cell, and at least one cell; resize or pad the frames"
            )
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        encoded = self.encoder(self._strips(pixels, pixels.shape[2:].numel()))
        return whole(self.quant_conv(encoded)).permute(0, 2, 3, 1)

    def paint(self, vectors: torch.Tensor) -> torch.Tensor:
        """Decoder: code vectors [B, h, w, D] -> pixels [B, C, H, W], about [-1, 1]."""
        z = self.post_quant_conv(vectors.permute(0, 3, 1, 2))
        return whole(self.decoder(self._strips(z, z.shape[2:].numel() * self.config.cell**2)))

    def _strips(self, x: torch.Tensor, pixels: int) -> Any:
        """What the autoencoder reads: ``x`` itself, or strips of it if it stands for too many pixels."""
        if pixels <= self.chunk_pixels or torch.is_grad_enabled():
            return x
        return Strips.of(x, self.chunk_pixels // self.config.patch**2 * self.config.ch)

    def plain(self, pixels: torch.Tensor) -> torch.Tensor:
        """Reconstruct [B, C, H, W] without quantisation, from the directions of the encoder's outputs alone.

        A code is chosen by direction, so an autoencoder that will be quantised should keep nothing in lengths.
        """
        vectors = self.vectors(pixels)
        return self.paint(F.normalize(vectors, dim=-1) * math.sqrt(self.config.embed_dim))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [B, C, H, W] in [-1, 1] -> codes int64 [B, h, w], in chunks of bounded memory.

        Raises:
            ValueError: if a side is no multiple of ``config.cell``.
        """
        return torch.cat([self._encode(part) for part in pixels.split(self._rows(pixels.shape[-2] * pixels.shape[-1]))])

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        vectors = self.vectors(pixels)
        return self.quantize.nearest(vectors.reshape(-1, vectors.shape[-1])).view(vectors.shape[:3])

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes int64 [B, h, w] in [0, K) -> pixels [B, C, H, W], about [-1, 1], in chunks of bounded memory.

        Raises:
            ValueError: if a code is outside the codebook.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.n_embed:
            raise ValueError(
                f"codes lie in [{int(codes.min())}, {int(codes.max())}], but the codebook holds {self.config.n_embed}"
            )
        rows = self._rows(codes.shape[-2] * codes.shape[-1] * self.config.cell**2)
        return torch.cat([self.paint(self.quantize.embedding(part)) for part in codes.split(rows)])

    def _rows(self, pixels: int) -> int:
        return max(1, self.chunk_pixels // max(1, pixels))

    def forward(self, pixels: torch.Tensor) -> IBQOutput:
        """Reconstruct with gradients to encoder, decoder and the whole codebook.

        Args:
            pixels: [B, C, H, W] in [-1, 1].
        """
        vectors = self.vectors(pixels)
        z = vectors.reshape(-1, vectors.shape[-1])
        book = self.codebook
        logits = z @ book.T
        soft = logits.softmax(1)
        codes = logits.argmax(1)
        hard = book[codes]
        # (onehot - sg(soft) + soft) @ book without the one-hot matrix: gradients reach z and every row of the book.
        quantised = hard + (soft - soft.detach()) @ book
        quantise_loss = (
            F.mse_loss(quantised, z) + F.mse_loss(hard.detach(), z) + self.commitment * F.mse_loss(hard, z.detach())
        )
        return IBQOutput(
            reconstruction=self.paint(quantised.view(vectors.shape)),
            codes=codes.view(vectors.shape[:3]),
            quantise_loss=quantise_loss,
            entropy_loss=_entropy_gap(logits / self.entropy_temperature),
            vectors=vectors.detach(),
        )

    @torch.no_grad()
    def initialise_codebook(self, vectors: torch.Tensor, generator: torch.Generator) -> None:
        """Start the codebook from what the encoder gives for real frames, so that every code is in reach.

        Codes become directions of encoder outputs, found by k-means, at one norm: the largest dot product is then the
        nearest direction. A codebook that starts at random collapses to the few codes whose rows happen to be long. An
        autoencoder that was trained by ``plain`` has put all it knows into directions, so little is lost.

        Args:
            vectors: outputs of ``vectors`` for a varied batch of frames, [..., D]; several times K of them.
            generator: seeds the k-means.
        """
        norm = math.sqrt(self.config.embed_dim)
        scale = norm / vectors.norm(dim=-1).mean().clamp_min(1e-6)
        assert self.quant_conv.bias is not None
        self.quant_conv.weight.mul_(scale)
        self.quant_conv.bias.mul_(scale)
        directions = to_directions(vectors.to(self.codebook.dtype), generator)
        self.codebook.copy_(refine(far_apart(directions, self.config.n_embed, generator), directions) * norm)

    @torch.no_grad()
    def revive(self, unused: torch.Tensor, vectors: torch.Tensor, generator: torch.Generator) -> int:
        """Move codes that are no longer chosen to encoder outputs that the other codes are far from.

        Args:
            unused: bool [K] or indices of the codes to move.
            vectors: recent encoder outputs [..., D], e.g. ``IBQOutput.vectors``.
            generator: chooses among them.

        Returns:
            How many codes were moved.
        """
        rows = unused.nonzero().flatten() if unused.dtype == torch.bool else unused.flatten()
        if len(rows):
            kept = torch.ones(len(self.codebook), dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)
            # As long as codes in use: a shorter one would never have the largest dot product.
            norm = self.codebook[kept if kept.any() else ~kept].norm(dim=1).median()
            directions = to_directions(vectors.to(self.codebook.dtype), generator)
            taken = F.normalize(self.codebook[kept], dim=1)
            self.codebook[rows] = far_apart(directions, len(rows), generator, taken) * norm
        return len(rows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all."""
        folder = Path(folder)
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items()}
        write_atomically(folder / "model.safetensors", lambda aside: save_file(tensors, aside, {"format": "pt"}))
        write_json(folder / "config.json", {"model_type": MODEL_TYPE, **asdict(self.config)})

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str = "cpu") -> IBQ:
        """Read a tokenizer: ours or Emu3.5's safetensors folder, or the official ``config.yaml`` + ``model.ckpt``.

        Raises:
            ValueError: naming the file that is missing, damaged, or of another model, before memory is spent.
        """
        folder = Path(folder)
        config = read_ibq_config(folder)
        with torch.device("meta"):
            model = cls(config)
        if (folder / "model.safetensors").is_file() or not (folder / "model.ckpt").is_file():
            compare_shapes(model, read_folder_shapes(folder), folder)
            state = load_file(folder / "model.safetensors")
        else:
            path = folder / "model.ckpt"
            state = _read_ckpt(path)
            compare_shapes(model, {name: (path, tuple(tensor.shape)) for name, tensor in state.items()}, folder)
        model.load_state_dict(state, assign=True)
        model = model.to(device=device, dtype=torch.float32).eval()
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _entropy_gap(logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy of each row's distribution minus the entropy of their mean, [N, K] -> scalar [nats]."""
    log_each = logits.log_softmax(1)
    each = log_each.exp()
    mean = each.mean(0)
    return -(each * log_each).sum(1).mean() + (mean * (mean + 1e-10).log()).sum()


@dataclass(frozen=True, slots=True)
class CodeUsage:
    """How much of a codebook some codes use.

    Attributes:
        counts: int64 [K], how often each code occurs.
        used: share of the codebook that occurs at all, in [0, 1].
        perplexity: number of codes that, used evenly, would have the same entropy [codes].
    """

    counts: torch.Tensor
    used: float
    perplexity: float


def code_usage(codes: torch.Tensor, size: int) -> CodeUsage:
    """Count codes (int64, any shape) of a codebook of ``size``."""
    counts = torch.bincount(codes.flatten(), minlength=size)
    share = counts / counts.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    return CodeUsage(counts, float((counts > 0).float().mean()), float(entropy.exp()))


def to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] in [-1, 1], channels last in memory."""
    return (frames.float() / 127.5 - 1.0).permute(0, 3, 1, 2)


def to_frames(pixels: torch.Tensor) -> torch.Tensor:
    """Float [B, C, H, W] about [-1, 1] -> uint8 [B, H, W, C], clamped and cut as the official code does."""
    return ((pixels + 1.0) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


_NAMES = {"codebook_size": "n_embed", "out_channels": "out_ch"}
"""Names in the official safetensors folder's config.json -> ours."""


def is_ibq_folder(folder: Path) -> bool:
    """Whether a folder holds the configuration of a vision tokenizer."""
    try:
        read_ibq_config(folder)
    except ValueError:
        return False
    return True


def read_ibq_config(folder: Path) -> IBQConfig:
    """A tokenizer's shape from config.json (ours or the official one) or the official config.yaml.

    Raises:
        ValueError: naming the file that is missing, damaged, or of another model.
    """
    if (folder / "config.json").is_file() or not (folder / "config.yaml").is_file():
        path = folder / "config.json"
        content = read_config(folder)
        if content.get("model_type", MODEL_TYPE) not in (MODEL_TYPE, *_OFFICIAL_TYPES):
            raise ValueError(f"{path} describes a {content['model_type']!r}, not a vision tokenizer")
    else:
        path = folder / "config.yaml"
        yaml = require("yaml", extra="emu35")
        try:
            content = yaml.safe_load(path.read_text())
            content = {**content, **content.pop("ddconfig")}
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a vision tokenizer's configuration ({error!r})") from error
    content = {_NAMES.get(name, name): value for name, value in content.items()}
    if content.get("double_z"):
        raise ValueError(f"{path}: double_z is set, which is a VAE's, not this tokenizer's")
    known = {field.name for field in fields(IBQConfig)}
    needed = {"ch", "ch_mult", "num_res_blocks", "z_channels", "embed_dim", "n_embed"}
    if missing := sorted(needed - content.keys()):
        raise ValueError(f"{path} lacks {', '.join(missing)}: not a vision tokenizer's configuration")
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
    }
    try:
        return IBQConfig(**{name: value for name, value in values.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read_ckpt(path: Path) -> dict[str, torch.Tensor]:
    """State dict of an official ``model.ckpt``, mapped and never unpickled; training-only parts dropped."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as plain weights: damaged, cut off, or not a checkpoint") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError(f"{path} is not a state dict of tensors")
    return {name: tensor for name, tensor in state.items() if not name.startswith(("loss.", "model_ema."))}
