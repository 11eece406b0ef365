"""How long the stages of a stream take. Allocated once: a detector that runs for months must not grow."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

KEPT_TIMINGS = 10_000  # windows whose timings are remembered: enough for a p99, and bounded


class Durations:
    """The last KEPT_TIMINGS durations in ns; `count` and `total_ns` are of all there ever were."""

    def __init__(self) -> None:
        self._ring = np.full(KEPT_TIMINGS, 0, np.int64)
        self.count = self.total_ns = 0

    def __len__(self) -> int:
        return min(self.count, KEPT_TIMINGS)

    def append(self, ns: int) -> None:
        self._ring[self.count % KEPT_TIMINGS] = ns
        self.count += 1
        self.total_ns += ns

    def values(self) -> NDArray[np.int64]:
        """(n,) in no order."""
        return self._ring[: len(self)]


@dataclass
class Timings:
    """How long the last windows took, stage by stage."""

    decode: Durations = field(default_factory=Durations)  # live only: capture -> out of the decoder
    wait: Durations = field(default_factory=Durations)  # live only: decoder -> this session, conversion included
    image: Durations = field(default_factory=Durations)  # crop and image engine
    head: Durations = field(default_factory=Durations)  # saliency and moments, all queries
    publish: Durations = field(default_factory=Durations)  # events handed to the sockets
    total: Durations = field(default_factory=Durations)  # capture (recordings: push) -> all of it done
