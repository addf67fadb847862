"""Training on what the model itself imagines: its predictions as context, its samples as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from emu_embodied.data.batches import WindowBatch
from emu_embodied.decode.autoregressive import SequentialDecoder
from emu_embodied.decode.dida import StateDecoder
from emu_embodied.decode.grammar import expected_bin
from emu_embodied.decode.paths import StatePath
from emu_embodied.decode.sampling import sample
from emu_embodied.files import write_atomically
from emu_embodied.models.cache import KVCache
from emu_embodied.tokens.sequence import StateTokens
from emu_embodied.train.noise import noisy_logits
from emu_embodied.train.windows import WindowTokens, window_tokens
from emu_embodied.world_model import WorldModel

if TYPE_CHECKING:
    from emu_embodied.train.pretrain import WorldData, WorldTraining


def self_fed(
    world: WorldModel,
    batch: WindowBatch,
    config: WorldTraining,
    paths: Sequence[StatePath],
    generator: torch.Generator,
) -> tuple[WindowTokens, int]:
    """A batch of windows, the first of which show the model's own predictions from some state on.

    In such a window every state after a random first few is replaced by what the model predicts of it in one parallel
    pass from the source of a path drawn at random, all states at once; and again from the states so replaced, for each
    further own step (scheduled sampling, in parallel over time). The targets stay those of the data.

    Args:
        world: being adapted; no gradient flows through its predictions.
        batch: on its device.
        config: ``own_steps``, ``own_share`` and context noise.
        paths: noise processes.
        generator: CPU generator.

    Returns:
        The windows, and how many of the first ones show own predictions.
    """
    window = window_tokens(world, batch, config.context_noise, generator, object_noise=config.object_noise)
    rows, states = batch.codes_BTN.shape[:2]
    own = round(config.own_share * rows) if config.own_steps and states > 2 else 0
    if own == 0:
        return window, 0
    head = WindowBatch(*(getattr(batch, name)[:own] for name in WindowBatch.__slots__))
    data = StateTokens(head.codes_BTN, world.proprio.encode(head.proprio_BTP))
    first_B1 = torch.randint(1, states - 1, (own, 1), generator=generator)
    replaced_BT1 = (torch.arange(states) >= first_B1).to(batch.codes_BTN.device)[..., None]
    part = window_tokens(world, head, config.context_noise, generator, object_noise=config.object_noise)
    with torch.no_grad():
        for _ in range(config.own_steps):
            path = paths[int(torch.randint(len(paths), (), generator=generator))]
            found = noisy_logits(world, part, path.source(part.before, generator)).noisy
            codes, proprio = (
                sample(logits, world.config.temperature, generator).unflatten(0, (own, states - 1))
                for logits in (found.frame, found.proprio)
            )
            shown = StateTokens(
                torch.where(replaced_BT1, torch.cat([data.codes[:, :1], codes], 1), data.codes),
                torch.where(replaced_BT1, torch.cat([data.proprio[:, :1], proprio], 1), data.proprio),
            )
            part = window_tokens(world, head, 0.0, generator, shown)
    fed = window_tokens(world, head, 0.0, generator, shown)
    return _with_head(window, fed), own


def _with_head(window: WindowTokens, head: WindowTokens) -> WindowTokens:
    """The first windows of a batch replaced by others with the same targets."""
    rows = len(head.embeds_BLD)
    before = StateTokens(
        torch.cat([head.before.codes, window.before.codes[rows:]]),
        torch.cat([head.before.proprio, window.before.proprio[rows:]]),
    )
    return replace(window, embeds_BLD=torch.cat([head.embeds_BLD, window.embeds_BLD[rows:]]), before=before)


@torch.no_grad()
def imagined(world: WorldModel, decoder: StateDecoder, batch: WindowBatch, generator: torch.Generator) -> WindowBatch:
    """The same windows with every state after the first as the model imagines it from the actions of the data.

    Reward is the expected one, success the likelier answer; no action is worth imitating, since it was chosen for
    states that are not these.
    """
    rows, states = batch.codes_BTN.shape[:2]
    layout, backbone = world.layout, world.backbone
    cache = KVCache(
        backbone.config, rows, layout.length(states), device=world.device, dtype=backbone.lm_head.weight.dtype
    )
    current = StateTokens(batch.codes_BTN[:, 0], world.proprio.encode(batch.proprio_BTP[:, 0]))
    pending = torch.cat(
        [backbone.embed(batch.text_BL), backbone.embed(layout.state_ids(current.codes, current.proprio))], 1
    )
    codes, proprio = [batch.codes_BTN[:, 0]], [batch.proprio_BTP[:, 0]]
    reward, success = [batch.reward_BT[:, 0]], [batch.success_BT[:, 0]]
    for t in range(states - 1):
        actions_BKA = batch.actions_BTKA[:, t]
        action_ids = layout.action_ids(world.actions.encode(actions_BKA))
        pending = torch.cat([pending, backbone.embed(action_ids)], 1)
        state = decoder.decode(cache, pending, backbone.action_embedding(actions_BKA), current, generator)
        pending, current = state.pending_SLD, StateTokens(state.codes_SN, state.proprio_SP)
        codes.append(state.codes_SN)
        proprio.append(world.proprio.decode(state.proprio_SP))
        reward.append(world.reward.decode(expected_bin(state.logits.reward)))
        success.append(state.logits.success.argmax(-1).bool())
    return replace(
        batch,
        codes_BTN=torch.stack(codes, 1),
        proprio_BTP=torch.stack(proprio, 1),
        reward_BT=torch.stack(reward, 1),
        success_BT=torch.stack(success, 1),
        imitate_B=torch.zeros_like(batch.imitate_B),
    )


def own_samples(world: WorldModel, data: WorldData, config: WorldTraining, kept: Path, *, resume: bool) -> WindowBatch:
    """``config.distilled_windows`` windows whose states the next-token model samples (temperature 1).

    They are written to ``kept``, and read from there when a run is resumed: by then the weights are others.

    Raises:
        ValueError: if a run is resumed without the file, or with one of another size.
    """
    count = config.distilled_windows
    if resume and (kept.parent / "training" / "dida").exists():
        if not kept.exists():
            raise ValueError(f"{kept} is missing: a run that was started with own samples is resumed with them")
        pool = WindowBatch(**load_file(kept))
        if len(pool.codes_BTN) != count:
            raise ValueError(f"{kept} holds {len(pool.codes_BTN)} windows, {count} are asked for: start another --out")
        return pool
    generator = torch.Generator().manual_seed(config.loop.seed)
    decoder = SequentialDecoder(world.backbone, world.layout, temperature=1.0)
    training = world.backbone.training
    world.backbone.eval()
    parts = []
    with tqdm(total=count, desc="own samples", unit="window") as bar:
        for start in range(0, count, 32):
            rows = min(32, count - start)
            drawn = data.train.sample(rows, world.config.max_states, data.text_train_EL, generator)
            parts.append(imagined(world, decoder, drawn.to(world.device), generator).to(torch.device("cpu")))
            bar.update(rows)
    world.backbone.train(training)
    fields = {name: torch.cat([getattr(part, name) for part in parts]) for name in WindowBatch.__slots__}
    write_atomically(kept, lambda aside: save_file(fields, aside))
    return WindowBatch(**fields)


def with_own_samples(batch: WindowBatch, pool: WindowBatch, generator: torch.Generator) -> WindowBatch:
    """Half of a batch replaced by windows drawn from a pool."""
    rows = len(batch.codes_BTN)
    drawn = torch.randint(len(pool.codes_BTN), (rows // 2,), generator=generator).to(pool.codes_BTN.device)
    return WindowBatch(
        *(torch.cat([getattr(batch, n)[: rows - rows // 2], getattr(pool, n)[drawn]]) for n in WindowBatch.__slots__)
    )
