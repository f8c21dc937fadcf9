# SPDX-License-Identifier: Apache-2.0
"""Chat templates in the formats of well-known models, for SmolLM2's tokenizer with their special tokens added."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer


@dataclass(frozen=True)
class Format:
    """A chat template and the markers that must be found in it."""

    template: str
    special: tuple[str, ...] = ()
    """Special tokens added to the tokenizer."""
    start: str = ""
    """Text of the start tokens; empty for a template that must be refused."""
    end: str = ""

    def tokenizer(self, model: str) -> Any:
        """A model's tokenizer with this template."""
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = self.template
        tokenizer.add_special_tokens({"extra_special_tokens": list(self.special)})
        return tokenizer


def _every(message: str, prompt: str, first: str = "") -> str:
    """A template with the same expression for every message."""
    return (
        f"{first}{{% for m in messages %}}{{{{ {message} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt} }}}}{{% endif %}}"
    )


def _roles(user: str, assistant: str, system: str, prompt: str = "''") -> str:
    """A template with one expression per role."""
    return (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ " + user + " }}{% elif m.role == "
        "'assistant' %}{{ " + assistant + " }}{% else %}{{ " + system + " }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ " + prompt + " }}{% endif %}"
    )


_HEADER = "'<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content"
_CHATML = "'<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n'"
_THINKS = "<think>\\n\\n</think>\\n\\n"
FORMATS = {
    "chatml": Format(_every(_CHATML, "'<|im_start|>assistant\\n'"), (), "<|im_start|>user", "<|im_start|>assistant"),
    # Without a generation prompt, the last message has no end token.
    "chatml_open": Format(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% if add_generation_prompt or not loop.last %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        (),
        "<|im_start|>user",
        "<|im_end|>\n<|im_start|>assistant",
    ),
    "llama3": Format(
        _every(
            _HEADER + " | trim + '<|eot_id|>'",
            "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
            "{{ bos_token }}",
        ),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|start_header_id|>user<|end_header_id|>",
        "<|start_header_id|>assistant<|end_header_id|>",
    ),
    "mistral3": Format(
        _roles("'[INST] ' + m.content + '[/INST]'", "' ' + m.content + eos_token", "raise_exception('no system')"),
        ("[INST]", "[/INST]"),
        "[INST]",
        "[/INST]",
    ),
    # Without a generation prompt, the text ends with EOS.
    "phi3": Format(
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|user|>",
        "<|assistant|>",
    ),
    "gemma": Format(
        _roles(
            "'<start_of_turn>user\\n' + m.content | trim + '<end_of_turn>\\n'",
            "'<start_of_turn>model\\n' + m.content | trim + '<end_of_turn>\\n'",
            "raise_exception('System role not supported')",
            "'<start_of_turn>model\\n'",
        ),
        ("<start_of_turn>", "<end_of_turn>"),
        "<start_of_turn>user\n",
        "<start_of_turn>model\n",
    ),
    # Only the generation prompt opens <think>.
    "deepseek_r1": Format(
        _roles("'<User>' + m.content", "'<Assistant>' + m.content + '<end>'", "m.content", "'<Assistant><think>\\n'"),
        ("<User>", "<Assistant>", "<end>"),
        "<User>",
        "<Assistant>",
    ),
    # Only the last answer and the generation prompt contain <think>.
    "qwen3": Format(
        "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
        "{{ '<|im_start|>assistant\\n" + _THINKS + "' + m.content + '<|im_end|>\\n' }}"
        "{% else %}{{ " + _CHATML + " }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n" + _THINKS + "' }}{% endif %}",
        ("<think>", "</think>"),
        "<|im_start|>user",
        "<|im_start|>assistant",
    ),
    # The templates below must be refused.
    "llama2": Format(
        _roles("'[INST] ' + m.content.strip() + ' [/INST]'", "' ' + m.content.strip() + ' ' + eos_token", "m.content")
    ),
    "vicuna": Format(
        _roles("'USER: ' + m.content + ' '", "'ASSISTANT: ' + m.content + eos_token", "m.content + ' '", "'ASSISTANT:'")
    ),
    "one_role": Format(_every("'<|im_start|>' + m.content + '<|im_end|>'", "'<|im_start|>'")),
    "last_only": Format("{{ '<|im_start|>user\\n' + messages[-1].content + '<|im_end|>' }}"),
    "shouting": Format(_every("'<|im_start|>' + m.role + ': ' + m.content | upper", "'<|im_start|>assistant: '")),
    "raising": Format("{{ raise_exception('no chat model') }}"),
}
