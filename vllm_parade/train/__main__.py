# SPDX-License-Identifier: Apache-2.0
"""Train a PARADE adapter (or LoRA or (IA)3), and save it in PEFT's format, which the server reads.

    python -m vllm_parade.train --model MODEL --task sst2 --data FOLDER --output_dir adapters/sst2
    python -m vllm_parade.train --model MODEL --train_file pairs.jsonl --output_dir adapters/mine
    python -m vllm_parade.train settings.yaml

A YAML file holds the same settings by flag name. Flags after it override them. For several GPUs, use
`accelerate launch -m vllm_parade.train ...` (DDP or FSDP 2, as accelerate is configured) or
`torchrun --nproc_per_node 2 -m vllm_parade.train ...`.
"""

import json
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_parade.train.command import one_line_errors, require_modules
from vllm_parade.train.readers import read_text

if TYPE_CHECKING:
    from vllm_parade.train.arguments import AdapterArguments, PromptTrainingArguments


def parse(arguments: list[str]) -> "tuple[AdapterArguments, PromptTrainingArguments]":
    """Parse the command line, whose first argument may be a YAML file.

    Raises:
        ValueError: names the flag, its value and the remedy.
    """
    from transformers import HfArgumentParser

    from vllm_parade.train.arguments import AdapterArguments, PromptTrainingArguments

    parser = HfArgumentParser(
        (AdapterArguments, PromptTrainingArguments),
        prog="python -m vllm_parade.train",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = [*_flags(Path(arguments[0])), *arguments[1:]]
    options, settings = parser.parse_args_into_dataclasses(arguments)
    return options, settings


def _flags(file: Path) -> Iterator[str]:
    """Settings of a YAML file as flags, so that later flags override them."""
    import yaml

    try:
        values = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: invalid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; expected a mapping from setting names to values")
    for name, value in values.items():
        yield f"--{name}"
        for entry in value if isinstance(value, list) else [value]:
            yield json.dumps(entry) if isinstance(entry, dict) else str(entry)


def main() -> None:
    """Run the command."""
    with one_line_errors("train"):
        require_modules("accelerate", "aenum", "peft", "transformers", "yaml")
        options, settings = parse(sys.argv[1:])
        from vllm_parade.train.trainer import train

        train(options, settings)


if __name__ == "__main__":
    main()
