"""Commands that list the catalog: models, hardware, workloads."""

from __future__ import annotations

import click

from experiments.options import json_option
from experiments.output import emit, table
from hrm.catalog import load_hardware, load_model, load_workload, names
from hrm.memory import kv_cache_bytes
from hrm.units import format_bandwidth, format_bytes, format_flops

__all__ = ["hardware_command", "models_command", "workloads_command"]


@click.command("models")
@json_option
def models_command(as_json: bool) -> None:
    """List the models of the catalog."""
    models = [load_model(name) for name in names("models")]
    keys = (
        "name", "architecture", "num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads",
        "head_dim", "vocab_size", "num_experts", "top_k", "max_positions", "dtype", "num_parameters",
        "active_parameters", "weight_bytes",
    )  # fmt: skip
    rows = [
        [
            m.name,
            f"{m.num_parameters / 1e9:.3g}B",
            f"{m.active_parameters / 1e9:.3g}B",
            f"{len(m.encoder_order)}+{m.num_layers}" if m.encoder_order else m.num_layers,
            f"{m.num_experts} top-{m.top_k}" if m.num_experts > 1 else "dense",
            m.hidden_size,
            m.intermediate_size,
            m.dtype,
            format_bytes(m.weight_bytes),
            format_bytes(kv_cache_bytes(m, 1, 1, 0)),
        ]
        for m in models
    ]
    headers = [
        "model",
        "parameters",
        "active",
        "layers",
        "experts",
        "hidden",
        "intermediate",
        "type",
        "size",
        "KV per token",
    ]
    emit(
        {
            "models": [
                {key: getattr(m, key) for key in keys} | {"kv_bytes_per_token": kv_cache_bytes(m, 1, 1, 0)}
                for m in models
            ]
        },
        lambda: table(headers, rows),
        as_json=as_json,
    )


@click.command("hardware")
@json_option
def hardware_command(as_json: bool) -> None:
    """List the machines of the catalog."""
    machines = [load_hardware(name) for name in names("hardware")]
    rows = [
        [
            m.name,
            f"{m.num_gpus} x {m.gpu.processor}" if m.num_gpus > 1 else m.gpu.processor,
            format_bytes(float(m.gpu.capacity)),
            format_bandwidth(float(m.gpu.bandwidth)),
            format_flops(float(m.gpu.peak_flops)),
            format_bytes(float(m.cpu.capacity)),
            format_bandwidth(float(m.cpu.bandwidth)),
            format_bandwidth(float(m.h2d.bandwidth)),
            " ".join(m.efficiencies),
        ]
        for m in machines
    ]
    headers = ["machine", "GPU", "GPU memory", "its bandwidth", "peak", "CPU memory", "its bandwidth", "link"]
    emit(
        {"hardware": [m.to_dict() | {"efficiencies": m.efficiencies} for m in machines]},
        lambda: table([*headers, "efficiencies"], rows),
        as_json=as_json,
    )


@click.command("workloads")
@json_option
def workloads_command(as_json: bool) -> None:
    """List the workloads of the catalog."""
    loads = [load_workload(name) for name in names("workloads")]
    keys = ("name", "prompt_avg", "prompt_max", "gen_len", "padded", "source")
    headers = ["workload", "mean prompt", "longest", "gen_len", "known lengths"]
    emit(
        {"workloads": [{key: getattr(w, key) for key in keys} | {"prompt_lens": w.prompt_lens} for w in loads]},
        lambda: table(
            headers,
            [[w.name, f"{w.prompt_avg:g}", w.prompt_max, w.gen_len, len(w.prompt_lens)] for w in loads],
        ),
        as_json=as_json,
    )
