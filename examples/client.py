"""Ask a running server (examples/serve.sh). The model name selects the adapter, and the answers are streamed.

python examples/client.py [--url http://localhost:8000/v1]
"""

import argparse

from openai import OpenAI

from vllm_parade.train.templates import e2e_prompt, sst2_prompt

QUESTIONS = {
    "sst2": sst2_prompt("two hours of noise , and not one scene to remember ."),
    "e2e": e2e_prompt("name[Corner Mill], eatType[coffee shop], area[city centre], near[Raja Indian Cuisine]"),
}


def ask(client: OpenAI, model: str, prompt: str) -> None:
    """Stream the answer and print it."""
    print(f"  {model}: ", end="", flush=True)
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=48,
        stream=True,
    )
    for chunk in answer:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the base model and the adapters the same questions.")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    client = OpenAI(base_url=parser.parse_args().url, api_key="none")
    models = {card.id: card.to_dict() for card in client.models.list()}
    print("served:", ", ".join(f"{name} (parent {card['parent']})" for name, card in models.items()))
    base = next(name for name, card in models.items() if card["parent"] is None)
    for adapter, prompt in QUESTIONS.items():
        print(f"\n{prompt}")
        for model in (base, adapter):
            ask(client, model, prompt)


if __name__ == "__main__":
    main()
