from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from emu_embodied.models.masks import NoisyCopies, causal_then_parallel
from emu_embodied.models.transformer import EmuConfig, EmuForCausalLM

REFERENCE = Path(__file__).parents[2] / ".." / "shared" / "emu35_reference" / "lm"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"{REFERENCE} holds the official outputs; absent")

SHARED_WITH_QWEN3 = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def tiny(**changes) -> EmuConfig:
    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return EmuConfig(**{**shape, **changes})


def build(config: EmuConfig, seed: int = 0) -> EmuForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EmuForCausalLM(config).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that forgets its weight
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def qwen3(model: EmuForCausalLM) -> Qwen3ForCausalLM:
    config = model.config
    shape = {name: value for name, value in config.to_dict().items() if name in SHARED_WITH_QWEN3}
    theirs = Qwen3ForCausalLM(
        Qwen3Config(
            **shape,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
        )
    ).eval()
    theirs.load_state_dict(model.state_dict())
    return theirs


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
        {"hidden_size": 64, "num_attention_heads": 8, "head_dim": 32},
    ],
)
def test_logits_equal_qwen3(shape):
    model = build(tiny(**shape))
    theirs = qwen3(model)
    tokens = ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
        padding = torch.ones_like(tokens)
        padding[1, :13] = 0
        ours, expected = (net(input_ids=tokens, attention_mask=padding).logits for net in (model, theirs))
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1, 13:], expected[1, 13:], atol=1e-5, rtol=1e-5)


def test_gradients_and_loss_equal_qwen3():
    model = build(tiny())
    theirs = qwen3(model)
    tokens = ids(2, 12)
    loss, expected = (net(input_ids=tokens, labels=tokens).loss for net in (model, theirs))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            weight.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n} {text}"
        )


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate_of_transformers_equals_qwen3(options):
    model = build(tiny())
    prompt, padding = ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    padding[1, :4] = 0
    ours, theirs = (
        net.generate(prompt, attention_mask=padding, max_new_tokens=12, **options) for net in (model, qwen3(model))
    )
    assert ours.tolist() == theirs.tolist()


@needs_reference
def test_logits_equal_the_official_code():
    reference = load_file(REFERENCE / "reference.safetensors")
    model = EmuForCausalLM.from_pretrained(REFERENCE)
    assert not model.training and model.config.rms_norm_eps == 1e-6 and model.config.eos_token_id == 151_850
    with torch.no_grad():
        logits = model(input_ids=reference["input_ids"]).logits
    torch.testing.assert_close(logits[..., reference["vocab_subset"]], reference["logits"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits.logsumexp(-1), reference["logsumexp"], atol=1e-5, rtol=1e-5)


def test_the_released_size_has_its_keys_shapes_and_34_billion_parameters():
    with torch.device("meta"):
        model = EmuForCausalLM(EmuConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected = {
        "model.embed_tokens.weight": (282_926, 5120),
        "lm_head.weight": (282_926, 5120),
        "model.norm.weight": (5120,),
    }
    for layer in range(64):
        expected |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (8192, 5120),
                "self_attn.k_proj": (1024, 5120),
                "self_attn.v_proj": (1024, 5120),
                "self_attn.o_proj": (5120, 8192),
                "self_attn.q_norm": (128,),
                "self_attn.k_norm": (128,),
                "mlp.gate_proj": (25_600, 5120),
                "mlp.up_proj": (25_600, 5120),
                "mlp.down_proj": (5120, 25_600),
                "input_layernorm": (5120,),
                "post_attention_layernorm": (5120,),
            }.items()
        }
    assert shapes == expected
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == 34.10


def test_head_of_some_ids_is_a_part_of_the_whole():
    model = build(tiny())
    hidden = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.head(hidden, slice(10, 30)), model.head(hidden)[..., 10:30])


def test_noisy_copies_equal_the_mask_written_out():
    model = build(tiny())
    copies = NoisyCopies(11, (3, 7), 4)
    embeds = torch.randn(2, 19, 48, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([*range(11), *range(3, 7), *range(7, 11)])
    with torch.no_grad():
        found, expected = (model.core(embeds, positions, mask) for mask in (copies, copies.dense()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_noise_never_reaches_clean_tokens_nor_other_copies():
    model = build(tiny())
    copies = NoisyCopies(11, (3, 7), 4)
    positions = torch.tensor([*range(11), *range(3, 7), *range(7, 11)])
    embeds = torch.randn(1, 19, 48, generator=torch.Generator().manual_seed(0))

    def changed(token: int) -> set[int]:
        other = embeds.clone()
        other[0, token] += 1.0
        with torch.no_grad():
            difference = model.core(embeds, positions, copies) - model.core(other, positions, copies)
        return set(difference[0].abs().amax(-1).nonzero().flatten().tolist())

    assert changed(12) == {11, 12, 13, 14}  # a token of the first copy: only its own copy
    assert changed(5) == {*range(5, 11), 15, 16, 17, 18}  # hidden from the first copy, whose original it is
    assert changed(2) == set(range(2, 19))


def test_parallel_block_is_seen_by_itself_only():
    model = build(tiny())
    embeds = torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(0))
    other = embeds.clone()
    other[0, 8] += 1.0
    with torch.no_grad():
        one, two = (model.core(x, torch.arange(9), causal_then_parallel(4, 5)) for x in (embeds, other))
    assert torch.equal(one[:, :4], two[:, :4])
    assert (one[:, 4:] != two[:, 4:]).any(-1).all()


def test_a_new_action_embedding_changes_nothing_and_learns():
    model = build(tiny(action_dim=4, action_block=5))
    actions = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    embedded = model.action_embedding(actions)
    assert embedded.shape == (3, 48) and not embedded.any()
    embedded.sum().backward()
    assert model.action_embedding.down.weight.grad.any()


def test_dropout_acts_in_training_only():
    model = build(tiny(attention_dropout=0.1))
    tokens = ids(1, 8)
    with torch.no_grad(), torch.random.fork_rng():
        quiet = model(input_ids=tokens).logits
        assert torch.equal(model(input_ids=tokens).logits, quiet)
        assert not torch.allclose(model.train()(input_ids=tokens).logits, quiet)


def test_forward_wants_ids_or_embeddings():
    model = build(tiny())
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=model.embed(ids(1, 4))).logits, model(input_ids=ids(1, 4)).logits)


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"tie_word_embeddings": True}, "not tied"),
        ({"action_dim": 4}, "both be positive or both be 0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes, fault):
    with pytest.raises(ValueError, match=fault):
        tiny(**changes)


# -- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as BAAI writes it: sharded, with the file names and configuration of transformers 4.48."""
    model = build(tiny())
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    halves = [dict(list(state.items())[:7]), dict(list(state.items())[7:])]
    weight_map = {}
    for number, part in enumerate(halves, start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, tmp_path / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        **{name: value for name, value in tiny().to_dict().items() if not name.startswith(("action", "dtype"))},
        "architectures": ["Emu3ForCausalLM"],
        "attention_dropout": 0.1,
        "boi_token_id": 151_852,
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "transformers_version": "4.48.2",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_official_folder_loads_saves_and_loads_again(folder, tmp_path):
    expected = build(tiny())(input_ids=ids(2, 9)).logits
    model = EmuForCausalLM.from_pretrained(folder)
    assert torch.equal(model(input_ids=ids(2, 9)).logits, expected)
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size="20KB")
    model.save_pretrained(saved)  # fewer shards: those of the first time must be gone
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["Emu3ForCausalLM"] and config["torch_dtype"] == "float32"
    assert config["boi_token_id"] == 151_852 and config["rope_theta"] == 1e6
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert isinstance(again, EmuForCausalLM) and isinstance(AutoConfig.from_pretrained(saved), EmuConfig)
    assert torch.equal(again(input_ids=ids(2, 9)).logits, expected)
    theirs = Qwen3ForCausalLM.from_pretrained(saved, config=qwen3(model).config)
    torch.testing.assert_close(theirs(ids(2, 9)).logits, expected, atol=1e-5, rtol=1e-5)


def test_official_folder_can_be_given_actions(folder):
    model = EmuForCausalLM.from_pretrained(folder, action_dim=4, action_block=5, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.action_embedding(torch.ones(1, 5, 4, dtype=torch.bfloat16)).any()


def test_training_goes_on_after_a_failed_save(folder, tmp_path, monkeypatch):
    model = EmuForCausalLM.from_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("emu_embodied.models.transformer.write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:60])


def foreign_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1")


def swap_shards(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").write_bytes(
        (folder / "model-00001-of-00002.safetensors").read_bytes()
    )


def change_config(**changes):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def forget_tensor(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage, fault",
    [
        (drop_shard, "lacks 1 of its shards, first model-00002-of-00002.safetensors"),
        (cut_shard, "model-00001-of-00002.safetensors is cut off"),
        (cut_header, "model-00001-of-00002.safetensors is not a safetensors file"),
        (foreign_shard, "model-00002-of-00002.safetensors is not a safetensors file"),
        (swap_shards, "model-00002-of-00002.safetensors does not hold"),
        (forget_tensor, "lacks the tensor model.norm.weight"),
        (
            change_config(hidden_size=64),
            r"model.embed_tokens.weight has shape \[97, 48\], the configuration says \[97, 64\]",
        ),
        (change_config(num_hidden_layers=1), "tensors this model does not have, first model.layers.1"),
        (change_config(vocab_size=98), r"shape \[97, 48\], the configuration says \[98, 48\]"),
        (change_config(model_type="qwen3"), "config.json describes a 'qwen3' model"),
        (change_config(head_dim=15), "config.json describes no model that can be built: head_dim 15"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json holds a list"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "holds no weights"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "index.json has no weight_map"),
    ],
)
def test_a_damaged_folder_is_named_before_memory_is_spent(folder, damage, fault, monkeypatch):
    damage(folder)
    monkeypatch.setattr(
        "transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("weights were read")
    )
    with pytest.raises(ValueError, match=fault) as caught:
        EmuForCausalLM.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        EmuForCausalLM.from_pretrained(tmp_path / "nowhere")


def test_hooks_anywhere_in_a_layer_are_called_and_gradients_never_lost():
    model = build(tiny())
    tokens = ids(1, 6)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
    seen: list[str] = []
    parts = [
        "self_attn",
        "mlp",
        "input_layernorm",
        "self_attn.q_norm",
        "self_attn.k_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    handles = [
        model.get_submodule(f"model.layers.1.{name}".removesuffix(".")).register_forward_hook(
            lambda *_, name=name: seen.append(name)
        )
        for name in ["", *parts]
    ]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert sorted(seen) == sorted(["", *parts])
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        model(input_ids=tokens)
    model(input_ids=tokens).logits.sum().backward()  # bound without gradients just before
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_a_folder_is_read_with_each_weight_once(folder):
    model = EmuForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0]
    for group in (["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]):
        maps = [getattr(layer.self_attn if "q_proj" in group else layer.mlp, name) for name in group]
        storages = {
            linear.weight.untyped_storage().data_ptr(): linear.weight.untyped_storage().nbytes() for linear in maps
        }
        assert list(storages.values()) == [sum(linear.weight.nbytes for linear in maps)]
