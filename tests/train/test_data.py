# SPDX-License-Identifier: Apache-2.0
"""Prompts as token ids, in batches."""

from transformers import AutoTokenizer

from vllm_parade.train.data import Collator, encode, encode_prompt, pad_left
from vllm_parade.train.readers import Example


def test_prompts_in_their_templates(smollm: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    texts = {name: tokenizer.decode(encode_prompt(tokenizer, "Why?", name)) for name in ("chat", "llama2", "plain")}
    assert texts["chat"].endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert texts["llama2"].endswith(
        "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant.\n<</SYS>>\n\nWhy? [/INST]"
    )
    assert texts["plain"].endswith("Why?\n")


def test_only_responses_have_labels(smollm: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    short, long = encode(tokenizer, [Example("Why?", ("so", "because of that"))])
    prompt = encode_prompt(tokenizer, "Why?")
    for pair in (short, long):
        assert pair["input_ids"][: len(prompt)] == prompt
        assert pair["labels"] == [-100] * len(prompt) + pair["input_ids"][len(prompt) :]
        assert pair["labels"][-1] == tokenizer.eos_token_id
    assert encode(tokenizer, [Example("Why?", ("so", "because of that"))], max_length=len(short["input_ids"])) == [
        short
    ]


def test_padding() -> None:
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 3], [4, -100, -100]]
    left = pad_left([[1, 2], [3]], 9, "cpu")
    assert left["input_ids"].tolist() == [[1, 2], [9, 3]]
    assert left["attention_mask"].tolist() == [[1, 1], [0, 1]]
