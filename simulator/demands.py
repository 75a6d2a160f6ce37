"""What tasks want of resources that lanes share: memory, the link and staging of several stages, cores."""

from __future__ import annotations

import numpy as np

from hrm.hardware import Curve, Rates
from simulator.task import OPS, Lane, Op, Schedule

__all__ = ["demands_of", "op_table"]


def op_table(ops: tuple[Op, ...]) -> np.ndarray:
    """Which task classes are among `ops`, by code."""
    return np.array([op in ops for op in OPS])


_OF_UP = op_table((Op.LOAD_W, Op.LOAD_H, Op.LOAD_X, Op.LOAD_KV, Op.LOAD_FFN, Op.LOAD_E))
_OF_DOWN = op_table((Op.OFFLOAD_QKV, Op.OFFLOAD_KV, Op.STORE_X, Op.STORE_KV, Op.OFFLOAD_FFN, Op.OFFLOAD_ROUTES))
_OF_STAGING = op_table((Op.STAGE_W, Op.STAGE_KV))
_OF_GPU = op_table(tuple(op for op in OPS if op.lane is Lane.GPU))
_OF_CPU = op_table((Op.CPU_ATTN, Op.CPU_FFN))


def demands_of(
    schedule: Schedule, rates: Rates, ids: np.ndarray, seconds: np.ndarray, moved: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, float | Curve]]:
    """Demands of some tasks on shared resources, and what each resource has.

    Parameters
    ----------
    ids : ndarray of int
        Which tasks of the schedule.
    seconds, moved : ndarray
        Of each of them: its duration alone, and its bytes.

    Returns
    -------
    demands : dict
        For each resource, units per second that each task uses while it runs at full speed.
    capacities : dict
        For each resource, units per second that it has, or that it gives by how many are wanted.
    """
    ops = schedule.op[ids]
    copies, staging = _OF_UP[ops] | _OF_DOWN[ops], _OF_STAGING[ops]
    on_cpu = _OF_CPU[ops]
    safe = np.where(seconds > 0, seconds, 1.0)
    dram = moved / safe
    # A copy by a core reads and writes CPU memory; a transfer by a GPU's copy engine only reads it.
    copies_by_core = rates.copy_bandwidth is not None
    dram[copies] *= 2 if copies_by_core else 1
    dram[staging] *= 2
    if rates.fetches_pageable:
        dram[ops == Op.LOAD_E.code] *= 3  # copied to pinned memory, and read there once more
    if not copies_by_core:
        dram[~(copies | staging | on_cpu)] = 0.0
    # One task alone never runs slower than alone, whatever the capacity says.
    demands = {"dram": np.minimum(dram, rates.dram_bandwidth)}
    capacities: dict[str, float | Curve] = {"dram": rates.dram_bandwidth}
    if schedule.num_stages > 1:
        # Stages have lanes of their own, on one host with one link.
        for name, mask, limit in (
            ("link up", _OF_UP[ops], rates.h2d_bandwidth),
            ("link down", _OF_DOWN[ops], rates.d2h_bandwidth),
            ("staging", staging, rates.staging_bandwidth),
        ):
            demands[name] = np.where(mask, np.minimum(moved / safe, limit), 0.0)
            capacities[name] = limit
    if rates.cores is not None:
        cores = np.ones(len(ids))
        for mask, pace in ((_OF_UP[ops], rates.h2d_bandwidth), (_OF_DOWN[ops], rates.d2h_bandwidth)):
            # A core copies all the time but when it is ahead of the pace.
            waits = moved[mask] * max(0.0, 1 / pace - 1 / (rates.copy_bandwidth or pace))
            cores[mask] = np.clip(1.0 - waits / safe[mask], 0.0, 1.0)
        cores[ops == Op.BARRIER.code] = 0.0
        if rates.processors is not None:
            demands["processors"], capacities["processors"] = cores.copy(), rates.processors
        if rates.gpu_on_own_cores:
            cores[_OF_GPU[ops]] = 0.0
        demands["cores"], capacities["cores"] = cores, rates.cores
    return demands, capacities
