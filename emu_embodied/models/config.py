"""The backbone's shape, in the words of an official ``config.json``."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class EmuConfig(PretrainedConfig):
    """Shape of the backbone; the fields and names of an official ``config.json``.

    Args:
        vocab_size: token ids [tokens].
        hidden_size: width D of the residual stream.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads, a divisor of the query heads.
        head_dim: width of one head, even.
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotary frequencies.
        rope_scaling: always None, as released.
        max_position_embeddings: longest sequence meant to be read [tokens].
        attention_dropout: in training, on attention weights, both branches of a layer and the embeddings (as released).
        initializer_range: standard deviation of new weights.
        action_dim: A, dims of one action; 0 for a model that knows no continuous actions (the official one).
        action_block: K, actions of a block; 0 as above.
        **kwargs: token ids and whatever else an official file holds; kept and written back.

    Raises:
        ValueError: for a shape that cannot be built.
    """

    model_type = "Emu3"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 282_926,
        hidden_size: int = 5120,
        intermediate_size: int = 25_600,
        num_hidden_layers: int = 64,
        num_attention_heads: int = 64,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 1_000_000.0,
        rope_scaling: None = None,
        max_position_embeddings: int = 32_768,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        bos_token_id: int | None = 151_849,
        eos_token_id: int | None = 151_850,
        pad_token_id: int | None = 151_643,
        tie_word_embeddings: bool = False,
        action_dim: int = 0,
        action_block: int = 0,
        **kwargs: Any,
    ) -> None:
        if rope_scaling is not None:
            raise ValueError(f"rope_scaling {rope_scaling} is not supported: Emu3.5 has none")
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.action_dim = action_dim
        self.action_block = action_block
        if num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"{num_attention_heads} query heads cannot share {num_key_value_heads} key-value heads evenly"
            )
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} must be even: RoPE rotates pairs")
        if tie_word_embeddings:
            raise ValueError("Emu3.5's head is not tied to its embedding: set tie_word_embeddings to False")
        if (action_dim > 0) != (action_block > 0):
            raise ValueError(
                f"action_dim {action_dim} and action_block {action_block} must both be positive or both be 0"
            )
