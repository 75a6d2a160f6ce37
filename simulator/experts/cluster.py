"""GPUs that share the experts of every layer: nodes, and the ways that bytes take between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hrm.errors import InvalidValue
from hrm.hardware import Hardware
from hrm.rates import Rates

__all__ = ["Cluster"]

_EDR_PORT = 12.5e9
_DGX1_PORTS = 4


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes whose GPUs share the experts of every MoE layer."""

    rates: Rates
    gpus_per_node: int
    gpu_bytes: float
    """Memory of one GPU."""
    nodes: int = 1
    fabric_bandwidth: float = _DGX1_PORTS * _EDR_PORT
    """Bytes/s that a node sends to other nodes. Default: four ports of EDR InfiniBand at 100 Gb/s, those of a DGX-1
    (NVIDIA DGX-1 With Tesla V100 System Architecture, WP-08437); the paper's fabric is not known to us."""
    host_bandwidth: float = 12e9
    """Bytes/s from host memory to each GPU; 12 GB/s is what arXiv 2303.06182 observed over PCIe 3.0 x16."""
    peers_over_nvlink: int | None = None
    """Peers in its node that a GPU reaches over links of its own; the others share the way over the host. None: all.
    In a DGX-1's hybrid cube mesh it is 4 of 7."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "nodes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidValue(f"{name!r} must be an integer >= 1: {value!r}")
        for name in ("gpu_bytes", "fabric_bandwidth", "host_bandwidth"):
            if not getattr(self, name) > 0:
                raise InvalidValue(f"{name!r} must be > 0: {getattr(self, name)}")
        if self.gpus_per_node > 1 and self.rates.peer_bandwidth is None:
            raise InvalidValue("a node of several GPUs needs rates with a 'peer_bandwidth'.")
        if self.peers_over_nvlink is not None and not 0 <= self.peers_over_nvlink < self.gpus_per_node:
            raise InvalidValue(
                f"'peers_over_nvlink' must be between 0 and {self.gpus_per_node - 1}: {self.peers_over_nvlink}"
            )

    @classmethod
    def of(
        cls,
        hardware: Hardware,
        nodes: int = 1,
        *,
        efficiency: str | None = None,
        fabric_bandwidth: float | None = None,
        host_bandwidth: float | None = None,
        peers_over_nvlink: int | None = None,
    ) -> Cluster:
        """Several of a machine.

        Parameters
        ----------
        hardware : Hardware
            One node.
        nodes : int
        efficiency : str, optional
            Rate set, by default the machine's best.
        fabric_bandwidth : float, optional
            Bytes/s of a node to the others.
        host_bandwidth : float, optional
            Bytes/s from host memory to one GPU; by default the paper's 12 GB/s.
        """
        rates = hardware.rates(efficiency)
        return cls(
            rates=rates,
            gpus_per_node=hardware.num_gpus,
            gpu_bytes=float(rates.gpu_capacity or hardware.gpu.capacity),
            nodes=nodes,
            fabric_bandwidth=cls.fabric_bandwidth if fabric_bandwidth is None else fabric_bandwidth,
            host_bandwidth=cls.host_bandwidth if host_bandwidth is None else host_bandwidth,
            peers_over_nvlink=peers_over_nvlink,
        )

    @property
    def devices(self) -> int:
        """D: GPUs that share the experts."""
        return self.gpus_per_node * self.nodes

    def all_to_all(self, sent: float, *, busiest: float = 1.0) -> float:
        """Seconds in which every GPU sends `sent` bytes, spread over all GPUs, itself included.

        Ways inside a node and between nodes are used at once; the slower one counts.

        Parameters
        ----------
        busiest : float
            What the busiest GPU receives, in multiples of the mean.
        """
        devices, local = self.devices, self.gpus_per_node
        if devices == 1:
            return 0.0
        each = sent / devices  # to one GPU, on average
        linked = local - 1 if self.peers_over_nvlink is None else self.peers_over_nvlink
        ways = [0.0]
        if linked:
            ways.append(busiest * each * linked / (self.rates.peer_bandwidth or math.inf))
        if linked < local - 1:
            ways.append(busiest * each * (local - 1 - linked) / self.host_bandwidth)
        if self.nodes > 1:
            # The node's ports carry what its busiest GPU gets and what the others get.
            others = (devices - busiest) / (devices - 1)
            node = (busiest + (local - 1) * others) / local
            ways.append(node * each * (devices - local) * local / self.fabric_bandwidth)
        return max(ways)
