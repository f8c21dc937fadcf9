# SPDX-License-Identifier: Apache-2.0
"""One pass over several turns equals computing the conversation turn by turn, each with its own vectors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tests.tuner.models import PAD, make
from tests.tuner.test_model import CLOSE, GREEDY, NEW_TOKENS, padded, strong
from vllm_parade.adapter.turns import TurnMarkers, find_turns
from vllm_parade.ops.reference import generate

USER, ASSISTANT = 1, 2
MARKED = {"instruction_start_tokens": [USER], "instruction_end_tokens": [ASSISTANT]}
MARKERS = TurnMarkers((USER,), (ASSISTANT,))
# First: a system prompt and three turns, the last without an answer. Second: two turns. Third: one turn, no marker.
CONVERSATIONS = [
    [9, 8, 7, 6, USER, 5, 4, ASSISTANT, 30, 31, 32, USER, 11, ASSISTANT, 33, USER, 12, 13, 14, ASSISTANT],
    [USER, 40, 41, ASSISTANT, 50, 51, USER, 42, ASSISTANT],
    [60, 61, 62],
]


def tensors(conversations: list[list[int]]) -> list[Tensor]:
    return [torch.tensor(tokens) for tokens in conversations]


def marked(**config: Any) -> Any:
    return strong(make("llama"), **MARKED, **config)


def piece_by_piece(model: Any, tokens: list[int], markers: TurnMarkers = MARKERS) -> Tensor:
    """Base model's logits [tokens, vocabulary], one turn at a time over a KV cache; hooks scale its projections."""
    base = model.base_model.model
    config = model.peft_config["default"]
    turns = find_turns(tokens, markers)
    borders = [0, *(turn.start for turn in turns), len(tokens)]
    instruction_tokens = [0, *(turn.end - turn.start for turn in turns)]
    cache, logits = DynamicCache(), []
    for start, end, read in zip(borders[:-1], borders[1:], instruction_tokens, strict=True):
        if start == end:
            continue
        handles = scale(base, config, read) if read else []
        with model.disable_adapter():
            ids = torch.tensor([tokens[start:end]])
            logits.append(base(input_ids=ids, past_key_values=cache, use_cache=True).logits[0])
        for handle in handles:
            handle.remove()
    return torch.cat(logits)


def scale(base: Any, config: Any, instruction_tokens: int) -> list[Any]:
    """Register hooks for a pass that begins with an instruction of this many tokens; return their handles."""
    handles = []
    for layer in base.model.layers:
        weights = {
            name: None if w is None else w.detach()
            for name, w in vars(layer.parade_generator.weights("default")).items()
        }
        found: dict[str, Tensor] = {}
        names = {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "up": "mlp.up_proj"}
        widths = [layer.get_submodule(names[site]).out_features for site in config.sites]

        def read(
            norm: nn.Module, args: Any, output: Tensor, found: Any = found, weights: Any = weights, widths: Any = widths
        ) -> None:
            hidden = (args[0] if config.generator_input == "layer_input" else output)[:, :instruction_tokens]
            mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
            vector = generate(hidden, mask, **weights, pooler=config.pooler, activation=config.activation)
            found.update(zip(config.sites, vector.split(widths, dim=-1), strict=True))

        handles.append(layer.input_layernorm.register_forward_hook(read))
        for site in config.sites:
            projection = layer.get_submodule(names[site])
            handles.append(
                projection.register_forward_hook(lambda m, a, output, found=found, site=site: output * found[site])
            )
    return handles


@pytest.mark.parametrize("pooler", ["attentional_capsule", "last_token"])
@pytest.mark.parametrize("generator_input", ["layer_input", "attention_input"])
def test_one_pass_equals_turn_by_turn(pooler: str, generator_input: str) -> None:
    model = marked(pooler=pooler, generator_input=generator_input)
    for tokens in CONVERSATIONS:
        wanted = piece_by_piece(model, tokens)
        torch.testing.assert_close(model(input_ids=torch.tensor([tokens])).logits[0], wanted, **CLOSE)


def test_a_longest_instruction_leaves_the_rest_to_the_turn_before() -> None:
    model = marked(instruction_max_tokens=2)
    wanted = piece_by_piece(model, CONVERSATIONS[0], TurnMarkers((USER,), (ASSISTANT,), 2))
    torch.testing.assert_close(model(input_ids=torch.tensor(CONVERSATIONS[:1])).logits[0], wanted, **CLOSE)
    assert not torch.allclose(wanted, piece_by_piece(model, CONVERSATIONS[0]), atol=1e-2)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("pad", [PAD, USER, ASSISTANT])
def test_padding_holds_no_marker(left: bool, pad: int) -> None:
    model = marked()
    ids, mask = padded(tensors(CONVERSATIONS), left=left)
    ids[mask == 0] = pad
    logits = model(input_ids=ids, attention_mask=mask).logits
    for row, tokens in enumerate(CONVERSATIONS):
        torch.testing.assert_close(logits[row][mask[row] == 1], piece_by_piece(model, tokens), **CLOSE)


def test_packed_conversations_are_as_alone() -> None:
    model = marked()
    ids = torch.cat(tensors(CONVERSATIONS))[None]
    positions = torch.cat([torch.arange(len(tokens)) for tokens in CONVERSATIONS])[None]
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    wanted = torch.cat([piece_by_piece(model, tokens) for tokens in CONVERSATIONS])
    torch.testing.assert_close(logits, wanted, **CLOSE)


def test_tokens_before_the_first_turn_are_the_base_models() -> None:
    model, ids = marked(), torch.tensor(CONVERSATIONS[:1])
    logits = model(input_ids=ids).logits
    with model.disable_adapter():
        base = model(input_ids=ids).logits
    assert torch.equal(logits[:, :4], base[:, :4])
    assert not torch.allclose(logits[:, 4], base[:, 4], atol=1e-2)


def test_generated_start_tokens_open_no_turn() -> None:
    """The answer consists of start tokens only; with and without a cache, they belong to the last turn."""
    model, ids = marked(), torch.tensor(CONVERSATIONS[:1])
    forced = {**GREEDY, "suppress_tokens": [token for token in range(101) if token != USER]}
    wanted = torch.cat([ids, torch.full((1, NEW_TOKENS), USER)], dim=1)
    options = {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(input_ids=ids, **forced, **options)
    whole = model.generate(input_ids=ids, use_cache=False, **forced, **options)
    assert torch.equal(cached.sequences, wanted)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), **CLOSE)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
def test_a_conversation_goes_on_from_its_cache(search: dict[str, int]) -> None:
    model = marked()
    tokens, cache = CONVERSATIONS[0], DynamicCache()
    history = model.generate(input_ids=torch.tensor([tokens]), past_key_values=cache, **GREEDY)
    following = torch.cat([history, torch.tensor([[USER, 70, 71, ASSISTANT]])], dim=1)
    if search:
        cache.batch_repeat_interleave(3)
    goes_on = model.generate(input_ids=following, past_key_values=cache, **GREEDY, **search)
    assert torch.equal(goes_on, model.generate(input_ids=following, **GREEDY, **search))
    assert goes_on.shape[1] == following.shape[1] + NEW_TOKENS


def test_a_cache_of_other_turns_is_refused() -> None:
    model = marked()
    ids, cache = torch.tensor(CONVERSATIONS[:1]), DynamicCache()
    # The answer consists of start tokens; as part of a prompt, its first token opens a turn.
    history = model.generate(
        input_ids=ids, past_key_values=cache, **GREEDY, suppress_tokens=[t for t in range(101) if t != USER]
    )
    with pytest.raises(ValueError, match=r"25 tokens with turns \[4, 8\), \[11, 14\), \[15, 20\), but the prompt has"):
        model.generate(input_ids=torch.cat([history, ids], dim=1), past_key_values=cache, **GREEDY)


def test_instructions_lie_in_the_instruction_mask() -> None:
    """Markers outside of the mask open no turn: beam search over HTTP sends generated tokens back as prompt."""
    model, ids = marked(), torch.tensor(CONVERSATIONS[:1])
    mask = torch.tensor([[1] * 14 + [0] * 6])
    turns = find_turns(CONVERSATIONS[0][:14], MARKERS)
    assert [tuple(turn) for turn in turns] == [(4, 8), (11, 14)]
    logits = model(input_ids=ids, instruction_mask=mask).logits
    short = model(input_ids=ids[:, :14]).logits
    torch.testing.assert_close(logits[:, :14], short, **CLOSE)
    assert not torch.allclose(logits[:, 15:], model(input_ids=ids).logits[:, 15:], atol=1e-2)


def test_every_turn_with_labels_is_an_example() -> None:
    """The gradient of a conversation is the sum of its turns' gradients, each with all earlier turns as context."""
    model = marked().double()
    model.base_model.pooling_dtype = torch.float64
    ids = torch.tensor(CONVERSATIONS[:1])
    answers = torch.full_like(ids, -100)
    answers[0, 8:11], answers[0, 14] = ids[0, 8:11], ids[0, 14]
    parts = []
    for chosen in ([8, 9, 10], [14]):
        labels = torch.full_like(ids, -100)
        labels[0, chosen] = ids[0, chosen]
        parts.append(gradient(model, ids, labels) * len(chosen))
    torch.testing.assert_close(gradient(model, ids, answers) * 4, sum(parts), **CLOSE)
    # Turns after the last label add nothing.
    torch.testing.assert_close(gradient(model, ids[:, :15], answers[:, :15]), gradient(model, ids, answers), **CLOSE)


def gradient(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("parade_generator" in name)
    model(input_ids=ids, labels=labels).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_gradient_checkpointing_changes_nothing() -> None:
    model, ids = marked(), torch.tensor(CONVERSATIONS[:1])
    labels = torch.full_like(ids, -100)
    labels[0, 8:11] = ids[0, 8:11]
    model.train()
    plain = gradient(model, ids, labels)
    model.base_model.model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(model, ids, labels), plain, **CLOSE)


def test_what_cannot_be_right_is_refused() -> None:
    model, ids = marked(), torch.tensor(CONVERSATIONS[:1])
    labels = ids.masked_fill(torch.arange(20) != 12, -100)
    for mask in (None, torch.ones_like(ids)):
        with pytest.raises(ValueError, match="row 0 has a label at token 12, inside an instruction"):
            model(input_ids=ids, labels=labels, instruction_mask=mask)
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 64))
