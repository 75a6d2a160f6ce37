"""Commands that measure the machine or write weights: probe, make-checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from experiments.options import OutFile, executor_needed, json_option
from experiments.output import emit, progress_bar, table
from experiments.resizing import resized
from hrm import Hardware, MoEModel
from hrm.catalog import load_model, model_config
from hrm.units import format_bandwidth, format_bytes, format_flops, format_seconds

__all__ = ["DEVICE", "make_checkpoint_command", "measure", "probe_command"]

DEVICE = click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Default: CUDA where there is one.")


def measure(model: MoEModel, device: str | None) -> Hardware:
    """Probe this machine, with a progress bar."""
    from executor.machine import pick_device
    from executor.probe import probe

    target = pick_device(device)
    # How many measurements it takes depends on how quiet the machine is, so there is no total.
    with progress_bar(None, "probe", "", bar_format="{desc} [{elapsed}]") as bar:

        def note(what: str) -> None:
            bar.set_description_str(f"probe: {what}")

        return probe(model, device=target, progress=note)


@click.command("probe")
@click.option("--model", default="mixtral-demo", show_default=True, metavar="M", help="Shapes to measure at.")
@DEVICE
@click.option("--out", type=OutFile((".json",)), help="Write the hardware file here.")
@json_option
def probe_command(model: str, device: str | None, out: Path | None, as_json: bool) -> None:
    """Measure what this machine attains, alone and under contention."""
    shapes = load_model(model)
    with executor_needed():
        machine = measure(shapes, device)
    if out:
        machine.save(out)

    def text() -> str:
        rates = machine.rates("measured")
        rows = [
            ["dense projections, peak", format_flops(rates.gpu_gemm.peak)],
            ["expert FFN, peak", format_flops(rates.gpu_experts.peak)],
            ["prefill attention, peak", format_flops(rates.gpu_attention.peak)],
            ["device memory", format_bandwidth(rates.gpu_bandwidth)],
            ["CPU attention, peak", format_bandwidth(rates.cpu_attention.peak)],
            ["host to device", format_bandwidth(rates.h2d_bandwidth)],
            ["device to host", format_bandwidth(rates.d2h_bandwidth)],
            ["staging copy", format_bandwidth(rates.staging_bandwidth)],
            ["host memory, shared", format_bandwidth(rates.dram_bandwidth)],
            ["kernel launch", format_seconds(rates.gpu_launch_s)],
            ["hand-over between lanes", format_seconds(rates.task_s)],
        ]
        if rates.cores is not None:
            wanted, done = rates.cores.points[-1]
            whose = "host lanes at once" if rates.gpu_on_own_cores else "lanes at once"
            rows.append([f"{whose} on these cores", f"{done:.2f} lanes' work when {wanted:g} are wanted"])
        written = f"\nwritten to {out}" if out else ""
        return f"{machine}\n{table(['measured', ''], rows)}{written}"

    emit(machine.to_dict(), text, as_json=as_json)


# -- checkpoints ---------------------------------------------------------------------------------------


@click.command("make-checkpoint")
@click.option("--model", required=True, metavar="M", help="Catalog name or config.json.")
@click.option("--layers", type=int, metavar="L")
@click.option("--hidden", type=int, metavar="H")
@click.option("--intermediate", type=int, metavar="I")
@click.option("--heads", type=int, metavar="N")
@click.option("--kv-heads", type=int, metavar="N")
@click.option("--head-dim", type=int, metavar="D", help="Default: hidden / heads where either is changed.")
@click.option("--experts", type=int, metavar="E")
@click.option("--top-k", type=int, metavar="K")
@click.option("--vocab", type=int, metavar="V")
@click.option("--dtype", metavar="float32|bfloat16|float16", help="Default: the config's.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR")
@json_option
def make_checkpoint_command(
    model: str, dtype: str | None, seed: int, out: Path, as_json: bool, **sizes: int | None
) -> None:
    """Write a checkpoint of random weights, in the files and layout of a real one."""
    config = resized(model_config(model), sizes)
    shape = MoEModel.from_config(config, name=out.name)
    with executor_needed():
        from executor.checkpoint import Checkpoint, make_checkpoint
    with progress_bar(shape.num_layers + 1, "make-checkpoint", " files") as bar:

        def note(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        folder = make_checkpoint(config, out, dtype=dtype, seed=seed, progress=note)
    written = Checkpoint.open(folder)
    result = {
        "path": str(folder),
        "parameters": written.model.num_parameters,
        "bytes": written.size_bytes,
        "dtype": written.model.dtype,
        "layers": written.model.num_layers,
        "seed": seed,
    }
    emit(result, lambda: f"{written.model}\n{format_bytes(written.size_bytes)} in {folder}", as_json=as_json)
