"""The command that answers requests: ``hrm run``, a batch job that can be killed, resumed and left alone."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from experiments.options import (
    Capacity,
    NumberPair,
    OutFile,
    cache_policy_option,
    executor_needed,
    json_option,
    paced_link_option,
    policy_of,
    policy_options,
    popularity_option,
)
from experiments.output import emit, percentages, progress_bar
from experiments.parallel import Ranks, tp_option
from experiments.progress import JobProgress
from experiments.prompts import Requests, eos_token_ids, load_tokenizer, random_prompts, read_prompts
from experiments.results import Results
from experiments.running import DEVICE
from hrm import BatchShape, Policy
from hrm.catalog import load_hardware
from hrm.errors import InvalidValue
from hrm.systems import check_system
from hrm.units import format_bandwidth, format_bytes, format_seconds
from simulator.experts.cache import cache_policy as cache_policy_class
from simulator.experts.trace import RoutingTrace
from simulator.timeline import Timeline

if TYPE_CHECKING:
    from executor.checkpoint import Checkpoint
    from executor.results import Answer, GenerationResult

__all__ = ["run_command"]

_BAR = "{desc}: {n:.0f}/{total:.0f} tokens [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


@click.command("run")
@click.option(
    "--checkpoint", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Folder of the model."
)
@click.option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON lines: id, prompt_ids|prompt, and gen_len if it is less than G.",
)
@click.option("--random-prompts", type=NumberPair(), help="N prompts of S random tokens.")
@click.option("--gen-len", required=True, type=click.IntRange(min=1), metavar="G", help="Most tokens per request.")
@click.option("--temperature", type=float, default=0.0, show_default=True, metavar="T", help="0: the likeliest token.")
@click.option("--top-p", type=float, metavar="P", help="Draw among the likeliest tokens that make up P (default: all).")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of random prompts and of sampling."
)
@policy_options
@cache_policy_option
@click.option("--gating", metavar="static|tutel|dynamic", help="How tokens are brought to experts (default: dynamic).")
@click.option(
    "--capacity-factor", type=float, metavar="C", help="With --gating: share of the tokens that one expert takes."
)
@popularity_option
@click.option("--record-routing", type=OutFile((".npz",)), help="Write every token's choice of experts.")
@click.option("--hardware", metavar="FILE", help="Choose the policy for this machine (default: probe it).")
@DEVICE
@tp_option
@click.option("--device-memory", type=Capacity(), help="Budget on the device (on each), e.g. 16GiB.")
@click.option(
    "--pinned-weights/--staged-weights",
    default=None,
    help="Weights in page-locked memory, or copied to it piece by piece (default: pinned with a GPU, where they fit).",
)
@paced_link_option
@click.option("--out", type=OutFile(), help="Append one JSON line per request as soon as it is answered.")
@click.option("--resume", is_flag=True, help="Skip the ids that --out has already.")
@click.option("--trace", type=OutFile(), help="Write the first segment's trace for ui.perfetto.dev.")
@click.option("--timeline", type=OutFile(), help="Write the first segment's timeline, for hrm compare.")
@click.option("--ignore-eos", is_flag=True, help="Generate G tokens whatever they are.")
@json_option
def run_command(
    checkpoint: Path,
    prompts: Path | None,
    random_prompts: tuple[int, int] | None,
    gen_len: int,
    temperature: float,
    top_p: float | None,
    seed: int,
    system: str,
    cache_policy: str | None,
    gating: str | None,
    capacity_factor: float | None,
    popularity: Path | None,
    record_routing: Path | None,
    hardware: str | None,
    device: str | None,
    tp: int | None,
    device_memory: int | None,
    pinned_weights: bool | None,
    link_bandwidth: float | None,
    out: Path | None,
    resume: bool,
    trace: Path | None,
    timeline: Path | None,
    ignore_eos: bool,
    as_json: bool,
    **policy_values: Any,
) -> None:
    """Generate from a checkpoint with weights streamed to the device, by any system's schedule.

    Lines of --prompts that cannot be run are named and left out. A killed run goes on with --resume.
    """
    if (prompts is None) == (random_prompts is None):
        raise click.UsageError("give either --prompts FILE or --random-prompts N,S.")
    if resume and out is None:
        raise click.UsageError("--resume needs --out, the file to go on with.")
    if top_p is not None and temperature == 0:
        raise click.UsageError("--top-p needs --temperature T > 0; without it the likeliest token is taken.")
    policy = _policy(system, policy_values)
    experts = _caching(policy, cache_policy)
    if experts and policy is None and (gating or popularity or system != "moe-lightning"):
        raise click.UsageError("--cache-policy needs an expert cache; with these options the planner looks at none.")
    if gating is None and capacity_factor is not None:
        raise click.UsageError("--capacity-factor needs --gating static or --gating tutel.")
    shares = RoutingTrace.load(popularity).popularity() if popularity else None
    machine = load_hardware(hardware) if hardware else None
    with executor_needed():
        from executor.placements import check_runnable

        check_runnable(system, policy)
        from executor.checkpoint import Checkpoint
        from executor.gating import make_gating
        from executor.machine import pick_device
        from executor.recording import RouteRecorder
        from executor.sampling import Sampling
    if gating is not None:
        experts["gating"] = make_gating(gating, capacity_factor=capacity_factor)
    sampling = Sampling(temperature=temperature, top_p=1.0 if top_p is None else top_p, seed=seed)
    target = pick_device(device)
    ranks = Ranks(tp, device)
    if ranks.follow():
        return
    opened = Checkpoint.open(checkpoint, shard=ranks.shard)
    tokenizer = load_tokenizer(checkpoint)
    requests = _requests(opened, prompts, random_prompts, gen_len=gen_len, seed=seed, tokenizer=tokenizer)
    if requests.rejected:
        click.echo(requests.complaint("will not be run"), err=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ranks)
        job = {"checkpoint": str(checkpoint.resolve()), "gen_len": gen_len, "seed": seed} | asdict(sampling)
        job |= {"ignore_eos": ignore_eos, "gating": gating, "capacity_factor": capacity_factor}
        results = stack.enter_context(Results(out, resume=resume, job=job)) if out else None
        waiting = [r for r in requests.prompts if results is None or r.id not in results.done]
        about = {
            "system": system,
            "device": target.type,
            "tp": ranks.world,
            "link_bandwidth": link_bandwidth if target.type == "cpu" else None,
            "checkpoint": str(checkpoint),
            "skipped": len(requests.prompts) - len(waiting),
            "rejected": [{"line": each.line, "error": each.error} for each in requests.rejected],
        }
        if not waiting:
            emit(
                _NOTHING_RUN | about,
                lambda: f"nothing left to do: all {len(requests.prompts)} requests are in {out}",
                as_json=as_json,
            )
            _say_what_was_left_out(requests)
            return
        if policy is None:
            policy = ranks.auto_policy(
                opened,
                [len(r.ids) for r in waiting],
                max(r.gen_len for r in waiting),
                system=system,
                hardware=machine,
                device=target,
                device_memory=device_memory,
                link_bandwidth=link_bandwidth,
                may_cache=gating is None and shares is None,
                gate=experts["gating"].planned if gating is not None else None,
                **({"cache_policy": cache_policy} if cache_policy else {}),
            )
        gen_lens = [r.gen_len for r in waiting]
        bar = stack.enter_context(progress_bar(sum(gen_lens), "run", " tokens", bar_format=_BAR))
        progress = JobProgress(
            bar,
            gen_lens,
            batch_size=policy.batch_size,
            num_micro_batches=policy.num_micro_batches,
            timed=target.type == "cpu",
        )
        files = [path for path in (trace, timeline) if path]
        recorder = RouteRecorder(opened.local) if record_routing else None
        if recorder is not None and record_routing is not None:
            # What was routed until an interrupt is worth keeping.
            stack.callback(recorder.save, record_routing, append=resume)

        def keep(answers: list[Answer]) -> None:
            if results is not None:
                results.write([waiting[a.index].id for a in answers], [a.output for a in answers], tokenizer)
            progress.answered([(a.index, len(a.output)) for a in answers])

        def look(measured: Timeline, shape: BatchShape) -> None:
            progress.segment(measured.utilization())
            while files:
                path = files.pop()
                (measured.save_trace if path is trace else measured.save)(path)

        result = ranks.generate(
            opened,
            [r.ids for r in waiting],
            gen_len=gen_lens,
            policy=policy,
            system=system,
            device=target.type,
            device_memory=device_memory,
            link_bandwidth=link_bandwidth,
            pinned_weights=pinned_weights,
            eos_token_ids=() if ignore_eos else eos_token_ids(checkpoint, opened.config),
            sampling=sampling,
            names=[r.id for r in waiting],
            popularity=shares,
            recorder=recorder,
            **experts,
            on_answers=keep,
            on_segment=look,
            on_tokens=progress.tokens,
            # Where nobody watches, tasks need not report.
            on_done=None if bar.disable else progress.done,
        )
    emit(result.to_dict() | about, lambda: _report(opened, result, about, out), as_json=as_json)
    _say_what_was_left_out(requests)


def _caching(policy: Policy | None, name: str | None) -> dict[str, Any]:
    """The cache's policy as an option of `generate`; refused by one line before anything is loaded."""
    if name is None:
        return {}
    if policy is not None and policy.expert_slots is None:
        raise click.UsageError("--cache-policy needs --expert-slots K, the cache that it rules.")
    if cache_policy_class(name).looks_ahead:
        raise InvalidValue(
            f"cache policy {name!r} needs to know the future; it replays traces only (hrm experts cache)."
        )
    return {"cache_policy": name}


_NOTHING_RUN: dict[str, Any] = {
    "throughput_tok_s": None,
    "prefill_s": 0.0,
    "decode_s": 0.0,
    "setup_s": 0.0,
    "generated_tokens": 0,
    "requests": 0,
    "peak_memory": {"device_bytes": 0, "host_bytes": 0},
    "utilization": {},
    "policy": None,
    "batches": 0,
    "segments": 0,
    "expert_cache": None,
    "gating": None,
}


def _policy(system: str, values: dict[str, Any]) -> Policy | None:
    """The policy that was typed, with places that the system leaves no choice about filled in; None if none was."""
    traits = check_system(system)
    if values["batch_size"] is not None and values["attention_on_gpu"] is None and traits.attention_on_gpu:
        values["attention_on_gpu"] = 1
        if traits.single_batch and values["kv_on_gpu"] is None:
            values["kv_on_gpu"] = 1.0
    return policy_of(**values)


def _requests(
    checkpoint: Checkpoint,
    file: Path | None,
    random: tuple[int, int] | None,
    *,
    gen_len: int,
    seed: int,
    tokenizer: Any,
) -> Requests:
    if file is not None:
        return read_prompts(file, checkpoint.model, gen_len=gen_len, tokenizer=tokenizer)
    assert random is not None
    count, length = random
    return random_prompts(count, length, model=checkpoint.model, gen_len=gen_len, seed=seed)


def _say_what_was_left_out(requests: Requests) -> None:
    if requests.rejected:
        click.echo(requests.complaint(), err=True)


def _expert_lines(result: GenerationResult) -> list[str]:
    found, gating = result.expert_cache, result.gating
    if gating is not None and gating["choices"]:
        return [
            f"  gating      {gating['gating']}: {gating['dropped']:,} of {gating['choices']:,} choices dropped, "
            f"{gating['rows']:,} rows computed, {gating['waste_factor']:.3g} times those needed"
        ]
    if found is None:
        return []
    return [
        f"  experts     {found['slots']} slots per layer ({found['policy']}): {found['misses']:,} of "
        f"{found['accesses']:,} missed ({found['miss_rate'] or 0:.1%}), {format_bytes(found['bytes'])} loaded, "
        f"the device waited {format_seconds(found['stall_s'])} for them"
    ]


def _report(checkpoint: Checkpoint, result: GenerationResult, about: dict[str, Any], out: Path | None) -> str:
    if about["device"] == "cuda":
        link = "the GPU's own"
    elif about["link_bandwidth"] is None:
        link = "not paced, as fast as copies go (no GPU: stand-in for PCIe)"
    else:
        link = f"paced to {format_bandwidth(about['link_bandwidth'])} (no GPU: stand-in for PCIe)"
    skipped = f", {about['skipped']} skipped" if about["skipped"] else ""
    ranks = f", {about['tp']} ranks (tensor parallelism)" if about["tp"] > 1 else ""
    lines = [
        f"{checkpoint.model} on {about['device']}{ranks}",
        f"  system      {result.system}",
        f"  policy      {result.policy}",
        f"  link        {link}",
        f"  measured    {result.throughput_tok_s:.4g} tok/s  (prefill {format_seconds(result.prefill_s)}, "
        f"decode {format_seconds(result.decode_s)}, setup {format_seconds(result.setup_s)} not counted)",
        f"  generated   {result.generated_tokens:,} tokens for {len(result.outputs):,} requests{skipped}, "
        f"in {result.batches} batches, {result.segments} segments",
        f"  memory      device {format_bytes(result.peak_memory['device_bytes'])}, "
        f"host {format_bytes(result.peak_memory['host_bytes'])}",
        f"  busy        {percentages(result.utilization())}",
        *_expert_lines(result),
        f"  outputs     {out if out else 'not kept; --out FILE.jsonl keeps them'}",
    ]
    return "\n".join(lines)
