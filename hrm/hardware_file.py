"""Hardware files: TOML or JSON to `Hardware` and back. Unknown keys and wrong units are errors."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hrm.errors import InvalidConfig, InvalidValue, UnknownName
from hrm.hardware import RATE_SETS, Curve, Hardware, Link, MemoryLevel, Quantity, Rates
from hrm.systems import SYSTEMS
from hrm.units import brief, parse_bandwidth, parse_bytes, parse_flops, parse_seconds

__all__ = ["hardware_from_dict", "hardware_to_dict", "read_hardware"]


def _number(value: Any) -> float:
    """A plain number, such as a size on a curve."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidValue(f"{brief(value)} is not a number.")
    # A double holds no integer of more than 308 digits.
    if not (math.isfinite(value) if isinstance(value, float) else abs(value) < 10**300):
        raise InvalidValue(f"a number must be finite: {brief(value)}")
    return float(value)


_CURVES: dict[str, Callable[[Any], float]] = {
    "gpu_gemm": parse_flops,
    "gpu_experts": parse_flops,
    "gpu_attention": parse_flops,
    "gpu_decode_attention": parse_bandwidth,
    "cpu_attention": parse_bandwidth,
    "cpu_experts": parse_flops,
    "cores": _number,
    "processors": _number,
}
_SCALARS: dict[str, Callable[[Any], float]] = {
    "gpu_bandwidth": parse_bandwidth,
    "gpu_launch_s": parse_seconds,
    "cpu_attention_flops": parse_flops,
    "cpu_weight_bandwidth": parse_bandwidth,
    "single_expert_s": parse_seconds,
    "cpu_task_s": parse_seconds,
    "gpu_attention_s": parse_seconds,
    "h2d_bandwidth": parse_bandwidth,
    "d2h_bandwidth": parse_bandwidth,
    "peer_bandwidth": parse_bandwidth,
    "peer_s": parse_seconds,
    "transfer_s": parse_seconds,
    "staging_bandwidth": parse_bandwidth,
    "kv_staging_bandwidth": parse_bandwidth,
    "dram_bandwidth": parse_bandwidth,
    "copy_bandwidth": parse_bandwidth,
    "task_s": parse_seconds,
    "sync_s": parse_seconds,
    "request_s": parse_seconds,
    "parallel_efficiency": _number,
    "gpu_capacity": parse_bytes,
    "cpu_capacity": parse_bytes,
}
_FLAGS = ("gpu_on_own_cores",)


_EXAMPLES = {parse_bytes: "24 GB", parse_bandwidth: "300 GB/s", parse_flops: "65 TFLOP/s", parse_seconds: "10 us"}
_MAX_GPUS = 10_000


def read_hardware(path: str | Path) -> Hardware:
    """Read a hardware file, TOML or JSON by its ending.

    TOML is written by people, so that its numbers need units; JSON is what `Hardware.save` writes, in SI numbers.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidConfig(f"cannot read hardware file {str(path)!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InvalidConfig(f"hardware file {str(path)!r} is not text: {error}.") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"hardware file {str(path)!r} does not parse: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidConfig(f"hardware file {str(path)!r} must hold a table.")
    return hardware_from_dict(data, name=path.stem, units=path.suffix != ".json")


def hardware_from_dict(data: Mapping[str, Any], *, name: str, units: bool = False) -> Hardware:
    """Build a machine from the content of a hardware file.

    Parameters
    ----------
    data : mapping
        Content of the file.
    name : str
        What to call the machine unless `data` does.
    units : bool
        Refuse plain numbers where a unit could stand.
    """
    where = f"hardware {name!r}"
    _only_keys(data, {"name", "title", "levels", "links", "rates", "facts", "num_gpus", "shared_memory"}, where)
    parsers = {"capacity": parse_bytes, "bandwidth": parse_bandwidth, "peak_flops": parse_flops}
    levels = []
    for level_name, entry in _table(data, "levels", where).items():
        label = f"{where}, level {level_name!r}"
        _only_keys(entry, {"processor", *parsers}, label)
        values = {
            key: _quantity(_need(entry, key, label), parse, f"{label}, {key!r}", units)
            for key, parse in parsers.items()
        }
        levels.append(MemoryLevel(name=level_name, processor=str(_need(entry, "processor", label)), **values))
    links: list[Link] = []
    entries = _need(data, "links", where)
    if not isinstance(entries, list):
        raise InvalidConfig(f"{where}: 'links' must be a list of tables: {brief(entries)}")
    for number, entry in enumerate(entries, 1):
        label = f"{where}, link {number}"
        if isinstance(entry, Mapping) and {"source", "target"} <= set(entry):
            label = f"{where}, link {entry['source']}->{entry['target']}"
        _only_keys(entry, {"source", "target", "bandwidth"}, label)
        source, target = (_text(entry, key, label) for key in ("source", "target"))
        if any((source, target) == (link.source, link.target) for link in links):
            raise InvalidConfig(f"{label} occurs twice; remove one of them.")
        speed = _quantity(_need(entry, "bandwidth", label), parse_bandwidth, f"{label}, 'bandwidth'", units)
        links.append(Link(source=source, target=target, bandwidth=speed))
    facts = _table(data, "facts", where) if "facts" in data else {}
    shared = data.get("shared_memory", False)
    if not isinstance(shared, bool):
        raise InvalidConfig(f"{where}: 'shared_memory' must be true or false: {brief(shared)}")
    num_gpus = data.get("num_gpus", 1)
    if isinstance(num_gpus, int) and num_gpus > _MAX_GPUS:
        raise InvalidConfig(f"{where}: 'num_gpus' must be <= {_MAX_GPUS}: {brief(num_gpus)}")
    machine = Hardware(
        name=str(data.get("name", name)),
        title=str(data.get("title", name)),
        levels=tuple(levels),
        links=tuple(links),
        facts=facts,
        num_gpus=num_gpus,
        shared_memory=shared,
    )
    for source, target in (("cpu", "gpu"), ("gpu", "cpu")):
        if not any((source, target) == (link.source, link.target) for link in links):
            raise InvalidConfig(
                f"{where} lacks the link {source}->{target}; add to 'links' one with source = {source!r}, "
                f"target = {target!r} and a bandwidth."
            )
    sets: dict[str, Rates] = {}
    for set_name, entry in (_table(data, "rates", where) if "rates" in data else {}).items():
        if set_name not in RATE_SETS or set_name in ("spec", "published"):
            raise UnknownName.of("rate set", set_name, [x for x in RATE_SETS if x not in ("spec", "published")])
        sets[set_name] = _rates(entry, set_name, machine.spec_rates(), f"{where}, rates {set_name!r}", units)
    return replace(machine, rate_sets=sets)


def hardware_to_dict(machine: Hardware) -> dict[str, Any]:
    """Content of a hardware file in SI numbers."""
    rates = {}
    for set_name, item in machine.rate_sets.items():
        entry = {key: value for key, value in asdict(item).items() if value is not None}
        own = {system: dict(values) for system, values in entry.pop("systems").items()}
        for table in (entry, *own.values()):
            for key in _CURVES:
                if key in table:
                    table[key] = [list(point) for point in table[key]["points"]]
        entry.pop("provenance")
        entry.pop("peer_by_host")  # follows from the links
        entry.pop("stages_weights")  # the run says
        if own:
            entry["systems"] = own
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
        raise InvalidConfig(f"{where} must be a table: {brief(entry)}")
    for key in entry:
        if key not in set(allowed):
            raise UnknownName.of(f"key of {where}", key, allowed)


def _need(entry: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise InvalidConfig(f"{where} lacks {key!r}.")
    return entry[key]


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = _need(entry, key, where)
    if not isinstance(value, str) or not value.strip():
        raise InvalidConfig(f"{where}: {key!r} must be a text that is not empty: {brief(value)}")
    return value


def _table(entry: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = _need(entry, key, where)
    if not isinstance(value, Mapping):
        raise InvalidConfig(f"{where}: {key!r} must be a table: {brief(value)}")
    return value


def _parsed(raw: Any, parse: Callable[[Any], float], units: bool) -> float:
    if units and parse in _EXAMPLES and isinstance(raw, int | float):
        raise InvalidValue(f"{brief(raw)} has no unit; write it like {_EXAMPLES[parse]!r}.")
    return parse(raw)


def _quantity(entry: Any, parse: Callable[[Any], float], where: str, units: bool) -> Quantity:
    if not isinstance(entry, Mapping):
        raise InvalidConfig(f"{where}: a number is written {{value = ..., source = ...}}, not {brief(entry)}.")
    _only_keys(entry, {"value", "provenance", "source", "measured", "measured_source"}, where)
    measured = entry.get("measured")
    try:
        value = _parsed(_need(entry, "value", where), parse, units)
        measured = None if measured is None else _parsed(measured, parse, units)
    except InvalidValue as error:
        raise InvalidConfig(f"{where}: {error}") from None
    provenance = entry.get("provenance", "spec")
    if provenance not in RATE_SETS:
        raise UnknownName.of(f"provenance in {where}", provenance, RATE_SETS)
    if measured is not None:
        measured_source = _text(entry, "measured_source", where)
    else:
        measured_source = str(entry.get("measured_source", ""))
    return Quantity(value, provenance, _text(entry, "source", where), measured, measured_source)


def _rates(entry: Mapping[str, Any], name: str, spec: Rates, where: str, units: bool) -> Rates:
    """Rates of a file; what a set does not state is taken from the data sheet."""
    _only_keys(entry, {"source", "systems", *_CURVES, *_SCALARS, *_FLAGS}, where)
    values: dict[str, Any] = {"provenance": name, "source": _text(entry, "source", where)}
    values |= _rate_values({key: raw for key, raw in entry.items() if key not in ("source", "systems")}, where, units)
    if "systems" in entry:
        own = _table(entry, "systems", where)
        _only_keys(own, SYSTEMS, f"{where}, 'systems'")
        values["systems"] = {}
        for system, table in own.items():
            label = f"{where}, system {system!r}"
            _only_keys(table, {*_CURVES, *_SCALARS}, label)
            values["systems"][system] = _rate_values(table, label, units)
    return replace(spec, **values)


def _rate_values(entry: Mapping[str, Any], where: str, units: bool) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, raw in entry.items():
        try:
            if key in _FLAGS:
                if not isinstance(raw, bool):
                    raise InvalidValue(f"must be true or false: {brief(raw)}")
                values[key] = raw
            elif key in _SCALARS:
                # A measured overhead can round to zero, which the parsers of sizes refuse.
                zero = raw == 0 and not isinstance(raw, bool) and key.endswith("_s")
                values[key] = 0.0 if zero else float(_parsed(raw, _SCALARS[key], units))
            elif isinstance(raw, list):
                values[key] = Curve(tuple((_number(x), float(_parsed(y, _CURVES[key], units))) for x, y in raw))
            else:
                values[key] = Curve.constant(_parsed(raw, _CURVES[key], units))
        except (InvalidValue, InvalidConfig, TypeError, ValueError) as error:
            raise InvalidConfig(f"{where}, {key!r}: {error}") from None
    return values
