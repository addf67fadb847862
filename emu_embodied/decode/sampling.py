"""Drawing tokens from logits."""

from __future__ import annotations

import torch


def sample(logits: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """Draw from softmax(logits / temperature) over the last dimension; temperature 0 takes the most likely.

    Uses the exponential race (argmax of p / Exp(1)), which needs no host synchronisation.

    Raises:
        ValueError: if temperature is negative, or a generator is missing although one is needed.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    if temperature == 0:
        return logits.argmax(-1)
    if generator is None:
        raise ValueError("sampling at temperature > 0 needs a seeded generator")
    probabilities = torch.softmax(logits.float() / temperature, -1)
    race = torch.empty(probabilities.shape, device=generator.device).exponential_(generator=generator)
    return (probabilities / race.to(probabilities.device)).argmax(-1)


def restrict(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Logits [..., V] with -inf outside the ``top_k`` largest (0: all), then outside the likeliest of mass ``top_p``.

    The token that crosses ``top_p`` is kept, and so are all that equal the k-th largest, as in transformers.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        mass = ordered.softmax(-1)
        beyond = mass.cumsum(-1) - mass > top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    return logits


def uniform(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Float32 numbers in [0, 1) of a tensor's shape on its device, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, generator=generator, device=device).to(like.device)
