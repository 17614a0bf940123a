"""Draw method.png, two compressed blocks by the paper's equations and folded, and merging.png, an adaptive merge."""

from pathlib import Path

import timm
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from pm_models import AdaptivePlan

_FULL, _SMALL, _SKIPS = "#bcb8b1", "#2a9d8f", "#3d405b"
_PROPOSALS = {0: 1, 2: 1, 4: 7, 6: 7, 8: 9, 10: 5}  # sources and the targets that they propose
_CARRIED_OUT = (0, 2, 6)


def main() -> None:
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    above, below = figure.subplots(2, 1)
    _draw(above, "By the equations: all N tokens between two blocks", full=True)
    _draw(below, "Folded: one small transition T between two states", full=False)
    figure.savefig(Path(__file__).with_name("method.png"), dpi=130)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 1.15))
    _draw_schedule(above)
    _draw_round(below)
    figure.savefig(Path(__file__).with_name("merging.png"), dpi=130)


def _draw_schedule(axes: Axes) -> None:
    plan = AdaptivePlan.for_model(timm.create_model("deit_small_patch16_224"))
    axes.set_title("Tokens of each block of DeiT-S, on 0.62 of its GMACs", fontsize=10, loc="left")
    axes.bar(range(plan.depth), plan.tokens, color=_SMALL, width=0.7)
    for block in (0, *plan.merges):
        axes.annotate(str(plan.tokens[block]), (block, plan.tokens[block]), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(
        range(plan.depth),
        [f"{n}\nafter a merge" if n in plan.merges else str(n) for n in range(plan.depth)],
        fontsize=8,
    )
    axes.set_ylim(0, 1.15 * plan.num_tokens)
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_round(axes: Axes) -> None:
    axes.set_title(
        "One round: each source (light) proposes its cheapest target (dark); the cheapest merge",
        fontsize=10,
        loc="left",
    )
    axes.set_xlim(-0.5, 24)
    axes.set_ylim(-0.6, 2.1)
    axes.set_axis_off()
    for place in range(12):
        axes.add_patch(Rectangle((place, 0), 0.8, 0.8, color=_SKIPS if place % 2 else _SMALL))
    for source, target in _PROPOSALS.items():
        merges = source in _CARRIED_OUT
        axes.add_patch(
            FancyArrowPatch(
                (source + 0.4, 0.85),
                (target + 0.4, 0.85),
                connectionstyle=f"arc3,rad={-0.6 if target > source else 0.6}",
                arrowstyle="->",
                mutation_scale=9,
                color="black" if merges else _FULL,
                linestyle="-" if merges else "--",
            )
        )
    _arrow(axes, 12.2, 14.2, "", height=0.4)
    sizes = {target: 1 + sum(_PROPOSALS[source] == target for source in _CARRIED_OUT) for target in range(1, 12, 2)}
    left = 14.6
    stay = [source for source in range(0, 12, 2) if source not in _CARRIED_OUT]
    for place, size in [(source, 1) for source in stay] + list(sizes.items()):
        axes.add_patch(Rectangle((left, 0), 0.8, 0.8, color=_SKIPS if place % 2 else _SMALL))
        axes.annotate(str(size), (left + 0.4, 0.4), ha="center", va="center", color="white", fontsize=9)
        left += 1
    axes.annotate("size-weighted means, and their sizes", (14.6, -0.45), fontsize=8, color=_SKIPS)


def _draw(axes: Axes, title: str, *, full: bool) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(0, 12)
    axes.set_ylim(-1.35, 1.35)
    axes.set_axis_off()
    _tokens(axes, 0.3, 1.0, _FULL, "x")
    if full:
        for start in (0.3, 5.8):
            _arrow(axes, start + 0.3, start + 1.5, "M")
            _tokens(axes, start + 1.5, 0.6, _SMALL, "y")
            _arrow(axes, start + 1.8, start + 3.6, "Block")
            _tokens(axes, start + 3.6, 0.6, _SMALL, "y")
            _arrow(axes, start + 3.9, start + 5.5, "R")
            _tokens(axes, start + 5.5, 1.0, _FULL, "x")
            axes.add_patch(_curve(start + 0.2, start + 5.6))
            axes.annotate("pruned tokens skip the block", (start + 2.9, -1.28), ha="center", fontsize=8, color=_SKIPS)
        return
    _arrow(axes, 0.6, 2.0, "T")
    for start, after in ((2.0, "T"), (6.6, "head's rows")):
        for shift in (0.0, 2.4):
            _tokens(axes, start + shift, 0.6, _SMALL, "y", middle=0.25)
            _tokens(axes, start + shift, 0.2, _SKIPS, "p", middle=-0.85)
        _arrow(axes, start + 0.3, start + 2.4, "Block", height=0.25)
        _arrow(axes, start + 0.3, start + 2.4, "", height=-0.85)
        _arrow(axes, start + 2.7, start + 4.6, after, height=0.0)
    _tokens(axes, 11.2, 0.12, _FULL, "")


def _tokens(axes: Axes, left: float, half: float, colour: str, name: str, middle: float = 0.0) -> None:
    axes.add_patch(Rectangle((left, middle - half), 0.3, 2 * half, color=colour))
    axes.annotate(name, (left + 0.15, middle), ha="center", va="center", color="white", fontsize=9)


def _arrow(axes: Axes, left: float, right: float, name: str, height: float = 0.0) -> None:
    axes.add_patch(FancyArrowPatch((left, height), (right, height), arrowstyle="->", mutation_scale=10, color="black"))
    axes.annotate(name, ((left + right) / 2, height + 0.1), ha="center", fontsize=9)


def _curve(left: float, right: float) -> FancyArrowPatch:
    return FancyArrowPatch(
        (left, -0.9), (right, -0.9), connectionstyle="arc3,rad=0.06", arrowstyle="->", mutation_scale=10, color=_SKIPS
    )


if __name__ == "__main__":
    main()
