"""Base model and two adapters in one batch, without a server.

python examples/offline.py
"""

from pathlib import Path

from vllm import LLM, SamplingParams

from base_model import base_model
from vllm_parade import ParadeRequest
from vllm_parade.train.templates import e2e_prompt, sst2_prompt

ADAPTERS = Path(__file__).resolve().parent / "adapters"
SENTENCE = sst2_prompt("a warm and funny film that never talks down to its audience .")
REFERENCE = e2e_prompt("name[Sea Lantern], eatType[restaurant], priceRange[high], customer rating[5 out of 5]")


def main() -> None:
    # Any LLaMA-architecture model will do; without enforce_eager the model is compiled, which takes longer to start.
    llm = LLM(str(base_model()), enable_parade=True, enforce_eager=True, max_model_len=2048, max_num_seqs=32)
    sst2 = ParadeRequest("sst2", str(ADAPTERS / "sst2"))
    e2e = ParadeRequest("e2e", str(ADAPTERS / "e2e"))

    # One entry a prompt; None is the base model. `chat` renders the template that the adapters were trained under.
    prompts = [SENTENCE, SENTENCE, REFERENCE, REFERENCE]
    requests = [None, sst2, None, e2e]
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    outputs = llm.chat(
        conversations,
        SamplingParams(temperature=0, max_tokens=48),
        parade_request=requests,
        use_tqdm=False,
    )

    for prompt, request, output in zip(prompts, requests, outputs, strict=True):
        name = request.parade_name if request else "base model"
        print(f"\n{prompt}\n  {name}: {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
