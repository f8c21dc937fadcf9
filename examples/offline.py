"""Generate with the base model and two adapters in one batch, without a server.

python examples/offline.py
"""

import subprocess
import sys
from pathlib import Path

from vllm import LLM, SamplingParams

from vllm_parade import ParadeRequest
from vllm_parade.train.templates import e2e_prompt, sst2_prompt

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = ROOT / "examples/adapters"
SENTENCE = sst2_prompt("a warm and funny film that never talks down to its audience .")
REFERENCE = e2e_prompt("name[Sea Lantern], eatType[restaurant], priceRange[high], customer rating[5 out of 5]")


def main() -> None:
    # Builds the adapters' base model without access to the Hub. With access, use "HuggingFaceTB/SmolLM2-135M-Instruct".
    model = subprocess.check_output([sys.executable, ROOT / "tools/base_model.py"], text=True).strip()
    # Without enforce_eager, vLLM compiles the model at startup, which takes longer.
    llm = LLM(model, enable_parade=True, enforce_eager=True, max_model_len=2048, max_num_seqs=32)
    sst2 = ParadeRequest("sst2", str(ADAPTERS / "sst2"))
    e2e = ParadeRequest("e2e", str(ADAPTERS / "e2e"))

    # One entry per prompt; None is the base model. `chat` applies the template that the adapters were trained with.
    prompts = [SENTENCE, SENTENCE, REFERENCE, REFERENCE]
    requests = [None, sst2, None, e2e]
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=48)
    outputs = llm.chat(conversations, params, parade_request=requests, use_tqdm=False)

    for prompt, request, output in zip(prompts, requests, outputs, strict=True):
        name = request.parade_name if request else "base model"
        print(f"\n{prompt}\n  {name}: {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
