"""Machines: files, provenance, rate sets, curves."""

from __future__ import annotations

import copy
import json
from dataclasses import fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm import Hardware, catalog
from hrm.errors import HrmError, InvalidConfig, InvalidValue, UnknownName
from hrm.hardware import RATE_SETS, Curve, Rates

MACHINES = catalog.names("hardware")


@pytest.fixture
def l4() -> Hardware:
    """The machine of the paper's case study."""
    return Hardware.from_catalog("gcp-l4-1x")


@pytest.fixture
def data(l4: Hardware) -> dict[str, Any]:
    """Its file's content, free to be changed."""
    return copy.deepcopy(l4.to_dict())


def load(data: dict[str, Any]) -> Hardware:
    """Read a machine from a file's content."""
    return Hardware.from_dict(data, name="box")


def test_case_study_numbers(l4: Hardware) -> None:
    """The L4 box has the numbers of MoE-Lightning, section 3.3."""
    assert float(l4.cpu.bandwidth) == 100e9
    assert float(l4.cpu.peak_flops) == 1.3e12
    assert float(l4.cpu.capacity) == 192e9
    assert float(l4.gpu.bandwidth) == 300e9
    assert float(l4.gpu.peak_flops) == 242e12
    assert float(l4.gpu.capacity) == 24e9
    assert float(l4.h2d.bandwidth) == float(l4.d2h.bandwidth) == 16e9


@pytest.mark.parametrize("name", MACHINES)
def test_every_number_has_a_source(name: str) -> None:
    """Every level, link and rate set of every catalog machine says where its numbers come from."""
    machine = Hardware.from_catalog(name)
    quantities = [q for x in machine.levels for q in (x.capacity, x.bandwidth, x.peak_flops)]
    quantities += [link.bandwidth for link in machine.links]
    assert all(q.source.strip() and q.provenance in RATE_SETS and float(q) > 0 for q in quantities)
    assert all(rates.source.strip() for rates in machine.rate_sets.values())
    assert all(rates.provenance == key for key, rates in machine.rate_sets.items())
    assert machine.name == name


@pytest.mark.parametrize("name", MACHINES)
def test_the_gpu_is_the_faster_level(name: str) -> None:
    """The paper's assumption holds: the GPU's memory and compute are no slower than the CPU's."""
    machine = Hardware.from_catalog(name)
    assert float(machine.gpu.bandwidth) >= float(machine.cpu.bandwidth)
    assert float(machine.gpu.peak_flops) >= float(machine.cpu.peak_flops)


@pytest.mark.parametrize("name", MACHINES)
def test_dict_and_file_round_trip(name: str, tmp_path: Path) -> None:
    """A machine equals itself after a trip through its plain form and through a saved file."""
    machine = Hardware.from_catalog(name)
    assert Hardware.from_dict(machine.to_dict(), name=name) == machine
    machine.save(tmp_path / f"{name}.json")
    assert Hardware.from_file(tmp_path / f"{name}.json") == machine
    assert Hardware.from_catalog(str(tmp_path / f"{name}.json")) == machine


def test_round_trip_with_curves_and_overheads(l4: Hardware, tmp_path: Path) -> None:
    """Measured curves, overheads, cores and facts survive a saved file to the last bit."""
    curve = Curve(((1.0, 1e9), (7.0, 3.3e11), (512.0, 1.0 / 3.0 * 1e13)))
    measured = replace(
        l4.spec_rates(),
        provenance="measured",
        source="probe",
        gpu_gemm=curve,
        gpu_experts=curve,
        cpu_attention=Curve(((64.0, 2e9), (4096.0, 7e9))),
        gpu_launch_s=3.7e-6,
        task_s=0.1 + 0.2,
        transfer_s=0.0,
        copy_bandwidth=4.4e9,
        cores=Curve(((1.0, 1.0), (2.8, 1.7))),
        gpu_on_own_cores=True,
        single_expert_s=1.0 / 7.0,
        processors=Curve(((1.0, 1.0), (2.0, 1.0 / 3.0 + 1), (3.0, 1.9))),
        gpu_attention_s=0.3 / 7,
    )
    machine = replace(l4, rate_sets={"measured": measured}, facts={"host": "box", "seed": 3}, shared_memory=True)
    machine.save(tmp_path / "m.json")
    again = Hardware.from_file(tmp_path / "m.json")
    assert again == machine
    assert again.rates("measured").gpu_gemm.points == curve.points
    assert again.shared_memory is True


def test_saving_under_another_ending_is_refused(l4: Hardware, tmp_path: Path) -> None:
    """Files are written as JSON, so another ending is refused and nothing is written."""
    with pytest.raises(InvalidValue, match=r"written as .json"):
        l4.save(tmp_path / "m.toml")
    assert not list(tmp_path.iterdir())


# -- rates --------------------------------------------------------------------------------------------


def test_default_set_is_the_best_there_is(l4: Hardware) -> None:
    """Fitted rates are chosen before measured, measured before the paper's, and those before the data sheet's."""
    spec = l4.spec_rates()
    sets = {key: replace(spec, provenance=key) for key in ("paper", "measured", "fitted")}
    for best in ("fitted", "measured", "paper", "spec"):
        assert replace(l4, rate_sets=sets).rates().provenance == best
        sets.pop(best, None)


def test_a_set_can_be_named(l4: Hardware) -> None:
    """A named set is returned whatever the default is."""
    assert l4.rates("paper").provenance == "paper"
    assert l4.rates("spec") == l4.spec_rates()


def test_an_unknown_set_is_refused(l4: Hardware) -> None:
    """A set that the machine lacks is answered with those it has."""
    with pytest.raises(UnknownName, match=r"efficiency of gcp-l4-1x 'papr'. Did you mean 'paper'"):
        l4.rates("papr")
    bare = replace(l4, rate_sets={})
    with pytest.raises(UnknownName, match="Known: spec"):
        bare.rates("measured")


def test_spec_rates_are_the_data_sheet(l4: Hardware) -> None:
    """Spec rates put every kernel at its roof with no overheads, and a staging copy reads and writes memory."""
    rates = l4.rates("spec")
    assert rates.gpu_gemm.peak == rates.gpu_experts.peak == 242e12
    assert rates.h2d_bandwidth == 16e9
    assert rates.staging_bandwidth == 50e9
    assert (rates.gpu_launch_s, rates.task_s, rates.transfer_s, rates.cores) == (0.0, 0.0, 0.0, None)


def test_what_a_set_leaves_out_is_the_data_sheets(data: dict[str, Any]) -> None:
    """A rate set states what it knows; the rest is taken from the data sheet, and zero overheads are allowed."""
    data["rates"] = {"measured": {"source": "me", "h2d_bandwidth": "12 GB/s", "task_s": 0}}
    rates = load(data).rates()
    assert (rates.h2d_bandwidth, rates.d2h_bandwidth, rates.task_s) == (12e9, 16e9, 0.0)
    assert rates.gpu_gemm == Curve.constant(242e12)


def test_with_link(l4: Hardware) -> None:
    """Pacing sets both directions of every rate set and leaves the original alone; None changes nothing."""
    paced = l4.with_link(2e9)
    assert (paced.rates("paper").h2d_bandwidth, paced.rates("paper").d2h_bandwidth) == (2e9, 2e9)
    assert l4.rates("paper").h2d_bandwidth == 16 * 2**30
    assert l4.with_link(None) == l4


def test_a_paced_link_is_no_faster_than_the_copies_that_carry_it(l4: Hardware) -> None:
    """Where copies are made by a core, its copy rate caps the link."""
    rates = replace(l4.rates("paper"), copy_bandwidth=3e9)
    assert rates.with_link(50e9).h2d_bandwidth == 3e9
    assert rates.with_link(1e9).d2h_bandwidth == 1e9


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan")])
def test_a_link_must_have_a_bandwidth(l4: Hardware, bandwidth: float) -> None:
    """A link of no or negative speed is refused with the value."""
    with pytest.raises(InvalidValue, match=f"link bandwidth must be > 0: {bandwidth}"):
        l4.with_link(bandwidth)


def test_with_capacity(l4: Hardware) -> None:
    """Only the memory that is named changes, and its source says so."""
    small = l4.with_capacity(gpu_bytes=10**9)
    assert float(small.gpu.capacity) == 1e9
    assert small.gpu.capacity.source == "set by the caller"
    assert small.cpu == l4.cpu
    assert small.gpu.bandwidth == l4.gpu.bandwidth
    assert l4.with_capacity() == l4


def test_with_capacity_reaches_the_rate_sets(l4: Hardware) -> None:
    """A budget replaces the capacity that the authors profiled, too; the other memory keeps its own."""
    assert l4.rates("paper").gpu_capacity == 24 * 2**30
    small = l4.with_capacity(gpu_bytes=10**9).rates("paper")
    assert small.gpu_capacity == 1e9
    assert small.cpu_capacity == l4.rates("paper").cpu_capacity == 197_880_360_960
    assert l4.with_capacity(cpu_bytes=10**9).rates("paper").cpu_capacity == 1e9


SCALES = {
    "gpu_memory": (["gpu_capacity"], "gpu", "capacity"),
    "cpu_memory": (["cpu_capacity"], "cpu", "capacity"),
    "gpu_speed": (["gpu_gemm", "gpu_experts", "gpu_attention"], "gpu", "peak_flops"),
    "cpu_speed": (["cpu_attention_flops", "cpu_experts"], "cpu", "peak_flops"),
    "gpu_bandwidth": (["gpu_bandwidth", "gpu_decode_attention"], "gpu", "bandwidth"),
    "cpu_bandwidth": (
        ["cpu_attention", "cpu_weight_bandwidth", "staging_bandwidth", "dram_bandwidth"], "cpu", "bandwidth"
    ),
    "link": (["h2d_bandwidth", "d2h_bandwidth"], None, None),
}  # fmt: skip


@pytest.mark.parametrize("factor", [0.5, 3.0])
@pytest.mark.parametrize("resource", SCALES)
def test_scaled(l4: Hardware, resource: str, factor: float) -> None:
    """Scaling a resource multiplies its numbers in data sheet and rate sets, and leaves all others alone."""
    names, level, key = SCALES[resource]
    other = l4.scaled(**{resource: factor})
    for one in l4.levels:
        for number in ("capacity", "bandwidth", "peak_flops"):
            by = factor if (one.name, number) == (level, key) else 1
            assert float(getattr(other.level(one.name), number)) == pytest.approx(by * float(getattr(one, number)))
    for link in l4.links:
        by = factor if resource == "link" else 1
        assert float(other.link(link.source, link.target).bandwidth) == by * float(link.bandwidth)
    for efficiency in ("paper", "spec"):
        before, after = l4.rates(efficiency), other.rates(efficiency)
        for item in fields(Rates):
            old, new = getattr(before, item.name), getattr(after, item.name)
            if isinstance(old, Curve):
                old, new = old.peak, new.peak
            if item.name in names and old is not None:
                assert new == pytest.approx(factor * old), (efficiency, item.name)
            else:
                assert new == old, (efficiency, item.name)


def test_scaling_leaves_the_gpus_link_alone(v100: Hardware) -> None:
    """A faster link between host and GPUs is none between GPUs; curves keep their sizes."""
    assert v100.peer is not None
    assert v100.scaled(link=2.0).peer == v100.peer
    curve = Curve(((1.0, 2.0), (5.0, 4.0)))
    assert curve.scaled(3.0).points == ((1.0, 6.0), (5.0, 12.0))
    assert v100.scaled() == v100


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_factor_must_be_positive(l4: Hardware, factor: float) -> None:
    """A machine scaled by nothing is refused."""
    with pytest.raises(InvalidValue, match="factors of a machine must be > 0"):
        l4.scaled(link=factor)


# -- several GPUs --------------------------------------------------------------------------------------


@pytest.fixture
def v100() -> Hardware:
    """A node of eight GPUs."""
    return Hardware.from_catalog("v100-node-8x")


def test_several_gpus(v100: Hardware) -> None:
    """Levels and rates are those of one GPU, links those of the node, and one GPU's exchange is a rate of its own."""
    assert v100.num_gpus == 8
    assert float(v100.gpu.capacity) <= 32 * 2**30
    assert v100.peer is not None
    assert v100.spec_rates().peer_bandwidth == float(v100.peer.bandwidth)
    assert "  gpu: 8 x " in str(v100)
    assert Hardware.from_catalog("gcp-l4-1x").spec_rates().peer_bandwidth is None
    assert Hardware.from_catalog("gcp-l4-1x").peer is None


def test_several_gpus_need_a_link_between_them(data: dict[str, Any]) -> None:
    """A machine of two GPUs without a link gpu->gpu is refused by name; with one it is read back."""
    data["num_gpus"] = 2
    with pytest.raises(InvalidConfig, match="has 2 GPUs and no link gpu->gpu"):
        load(data)
    data["links"].append({"source": "gpu", "target": "gpu", "bandwidth": {"value": "300 GB/s", "source": "NVLink"}})
    machine = load(data)
    assert machine.num_gpus == 2
    assert machine.rates("paper").peer_bandwidth == 300e9
    assert load(machine.to_dict()) == machine


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", None])
def test_the_number_of_gpus_is_a_positive_integer(data: dict[str, Any], value: Any) -> None:
    """A number of GPUs that is none is refused with its value."""
    data["num_gpus"] = value
    with pytest.raises(InvalidConfig, match=f"'num_gpus' .* must be an integer >= 1: {value!r}"):
        load(data)


def test_published_measurements_stand_beside_the_number(data: dict[str, Any]) -> None:
    """A number may say what somebody measured, with a source; nothing is computed from it, and it is kept."""
    entry = data["levels"]["gpu"]["bandwidth"]
    entry |= {"measured": "220 GB/s", "measured_source": "a paper"}
    machine = load(data)
    assert (machine.gpu.bandwidth.measured, machine.gpu.bandwidth.measured_source) == (220e9, "a paper")
    assert machine.spec_rates().gpu_bandwidth == 300e9
    assert load(machine.to_dict()) == machine
    del entry["measured_source"]
    with pytest.raises(InvalidConfig, match="lacks 'measured_source'"):
        load(data)
    entry |= {"measured": "220 GB", "measured_source": "a paper"}
    with pytest.raises(InvalidConfig, match="level 'gpu'"):
        load(data)


def test_published_measurements_are_a_set_of_rates(data: dict[str, Any]) -> None:
    """What was measured replaces the data sheet in a set of its own, which scales with the machine."""
    assert load(data).published is None
    with pytest.raises(UnknownName, match="'published'"):
        load(data).rates("published")
    data["levels"]["gpu"]["bandwidth"] |= {"measured": "220 GB/s", "measured_source": "a paper"}
    machine = load(data)
    assert [x for x in machine.efficiencies if x != "fitted"] == ["paper", "published", "spec"]
    rates, spec = machine.rates("published"), machine.spec_rates()
    assert rates.gpu_bandwidth == rates.gpu_decode_attention.peak == 220e9
    assert (rates.provenance, rates.h2d_bandwidth, rates.gpu_gemm) == ("published", spec.h2d_bandwidth, spec.gpu_gemm)
    twice = machine.scaled(gpu_bandwidth=2.0)
    assert (twice.rates("published").gpu_bandwidth, twice.rates("spec").gpu_bandwidth) == (440e9, 600e9)
    data["rates"]["published"] = {"source": "me"}
    with pytest.raises(UnknownName, match="rate set 'published'"):
        load(data)


def test_capacities_and_exchange_of_a_rate_set(data: dict[str, Any], tmp_path: Path) -> None:
    """A rate set may state capacities and what an exchange costs; they survive a saved file."""
    data["rates"]["measured"] = {
        "source": "me", "gpu_capacity": "22 GiB", "cpu_capacity": "100 GB", "peer_bandwidth": "40 GB/s", "peer_s": 5e-6,
        "cpu_experts": [[1, "1 GFLOP/s"], [64, "200 GFLOP/s"]], "gpu_decode_attention": "250 GB/s",
        "cpu_weight_bandwidth": "60 GB/s",
    }  # fmt: skip
    rates = load(data).rates("measured")
    assert (rates.gpu_capacity, rates.cpu_capacity) == (22 * 2**30, 100e9)
    assert (rates.peer_bandwidth, rates.peer_s) == (40e9, 5e-6)
    assert (rates.cpu_experts.at(64), rates.gpu_decode_attention.peak, rates.cpu_weight_bandwidth) == (
        200e9,
        250e9,
        60e9,
    )
    load(data).save(tmp_path / "m.json")
    assert Hardware.from_file(tmp_path / "m.json").rates("measured") == rates
    data["rates"]["measured"]["gpu_capacity"] = "22 GB/s"
    with pytest.raises(InvalidConfig, match="'gpu_capacity'"):
        load(data)


@pytest.mark.parametrize("name", ["gpu_bandwidth", "task_s", "cores"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_rates_are_not_negative(l4: Hardware, name: str, value: float) -> None:
    """A negative or undefined rate is refused with its name and value."""
    with pytest.raises(InvalidConfig, match=f"rate '{name}' must be >=? 0: {value}"):
        replace(l4.spec_rates(), **{name: value})


@pytest.mark.parametrize("name", ["h2d_bandwidth", "dram_bandwidth", "gpu_bandwidth", "cpu_attention_flops"])
def test_a_bandwidth_of_zero_is_refused(data: dict[str, Any], name: str) -> None:
    """A rate that something is divided by must be positive in a file too."""
    data["rates"] = {"measured": {"source": "me", name: 0}}
    with pytest.raises(InvalidConfig, match=name):
        load(data)


# -- refusals -----------------------------------------------------------------------------------------


def test_unknown_keys_are_named(data: dict[str, Any]) -> None:
    """A stray key at any depth is refused by name."""
    for place in (
        data,
        data["levels"]["gpu"],
        data["levels"]["gpu"]["capacity"],
        data["links"][0],
        data["rates"]["paper"],
    ):
        place["colour"] = 1
        with pytest.raises(UnknownName, match="'colour'"):
            load(data)
        del place["colour"]
    assert load(data).gpu.name == "gpu"


def test_missing_keys_are_named(data: dict[str, Any]) -> None:
    """A missing key at any depth is refused by name."""
    for place, key in (
        (data, "levels"),
        (data, "links"),
        (data["levels"]["cpu"], "bandwidth"),
        (data["levels"]["cpu"], "processor"),
        (data["levels"]["cpu"]["bandwidth"], "source"),
        (data["levels"]["cpu"]["bandwidth"], "value"),
        (data["links"][0], "source"),
        (data["rates"]["paper"], "source"),
    ):
        kept = place.pop(key)
        with pytest.raises(InvalidConfig, match=f"lacks '{key}'"):
            load(data)
        place[key] = kept


@pytest.mark.parametrize("level", ["gpu", "cpu"])
def test_both_levels_are_needed(data: dict[str, Any], level: str) -> None:
    """A machine without a GPU level or without a CPU level is refused by the level's name."""
    del data["levels"][level]
    data["links"], data["rates"] = [], {}
    with pytest.raises(InvalidConfig, match=f"lacks the memory level '{level}'"):
        load(data)


def test_links_must_lead_somewhere(data: dict[str, Any]) -> None:
    """A link to a level that is not there is refused with both ends."""
    data["links"][0]["target"] = "disk"
    with pytest.raises(InvalidConfig, match="links unknown levels cpu->disk"):
        load(data)


def test_a_missing_direction_is_named(l4: Hardware) -> None:
    """Asking for a link that is not there is answered with those that are."""
    with pytest.raises(UnknownName, match=r"link 'gpu->disk'.*Known: cpu->gpu, gpu->cpu"):
        l4.link("gpu", "disk")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("capacity", "24 GB/s"),
        ("bandwidth", "300 GB"),
        ("peak_flops", "242 TB/s"),
        ("capacity", 0),
        ("capacity", "-1 GB"),
    ],
)
def test_a_wrong_unit_is_refused_by_level(data: dict[str, Any], key: str, value: Any) -> None:
    """A number in another quantity's unit is refused, and the message says where it stands."""
    data["levels"]["gpu"][key]["value"] = value
    with pytest.raises(InvalidConfig, match="level 'gpu'"):
        load(data)


def test_a_bare_number_is_refused(data: dict[str, Any]) -> None:
    """A number without a source is not accepted."""
    data["levels"]["gpu"]["capacity"] = "24 GB"
    with pytest.raises(InvalidConfig, match=r"written \{value = ..., source = ...\}, not '24 GB'"):
        load(data)


def test_an_unknown_provenance_or_set_is_refused(data: dict[str, Any]) -> None:
    """Provenances and rate sets come from a fixed list, and ``spec`` is derived, never stated."""
    bad = copy.deepcopy(data)
    bad["levels"]["gpu"]["capacity"]["provenance"] = "guessed"
    with pytest.raises(UnknownName, match="guessed"):
        load(bad)
    for name in ("guessed", "spec"):
        bad = copy.deepcopy(data)
        bad["rates"][name] = bad["rates"]["paper"]
        with pytest.raises(UnknownName, match=f"rate set '{name}'"):
            load(bad)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gpu_gemm", "104 GB/s"),
        ("gpu_gemm", [[2, 1e9], [1, 2e9]]),
        ("gpu_gemm", [[1, 1e9], [1, 2e9]]),
        ("gpu_gemm", []),
        ("gpu_gemm", [[1, 0]]),
        ("gpu_gemm", [1, 2]),
        ("h2d_bandwidth", "16 GiB"),
        ("task_s", "-1 us"),
        ("cores", "two"),
    ],
)
def test_a_bad_rate_is_refused_by_set(data: dict[str, Any], key: str, value: Any) -> None:
    """A rate of the wrong unit or shape is refused, and the message says in which set."""
    data["rates"]["paper"][key] = value
    with pytest.raises(InvalidConfig, match="rates 'paper'"):
        load(data)


@pytest.mark.parametrize(
    ("key", "value"), [("links", 5), ("rates", 5), ("rates", {"paper": 5}), ("levels", {"gpu": 5})]
)
def test_a_table_is_a_table(data: dict[str, Any], key: str, value: Any) -> None:
    """A number where a table belongs is refused in one line."""
    with pytest.raises(HrmError):
        load({**data, key: value})


@pytest.mark.parametrize(
    ("name", "content"), [("x.toml", b"title = "), ("x.json", b"{"), ("x.json", b"[1]"), ("x.json", b"3")]
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    """A file that does not parse, or holds no table, is refused by its path."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidConfig, match=name):
        Hardware.from_file(tmp_path / name)


@pytest.mark.parametrize("name", ["x.toml", "x.json"])
def test_a_file_that_is_not_text_is_refused(tmp_path: Path, name: str) -> None:
    """A binary file is refused in one line."""
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidConfig, match=r"does not parse|is not text"):
        Hardware.from_file(tmp_path / name)


def test_a_missing_file_and_an_unknown_name(tmp_path: Path) -> None:
    """A path that is not there is refused by path, an unknown name with the nearest."""
    with pytest.raises(InvalidConfig, match="cannot read hardware file"):
        Hardware.from_catalog(str(tmp_path / "none.json"))
    with pytest.raises(UnknownName, match="Did you mean 'gcp-l4-1x'"):
        Hardware.from_catalog("gcp-l4")


@pytest.mark.parametrize("value", ["false", 0, 1, None, []])
def test_shared_memory_is_true_or_false(data: dict[str, Any], value: Any) -> None:
    """A text or a number where true or false belongs is refused with its value."""
    with pytest.raises(InvalidConfig, match=r"'shared_memory' must be true or false: "):
        load({**data, "shared_memory": value})


def test_facts_are_a_table(data: dict[str, Any]) -> None:
    """Facts that are no table are refused."""
    with pytest.raises(InvalidConfig, match="'facts' must be a table: 'none'"):
        load({**data, "facts": "none"})


@pytest.mark.parametrize("value", ["", "  ", 3, None, ["NVIDIA"]])
def test_a_source_is_a_text(data: dict[str, Any], value: Any) -> None:
    """A source that says nothing is refused where it stands: of a number, of a rate set and of a measurement."""
    number = data["levels"]["gpu"]["capacity"]
    number |= {"measured": 23e9, "measured_source": "a paper"}
    for place, key, where in (
        (number, "source", "level 'gpu', 'capacity'"),
        (number, "measured_source", "level 'gpu', 'capacity'"),
        (data["rates"]["paper"], "source", "rates 'paper'"),
    ):
        kept, place[key] = place[key], value
        with pytest.raises(InvalidConfig, match=f"{where}: '{key}' must be a text that is not empty"):
            load(data)
        place[key] = kept


def test_a_link_stands_once(data: dict[str, Any]) -> None:
    """A second link of the same direction is refused by its ends."""
    data["links"].append(copy.deepcopy(data["links"][0]))
    with pytest.raises(InvalidConfig, match="link cpu->gpu occurs twice"):
        load(data)


@pytest.mark.parametrize(("kept", "missing"), [("cpu", "gpu->cpu"), ("gpu", "cpu->gpu")])
def test_both_directions_are_needed(data: dict[str, Any], kept: str, missing: str) -> None:
    """A file without a link between host and GPU is refused with what to add."""
    data["links"] = [link for link in data["links"] if link["source"] == kept]
    source = missing.split("->")[0]
    with pytest.raises(InvalidConfig, match=f"lacks the link {missing}; add .* source = '{source}', target"):
        load(data)


def test_a_bad_link_is_named(data: dict[str, Any]) -> None:
    """What is wrong with a link is said with its ends, or with its number where an end is missing."""
    data["links"][1]["bandwidth"]["value"] = "16 GB"
    with pytest.raises(InvalidConfig, match="link gpu->cpu, 'bandwidth': '16 GB' is not a bandwidth"):
        load(data)
    data["links"][1]["target"] = ["cpu"]
    with pytest.raises(InvalidConfig, match="'target' must be a text"):
        load(data)
    del data["links"][1]["target"]
    with pytest.raises(InvalidConfig, match="link 2 lacks 'target'"):
        load(data)


def test_a_further_level_is_kept(data: dict[str, Any]) -> None:
    """A disk with its link is read and saved like the other levels."""
    data["levels"]["disk"] = copy.deepcopy(data["levels"]["cpu"])
    data["links"].append({**copy.deepcopy(data["links"][0]), "source": "disk", "target": "cpu"})
    machine = load(data)
    assert [level.name for level in machine.levels] == ["gpu", "cpu", "disk"]
    assert load(machine.to_dict()) == machine


HUGE = [
    pytest.param(10**400, id="1e400"),
    float("inf"),
    1e400,
    "1e999 GB",
    pytest.param("9" * 400 + " GB", id="digits"),
]


@pytest.mark.parametrize("value", HUGE)
def test_numbers_without_end_are_refused(data: dict[str, Any], value: Any) -> None:
    """A number that no double holds is one short line, in a level, a link and a rate set."""
    places = [
        (data["levels"]["gpu"]["capacity"], "value"),
        (data["rates"]["paper"], "gpu_capacity"),
    ]
    if not isinstance(value, str):
        places += [
            (data["links"][0]["bandwidth"], "value"),
            (data["rates"]["paper"], "gpu_gemm"),
            (data["rates"]["paper"], "task_s"),
        ]
    for place, key in places:
        kept, place[key] = place.get(key), value
        with pytest.raises(InvalidConfig, match="must be a finite number > 0") as caught:
            load(data)
        assert len(str(caught.value)) < 250
        place[key] = kept
        if kept is None:
            del place[key]


@pytest.mark.parametrize("value", [pytest.param(10**400, id="1e400"), float("inf"), float("nan"), True, "1"])
def test_sizes_of_a_curve_are_finite_numbers(data: dict[str, Any], value: Any) -> None:
    """A size on a curve, or a number of cores, that is no finite number is refused by the curve."""
    for key, curve in (("gpu_gemm", [[value, 1e9]]), ("cores", [[1, 1], [2, value]])):
        with pytest.raises(InvalidConfig, match=f"rates 'paper', '{key}'"):
            load({**data, "rates": {"paper": {"source": "me", key: curve}}})


def test_the_number_of_gpus_has_a_limit(data: dict[str, Any]) -> None:
    """More GPUs than any machine has are refused."""
    with pytest.raises(InvalidConfig, match="'num_gpus' must be <= 10000"):
        load({**data, "num_gpus": 10**400})


TOML = Path(str(resources.files("hrm.catalog") / "hardware" / "gcp-l4-1x.toml"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"24 GB"', "24", "level 'gpu', 'capacity': 24 has no unit; write it like '24 GB'"),
        ('"24 GB"', "24.0e9", "'capacity': 24000000000.0 has no unit"),
        ('"300 GB/s"', "300", "level 'gpu', 'bandwidth': 300 has no unit; write it like '300 GB/s'"),
        ('"1.3 TFLOP/s"', "1.3", "level 'cpu', 'peak_flops': 1.3 has no unit; write it like '65 TFLOP/s'"),
        ('"16 GB/s"', "16", "link cpu->gpu, 'bandwidth': 16 has no unit"),
        ('"285 GiB/s"', "285", "rates 'paper', 'gpu_bandwidth': 285 has no unit"),
        ('gpu_gemm = "104 TFLOP/s"', "gpu_gemm = [[1, 104]]", "rates 'paper', 'gpu_gemm': 104 has no unit"),
    ],
)
def test_numbers_in_toml_have_units(tmp_path: Path, old: str, new: str, words: str) -> None:
    """A plain number where a unit belongs is refused in a TOML file, with how to write it."""
    text = TOML.read_text()
    assert old in text
    (tmp_path / "mine.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(InvalidConfig) as caught:
        Hardware.from_file(tmp_path / "mine.toml")
    assert words in str(caught.value)


def test_overheads_of_zero_and_cores_need_no_unit_in_toml(tmp_path: Path) -> None:
    """No time is no time in any unit, and cores have none."""
    (tmp_path / "mine.toml").write_text(TOML.read_text() + "task_s = 0\ncores = [[1, 1], [4, 2.5]]\n")
    rates = Hardware.from_file(tmp_path / "mine.toml").rates("paper")
    assert (rates.task_s, rates.cores) == (0.0, Curve(((1.0, 1.0), (4.0, 2.5))))


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.toml", "num_gpus = " + "9" * 5000), ("x.json", "9" * 5000), ("x.json", "[" * 100_000)],
    ids=["toml digits", "json digits", "json nesting"],
)
def test_files_that_defeat_the_parser_are_refused(tmp_path: Path, name: str, content: str) -> None:
    """Numbers and nesting beyond what the parsers take are one line."""
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidConfig, match=f"{name}' does not parse"):
        Hardware.from_file(tmp_path / name)


@pytest.mark.parametrize("read", [catalog.load_hardware, catalog.load_model, catalog.load_workload])
def test_empty_names_and_folders_are_refused(tmp_path: Path, read: Any) -> None:
    """An empty name and a folder that holds nothing of the kind are refused with what to give instead."""
    for name in ("", " "):
        with pytest.raises(InvalidValue, match="is empty; give a catalog name such as"):
            read(name)
    with pytest.raises(InvalidConfig, match=r"folder.* name a .* or a catalog name"):
        read(str(tmp_path))


# -- curves -------------------------------------------------------------------------------------------

points = st.lists(st.floats(0.5, 1e4), min_size=1, max_size=8, unique=True).flatmap(
    lambda xs: st.lists(st.floats(1e9, 1e15), min_size=len(xs), max_size=len(xs)).map(
        lambda ys: tuple(zip(sorted(xs), ys, strict=True))
    )
)


@given(points, st.lists(st.floats(0.1, 2e4), min_size=1, max_size=10))
def test_scalar_and_array_interpolation_agree(curve_points, sizes: list[float]) -> None:
    """A curve gives the same rate for a number and for an array of numbers."""
    curve = Curve(curve_points)
    each = [curve.at(size) for size in sizes]
    assert np.allclose(curve.at(np.array(sizes)), each, rtol=1e-9)


@given(points)
def test_a_curve_passes_through_its_points(curve_points) -> None:
    """A curve has its own value at each point and is constant outside them."""
    curve = Curve(curve_points)
    assert all(curve.at(x) == pytest.approx(y, rel=1e-8) for x, y in curve_points)
    assert curve.at(0) == curve_points[0][1]
    assert curve.at(10**6) == curve_points[-1][1]
    assert curve.peak == max(y for _, y in curve_points)


def test_a_curve_is_linear_between_points() -> None:
    """Halfway in size is halfway in rate: linear, not logarithmic."""
    curve = Curve(((1.0, 10.0), (101.0, 1010.0)))
    assert curve.at(51) == pytest.approx(510.0)
    assert curve.at(np.array([1, 51, 101])).tolist() == pytest.approx([10.0, 510.0, 1010.0])


@pytest.mark.parametrize("bad", [(), ((2.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 2.0)), ((1.0, 0.0),), ((1.0, -1.0),)])
def test_bad_curves_are_refused(bad) -> None:
    """A curve without points, out of order, or with a rate that is not positive is refused."""
    with pytest.raises(InvalidConfig):
        Curve(bad)


def test_prints_its_levels(l4: Hardware) -> None:
    """The text form lists levels and links, one per line; the notebook form is a list of the same."""
    lines = str(l4).splitlines()
    assert lines[0].startswith("gcp-l4-1x: S2")
    assert "  cpu->gpu: 16 GB/s" in lines
    assert l4._repr_html_().count("<li>") == len(lines) - 1


def test_plain_form_is_json(data: dict[str, Any]) -> None:
    """The plain form is made of JSON types only, numbers in SI."""
    assert json.loads(json.dumps(data)) == data
    assert data["levels"]["gpu"]["capacity"]["value"] == 24 * 10**9
