# SPDX-License-Identifier: Apache-2.0
"""Counters for programs of a kernel that meet, and the few floats that stand for no workspace."""

import threading
from dataclasses import dataclass, field
from typing import Final

import torch

__all__ = ["COUNTERS", "Meeting", "counters"]

COUNTERS: Final = 1 << 15
"""Counters of each kind that a stream has."""

_STREAMS: Final = 16


@dataclass(frozen=True)
class Meeting:
    """What launches on one stream of a device share."""

    shrink: torch.Tensor  # int32 [COUNTERS], zero between launches
    decode: torch.Tensor  # int32 [COUNTERS], likewise, for a kernel that may run beside shrink
    unused: torch.Tensor  # float32 [4]: stands for partial sums where there are none


@dataclass
class _OfDevice:
    """Counters of all streams of a device."""

    all: torch.Tensor  # int32 [_STREAMS, 2, COUNTERS]
    unused: torch.Tensor
    streams: dict[int, Meeting] = field(default_factory=dict)


class _Counters:
    """Zeroed counters for programs that meet, apart for every stream of a device.

    Kernels leave them zero.

    The shrink kernel has counters of its own: a kernel launched with ``pdl`` runs, and counts,
    beside it. All are allocated at the first use on a device, which the warm-up makes before any
    graph is captured. Graphs captured on one stream must not be replayed at the same time on
    several.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: dict[torch.device, _OfDevice] = {}

    def of_stream(self, device: torch.device, stream: int) -> Meeting:
        """What launches on a stream share.

        Args:
            device: of the tensors.
            stream: the stream's address; 0 is the default one.

        Raises:
            RuntimeError: more streams than there are rows, or a first use while a graph is being
                captured.
        """
        known = self._devices.get(device)
        found = known.streams.get(stream) if known else None
        return found or self._new(device, stream)

    def get(self, device: torch.device) -> Meeting:
        """What launches on the current stream share; raises as :meth:`of_stream`."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return self.of_stream(device, stream)

    def _new(self, device: torch.device, stream: int) -> Meeting:
        with self._lock:
            if device not in self._devices:
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        f"{device}: the SVSK kernels run for the first time while a CUDA graph is"
                        " being captured. Call the layer once before (SvskMatmul.warm_up does)."
                    )
                self._devices[device] = _OfDevice(
                    torch.zeros(_STREAMS, 2, COUNTERS, dtype=torch.int32, device=device),
                    torch.zeros(4, dtype=torch.float32, device=device),
                )
            known = self._devices[device]
            row = len(known.streams)
            if stream not in known.streams:
                if row >= _STREAMS:
                    raise RuntimeError(
                        f"{device}: the SVSK kernels were called on more than {_STREAMS} streams."
                    )
                own, other = known.all[row]
                known.streams[stream] = Meeting(own, other, known.unused)
            return known.streams[stream]

    def busy(self, device: torch.device) -> int:
        """How many counters of all streams are not zero, which none must be.

        Waits for the device.
        """
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return int(self._devices[device].all.count_nonzero()) if device in self._devices else 0

    def reset(self, device: torch.device) -> None:
        """Zero all counters of a device.

        Memory that an engine put to sleep comes back with any content.
        """
        if device in self._devices:
            self._devices[device].all.zero_()

    def forget(self, device: torch.device) -> None:
        """Allocate the counters of a device anew when they are next needed."""
        self._devices.pop(device, None)


counters: Final = _Counters()
