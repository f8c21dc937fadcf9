# SPDX-License-Identifier: Apache-2.0
"""Offline requests without room for their adapter, with a fake engine whose requests end when the test ends them."""

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_parade import ParadeRequest
from vllm_parade.adapter import AdapterError
from vllm_parade.config import AdditionalConfig, ServingConfig
from vllm_parade.frontend import held


class Engine:
    """An LLMEngine with room for two adapters in its worker's host memory."""

    def __init__(self):
        config = ServingConfig(True, max_parades=1, max_cpu_parades=2)
        model = SimpleNamespace(hf_text_config=None)
        self.vllm_config = SimpleNamespace(additional_config=AdditionalConfig({}, config), model_config=model)
        self.input_processor = SimpleNamespace(vllm_config=self.vllm_config)
        self.output_processor = SimpleNamespace(external_req_ids={})
        self.worker = []
        self.changed_files = set()

    @property
    def running(self):
        return list(self.output_processor.external_req_ids)

    def end(self, *names):
        for name in names:
            del self.output_processor.external_req_ids[name]

    def collective_rpc(self, method, args):
        (asked,) = args
        if method == "parade_forget":
            self.worker = [content for content in self.worker if content not in asked]
            return [None]
        if asked in self.changed_files:
            return [{"ok": False, "error": "no such folder"}]
        self.worker.append(asked)
        assert len(self.worker) <= 3, "more than what fits and what takes its place"
        return [{"ok": True, "content_hash": asked}]

    # vLLM's methods, and the wrappers in `held` around them.
    def _add_request(self, request_id, prompt, params, lora_request=None):
        self.output_processor.external_req_ids[request_id] = [request_id]
        return request_id

    def _abort_request(self, request_ids, internal=False):
        self.end(*(set(request_ids) & set(self.running)))

    def add(self, name, adapter=None, n=1):
        request = adapter and ParadeRequest(adapter, f"/x/{adapter}")
        return held.add_request(self._add_request, self, (name, "prompt", SamplingParams(n=n), request), {})

    def abort_request(self, request_ids, internal=False):
        held.abort_request(self._abort_request, self, (request_ids,), {"internal": internal})

    def step(self):
        held.step(lambda: None, self, (), {})
        return self.running

    @property
    def has_unfinished(self):
        return held.has_unfinished_requests(lambda: bool(self.running), self, (), {})

    @property
    def num_unfinished(self):
        return held.get_num_unfinished_requests(lambda: len(self.running), self, (), {})


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(held.BaseModelShape, "from_hf_config", lambda config: None)
    monkeypatch.setattr(held, "load_adapter", lambda path, shape, **limits: refuse(path))
    return Engine()


def refuse(path):
    if "bad" in path:
        raise AdapterError(f"{path}: no such folder")


def test_requests_run_as_room_is_left(engine):
    """Requests start in the order of their arrival, except that one whose adapter is loaded starts at once."""
    for name, adapter in zip("abcdef", ["A", "B", "C", "A", None, "D"], strict=True):
        assert engine.add(name, adapter) == name
    assert engine.step() == ["a", "b", "d", "e"]
    engine.end("a")
    # Request d still uses adapter A.
    assert engine.step() == ["b", "d", "e"]
    engine.end("b")
    assert engine.step() == ["d", "e", "c"]
    engine.end("d", "e")
    assert engine.step() == ["c", "f"]
    assert sorted(engine.worker) == ["/x/C", "/x/D"]


def test_a_request_that_came_later_takes_no_room_from_one_that_waits(engine):
    for name in "abc":
        engine.add(name, name.upper())
    engine.end("a")
    engine.add("d", "D")
    assert engine.step() == ["b", "c"]
    engine.add("e", "C")
    assert engine.running == ["b", "c", "e"]


def test_held_requests_are_unfinished(engine):
    engine.add("a", "A")
    engine.add("b", "B")
    engine.add("c", "C", n=3)
    assert engine.num_unfinished == 2 + 3
    engine.end("a", "b")
    assert engine.has_unfinished
    assert engine.step() == ["c"]
    engine.end("c")
    assert not engine.has_unfinished
    assert engine.num_unfinished == 0


def test_an_engine_that_has_seen_no_adapter_is_left_alone(engine):
    engine.add("a")
    assert engine.step() == ["a"]
    assert engine.num_unfinished == 1
    engine.abort_request(["a"])
    assert not engine.has_unfinished


def test_aborted_while_it_is_held(engine):
    for name in "abcd":
        engine.add(name, name.upper())
    engine.abort_request(["c", "a"], internal=True)
    assert engine.step() == ["b", "d"]


def test_a_bad_adapter_is_refused_at_once(engine):
    for name in "abc":
        engine.add(name, name.upper())
    with pytest.raises(VLLMValidationError, match="adapter 'bad': /x/bad: no such folder"):
        engine.add("d", "bad")
    engine.end("a", "b")
    assert engine.step() == ["c"]


def test_an_adapter_that_is_gone_when_its_turn_comes_ends_the_call(engine):
    """Otherwise the next call would get answers of this one."""
    for name in "abcd":
        engine.add(name, name.upper())
    engine.changed_files.add("/x/C")
    engine.end("a")
    with pytest.raises(VLLMValidationError, match="adapter 'C': no such folder"):
        engine.step()
    assert not engine.has_unfinished
    engine.add("e", "E")
    assert engine.step() == ["e"]
