"""A bad adapter or request raises a clear exception for its call. The engine and other requests are not affected."""

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
from testing.random_models import INNER, make_adapter
from tests.engines import engine, manager, scheduler, tiny_greedy, tiny_prompts
from vllm_parade import ParadeRequest
from vllm_parade.adapter import BaseModelShape, load_adapter

pytestmark = pytest.mark.engine

STEP_TOKENS = 128
HOST = 3


@pytest.fixture(scope="module")
def llm(tiny: str) -> Iterator[Any]:
    options = {"max_parades": 2, "max_cpu_parades": HOST, "max_parade_rank": 16}
    # Beam search needs a tokenizer.
    with engine(tiny, enable_parade=True, max_num_batched_tokens=STEP_TOKENS, max_num_seqs=8, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def few(tiny_shape: BaseModelShape, tmp_path_factory: pytest.TempPathFactory) -> list[ParadeRequest]:
    """Small valid adapters, one more than twice the number that host memory holds."""
    folder = tmp_path_factory.mktemp("few")
    return [make_adapter(folder / f"t{i}", tiny_shape, i, inner=INNER) for i in range(2 * HOST + 1)]


def missing(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return ParadeRequest("bad", str(folder))


def not_a_number(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    request = make_adapter(folder, shape, 0, layers_to_transform=(1,))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.parade_generator.down.weight"][1, 2] = torch.nan
    save_file(tensors, file)
    return request


def cut_off(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    request = make_adapter(folder, shape, 0, layers_to_transform=(1,))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return request


def rank_too_large(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return make_adapter(folder, shape, 0, layers_to_transform=(1,), r=32)


def other_model(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return make_adapter(folder, replace(shape, hidden_size=64), 0, layers_to_transform=(1,))


def layer_too_high(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return make_adapter(folder, shape, 0, layers_to_transform=(1, 3))


def site_not_served(folder: Path, shape: BaseModelShape) -> ParadeRequest:
    return make_adapter(folder, shape, 0, layers_to_transform=(1,), sites=("q", "k"))


BAD: dict[Callable[[Path, BaseModelShape], ParadeRequest], str] = {
    missing: r"bad: no such folder; expected a folder that holds adapter_config.json",
    not_a_number: r"adapter_model.safetensors: tensor .*layers.1.*down.weight' holds NaN or infinity in 1 places",
    cut_off: r"adapter_model.safetensors: not a readable safetensors file",
    rank_too_large: r"adapter_config.json: r is 32; expected at most 16: raise --max-parade-rank",
    other_model: r"adapter_model.safetensors: tensor .*down.weight' has shape \[12, 64\]; expected \[12, 128\]",
    layer_too_high: r"adapter_config.json: layers_to_transform names layer 3; expected 0 to 2",
    site_not_served: r"adapter_config.json: sites names 'k'.*add k to --parade-sites",
}


@pytest.mark.parametrize(("make", "message"), BAD.items(), ids=[make.__name__ for make in BAD])
def test_bad_adapter_disturbs_nobody(
    llm: Any,
    tiny_oracle: Oracle,
    few: list[ParadeRequest],
    tiny_shape: BaseModelShape,
    tmp_path: Path,
    make: Callable[[Path, BaseModelShape], ParadeRequest],
    message: str,
) -> None:
    bad = make(tmp_path / "bad", tiny_shape)
    running = [few[0], None]
    llm.enqueue(tiny_prompts([12, 30]), tiny_greedy(6), parade_request=running, use_tqdm=False)
    for _ in range(2):
        llm.llm_engine.step()
    held = set(manager(llm).slots.host)
    # The whole call fails, its valid requests included.
    with pytest.raises(VLLMValidationError, match=f"adapter 'bad': .*{message}"):
        llm.generate(tiny_prompts([9, 9, 9]), tiny_greedy(), parade_request=[few[0], bad, None], use_tqdm=False)
    assert set(manager(llm).slots.host) == held
    tiny_oracle.check(llm.wait_for_completion(use_tqdm=False), running)
    after = [few[1], few[0], None]
    tiny_oracle.check(
        llm.generate(tiny_prompts([7, 40, 20]), tiny_greedy(), parade_request=after, use_tqdm=False), after
    )
    assert len(scheduler(llm).rows) == 0


def test_more_adapters_at_once_than_host_memory_holds(llm: Any, tiny_oracle: Oracle, few: list[ParadeRequest]) -> None:
    """Requests whose adapter finds no room wait until others finish, whatever the length of their answers."""
    asked: list[ParadeRequest | None] = [*few, None, *reversed(few)]
    params = [tiny_greedy(2 + 3 * (number % 4)) for number in range(len(asked))]
    most = []
    record_held(llm, most)
    outputs = llm.generate(tiny_prompts([8] * len(asked)), params, parade_request=asked, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [one.max_tokens for one in params]
    tiny_oracle.check(outputs, asked)
    assert max(most) == HOST


def record_held(llm: Any, held: list[int]) -> None:
    """Record how many adapters host memory holds after every step."""
    engine, step = llm.llm_engine, llm.llm_engine.step

    def recorded() -> Any:
        outputs = step()
        held.append(len(manager(llm).slots.host))
        return outputs

    engine.step = recorded


def test_host_memory_forgets_the_least_recently_used(llm: Any, tiny_oracle: Oracle, few: list[ParadeRequest]) -> None:
    order = [*few, few[0], few[4], few[1]]
    for request in order:
        outputs = llm.generate(tiny_prompts([11, 5]), tiny_greedy(4), parade_request=[request, None], use_tqdm=False)
        tiny_oracle.check(outputs, [request, None])
        assert len(manager(llm).slots.host) <= HOST
        assert len(manager(llm).slots.contents) == 2
    assert set(manager(llm).slots.host) == {load_adapter(few[i].path).content_hash for i in (0, 1, 4)}


def test_what_was_read_stays_as_it_was_read(
    llm: Any, tiny_oracle: Oracle, few: list[ParadeRequest], tmp_path: Path
) -> None:
    copy = ParadeRequest("copy", str(shutil.copytree(few[2].path, tmp_path / "copy")))
    llm.generate(tiny_prompts([6]), tiny_greedy(), parade_request=copy, use_tqdm=False)
    shutil.rmtree(copy.path)
    outputs = llm.generate(tiny_prompts([15]), tiny_greedy(), parade_request=copy, use_tqdm=False)
    tiny_oracle.check(outputs, [few[2]])
    with pytest.raises(VLLMValidationError, match="adapter 'other name': .*no such folder"):
        llm.generate(
            tiny_prompts([6]), tiny_greedy(), parade_request=replace(copy, parade_name="other name"), use_tqdm=False
        )


def test_one_content_under_two_names_is_forgotten_with_the_last(
    llm: Any, tiny_oracle: Oracle, few: list[ParadeRequest], tmp_path: Path
) -> None:
    twin = ParadeRequest("twin", str(shutil.copytree(few[0].path, tmp_path / "twin")))
    # t1 takes the place of t0, whose content is still the twin's.
    for request in (few[3], few[0], twin, few[1]):
        llm.generate(tiny_prompts([6]), tiny_greedy(2), parade_request=request, use_tqdm=False)
    llm.generate(tiny_prompts([6]), tiny_greedy(2), parade_request=few[2], use_tqdm=False)
    tiny_oracle.check(llm.generate(tiny_prompts([13]), tiny_greedy(), parade_request=twin, use_tqdm=False), [few[0]])


@pytest.mark.parametrize(
    ("given", "named"), [("t0", "'t0'"), (7, "7"), ({"name": "t0"}, "{'name': 't0'}"), ([None, "t0"], "'t0'")]
)
def test_something_else_than_a_request(llm: Any, given: Any, named: str) -> None:
    with pytest.raises(TypeError, match=f"^parade_request is {named}; expected a ParadeRequest, or a list of them"):
        llm.generate(tiny_prompts([5, 5]), tiny_greedy(), parade_request=given, use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize("method", ["generate", "beam_search"])
def test_list_of_another_length(llm: Any, few: list[ParadeRequest], method: str) -> None:
    from vllm.sampling_params import BeamSearchParams

    params = tiny_greedy() if method == "generate" else BeamSearchParams(beam_width=2, max_tokens=2)
    with pytest.raises(VLLMValidationError, match=r"\(2\) and parade_request \(1\) must be the same"):
        getattr(llm, method)(tiny_prompts([5, 5]), params, parade_request=[few[0]], use_tqdm=False)
    assert not llm.llm_engine.has_unfinished_requests()


def test_together_with_a_lora_request(llm: Any, few: list[ParadeRequest]) -> None:
    from vllm.lora.request import LoRARequest

    with pytest.raises(ValueError, match="lora_request and parade_request cannot be given together"):
        llm.generate(tiny_prompts([5]), tiny_greedy(), lora_request=LoRARequest("l", 1, "/l"), parade_request=few[0])


def test_beam_search_without_an_adapter(llm: Any, few: list[ParadeRequest]) -> None:
    from vllm.sampling_params import BeamSearchParams

    params = BeamSearchParams(beam_width=2, max_tokens=3)
    plain = llm.beam_search(tiny_prompts([9]), params)
    for nothing in (None, [None]):
        found = llm.beam_search(tiny_prompts([9]), params, parade_request=nothing)
        assert [beam.tokens for beam in found[0].sequences] == [beam.tokens for beam in plain[0].sequences]


def test_prompt_longer_than_a_step(llm: Any, tiny_oracle: Oracle, few: list[ParadeRequest]) -> None:
    asked = tiny_prompts([STEP_TOKENS + 1, STEP_TOKENS])
    wanted = rf"prompt has {STEP_TOKENS + 1} tokens.*'t0'.*at most {STEP_TOKENS} tokens.*--max-num-batched-tokens"
    with pytest.raises(VLLMValidationError, match=wanted):
        llm.generate(asked, tiny_greedy(), parade_request=few[0], use_tqdm=False)
    requests = [None, few[0]]
    tiny_oracle.check(llm.generate(asked, tiny_greedy(), parade_request=requests, use_tqdm=False), requests)


def test_instruction_longer_than_the_prompt(llm: Any, few: list[ParadeRequest]) -> None:
    request = replace(few[0], instruction_tokens=6)
    with pytest.raises(VLLMValidationError, match="instruction_tokens is 6, but the prompt has 5 tokens"):
        llm.generate(tiny_prompts([5]), tiny_greedy(), parade_request=request, use_tqdm=False)


def test_the_engine_s_own_argument(llm: Any) -> None:
    with pytest.raises(VLLMValidationError, match="'parade' is not a sampling argument"):
        llm.generate(
            tiny_prompts([5]), tiny_greedy(extra_args={"parade": {"adapter": "x", "tokens": 5}}), use_tqdm=False
        )


def test_engine_without_parade(tiny: str, tiny_oracle: Oracle, few: list[ParadeRequest]) -> None:
    with engine(tiny, skip_tokenizer_init=True) as llm:
        with pytest.raises(VLLMValidationError, match="PARADE is not enabled; start the engine with enable"):
            llm.generate(tiny_prompts([5]), tiny_greedy(), parade_request=few[0], use_tqdm=False)
        tiny_oracle.check(llm.generate(tiny_prompts([5]), tiny_greedy(), use_tqdm=False), [None])
