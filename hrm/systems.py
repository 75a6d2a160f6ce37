"""The programs whose schedules are known: what each of them does, whatever the policy."""

from __future__ import annotations

from dataclasses import dataclass

from hrm.errors import UnknownName

__all__ = ["SYSTEMS", "System", "check_system"]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What a system does that is not a choice of its policy."""

    name: str
    title: str
    attention_on_gpu: bool | None
    """Where it computes decode attention; None: its policy says."""
    pads: bool
    """Pads every prompt to the longest."""
    single_batch: bool = False
    """One batch at a time, no micro-batches."""
    streams_dense: bool = False
    """Weights of attention travel with the experts; otherwise they stay on the GPU."""
    pipeline_parallel: bool = False
    """Splits layers, not matrices, over several GPUs."""
    stages_kv: bool = False
    """The host copies KV on its way to the GPU to pinned memory first."""
    pinned_layers: float | None = None
    """Pinned memory for weights on their way, in layers; None: CGOPipe's ring of pages."""
    kv_passes: float = 1.0
    """Times that decode attention on the CPU moves the KV cache through memory."""
    source: str = ""


_ALL = (
    System(
        name="moe-lightning",
        title="MoE-Lightning",
        attention_on_gpu=None,
        pads=False,
        source="MoE-Lightning, arXiv 2411.11217, Algorithm 1",
    ),
    System(
        name="flexgen",
        title="FlexGen",
        attention_on_gpu=True,
        pads=True,
        streams_dense=True,
        pipeline_parallel=True,
        stages_kv=True,
        pinned_layers=2.0,
        source="FlexGen, arXiv 2303.06865, Algorithm 1",
    ),
    System(
        name="flexgen-c",
        title="FlexGen(c)",
        attention_on_gpu=False,
        pads=True,
        streams_dense=True,
        pipeline_parallel=True,
        pinned_layers=2.0,
        # The float16 cache is converted to float32 each time: 2 bytes read, 4 written, 4 read.
        kv_passes=5.0,
        source="FlexGen with --cpu-cache-compute",
    ),
    System(
        name="fastdecode",
        title="FastDecode-like",
        attention_on_gpu=False,
        pads=False,
        pinned_layers=2.0,
        source="MoE-Lightning, Fig. 6 S2",
    ),
    System(
        name="deepspeed-zero",
        title="DeepSpeed ZeRO-Inference",
        attention_on_gpu=True,
        pads=True,
        single_batch=True,
        streams_dense=True,
        pinned_layers=0.0,
        source="DeepSpeed ZeRO-Inference 0.14",
    ),
)
SYSTEMS = {system.name: system for system in _ALL}
"""All systems by the name that ``--system`` takes."""


def check_system(name: str) -> System:
    """The system called `name`; raises `UnknownName` with the nearest one."""
    if name not in SYSTEMS:
        raise UnknownName.of("system", name, tuple(SYSTEMS))
    return SYSTEMS[name]
