"""Recording work on an accelerator once and replaying it, so that a time holds no Python and no launches."""

from __future__ import annotations

from collections.abc import Callable

import torch

Work = Callable[[], object]
WARMUP = 3


def can_capture(device: torch.device) -> bool:
    """Whether torch records graphs on a device."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "CUDAGraph")


def captured(work: Work, device: torch.device) -> Work:
    """The work as a graph to be replayed, on the tensors that it has now.

    Raises:
        RuntimeError: the work waits for the device or allocates in ways that no graph can hold.
    """
    module = torch.get_device_module(device)
    side = module.Stream(device)
    side.wait_stream(module.current_stream(device))
    with module.stream(side):  # kernels are chosen and memory is set up before anything is recorded
        for _ in range(WARMUP):
            work()
    module.current_stream(device).wait_stream(side)
    graph = module.CUDAGraph()
    with module.device(device), module.graph(graph, stream=side):  # a stream of this device, or nothing is recorded
        work()
    return graph.replay  # type: ignore[no-any-return]
