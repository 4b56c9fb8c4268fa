"""The arena's drawings, by matplotlib: the leaderboard as a PNG, a run's curves as SVG for the page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.arena.board import Row, ranked
from diffalign.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOOD, BAD, UNSURE, CONTROL = "#1b7f5c", "#b3382c", "#6b7280", "#8a8f98"
INK, GRID = "#1f2328", "#d8dce1"
STYLE = {"font.size": 9, "axes.edgecolor": GRID, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
         "text.color": INK, "svg.fonttype": "none", "svg.hashsalt": "arena"}  # fmt: skip


def require_matplotlib() -> None:
    """Raises ImportError, with what to do, where matplotlib is missing; called before hours of training."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingPackageError("the arena draws with matplotlib: pip install 'diffalign[arena]'") from None


def leaderboard(rows: Sequence[Row], preference: str, budget: str, file: Path) -> None:
    """Gain of every entry with its interval, largest on top, as a PNG."""
    plt = _pyplot()
    shown = [row for row in ranked(rows, preference) if not row["failed"]][::-1]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(8.4, 0.9 + 0.27 * len(shown)), layout="constrained")
        axes.axvline(0, color=INK, linewidth=0.8)
        for place, row in enumerate(shown):
            value, low, high = row["rewards"][preference]["gain"]
            colour = CONTROL if row["control"] else GOOD if low > 0 else BAD if high < 0 else UNSURE
            axes.plot([low, high], [place, place], color=colour, linewidth=3, solid_capstyle="butt", alpha=0.45)
            axes.plot(value, place, "D" if row["control"] else "o", color=colour, markersize=5)
        axes.set_yticks(range(len(shown)), [row["name"] + (" (control)" if row["control"] else "") for row in shown])
        axes.set_xlabel(f"dR: mean gain in true reward over the base ({preference}), 95 % interval")
        axes.set_title(budget, loc="left", fontsize=10)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(length=0)
        figure.savefig(file, dpi=130, metadata={"Software": None})
        plt.close(figure)


def curves(row: Row) -> str:
    """Loss (with ln 2 where equal weights give it), rewards and accuracy of a run by step, as one SVG element."""
    plt = _pyplot()
    drawn = row["curves"]
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(9, 2.1), layout="constrained")
        loss, rewards, accuracy = panels
        _line(loss, drawn, "loss", INK)
        if "rewards/chosen" in drawn:
            if abs(drawn["loss"][0] - math.log(2)) < 1e-4:  # of the DPO family: what equal weights give
                loss.axhline(math.log(2), color=BAD, linewidth=0.8, linestyle="--", label="ln 2")
                loss.legend(frameon=False, fontsize=8)
            _line(rewards, drawn, "rewards/chosen", GOOD)
            _line(rewards, drawn, "rewards/rejected", BAD)
            rewards.axhline(0, color=GRID, linewidth=0.8)
            rewards.legend(frameon=False, fontsize=8)
        else:
            rewards.text(0.5, 0.5, "no reference, no rewards", ha="center", va="center", transform=rewards.transAxes)
        if "implicit_acc" in drawn:
            _line(accuracy, drawn, "implicit_acc", INK)
            accuracy.axhline(0.5, color=GRID, linewidth=0.8)
            accuracy.set_ylim(0, 1)
        else:
            _line(accuracy, drawn, "grad_norm", INK)
        for panel, title in zip(panels, ("loss", "implicit rewards", "implicit accuracy" if "implicit_acc" in drawn else
                                         "gradient norm"), strict=True):  # fmt: skip
            panel.set_title(title, loc="left", fontsize=9)
            panel.set_xlabel("optimiser step")
            panel.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _line(axes: Axes, drawn: dict[str, Any], name: str, colour: str) -> None:
    values = [math.nan if value is None else value for value in drawn[name]]
    axes.plot(drawn["step"], values, color=colour, linewidth=1.2, label=name)


def _pyplot() -> Any:
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
