# SPDX-License-Identifier: Apache-2.0
"""ParadeModel against the base model with edited weights, against whole passes, and against itself row by row."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_parade import tuner
from vllm_parade.adapter.config import AdapterConfig, AdapterError
from vllm_parade.ops.reference import generate
from vllm_parade.tuner import ParadeModel

SITES = ("q", "k", "v", "gate", "up")
NEW_TOKENS = 6
PAD = 0
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
# Generation must not end by itself: every comparison is over NEW_TOKENS tokens.
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD}


@pytest.fixture
def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=101, num_hidden_layers=3, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def prompts():
    torch.manual_seed(1)
    return [torch.randint(3, 101, (length,)) for length in (5, 9, 2)]


def strong(base, seed=0, **config):
    """A model whose vectors are far from one and differ from prompt to prompt."""
    model = ParadeModel(base, AdapterConfig(r=8, **config), seed=seed).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.generators.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
        for generator in model.generators.values():
            generator.up["bias"] += 1
    return model


def padded(prompts, *, left):
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), PAD), torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


def test_exports():
    assert tuner.__all__ == sorted(tuner.__all__)
    assert all(hasattr(tuner, name) for name in tuner.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(base, prompts, dtype):
    ids, mask = padded(prompts, left=False)
    base = base.to(dtype)
    expected = base(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(ParadeModel(base, AdapterConfig())(ids, mask).logits, expected)


def test_constant_vectors_equal_scaled_weights(base, prompts):
    model = ParadeModel(copy.deepcopy(base), AdapterConfig(r=8, sites=SITES))
    for index, generator in model.generators.items():
        layer = base.model.layers[int(index)]
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        vector = 0.5 + torch.rand_like(generator.up["bias"])
        with torch.no_grad():
            generator.up["bias"].copy_(vector)
            for projection, part in zip(projections, vector.split([p.out_features for p in projections]), strict=True):
                projection.weight *= part[:, None]
    ids, mask = padded(prompts, left=False)
    torch.testing.assert_close(model(ids, mask).logits, base(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("generator_input", ["layer_input", "attention_input"])
def test_vectors_come_from_the_instruction_alone(base, prompts, generator_input):
    """In the first layer, hidden states are known without running anything: embeddings, or embeddings normed."""
    model = strong(base, layers_to_transform=[0], sites=["up"], generator_input=generator_input)
    ids, instruction = prompts[1][None], torch.tensor([[1] * 6 + [0] * 3])
    seen = []
    base.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(ids, instruction_mask=instruction)
    ((given, adjusted),) = seen
    hidden = base.model.embed_tokens(ids)
    if generator_input == "attention_input":
        hidden = base.model.layers[0].input_layernorm(hidden)
    weights = vars(model.generators["0"].weights())
    settings = {"pooler": "attentional_capsule", "activation": "gelu"}
    vector = generate(hidden[:, :6], torch.ones(1, 6, dtype=torch.bool), **weights, **settings)
    torch.testing.assert_close(adjusted, vector * (given @ base.model.layers[0].mlp.up_proj.weight.T), **CLOSE)


@pytest.mark.parametrize("pooler", ["attentional_capsule", "dynamic_routing", "last_token"])
@pytest.mark.parametrize("generator_input", ["layer_input", "attention_input"])
def test_cached_generation_equals_whole_passes(base, prompts, pooler, generator_input):
    model = strong(base, pooler=pooler, generator_input=generator_input, sites=SITES, layers_to_transform=[0, 2])
    ids = prompts[0][None]
    instruction = torch.ones_like(ids)
    generated = model.generate(ids, **GREEDY)
    for _ in range(NEW_TOKENS):
        token = model(ids, instruction_mask=instruction).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        instruction = torch.cat([instruction, torch.zeros_like(token)], dim=1)
    assert torch.equal(generated, ids)


def test_generation_honours_the_instruction_mask(base, prompts):
    model = strong(base)
    ids = prompts[1][None]
    instruction = torch.tensor([[1] * 6 + [0] * 3])
    logits = model(ids, instruction_mask=instruction).logits[:, -1]
    output = model.generate(
        ids, instruction_mask=instruction, output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    torch.testing.assert_close(output.logits[0], logits, **CLOSE)
    assert not torch.allclose(model(ids).logits[:, -1], logits, atol=1e-2)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_padded_batch_equals_singles(base, prompts, search):
    model = strong(base)
    ids, mask = padded(prompts, left=True)
    together = model.generate(ids, mask, **GREEDY, **search)[:, ids.shape[1] :]
    alone = [model.generate(prompt[None], **GREEDY, **search)[:, len(prompt) :] for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))


def test_gradients_reach_every_generator_parameter_and_no_other(base, prompts):
    model = strong(base, sites=SITES).train()
    ids, mask = padded(prompts, left=False)
    model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.generators.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.parameters())


def test_a_bfloat16_base_trains_float32_parameters(base, prompts):
    model = strong(base.to(torch.bfloat16)).train()
    ids = prompts[0][None]
    model(ids, labels=ids).loss.backward()
    assert {parameter.grad.dtype for parameter in model.generators.parameters()} == {torch.float32}


@pytest.mark.parametrize("config", [{}, {"pooler": "last_token", "sites": ["q", "gate"], "layers_to_transform": [1]}])
def test_saved_and_loaded_it_is_the_same(base, prompts, tmp_path, config):
    model = strong(base, **config)
    ids = prompts[0][None]
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = ParadeModel.from_pretrained(model.unload(), tmp_path / "adapter")
    assert loaded.config == model.config
    assert torch.equal(loaded(ids).logits, expected)


def test_calls_leave_nothing_behind(base, prompts):
    model = strong(base)
    first, second = prompts[0][None], prompts[1][None]
    plain, expected = base(input_ids=second).logits, model(second).logits
    assert not torch.allclose(plain, expected, atol=1e-2)
    model(first)
    model.generate(first, **GREEDY)
    with pytest.raises(IndexError):
        model(torch.full_like(first, base.config.vocab_size + 5))
    failing = base.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(first)
    failing.remove()
    assert torch.equal(base(input_ids=second).logits, plain)
    assert torch.equal(model(second).logits, expected)


def test_unloading_gives_the_base_model_back(base, prompts):
    ids = prompts[0][None]
    base.lm_head.weight.requires_grad_(False)
    before, trainable = base(input_ids=ids).logits, [p.requires_grad for p in base.parameters()]
    model = strong(base)
    assert not torch.equal(model(ids).logits, before)
    assert model.unload() is base
    assert torch.equal(base(input_ids=ids).logits, before)
    assert torch.equal(model(ids).logits, before)
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert not any(module._forward_hooks for module in base.modules())


def test_a_seed_makes_initial_values_repeatable(base):
    models = [ParadeModel(base, AdapterConfig(), seed=seed) for seed in (3, 3, 4)]
    downs = [model.generators["1"].down["weight"] for model in models]
    assert torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0], downs[2])


def test_what_cannot_be_right_is_refused(base, prompts):
    model, ids = strong(base), prompts[0][None]
    with pytest.raises(ValueError, match="no instruction token"):
        model(ids, instruction_mask=torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"mask has shape \(1, 4\)"):
        model(ids, instruction_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="whole prompt"):
        model.generate(ids, prefill_chunk_size=2, **GREEDY)
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no model\.layers\.7"):
        ParadeModel(base, AdapterConfig(layers_to_transform=[7]))
    base.model.layers[2].mlp.up_proj = nn.ModuleList()
    del base.model.layers[2].mlp.up_proj
    with pytest.raises(AdapterError, match=r"no model\.layers\.2\.mlp\.up_proj"):
        ParadeModel(base, AdapterConfig())


def test_gradient_checkpointing_is_refused(base, prompts):
    model = strong(base).train()
    base.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(prompts[0][None])
