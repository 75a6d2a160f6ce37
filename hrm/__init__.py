"""The vocabulary and the closed-form model: machines, models, workloads, policies, rooflines, the planner."""

from hrm.batching import micro_batches
from hrm.errors import HrmError
from hrm.hardware import Hardware, Rates
from hrm.model import MoEModel
from hrm.pipeline import BatchShape
from hrm.policy import Policy
from hrm.search import Plan, evaluate, plan
from hrm.workload import Workload

__all__ = [
    "BatchShape",
    "Hardware",
    "HrmError",
    "MoEModel",
    "Plan",
    "Policy",
    "Rates",
    "Workload",
    "evaluate",
    "micro_batches",
    "plan",
]
