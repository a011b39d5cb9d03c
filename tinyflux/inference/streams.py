"""Threads with a stream of their own on a GPU; on CPUs there is nothing to wait for."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import torch
from torch import Tensor

Moment: TypeAlias = torch.cuda.Event


def side_thread(name: str, device: torch.device) -> ThreadPoolExecutor:
    """One thread; on a GPU its work goes to a stream of its own."""

    def own_stream() -> None:
        torch.cuda.set_stream(torch.cuda.Stream(device))

    initializer = own_stream if device.type == "cuda" else None
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=initializer)


def hand_over(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Make what this thread's stream computed whole, and the default stream its user."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
        user = torch.cuda.default_stream(device)
        for tensor in tensors:
            tensor.record_stream(user)


def mark(device: torch.device) -> Moment | None:
    """On a GPU, the moment at which what was asked for so far is done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def take_over(tensor: Tensor, made: Moment | None) -> None:
    """Let this thread's stream use a tensor of another's, which is there at ``made``."""
    if made is not None:
        made.wait()
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def on_device(values: list[float], device: torch.device) -> Tensor:
    """``[len(values)]``, without waiting for the GPU."""
    tensor = torch.tensor(values)
    if device.type != "cuda":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
