"""Rank-aware logging: every rank's warnings and errors, the first rank's news.

Ranks come from torchrun's RANK, so that a logger works before torch.distributed does.
"""

import logging
import os
import sys
import warnings

ROOT = "qwen3_vlm"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module.

    Lines go to stderr as `12:34:56 INFO rank 0 qwen3_vlm.train: ...`; ranks other than 0 show warnings and above only.

    Args:
        name: the module's `__name__`.
    """
    root = logging.getLogger(ROOT)
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        form = f"%(asctime)s %(levelname)s rank {rank_from_env()} %(name)s: %(message)s"
        handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(logging.INFO if rank_from_env() == 0 else logging.WARNING)
        root.propagate = False  # Hydra gives the root logger a handler of its own: lines would come twice
    return logging.getLogger(name)


def quiet_libraries() -> None:
    """Hide what megatron-core and torch's checkpoints say at every start: which fast kernels are missing (the backend
    says it once, with what serves instead) and which of their own calls are deprecated. Call before they are imported.
    """
    for module in (r"megatron\.", r"torch\.distributed\.checkpoint"):
        warnings.filterwarnings("ignore", module=module)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron").setLevel(logging.WARNING)


def log_rank0(logger: logging.Logger, message: str, level: int = logging.INFO) -> None:
    """Log once for the whole job, whatever the level: for warnings that all ranks would repeat."""
    if rank_from_env() == 0:
        logger.log(level, message)


def rank_from_env() -> int:
    """This process's number, as torchrun announces it (RANK); 0 when started without torchrun."""
    return int(os.environ.get("RANK", "0"))
