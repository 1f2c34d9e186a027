"""A few numbers on their way from a device to the host: copied behind its work, and read once they are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Arrival", "send"]


class Arrival(NamedTuple):
    """Numbers that were sent to the host.

    Attributes:
        values: The numbers, in memory of the host; on devices without CUDA's events still there.
        events: What each device has reached when they have arrived.
    """

    values: Sequence[Tensor]
    events: Sequence[torch.cuda.Event]

    @property
    def here(self) -> bool:
        """Whether they were on the host from the beginning."""
        return not self.events and all(value.is_cpu for value in self.values)

    def arrived(self) -> bool:
        """Return whether reading them waits for no event."""
        return all(event.query() for event in self.events)  # type: ignore[no-untyped-call]  # torch's own

    def read(self) -> list[Tensor]:
        """Wait until they are there, and return them as tensors of the host."""
        for event in self.events:
            event.synchronize()
        return [value.cpu() for value in self.values]


def send(values: Sequence[Tensor]) -> Arrival:
    """Send numbers to the host, behind the work that their devices have; nothing waits."""
    sent = [_to_host(value) for value in values]
    devices = {value.device for value in values if value.is_cuda}
    return Arrival(sent, [torch.cuda.current_stream(device).record_event() for device in devices])


def _to_host(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value  # asked when it is read
    # From pageable memory the copy would wait.
    place = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    return place.copy_(value, non_blocking=True)
