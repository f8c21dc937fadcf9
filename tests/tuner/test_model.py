# SPDX-License-Identifier: Apache-2.0
"""PARADE as a PEFT method, compared with edited base weights, passes without a cache, and single prompts."""

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache

from tests.tuner.models import CONFIGS, PAD, make
from vllm_parade.adapter.config import SITES, AdapterError
from vllm_parade.ops.reference import generate
from vllm_parade.tuner import ParadeConfig

NEW_TOKENS = 6
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
# min_new_tokens keeps generation from ending early, so that every comparison covers NEW_TOKENS tokens.
GREEDY = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": PAD}


@pytest.fixture(params=["llama", "gpt2", "gpt_neox"])
def base(request: pytest.FixtureRequest) -> Any:
    """One model per layout; test_architectures covers the other architectures."""
    return make(request.param)


@pytest.fixture
def prompts() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(3, 101, (length,)) for length in (5, 9, 2)]


def sites_of(base: Any) -> list[str]:
    """All sites of the model's architecture."""
    return [site for site in SITES if site != "gate" or base.config.model_type not in ("gpt2", "gpt_neox")]


def generators(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "parade_generator" in name}


def strong(base: Any, seed: int = 0, **config: Any) -> Any:
    """A model whose vectors are far from one and differ from prompt to prompt."""
    model = get_peft_model(base, ParadeConfig(r=8, **config)).eval()
    strengthen(model, seed)
    return model


def strengthen(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in generators(model).items():
            parameter.copy_(torch.randn_like(parameter) * 0.5 + name.endswith("bias"))


def padded(prompts: list[torch.Tensor], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), longest), PAD), torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, place], mask[row, place] = prompt, 1
    return ids, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(base: Any, prompts: list[torch.Tensor], dtype: torch.dtype) -> None:
    ids, mask = padded(prompts, left=False)
    base = base.to(dtype)
    expected = base(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(get_peft_model(base, ParadeConfig())(input_ids=ids, attention_mask=mask).logits, expected)


def test_constant_vectors_equal_scaled_weights(prompts: list[torch.Tensor]) -> None:
    base = make("llama")
    model = get_peft_model(copy.deepcopy(base), ParadeConfig(r=8, sites=list(SITES)))
    for index, layer in enumerate(base.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        bias = model.get_submodule(f"base_model.model.model.layers.{index}.parade_generator").up["default"].bias
        vector = 0.5 + torch.rand_like(bias)
        with torch.no_grad():
            bias.copy_(vector)
            for projection, part in zip(projections, vector.split([p.out_features for p in projections]), strict=True):
                projection.weight *= part[:, None]
    ids, mask = padded(prompts, left=False)
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits, base(input_ids=ids, attention_mask=mask).logits
    )


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_fused_projections_are_scaled_part_by_part(model_type: str, prompts: list[torch.Tensor]) -> None:
    """Attention receives q, k and v, each multiplied by its own vector."""
    base = make(model_type)
    seen: list[dict[str, torch.Tensor]] = []
    attention = base.transformer.h[0].attn if model_type == "gpt2" else base.gpt_neox.layers[0].attention
    fused = attention.c_attn if model_type == "gpt2" else attention.query_key_value

    def split(output: torch.Tensor) -> dict[str, torch.Tensor]:
        if model_type == "gpt2":
            return dict(zip("qkv", output.chunk(3, dim=-1), strict=True))
        heads = output.view(*output.shape[:2], base.config.num_attention_heads, -1).chunk(3, dim=-1)
        return {site: part.flatten(2) for site, part in zip("qkv", heads, strict=True)}

    model = strong(base, sites=["q", "k", "v"], layers_to_transform=[0])
    fused.register_forward_hook(lambda module, args, output: seen.append(split(output)))
    ids = prompts[1][None]
    model(input_ids=ids)
    with model.disable_adapter():
        model(input_ids=ids)
    adjusted, plain = seen
    ratios = {site: adjusted[site] / plain[site] for site in "qkv"}
    for site, ratio in ratios.items():
        torch.testing.assert_close(
            ratio, ratio[:, :1].expand_as(ratio), msg=f"{site}: not one vector for all tokens", **CLOSE
        )
    assert not torch.allclose(ratios["q"], ratios["k"], atol=1e-2)


@pytest.mark.parametrize("generator_input", ["layer_input", "attention_input"])
def test_vectors_come_from_the_instruction_alone(prompts: list[torch.Tensor], generator_input: str) -> None:
    """The first layer's hidden states need no forward pass: they are the embeddings, plain or normed."""
    base = make("llama")
    model = strong(base, layers_to_transform=[0], sites=["up"], generator_input=generator_input)
    ids, instruction = prompts[1][None], torch.tensor([[1] * 6 + [0] * 3])
    seen: list[Any] = []
    base.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    model(input_ids=ids, instruction_mask=instruction)
    ((given, adjusted),) = seen
    hidden = base.model.embed_tokens(ids)
    if generator_input == "attention_input":
        hidden = base.model.layers[0].input_layernorm(hidden)
    weights = vars(base.model.layers[0].parade_generator.weights("default"))
    settings: Any = {"pooler": "attentional_capsule", "activation": "gelu"}
    vector = generate(hidden[:, :6], torch.ones(1, 6, dtype=torch.bool), **weights, **settings)
    torch.testing.assert_close(adjusted, vector * (given @ base.model.layers[0].mlp.up_proj.weight.T), **CLOSE)


@pytest.mark.parametrize("pooler", ["attentional_capsule", "dynamic_routing", "last_token"])
@pytest.mark.parametrize("generator_input", ["layer_input", "attention_input"])
def test_cached_generation_equals_whole_passes(
    base: Any, prompts: list[torch.Tensor], pooler: str, generator_input: str
) -> None:
    settings = {"pooler": pooler, "generator_input": generator_input, "layers_to_transform": [0, 2]}
    model = strong(base, sites=sites_of(base), **settings)
    ids = prompts[0][None]
    instruction = torch.ones_like(ids)
    generated = model.generate(input_ids=ids, **GREEDY)
    for _ in range(NEW_TOKENS):
        token = model(input_ids=ids, instruction_mask=instruction).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], dim=1)
        instruction = torch.cat([instruction, torch.zeros_like(token)], dim=1)
    assert torch.equal(generated, ids)


def test_a_loop_with_a_cache_of_ones_own(base: Any, prompts: list[torch.Tensor]) -> None:
    model, ids = strong(base), prompts[0][None]
    output = model(input_ids=ids, use_cache=True)
    tokens = [output.logits[:, -1:].argmax(-1)]
    while len(tokens) < NEW_TOKENS:
        # A pass over another prompt in between must not affect this one.
        model(input_ids=prompts[1][None])
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat([ids, *tokens], dim=1), model.generate(input_ids=ids, **GREEDY))


def test_generation_honours_the_instruction_mask(base: Any, prompts: list[torch.Tensor]) -> None:
    model = strong(base)
    ids = prompts[1][None]
    instruction = torch.tensor([[1] * 6 + [0] * 3])
    logits = model(input_ids=ids, instruction_mask=instruction).logits[:, -1]
    output = model.generate(
        input_ids=ids, instruction_mask=instruction, output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    torch.testing.assert_close(output.logits[0], logits, **CLOSE)
    assert not torch.allclose(model(input_ids=ids).logits[:, -1], logits, atol=1e-2)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_a_padded_batch_equals_singles(base: Any, prompts: list[torch.Tensor], search: dict[str, int]) -> None:
    model = strong(base)
    ids, mask = padded(prompts, left=True)
    together = model.generate(input_ids=ids, attention_mask=mask, **GREEDY, **search)[:, ids.shape[1] :]
    alone = [model.generate(input_ids=prompt[None], **GREEDY, **search)[:, len(prompt) :] for prompt in prompts]
    assert torch.equal(together, torch.cat(alone))


def test_unloading_gives_the_base_model_back(base: Any, prompts: list[torch.Tensor]) -> None:
    ids = prompts[0][None]
    before, names = base(input_ids=ids).logits, list(base.state_dict())
    model = strong(base)
    assert not torch.equal(model(input_ids=ids).logits, before)
    assert model.unload() is base
    assert torch.equal(base(input_ids=ids).logits, before)
    assert list(base.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_a_failing_pass_leaves_nothing_behind(base: Any, prompts: list[torch.Tensor]) -> None:
    model = strong(base)
    ids = prompts[0][None]
    expected = model(input_ids=ids).logits
    last = next(module for name, module in base.named_modules() if name.endswith(".1.mlp"))
    failing = last.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids=prompts[1][None])
    failing.remove()
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert torch.equal(model.unload()(input_ids=ids).logits, plain)


def test_what_cannot_be_right_is_refused(prompts: list[torch.Tensor]) -> None:
    base = make("llama")
    model, ids = strong(base), prompts[0][None]
    with pytest.raises(ValueError, match="no instruction token"):
        model(input_ids=ids, instruction_mask=torch.zeros_like(ids))
    with pytest.raises(ValueError, match="no instruction token"):
        model(input_ids=ids, labels=ids)
    with pytest.raises(ValueError, match=r"mask has shape \(1, 4\)"):
        model(input_ids=ids, instruction_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="prefill_chunk_size cuts the prompt"):
        model.generate(input_ids=ids, prefill_chunk_size=2, **GREEDY)
    cache = DynamicCache()
    with model.disable_adapter():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="filled without an adapter"):
        model(input_ids=ids[:, -1:], past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()


def test_base_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterError, match="layers_to_transform names layer 7; expected 0 to 2"):
        get_peft_model(make("llama"), ParadeConfig(layers_to_transform=[7]))
    with pytest.raises(AdapterError, match="sites names 'gate'; expected a list out of q, k, v, up"):
        get_peft_model(make("gpt2"), ParadeConfig(sites=["gate"]))
    broken = make("llama")
    del broken.model.layers[2].mlp.up_proj
    with pytest.raises(AdapterError, match=r"LlamaForCausalLM has no model\.layers\.2\.mlp\.up_proj"):
        get_peft_model(broken, ParadeConfig())
    other = make("llama")
    other.config.model_type = "bloom"
    with pytest.raises(AdapterError, match="base model is a 'bloom'; expected one of llama, mistral"):
        get_peft_model(other, ParadeConfig())


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_architecture_round_trips(model_type: str, prompts: list[torch.Tensor], tmp_path: Any) -> None:
    base = make(model_type)
    model, ids = strong(base), prompts[1][None]
    expected = model.generate(input_ids=ids, **GREEDY)
    logits = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    assert torch.equal(loaded.generate(input_ids=ids, **GREEDY), expected)
