# SPDX-License-Identifier: Apache-2.0
"""The choke point of all requests, on vLLM's real input processor."""

import hashlib
import runpy

import pytest
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from vllm_parade import ParadeRequest
from vllm_parade.frontend import inputs
from vllm_parade.frontend.adapters import AdapterRegistry, run
from vllm_parade.plugin import register
from vllm_parade.request import EXTRA_ARGS_KEY, Instruction

HASH = "c0ffee"
PROMPT = {"type": "token", "prompt_token_ids": list(range(1, 11))}
INSTRUCTION = Instruction(
    HASH, tokens=10, digest=hashlib.sha256(b"".join(n.to_bytes(8, "little") for n in range(1, 11))).hexdigest()
)


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
    """With adapter a, as if the workers had loaded it."""
    processor = make_processor(enable_parade=True)
    loaded(processor, request_a)
    return processor


def loaded(processor, request, content=HASH):
    run(AdapterRegistry.of(processor).load(request), lambda method, args: [{"ok": True, "content_hash": content}])


def process(processor, adapter=None, prompt=PROMPT, params=None, **options):
    return processor.process_inputs(
        "0", prompt, params or SamplingParams(), supported_tasks=("generate",), lora_request=adapter, **options
    )


def long_prompt(tokens):
    return {"type": "token", "prompt_token_ids": [1] * tokens}


def test_the_engine_core_learns_adapter_and_instruction(processor, request_a):
    request = process(processor, request_a)
    assert Instruction.from_extra_args(request.sampling_params.extra_args) == INSTRUCTION
    assert request.lora_request is None


def test_positional_arguments_are_understood(processor, request_a):
    request = processor.process_inputs("0", PROMPT, SamplingParams(), ("generate",), None, request_a)
    assert Instruction.from_extra_args(request.sampling_params.extra_args) == INSTRUCTION


def test_a_shorter_instruction(processor):
    short = ParadeRequest("a", "/x/a", instruction_tokens=4)
    request = process(processor, short, long_prompt(20))
    assert Instruction.from_extra_args(request.sampling_params.extra_args).tokens == 4


def test_salts_tell_apart_what_must_not_share(make_processor, request_a):
    """Equal requests share keys and values; another adapter, instruction or user's salt has its own."""
    processor = make_processor(enable_parade=True)
    other = ParadeRequest("b", "/x/b")
    loaded(processor, request_a)
    loaded(processor, other, "f00d")
    short = ParadeRequest("a", "/x/a", instruction_tokens=9)

    def salt(adapter, prompt=PROMPT):
        return process(processor, adapter, prompt).cache_salt

    mine = {**PROMPT, "cache_salt": "mine"}
    salts = [salt(request_a), salt(other), salt(short), salt(request_a, long_prompt(10)), salt(request_a, mine)]
    assert len(set(salts)) == 5
    assert [salt(request_a), salt(request_a, mine)] == [salts[0], salts[4]]
    assert salts[4].endswith(":mine")


def test_a_client_cannot_name_the_salt_of_an_adapters_requests(processor, request_a, monkeypatch):
    """A base request with such a salt would get keys and values that were computed under the adapter."""
    mine = process(processor, request_a).cache_salt
    # Another process makes another secret.
    monkeypatch.setattr(inputs, "_SECRET", runpy.run_path(inputs.__file__)["_SECRET"])
    assert process(processor, request_a).cache_salt != mine
    assert process(processor, None, {**PROMPT, "cache_salt": "parade:x"}).cache_salt == "parade:x"


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
    """A client's vllm_xargs become extra_args: it must not name another tenant's adapter there."""
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
    """--max-num-scheduled-tokens caps a step below --max-num-batched-tokens: such a prompt would wait for ever."""
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
    """Equal placeholders with other embeddings would get the vectors of another tenant's prompt."""
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
    """Its steps send generated tokens back as prompt; they are no instruction. The caller's request stays as it was."""
    beam = request_a.for_beam_search()
    for tokens in (5, 6, 7):
        request = process(processor, beam, long_prompt(tokens))
        assert Instruction.from_extra_args(request.sampling_params.extra_args).tokens == 5
    assert request_a.instruction_tokens is None


def test_beam_search_may_outgrow_a_step(processor, request_a):
    beam = request_a.for_beam_search()
    process(processor, beam, long_prompt(16))
    assert (
        Instruction.from_extra_args(process(processor, beam, long_prompt(17)).sampling_params.extra_args).tokens == 16
    )
