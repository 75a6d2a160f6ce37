"""`hrm run` as a batch job: what it writes, reports and refuses, and what a kill or a full disk leaves behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.options import PACED_LINK
from experiments.results import Results
from hrm.errors import HrmError, InvalidValue
from hrm.systems import SYSTEMS
from hrm.units import parse_bandwidth

torch = pytest.importorskip("torch")

GIVEN = ["--batch-size", "4", "--micro-batch-size", "2"]
GOOD = '{"id": "a", "prompt_ids": [1, 2]}\n'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral-tiny checkpoint whose weights are large enough for clear-cut logits."""
    from executor.checkpoint import make_checkpoint
    from hrm.catalog import model_config

    config = model_config("mixtral-tiny") | {"initializer_range": 0.08}
    return make_checkpoint(config, tmp_path_factory.mktemp("checkpoint") / "tiny", seed=3)


@pytest.fixture
def run(hrm: Any, checkpoint: Path) -> Any:
    """Runs `hrm run` on the tiny checkpoint with a given policy."""

    def call(*args: object, policy: Any = GIVEN) -> SimpleNamespace:
        base = ("run", "--checkpoint", checkpoint, "--link-bandwidth", "none", "--device", "cpu", *policy)
        return hrm(*base, "--gen-len", 4, *args)

    return call


def lines_of(file: Path) -> dict[str | int, Any]:
    """The lines of a file of answers by id; every id stands in one of them."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {line["id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def test_run_reports_and_writes(run: Any, tmp_path: Path) -> None:
    """A run writes one line per request and reports the keys of the contract."""
    out, timeline, trace = tmp_path / "o.jsonl", tmp_path / "l.json", tmp_path / "t.json"
    files = ("--out", out, "--timeline", timeline, "--trace", trace)
    done = run("--random-prompts", "6,8", "--ignore-eos", *files, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert {"throughput_tok_s", "prefill_s", "decode_s", "peak_memory", "utilization", "policy"} <= set(result)
    assert (result["generated_tokens"], result["batches"], result["segments"]) == (24, 2, 2)
    assert (result["device"], result["link_bandwidth"], result["system"]) == ("cpu", None, "moe-lightning")
    assert (result["skipped"], result["rejected"], done.err) == (0, [], "")
    lines = lines_of(out)
    assert sorted(lines) == list(range(6))
    assert all(len(line["output_ids"]) == 4 and line["text"] is None for line in lines.values())
    assert json.loads(timeline.read_text())["source"] == "measured"
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize("draws", [(), ("--temperature", 1.5, "--top-p", 0.9)])
def test_killed_run_resumes_to_the_same_outputs(run: Any, tmp_path: Path, draws: tuple[object, ...]) -> None:
    """After a kill, finished requests stay, the torn line goes, and the rest comes out as it would have."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    args = ("--random-prompts", "6,8", "--seed", 5, *draws)
    assert run(*args, "--out", whole).code == 0
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[1:3]) + lines[3][:20])
    done = run(*args, "--out", cut, "--resume", "--json")
    assert json.loads(done.out)["skipped"] == 2
    assert sorted(cut.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    again = run(*args, "--out", cut, "--resume")
    assert again.code == 0 and "nothing left to do" in again.out
    again = json.loads(run(*args, "--out", cut, "--resume", "--json").out)
    assert (again["skipped"], again["segments"], again["system"]) == (6, 0, "moe-lightning")


@pytest.mark.parametrize("other", [("--temperature", 0.5), ("--seed", 9), ("--gen-len", 3)])
def test_a_file_of_another_job_is_not_gone_on_with(run: Any, tmp_path: Path, other: tuple[object, ...]) -> None:
    """Answers drawn otherwise are not mixed into one file; without a note of the job beside it the file is believed."""
    out = tmp_path / "o.jsonl"
    assert run("--random-prompts", "2,8", "--out", out).code == 0
    written = out.read_text()
    done = run("--random-prompts", "3,8", "--out", out, "--resume", *other)
    assert done.code == 2 and other[0].strip("-").replace("-", "_") in done.err and out.read_text() == written
    out.with_name("o.jsonl.job.json").unlink()
    assert run("--random-prompts", "3,8", "--out", out, "--resume", *other).code == 0


def test_answers_are_kept_as_requests_finish(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the second batch leaves the answers of the first, and --resume gives the rest, none twice."""
    out, whole = tmp_path / "o.jsonl", tmp_path / "whole.jsonl"
    args = ("--random-prompts", "6,8", "--ignore-eos")
    assert run(*args, "--out", whole).code == 0
    _fail_in_segment(monkeypatch, 2, KeyboardInterrupt())
    done = run(*args, "--out", out)
    assert done.code == 130 and sorted(lines_of(out)) == [0, 1, 2, 3]
    monkeypatch.undo()
    assert run(*args, "--out", out, "--resume").code == 0
    assert lines_of(out) == lines_of(whole)


def _fail_in_segment(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let the experts of the `number`-th segment's first decode step raise `error`."""
    from executor.compute import Compute

    post_attention, seen = Compute.post_attention, []

    def fail(self: Any, step: int, layer: int, part: int, ready: float) -> None:
        if (step, layer, part) == (1, 0, 0):
            seen.append(step)
            if len(seen) == number:
                raise error
        post_attention(self, step, layer, part, ready)

    monkeypatch.setattr(Compute, "post_attention", fail)


def test_out_of_memory_keeps_what_is_finished(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that runs out of memory in the second batch: one line with a smaller size; the first batch is kept."""
    out = tmp_path / "o.jsonl"
    _fail_in_segment(monkeypatch, 2, torch.cuda.OutOfMemoryError("no more"))
    done = run("--random-prompts", "6,8", "--ignore-eos", "--out", out)
    assert done.code == 3 and done.err.count("\n") == 1
    assert "out of memory with micro-batches of 2; try --micro-batch-size 1." in done.err
    assert sorted(lines_of(out)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--batch-size", "8", "--micro-batch-size", "8"], "with micro-batches of 6; try --micro-batch-size 3."),
        (["--batch-size", "4", "--micro-batch-size", "1"], "try a smaller --weights-on-gpu or --kv-on-gpu."),
        (["--batch-size", "4", "--system", "deepspeed-zero"], "with batches of 4; try --batch-size 2."),
    ],
)
def test_the_size_to_try_is_less_than_what_ran(
    run: Any, monkeypatch: pytest.MonkeyPatch, options: list[str], hint: str
) -> None:
    """The suggestion halves the micro-batches that there were, which may be fewer than the policy's."""
    _fail_in_segment(monkeypatch, 1, torch.cuda.OutOfMemoryError("no more"))
    assert hint in run("--random-prompts", "6,8", policy=options).err


def test_out_of_memory_for_weights_is_one_line(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device too small for the weights is refused with a smaller share, and leaves no results."""

    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("no more")

    out = tmp_path / "o.jsonl"
    monkeypatch.setattr("executor.engine.WeightStore", full)
    done = run("--random-prompts", "6,8", "--out", out, policy=["--batch-size", "4", "--weights-on-gpu", "0.5"])
    assert done.code == 3 and done.err.count("\n") == 1 and not out.exists()
    assert "out of memory for the weights of tiny; try --weights-on-gpu 0.25" in done.err


def test_existing_outputs_are_not_touched(run: Any, tmp_path: Path) -> None:
    """Without --resume a file with content is refused, and a file of another kind always."""
    out = tmp_path / "o.jsonl"
    out.write_text("notes of mine")
    for options, words in (([], "--resume"), (["--resume"], "another --out")):
        done = run("--random-prompts", "2,4", "--out", out, *options)
        assert done.code == 2 and words in done.err
    assert out.read_text() == "notes of mine"
    out.write_text('{"id": 1, "answer": 42}\n')
    assert "line 1 is not an output line" in run("--random-prompts", "2,4", "--out", out, "--resume").err


def test_a_file_has_one_writer(run: Any, tmp_path: Path) -> None:
    """A second run on the same file is refused while the first one is at work."""
    pytest.importorskip("fcntl")
    out = tmp_path / "o.jsonl"
    with Results(out, resume=False):
        done = run("--random-prompts", "2,4", "--out", out, "--resume")
    assert done.code == 2 and "is being written by another run" in done.err


BAD_LINES = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"prompt_ids": [1]}', "'id'"),
    ('{"id": "b"}', "'prompt_ids' or 'prompt'"),
    ('{"id": "b", "prompt": "hello"}', "no tokenizer"),
    ('{"id": "b", "prompt": 5}', "must be a string"),
    ('{"id": "b", "prompt_ids": [1, 2.5]}', "whole numbers"),
    ('{"id": "b", "prompt_ids": [true]}', "whole numbers"),
    ('{"id": "b", "prompt_ids": []}', "empty"),
    ('{"id": "b", "prompt_ids": [256]}', "0..255: 256"),
    ('{"id": "b", "prompt_ids": [3, -1]}', "0..255: -1"),
    ('{"id": "a", "prompt_ids": [1]}', "line 1 already"),
    ('{"id": "b", "prompt_ids": [1], "gen_len": 0}', "'gen_len'"),
    ('{"id": "b", "prompt_ids": [1], "gen_len": 5}', "from 1 to --gen-len 4: 5"),
    ('{"id": "b", "prompt_ids": [1], "gen_len": "2"}', "'gen_len'"),
    (json.dumps({"id": "b", "prompt_ids": [1] * 600}), "512 positions"),
]


@pytest.mark.parametrize(("line", "words"), [case for case in BAD_LINES if "already" not in case[1]])
def test_a_bad_line_alone_is_refused(run: Any, tmp_path: Path, line: str, words: str) -> None:
    """A file without a single good line is one line of error that names its lines, and leaves no results."""
    file, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    file.write_text(f"\n{line}\n")
    done = run("--prompts", file, "--out", out)
    assert done.code == 2 and done.err.count("\n") == 1 and not out.exists()
    assert "p.jsonl': 1 of 1 lines cannot be run: line 2: " in done.err
    assert words in done.err


def test_bad_lines_are_named_and_the_rest_is_run(run: Any, tmp_path: Path) -> None:
    """Blank lines count but do not matter; every bad line stands in the last line, with its number and reason."""
    file, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    bad = [line for line, _ in BAD_LINES]
    file.write_text("\ufeff" + GOOD + "\n" + "\n".join(bad[:8]) + '\n{"id": "z", "prompt_ids": [9]}\n')
    done = run("--prompts", file, "--out", out, "--json")
    assert done.code == 0 and sorted(lines_of(out)) == ["a", "z"]
    early, last = done.err.splitlines()
    assert early.startswith("8 of 10 lines will not be run: line 3: not JSON")
    assert last.startswith("8 of 10 lines were not run: line 3: not JSON")
    rejected = json.loads(done.out)["rejected"]
    assert [each["line"] for each in rejected] == list(range(3, 11))
    for each, (_, words) in zip(rejected, BAD_LINES, strict=False):
        assert words in each["error"] and f"line {each['line']}: {each['error'].rstrip('.')}" in last


def test_many_bad_lines_make_one_short_line(run: Any, tmp_path: Path) -> None:
    """Ten are named and the others counted; the object with --json has all of them."""
    file = tmp_path / "p.jsonl"
    file.write_bytes(GOOD.encode() + b"\xff\n" * 30 + b'{"id": 2, "prompt_ids": [1' + b"0" * 5000 + b"]}\n")
    done = run("--prompts", file, "--json")
    last = done.err.splitlines()[-1]
    assert last.startswith("31 of 32 lines were not run: line 2: ") and last.endswith(", and 21 more")
    assert len(json.loads(done.out)["rejected"]) == 31 and len(last) < 1500


def test_a_resumed_file_names_its_bad_lines_again(run: Any, tmp_path: Path) -> None:
    """Where nothing is left to do, the bad lines are still said."""
    file, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    file.write_text(GOOD + "{\n")
    assert run("--prompts", file, "--out", out).code == 0
    again = run("--prompts", file, "--out", out, "--resume")
    assert again.code == 0 and "nothing left to do" in again.out
    assert again.err.splitlines()[-1].startswith("1 of 2 lines were not run: line 2: not JSON")


def test_a_file_without_lines_is_refused(run: Any, tmp_path: Path) -> None:
    """An empty file is an error, not a job without work."""
    file = tmp_path / "p.jsonl"
    file.write_text("\n \n")
    assert "holds no prompts" in run("--prompts", file).err


def test_requests_may_have_a_length_of_their_own(run: Any, tmp_path: Path) -> None:
    """ "gen_len" in a line bounds its answer; --gen-len is for the others."""
    file, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    own = [1, 4, None, 2, 3, None, 1]
    entries = [{"id": i, "prompt_ids": [i + 1, 2]} | ({"gen_len": n} if n else {}) for i, n in enumerate(own)]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert run("--prompts", file, "--out", out, "--ignore-eos").code == 0
    lines = lines_of(out)
    assert [len(lines[i]["output_ids"]) for i in range(7)] == [n or 4 for n in own]


def test_text_goes_in_and_out_through_the_checkpoints_tokenizer(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    """With a byte-pair tokenizer beside the weights, text is encoded as it says, and answers are decoded."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "with-tokenizer"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    # Fewer tokens than the model has: ids that the tokenizer does not know come out as nothing.
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}')
    text = "the lazy fox jumps"
    ids = tokenizer.encode(text).ids
    assert 1 < len(ids) < len(text)
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    entries = [{"id": "a", "prompt": text}, {"id": "b", "prompt_ids": ids}, {"id": "c", "prompt": ""}]
    # Half of a surrogate pair is valid JSON and no text.
    prompts.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"id": "d", "prompt": "\\ud800"}\n')
    done = run("--checkpoint", folder, "--prompts", prompts, "--ignore-eos", "--out", out, "--gen-len", 12)
    assert done.code == 0, done.err
    assert "line 3: the prompt is empty, line 4: the tokenizer does not take this text" in done.err.splitlines()[-1]
    lines = lines_of(out)
    assert lines["a"]["output_ids"] == lines["b"]["output_ids"] and len(lines["a"]["output_ids"]) == 12
    known = [token for token in lines["a"]["output_ids"] if 2 <= token < tokenizer.get_vocab_size()]
    assert lines["a"]["text"] == tokenizer.decode(known)


def test_run_needs_its_arguments(run: Any, hrm: Any, tmp_path: Path) -> None:
    """Prompts from nowhere or twice, a checkpoint that is none, and too small a device are one line each."""
    some = ("--random-prompts", "3,4")
    for args, words, code in (
        ((), "--prompts", 2),
        (("--random-prompts", "3"), "'16,128'", 2),
        ((*some, "--resume"), "--out", 2),
        (("--random-prompts", "3,600"), "512 positions", 2),
        ((*some, "--system", "flexgenn"), "Did you mean 'flexgen'", 2),
        ((*some, "--system", "flexgen", "--attention-on-gpu", 0), "--attention-on-gpu 1", 2),
        ((*some, "--system", "deepspeed-zero"), "no micro-batches", 2),
        ((*some, "--temperature", -1), "'temperature' must be >= 0", 2),
        ((*some, "--temperature", "nan"), "'temperature' must be >= 0", 2),
        ((*some, "--temperature", 1, "--top-p", 0), "'top_p' must be > 0", 2),
        ((*some, "--top-p", 0.5), "--top-p needs --temperature", 2),
        ((*some, "--seed", -1), "'--seed'", 2),
        ((*some, "--device-memory", "1MiB"), "device memory", 3),
    ):
        done = run(*args)
        assert done.code == code and done.err.count("\n") == 1 and words in done.err, args
    done = hrm("run", "--checkpoint", tmp_path / "none", "--random-prompts", "1,1", "--gen-len", 1)
    assert done.code == 2 and "is not a folder" in done.err


def test_every_system_gives_the_same_answers(run: Any, tmp_path: Path) -> None:
    """A batch size is policy enough for any of them: what a system leaves no choice about is filled in."""
    answers = []
    for system in SYSTEMS:
        out = tmp_path / f"{system}.jsonl"
        extra = ("--pinned-weights",) if system == "fastdecode" else ()
        done = run("--random-prompts", "6,8", "--system", system, "--out", out, *extra, policy=["--batch-size", "4"])
        assert done.code == 0, done.err
        assert f"  system      {system}\n" in done.out
        answers.append(lines_of(out))
    assert all(each == answers[0] for each in answers)


@pytest.mark.parametrize("system", SYSTEMS)
def test_policy_is_planned_from_a_hardware_file(hrm: Any, checkpoint: Path, system: str) -> None:
    """Without policy options the system's own rule decides, here for a machine of the catalog."""
    done = hrm(
        "run", "--checkpoint", checkpoint, "--random-prompts", "4,6", "--gen-len", 2, "--system", system,
        "--hardware", "cpu-2core", "--device", "cpu", "--link-bandwidth", "none", "--device-memory", "64MiB", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["policy"]["batch_size"] <= 4 and result["system"] == system


def test_default_link_pace_is_the_executors(run: Any) -> None:
    """The pace shown in the help is the one that the executor uses on its own, and the report names it."""
    from executor.lanes import DEFAULT_LINK_BANDWIDTH

    assert parse_bandwidth(PACED_LINK) == DEFAULT_LINK_BANDWIDTH
    done = run("--random-prompts", "2,4", "--link-bandwidth", "3GB/s")
    assert "paced to 3 GB/s (no GPU: stand-in for PCIe)" in done.out


def test_the_seed_is_of_prompts_and_of_draws(run: Any, tmp_path: Path) -> None:
    """The same seed gives the same answers; draws follow the id of a request and not its place in the file."""
    file, turned = tmp_path / "p.jsonl", tmp_path / "turned.jsonl"
    entries = [json.dumps({"id": i, "prompt_ids": [7, 8, 9]}) + "\n" for i in range(6)]
    file.write_text("".join(entries))
    turned.write_text("".join(reversed(entries)))
    found = []
    for prompts, seed in ((file, 1), (file, 1), (turned, 1), (file, 2)):
        out = tmp_path / f"{len(found)}.jsonl"
        drawn = ("--temperature", 2, "--seed", seed, "--ignore-eos", "--out", out)
        assert run("--prompts", prompts, *drawn).code == 0
        found.append(lines_of(out))
    assert found[0] == found[1] == found[2] != found[3]
    assert len({tuple(line["output_ids"]) for line in found[0].values()}) > 1


# -- the file of results -------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(run: Any) -> None:
    """The file, the reason and the number of answers that are kept."""
    done = run("--random-prompts", "6,8", "--out", "/dev/full")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "cannot write '/dev/full': No space left on device; 0 answers" in done.err
    assert Path("/dev/full").exists()


def test_a_disk_that_fills_up_keeps_what_was_written(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lines stay, the part of a line goes, and with room again --resume gives what an undisturbed run gives."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    args = ("--random-prompts", "6,8")
    assert run(*args, "--out", whole).code == 0
    write, room = os.write, [len(whole.read_bytes()) // 2]

    def full(fd: int, data: Any) -> int:
        if os.path.realpath(f"/proc/self/fd/{fd}") != str(out.resolve()):
            return write(fd, data)
        if not room[0]:
            raise OSError(28, "No space left on device")
        count = write(fd, bytes(data)[: room[0]])
        room[0] -= count
        return count

    monkeypatch.setattr(os, "write", full)
    done = run(*args, "--out", out)
    monkeypatch.undo()
    kept = len(lines_of(out))
    assert done.code == 2 and done.err.count("\n") == 1 and 0 < kept < 6
    assert f"cannot write {str(out)!r}: No space left on device; {kept} answers are kept in it" in done.err
    assert run(*args, "--out", out, "--resume").code == 0
    assert lines_of(out) == lines_of(whole)


def test_a_device_as_results_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only an empty file that the run itself made is removed when it ends without answers."""
    removed: list[Path] = []
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: removed.append(self))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.touch()
    for path in (Path(os.devnull), theirs, ours):
        with Results(path, resume=True):
            pass
    assert removed == [ours]
    with Results(Path(os.devnull), resume=False) as results:
        results.write([1], [[2]])
    assert removed == [ours]


def test_the_disk_is_waited_for_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are in the file at once; the call that waits for the disk comes once a second and at the end."""
    clock, syncs = [0.0], []
    monkeypatch.setattr("experiments.results.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "fsync", lambda fd: syncs.append(clock[0]))
    out = tmp_path / "o.jsonl"
    with Results(out, resume=False) as results:
        for tick in range(25):
            clock[0] = tick / 10
            results.write([tick], [[1, 2]])
            assert len(out.read_text().splitlines()) == tick + 1
    assert syncs == [1.0, 2.0, 2.4]


def test_an_error_of_the_disk_itself_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only shows when the disk is waited for ends in the same line; a finished run does not hide it."""

    def broken(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(HrmError, match="Input/output error; 1 answers are kept"):  # noqa: SIM117
        with Results(tmp_path / "o.jsonl", resume=False) as results:
            results.write(["x"], [[1]])


def test_a_torn_line_goes_whatever_its_length(tmp_path: Path) -> None:
    """Cut anywhere, the last line is dropped and the others are known."""
    path = tmp_path / "o.jsonl"
    with Results(path, resume=False) as results:
        results.write(["a", 7], [[1, 2], [3]])
    data = path.read_bytes()
    first = data.index(b"\n") + 1
    for cut in range(first, len(data)):
        path.write_bytes(data[:cut])
        with Results(path, resume=True) as results:
            assert results.done == {"a"}
        assert path.read_bytes() == data[:first]
    path.write_bytes(data[:first] + b"other")
    with pytest.raises(InvalidValue, match="does not end in a line that this command wrote"):
        Results(path, resume=True)
