"""Hardware files: TOML or JSON to `Hardware` and back. Unknown keys and wrong units are errors."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hrm.errors import InvalidConfig, InvalidValue, UnknownName
from hrm.hardware import RATE_SETS, Curve, Hardware, Link, MemoryLevel, Quantity, Rates
from hrm.units import parse_bandwidth, parse_bytes, parse_flops, parse_seconds

__all__ = ["hardware_from_dict", "hardware_to_dict", "read_hardware"]

_CURVES: dict[str, Callable[[Any], float]] = {
    "gpu_gemm": parse_flops,
    "gpu_experts": parse_flops,
    "gpu_attention": parse_flops,
    "gpu_decode_attention": parse_bandwidth,
    "cpu_attention": parse_bandwidth,
    "cpu_experts": parse_flops,
    "cores": float,
}
_SCALARS: dict[str, Callable[[Any], float]] = {
    "gpu_bandwidth": parse_bandwidth,
    "gpu_launch_s": parse_seconds,
    "cpu_attention_flops": parse_flops,
    "cpu_weight_bandwidth": parse_bandwidth,
    "cpu_task_s": parse_seconds,
    "h2d_bandwidth": parse_bandwidth,
    "d2h_bandwidth": parse_bandwidth,
    "peer_bandwidth": parse_bandwidth,
    "peer_s": parse_seconds,
    "transfer_s": parse_seconds,
    "staging_bandwidth": parse_bandwidth,
    "dram_bandwidth": parse_bandwidth,
    "copy_bandwidth": parse_bandwidth,
    "task_s": parse_seconds,
    "gpu_capacity": parse_bytes,
    "cpu_capacity": parse_bytes,
}


def read_hardware(path: str | Path) -> Hardware:
    """Read a hardware file, TOML or JSON by its ending."""
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as error:
        raise InvalidConfig(f"cannot read hardware file {str(path)!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"hardware file {str(path)!r} is not text: {error}.") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidConfig(f"hardware file {str(path)!r} does not parse: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidConfig(f"hardware file {str(path)!r} must hold a table.")
    return hardware_from_dict(data, name=path.stem)


def hardware_from_dict(data: Mapping[str, Any], *, name: str) -> Hardware:
    """Build a machine from the content of a hardware file."""
    where = f"hardware {name!r}"
    _only_keys(data, {"name", "title", "levels", "links", "rates", "facts", "num_gpus", "shared_memory"}, where)
    parsers = {"capacity": parse_bytes, "bandwidth": parse_bandwidth, "peak_flops": parse_flops}
    levels = []
    for level_name, entry in _table(data, "levels", where).items():
        label = f"{where}, level {level_name!r}"
        _only_keys(entry, {"processor", *parsers}, label)
        values = {key: _quantity(_need(entry, key, label), parse, label) for key, parse in parsers.items()}
        levels.append(MemoryLevel(name=level_name, processor=str(_need(entry, "processor", label)), **values))
    links = []
    entries = _need(data, "links", where)
    if not isinstance(entries, list):
        raise InvalidConfig(f"{where}: 'links' must be a list of tables: {entries!r}")
    for entry in entries:
        label = f"{where}, link"
        _only_keys(entry, {"source", "target", "bandwidth"}, label)
        links.append(
            Link(
                source=_need(entry, "source", label),
                target=_need(entry, "target", label),
                bandwidth=_quantity(_need(entry, "bandwidth", label), parse_bandwidth, label),
            )
        )
    machine = Hardware(
        name=str(data.get("name", name)),
        title=str(data.get("title", name)),
        levels=tuple(levels),
        links=tuple(links),
        facts=data.get("facts", {}),
        num_gpus=data.get("num_gpus", 1),
        shared_memory=bool(data.get("shared_memory", False)),
    )
    sets: dict[str, Rates] = {}
    for set_name, entry in (_table(data, "rates", where) if "rates" in data else {}).items():
        if set_name not in RATE_SETS or set_name in ("spec", "published"):
            raise UnknownName.of("rate set", set_name, [x for x in RATE_SETS if x not in ("spec", "published")])
        sets[set_name] = _rates(entry, set_name, machine.spec_rates(), f"{where}, rates {set_name!r}")
    return replace(machine, rate_sets=sets)


def hardware_to_dict(machine: Hardware) -> dict[str, Any]:
    """Content of a hardware file in SI numbers."""
    rates = {}
    for set_name, item in machine.rate_sets.items():
        entry = {key: value for key, value in asdict(item).items() if value is not None}
        for key in _CURVES:
            if key in entry:
                entry[key] = [list(point) for point in entry[key]["points"]]
        entry.pop("provenance")
        rates[set_name] = entry
    return {
        "name": machine.name,
        "title": machine.title,
        "num_gpus": machine.num_gpus,
        "shared_memory": machine.shared_memory,
        "levels": {
            level.name: {
                "processor": level.processor,
                "capacity": asdict(level.capacity),
                "bandwidth": asdict(level.bandwidth),
                "peak_flops": asdict(level.peak_flops),
            }
            for level in machine.levels
        },
        "links": [{"source": x.source, "target": x.target, "bandwidth": asdict(x.bandwidth)} for x in machine.links],
        "rates": rates,
        "facts": dict(machine.facts),
    }


def _only_keys(entry: Any, allowed: Iterable[str], where: str) -> None:
    if not isinstance(entry, Mapping):
        raise InvalidConfig(f"{where} must be a table: {entry!r}")
    for key in entry:
        if key not in set(allowed):
            raise UnknownName.of(f"key of {where}", key, allowed)


def _need(entry: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise InvalidConfig(f"{where} lacks {key!r}.")
    return entry[key]


def _table(entry: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = _need(entry, key, where)
    if not isinstance(value, Mapping):
        raise InvalidConfig(f"{where}: {key!r} must be a table.")
    return value


def _quantity(entry: Any, parse: Any, where: str) -> Quantity:
    if not isinstance(entry, Mapping):
        raise InvalidConfig(f"{where}: a number is written {{value = ..., source = ...}}, not {entry!r}.")
    _only_keys(entry, {"value", "provenance", "source", "measured", "measured_source"}, where)
    measured = entry.get("measured")
    try:
        value = parse(_need(entry, "value", where))
        measured = None if measured is None else parse(measured)
    except InvalidValue as error:
        raise InvalidConfig(f"{where}: {error}") from None
    provenance = entry.get("provenance", "spec")
    if provenance not in RATE_SETS:
        raise UnknownName.of(f"provenance in {where}", provenance, RATE_SETS)
    if measured is not None:
        _need(entry, "measured_source", where)
    source, measured_source = str(_need(entry, "source", where)), str(entry.get("measured_source", ""))
    return Quantity(value, provenance, source, measured, measured_source)


def _rates(entry: Mapping[str, Any], name: str, spec: Rates, where: str) -> Rates:
    """Rates of a file; what a set does not state is taken from the data sheet."""
    _only_keys(entry, {"source", *_CURVES, *_SCALARS}, where)
    values: dict[str, Any] = {"provenance": name, "source": str(_need(entry, "source", where))}
    for key in entry:
        if key == "source":
            continue
        raw = entry[key]
        try:
            if key in _SCALARS:
                # A measured overhead can round to zero, which the parsers of sizes refuse.
                values[key] = 0.0 if raw == 0 and key.endswith("_s") else float(_SCALARS[key](raw))
            elif isinstance(raw, list):
                values[key] = Curve(tuple((float(x), float(_CURVES[key](y))) for x, y in raw))
            else:
                values[key] = Curve.constant(_CURVES[key](raw))
        except (InvalidValue, InvalidConfig, TypeError, ValueError) as error:
            raise InvalidConfig(f"{where}, {key!r}: {error}") from None
    return replace(spec, **values)
