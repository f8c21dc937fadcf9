# SPDX-License-Identifier: Apache-2.0
"""Draw docs/study.png: dev loss of the study's six methods, median and range over seeds. Needs matplotlib.

python -m tools.study_plot
"""

import statistics
from pathlib import Path

from tools.figures import METHODS, study_records

FILE = Path(__file__).resolve().parents[1] / "docs/study.png"
COLOURS = {"(IA)3": "#8a8f98", "PARADE": "#2563eb", "LoRA": "#ea580c"}
STEPS = {"400 steps": "o", "1600 steps": "D"}


def main() -> None:
    """The command."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.4, 3.2), layout="constrained")
    for row, method in enumerate(reversed(METHODS)):
        colour = next((one for name, one in COLOURS.items() if method.name.startswith(name)), COLOURS["PARADE"])
        for place, marker in zip((method.short, method.long), STEPS.values(), strict=True):
            losses = [record["dev_loss"] for record in study_records(place)]
            if losses:
                axes.plot([min(losses), max(losses)], [row, row], color=colour, linewidth=2, solid_capstyle="round")
                axes.plot(statistics.median(losses), row, marker, color=colour, markersize=7)
    for name, marker in STEPS.items():
        axes.plot([], [], marker, color="#1f2328", label=name)
    axes.set_yticks(range(len(METHODS)), [method.name for method in reversed(METHODS)], fontsize=9)
    axes.tick_params(axis="x", labelsize=9)
    axes.margins(x=0.06, y=0.12)
    axes.set_xlabel("dev loss on five tasks together; median and range over three seeds", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(FILE, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
