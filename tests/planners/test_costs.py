import pytest
import torch

from emu_embodied.planners.costs import averaged, penalised


def test_a_mean_over_decodes_is_less_noisy_and_right():
    generator = torch.Generator().manual_seed(0)
    asked = []

    def noisy(actions_SHKA):
        asked.append(len(actions_SHKA))
        return actions_SHKA.sum(dim=(1, 2, 3)) + torch.randn(len(actions_SHKA), generator=generator)

    actions_SHKA = torch.rand(4000, 2, 1, 1)
    truth_S = actions_SHKA.sum(dim=(1, 2, 3))
    errors = [(averaged(noisy, decodes)(actions_SHKA) - truth_S).std() for decodes in (1, 4)]
    assert errors[0] == pytest.approx(1, abs=0.05) and errors[1] == pytest.approx(0.5, abs=0.03)
    assert asked == [4000, 16000]
    with pytest.raises(ValueError, match="decodes must be at least 1"):
        averaged(noisy, 0)


def test_a_penalty_is_weighed():
    cost_S = penalised(lambda a: a[:, 0, 0, 0], lambda a: a[:, 0, 0, 1], 0.5)(torch.tensor([[[[1.0, 4.0]]]]))
    assert cost_S.tolist() == [3.0]
