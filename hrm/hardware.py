"""A machine: memory levels with their processors, the links between them, and the rates they attain.

`MemoryLevel` and `Link` hold what a data sheet says, each number with where it comes from. `Rates` hold
what kernels attain on it; a machine has one or more sets of them (``spec`` is derived from the data
sheet, ``published`` puts published measurements in its place, ``paper``, ``measured`` and ``fitted`` come from
files). No efficiency stands in code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hrm.errors import InvalidConfig, InvalidValue, UnknownName
from hrm.rates import RATE_SETS, Curve, Provenance, Rates
from hrm.units import (
    format_bandwidth,
    format_bytes,
    format_flops,
)

__all__ = ["RATE_SETS", "Curve", "Hardware", "Link", "MemoryLevel", "Provenance", "Quantity", "Rates"]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with where it comes from."""

    value: float
    provenance: Provenance = "spec"
    source: str = ""
    measured: float | None = None
    """What somebody published as measured; the rate set "published" takes it in place of `value`."""
    measured_source: str = ""

    def __float__(self) -> float:
        return float(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLevel:
    """One memory and the processor beside it (level i of the HRM); of a GPU level, one of its GPUs."""

    name: str
    """"gpu" or "cpu" (later "disk")."""
    processor: str
    """What computes there, e.g. "NVIDIA L4"."""
    capacity: Quantity
    """Bytes."""
    bandwidth: Quantity
    """B^i: bytes per second between this memory and its processor."""
    peak_flops: Quantity
    """P^i: FLOP per second of the processor at the model's data type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A one-way connection between two memory levels.

    Between host and GPUs it is the sum over all GPUs; from "gpu" to "gpu" what one GPU sends to its peers.
    """

    source: str
    target: str
    bandwidth: Quantity
    """B^{j,i}: bytes per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A machine as the model sees it.

    Examples
    --------
    >>> l4 = Hardware.from_catalog("gcp-l4-1x")
    >>> l4.gpu.processor, float(l4.h2d.bandwidth)
    ('NVIDIA L4', 16000000000.0)
    """

    name: str
    title: str
    levels: tuple[MemoryLevel, ...]
    """Fastest first: GPU, CPU."""
    links: tuple[Link, ...]
    rate_sets: Mapping[str, Rates] = field(default_factory=dict)
    """Rates by name of the set, without ``spec``."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Where and when the file was made: host, versions, date, command."""
    num_gpus: int = 1
    """GPUs of the machine, all used together by tensor parallelism; `levels` hold the numbers of one."""
    shared_memory: bool = False
    """True where "GPU" and "CPU" memory are two heaps of the same RAM (a machine without a GPU)."""

    def __post_init__(self) -> None:
        names = [level.name for level in self.levels]
        for need in ("gpu", "cpu"):
            if need not in names:
                raise InvalidConfig(f"hardware {self.name!r} lacks the memory level {need!r}.")
        for link in self.links:
            if link.source not in names or link.target not in names:
                raise InvalidConfig(f"hardware {self.name!r} links unknown levels {link.source}->{link.target}.")
        if not isinstance(self.num_gpus, int) or isinstance(self.num_gpus, bool) or self.num_gpus < 1:
            raise InvalidConfig(f"'num_gpus' of hardware {self.name!r} must be an integer >= 1: {self.num_gpus!r}")
        if self.num_gpus > 1 and self.peer is None:
            raise InvalidConfig(f"hardware {self.name!r} has {self.num_gpus} GPUs and no link gpu->gpu.")

    def level(self, name: str) -> MemoryLevel:
        """The memory level called `name`."""
        return next(level for level in self.levels if level.name == name)

    @property
    def gpu(self) -> MemoryLevel:
        """The fast, small level."""
        return self.level("gpu")

    @property
    def cpu(self) -> MemoryLevel:
        """The host's level."""
        return self.level("cpu")

    def link(self, source: str, target: str) -> Link:
        """The link from `source` to `target`."""
        for link in self.links:
            if (link.source, link.target) == (source, target):
                return link
        raise UnknownName.of("link", f"{source}->{target}", [f"{x.source}->{x.target}" for x in self.links])

    @property
    def h2d(self) -> Link:
        """CPU to GPU."""
        return self.link("cpu", "gpu")

    @property
    def d2h(self) -> Link:
        """GPU to CPU."""
        return self.link("gpu", "cpu")

    @property
    def peer(self) -> Link | None:
        """GPU to GPU, None where there is none."""
        return next((link for link in self.links if link.source == link.target == "gpu"), None)

    def spec_rates(self) -> Rates:
        """Every kernel at its roof: an upper bound, far above what programs attain."""
        gpu, cpu = self.gpu, self.cpu
        return Rates(
            provenance="spec",
            source="data-sheet peaks; an upper bound",
            gpu_gemm=Curve.constant(float(gpu.peak_flops)),
            gpu_experts=Curve.constant(float(gpu.peak_flops)),
            gpu_attention=Curve.constant(float(gpu.peak_flops)),
            gpu_bandwidth=float(gpu.bandwidth),
            gpu_decode_attention=Curve.constant(float(gpu.bandwidth)),
            cpu_experts=Curve.constant(float(cpu.peak_flops)),
            cpu_weight_bandwidth=float(cpu.bandwidth),
            cpu_attention=Curve.constant(float(cpu.bandwidth)),
            cpu_attention_flops=float(cpu.peak_flops),
            h2d_bandwidth=float(self.h2d.bandwidth),
            d2h_bandwidth=float(self.d2h.bandwidth),
            peer_bandwidth=None if self.peer is None else float(self.peer.bandwidth),
            # No faster than a GPU's link to the host: it is that link.
            peer_by_host=self.peer is not None
            and float(self.peer.bandwidth) <= 1.01 * float(self.h2d.bandwidth) / self.num_gpus,
            staging_bandwidth=float(cpu.bandwidth) / 2,
            dram_bandwidth=float(cpu.bandwidth),
        )

    @property
    def published(self) -> Hardware | None:
        """The machine with published measurements in place of the data sheet, or None if there are none."""

        def measured(number: Quantity) -> Quantity:
            return number if number.measured is None else replace(number, value=number.measured)

        levels = tuple(
            replace(
                level,
                capacity=measured(level.capacity),
                bandwidth=measured(level.bandwidth),
                peak_flops=measured(level.peak_flops),
            )
            for level in self.levels
        )
        links = tuple(replace(link, bandwidth=measured(link.bandwidth)) for link in self.links)
        changed = replace(self, levels=levels, links=links)
        return None if changed == self else changed

    def rates(self, efficiency: str | None = None) -> Rates:
        """Rates of the set `efficiency`, by default the best that the machine has.

        Parameters
        ----------
        efficiency : {"fitted", "measured", "paper", "published", "spec"}, optional
            ``published`` is ``spec`` with published measurements where the file has them.

        Raises
        ------
        UnknownName
            If the machine has no such set.
        """
        if efficiency is None:
            efficiency = self.efficiencies[0]
        if efficiency == "spec":
            return self.spec_rates()
        if efficiency not in self.efficiencies:
            raise UnknownName.of(f"efficiency of {self.name}", efficiency, self.efficiencies)
        if efficiency == "published":
            assert self.published is not None
            source = "published measurements of single resources, else the data sheet; an upper bound"
            return replace(self.published.spec_rates(), provenance="published", source=source)
        return self.rate_sets[efficiency]

    @property
    def efficiencies(self) -> list[str]:
        """Names of the rate sets that the machine has, the best first."""
        have = {*self.rate_sets, "spec"} | ({"published"} if self.published is not None else set())
        return [name for name in RATE_SETS if name in have]

    def with_link(self, bandwidth: float | None) -> Hardware:
        """The same machine with every measured link paced to `bandwidth` bytes/s (None: unpaced)."""
        return replace(self, rate_sets={key: rates.with_link(bandwidth) for key, rates in self.rate_sets.items()})

    def with_pinned_weights(self) -> Hardware:
        """The same machine for a run whose weights lie in pinned memory and need no staging copy."""
        sets = {key: replace(rates, stages_weights=False) for key, rates in self.rate_sets.items()}
        return replace(self, rate_sets=sets)

    def scaled(
        self,
        *,
        gpu_memory: float = 1.0,
        cpu_memory: float = 1.0,
        gpu_speed: float = 1.0,
        gpu_bandwidth: float = 1.0,
        cpu_speed: float = 1.0,
        cpu_bandwidth: float = 1.0,
        link: float = 1.0,
    ) -> Hardware:
        """The same machine with some of its resources multiplied, in data sheet and rate sets alike.

        ``cpu_speed`` and ``gpu_speed`` multiply FLOP/s, ``link`` both directions between host and GPUs.
        Overheads in seconds stay.
        """
        factors = {
            "gpu": (gpu_memory, gpu_bandwidth, gpu_speed),
            "cpu": (cpu_memory, cpu_bandwidth, cpu_speed),
        }
        if any(not x > 0 for x in (*factors["gpu"], *factors["cpu"], link)):
            raise InvalidValue("factors of a machine must be > 0.")
        levels = []
        for level in self.levels:
            size, band, speed = factors.get(level.name, (1.0, 1.0, 1.0))
            levels.append(
                replace(
                    level,
                    capacity=_times(level.capacity, size),
                    bandwidth=_times(level.bandwidth, band),
                    peak_flops=_times(level.peak_flops, speed),
                )
            )
        links = tuple(
            x if x.source == x.target else replace(x, bandwidth=_times(x.bandwidth, link)) for x in self.links
        )
        by_field = {
            "gpu_gemm": gpu_speed, "gpu_experts": gpu_speed, "gpu_attention": gpu_speed,
            "gpu_bandwidth": gpu_bandwidth, "gpu_decode_attention": gpu_bandwidth,
            "cpu_attention": cpu_bandwidth, "cpu_attention_flops": cpu_speed,
            "cpu_experts": cpu_speed, "cpu_weight_bandwidth": cpu_bandwidth,
            "h2d_bandwidth": link, "d2h_bandwidth": link,
            "staging_bandwidth": cpu_bandwidth, "dram_bandwidth": cpu_bandwidth,
            "gpu_capacity": gpu_memory, "cpu_capacity": cpu_memory,
        }  # fmt: skip
        rate_sets = {name: rates.scaled(by_field) for name, rates in self.rate_sets.items()}
        return replace(self, levels=tuple(levels), links=links, rate_sets=rate_sets)

    def with_capacity(self, *, gpu_bytes: int | None = None, cpu_bytes: int | None = None) -> Hardware:
        """The same machine with other memory sizes (a budget on the GPU, say)."""
        sizes = {"gpu": gpu_bytes, "cpu": cpu_bytes}
        levels = []
        for level in self.levels:
            size = sizes.get(level.name)
            if size is not None:
                level = replace(level, capacity=Quantity(size, level.capacity.provenance, "set by the caller"))
            levels.append(level)
        given = {f"{name}_capacity": float(size) for name, size in sizes.items() if size is not None}
        rate_sets = {name: replace(rates, **given) for name, rates in self.rate_sets.items()}  # type: ignore[arg-type]
        return replace(self, levels=tuple(levels), rate_sets=rate_sets)

    @classmethod
    def from_catalog(cls, name: str) -> Hardware:
        """Load a catalog machine by name, or a hardware file (.toml, .json) by path."""
        from hrm import catalog

        return catalog.load_hardware(name)

    @classmethod
    def from_file(cls, path: str | Path) -> Hardware:
        """Read a hardware file, TOML or JSON by its ending."""
        from hrm.hardware_file import read_hardware

        return read_hardware(path)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, name: str) -> Hardware:
        """Build a machine from the content of a hardware file; unknown keys are errors."""
        from hrm.hardware_file import hardware_from_dict

        return hardware_from_dict(data, name=name)

    def to_dict(self) -> dict[str, Any]:
        """Content of a hardware file in SI numbers; `from_dict` reads it back."""
        from hrm.hardware_file import hardware_to_dict

        return hardware_to_dict(self)

    def save(self, path: str | Path) -> None:
        """Write the machine as a JSON hardware file."""
        path = Path(path)
        if path.suffix != ".json":
            raise InvalidValue(f"hardware files are written as .json: {str(path)!r}")
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}"]
        for level in self.levels:
            count = f"{self.num_gpus} x " if level.name == "gpu" and self.num_gpus > 1 else ""
            lines.append(
                f"  {level.name}: {count}{level.processor}, {format_bytes(float(level.capacity))}, "
                f"{format_bandwidth(float(level.bandwidth))}, {format_flops(float(level.peak_flops))}"
            )
        for link in self.links:
            lines.append(f"  {link.source}->{link.target}: {format_bandwidth(float(link.bandwidth))}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head, *rest = str(self).split("\n")
        return f"<b>{head}</b><ul>{''.join(f'<li>{line.strip()}</li>' for line in rest)}</ul>"


def _times(number: Quantity, factor: float) -> Quantity:
    measured = None if number.measured is None else number.measured * factor
    return replace(number, value=number.value * factor, measured=measured)
