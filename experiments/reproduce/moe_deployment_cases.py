"""The workloads of "Towards MoE Deployment" (arXiv 2303.06182) as our model of expert parallelism runs them.

The paper gives layers, experts, capacity factors, batches and the node, but neither lengths of sequences nor the fabric
between nodes. What is assumed stands here, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

from hrm.gating import GatingName
from hrm.hardware import Hardware
from hrm.model import MoEModel
from simulator.experts.gating_cost import Buffering, Cluster, Program
from simulator.experts.gating_model import DenseProgram, Pass, PassCost, dense_twin, pass_cost

__all__ = [
    "CASES",
    "HOST_SPLIT",
    "MACHINE",
    "SPLIT",
    "Assumptions",
    "Case",
    "cluster",
    "implied_launch",
    "model_of",
    "run",
    "speedup",
    "variants",
]

MACHINE = "v100-node-8x"
SPLIT = "V100 model"
"""Rows of this model; its errors are counted by themselves, not with those of the hierarchical roofline model."""
HOST_SPLIT = "V100, host time from dense decoder"
"""The same with the host's time per kernel that the published latency of a dense decode step asks for."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the paper does not say, or not in numbers."""

    lm_sequence: int = 512
    """Tokens of a sequence of the language model. The power of two at which the masks of fairseq's gate, 15 B for each
    of E·C·S² entries, come nearest to the 6.29 GB of activations at batch 8 (256: 1.5, 512: 6.0, 1,024: 24)."""
    mt_sentence: int = 32
    """Tokens of a sentence: FLORES sentences have about 21 words (arXiv 2106.03193), at 1.5 pieces each; assumed."""
    lm_busiest: float = 0.6 * 8
    """Load of the busiest GPU over the mean under dynamic gating: the Max Load of the language model without balancing
    is above 0.6 (arXiv 2303.06182), taken on 8 GPUs, and as the same multiple of the mean on more."""
    mt_hottest: float = 0.5
    """Share of a batch that one expert of encoder and decoder gets: "almost half of the full batch" (section IV-B). The
    others' load is taken to be even, so that the busiest of D GPUs has 1 + 0.5 (D - 1) times the mean."""
    mt_decoder_active: float = 0.25
    """Experts that a decode step uses: 75 % are inactive at batch 96 (arXiv 2303.06182)."""
    launch_s: float = 10e-6
    """Seconds to issue a kernel."""
    fabric_bandwidth: float = Cluster.fabric_bandwidth
    """Bytes/s of a node to others: four EDR ports of a DGX-1."""
    reserved_bytes: float = 512 * 2**20
    """GPU memory that is no tensor: CUDA context, library workspaces, NCCL's buffers; 300 to 500 MiB for a process on a
    V100 is common."""
    peers_over_nvlink: int | None = None
    """All seven peers, as the paper's 300 GB/s says; 4 in a DGX-1's cube mesh."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One of the paper's three workloads."""

    key: str
    title: str
    model: str
    capacity_factor: float
    batch: dict[str, int] = field(default_factory=dict)
    """Largest batch per GPU that the paper ran, by gating; Tutel's of translation is not in its text and taken to be
    the static one."""


CASES = (
    Case(
        key="lm", title="LM 52B", model="fairseq-moe-52b", capacity_factor=0.05,
        batch={"dense": 8, "static": 8, "tutel": 32, "dynamic": 64},
    ),
    Case(
        key="mt encoder", title="MT 54.5B encoder", model="nllb-moe-54b", capacity_factor=1.0,
        batch={"dense": 48, "static": 48, "tutel": 48, "dynamic": 96},
    ),
    Case(
        key="mt decoder", title="MT 54.5B decoder", model="nllb-moe-54b", capacity_factor=1.0,
        batch={"dense": 48, "static": 48, "tutel": 48, "dynamic": 96},
    ),
)  # fmt: skip


def model_of(case: Case, *, dense: bool = False) -> MoEModel:
    """The case's model in float16, or its dense twin."""
    model = _model(case.model)
    return dense_twin(model) if dense else model


@cache
def _model(name: str) -> MoEModel:
    return MoEModel.from_catalog(name).with_dtype("float16")


def cluster(nodes: int, assume: Assumptions) -> Cluster:
    """So many of the paper's nodes, at rates that were published for single kernels, else the data sheet's."""
    return Cluster.of(
        Hardware.from_catalog(MACHINE), nodes, efficiency="published", fabric_bandwidth=assume.fabric_bandwidth,
        peers_over_nvlink=assume.peers_over_nvlink,
    )  # fmt: skip


def work_of(case: Case, batch: int, assume: Assumptions) -> Pass:
    """The pass that `batch` sequences on each GPU make: whole sequences, or one token of each in the MT decoder."""
    if case.key == "lm":
        return Pass(tokens=batch * assume.lm_sequence, context=assume.lm_sequence)
    if case.key == "mt encoder":
        return Pass(tokens=batch * assume.mt_sentence, context=assume.mt_sentence, stack="encoder")
    return Pass(tokens=batch, context=assume.mt_sentence, source=assume.mt_sentence, cached=True)


def busiest_of(case: Case, devices: int, assume: Assumptions) -> float:
    """Load of the busiest of `devices` GPUs over the mean."""
    if case.key == "lm":
        return assume.lm_busiest
    return 1 + assume.mt_hottest * (devices - 1)


def run(
    case: Case,
    gating: str,
    *,
    nodes: int = 1,
    batch: int | None = None,
    assume: Assumptions | None = None,
    buffering: Buffering | None = None,
) -> PassCost:
    """One pass of a case.

    Parameters
    ----------
    gating : {"dense", "static", "tutel", "dynamic"}
    batch : int, optional
        Sequences per GPU; by default the paper's largest.
    """
    assume = assume or Assumptions()
    dense, machine = gating == "dense", cluster(nodes, assume)
    kind: GatingName = "dynamic" if dense else gating  # type: ignore[assignment]
    return pass_cost(
        model_of(case, dense=dense),
        machine,
        work_of(case, batch or case.batch[gating], assume),
        kind,
        capacity_factor=case.capacity_factor,
        busiest=busiest_of(case, machine.devices, assume),
        active_share=assume.mt_decoder_active if case.key == "mt decoder" else 1.0,
        program=Program(launch_s=assume.launch_s),
        dense_program=DenseProgram(launch_s=assume.launch_s),
        buffering=buffering,
    )


def speedup(
    case: Case,
    over: str,
    *,
    nodes: int = 1,
    assume: Assumptions | None = None,
    buffering: Buffering | None = None,
) -> float:
    """Sequences per second of dynamic gating over those of another one, each at its largest batch."""
    mine = run(case, "dynamic", nodes=nodes, assume=assume, buffering=buffering)
    other = run(case, over, nodes=nodes, assume=assume)
    return (case.batch["dynamic"] / mine.total) / (case.batch[over] / other.total)


def implied_launch(dense_step: float, assume: Assumptions) -> float:
    """Seconds per kernel if launches alone made a dense decode step of `dense_step` seconds, but for its LM head."""
    decoder, program = CASES[2], DenseProgram()
    kernels = model_of(decoder).num_layers * (2 * program.attention_kernels + program.ffn_kernels)
    return (dense_step - run(decoder, "dense", assume=assume).seconds["head"]) / kernels


def variants(base: Assumptions, implied_launch: float) -> dict[str, Assumptions]:
    """The assumptions that matter most, changed one at a time."""
    return {
        "as assumed": base,
        f"{1e6 * implied_launch:.0f} µs per kernel": replace(base, launch_s=implied_launch),
        "even load": replace(base, lm_busiest=1.0, mt_hottest=0.0),
        "one EDR port": replace(base, fabric_bandwidth=base.fabric_bandwidth / 4),
        "one EDR port, even load": replace(
            base, fabric_bandwidth=base.fabric_bandwidth / 4, lm_busiest=1.0, mt_hottest=0.0
        ),
        "DGX-1 cube mesh": replace(base, peers_over_nvlink=4),
    }
