# SPDX-License-Identifier: Apache-2.0
"""Draw attention maps with and without an adapter, as in the paper's Figures 3-6, and the adapter's vectors by prompt.

    python -m vllm_parade.inspect --model MODEL --adapter adapters/sst2 --prompts prompts.txt --output pictures

The command prints how much the vectors depend on the prompt: their spread over the prompts, relative to their distance
from one.

A file of prompts that ends in .jsonl has conversations, {"messages": [{"role": ..., "content": ...}, ...]}, each read
up to its last answer. Under an adapter that marks its instructions, every turn has an attention map of its instruction,
and the vectors are those of the last turn.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_parade.adapter import AdapterConfig, BaseModelShape, load_adapter
from vllm_parade.adapter.turns import Turn, TurnMarkers, find_turns
from vllm_parade.train.command import check_output_folder, naming, one_line_errors, require_modules
from vllm_parade.train.data import encode_prompt, pad_left
from vllm_parade.train.pretrained import load_model, load_model_config, load_tokenizer
from vllm_parade.train.readers import as_example, read_text
from vllm_parade.train.templates import TEMPLATES

# As in the paper's figures.
MAX_TOKENS = 64
SHOWN_ENTRIES = 512


def vectors(model: Any, tokenizer: Any, prompts: Sequence[list[int]], batch_size: int = 64) -> dict[int, Tensor]:
    """Vectors of each prompt's last turn by layer, each [prompts, d_out] float32 on the CPU."""
    from vllm_parade.tuner.instruction import ARGUMENT

    parts: dict[int, list[Tensor]] = {}
    for start in range(0, len(prompts), batch_size):
        batch = pad_left(prompts[start : start + batch_size], tokenizer.pad_token_id, model.device)
        with torch.no_grad():
            cache = model(**batch, use_cache=True, logits_to_keep=1).past_key_values
        for layer, part in getattr(cache, ARGUMENT).last_vectors().items():
            parts.setdefault(layer, []).append(part.float().cpu())
    return {layer: torch.cat(found) for layer, found in parts.items()}


def prompt_dependence(found: dict[int, Tensor]) -> dict[str, float]:
    """How much the vectors of all layers differ between prompts.

    Returns:
        spread: root mean square, over entries, of the standard deviation over prompts
        distance: root mean square distance of the mean vector from one
        ratio: spread / distance; 0 for a constant vector, like that of (IA)3
    """
    every = torch.cat(list(found.values()), dim=1)
    spread = every.std(dim=0, correction=0).square().mean().sqrt().item()
    distance = (every.mean(dim=0) - 1).square().mean().sqrt().item()
    return {"spread": spread, "distance": distance, "ratio": spread / distance if distance else 0.0}


def attention_maps(model: Any, ids: list[int], layers: Sequence[int], turn: Turn | None = None) -> dict[int, Tensor]:
    """Attention by layer over the prompt's first `MAX_TOKENS` tokens, each [heads, tokens, tokens].

    Args:
        turn: over the first tokens of its instruction, within the whole prompt, instead
    """
    tokens = torch.tensor([ids[:MAX_TOKENS] if turn is None else ids[: turn.end]], device=model.device)
    shown = slice(0, None) if turn is None else slice(turn.start, min(turn.end, turn.start + MAX_TOKENS))
    with torch.no_grad():
        attentions = model(input_ids=tokens, output_attentions=True).attentions
    return {layer: attentions[layer][0, :, shown, shown].float().cpu() for layer in layers}


def draw_attention(
    model: Any,
    ids: list[int],
    layers: Sequence[int],
    heads: Sequence[int],
    folder: Path,
    markers: TurnMarkers | None = None,
) -> list[Path]:
    """Draw one picture per layer: base model in the first row, adapter in the second, one column per head.

    With `markers`, there is one per layer and turn, which shows the turn's instruction.
    """
    parts: list[tuple[Turn | None, str, str]] = [(None, "", "")]
    if markers is not None:
        turns = find_turns(ids, markers)
        parts = [
            (
                turn,
                f"_turn{number}",
                f", turn {number} of {len(turns)}, instruction from token {turn.start} to {turn.end}",
            )
            for number, turn in enumerate(turns, 1)
        ]
    paths = []
    for turn, suffix, label in parts:
        adapted = attention_maps(model, ids, layers, turn)
        with model.disable_adapter():
            plain = attention_maps(model, ids, layers, turn)
        for layer in layers:
            paths.append(folder / f"attention_layer{layer}{suffix}.png")
            _draw_layer(plain[layer], adapted[layer], heads, f"layer {layer}{label}", paths[-1])
    return paths


def _draw_layer(plain: Tensor, adapted: Tensor, heads: Sequence[int], title: str, file: Path) -> None:
    from matplotlib import pyplot

    size = (2.6 * len(heads) + 0.6, 5.4)
    figure, axes = pyplot.subplots(2, len(heads), figsize=size, layout="constrained", squeeze=False)
    for row, (label, maps) in enumerate((("base model", plain), ("with adapter", adapted))):
        for column, head in enumerate(heads):
            axes[row, column].imshow(maps[head].sqrt(), cmap="magma", vmin=0, vmax=1)
            axes[row, column].set_title(f"{label}, head {head}", fontsize=8)
            axes[row, column].tick_params(labelsize=6)
    figure.suptitle(f"{title}: square root of attention; keys on the horizontal axis", fontsize=9)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def draw_vectors(found: dict[int, Tensor], layers: Sequence[int], folder: Path) -> Path:
    """Draw one panel per layer: one row per prompt, one column per entry, for the entries farthest from one."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(layers), 1, figsize=(9, 1.2 + 1.6 * len(layers)), layout="constrained", squeeze=False
    )
    for axis, layer in zip(axes[:, 0], layers, strict=True):
        rows = found[layer]
        order = (rows.mean(dim=0) - 1).abs().argsort(descending=True)[:SHOWN_ENTRIES].sort().values
        limit = max((rows - 1).abs().max().item(), 1e-6)
        image = axis.imshow(rows[:, order], aspect="auto", cmap="RdBu", vmin=1 - limit, vmax=1 + limit)
        axis.set_ylabel(f"layer {layer}", fontsize=8)
        axis.tick_params(labelsize=6)
        figure.colorbar(image, ax=axis)
    axes[-1, 0].set_xlabel(f"the {SHOWN_ENTRIES} entries that differ most from one; one row per prompt", fontsize=8)
    path = folder / "vectors.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def parser() -> argparse.ArgumentParser:
    """The argument parser."""
    top = argparse.ArgumentParser(
        prog="python -m vllm_parade.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--model", required=True, help="base model, a folder or a name on the Hub")
    top.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    top.add_argument(
        "--prompts",
        required=True,
        type=Path,
        help="text file with one prompt per line, or a .jsonl file of conversations; attention maps use the first",
    )
    top.add_argument("--layers", type=int, nargs="+", help="layers to draw; default: first, middle and last")
    top.add_argument("--heads", type=int, nargs="+", default=[0, 1, 2, 3], help="heads to draw; default: first four")
    top.add_argument("--template", default="chat", choices=sorted(TEMPLATES), help="the template used in training")
    top.add_argument("--output", required=True, type=Path, help="folder for the pictures")
    return top


def read_prompts(file: Path) -> list[Any]:
    """Prompts of a text file, or conversations of a .jsonl file, each up to its last question.

    Raises:
        ValueError: names the flag, the file and the line.
    """
    with naming("--prompts"):
        text = read_text(file)
        if not text.strip():
            raise ValueError(f"{file}: has no prompt; expected one per line")
        if file.suffix != ".jsonl":
            return [line for line in text.splitlines() if line.strip()]
        lines = enumerate(text.split("\n"), 1)
        return [as_example(line, f"{file}, line {number}").prompt for number, line in lines if line.strip()]


def checked_layers(args: argparse.Namespace) -> tuple[list[int], AdapterConfig]:
    """Check model, adapter, --layers and --heads; return the layers to draw and the adapter's config.

    Raises:
        ValueError: names the flag, its value and the remedy.
    """
    config = load_model_config(args.model)
    with naming("--adapter"):
        adapter = load_adapter(args.adapter, BaseModelShape.from_hf_config(config))
    adapted = sorted(adapter.generators)
    layers = args.layers or sorted({adapted[0], adapted[len(adapted) // 2], adapted[-1]})
    if missing := [layer for layer in layers if layer not in adapted]:
        raise ValueError(f"--layers: layer {missing[0]} has no vectors; expected some of {adapted}")
    heads = config.num_attention_heads
    if missing := [head for head in args.heads if not 0 <= head < heads]:
        raise ValueError(f"--heads: the base model has no head {missing[0]}; expected some of 0 to {heads - 1}")
    return list(layers), adapter.config


def draw(args: argparse.Namespace) -> None:
    """Draw the pictures and print how much the vectors depend on the prompt.

    Raises:
        ValueError: names the flag, its value and the remedy.
    """
    require_modules("matplotlib", "peft", "transformers")
    import matplotlib
    from peft import PeftModel

    # Registers PARADE with PEFT.
    import vllm_parade.tuner  # noqa: F401

    matplotlib.use("Agg")
    lines = read_prompts(args.prompts)
    layers, config = checked_layers(args)
    tokenizer = load_tokenizer(args.model, args.template)
    with naming(f"--prompts {args.prompts}:"):
        prompts = [encode_prompt(tokenizer, line, args.template) for line in lines]
    check_output_folder("--output", args.output)
    base = load_model(args.model, dtype=torch.float32, attn_implementation="eager")
    model: Any = PeftModel.from_pretrained(base, args.adapter).eval()
    found = vectors(model, tokenizer, prompts)
    for path in (
        *draw_attention(model, prompts[0], layers, args.heads, args.output, config.turn_markers),
        draw_vectors(found, layers, args.output),
    ):
        print(path)
    figures = prompt_dependence(found)
    print("vectors over prompts: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def main() -> None:
    """Run the command."""
    args = parser().parse_args()
    with one_line_errors("inspect"):
        draw(args)


if __name__ == "__main__":
    main()
