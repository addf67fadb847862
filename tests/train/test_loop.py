"""The training loop: resume is bit-equal, failures are named, budgets and signals end a run cleanly."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from emu_embodied.train.loop import (
    LoopConfig,
    LossOutput,
    TrainingFailed,
    learning_rate,
    run_loop,
    schedule_progress,
    step_generator,
)
from emu_embodied.train.optimizers import MuonAndAdamW, build_optimizer

FAST = {"device": "cpu", "dtype": "float32", "threads": 1}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(()))
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def loss(self, step, generator):
        ids = torch.randint(7, (16,), generator=generator)
        self.seen += ids.sum()
        rewritten = {}
        if step == 3:
            rows = torch.zeros(7, dtype=torch.bool)
            rows[2] = True
            with torch.no_grad():
                self.table.weight[rows] = torch.randn(1, 4, generator=generator)
            rewritten = {"table.weight": rows}
        loss = nn.functional.cross_entropy(self.out(self.norm(self.table(ids))), ids % 3)
        return LossOutput(loss, {"double": 2 * loss.detach()}, items=16, rewritten=rewritten)


def run(out, module=None, *, resume=False, loss=None, describe=None, **config):
    module = module or Toy()
    config = LoopConfig(**{**FAST, "steps": 12, "save_every": 5, "warmup_steps": 2, "log_every": 2, **config})
    result = run_loop(
        config, module, loss or module.loss, out, stage="toy", resume=resume, describe=describe or {"width": 4},
        tensorboard=False,
    )  # fmt: skip
    return module, result


def state_bytes(out):
    content = json.loads((out / "training/toy/state.json").read_text())
    tensors = load_file(out / "training/toy" / content["file"])
    content.pop("seconds")
    return content, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


class Kill(Exception):
    pass


@pytest.mark.parametrize(("ema_decay", "optimizer"), [(0.0, "adamw"), (0.9, "adamw"), (0.9, "muon")])
def test_resume_is_bit_equal_after_a_kill(tmp_path, ema_decay, optimizer):
    how = {"ema_decay": ema_decay, "optimizer": optimizer}
    whole, _ = run(tmp_path / "whole", **how)
    module = Toy()

    def killed(step, generator):
        if step == 7:
            raise Kill
        return module.loss(step, generator)

    with pytest.raises(Kill):
        run(tmp_path / "cut", module, loss=killed, **how)
    # The state is that of step 5; two more steps and a log line were lost.
    resumed, result = run(tmp_path / "cut", resume=True, **how)
    assert result.step == 12 and result.stopped == "steps"
    assert state_bytes(tmp_path / "cut") == state_bytes(tmp_path / "whole")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    lines = [json.loads(line) for line in (tmp_path / "cut/train_toy.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[0]["double"] == pytest.approx(2 * lines[0]["loss"])
    assert len(list((tmp_path / "cut/training/toy").iterdir())) == 2


def test_average_follows_the_weights(tmp_path):
    raw, _ = run(tmp_path / "raw")
    averaged, _ = run(tmp_path / "ema", ema_decay=0.99)
    _, tensors = state_bytes(tmp_path / "ema")
    assert tensors["module.out.weight"] == raw.out.weight.detach().numpy().tobytes()
    assert tensors["average.out.weight"] == averaged.out.weight.detach().numpy().tobytes()
    assert not torch.equal(raw.out.weight, averaged.out.weight)


def test_saved_and_evaluated_with_averaged_weights(tmp_path):
    module, seen = Toy(), []
    config = LoopConfig(**FAST, steps=6, save_every=3, eval_every=3, ema_decay=0.9, log_every=6)
    run_loop(
        config, module, module.loss, tmp_path, stage="toy", resume=False, describe={}, tensorboard=False,
        save=lambda step: seen.append((step, module.out.weight.detach().clone())),
        evaluate=lambda: {"weight": float(module.out.weight.sum()), "training": float(module.training)},
    )  # fmt: skip
    assert [step for step, _ in seen] == [3, 6]
    assert torch.equal(seen[-1][1], module.out.weight)
    lines = [json.loads(line) for line in (tmp_path / "train_toy.jsonl").read_text().splitlines()]
    evaluated = [line["eval/weight"] for line in lines if "eval/weight" in line]
    assert evaluated == pytest.approx([float(weight.sum()) for _, weight in seen])
    assert all(line["eval/training"] == 0 for line in lines if "eval/weight" in line)


def test_existing_run_is_resumed_or_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ValueError, match="--resume"):
        run(tmp_path)
    with pytest.raises(ValueError, match=r"width = 4, now it is 5"):
        run(tmp_path, resume=True, describe={"width": 5})
    with pytest.raises(ValueError, match=r"seed = 0, now it is 1"):
        run(tmp_path, resume=True, seed=1)
    _, result = run(tmp_path, resume=True, steps=14)
    assert result.step == 14


@pytest.mark.parametrize("damage", ["truncate", "remove", "json"])
def test_damaged_state_is_named(tmp_path, damage):
    run(tmp_path)
    (tensors,) = (tmp_path / "training/toy").glob("*.safetensors")
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "remove":
        tensors.unlink()
    else:
        (tmp_path / "training/toy/state.json").write_text("[1")
    name = "state.json" if damage == "json" else tensors.name
    with pytest.raises(ValueError, match=name):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_nan_stops_early_and_keeps_the_last_good_state(tmp_path, bad):
    module = Toy()

    def loss(step, generator):
        output = module.loss(step, generator)
        if step < 8:
            return output
        # sqrt at 0 has an infinite slope, so the loss is fine and the gradient is not.
        spoilt = output.loss * float("nan") if bad == "loss" else output.loss + (0 * module.out.weight).sum().sqrt()
        return LossOutput(spoilt)

    with pytest.raises(TrainingFailed, match=rf"{bad}.* at step 8"):
        run(tmp_path, module, loss=loss)
    content, _ = state_bytes(tmp_path)
    assert content["step"] == 5


def test_divergence_is_named(tmp_path):
    module = Toy()

    def loss(step, generator):
        output = module.loss(step, generator)
        return LossOutput(output.loss * (1 if step < 20 else 1e3))

    with pytest.raises(TrainingFailed, match="diverged"):
        run(tmp_path, module, loss=loss, steps=500, divergence_patience=14)
    # Every fifth step is saved, but not while the loss is too high.
    assert json.loads((tmp_path / "training/toy/state.json").read_text())["step"] == 20


@pytest.mark.parametrize("end", ["steps", "signal"])
def test_a_run_that_ends_while_it_diverges_keeps_what_was_good(tmp_path, end):
    module = Toy()

    def loss(step, generator):
        if step == 22 and end == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        output = module.loss(step, generator)
        return LossOutput(output.loss * (1 if step < 20 else 1e3))

    with pytest.raises(TrainingFailed, match=r"diverged: .* the last good state is kept"):
        run(tmp_path, module, loss=loss, steps=24)
    content, tensors = state_bytes(tmp_path)
    assert content["step"] == 20
    assert tensors["module.out.weight"] != module.out.weight.detach().numpy().tobytes()


def test_time_budget_drives_the_decay(tmp_path):
    now = [0.0]

    def clock():
        now[0] += 0.5
        return now[0]

    module, rates = Toy(), []
    config = LoopConfig(**FAST, steps=10**6, max_minutes=1.0, log_every=1, warmup_steps=1, min_lr_ratio=0.1)
    result = run_loop(
        config, module, module.loss, tmp_path, stage="toy", resume=False, describe={}, clock=clock, tensorboard=False,
        on_log=lambda line: rates.append(line["lr"]),
    )  # fmt: skip
    assert result.stopped == "time" and 60 <= result.seconds < 62
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1 * config.learning_rate, rel=0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_stops(tmp_path, number):
    module = Toy()
    before = signal.getsignal(number)

    def loss(step, generator):
        if step == 6:
            os.kill(os.getpid(), number)
        return module.loss(step, generator)

    _, result = run(tmp_path, module, loss=loss)
    assert result.stopped == "signal" and result.step == 7
    assert state_bytes(tmp_path)[0]["step"] == 7
    assert signal.getsignal(number) == before
    whole, _ = run(tmp_path / "whole")
    resumed, _ = run(tmp_path, resume=True)
    assert torch.equal(whole.out.weight, resumed.out.weight)


def test_schedules():
    cosine = LoopConfig(steps=100, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    assert learning_rate(cosine, 0, 0.0) == pytest.approx(0.1)
    assert learning_rate(cosine, 50, 0.5) == pytest.approx(0.55)
    assert learning_rate(cosine, 100, 1.0) == pytest.approx(0.1)
    wsd = LoopConfig(steps=100, schedule="wsd", decay_fraction=0.2, warmup_steps=1, learning_rate=1.0, min_lr_ratio=0)
    assert learning_rate(wsd, 79, 0.79) == 1
    assert learning_rate(wsd, 90, 0.9) == pytest.approx(0.5)
    timed = LoopConfig(steps=100, max_minutes=1.0)
    assert schedule_progress(timed, 10, 30) == 0.5
    assert schedule_progress(timed, 70, 30) == 0.7


def test_only_matrices_are_decayed():
    module = Toy()
    decayed, kept = build_optimizer(LoopConfig(), module).param_groups
    assert [id(p) for p in decayed["params"]] == [id(module.out.weight)]
    assert kept["weight_decay"] == 0 and len(kept["params"]) == 4


def test_muon_takes_hidden_matrices_and_nothing_else():
    module = nn.Module()
    module.toy, module.lm_head = Toy(), nn.Linear(4, 9)
    optimizer = build_optimizer(LoopConfig(optimizer="muon"), module)
    assert isinstance(optimizer, MuonAndAdamW)
    (muon,), (decayed, kept) = (part.param_groups for part in optimizer.parts)
    assert [id(p) for p in muon["params"]] == [id(module.toy.out.weight)]
    assert [id(p) for p in decayed["params"]] == [id(module.lm_head.weight)]
    assert len(kept["params"]) == 5
    for group in optimizer.param_groups:
        group["lr"] = 0.25
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.25}


def test_muon_turns_all_directions_of_a_matrix_alike():
    module = nn.Linear(6, 6, bias=False)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(LoopConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.0), module)
    module.weight.grad = torch.diag(torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0, 0.5]))
    optimizer.step()
    moved = torch.linalg.svdvals(before - module.weight.detach())
    # Five Newton-Schulz steps bring singular values near 1, within about 0.3; 0.2 sqrt(6) is AdamW's size.
    assert ((moved / (0.1 * 0.2 * 6**0.5) - 1).abs() < 0.4).all()


def test_generators_depend_on_seed_and_step():
    draws = {float(torch.rand((), generator=step_generator(seed, step))) for seed in range(3) for step in range(3)}
    assert len(draws) == 9


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("max_minutes", -1.0), ("ema_decay", 1.0), ("schedule", "step")]
)
def test_bad_config_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        LoopConfig(**{field: value})
