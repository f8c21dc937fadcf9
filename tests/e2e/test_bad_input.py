"""A bad adapter or request in a running engine: a clear exception for that call, and nothing else disturbed."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.exceptions import VLLMValidationError

from testing.oracle import Oracle
from testing.random_models import make_adapter
from tests.engines import engine, greedy, manager, prompts, scheduler
from vllm_parade import ParadeRequest
from vllm_parade.adapter import BaseModelShape, load_adapter

pytestmark = pytest.mark.engine

STEP_TOKENS = 128
HOST = 3


@pytest.fixture(scope="module")
def llm(smollm: str) -> Iterator[Any]:
    options = {"max_parades": 2, "max_cpu_parades": HOST, "max_parade_rank": 16}
    with engine(smollm, enable_parade=True, max_num_batched_tokens=STEP_TOKENS, max_num_seqs=8, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def few(smollm_shape: BaseModelShape, tmp_path_factory: pytest.TempPathFactory) -> list[ParadeRequest]:
    """Good adapters, one more than twice what host memory holds; small."""
    folder = tmp_path_factory.mktemp("few")
    return [make_adapter(folder / f"t{i}", smollm_shape, i, layers_to_transform=(0, 29)) for i in range(2 * HOST + 1)]


def missing(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return ParadeRequest("bad", str(folder))


def not_a_number(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    request = make_adapter(folder, shape, 0, layers_to_transform=(3,))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.3.parade_generator.down.weight"][1, 2] = torch.nan
    save_file(tensors, file)
    return request


def cut_off(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    request = make_adapter(folder, shape, 0, layers_to_transform=(3,))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return request


def rank_too_large(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return make_adapter(folder, shape, 0, layers_to_transform=(3,), r=32)


def other_model(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return make_adapter(folder, replace(shape, hidden_size=64), 0, layers_to_transform=(3,))


def layer_too_high(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return make_adapter(folder, shape, 0, layers_to_transform=(3, 30))


def site_not_served(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return make_adapter(folder, shape, 0, layers_to_transform=(3,), sites=("q", "k"))


BAD: dict[Callable[[Path, BaseModelShape], ParadeRequest], str] = {
    missing: r"bad: no such folder; expected a folder that holds adapter_config.json",
    not_a_number: r"adapter_model.safetensors: tensor .*layers.3.*down.weight' holds NaN or infinity in 1 places",
    cut_off: r"adapter_model.safetensors: no readable safetensors file",
    rank_too_large: r"adapter_config.json: r is 32; expected at most 16: raise --max-parade-rank",
    other_model: r"adapter_model.safetensors: tensor .*down.weight' has shape \[12, 64\]; expected \[12, 576\]",
    layer_too_high: r"adapter_config.json: layers_to_transform names layer 30; expected 0 to 29",
    site_not_served: r"adapter_config.json: sites names 'k'.*add k to --parade-sites",
}


@pytest.mark.parametrize(("make", "message"), BAD.items(), ids=[make.__name__ for make in BAD])
def test_bad_adapter_disturbs_nobody(
    llm: Any,
    oracle: Oracle,
    few: list[ParadeRequest],
    smollm_shape: BaseModelShape,
    tmp_path: Path,
    make: Callable[[Path, BaseModelShape], ParadeRequest],
    message: str,
) -> None:
    bad = make(tmp_path / "bad", smollm_shape)
    running = [few[0], None]
    llm.enqueue(prompts([12, 30]), greedy(6), parade_request=running, use_tqdm=False)
    for _ in range(2):
        llm.llm_engine.step()
    held = set(manager(llm).slots.host)
    # A good request of the same call goes with it.
    with pytest.raises(VLLMValidationError, match=f"adapter 'bad': .*{message}"):
        llm.generate(prompts([9, 9, 9]), greedy(), parade_request=[few[0], bad, None], use_tqdm=False)
    assert set(manager(llm).slots.host) == held
    oracle.check(llm.wait_for_completion(use_tqdm=False), running)
    after = [few[1], few[0], None]
    oracle.check(llm.generate(prompts([7, 40, 20]), greedy(), parade_request=after, use_tqdm=False), after)
    assert len(scheduler(llm).rows) == 0


def test_more_adapters_at_once_than_host_memory_holds(llm: Any, oracle: Oracle, few: list[ParadeRequest]) -> None:
    """Requests that find no room wait until others have ended, however long their answers are."""
    asked: list[ParadeRequest | None] = [*few, None, *reversed(few)]
    params = [greedy(2 + 3 * (number % 4)) for number in range(len(asked))]
    most = []
    record_held(llm, most)
    outputs = llm.generate(prompts([8] * len(asked)), params, parade_request=asked, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [one.max_tokens for one in params]
    oracle.check(outputs, asked)
    assert max(most) == HOST


def record_held(llm: Any, held: list[int]) -> None:
    """Note how many adapters host memory holds at every step."""
    engine, step = llm.llm_engine, llm.llm_engine.step

    def recorded() -> Any:
        outputs = step()
        held.append(len(manager(llm).slots.host))
        return outputs

    engine.step = recorded


def test_host_memory_forgets_the_least_recently_used(llm: Any, oracle: Oracle, few: list[ParadeRequest]) -> None:
    order = [*few, few[0], few[4], few[1]]
    for request in order:
        outputs = llm.generate(prompts([11, 5]), greedy(4), parade_request=[request, None], use_tqdm=False)
        oracle.check(outputs, [request, None])
        assert len(manager(llm).slots.host) <= HOST
        assert len(manager(llm).slots.device) <= 2
    assert set(manager(llm).slots.host) == {load_adapter(few[i].path).content_hash for i in (0, 1, 4)}


def test_what_was_read_stays_as_it_was_read(llm: Any, oracle: Oracle, few: list[ParadeRequest], tmp_path: Path) -> None:
    copy = ParadeRequest("copy", str(shutil.copytree(few[2].path, tmp_path / "copy")))
    llm.generate(prompts([6]), greedy(), parade_request=copy, use_tqdm=False)
    shutil.rmtree(copy.path)
    outputs = llm.generate(prompts([15]), greedy(), parade_request=copy, use_tqdm=False)
    oracle.check(outputs, [few[2]])
    with pytest.raises(VLLMValidationError, match="adapter 'other name': .*no such folder"):
        llm.generate(prompts([6]), greedy(), parade_request=replace(copy, parade_name="other name"), use_tqdm=False)


def test_one_content_under_two_names_is_forgotten_with_the_last(
    llm: Any, oracle: Oracle, few: list[ParadeRequest], tmp_path: Path
) -> None:
    twin = ParadeRequest("twin", str(shutil.copytree(few[0].path, tmp_path / "twin")))
    # t1 takes the place of t0, whose content is still the twin's.
    for request in (few[3], few[0], twin, few[1]):
        llm.generate(prompts([6]), greedy(2), parade_request=request, use_tqdm=False)
    llm.generate(prompts([6]), greedy(2), parade_request=few[2], use_tqdm=False)
    oracle.check(llm.generate(prompts([13]), greedy(), parade_request=twin, use_tqdm=False), [few[0]])


@pytest.mark.parametrize(
    ("given", "named"), [("t0", "'t0'"), (7, "7"), ({"name": "t0"}, "{'name': 't0'}"), ([None, "t0"], "'t0'")]
)
def test_something_else_than_a_request(llm: Any, given: Any, named: str) -> None:
    with pytest.raises(TypeError, match=f"^parade_request is {named}; expected a ParadeRequest, or a list of them"):
        llm.generate(prompts([5, 5]), greedy(), parade_request=given, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("method", ["generate", "beam_search"])
def test_list_of_another_length(llm: Any, few: list[ParadeRequest], method: str) -> None:
    from vllm.sampling_params import BeamSearchParams

    params = greedy() if method == "generate" else BeamSearchParams(beam_width=2, max_tokens=2)
    with pytest.raises(VLLMValidationError, match=r"\(2\) and parade_request \(1\) must be the same"):
        getattr(llm, method)(prompts([5, 5]), params, parade_request=[few[0]], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_together_with_a_lora_request(llm: Any, few: list[ParadeRequest]) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(ValueError, match="lora_request and parade_request cannot be given together"):
        llm.generate(prompts([5]), greedy(), lora_request=LoRARequest("l", 1, "/l"), parade_request=few[0])


def test_beam_search_without_an_adapter(llm: Any, few: list[ParadeRequest]) -> None:
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=3)
    plain = llm.beam_search(prompts([9]), params)
    for nothing in (None, [None]):
        found = llm.beam_search(prompts([9]), params, parade_request=nothing)
        assert [beam.tokens for beam in found[0].sequences] == [beam.tokens for beam in plain[0].sequences]


def test_prompt_longer_than_a_step(llm: Any, oracle: Oracle, few: list[ParadeRequest]) -> None:
    asked = prompts([STEP_TOKENS + 1, STEP_TOKENS])
    wanted = rf"prompt has {STEP_TOKENS + 1} tokens.*'t0'.*at most {STEP_TOKENS} tokens.*--max-num-batched-tokens"
    with pytest.raises(VLLMValidationError, match=wanted):
        llm.generate(asked, greedy(), parade_request=few[0], use_tqdm=False)
    requests = [None, few[0]]
    oracle.check(llm.generate(asked, greedy(), parade_request=requests, use_tqdm=False), requests)


def test_instruction_longer_than_the_prompt(llm: Any, few: list[ParadeRequest]) -> None:
    request = replace(few[0], instruction_tokens=6)
    with pytest.raises(VLLMValidationError, match="instruction_tokens is 6, but the prompt has 5 tokens"):
        llm.generate(prompts([5]), greedy(), parade_request=request, use_tqdm=False)


def test_the_engine_s_own_argument(llm: Any) -> None:
    with pytest.raises(VLLMValidationError, match="'parade' is not a sampling argument"):
        llm.generate(prompts([5]), greedy(extra_args={"parade": {"adapter": "x", "tokens": 5}}), use_tqdm=False)


def test_engine_without_parade(smollm: str, oracle: Oracle, few: list[ParadeRequest]) -> None:
    with engine(smollm) as llm:
        with pytest.raises(VLLMValidationError, match="PARADE is not enabled; start the engine with enable"):
            llm.generate(prompts([5]), greedy(), parade_request=few[0], use_tqdm=False)
        oracle.check(llm.generate(prompts([5]), greedy(), use_tqdm=False), [None])
