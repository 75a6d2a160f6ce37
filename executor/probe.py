"""Measures what the model of time needs, with the executor's own kernels, alone and under contention.

The result is a `Hardware` with the rate set ``measured``. Kernels are timed at the shapes of one model,
on weights and KV caches too large for the processor's caches, as they are in a run. All measurements
are taken in several passes, so that a passing disturbance does not decide any of them.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from executor.bench import Bench, Key, typical
from executor.contention import Contention, Crowd, crowd_of
from executor.machine import OtherLoad
from executor.measured_rates import hardware_of
from hrm.hardware import Curve, Hardware
from hrm.model import MoEModel

__all__ = ["Prober", "probe"]

_PASSES = 4
_QUIET = 0.05
Passes = list[dict[Key, float]]
"""Seconds of every timed call, pass by pass."""
_T = TypeVar("_T")


def probe(
    model: MoEModel,
    *,
    device: torch.device | None = None,
    progress: Callable[[str], None] | None = None,
) -> Hardware:
    """Measure this machine.

    Parameters
    ----------
    model : MoEModel
        Gives the shapes and the data type at which kernels are timed.
    device : torch.device, optional
        By default CUDA where there is one.
    progress : callable, optional
        Called with the name of each part before it is measured.

    Returns
    -------
    Hardware
        With a ``measured`` rate set, and `facts` that say where, when and with what it was taken.

    Raises
    ------
    DoesNotFit
        If a few experts of the model do not fit this machine's memory.
    """
    return Prober(model, device=device, progress=progress).hardware()


class Prober:
    """A probe that can be taken again: kernels are set up once and timed in passes.

    On a machine whose speed drifts, a fresh pass before each prediction keeps the constants current.
    """

    def __init__(
        self,
        model: MoEModel,
        *,
        device: torch.device | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.progress = progress or (lambda _: None)
        self._bench = _in_thread(lambda: Bench(model, device))
        self._passes: Passes = []
        self._crowd: Crowd | None = None
        self._share = 0.0

    def hardware(self) -> Hardware:
        """The machine by a full probe: several quiet passes, hand-overs, and all lanes at once."""
        return _in_thread(self._full)

    def refresh(self, passes: int = 2) -> Hardware:
        """The machine by `passes` fresh passes; what lanes cost each other is taken from the full probe."""
        if self._crowd is None:
            return self.hardware()
        return _in_thread(lambda: self._again(passes))

    def take_over(self, machine: Hardware) -> None:
        """Take what lanes cost each other from an earlier full probe of this machine, in place of a full probe."""
        rates = machine.rates("measured")
        alone = Curve(((1.0, 1.0),))
        self._crowd = Crowd(rates.task_s, rates.cores or alone, rates.dram_bandwidth, rates.processors)

    def machine_of(self, passes: Passes) -> Hardware:
        """The machine that some passes show: each call by what is typical of it."""
        if self._crowd is None:
            raise ValueError("'machine_of' needs a full probe first: call 'hardware'.")
        return self._describe(passes)

    @property
    def last_passes(self) -> Passes:
        """Seconds of every timed call in the passes of the last `hardware` or `refresh`."""
        return self._passes

    def _full(self) -> Hardware:
        with OtherLoad() as load:
            self._passes = self._quiet(self._bench.one_pass, _PASSES, "kernels and copies alone")
            self.progress("hand-over between lanes")
            lanes = Contention(self._bench)
            task_s = statistics.median(lanes.hand_over() for _ in range(3))
            # With a GPU lanes have no cores in common, and nobody would ask.
            cores = [] if self._bench.cuda else self._quiet(lanes.shared_cores, 3, "all lanes at once")
            both = self._quiet(lanes.processors, 3, "both processors at once")
            self._crowd = crowd_of(task_s, cores, [lanes.memory_traffic() for _ in range(3)], both)
        self._share = load.share
        return self._describe(self._passes)

    def _again(self, passes: int) -> Hardware:
        with OtherLoad() as load:
            self._passes = [self._bench.one_pass() for _ in range(passes)]
        self._share = load.share
        return self._describe(self._passes)

    def _describe(self, passes: Passes) -> Hardware:
        assert self._crowd is not None
        spent = {key: typical([x[key] for x in passes]) for key in passes[0]}
        return hardware_of(self._bench, spent, self._crowd, self._share)

    def _quiet(self, measure: Callable[[], Any], count: int, what: str) -> list[Any]:
        """Results of `count` measurements that nothing else disturbed, or of the least disturbed ones."""
        taken: list[tuple[float, int, Any]] = []
        while len(taken) < 2 * count and sum(share < _QUIET for share, _, _ in taken) < count:
            again = "" if len(taken) < count else ", again: the machine was busy"
            self.progress(f"{what}, {min(len(taken) + 1, count)} of {count}{again}")
            with OtherLoad() as load:
                result = measure()
            taken.append((load.share, len(taken), result))
        return [result for _, _, result in sorted(taken, key=lambda x: x[:2])[:count]]


def _in_thread(work: Callable[[], _T]) -> _T:
    """Run in a thread of its own: the number of threads that kernels use is a property of the thread."""
    result: list[_T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with torch.inference_mode():
                result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="probe")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
