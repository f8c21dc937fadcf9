"""Two adapters and their base model on one server, asked in one batch, their answers side by side.

`make demo` runs it. It builds the base model where it is missing, starts `vllm serve` with the adapters of
examples/adapters, sends every prompt to the base model and to its task's adapter, all at once, through the official
openai client, prints a table and stops the server. The exit code says whether all of that worked.
"""

import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from openai import AsyncOpenAI, OpenAIError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from base_model import MODEL_NAME, base_model
from vllm_parade.train.templates import e2e_prompt, sst2_prompt

ADAPTERS = Path(__file__).resolve().parent / "adapters"
START_TIMEOUT_S = 600
# A healthy server needs two; one that is still starting ignores the request to end.
STOP_TIMEOUT_S = 10
PROGRESS_EVERY_S = 5
# Process, level, time and place, which vLLM writes before every message.
LOG_PREFIX = re.compile(r"^(\([^)]*\) )?([A-Z]+ \S+ \S+ \[[^\]]*\]\s*)?")

SENTENCES = (
    "a warm and funny film that never talks down to its audience .",
    "two hours of noise , and not one scene to remember .",
    "the plot is thin , but the two leads make it a pleasure to watch .",
    "it wants to be clever and ends up merely tired .",
)
REFERENCES = (
    "name[The Golden Oak], eatType[pub], food[Italian], area[riverside], familyFriendly[yes]",
    "name[Sea Lantern], eatType[restaurant], priceRange[high], customer rating[5 out of 5]",
    "name[Corner Mill], eatType[coffee shop], area[city centre], near[Raja Indian Cuisine]",
)


class DemoError(RuntimeError):
    """Something the user is told in words; there is no use in a traceback."""


@dataclass(frozen=True)
class Question:
    adapter: str
    prompt: str


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def log_tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def questions() -> list[Question]:
    sentiment = [Question("sst2", sst2_prompt(sentence)) for sentence in SENTENCES]
    return sentiment + [Question("e2e", e2e_prompt(reference)) for reference in REFERENCES]


def adapter_modules() -> list[str]:
    """The adapters that the questions are for, as `name=path`."""
    names = sorted({question.adapter for question in questions()})
    for name in names:
        if not (ADAPTERS / name / "adapter_config.json").is_file():
            raise DemoError(f"there is no adapter in {ADAPTERS / name}; python -m vllm_parade.train makes one")
    return [f"{name}={ADAPTERS / name}" for name in names]


def serve_command(model: Path, port: int) -> list[str]:
    return [
        # The one of this environment, whatever PATH says.
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", MODEL_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        # The shortest way to the first answer: no compilation, and no room for more than these prompts need.
        *("--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "32"),
        *("--enable-parade", "--parade-modules", *adapter_modules()),
    ]


def server_environment() -> dict[str, str]:
    defaults = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM would take a share of the machine's memory
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",  # the log shows at once how far the server is
        "HF_HUB_OFFLINE": "1",  # the model is a local folder: ask nobody about it
    }
    return defaults | os.environ


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started_server(model: Path) -> Iterator[Server]:
    """A server that is on its way up; it is stopped whatever happens in the block."""
    port = free_port()
    command = serve_command(model, port)
    descriptor, log = tempfile.mkstemp(prefix="vllm-parade-demo-", suffix=".log")
    say(f"starting {shlex.join(command)}")
    say(f"its log: {log}")
    with os.fdopen(descriptor, "wb") as output:
        # In a session of its own: Ctrl-C reaches the demo alone, which then stops the server in order.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=server_environment(),
            start_new_session=True,
        )
    try:
        yield Server(process, f"http://127.0.0.1:{port}", Path(log))
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    say("stopping the server")
    process.terminate()
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        say(f"it is still there after {STOP_TIMEOUT_S} s: killing it")
    finally:
        # The engine's processes are in the server's session. None may outlast the demo, a second Ctrl-C included.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(server: Server) -> None:
    start = time.monotonic()
    next_line = start + PROGRESS_EVERY_S
    while not is_healthy(server):
        now = time.monotonic()
        if (code := server.process.poll()) is not None:
            raise DemoError(f"the server ended with exit code {code}")
        if now - start > START_TIMEOUT_S:
            raise DemoError(f"the server is not healthy after {START_TIMEOUT_S} s")
        if now >= next_line:
            say(f"{now - start:4.0f} s  {LOG_PREFIX.sub('', server.log_tail(1))[:100]}")
            next_line += PROGRESS_EVERY_S
        time.sleep(0.5)
    say(f"healthy after {time.monotonic() - start:.0f} s")


def is_healthy(server: Server) -> bool:
    # URLError, a refused connection and a timeout are all OSErrors.
    with suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5) as response:
        return bool(response.status == 200)
    return False


async def ask(client: AsyncOpenAI, model: str, prompt: str) -> str:
    answer = await client.chat.completions.create(
        model=model,
        # No system message: the chat template adds the one that the adapters were trained under.
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=64,
    )
    (choice,) = answer.choices
    text = (choice.message.content or "").strip()
    return f"{text} ..." if choice.finish_reason == "length" else text


async def ask_all(server: Server) -> list[tuple[str, str]]:
    """For each question the base model's answer and the adapter's, out of one mixed batch."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0) as client:
        calls = [
            ask(client, model, question.prompt) for question in questions() for model in (MODEL_NAME, question.adapter)
        ]
        answers = await asyncio.gather(*calls)
    return list(zip(answers[::2], answers[1::2], strict=True))


def print_table(answers: list[tuple[str, str]]) -> None:
    table = Table(box=box.ROUNDED, show_lines=True)
    for heading, share in (("prompt", 5), ("base model", 5), ("adapter", 1), ("its answer", 5)):
        table.add_column(heading, ratio=share)
    for question, (base, adapted) in zip(questions(), answers, strict=True):
        # Text, for rich would take the brackets of an E2E reference for markup.
        table.add_row(*map(Text, (question.prompt, base, question.adapter, adapted)))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def run() -> None:
    model = base_model()
    with started_server(model) as server:
        try:
            wait_until_healthy(server)
            start = time.monotonic()
            answers = asyncio.run(ask_all(server))
        except (DemoError, OpenAIError) as error:
            raise DemoError(f"{error}\nThe end of the server's log:\n{server.log_tail(40)}") from error
        say(f"{2 * len(answers)} answers in {time.monotonic() - start:.1f} s, asked in one batch")
        print_table(answers)
        if any(base == adapted for base, adapted in answers):
            raise DemoError("an adapter gave the base model's answer")


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def terminate(signum: int, frame: object) -> NoReturn:
    # An exception, for the server is stopped on the way out.
    sys.exit(128 + signum)


def main() -> None:
    signal.signal(signal.SIGTERM, terminate)
    start = time.monotonic()
    try:
        run()
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    say(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
