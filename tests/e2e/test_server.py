"""A real `vllm serve`, queried with the official OpenAI client, and the command's output when it refuses to start."""

import asyncio
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Coroutine, Iterator
from itertools import cycle, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from testing.oracle import TOLERANCE, Oracle, beams
from testing.server import server
from tests import rules, servers
from tests.documents import commands, texts
from tests.engines import prompts
from vllm_parade import ParadeRequest
from vllm_parade.train.templates import e2e_prompt, sst2_prompt

pytestmark = pytest.mark.engine

HERE = "tests/e2e/test_server.py"
BASE = "smollm"
PARENT = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Smaller than the model's length, so that a prompt can be too long under an adapter but not under the base model.
STEP_TOKENS = 128
PROMPTS = {
    "sst2": sst2_prompt("a warm and funny film that never talks down to its audience ."),
    "e2e": e2e_prompt("name[Sea Lantern], eatType[restaurant], priceRange[high], customer rating[5 out of 5]"),
}


@pytest.fixture(scope="module")
def adapters(trained: dict[str, ParadeRequest], variants: dict[str, ParadeRequest]) -> dict[str, ParadeRequest]:
    """The two trained adapters, and one whose vectors change with every token that is added to an instruction."""
    return {**trained, "last": variants["last"]}


@pytest.fixture(scope="module")
def url(smollm: str, adapters: dict[str, ParadeRequest], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server that README's command starts, with more adapters and in float32."""
    text, _ = texts("README.md", f"{HERE}::test_the_request_of_the_readme", "bash")
    for given in ("adapters/mine", "examples/adapters/sst2"):
        text = text.replace(f"={given}", f"={adapters['sst2'].path}")
    ((_, _, model, *words),) = commands(text, MODEL=smollm)
    as_json = json.dumps({"name": "e2e", "path": adapters["e2e"].path, "base_model_name": PARENT})
    flags = [
        *(as_json, f"last={adapters['last'].path}"),
        *("--served-model-name", BASE, "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "512", "--max-num-batched-tokens", str(STEP_TOKENS), "--max-num-seqs", "32"),
    ]
    log = tmp_path_factory.mktemp("server") / "server.log"
    with server(model, *words, *flags, log=log, environment=servers.environment()) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def ask_together(url: str, *questions: dict[str, Any]) -> list[Any]:
    """Send all questions at once and return their completions."""

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            calls: list[Coroutine[Any, Any, Any]] = [client.completions.create(**question) for question in questions]
            return await asyncio.gather(*calls)

    return asyncio.run(ask())


def question(model: str, prompt: list[int], max_tokens: int = 8, **extra: Any) -> dict[str, Any]:
    """A greedy completion of exactly this length, with token ids and log-probabilities."""
    body = {"return_token_ids": True, "ignore_eos": True, **extra}
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": 1,
        "extra_body": body,
    }


def row_counts(url: str) -> dict[str, int]:
    """Hits, misses and evictions of vector rows from /metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    pattern = rf'^vllm:parade_row_(\w+)_total{{engine="0",model_name="{BASE}"}} (\S+)$'
    return {name: int(float(value)) for name, value in re.findall(pattern, text, re.MULTILINE)}


def as_output(prompt: list[int], answer: list[int], logprobs: list[float]) -> Any:
    """A choice of the server, in the form that the oracle checks."""
    steps = [{token: SimpleNamespace(logprob=value)} for token, value in zip(answer, logprobs, strict=True)]
    return SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=answer, logprobs=steps)])


def completion_output(choice: Any) -> Any:
    return as_output(choice.prompt_token_ids, choice.token_ids, choice.logprobs.token_logprobs)


def chat(client: openai.OpenAI, model: str, prompt: str, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(
        model=model, messages=messages, max_tokens=12, temperature=0, **{"extra_body": {}, **options}
    )


def test_adapters_and_the_base_model_together(url: str, oracle: Oracle, adapters: dict[str, ParadeRequest]) -> None:
    models = cycle([BASE, "sst2", "e2e", "last"])
    # The base model's long prompts are computed in chunks; an adapter's prompt may fill a whole step.
    lengths = [200, 1, 16, 31, 150, STEP_TOKENS, 17, 5, 64, 90, 33, 100, 9, 2, STEP_TOKENS - 1, 48]
    asked = [question(next(models), prompt["prompt_token_ids"]) for prompt in prompts(lengths, seed=20)]
    answers = ask_together(url, *asked)
    assert [answer.model for answer in answers] == [one["model"] for one in asked]
    requests = [adapters.get(one["model"]) for one in asked]
    oracle.check([completion_output(answer.choices[0]) for answer in answers], requests)


def test_answers_under_a_grammar_beside_free_ones(
    url: str, smollm: str, oracle: Oracle, adapters: dict[str, ParadeRequest]
) -> None:
    choices = ["positive", "negative", "It is neither"]
    rule = rules.one_of(choices, AutoTokenizer.from_pretrained(smollm))
    models, asked = [BASE, "sst2", "last"], [prompt["prompt_token_ids"] for prompt in prompts([40, 70, 33], seed=72)]
    grammar: dict[str, Any] = {"structured_outputs": {"choice": choices}, "ignore_eos": False}
    pairs = list(zip(models, asked, strict=True))
    ruled = [question(model, prompt, max_tokens=24, **grammar) for model, prompt in pairs]
    answers = ask_together(url, *ruled, *(question(model, prompt) for model, prompt in pairs))
    outputs, requests = [completion_output(answer.choices[0]) for answer in answers], [adapters.get(m) for m in models]
    oracle.check(outputs[:3], requests, rule, grammar=True)
    oracle.check(outputs[3:], requests)


def test_one_prompt_under_three_names(client: openai.OpenAI, oracle: Oracle, trained: dict[str, ParadeRequest]) -> None:
    for prompt in PROMPTS.values():
        texts = []
        for model in (BASE, *trained):
            answer = chat(client, model, prompt, logprobs=True, extra_body={"return_token_ids": True})
            (choice,) = answer.choices
            values = [step.logprob for step in choice.logprobs.content]
            oracle.check([as_output(answer.prompt_token_ids, choice.token_ids, values)], [trained.get(model)])
            texts.append(choice.message.content)
        assert len(set(texts)) == 3
    assert chat(client, "sst2", PROMPTS["sst2"]).choices[0].message.content == "positive"


@pytest.mark.parametrize("model", [BASE, "sst2", "e2e"])
def test_streamed_chunks_make_the_whole_answer(client: openai.OpenAI, model: str) -> None:
    whole = chat(client, model, PROMPTS["e2e"])
    chunks = [chunk for chunk in chat(client, model, PROMPTS["e2e"], stream=True) if chunk.choices]
    assert len(chunks) > 2
    assert {chunk.model for chunk in chunks} == {model}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    asked: Any = {"model": model, "prompt": "The restaurant", "max_tokens": 12, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)) == text


def test_several_answers_to_one_prompt(url: str, oracle: Oracle, trained: dict[str, ParadeRequest]) -> None:
    asked = question("e2e", prompts([48], seed=21)[0]["prompt_token_ids"])
    (answer,) = ask_together(url, {**asked, "n": 2, "temperature": 0.9, "seed": 5})
    first, second = answer.choices
    assert first.token_ids != second.token_ids
    for choice in answer.choices:
        choice.prompt_token_ids = asked["prompt"]
        with oracle.logprobs(trained["e2e"]) as logprobs:
            _, values = logprobs(completion_output(choice))
        assert (torch.tensor(choice.logprobs.token_logprobs) - values).abs().max() <= TOLERANCE


def test_beam_search_keeps_its_instruction(url: str, oracle: Oracle, adapters: dict[str, ParadeRequest]) -> None:
    prompt = prompts([20], seed=22)[0]["prompt_token_ids"]
    options: dict[str, Any] = {"n": 3, "logprobs": None}
    body = {"return_token_ids": True, "ignore_eos": True, "use_beam_search": True}
    asked = {**question("last", prompt, max_tokens=6), **options, "extra_body": body}
    (answer,) = ask_together(url, asked)
    model = PeftModel.from_pretrained(oracle.base, adapters["last"].path)
    try:
        wanted = beams(model, prompt, 6).sequences
    finally:
        model.unload()
    served = [choice.token_ids[-6:] for choice in answer.choices]
    assert served == wanted[:, len(prompt) :].tolist()


def test_metrics_count_rows(url: str) -> None:
    """The first request is a miss and the second a hit. The base model's request counts nothing."""
    prompt = prompts([40], seed=24)[0]["prompt_token_ids"]
    seen = [row_counts(url)]
    for model in ("sst2", "sst2", BASE):
        ask_together(url, question(model, prompt))
        seen.append(row_counts(url))
    changes = [{name: now[name] - then[name] for name in then} for then, now in pairwise(seen)]
    nothing = {"hits": 0, "misses": 0, "evictions": 0}
    assert changes == [{**nothing, "misses": 1}, {**nothing, "hits": 1}, nothing]


def test_the_request_of_the_readme(url: str) -> None:
    _, text = texts("README.md", f"{HERE}::test_the_request_of_the_readme", "bash")
    command = ["bash", "-c", text.replace("http://localhost:8000", url)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["model"] == "mine"
    assert answer["choices"][0]["message"]["content"]


def test_the_client_of_the_page(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = texts("docs/serving.md", f"{HERE}::test_the_client_of_the_page", "python")
    exec(text.replace("http://localhost:8000", url), {})
    assert capsys.readouterr().out == "positive\n"


def test_example_client(url: str) -> None:
    (text,) = texts("docs/serving.md", f"{HERE}::test_example_client", "bash")
    ((_, *words),) = commands(text.replace("http://localhost:8000", url))
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, *words], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = {"mine": BASE, "sst2": BASE, "e2e": PARENT, "last": BASE}
    assert ", ".join(f"{name} (parent {parent})" for name, parent in names.items()) in done.stdout
    assert f"served: {BASE} (parent None), mine" in done.stdout
    assert "\n  sst2: negative\n" in done.stdout


def test_adapters_are_listed_as_models(client: openai.OpenAI, smollm: str, adapters: dict[str, ParadeRequest]) -> None:
    cards = {card.id: card.to_dict() for card in client.models.list()}
    assert {name: (card["root"], card["parent"]) for name, card in cards.items()} == {
        BASE: (smollm, None),
        "mine": (adapters["sst2"].path, BASE),
        "sst2": (adapters["sst2"].path, BASE),
        "e2e": (adapters["e2e"].path, PARENT),
        "last": (adapters["last"].path, BASE),
    }


def test_unknown_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        chat(client, "nobody", "Hello")


def test_prompt_longer_than_a_step(url: str, oracle: Oracle, trained: dict[str, ParadeRequest]) -> None:
    long = prompts([STEP_TOKENS + 1], seed=23)[0]["prompt_token_ids"]
    wanted = rf"prompt has {STEP_TOKENS + 1} tokens.*'sst2'.*at most {STEP_TOKENS}.*--max-num-batched-tokens"
    with pytest.raises(openai.BadRequestError, match=wanted):
        ask_together(url, question("sst2", long))
    # The base model computes the long prompt in chunks. The adapter answers the prompt that fits.
    answers = ask_together(url, question(BASE, long), question("sst2", long[:-1]))
    oracle.check([completion_output(answer.choices[0]) for answer in answers], [None, trained["sst2"]])


@pytest.mark.parametrize("model", [BASE, "sst2"])
def test_clients_cannot_write_the_engine_s_own_argument(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="'parade' is not a sampling argument"):
        chat(client, model, "Hello", extra_body={"vllm_xargs": {"parade": "anything"}})


def test_bad_adapter_ends_the_command_with_one_line(smollm: str, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    done = servers.run_to_the_end("serve", smollm, "--enable-parade", "--parade-modules", f"bad={nowhere}")
    assert_refused(done, f"PARADE: {nowhere}: no such folder; expected a folder that holds adapter_config.json")


def test_modules_without_enable_end_the_command_with_one_line(
    smollm: str, trained: dict[str, ParadeRequest], capfd: pytest.CaptureFixture[str]
) -> None:
    done = servers.run_here(capfd, "serve", smollm, "--parade-modules", f"sst2={trained['sst2'].path}")
    assert_refused(done, "PARADE: --parade-modules needs --enable-parade; add it, or drop the modules")


def assert_refused(done: Any, message: str) -> None:
    """Check that the output has the message once, in its last line, and no traceback."""
    lines = done.stdout.strip().splitlines()
    assert done.returncode == 1, done.stdout
    assert message in lines[-1], done.stdout
    assert "Traceback" not in done.stdout, done.stdout
    assert sum("PARADE:" in line for line in lines) == 1, done.stdout


def test_flags_are_in_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    (text,) = texts("docs/index.md", f"{HERE}::test_flags_are_in_the_help", "bash")
    ((_, *words),) = commands(text)
    done = servers.run_here(capfd, *words)
    assert done.returncode == 0, done.stdout
    flags = ("enable-parade", "parade-modules", "max-parades", "max-cpu-parades", "max-parade-rank", "parade-sites")
    assert [flag for flag in flags if f"--{flag}" not in done.stdout] == []
