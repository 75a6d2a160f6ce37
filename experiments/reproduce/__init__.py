"""Figures of the papers from this project's own model, by name."""

from __future__ import annotations

from collections.abc import Callable

from experiments.reproduce.flexgen_table import flexgen_opt
from experiments.reproduce.kernel_latency import fig9
from experiments.reproduce.moe_deployment import moe_buffering, moe_gating
from experiments.reproduce.moe_deployment_balancing import moe_balancing
from experiments.reproduce.moe_deployment_memory import moe_memory, moe_waste
from experiments.reproduce.policy_maps import fig10
from experiments.reproduce.result import Reproduced, rows_frame
from experiments.reproduce.roofline_figures import fig4, fig5, measured_roofline
from experiments.reproduce.throughput_tables import fig7, fig8, tab4, tab5

__all__ = ["FIGURES", "Reproduced", "rows_frame"]

FIGURES: dict[str, Callable[..., Reproduced]] = {
    "fig4": fig4,
    "fig5": fig5,
    "fig7": fig7,
    "fig8": fig8,
    "fig9": fig9,
    "fig10": fig10,
    "tab4": tab4,
    "tab5": tab5,
    "flexgen-opt": flexgen_opt,
    "measured-roofline": measured_roofline,
    "moe-waste": moe_waste,
    "moe-gating": moe_gating,
    "moe-memory": moe_memory,
    "moe-buffering": moe_buffering,
    "moe-balancing": moe_balancing,
}
"""Each takes ``progress(done, total)``, which may be None, and returns a `Reproduced`."""
