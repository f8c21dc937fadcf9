# SPDX-License-Identifier: Apache-2.0
"""Hooks of a decoder layer, on a hand-made model that has only the modules of vLLM's layers.

Longer than 300 lines, because all tests need that model."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.symbolic_convert import InliningInstructionTranslator
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context

import vllm_parade
from vllm_parade.adapter import Adapter, AdapterConfig, AdapterError, BaseModelShape, adapted_layers, initial_generator
from vllm_parade.config import traced_files
from vllm_parade.layers import BatchMetadata, adjust_model
from vllm_parade.layers.generator import LAYERS_KEY
from vllm_parade.layers.model import UnsupportedModelError
from vllm_parade.ops import reference
from vllm_parade.ops.job import GeneratorJob
from vllm_parade.ops.packed import GeneratorLayout, PackedGenerators, max_entries

HIDDEN, HEAD, HEADS, KV_HEADS, INTERMEDIATE, LAYERS, ROWS, TOKENS = 16, 4, 4, 2, 24, 2, 5, 12
SHAPE = BaseModelShape(
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    widths={"q": 16, "k": 8, "v": 8, "gate": INTERMEDIATE, "up": INTERMEDIATE},
)
CPU = torch.device("cpu")


class Projection(nn.Module):
    """Returns (output, bias), as vLLM's linear layers do."""

    def __init__(self, width, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, HIDDEN), requires_grad=False)
        for name, value in {"tp_rank": 0, "tp_size": 1, **attributes}.items():
            setattr(self, name, value)

    def forward(self, hidden):
        return F.linear(hidden, self.weight), None


class Norm(nn.Module):
    """Returns a tensor, or with a residual the pair of vLLM's fused add-norm."""

    def forward(self, hidden, residual=None):
        if residual is None:
            return F.rms_norm(hidden, (HIDDEN,))
        residual = hidden + residual
        return F.rms_norm(residual, (HIDDEN,)), residual


class Attention(nn.Module):
    """Returns its inputs, concatenated."""

    def forward(self, query, key, value):
        return torch.cat([query, key, value], dim=1)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = Norm()
        self.self_attn = nn.Module()
        self.self_attn.qkv_proj = Projection(
            32, num_heads=HEADS, num_kv_heads=KV_HEADS, num_kv_head_replicas=1, head_size=HEAD, v_head_size=HEAD
        )
        self.self_attn.attn = Attention()
        self.mlp = nn.Module()
        self.mlp.gate_up_proj = Projection(2 * INTERMEDIATE, output_sizes=[INTERMEDIATE, INTERMEDIATE])

    def forward(self, hidden, residual=None):
        normed = self.input_layernorm(hidden, residual)
        attention_input = normed[0] if isinstance(normed, tuple) else normed
        qkv = self.self_attn.qkv_proj(attention_input)[0]
        return self.self_attn.attn(*qkv.split([16, 8, 8], dim=1)), self.mlp.gate_up_proj(attention_input)[0]


def make_model():
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
    return model


class Adjusted:
    """A model with hooks, and an equal model without."""

    def __init__(self, sites=("q", "v", "up")):
        self.model, self.plain = make_model(), make_model()
        self.batch = BatchMetadata.make(TOKENS, 4, 16, CPU, kernels=False)
        self.context = {}
        self.layers = adjust_model(
            self.model,
            sites=sites,
            num_rows=ROWS,
            batch=self.batch,
            forward_context=self.context,
            device=CPU,
            dtype=torch.float32,
        )
        width = self.layers[0].table.shape[1]
        self.flat = torch.empty(2, max_entries(LAYERS, HIDDEN, width, 16))
        for local_idx, layer in enumerate(self.layers):
            layer.bind(self.flat, local_idx)

    def run(self, index, hidden, residual=None):
        context = SimpleNamespace(no_compile_layers=self.context, cudagraph_runtime_mode=CUDAGraphMode.NONE)
        with override_forward_context(context):
            return self.model.layers[index](hidden, residual)

    def activate(self, adapter, slot=0):
        shards = [layer.shard(adapter, SHAPE) for layer in self.layers]
        packed = PackedGenerators.pack(layout_of(adapter), shards, torch.float32, pin=False)
        self.flat[slot, : len(packed.flat)] = packed.flat


def layout_of(adapter):
    return GeneratorLayout.of(adapter.config, HIDDEN, 16 + 8 + INTERMEDIATE)


def hidden_states(tokens=TOKENS, seed=0):
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def make_adapter(seed=0, **options):
    config = AdapterConfig(r=8, **options)
    random = torch.Generator().manual_seed(seed)
    generators = {}
    for layer in adapted_layers(config, SHAPE):
        generators[layer] = initial_generator(config, SHAPE, random)
        for name, tensor in generators[layer].named_tensors().items():
            if name != "up.bias":
                tensor.normal_(0, 0.3, generator=random)
    return Adapter(config, generators, content_hash=f"hash {seed}", path=Path("/x"))


def expected_vector(adapter, layer, instruction):
    weights, config = adapter.generators[layer], adapter.config
    return reference.generate(
        instruction[None],
        torch.ones(1, len(instruction), dtype=torch.bool),
        down=weights.down,
        query=weights.query,
        weight=weights.weight,
        up=weights.up,
        bias=weights.bias,
        pooler=config.pooler,
        activation=config.activation,
    )[0]


@pytest.mark.parametrize("with_residual", [False, True])
def test_base_rows_are_bit_identical(with_residual):
    """Also in a batch with other rows, which hold NaN."""
    adjusted = Adjusted()
    for layer in adjusted.layers:
        layer.table[1:] = torch.nan
    adjusted.batch.prepare([0, 2, 0], [3, 2, 4], [])
    residual = hidden_states(seed=1) if with_residual else None
    base = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 10, 11])
    for index in range(LAYERS):
        for got, plain in zip(
            adjusted.run(index, hidden_states(), residual),
            adjusted.plain.layers[index](hidden_states(), residual),
            strict=True,
        ):
            assert torch.equal(got[base], plain[base])
            assert got[3:5].isnan().any()


def test_every_token_is_scaled_by_its_own_row():
    adjusted = Adjusted()
    table = adjusted.layers[0].table
    table[1:] = torch.rand(ROWS - 1, table.shape[1]) + 0.5
    adjusted.batch.prepare([3, 0, 1], [5, 2, 5], [])
    rows = torch.tensor([3] * 5 + [0] * 2 + [1] * 5)
    q, v, up = table[rows].split([16, 8, INTERMEDIATE], dim=1)
    qkv, gate_up = adjusted.run(0, hidden_states())
    plain_qkv, plain_gate_up = adjusted.plain.layers[0](hidden_states())
    assert torch.equal(qkv, plain_qkv * torch.cat([q, torch.ones(TOKENS, 8), v], dim=1))
    assert torch.equal(gate_up, plain_gate_up * torch.cat([torch.ones(TOKENS, INTERMEDIATE), up], dim=1))


def test_all_five_sites_have_their_columns():
    adjusted = Adjusted(("q", "k", "v", "gate", "up"))
    table = adjusted.layers[0].table
    table[1] = torch.arange(table.shape[1])
    adjusted.batch.prepare([1], [TOKENS], [])
    qkv, gate_up = adjusted.run(0, hidden_states())
    plain_qkv, plain_gate_up = adjusted.plain.layers[0](hidden_states())
    assert torch.equal(qkv, plain_qkv * torch.arange(32))
    assert torch.equal(gate_up, plain_gate_up * torch.arange(32, 32 + 2 * INTERMEDIATE))


def test_a_layer_that_splits_otherwise_is_told():
    adjusted = Adjusted()
    parts = adjusted.model.layers[0].self_attn.qkv_proj(hidden_states())[0]
    with pytest.raises(AssertionError, match=r"split into \[8, 8, 16\]"):
        parts.split([8, 8, 16], dim=-1)


def test_a_projection_without_sites_has_no_hook():
    adjusted = Adjusted(("up",))
    attention = adjusted.model.layers[0].self_attn
    assert not attention.qkv_proj._forward_hooks
    assert adjusted.model.layers[0].mlp.gate_up_proj._forward_hooks


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("generator_input", ["layer_input", "attention_input"])
def test_an_instruction_writes_its_row_before_it_is_scaled(generator_input, with_residual):
    """The residual stream is the norm's input where it returns a tensor, its second output where it returns a pair."""
    adjusted, adapter = Adjusted(), make_adapter(generator_input=generator_input)
    adjusted.activate(adapter)
    adjusted.batch.prepare(
        [0, 2, 4], [3, 6, 3], [GeneratorJob(row=2, start=3, length=4, slot=0, layout=layout_of(adapter))]
    )
    hidden, residual = hidden_states(), hidden_states(seed=1) if with_residual else None
    stream = hidden if residual is None else hidden + residual
    read = stream if generator_input == "layer_input" else F.rms_norm(stream, (HIDDEN,))
    qkv, _ = adjusted.run(1, hidden, residual)
    vector = expected_vector(adapter, 1, read[3:7])
    table = adjusted.layers[1].table
    torch.testing.assert_close(table[2], vector)
    assert (vector - 1).abs().max() > 0.1
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(table[others], torch.ones_like(table[others]))
    plain_qkv, _ = adjusted.plain.layers[1](hidden, residual)
    torch.testing.assert_close(qkv[3:9, :16], plain_qkv[3:9, :16] * vector[:16])


def test_instructions_of_several_adapters_pass_together():
    """Two of one adapter, with different lengths, and one of an adapter with another pooler and activation."""
    adjusted = Adjusted()
    first, second = make_adapter(0), make_adapter(1, pooler="last_token", activation="tanh")
    adjusted.activate(first)
    adjusted.activate(second, slot=1)
    jobs = [
        GeneratorJob(row=1, start=0, length=5, slot=0, layout=layout_of(first)),
        GeneratorJob(row=3, start=5, length=4, slot=1, layout=layout_of(second)),
        GeneratorJob(row=2, start=9, length=3, slot=0, layout=layout_of(first)),
    ]
    adjusted.batch.prepare([1, 3, 2], [5, 4, 3], jobs)
    hidden = hidden_states()
    adjusted.run(0, hidden)
    for job, adapter in zip(jobs, (first, second, first), strict=True):
        expected = expected_vector(adapter, 0, hidden[job.start : job.start + job.length])
        torch.testing.assert_close(adjusted.layers[0].table[job.row], expected)


def test_later_steps_keep_the_row():
    adjusted, adapter = Adjusted(), make_adapter()
    adjusted.activate(adapter)
    adjusted.batch.prepare([1], [5], [GeneratorJob(row=1, start=0, length=5, slot=0, layout=layout_of(adapter))])
    adjusted.run(0, hidden_states(5))
    row = adjusted.layers[0].table[1].clone()
    adjusted.activate(make_adapter(seed=9))
    adjusted.batch.prepare([1], [1], [])
    adjusted.run(0, hidden_states(1, seed=2))
    assert torch.equal(adjusted.layers[0].table[1], row)


def test_a_layer_without_generator_takes_the_row_back_to_one():
    """Otherwise it would scale by the vector of the row's previous instruction."""
    adjusted, adapter = Adjusted(), make_adapter(layers_to_transform=(0,))
    adjusted.activate(adapter)
    adjusted.layers[1].table[1] = 7
    adjusted.batch.prepare([1], [5], [GeneratorJob(row=1, start=0, length=5, slot=0, layout=layout_of(adapter))])
    adjusted.run(1, hidden_states(5))
    assert torch.equal(adjusted.layers[1].table[1], torch.ones_like(adjusted.layers[1].table[1]))


def test_parameters_keep_their_names():
    """So weights can be loaded again. Another model of the same classes gets no hooks."""
    adjusted = Adjusted()
    assert list(adjusted.model.state_dict()) == list(adjusted.plain.state_dict())
    assert not adjusted.plain.layers[0].input_layernorm._forward_hooks


def test_the_generator_op_finds_each_layer_by_its_table():
    adjusted = Adjusted()
    norms = [layer.input_layernorm for layer in adjusted.model.layers]
    assert [adjusted.context[LAYERS_KEY][norm.parade_table.data_ptr()] for norm in norms] == adjusted.layers
    assert [layer.layer_idx for layer in adjusted.layers] == [0, 1]


class TestCompileCache:
    """vLLM reuses a compiled model whose cache key is the same, so the key must cover all code that was compiled."""

    PACKAGE = Path(vllm_parade.__file__).parent

    @pytest.mark.parametrize("with_residual", [False, True])
    def test_the_key_covers_the_code_that_is_traced(self, monkeypatch, with_residual):
        traced, inline_call = set(), InliningInstructionTranslator.inline_call_

        def recorded(translator):
            traced.add(Path(translator.f_code.co_filename))
            return inline_call(translator)

        # vLLM records the compiled code in the same way.
        monkeypatch.setattr(InliningInstructionTranslator, "inline_call_", recorded)
        adjusted = Adjusted(("q", "k", "v", "gate", "up"))
        hooks = [hook for module in adjusted.model.modules() for hook in module._forward_hooks.values()]
        residual = hidden_states(seed=1) if with_residual else None
        adjusted.model.layers[0] = torch.compile(adjusted.model.layers[0], backend="eager", fullgraph=True)
        adjusted.run(0, hidden_states(), residual)
        ours = {path for path in traced if path.is_relative_to(self.PACKAGE)}
        assert len(hooks) == 3 * LAYERS
        assert ours >= {Path(hook.__code__.co_filename) for hook in hooks}
        assert ours <= set(traced_files())

    def test_the_key_covers_what_registers_hooks_buffers_and_ops(self):
        """Except the tuner, whose hooks are on Hugging Face models."""
        calls = re.compile(r"\b(register_forward_(pre_)?hook|register_buffer|direct_register_custom_op)\(")
        sources = [path for path in self.PACKAGE.rglob("*.py") if path.parent.name != "tuner"]
        registering = {path for path in sources if calls.search(path.read_text(encoding="utf-8"))}
        assert registering
        assert registering <= set(traced_files())


class TestUnsupportedModels:
    def adjust(self, model):
        batch = BatchMetadata.make(TOKENS, 4, 16, CPU, kernels=False)
        adjust_model(
            model,
            sites=("q",),
            num_rows=2,
            batch=batch,
            forward_context={},
            device=CPU,
            dtype=torch.float32,
        )

    def test_no_decoder_layers(self):
        with pytest.raises(UnsupportedModelError, match="no decoder layer with input_layernorm, self_attn and mlp"):
            self.adjust(nn.Linear(2, 2))

    @pytest.mark.parametrize(("module", "child"), [("self_attn", "qkv_proj"), ("mlp", "gate_up_proj")])
    def test_other_modules(self, module, child):
        model = make_model()
        delattr(getattr(model.layers[1], module), child)
        with pytest.raises(UnsupportedModelError, match=rf"layer layers\.1 has no {module}\.{child}"):
            self.adjust(model)


def test_weights_that_the_models_dtype_cannot_hold_are_refused():
    adapter = make_adapter()
    adapter.generators[1].up[0, 0] = 1e5
    context: dict = {}
    sizes = {"sites": ("q", "v", "up"), "num_rows": 2}
    batch = BatchMetadata.make(TOKENS, 4, 16, CPU, kernels=False)
    layers = adjust_model(make_model(), **sizes, batch=batch, forward_context=context, device=CPU, dtype=torch.float16)
    layers[0].shard(adapter, SHAPE)
    with pytest.raises(AdapterError, match=r"up\.weight of layer 1 overflows in torch\.float16"):
        layers[1].shard(adapter, SHAPE)
