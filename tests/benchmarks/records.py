# SPDX-License-Identifier: Apache-2.0
"""Made-up result records and files."""

import json
from pathlib import Path
from typing import Any


def made_up(workload: str, variant: str, **values: Any) -> dict[str, Any]:
    return {"workload": workload, "variant": variant, **values}


def step(variant: str, batch: int, milliseconds: float) -> dict[str, Any]:
    return made_up("decode", variant, batch=batch, length=274, step_ms=milliseconds)


def saved(path: Path, results: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps({"machine": {"card": "a card"}, "arguments": {"size": "tiny"}, "results": results}))
    return path
