# SPDX-License-Identifier: Apache-2.0
"""Generates the table of conversations, documents and long prompts from result files."""

from tools.figures import figure, rounded
from tools.tables import table

CONVERSATIONS = "llama2-7b-h200-conversations.json"
FILES = {"base": CONVERSATIONS, "parade": CONVERSATIONS, "lora": "llama2-7b-h200-conversations-lora.json"}
BESIDE = dict.fromkeys(("base", "parade"), "llama2-7b-h200-beside.json")
NAMES = {"base": "base model", "parade": "PARADE, turns", "lora": "LoRA"}


def history() -> str:
    """Times to first token with cached histories and documents, and step times beside a long prompt."""
    rows = [
        _row(f"12 turns, {count} at once: sum of first tokens, ms", FILES, "ttft_sum_ms", conversations=count)
        for count in (1, 16)
    ]
    rows += [
        _row(f"document of {length:,} tokens: a later tenant's first token, ms", FILES, "ttft_ms", document=length)
        for length in (6000, 32000)
    ]
    rows.append(_row("longest step of 32 requests beside a prompt of 32,040 tokens, ms", BESIDE, "longest_ms"))
    return table(["H200, LLaMA-2 7B sizes", *NAMES.values()], rows)


def _row(what: str, files: dict[str, str], measure: str, **point: int) -> list[str]:
    values = {variant: figure(file, measure, variant, **point) for variant, file in files.items()}
    base = values["base"]
    if base is None or None in values.values():
        raise ValueError(f"{measure} {point} is missing from {', '.join(set(files.values()))}")
    shown = {variant: rounded(value) + f" ({value / base:.2f}x)" for variant, value in values.items() if value}
    return [what, rounded(base), *(shown.get(variant, "") for variant in NAMES if variant != "base")]
