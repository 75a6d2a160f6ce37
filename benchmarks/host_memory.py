"""Peak host memory of a run against what it must hold: checkpoint, KV cache, two layers.

    python benchmarks/host_memory.py CHECKPOINT

Runs a batch with nothing resident on the device, on a machine without a GPU, and reads the process's
peak resident memory. The device's heap lies in the same RAM and is subtracted, as is what Python and its
libraries took before the checkpoint was opened.
"""

from __future__ import annotations

import json
import resource
import sys

from executor.checkpoint import Checkpoint
from executor.generate import generate
from executor.machine import machine_facts
from experiments.records import commit
from hrm import BatchShape, Policy
from hrm.memory import batch_footprint


def peak_rss() -> int:
    """Peak resident bytes of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(path: str) -> None:
    """Measure and print one JSON object."""
    import torch
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401  (libraries before the baseline)

    torch.zeros(8) @ torch.zeros(8)
    before = peak_rss()
    checkpoint = Checkpoint.open(path)
    model = checkpoint.model
    n, mu, prompt, gen = 64, 16, 64, 16
    result = generate(
        checkpoint,
        [[i % model.vocab_size] * prompt for i in range(n)],
        gen_len=gen,
        policy=Policy(batch_size=n, micro_batch_size=mu),
        device="cpu",
        link_bandwidth=None,
    )
    policy = Policy(batch_size=n, micro_batch_size=mu)
    need = batch_footprint(model, BatchShape.uniform(n, mu, prompt, gen), policy)
    host = peak_rss() - before - result.peak_memory["device_bytes"]
    bound = 1.1 * (checkpoint.size_bytes + need.cpu["kv_cache"] + 2 * model.layer_expert_bytes)
    print(
        json.dumps(
            {
                "peak_host_bytes": host,
                "bound_bytes": bound,
                "share_of_bound": host / bound,
                "checkpoint_bytes": checkpoint.size_bytes,
                "kv_bytes": need.cpu["kv_cache"],
                "layer_bytes": model.layer_expert_bytes,
                "counted_host_bytes": result.peak_memory["host_bytes"],
                "device_bytes": result.peak_memory["device_bytes"],
                "machine": machine_facts(),
                "commit": commit(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
