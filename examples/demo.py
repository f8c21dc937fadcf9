"""Start a server, ask the base model and two adapters in one batch, and print their answers side by side.

`make demo` runs it (`python -m examples.demo` in the project's folder). The exit code is 0 if every step worked.
"""

import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from openai import AsyncOpenAI
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from testing.server import ServerError, server
from tools.base_model import MODEL_NAME, base_model
from vllm_parade.train.templates import e2e_prompt, sst2_prompt

ADAPTERS = Path(__file__).resolve().parent / "adapters"
# For a fast start: no compilation, and no more memory than these prompts need.
FLAGS = [
    *("--served-model-name", MODEL_NAME, "--dtype", "bfloat16"),
    *("--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "32"),
    *("--enable-parade", "--parade-modules", f"sst2={ADAPTERS / 'sst2'}", f"e2e={ADAPTERS / 'e2e'}"),
]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; by default vLLM takes a share of the machine's memory
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",  # the model is a local folder
}
QUESTIONS = [
    ("sst2", sst2_prompt("a warm and funny film that never talks down to its audience .")),
    ("sst2", sst2_prompt("two hours of noise , and not one scene to remember .")),
    ("sst2", sst2_prompt("the plot is thin , but the two leads make it a pleasure to watch .")),
    ("sst2", sst2_prompt("it wants to be clever and ends up merely tired .")),
    ("e2e", e2e_prompt("name[The Golden Oak], eatType[pub], food[Italian], area[riverside], familyFriendly[yes]")),
    ("e2e", e2e_prompt("name[Sea Lantern], eatType[restaurant], priceRange[high], customer rating[5 out of 5]")),
    ("e2e", e2e_prompt("name[Corner Mill], eatType[coffee shop], area[city centre], near[Raja Indian Cuisine]")),
]


async def ask(client: AsyncOpenAI, model: str, prompt: str) -> str:
    """One answer, followed by `...` if it was cut off."""
    answer = await client.chat.completions.create(
        model=model,
        # No system message: the chat template adds the one that the adapters were trained with.
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=64,
    )
    text = (answer.choices[0].message.content or "").strip()
    return f"{text} ..." if answer.choices[0].finish_reason == "length" else text


async def ask_all(url: str) -> list[tuple[str, str]]:
    """Ask all questions at once; returns the base model's and the adapter's answer to each."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0) as client:
        asked = [ask(client, model, prompt) for adapter, prompt in QUESTIONS for model in (MODEL_NAME, adapter)]
        answers = await asyncio.gather(*asked)
    return list(zip(answers[::2], answers[1::2], strict=True))


def print_table(answers: list[tuple[str, str]]) -> None:
    table = Table(box=box.ROUNDED, show_lines=True)
    for heading, ratio in (("prompt", 5), ("base model", 5), ("adapter", 1), ("its answer", 5)):
        table.add_column(heading, ratio=ratio)
    for (adapter, prompt), (base, adapted) in zip(QUESTIONS, answers, strict=True):
        # Text, because rich would parse the brackets of an E2E reference as markup.
        table.add_row(*map(Text, (prompt, base, adapter, adapted)))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def say(line: str) -> None:
    print(f"demo: {line}", flush=True)


def main() -> None:
    # Raise SystemExit on signals, so that the context manager stops the server.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    start, log = time.monotonic(), Path(tempfile.mkstemp(prefix="vllm-parade-demo-", suffix=".log")[1])
    try:
        with server(str(base_model()), *FLAGS, log=log, environment=ENVIRONMENT | os.environ, report=say) as url:
            asked = time.monotonic()
            answers = asyncio.run(ask_all(url))
            say(f"{2 * len(answers)} answers in {time.monotonic() - asked:.1f} s, asked in one batch")
            print_table(answers)
    except ServerError as error:
        sys.exit(f"demo: {error}")
    if any(base == adapted for base, adapted in answers):
        sys.exit("demo: an adapter gave the same answer as the base model")
    say(f"done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
