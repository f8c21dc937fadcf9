# SPDX-License-Identifier: Apache-2.0
"""Loading and eviction of adapters: the front end's registry, with a fake engine and fake workers."""

import asyncio
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_parade import ParadeRequest
from vllm_parade.config import AdditionalConfig, ServingConfig
from vllm_parade.frontend import held, online
from vllm_parade.frontend.adapters import AdapterRegistry, ensure_loaded


class FakeEngine:
    """Base of both fake vLLM engines. Its one worker records what it is asked to load and to forget.

    `unfinished`: whether the requests that were sent still run.
    """

    def __init__(self, max_cpu_parades=2, unfinished=True, **options):
        config = ServingConfig(True, max_parades=1, max_cpu_parades=max_cpu_parades, **options)
        vllm_config = SimpleNamespace(additional_config=AdditionalConfig({}, config))
        self.input_processor = SimpleNamespace(vllm_config=vllm_config)
        self.unfinished = unfinished
        self.output_processor = self
        self.calls = []
        self.answers = {}
        self.added = []

    @property
    def registry(self):
        return AdapterRegistry.of(self.input_processor)

    def has_unfinished_requests(self):
        return self.unfinished

    @property
    def external_req_ids(self):
        return dict.fromkeys(self.added) if self.unfinished else {}

    def answer(self, method, args):
        (asked,) = args
        self.calls.append(asked)
        if method == "parade_forget":
            return [None]
        assert method == "parade_add"
        return self.answers.get(asked, [{"ok": True, "content_hash": f"hash of {asked}"}])

    def add_request(self, request_id, lora_request=None):
        self.added.append(request_id)
        return request_id

    @property
    def resident(self):
        return [name for name, _ in self.registry._hashes]


class Offline(FakeEngine):
    def collective_rpc(self, method, args):
        return self.answer(method, args)

    def send(self, name):
        held.add_request(self.add_request, self, (name,), {"lora_request": adapter(name)})


class Online(FakeEngine):
    async def collective_rpc(self, method, args):
        answers = self.answer(method, args)
        await asyncio.sleep(0)
        return answers

    async def add_request_async(self, request_id, lora_request=None):
        await asyncio.sleep(0)
        self.add_request(request_id)

    def send(self, name):
        asyncio.run(self.send_async(name))

    async def send_async(self, name):
        await online.add_request(self.add_request_async, self, (name,), {"lora_request": adapter(name)})


def adapter(name):
    return ParadeRequest(name, f"/x/{name}")


@pytest.fixture(params=[Offline, Online])
def kind(request):
    return request.param


def test_an_adapter_is_loaded_once(kind):
    engine = kind()
    for name in "aba":
        engine.send(name)
    assert engine.calls == ["/x/a", "/x/b"]
    assert engine.added == ["a", "b", "a"]
    assert engine.registry.content_hash(adapter("a")) == "hash of /x/a"


def test_least_recently_used_makes_room(kind):
    engine = kind(unfinished=False)
    for name in "abac":
        engine.send(name)
    assert engine.resident == ["a", "c"]
    assert engine.calls[-2:] == ["/x/c", ["hash of /x/b"]]
    engine.send("b")
    assert engine.resident == ["c", "b"]


def test_adapters_in_use_are_never_evicted():
    """The offline engine holds such a request instead of refusing it: see test_held.py."""
    engine = Online()
    engine.send("a")
    engine.send("b")
    with pytest.raises(
        VLLMValidationError, match=r"all 2 adapters in host memory are in use; raise --max-cpu-parades.*now 2"
    ):
        engine.send("c")
    assert engine.resident == ["a", "b"]
    assert engine.added == ["a", "b"]
    engine.send("a")
    engine.unfinished = False
    engine.send("c")
    assert engine.resident == ["a", "c"]


def test_pinned_adapters_are_never_evicted(kind):
    engine = kind(unfinished=False)
    engine.send("a")
    engine.registry.pin(adapter("a"))
    for name in "bcd":
        engine.send(name)
    assert engine.resident == ["a", "d"]


def test_unpinned_adapters_make_room_when_their_requests_have_ended():
    engine = Online()
    for name in "ab":
        engine.send(name)
        engine.registry.pin(adapter(name))
    engine.registry.unpin(adapter("a"))
    engine.registry.unpin(adapter("never pinned"))
    with pytest.raises(VLLMValidationError, match="in use"):
        engine.send("c")
    engine.unfinished = False
    engine.send("c")
    assert engine.resident == ["b", "c"]


@pytest.mark.parametrize(
    ("answers", "message", "stale"),
    [
        ([{"ok": False, "error": "no such folder"}], "adapter 'c': no such folder", []),
        (
            [{"ok": True, "content_hash": "1"}, {"ok": False, "error": "no such folder"}],
            "adapter 'c': no such folder",
            [["1"]],
        ),
        (
            [{"ok": False, "error": "layer 5 overflows"}, {"ok": True, "content_hash": "hash of /x/a"}],
            "adapter 'c': layer 5 overflows",
            [],
        ),
        (
            [{"ok": True, "content_hash": "1"}, {"ok": True, "content_hash": "2"}],
            "adapter 'c': workers read different files in /x/c",
            [["1", "2"]],
        ),
    ],
)
def test_a_failed_load_changes_nothing(kind, answers, message, stale):
    """Nothing is evicted, even if some workers have read the new adapter. Those workers forget it."""
    engine = kind(unfinished=False)
    engine.send("a")
    engine.send("b")
    engine.answers["/x/c"] = answers
    with pytest.raises(VLLMValidationError, match=message):
        engine.send("c")
    assert engine.resident == ["a", "b"]
    assert engine.added == ["a", "b"]
    assert engine.calls[2:] == ["/x/c", *stale]
    # The next request loads the adapter again.
    del engine.answers["/x/c"]
    engine.send("c")
    assert engine.resident == ["b", "c"]


def test_refused_adapters_do_not_count_as_used():
    """Refused requests never mark an adapter as in use."""
    engine = Online()
    engine.send("a")
    engine.send("b")
    for name in "cdefg":
        with pytest.raises(VLLMValidationError):
            engine.send(name)
    assert engine.registry._in_use == {("a", "/x/a"), ("b", "/x/b")}


def test_content_under_two_names_is_kept_while_one_needs_it(kind):
    engine = kind(unfinished=False)
    for name in "ab":
        engine.answers[f"/x/{name}"] = [{"ok": True, "content_hash": "same"}]
        engine.send(name)
    engine.send("c")
    assert engine.calls[-1] == "/x/c"
    assert engine.resident == ["b", "c"]
    engine.send("d")
    assert engine.calls[-2:] == ["/x/d", ["same"]]


def test_requests_of_the_base_model_load_nothing(kind):
    engine = kind()
    if kind is Offline:
        held.add_request(engine.add_request, engine, ("0",), {})
    else:
        asyncio.run(online.add_request(engine.add_request_async, engine, ("0",), {}))
    assert engine.added == ["0"]
    assert engine.calls == []


def test_many_first_requests_at_once_load_once():
    engine = Online(unfinished=False)

    async def burst():
        await asyncio.gather(*(engine.send_async("a") for _ in range(5)))

    asyncio.run(burst())
    assert engine.calls == ["/x/a"]
    assert len(engine.added) == 5


def test_an_adapter_is_in_use_while_its_request_is_still_on_its_way():
    """vLLM may await tokenization before it counts a request as unfinished. The adapter must not be evicted then."""
    engine = Online(max_cpu_parades=1, unfinished=False)

    async def two():
        on_its_way = asyncio.Event()
        arrive = asyncio.Event()

        async def slow(request_id, lora_request=None):
            on_its_way.set()
            await arrive.wait()

        first = asyncio.create_task(online.add_request(slow, engine, ("a",), {"lora_request": adapter("a")}))
        await on_its_way.wait()
        with pytest.raises(VLLMValidationError, match="in use"):
            await ensure_loaded(engine, adapter("b"))
        arrive.set()
        await first
        await ensure_loaded(engine, adapter("b"))

    asyncio.run(two())
    assert engine.resident == ["b"]


async def leave_while_loading(engine):
    """Cancel the first client while its adapter is loading, then load another adapter."""
    client = asyncio.create_task(engine.send_async("a"))
    while not engine.calls:
        await asyncio.sleep(0)
    client.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client
    await ensure_loaded(engine, adapter("b"))


def test_a_client_that_goes_away_does_not_end_a_load_halfway():
    """The workers have the adapter by then. The registry must record it, or its memory is never freed."""
    engine = Online(unfinished=False)
    asyncio.run(leave_while_loading(engine))
    assert engine.calls == ["/x/a", "/x/b"]
    assert engine.resident == ["a", "b"]
    assert engine.added == []


def test_a_client_that_goes_away_does_not_keep_workers_from_forgetting():
    engine = Online(unfinished=False)
    engine.answers["/x/a"] = [{"ok": True, "content_hash": "1"}, {"ok": False, "error": "no such folder"}]
    asyncio.run(leave_while_loading(engine))
    assert engine.calls == ["/x/a", ["1"], "/x/b"]


def test_an_engine_without_parade_has_no_registry():
    processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    with pytest.raises(VLLMValidationError, match="PARADE is not enabled"):
        AdapterRegistry.of(processor)
