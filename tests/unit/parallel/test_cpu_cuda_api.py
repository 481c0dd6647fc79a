"""The answers for CUDA calls change nothing that works on a CPU anyway."""

import torch

from qwen3_vlm.parallel.topology import Topology


def test_device_contexts_still_work(topology: Topology):
    """transformers' from_pretrained builds on "meta"; a factory that escapes leaves buffers uninitialised."""
    with torch.device("meta"):
        made = [torch.arange(3), torch.zeros(2), torch.ones(2), torch.empty(2), torch.full((2,), 1.0)]
    assert all(t.is_meta for t in made)


def test_cuda_means_the_cpu(topology: Topology):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty_like(torch.zeros(2), device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")


def test_a_stream_is_a_class(topology: Topology):
    """Libraries write `torch.cuda.Stream | None` in annotations that are evaluated at import."""
    assert type(None) in (torch.cuda.Stream | None).__args__
