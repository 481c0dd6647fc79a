"""Answers for the CUDA calls that megatron-core makes unconditionally, for a machine without a GPU.

megatron-core 0.16.1 asks for the current CUDA device, for streams and for tensors on "cuda" in code that is otherwise
device-free. `install()` makes those calls answer with the CPU. It replaces only calls that raise on a machine without
CUDA, so nothing that worked before behaves differently; the one exception, `Tensor.type`, is replaced only inside the
two functions that compare its answer with "torch.cuda.FloatTensor" (the distributed optimizer's constructor and
gradient clipping).

Called once by `backend.select_backend`, before megatron.core is imported, and never where a GPU is present.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "as_tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "empty_like",
    "zeros_like",
    "ones_like",
)
_installed = False


class _NoStream:
    """Stands for a CUDA stream: everything on a CPU is in order already."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _names_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Let `tensor.type()` answer with the CUDA name of its type, as the distributed optimizer's constructor expects."""
    plain_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = plain_type(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    torch.Tensor.type = cuda_type  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = plain_type  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return call


def install() -> None:
    """Let megatron-core's CUDA calls answer with the CPU; safe to call twice."""
    global _installed
    if _installed:
        return
    _installed = True
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.max_memory_allocated = lambda device=None: 0
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.Stream = _NoStream  # a class: libraries write `torch.cuda.Stream | None` in annotations
    cuda.current_stream = cuda.default_stream = lambda device=None: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, device=None: self  # type: ignore[method-assign]
    # torch collects, once, which functions `with torch.device(...)` acts on: that has to be the originals, or
    # transformers' from_pretrained (a "meta" context) leaves buffers with whatever lay in memory.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    from megatron.core.optimizer import optimizer as clipping
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    DistributedOptimizer.__init__ = _with_cuda_type_names(DistributedOptimizer.__init__)
    clipping.clip_grad_by_total_norm_fp32 = _with_cuda_type_names(clipping.clip_grad_by_total_norm_fp32)
