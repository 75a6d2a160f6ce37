"""Ways to bring tokens to experts: static, Tutel-like and dynamic gating behind one interface.

``gate = make_gating("static", capacity_factor=0.05)`` makes a gate, ``gate(x, index, weight, experts, E)`` runs it with
any experts, and `gated_ffn` runs it with the executor's weights. `executor.expert_parallel` puts the experts of a gate
on several processes; `executor.gating.layers` puts a gate into a model of transformers.

References
----------
"Towards MoE Deployment", arXiv 2303.06182, sections III and IV.
"""

from executor.gating.base import Experts, Gating, GatingStats
from executor.gating.dynamic import DynamicGating
from executor.gating.ffn import ExpertLoop, gated_ffn
from executor.gating.make import make_gating
from executor.gating.static import StaticGating
from executor.gating.tutel import TutelGating
from hrm.gating import GATINGS

__all__ = [
    "GATINGS",
    "DynamicGating",
    "ExpertLoop",
    "Experts",
    "Gating",
    "GatingStats",
    "StaticGating",
    "TutelGating",
    "gated_ffn",
    "make_gating",
]
