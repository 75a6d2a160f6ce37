"""The runs of `benchmarks/executor.py`: records of those that have ended, and one case, planned and run."""

from __future__ import annotations

import argparse
import gc
import time
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.accelerate_peer import PEERS, PROBE_PASSES, Peer
from benchmarks.executor_cases import Case
from executor.checkpoint import Checkpoint
from executor.generate import generate
from executor.jobs import batches
from executor.machine import OtherLoad, ram_bytes
from executor.placements import auto_policy
from executor.probe import probe
from experiments.records import OutOfTime, Records, say
from hrm import BatchShape, Hardware, MoEModel, Policy, Workload, plan
from hrm.errors import HrmError
from simulator import simulate

__all__ = ["OWN", "Bench", "predict"]

OWN = ("moe-lightning", "cgopipe", "fastdecode", "flexgen-c", "flexgen", "deepspeed-zero")
"""The executor's entries: its systems, and CGOPipe proper."""

_CGOPIPE = "cgopipe"
_KEEP_SHARE = 0.1
_QUIET_SHARE, _PAUSE_S = 0.05, 2.0


class Bench:
    """One case on this machine."""

    def __init__(self, case: Case, checkpoint: Checkpoint, records: Records, options: argparse.Namespace) -> None:
        self.case, self.checkpoint, self.records, self.options = case, checkpoint, records, options
        self.device = options.device
        self.cuda = self.device.type == "cuda"
        self.prompts = case.prompts(checkpoint.model.vocab_size)
        self.links: dict[str, float | None] = {"pcie": None} if self.cuda else {"paced": case.link_bandwidth}
        if not self.cuda and not options.paced_only:
            self.links["unpaced"] = None
        self.machine = self._probe()
        self._peers: dict[str, Peer] = {}

    def _probe(self) -> Hardware:
        path = self.options.work / f"hardware-{self.case.name}.json"
        if self.options.hardware:
            return Hardware.from_catalog(self.options.hardware)
        if self.records.find(case=self.case.name, kind="probe") and path.exists():
            return Hardware.from_file(path)
        say(f"{self.case.name}: probing this machine")
        machine = probe(self.checkpoint.model, device=self.device, progress=lambda text: say(f"  {text}"))
        machine.save(path)
        self.records.add(kind="probe", case=self.case.name, facts=dict(machine.facts))
        return machine

    # -- plans -------------------------------------------------------------------------------------

    def plan(self, entry: str, link: str) -> dict[str, Any]:
        """Batch size and prediction of an entry, or why it is left out."""
        keys = {"kind": "plan", "case": self.case.name, "entry": entry, "link": link}
        found = self.records.find(**keys)
        if found is None:
            try:
                chosen = self._plan_peer(entry) if entry in PEERS else self._plan_own(entry, self.links[link])
            except (HrmError, ImportError, torch.cuda.OutOfMemoryError) as error:
                chosen = {"skipped": str(error)}
            say(f"{self.case.name}, {link}, {entry}: {_brief(chosen)}")
            found = self.records.add(**keys, **chosen)
        return found

    def _plan_own(self, entry: str, bandwidth: float | None) -> dict[str, Any]:
        model, case, lens = self.checkpoint.model, self.case, [len(p) for p in self.prompts]
        here = self.machine.with_capacity(gpu_bytes=case.device_memory)
        here = here if self.cuda else here.with_link(bandwidth)
        system = "moe-lightning" if entry == _CGOPIPE else entry
        if entry in self.options.policy:
            policy = self.options.policy[entry]
        elif entry == _CGOPIPE:
            workload = Workload(
                name="prompts",
                prompt_avg=sum(lens) / len(lens),
                prompt_max=max(lens),
                gen_len=case.gen_len,
                prompt_lens=tuple(sorted(lens, reverse=True)),
            )
            policy = plan(model, here, workload, num_requests=len(lens), attention_on_gpu=False, ffn_on_gpu=True).policy
        else:
            policy = auto_policy(
                self.checkpoint,
                lens,
                case.gen_len,
                system=system,
                hardware=self.machine,
                device=self.device,
                device_memory=case.device_memory,
                link_bandwidth=bandwidth,
            )
        asked = self._asked(policy.batch_size)
        tokens, seconds = predict(model, here, [len(p) for p in asked], case.gen_len, system, policy)
        return {
            "policy": policy.to_dict(),
            "described": str(policy),
            "batch_size": policy.batch_size,
            "requests": len(asked),
            "predicted_tok_s": tokens / seconds,
            "predicted_s": seconds,
        }

    def _plan_peer(self, entry: str) -> dict[str, Any]:
        for link in self.links:  # the batch does not depend on the link
            found = self.records.find(kind="plan", case=self.case.name, entry=entry, link=link)
            if found and "batch_size" in found:
                return {key: value for key, value in found.items() if key not in ("kind", "case", "entry", "link")}
        peer, started = self._peer(entry), time.perf_counter()
        batch, peak = peer.largest_batch(self.prompts, self.case.gen_len, self.case.device_memory, prove=not self.cuda)
        passes = (time.perf_counter() - started) / PROBE_PASSES
        return {
            "batch_size": batch,
            "requests": len(self._asked(batch)),
            "described": f"N={batch}" if self.cuda else f"N={batch}, all cores",
            "peak_device_bytes": peak,
            "expected_s": passes * self.case.gen_len if self.cuda else 0.0,
        }

    def _asked(self, batch_size: int) -> list[list[int]]:
        most = self.options.max_batches
        return self.prompts[: most * batch_size] if most else self.prompts

    # -- runs --------------------------------------------------------------------------------------

    def run(self, entry: str, link: str, turn: int) -> None:
        """One run, unless it is known already."""
        keys = {"kind": "run", "case": self.case.name, "entry": entry, "link": link, "round": turn}
        chosen = self.plan(entry, link)
        if "skipped" in chosen or self.records.find(**keys):
            return
        self._check_time(entry, link, chosen)
        self._wait_for_quiet()
        started = time.perf_counter()
        try:
            with OtherLoad() as load:
                measured = (self._run_peer if entry in PEERS else self._run_own)(entry, self.links[link], chosen)
        except HrmError as error:
            measured = {"failed": str(error)}
        measured |= {"cpu_taken_by_others": round(load.share, 4), "wall_s": time.perf_counter() - started}
        self.records.add(**keys, **measured)
        result = f"{measured['tok_s']:.2f} tok/s" if "tok_s" in measured else f"failed: {measured['failed']}"
        say(f"{self.case.name}, {link}, {entry}, round {turn + 1}: {result} ({measured['wall_s']:.0f} s)")

    def _check_time(self, entry: str, link: str, chosen: dict[str, Any]) -> None:
        before = self.records.find(kind="run", case=self.case.name, entry=entry, link=link)
        expected = before["wall_s"] if before else chosen.get("predicted_s", chosen.get("expected_s", 0.0))
        if time.monotonic() - self.options.started + expected > self.options.time_budget:
            raise OutOfTime

    def _wait_for_quiet(self) -> None:
        """Wait while others use the processor, as long as --patience says."""
        until = time.monotonic() + self.options.patience
        while time.monotonic() < until:
            with OtherLoad() as load:
                time.sleep(_PAUSE_S)
            if load.share <= _QUIET_SHARE:
                return

    def _run_own(self, entry: str, bandwidth: float | None, chosen: dict[str, Any]) -> dict[str, Any]:
        policy = {key: value for key, value in chosen["policy"].items() if key != "num_micro_batches"}
        result = generate(
            self.checkpoint,
            self._asked(chosen["batch_size"]),
            gen_len=self.case.gen_len,
            policy=Policy(**policy),
            system="moe-lightning" if entry == _CGOPIPE else entry,
            device=self.device.type,
            device_memory=self.case.device_memory,
            link_bandwidth=bandwidth,
        )
        return {
            "tok_s": result.throughput_tok_s,
            "seconds": result.prefill_s + result.decode_s,
            "prefill_s": result.prefill_s,
            "setup_s": result.setup_s,
            "peak_device_bytes": result.peak_memory["device_bytes"],
            "peak_host_bytes": result.peak_memory["host_bytes"],
            "answers": [_digest(x) for x in result.outputs],
        }

    def _peer(self, entry: str) -> Peer:
        if self.cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.case.device_memory / total), self.device)
        if entry not in self._peers:
            folder = self.options.work / f"offloaded-{self.checkpoint.path.name}"
            self._peers[entry] = Peer(self.checkpoint, entry, device=self.device, folder=folder)
        return self._peers[entry]

    def _run_peer(self, entry: str, bandwidth: float | None, chosen: dict[str, Any]) -> dict[str, Any]:
        batch = chosen["batch_size"]
        while True:
            asked = self._asked(batch)
            try:
                result = self._peer(entry).run(asked, self.case.gen_len, batch_size=batch, bandwidth=bandwidth)
                break
            except torch.cuda.OutOfMemoryError:
                if batch == 1:
                    return {"failed": "one prompt does not fit the device's memory"}
                batch = batch * 9 // 10
                say(f"  out of memory; again with batches of {batch}")
                torch.cuda.empty_cache()
        # The peak without a GPU was taken when the batch size was proved: watching slows a run down.
        peak = chosen["peak_device_bytes"] if result.peak_device_bytes is None else result.peak_device_bytes
        return {
            "tok_s": len(asked) * self.case.gen_len / result.seconds,
            "seconds": result.seconds,
            "prefill_s": result.prefill_s,
            "batch_size": batch,
            "fetched_bytes": result.fetched_bytes,
            "peak_device_bytes": peak,
            "answers": [_digest(x) for x in result.outputs],
        }

    def make_room(self) -> None:
        """Forget models of peers that take much of the host's memory."""
        if self.checkpoint.size_bytes > _KEEP_SHARE * ram_bytes():
            self._peers.clear()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            getattr(torch._C, "_host_emptyCache", lambda: None)()  # pinned memory that nobody uses any more


def predict(
    model: MoEModel, here: Hardware, lens: Sequence[int], gen_len: int, system: str, policy: Policy
) -> tuple[int, float]:
    """Tokens of all batches, and the seconds that the simulator says they take."""
    rates, known, seconds = here.rates(), {}, 0.0
    for groups in batches(lens, policy):
        shape = BatchShape(tuple(tuple(lens[i] for i in group) for group in groups), gen_len)
        if shape not in known:
            known[shape] = simulate(model, rates, policy, shape, system=system).simulated_s
        seconds += known[shape]
    return len(lens) * gen_len, seconds


def _digest(tokens: Sequence[int]) -> int:
    return zlib.crc32(repr(list(tokens)).encode())


def _brief(chosen: dict[str, Any]) -> str:
    if "skipped" in chosen:
        return f"left out: {chosen['skipped']}"
    tail = f", predicted {chosen['predicted_tok_s']:.2f} tok/s" if "predicted_tok_s" in chosen else ""
    return chosen["described"] + tail
