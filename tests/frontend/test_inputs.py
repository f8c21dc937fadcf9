# SPDX-License-Identifier: Apache-2.0
"""PARADE's hook in vLLM's input processor, which every request passes, on the real processor."""

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_parade import ParadeRequest
from vllm_parade.adapter.turns import Turn, turn_digests
from vllm_parade.frontend.adapters import AdapterRegistry, run
from vllm_parade.plugin import register
from vllm_parade.request import EXTRA_ARGS_KEY, Conversation, Instruction

HASH = "c0ffee"
PROMPT = {"type": "token", "prompt_token_ids": list(range(1, 11))}
# Token 5 begins a turn, token 7 ends its instruction.
MARKERS = ((5,), (7,), None)


@pytest.fixture
def make_processor(engine_config):
    register()

    def make(**options):
        return InputProcessor(engine_config(max_num_batched_tokens=16, max_num_seqs=4, max_model_len=64, **options))

    return make


@pytest.fixture
def request_a():
    return ParadeRequest("a", "/x/a")


@pytest.fixture
def processor(make_processor, request_a):
    """An input processor with adapter a registered as loaded."""
    processor = make_processor(enable_parade=True)
    loaded(processor, request_a)
    return processor


def loaded(processor, request, content=HASH, markers=None):
    answer = {"ok": True, "content_hash": content, "turn_markers": markers}
    run(AdapterRegistry.of(processor).load(request), lambda method, args: [answer])


def process(processor, adapter=None, prompt=PROMPT, params=None, **options):
    return processor.process_inputs(
        "0", prompt, params or SamplingParams(), supported_tasks=("generate",), lora_request=adapter, **options
    )


def long_prompt(tokens):
    return {"type": "token", "prompt_token_ids": [1] * tokens}


def instructions(request):
    return Conversation.from_extra_args(request.sampling_params.extra_args).instructions


def keys(*arguments, **options):
    return [instruction.key for instruction in instructions(process(*arguments, **options))]


def turns(*arguments, **options):
    found = instructions(process(*arguments, **options))
    return [(instruction.start, instruction.end) for instruction in found]


def test_the_engine_core_learns_adapter_and_instruction(processor, request_a):
    request = process(processor, request_a)
    (digest,) = turn_digests(list(range(1, 11)), [Turn(0, 10)])
    assert instructions(request) == (Instruction(HASH, 0, 10, digest),)
    assert request.lora_request is None


def test_positional_arguments_are_understood(processor, request_a):
    request = processor.process_inputs("0", PROMPT, SamplingParams(), ("generate",), None, request_a)
    assert instructions(request) == instructions(process(processor, request_a))


def test_a_shorter_instruction(processor, request_a):
    short = ParadeRequest("a", "/x/a", instruction_tokens=4)
    assert turns(processor, short, long_prompt(20)) == [(0, 4)]
    params = SamplingParams(extra_args={"parade_instruction_tokens": 4})
    assert turns(processor, request_a, long_prompt(20), params) == [(0, 4)]
    assert turns(processor, short, long_prompt(20), SamplingParams(extra_args={"parade_instruction_tokens": 9})) == [
        (0, 4)
    ]


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "4", True])
def test_a_number_of_instruction_tokens_that_is_none(processor, request_a, tokens):
    params = SamplingParams(extra_args={"parade_instruction_tokens": tokens})
    with pytest.raises(VLLMValidationError, match="expected a positive whole number") as error:
        process(processor, request_a, params=params)
    assert error.value.parameter == "vllm_xargs.parade_instruction_tokens"


def test_keys_tell_apart_what_must_not_share(make_processor, request_a):
    """Equal requests share rows, keys and values. Another adapter, instruction or cache_salt gives another key."""
    processor = make_processor(enable_parade=True)
    other = ParadeRequest("b", "/x/b")
    loaded(processor, request_a)
    loaded(processor, other, "f00d")
    short = ParadeRequest("a", "/x/a", instruction_tokens=9)
    mine = {**PROMPT, "cache_salt": "mine"}
    asked = [(request_a, PROMPT), (other, PROMPT), (short, PROMPT), (request_a, long_prompt(10)), (request_a, mine)]
    found = [keys(processor, *one)[0] for one in asked]
    assert len(set(found)) == 5
    assert [keys(processor, *one)[0] for one in asked] == found
    # The client's salt is unchanged.
    assert process(processor, request_a, mine).cache_salt == "mine"
    assert process(processor, request_a).cache_salt is None


def test_turns_of_an_adapter_that_marks_them(make_processor, request_a):
    processor = make_processor(enable_parade=True)
    loaded(processor, request_a, markers=MARKERS)
    history = [1, 2, 5, 9, 7, 3, 3]
    following = [*history, 5, 8, 7]
    first, second = ({"type": "token", "prompt_token_ids": tokens} for tokens in (history, following))
    assert turns(processor, request_a, first) == [(2, 5)]
    assert turns(processor, request_a, second) == [(2, 5), (7, 10)]
    assert keys(processor, request_a, second)[:1] == keys(processor, request_a, first)
    assert turns(processor, ParadeRequest("a", "/x/a", instruction_tokens=7), second) == [(2, 5)]
    # Without a marker the prompt is one turn.
    assert turns(processor, request_a, long_prompt(6)) == [(0, 6)]


def test_only_an_instruction_must_fit_into_a_step(make_processor, request_a):
    processor = make_processor(enable_parade=True)
    loaded(processor, request_a, markers=MARKERS)
    prompt = [1] * 20 + [5] + [2] * 14 + [7] + [3] * 20
    assert turns(processor, request_a, {"type": "token", "prompt_token_ids": prompt}) == [(20, 36)]
    with pytest.raises(VLLMValidationError, match="a message of the prompt has 17 tokens.*one step of at most 16"):
        process(processor, request_a, {"type": "token", "prompt_token_ids": [1, 5, *[2] * 15, 7, 3]})


def test_a_longest_instruction_is_no_reason_to_refuse_a_prompt(make_processor, request_a):
    processor = make_processor(enable_parade=True)
    loaded(processor, request_a, markers=((5,), (7,), 16))
    prompt = {"type": "token", "prompt_token_ids": [1, 5, *[2] * 30, 7]}
    assert turns(processor, request_a, prompt) == [(17, 33)]


def test_parameters_of_the_caller_stay_his(processor, request_a):
    params = SamplingParams(extra_args={"mine": 1})
    first, second = process(processor, request_a, params=params), process(processor, request_a, params=params)
    assert params.extra_args == {"mine": 1}
    assert first.sampling_params.extra_args["mine"] == 1
    assert first.sampling_params.extra_args is not second.sampling_params.extra_args


@pytest.mark.parametrize("enabled", [True, False])
def test_requests_of_the_base_model_are_untouched(make_processor, enabled):
    processor = make_processor(**({"enable_parade": True} if enabled else {}))
    params = SamplingParams(extra_args={"mine": 1})
    request = process(processor, prompt={**PROMPT, "cache_salt": "mine"}, params=params)
    assert request.sampling_params.extra_args == {"mine": 1}
    assert request.cache_salt == "mine"
    assert process(processor).cache_salt is None
    assert process(processor).sampling_params.extra_args is None


@pytest.mark.parametrize("adapter", [None, ParadeRequest("a", "/x/a")])
def test_forged_plans_are_refused(processor, adapter):
    """A client's vllm_xargs become extra_args, and must not name another tenant's adapter."""
    params = SamplingParams(extra_args={EXTRA_ARGS_KEY: {"adapter": HASH, "tokens": 3}})
    with pytest.raises(VLLMValidationError, match="'parade' is not a sampling argument; name the adapter") as error:
        process(processor, adapter, params=params)
    assert error.value.parameter == "vllm_xargs.parade"


def test_what_others_call_parade_is_no_business_of_a_plain_engine(make_processor):
    params = SamplingParams(extra_args={EXTRA_ARGS_KEY: "mine"})
    assert process(make_processor(), params=params).sampling_params.extra_args == {EXTRA_ARGS_KEY: "mine"}


def test_prompt_longer_than_a_step(processor, request_a):
    process(processor, request_a, long_prompt(16))
    with pytest.raises(VLLMValidationError, match="has 17 tokens.*one step of at most 16.*--max-num-batched-tokens"):
        process(processor, request_a, long_prompt(17))
    process(processor, None, long_prompt(17))


def test_prompt_longer_than_the_scheduler_gives_a_step(make_processor, request_a):
    """--max-num-scheduled-tokens may be below --max-num-batched-tokens. A longer prompt would wait for ever."""
    processor = make_processor(enable_parade=True)
    processor.vllm_config.scheduler_config.max_num_scheduled_tokens = 12
    loaded(processor, request_a)
    process(processor, request_a, long_prompt(12))
    with pytest.raises(VLLMValidationError, match="has 13 tokens.*one step of at most 12"):
        process(processor, request_a, long_prompt(13))


def test_instruction_longer_than_the_prompt(processor):
    with pytest.raises(VLLMValidationError, match="instruction_tokens is 11, but the prompt has 10 tokens"):
        process(processor, ParadeRequest("a", "/x/a", instruction_tokens=11))


def test_streaming_input_is_refused(processor, request_a):
    with pytest.raises(VLLMValidationError, match="adapter 'a': streaming input is not supported"):
        process(processor, request_a, resumable=True)


@pytest.mark.parametrize("tokens", [[1, 2, 3], None])
def test_prompts_with_embeddings_are_refused(make_processor, request_a, tokens):
    """Two prompts with equal placeholders but different embeddings could share vectors across tenants."""
    processor = make_processor(enable_parade=True, enable_prompt_embeds=True)
    loaded(processor, request_a)
    prompt = {"type": "embeds", "prompt_embeds": torch.ones(3, 128)}
    if tokens is not None:
        prompt |= {"prompt_token_ids": tokens, "is_token_ids": torch.tensor([True, False, True])}
    process(processor, None, prompt)
    with pytest.raises(VLLMValidationError, match="adapter 'a'"):
        process(processor, request_a, prompt)


def test_an_adapter_that_is_not_loaded(processor):
    with pytest.raises(VLLMValidationError, match=r"adapter 'b' \(/x/b\) is not loaded"):
        process(processor, ParadeRequest("b", "/x/b"))


def test_an_engine_without_parade(make_processor, request_a):
    with pytest.raises(VLLMValidationError, match=r"PARADE is not enabled; start the engine with enable_parade=True"):
        process(make_processor(), request_a)


def test_beam_search_keeps_the_first_prompts_instruction(processor, request_a):
    """Later steps append generated tokens to the prompt, not to the instruction. The caller's request is unchanged."""
    beam = request_a.for_beam_search()
    for tokens in (5, 6, 7):
        assert turns(processor, beam, long_prompt(tokens)) == [(0, 5)]
    assert request_a.instruction_tokens is None


def test_beam_search_may_outgrow_a_step(processor, request_a):
    beam = request_a.for_beam_search()
    assert turns(processor, beam, long_prompt(16)) == turns(processor, beam, long_prompt(17)) == [(0, 16)]
