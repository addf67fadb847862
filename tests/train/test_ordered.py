"""New embeddings of ordered bins: neighbours are alike, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from emu_embodied.models.transformer import EmuForCausalLM
from emu_embodied.presets import PRESETS
from emu_embodied.train.ordered import order_bins, sinusoids

PRESET = PRESETS["nano"]
VOCABULARY = PRESET.vocabulary()


@pytest.fixture(scope="module")
def models() -> tuple[EmuForCausalLM, EmuForCausalLM]:
    made = []
    for ordered in (False, True):
        torch.manual_seed(0)
        made.append(EmuForCausalLM(PRESET.backbone(4)))
        if ordered:
            order_bins(made[-1], VOCABULARY)
    return made[0], made[1]


@pytest.mark.parametrize("kind", ["state", "action", "reward"])
@pytest.mark.parametrize("table", ["model.embed_tokens.weight", "lm_head.weight"])
def test_neighbours_are_alike_and_as_long_as_before(models, kind, table):
    span = getattr(VOCABULARY, kind)
    before, after = (model.state_dict()[table][span.start : span.stop] for model in models)
    alike = torch.nn.functional.cosine_similarity(after[:-1], after[1:], dim=-1)
    far = torch.nn.functional.cosine_similarity(after[: span.size // 2], after[span.size // 2 :], dim=-1)
    assert float(alike.min()) > 0.8 > 0.7 > float(far.mean())
    assert float(after.norm(dim=-1).mean()) == pytest.approx(float(before.norm(dim=-1).mean()), rel=0.05)
    assert torch.cdist(after, after).fill_diagonal_(torch.inf).min() > 0  # no two bins are one


def test_other_rows_stay(models):
    before, after = (model.state_dict() for model in models)
    for name in before:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            kept = torch.ones(VOCABULARY.size, dtype=torch.bool)
            for span in (VOCABULARY.state, VOCABULARY.action, VOCABULARY.reward):
                kept[span.start : span.stop] = False
            assert torch.equal(before[name][kept], after[name][kept])
        else:
            assert torch.equal(before[name], after[name])


@pytest.mark.parametrize(("bins", "width"), [(2, 5), (64, 16), (256, 128)])
def test_rows_have_one_length(bins, width):
    rows = sinusoids(bins, width)
    assert rows.shape == (bins, width)
    if width % 2 == 0:
        torch.testing.assert_close(rows.norm(dim=-1), torch.full((bins,), (width / 2) ** 0.5))
