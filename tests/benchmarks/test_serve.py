# SPDX-License-Identifier: Apache-2.0
"""The client's replay of a recorded trace."""

import json
from pathlib import Path

from benchmarks.serve import MAX_PROMPT, write_replay


def test_trace_is_replayed_with_its_lengths_and_arrivals(tmp_path: Path):
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.6805900,14050,0\n"
        "2023-11-16 18:15:51.2224670,879,55\n"
    )
    assert write_replay(trace, tmp_path / "replay.jsonl", 2, 2.0, "llama2-7b") == 2
    first, second = map(json.loads, (tmp_path / "replay.jsonl").read_text().splitlines())
    assert first == {"timestamp": 0.0, "input_length": 374, "output_length": 44, "hash_ids": [0]}
    assert second == {"timestamp": 2.0, "input_length": MAX_PROMPT, "output_length": 1, "hash_ids": [1]}
