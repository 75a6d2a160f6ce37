"""What this machine is, and how much of it others were using."""

from __future__ import annotations

import datetime
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from hrm.errors import InvalidValue

__all__ = ["OtherLoad", "core_count", "machine_facts", "pick_device", "ram_bytes"]


def core_count() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ram_bytes() -> int:
    """Bytes of main memory that this process may use: the machine's, or its control group's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(total, int(limit)) if limit.isdigit() else total
    except OSError:
        return total


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; by default CUDA where there is one, else the CPU's second heap."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cuda", "cpu"):
        raise InvalidValue(f"'device' must be 'cuda' or 'cpu': {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidValue("device 'cuda' is not available here; use --device cpu.")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


def machine_facts() -> dict[str, Any]:
    """Where a measurement was taken: processor, memory, versions, date."""
    import numpy
    import transformers

    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as stream:
            models = [line.split(":", 1)[1].strip() for line in stream if line.startswith("model name")]
        name = models[0] if models else name
    except OSError:
        pass
    facts: dict[str, Any] = {
        "cpu": name,
        "cores": core_count(),
        "memory_bytes": ram_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


class OtherLoad:
    """Share of the machine's CPU time that went to others while the block ran.

    Counts time taken by other processes and time that a hypervisor took away (steal).

    Examples
    --------
    >>> with OtherLoad() as load:
    ...     pass
    >>> 0.0 <= load.share <= 1.0
    True
    """

    share = 0.0

    def __enter__(self) -> OtherLoad:
        self._begin = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        (busy0, wall0, own0), (busy1, wall1, own1) = self._begin, self._read()
        whole = (wall1 - wall0) * (os.cpu_count() or 1)
        if whole > 0:
            self.share = min(1.0, max(0.0, (busy1 - busy0) - (own1 - own0)) / whole)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """(busy seconds of all cores with steal, wall clock, CPU seconds of this process)."""
        own = time.process_time()
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return own, time.perf_counter(), own
        user, nice, system, _, _, irq, soft, steal = fields
        busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
        return busy, time.perf_counter(), own
