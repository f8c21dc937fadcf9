# SPDX-License-Identifier: Apache-2.0
"""Loads base models and tokenizers from a folder or the Hub. Every error names --model or --template."""

import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = ["check_model", "check_template", "load_model", "load_model_config", "load_tokenizer", "unusable"]

# A model's config in Transformers' format, and in Mistral's, which vLLM also reads.
CONFIG_FILES = ("config.json", "params.json")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
REMEDY = "give the folder of a Hugging Face model or its name on the Hub"


def check_model(model: str) -> None:
    """Refuse a value that cannot be a base model, before a library tries to load it.

    Raises:
        ValueError: names --model, its value and the remedy.
    """
    path = Path(model)
    if path.is_dir() and not any((path / name).is_file() for name in CONFIG_FILES):
        raise ValueError(f"--model {model}: the folder holds no config.json; {REMEDY}")
    # vLLM also accepts URLs such as s3://...
    if not path.exists() and not HUB_NAME.fullmatch(model) and "://" not in model:
        raise ValueError(f"--model {model}: no such folder; {REMEDY}")


def load_model_config(model: str) -> Any:
    """Load a base model's config.

    Raises:
        ValueError: names --model, its value, the reason and the remedy.
    """
    from transformers import AutoConfig

    check_model(model)
    try:
        return AutoConfig.from_pretrained(model)
    # KeyError and TypeError: config.json is not the config of a model.
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unusable(model, error) from error


def load_tokenizer(model: str, template: str) -> Any:
    """Load a base model's tokenizer, check that it can render `template`, and make sure that it has a pad token.

    Raises:
        ValueError: names --model or --template, its value, the reason and the remedy.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unusable(model, error, "no usable tokenizer: ") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"--model {model}: the tokenizer has no end-of-sequence token, which must end every answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_template(tokenizer, template)
    return tokenizer


def check_template(tokenizer: Any, template: str) -> None:
    """Refuse a template that the tokenizer cannot render.

    Raises:
        ValueError: names --template and the remedy.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError("--template is chat, but the model's tokenizer has no chat template; give plain or llama2")


def load_model(model: str, **options: Any) -> Any:
    """Load a base model; `options` are those of `from_pretrained`.

    Raises:
        ValueError: names --model, its value, the reason and the remedy.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(model, **options)
    except (OSError, SafetensorError) as error:
        raise unusable(model, error, "no usable weights: ") from error
    # An option is not supported by the model or needs another package; the message names it.
    except (ImportError, ValueError) as error:
        raise ValueError(f"--model {model}: cannot be loaded: {error}") from error


def unusable(model: str, error: Exception, what: str = "") -> ValueError:
    """The error for a model that a library cannot use; `what` names the part, for example its weights."""
    where = "" if Path(model).exists() else "no such folder, and not available from the Hub: "
    # The first line names the problem; later lines only link to documentation.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(f"--model {model}: {what}{where}{lines[0].rstrip(' .:')}; {REMEDY}")
