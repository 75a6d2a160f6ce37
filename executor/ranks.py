"""Processes that work in step: rank 0, which is the caller's own, and the others, which do what it asks for.

Rank 0 starts the others (`launch`), or finds them where a launcher such as torchrun has started all (`join`, and
`follow` on the other ranks). On the CPU, and for the host's lanes, each rank keeps to its share of the cores. When a
process ends before it should, all end within seconds, and rank 0 says which it was.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from executor.families import Shard
from executor.machine import pick_device
from hrm.errors import HrmError, InvalidValue

__all__ = ["Member", "RankLost", "Team", "environment_ranks", "follow", "join", "launch"]

TIMEOUT_S = 600.0
"""Longest wait of a rank for the others in a collective."""

_FOREVER = timedelta(days=30)
_LOST = 75
"""Exit code of a rank that stopped because it lost another one."""
_POLL_S = 0.05
_GRACE_S = 3.0
_PIECE = 1 << 20
"""Elements that are added up in float32 at a time; bounds temporary memory."""


class RankLost(HrmError):
    """A process of a tensor-parallel run that ended or no longer answers."""


@dataclass(frozen=True)
class Member:
    """This process as one rank of a team."""

    rank: int
    world: int
    device: str
    """"cpu" or "cuda"."""
    control: dist.ProcessGroup
    """Carries jobs and answers between runs."""

    @property
    def shard(self) -> Shard:
        """What it holds of a checkpoint."""
        return Shard(self.rank, self.world)

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `tensor`, in place, with the same bits on all of them.

        On the CPU half-precision sums are taken in float32, rounded once.

        Raises
        ------
        RankLost
            If another rank has ended.
        """
        tensor = tensor.contiguous()
        with _collective(self):
            if tensor.is_cuda or tensor.dtype not in (torch.bfloat16, torch.float16):
                dist.all_reduce(tensor)
            else:
                for piece in tensor.view(-1).split(_PIECE):
                    wide = piece.float()
                    dist.all_reduce(wide)
                    piece.copy_(wide)
        return tensor


@contextlib.contextmanager
def _collective(member: Member) -> Iterator[None]:
    """Turn what a backend raises when a peer is gone into `RankLost`."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0].partition("] ")[2] or str(error)
        raise RankLost(f"rank {member.rank} of {member.world} lost contact with the others: {reason[:120]}") from None


# -- the team ------------------------------------------------------------------------------------------


class Team:
    """Rank 0's hold on all ranks; see `launch` and `join`.

    Parameters
    ----------
    member : Member
        Rank 0.
    followers : _Followers, optional
        The processes of the other ranks, where this one has started them.
    """

    def __init__(self, member: Member, followers: _Followers | None = None) -> None:
        self.member, self.world = member, member.world
        self._followers, self._usable = followers, True

    @property
    def follower_ids(self) -> list[int]:
        """Process ids of the ranks that this one has started."""
        return self._followers.ids if self._followers else []

    def call(self, function: Callable[..., Any], *args: Any, **mine: Any) -> list[Any]:
        """Run ``function(member, *args)`` on all ranks, with `mine` on rank 0 only; the answers in order of ranks.

        Parameters
        ----------
        function : callable
            Importable by name; arguments and answers are pickled.

        Raises
        ------
        RankLost
            If a rank ended, saying which. Whatever fails, the team cannot be used again.
        """
        if not self._usable:
            raise RankLost("this team of ranks has ended; start another one.")
        self._usable = False
        try:
            with _collective(self.member):
                dist.broadcast_object_list([(function, args)], src=0, group=self.member.control)
            answer = function(self.member, *args, **mine)
            answers: list[Any] = [None] * self.world
            with _collective(self.member):
                dist.gather_object(None, answers, dst=0, group=self.member.control)
        except RankLost as error:
            cause = self._followers.cause() if self._followers else None
            raise RankLost(
                f"{cause or str(error).rstrip('.')}; all ranks stopped. Answers that were written are kept; "
                "--resume goes on."
            ) from None
        self._usable = True
        return [answer, *answers[1:]]

    def close(self) -> None:
        """End the other ranks and leave the group."""
        if self._usable:
            with contextlib.suppress(RuntimeError):
                dist.broadcast_object_list([None], src=0, group=self.member.control)
        if self._followers:
            self._followers.stop(patience_s=_GRACE_S if self._usable else 0.0)
        self._usable = False
        _leave()


# -- starting and joining ------------------------------------------------------------------------------


def environment_ranks() -> tuple[int, int] | None:
    """(rank, number of ranks) where a launcher such as torchrun has started this process, else None."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    except (KeyError, ValueError):
        return None
    if local != world:
        raise InvalidValue(f"tensor parallelism runs on one machine; this one has {local} of {world} ranks.")
    return rank, world


@contextlib.contextmanager
def launch(world: int, *, device: str | None = None, timeout_s: float = TIMEOUT_S) -> Iterator[Team]:
    """Start ranks 1, 2, .. as processes and be rank 0; they end with the block.

    While it lasts, this process keeps to its share of the cores.

    Parameters
    ----------
    world : int
        Number of ranks, at least 2.
    device : {"cuda", "cpu"}, optional
    timeout_s : float
        Longest wait for a rank that lives but does not answer.

    Yields
    ------
    Team

    Raises
    ------
    InvalidValue
        If there are fewer GPUs than ranks.
    RankLost
        If a process ends before it has joined.
    """
    name = _check(world, device)
    with contextlib.ExitStack() as stack:
        store = _store(0, world)
        followers = _Followers(world, name, store.port, timeout_s)
        stack.callback(followers.stop)
        followers.await_all(store)
        stack.enter_context(_core_share(0, world))
        team = Team(_enter(store, 0, world, name, timeout_s), followers)
        stack.callback(team.close)
        yield team


@contextlib.contextmanager
def join(*, device: str | None = None, timeout_s: float = TIMEOUT_S) -> Iterator[Team]:
    """Be rank 0 of processes that a launcher such as torchrun has started; parameters as those of `launch`."""
    ranks = environment_ranks()
    assert ranks is not None and ranks[0] == 0
    name = _check(ranks[1], device)
    with _core_share(*ranks), contextlib.closing(Team(_enter(None, *ranks, name, timeout_s))) as team:
        yield team


def follow(*, device: str | None = None, timeout_s: float = TIMEOUT_S) -> None:
    """Be another rank of processes that a launcher has started: do what rank 0 asks for until it leaves.

    Raises
    ------
    RankLost
        If another rank has ended.
    """
    ranks = environment_ranks()
    assert ranks is not None and ranks[0] > 0
    name = _check(ranks[1], device)
    with _core_share(*ranks):
        member = _enter(None, *ranks, name, timeout_s)
        try:
            _serve(member)
        finally:
            _leave()


def _check(world: int, device: str | None) -> str:
    """The name of the device; raises if it does not do for `world` ranks."""
    if world < 2:
        raise InvalidValue(f"a team has at least 2 ranks: {world}")
    if dist.is_initialized():
        raise InvalidValue("this process is in a group of torch.distributed already; leave it first.")
    name = pick_device(device).type
    if name == "cuda" and torch.cuda.device_count() < world:
        raise InvalidValue(
            f"--tp {world} needs {world} GPUs and this machine has {torch.cuda.device_count()}; "
            "use a smaller --tp or --device cpu."
        )
    return name


def _store(port: int, world: int) -> Any:
    """Where ranks meet: a new one on any port (0), or that of another process."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, world, is_master=port == 0, wait_for_workers=False
    )


def _enter(store: Any, rank: int, world: int, device: str, timeout_s: float) -> Member:
    """Meet the other ranks."""
    if store is not None and "lo" in (name for _, name in socket.if_nameindex()):
        # All ranks are here; a host name that resolves to nowhere must not matter.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    # Rank 0 may think for long before it asks for something; the others answer at once.
    patience = timedelta(seconds=timeout_s) if rank == 0 else _FOREVER
    return Member(rank, world, device, dist.new_group(backend="gloo", timeout=patience))


def _leave() -> None:
    with contextlib.suppress(RuntimeError):
        if dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def _core_share(rank: int, world: int) -> Iterator[None]:
    """Keep this thread, and those that it starts, to a rank's share of the cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    cores = sorted(before)
    n = len(cores)
    mine = cores[n * rank // world : n * (rank + 1) // world] or [cores[rank % n]]
    os.sched_setaffinity(0, mine)
    torch.set_num_threads(len(mine))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


# -- the other ranks -----------------------------------------------------------------------------------


def _serve(member: Member) -> None:
    """Run what rank 0 asks for, until it asks for nothing more."""
    while True:
        job: list[Any] = [None]
        with _collective(member):
            dist.broadcast_object_list(job, src=0, group=member.control)
        if job[0] is None:
            return
        function, args = job[0]
        answer = function(member, *args)
        with _collective(member):
            dist.gather_object(answer, None, dst=0, group=member.control)


def _follower(rank: int, world: int, device: str, port: int, timeout_s: float) -> int:
    """A process that `launch` has started; its exit code."""

    def end_with_the_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(_LOST)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    try:
        store = _store(port, world)
        store.set(f"here/{rank}", "yes")
        with _core_share(rank, world):
            _serve(_enter(store, rank, world, device, timeout_s))
    except RankLost:
        return _LOST
    except HrmError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _follower_main() -> None:
    code = _follower(*pickle.loads(bytes.fromhex(sys.argv[1])))
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a lost rank must not keep the process


class _Followers:
    """The processes of ranks 1, 2, .., watched by a thread: when one ends before it should, all end."""

    def __init__(self, world: int, device: str, port: int, timeout_s: float) -> None:
        self._world, self._device = world, device
        self._stopping = False
        self._cause: str | None = None
        self._known = threading.Event()
        self._logs: list[IO[bytes]] = []
        self._children: list[subprocess.Popen[bytes]] = []
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        code = "from executor.ranks import _follower_main; _follower_main()"
        for rank in range(1, world):
            arguments = pickle.dumps((rank, world, device, port, timeout_s)).hex()
            self._logs.append(tempfile.TemporaryFile())  # noqa: SIM115
            self._children.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, arguments],
                    stdin=subprocess.PIPE,  # closed when this process ends, however it ends
                    stdout=subprocess.DEVNULL,
                    stderr=self._logs[-1],
                    env=env,
                    start_new_session=True,  # Ctrl-C is rank 0's to answer
                )
            )
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    @property
    def ids(self) -> list[int]:
        """Process ids, in order of ranks."""
        return [child.pid for child in self._children]

    def await_all(self, store: Any) -> None:
        """Wait until every process has reached the store."""
        names = [f"here/{rank}" for rank in range(1, self._world)]
        while not store.check(names):
            if self._known.wait(_POLL_S):
                raise RankLost(f"{self._cause}.")

    def cause(self) -> str | None:
        """Which rank ended and how, if one does within a few seconds."""
        self._known.wait(_GRACE_S)
        return self._cause

    def stop(self, patience_s: float = 0.0) -> None:
        """End all processes, by force those that have not ended in time."""
        self._stopping = True
        deadline = time.monotonic() + patience_s
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            child.kill()
            child.wait()
            if child.stdin:
                child.stdin.close()
        self._watcher.join()

    def _watch(self) -> None:
        bereft = 0.0
        while not self._stopping:
            codes = [child.poll() for child in self._children]
            ended = {rank: code for rank, code in enumerate(codes, start=1) if code is not None}
            first = [rank for rank, code in ended.items() if code not in (0, _LOST)]
            if ended and not bereft:
                bereft = time.monotonic()
            # A rank that only lost another one is named if that other one does not turn up.
            if not first and ended and time.monotonic() > bereft + _GRACE_S / 2:
                first = list(ended)
            if first and not self._stopping:
                self._cause = self._story(first[0], ended[first[0]])
                self._known.set()
                self._end_all()
                return
            time.sleep(_POLL_S)

    def _end_all(self) -> None:
        """End the others, so that whatever rank 0 waits for in a collective fails."""
        for child in self._children:
            child.kill()
        if self._device == "cuda":
            time.sleep(_POLL_S)
            # Kernels of NCCL wait for their peers for ever unless told otherwise.
            with contextlib.suppress(RuntimeError, AttributeError):
                dist.group.WORLD.abort()  # type: ignore[union-attr]

    def _story(self, rank: int, code: int) -> str:
        which = f"rank {rank} of {self._world}"
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            what = f"was killed by {name}{hint}"
        else:
            log = self._logs[rank - 1]
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            what = "ended" + (f": {lines[-1].strip()}" if lines else f" with code {code}")
        return f"{which} {what.rstrip('.')}"
