"""Tokens per second of the backbone against transformers' Qwen3 ``generate``: same weights, same tokens, one run.

python -m emu_embodied.experiments.bench_backbone --json experiments/results/backbone.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
import tyro
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config, Qwen3ForCausalLM

from emu_embodied.files import write_json
from emu_embodied.models.cache import KVCache
from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.presets import preset
from emu_embodied.provenance import make_meta, meta_dict

Generate = Callable[[torch.Tensor, int], torch.Tensor]
"""(prompt ids [B, T], number of new tokens N) -> new ids [B, N], greedy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneBench:
    """What to measure."""

    presets: str = "nano,small,base:4"
    """Sizes, with commas between; ``name:N`` is the first N layers of one."""
    batches: str = "1,8"
    """Batch sizes, with commas between [sequences]."""
    prompt: int = 256
    """Length of the prompt [tokens]."""
    new: int = 64
    """Tokens decoded behind it [tokens]."""
    repeats: int = 5
    """Measurements of each kind, taken in turns; the fastest counts, as whatever else runs can only slow one down. On
    one CPU thread the time is that of the CPU, so that waiting for others does not count."""
    threads: int = 1
    """CPU threads [threads]."""
    device: str = "cpu"
    """Where to compute."""
    json: Path | None = None
    """Where to write the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way of decoding at one size and batch. Rates count the tokens of all sequences of a batch."""

    preset: str
    batch: int
    who: str
    """``ours``, ``transformers`` (its default cache) or ``transformers static``."""
    prefill_per_second: float
    """Prompt tokens read per second [tokens/s]."""
    decode_per_second: float
    """New tokens per second, the prompt's time not counted [tokens/s]."""
    ours_is_faster: float
    """Our decoding rate over this one."""
    peak_memory: float
    """Weights and the most that was allocated beside them while reading the prompt and decoding, over the weights."""


def ours(model: EmuForCausalLM) -> Generate:
    """Greedy decoding with our cache; the head is paid for the last token only."""

    @torch.inference_mode()
    def generate(prompt: torch.Tensor, new: int) -> torch.Tensor:
        batch, length = prompt.shape
        cache = KVCache(model.config, batch, length + new, device=model.device, dtype=model.dtype)
        positions = torch.arange(length + new, device=prompt.device)
        step, tokens = prompt, []
        for _ in range(new):
            here = positions[cache.length : cache.length + step.shape[1]]
            hidden = model.core(model.embed(step), here, cache=cache)
            step = model.head(hidden[:, -1]).argmax(-1, keepdim=True)
            tokens.append(step)
        return torch.cat(tokens, 1)

    return generate


def theirs(model: Qwen3ForCausalLM, cache: str | None) -> Generate:
    """Greedy decoding of transformers with one of its caches."""

    def generate(prompt: torch.Tensor, new: int) -> torch.Tensor:
        found: torch.Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new,
            do_sample=False,
            cache_implementation=cache,
        )
        return found[:, prompt.shape[1] :]

    return generate


def build(name: str, device: str) -> tuple[EmuForCausalLM, Qwen3ForCausalLM]:
    """Our backbone of a preset with random weights, and Qwen3 sharing these very weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = preset(name.partition(":")[0]).backbone(action_dim=4)
        config.num_hidden_layers = int(name.partition(":")[2] or config.num_hidden_layers)
        model = EmuForCausalLM(config).eval().to(device)
    return model, qwen3_twin(model)


def qwen3_twin(model: EmuForCausalLM) -> Qwen3ForCausalLM:
    """Qwen3 of transformers with the same shape, sharing the weights."""
    config, device = model.config, model.device
    with torch.device("meta"):
        twin = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                rms_norm_eps=config.rms_norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                eos_token_id=None,
                pad_token_id=config.pad_token_id,
            )
        )
    rotary = twin.model.rotary_emb
    twin.model.rotary_emb = type(rotary)(rotary.config).to(device)  # its buffers are in no state dict
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("action_embedding")}
    twin.load_state_dict(weights, assign=True)
    twin.generation_config.eos_token_id = None
    return twin.eval()


def bench(name: str, batch: int, config: BackboneBench) -> list[Row]:
    """Measure all ways of decoding at one size and batch.

    Raises:
        ValueError: if they do not decode the same tokens.
    """
    model, twin = build(name, config.device)
    ways = {"ours": ours(model), "transformers": theirs(twin, None), "transformers static": theirs(twin, "static")}
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size, (batch, config.prompt), generator=generator).to(config.device)
    expected = ways["ours"](prompt, config.new)
    for who, generate in ways.items():
        if not torch.equal(generate(prompt, config.new), expected):
            raise ValueError(f"{who} decodes other tokens than ours ({name}, batch {batch}): the figures mean nothing")
    first = dict.fromkeys(ways, float("inf"))
    whole = dict(first)
    for _ in range(config.repeats):
        for who, generate in ways.items():
            first[who] = min(first[who], _seconds(generate, prompt, 1))
            whole[who] = min(whole[who], _seconds(generate, prompt, config.new))
    prefill = {who: batch * config.prompt / first[who] for who in ways}
    decode = {who: batch * (config.new - 1) / (whole[who] - first[who]) for who in ways}
    weights = sum(weight.nbytes for weight in twin.parameters())
    return [
        Row(
            preset=name,
            batch=batch,
            who=who,
            prefill_per_second=prefill[who],
            decode_per_second=decode[who],
            ours_is_faster=decode["ours"] / decode[who],
            peak_memory=1 + _most_allocated(generate, prompt) / weights,
        )
        for who, generate in ways.items()
    ]


def _seconds(generate: Generate, prompt: torch.Tensor, new: int) -> float:
    clock = time.process_time if prompt.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    generate(prompt, new)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def _most_allocated(generate: Generate, prompt: torch.Tensor) -> int:
    """Memory taken beside what is there already, to read a prompt and decode a few tokens [bytes]."""
    if prompt.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        generate(prompt, 8)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        generate(prompt, 8)
    events = sorted(profiler.events() or [], key=lambda event: event.time_range.start)
    return max(accumulate((event.self_cpu_memory_usage for event in events), initial=0))


def main(config: BackboneBench) -> None:
    """Measure, print a table, write JSON."""
    torch.set_num_threads(config.threads)
    print(f"{'preset':8s} {'batch':>5s} {'who':20s} {'prefill/s':>10s} {'decode/s':>9s} {'ours x':>7s} {'memory':>7s}")
    rows: list[Row] = []
    for name in config.presets.split(","):
        for batch in config.batches.split(","):
            for row in bench(name.strip(), int(batch), config):
                rows.append(row)
                print(
                    f"{row.preset:8s} {row.batch:5d} {row.who:20s} {row.prefill_per_second:10.0f} "
                    f"{row.decode_per_second:9.0f} {row.ours_is_faster:7.2f} {row.peak_memory:7.2f}",
                    flush=True,
                )
    if config.json is not None:
        write_json(config.json, {"rows": [asdict(row) for row in rows], "meta": meta_dict(make_meta(seed=0))})


if __name__ == "__main__":
    main(tyro.cli(BackboneBench))
