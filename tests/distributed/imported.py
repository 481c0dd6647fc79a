"""Imported once by the server that `launch` forks ranks from: everything that takes seconds to import."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

from qwen3_vlm.parallel.backend import select_backend

select_backend()  # before megatron-core

from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402

import qwen3_vlm.data.loader  # noqa: E402
import qwen3_vlm.train.trainer  # noqa: E402, F401
import tests.distributed.checks  # noqa: E402, F401

gc.collect()
gc.freeze()  # or every collection of a rank walks through all that was imported


def fork_checkpoint_queue() -> None:
    """Give this rank the queue of megatron-core's checkpoint writer by fork: by spawn it costs an import a rank."""
    import multiprocessing

    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
