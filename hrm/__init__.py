"""The vocabulary and the closed-form model: machines, models, workloads, policies, rooflines, the planner."""

from hrm.batching import micro_batches
from hrm.bound import machine_bound, physical_bound
from hrm.errors import HrmError
from hrm.hardware import Hardware, Rates
from hrm.model import MoEModel
from hrm.pipeline import BatchShape
from hrm.plan import Change, Plan
from hrm.policy import Policy
from hrm.search import evaluate, plan
from hrm.sweep import plan_grid
from hrm.workload import Workload

__all__ = [
    "BatchShape",
    "Change",
    "Hardware",
    "HrmError",
    "MoEModel",
    "Plan",
    "Policy",
    "Rates",
    "Workload",
    "evaluate",
    "machine_bound",
    "micro_batches",
    "physical_bound",
    "plan",
    "plan_grid",
]
