"""Containers that megatron-core's distributed checkpoint can look into.

torch's ModuleList and ModuleDict have no `sharded_state_dict`; megatron-core then takes all that lies below as
replicated, which is wrong for tensor-parallel layers.
"""

from typing import Any

import torch
from megatron.core.transformer.utils import sharded_state_dict_default


def sharded_children(
    module: torch.nn.Module, prefix: str, sharded_offsets: tuple[Any, ...], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Sharded state of every child under its own name: what a container without own parameters has to save."""
    state: dict[str, Any] = {}
    for name, child in module.named_children():
        state |= sharded_state_dict_default(child, f"{prefix}{name}.", sharded_offsets, metadata)
    return state


class ShardedModuleList(torch.nn.ModuleList):
    """ModuleList whose children are sharded one by one."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded state of all children."""
        return sharded_children(self, prefix, sharded_offsets, metadata)


class ShardedModuleDict(torch.nn.ModuleDict):
    """ModuleDict whose children are sharded one by one."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Sharded state of all children."""
        return sharded_children(self, prefix, sharded_offsets, metadata)
