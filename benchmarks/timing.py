"""Clocks. Variants are timed alternately, so that drift of the machine affects all of them alike.

On a GPU: CUDA events around one step, after the L2 was overwritten. The overwrite also keeps the queue full
while the host prepares the step, so it hides host time of that length; host time is therefore measured by the
wall clock with the GPU idle before and after. A captured graph excludes the host. A GPU first runs the steps
until their times settle. On a CPU: warm caches.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Step = Callable[[], object]
SETTLING = 0.5  # seconds per clock, that is per case, for warming up a GPU
SETTLED = 0.03  # the largest relative difference of three rounds


@dataclass(frozen=True)
class Times:
    rounds: int
    ms_p20: float
    ms_p50: float
    ms_p80: float


def _quantiles(times: list[float]) -> Times:
    ordered = sorted(times)
    at = lambda share: ordered[min(int(share * len(ordered)), len(ordered) - 1)]
    return Times(len(ordered), at(0.2), at(0.5), at(0.8))


class CpuClock:
    """One thread: processor time, which other jobs do not lengthen. Several threads: wall-clock time."""

    cache = "warm"
    settling = 0.0

    def __init__(self):
        self.name = "cpu" if torch.get_num_threads() == 1 else "wall"
        self.now = time.process_time if self.name == "cpu" else time.perf_counter

    def time(self, step: Step) -> float:
        begin = self.now()
        step()
        return (self.now() - begin) * 1e3


class GpuClock:
    name, cache = "eager", "cold"
    now = staticmethod(time.monotonic)

    def __init__(self):
        self.settling = SETTLING
        size = 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(max(size, 128 << 20), dtype=torch.int8, device="cuda")

    def time(self, step: Step) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


class HostClock:
    """From an idle GPU to an idle GPU: the host's work, and GPU work that lasts longer."""

    name, cache = "host", "warm"
    now = staticmethod(time.monotonic)

    def __init__(self):
        self.settling = SETTLING

    def time(self, step: Step) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3


Clock = CpuClock | GpuClock | HostClock


def clock_of(device: str, host: bool = False) -> Clock:
    """`host`: the clock for host time with a GPU; a CPU has only one."""
    if device != "cuda":
        return CpuClock()
    return HostClock() if host else GpuClock()


def settle(steps: dict[str, Step], clock: Clock) -> None:
    """Run `steps` alternately until three rounds take the same time, or `clock.settling` is spent.

    An idle GPU has lowered its clock, and needs some hundred milliseconds of work to raise it.
    """
    begin, rounds = clock.now(), []
    while clock.now() - begin < clock.settling:
        rounds = [*rounds[-2:], sum(clock.time(step) for step in steps.values())]
        if len(rounds) == 3 and max(rounds) - min(rounds) <= SETTLED * min(rounds):
            break
    clock.settling = max(0.0, clock.settling - (clock.now() - begin))


def interleave(
    steps: dict[str, Step], clock: Clock, seconds: float, least: int = 3, most: int = 100
) -> dict[str, Times]:
    """Time `steps` alternately for about `seconds`, at least `least` rounds; first runs do not count."""
    for step in steps.values():
        step()
    settle(steps, clock)
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    stop = clock.now() + seconds
    while len(times[names[0]]) < most:
        if len(times[names[0]]) >= least and clock.now() > stop:
            break
        for name in names:
            times[name].append(clock.time(steps[name]))
        names = [*names[1:], names[0]]  # no step always runs after the same one
    return {name: _quantiles(times[name]) for name in steps}


def captured(step: Step) -> Step:
    """A function that replays `step` as a CUDA graph; errors of the capture are raised."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> object:
        graph.replay()
        return results  # keeps the outputs alive: the graph writes into them

    return replay
