"""Ask the application of examples/ray/serve.yaml, and load another adapter while it runs.

PARADE_ADMIN_KEY=... python examples/ray/client.py [--url http://localhost:8000/v1]
"""

import argparse
import os
from pathlib import Path

import httpx
from openai import OpenAI

from vllm_parade.train.templates import e2e_prompt, sst2_prompt

ADAPTERS = Path(__file__).resolve().parents[1] / "adapters"
QUESTIONS = {
    "sst2": sst2_prompt("two hours of noise , and not one scene to remember ."),
    "e2e": e2e_prompt("name[Corner Mill], eatType[coffee shop], area[city centre], near[Raja Indian Cuisine]"),
}


def ask(client: OpenAI, model: str, prompt: str) -> None:
    """Print the answer and the replica that gave it."""
    response = client.chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=48
    )
    replica = response.headers["x-parade-replica"].rpartition("#")[2]
    print(f"  {model} (replica {replica}): {response.parse().choices[0].message.content}")


def load(url: str, name: str) -> None:
    """Load an adapter. When this returns, every replica serves it."""
    response = httpx.post(
        f"{url}/load_parade_adapter",
        json={"parade_name": name, "parade_path": str(ADAPTERS / name)},
        headers={"authorization": f"Bearer {os.environ.get('PARADE_ADMIN_KEY', '')}"},
        timeout=120,
    )
    print(f"\nload {name}: {response.status_code} {response.text}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask base model and adapters the same questions, on Ray.")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    url = parser.parse_args().url
    client = OpenAI(base_url=url, api_key="none", max_retries=5)
    load(url, "e2e")
    models = {card.id: card.to_dict() for card in client.models.list()}
    base = next(name for name, card in models.items() if card["parent"] is None)
    for adapter, prompt in QUESTIONS.items():
        print(f"\n{prompt}")
        for model in (base, adapter, adapter):
            ask(client, model, prompt)


if __name__ == "__main__":
    main()
