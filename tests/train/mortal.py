"""`python -m tests.train.mortal MOMENT:STEP ...`: the trainer, in a process that SIGKILLs itself on the way.

step:4       after the update of step 4, before anything of it is recorded
save:4       in the save of step 4, when all is written but the manifest
mark:4       in the save of step 4, when it is complete but not yet marked as the latest
"""

import os
import signal
import sys
from typing import Any

from qwen3_vlm.train.__main__ import main


def _die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(moment: str, step: int) -> None:
    from qwen3_vlm.checkpoint import layout
    from qwen3_vlm.train.trainer import Trainer

    def before(function: Any, step_of: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if step_of(*args) == step:
                _die()
            return function(*args, **kwargs)

        return call

    match moment:
        case "step":
            Trainer.record = before(Trainer.record, lambda trainer, *_: trainer.progress.step)
        case "save":
            layout.write_manifest = before(layout.write_manifest, lambda _, manifest: manifest.step)
        case "mark":
            layout.mark_latest = before(layout.mark_latest, lambda _, at: at)
        case _:
            raise ValueError(f"unknown moment {moment!r}")


if __name__ == "__main__":
    name, at = sys.argv.pop(1).split(":")
    _arm(name, int(at))
    main()
