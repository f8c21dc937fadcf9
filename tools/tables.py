# SPDX-License-Identifier: Apache-2.0
"""Generates the pages' tables from the code: flags, metrics, arguments, keys of an adapter's config."""

import argparse
import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_parade"
# PEFT's own keys of adapter_config.json. They share one row.
PEFT_FIELDS = ("base_model_name_or_path", "task_type", "revision", "inference_mode")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def field_texts(file: str, class_name: str) -> dict[str, str]:
    """The docstrings below a class's fields, by field name."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    (body,) = (node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == class_name)
    texts = {}
    for before, after in zip(body, body[1:], strict=False):
        match before, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = text
    return texts


def shown(value: Any) -> str:
    """A default for a table. An empty default gives an empty cell, because the meaning column explains it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None or value in ((), "") else f"`{value}`"


def _default(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "required" if field.default_factory is MISSING else ""
    return shown(field.default)


def flags() -> str:
    """Flags of the ParadeConfig group of `vllm serve`, with their help texts."""
    from vllm_parade.config import ServingConfig
    from vllm_parade.frontend.arguments import add_flags

    parser = add_flags(argparse.ArgumentParser, None, (), {})
    (group,) = (group for group in parser._action_groups if group.title == "ParadeConfig")
    known = {field.name: field for field in fields(ServingConfig)}
    rows = [
        [f"`{action.option_strings[0]}`", _default(known[action.dest]), (action.help or "").split(" (default:")[0]]
        for action in group._group_actions
    ]
    return table(["flag", "default", "meaning"], rows)


def metrics() -> str:
    """PARADE's counters in /metrics of a server."""
    from vllm_parade.frontend.metrics import DOCUMENTATION
    from vllm_parade.stats import PREFIX

    rows = [[f"`vllm:{PREFIX}{name}_total`", text] for name, text in DOCUMENTATION.items()]
    return table(["counter", "counts"], rows)


def ray_metrics() -> str:
    """Counters and gauges of the Ray application, with their names in Ray's exporter."""
    return table(["metric", "labels", "meaning"], list(_ray_metrics()))


def _ray_metrics() -> Iterator[list[str]]:
    for file in sorted((PACKAGE / "cluster").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Name(id="Counter" | "Gauge" as kind),
                    args=[ast.Constant(value=str(name)), ast.Constant(value=str(text))],
                    keywords=keywords,
                ):
                    labels = [ast.literal_eval(key.value) for key in keywords if key.arg == "tag_keys"]
                    shown = ", ".join(f"`{label}`" for labels in labels for label in labels)
                    yield [f"`ray_{name}{'_total' if kind == 'Counter' else ''}`", shown, text]


def ray_arguments() -> str:
    """Arguments of the Ray application."""
    from vllm_parade.cluster.app import Arguments

    texts, rows = field_texts("cluster/app.py", "Arguments"), []
    for name, field in Arguments.model_fields.items():
        default = "required" if field.is_required() else "" if field.default_factory else shown(field.default)
        rows.append([f"`{name}`", default, texts[name]])
    return table(["argument", "default", "meaning"], rows)


def adapter_keys() -> str:
    """Keys of adapter_config.json."""
    from vllm_parade.adapter.config import PEFT_TYPE, AdapterConfig

    texts = field_texts("adapter/config.py", "AdapterConfig")
    rows = [["`peft_type`", "required", f'`"{PEFT_TYPE}"`.']]
    for field in fields(AdapterConfig):
        if field.name in PEFT_FIELDS:
            continue
        rows.append([f"`{field.name}`", f"`{json.dumps(field.default)}`", texts[field.name]])
    rows.append([", ".join(f"`{name}`" for name in PEFT_FIELDS), "", "As in PEFT."])
    return table(["key", "default", "meaning"], rows)


def adapter_tensors() -> str:
    """Tensors of a layer's generator."""
    from vllm_parade.adapter.validation import MEANINGS

    present = {"pooler.query": "attentional_capsule", "pooler.weight": "attentional_capsule, dynamic_routing"}
    rows = [[f"`{name}`", f"`{shape}`", present.get(name, "all")] for name, shape in MEANINGS.items()]
    return table(["tensor", "shape", "poolers"], rows)


def trainer_flags() -> str:
    """Flags that the trainer adds to those of Transformers."""
    from vllm_parade.train.arguments import AdapterArguments

    rows = [[f"`--{field.name}`", _default(field), field.metadata["help"]] for field in fields(AdapterArguments)]
    return table(["flag", "default", "meaning"], rows)


def trainer_defaults() -> str:
    """Training arguments of Transformers that have another default here."""
    from vllm_parade.train.arguments import PromptTrainingArguments

    own = PromptTrainingArguments.__annotations__
    mine = [field for field in fields(PromptTrainingArguments) if field.name in own]
    rows = [[f"`--{field.name}`", _default(field), field.metadata["help"]] for field in mine]
    return table(["flag", "default", "meaning"], rows)
