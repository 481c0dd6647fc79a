"""`make demo`: the main job on a laptop, from raw data to answers, with the commands that a user of the 8B types.

    scenes -> LLaVA-form JSON + JPEGs -> prepare_data -> convert import -> stage 0 -> stage 1 (tp 2 over gloo) ->
    evaluate

Everything lies in runs/demo afterwards: report.html, summary.json, ckpt/ (the last Megatron checkpoint),
data/heldout.jsonl, and the folders of each command. The weights are small stand-ins for the public ones
(make_tiny_weights.py).
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

from examples.demo.report import write_report  # noqa: E402
from examples.demo.scenes import write_heldout, write_llava_pretrain  # noqa: E402

WEIGHTS = REPO / "examples" / "tiny_weights"
TRAIN_ROWS, SANITY_ROWS, HELDOUT = 4000, 200, 256
TRAIN_SEED, HELDOUT_SEED = 0, 1

ARCHITECTURE = ["modality.image.resampler.num_tokens=9", "modality.image.resampler.depth=2"]
"""A 3 x 3 grid of visual tokens for an image of 72 x 72 pixels; two resampler blocks."""

STAGES: dict[str, list[str]] = {
    "stage0_sanity": ["train.max_steps=150", "train.global_batch_size=1", "train.seq_length=320", "optim.lr=3e-3"],
    "stage1_align": ["train.global_batch_size=2", "train.micro_batch_size=2", "train.seq_length=640", "optim.lr=2e-3"],
}
"""The stages' own confs with what the tiny model needs: shorter rows, small batches, a larger learning rate."""


@dataclass
class Demo:
    """One run of the demo."""

    out: Path
    summary: dict[str, Any] = field(default_factory=lambda: {"stages": {}, "eval": {}})

    def command(self, *words: object, processes: int = 1) -> float:
        """Run one of the project's commands, show it, and return its seconds; stops the demo if it fails."""
        python = [sys.executable]
        if processes > 1:
            python += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        line = [*python, *(str(w) for w in words)]
        print(f"\n$ {shlex.join(line)}", flush=True)
        started = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": "1" if processes > 1 else "2"}
        subprocess.run(line, cwd=REPO, env=environment, check=True)
        return time.perf_counter() - started

    def prepare(self) -> None:
        """Draw scenes, then prepare them as a user prepares LLaVA-Pretrain."""
        raw = self.out / "data" / "raw"
        source = write_llava_pretrain(raw, TRAIN_ROWS, TRAIN_SEED)
        write_heldout(self.out / "data", HELDOUT, HELDOUT_SEED)
        prepare = ("tools/prepare_data.py", "llava-pretrain", "--source", source, "--images", raw / "images")
        self.command(*prepare, "--out", self.out / "data" / "stage1_align")
        self.command(*prepare, "--limit", SANITY_ROWS, "--out", self.out / "data" / "stage0_sanity")

    def import_weights(self) -> None:
        """Hugging Face folders -> a Megatron checkpoint."""
        folders = ("--llm", WEIGHTS / "qwen3", "--vision", WEIGHTS / "siglip", "--out", self.out / "import")
        self.command("tools/convert.py", "import", *folders, *ARCHITECTURE)

    def train(self, stage: str) -> None:
        """One stage at tensor-parallel size 2."""
        seconds = self.command(
            *("-m", "qwen3_vlm.train", "--config-name", stage, "model=from_checkpoint"),
            f"checkpoint.init_from={self.out / 'import'}",
            *("parallel=tp2", "precision=fp32", "logging.progress_bar=true", "data.num_workers=0"),
            f"data.path={self.out / 'data' / stage}",
            f"exp_dir={self.out / stage}",
            *STAGES[stage],
            processes=2,
        )
        steps = [json.loads(line) for line in (self.out / stage / "metrics.jsonl").read_text().splitlines()]
        self.summary["stages"][stage] = {
            "steps": len(steps),
            "loss_first": steps[0]["loss"],
            "loss_last": steps[-1]["loss"],
            "seconds": seconds,
        }

    def evaluate(self, checkpoint: Path, name: str) -> dict[str, float]:
        """Exact match on the held-out images."""
        answers = self.out / "eval" / f"{name}.json"
        answers.parent.mkdir(exist_ok=True)
        self.command(
            *("tools/evaluate.py", "--checkpoint", checkpoint, "--suite", self.out / "data" / "heldout.jsonl"),
            *("--out", answers.with_suffix(".html"), "--json", answers, "--max-new-tokens", 16),
        )
        return json.loads(answers.read_text())["score"]

    def run(self) -> None:
        """All of it."""
        started = time.perf_counter()
        self.prepare()
        self.import_weights()
        before = self.evaluate(self.out / "import", "import")
        score = before
        for stage in STAGES:
            self.train(stage)
            score = self.evaluate(self.out / stage, stage)
            self.summary["stages"][stage]["exact_match"] = score["exact_match"]
        self.summary["eval"]["single"] = {
            "n": score["n"],
            "exact_match": score["exact_match"],
            "exact_match_images_shuffled": score["exact_match_images_shuffled"],
            "chance": score["chance"],
            "exact_match_before": before["exact_match"],
        }
        last = list(STAGES)[-1]
        latest = (self.out / last / "checkpoints" / "latest").read_text().strip()
        shutil.copytree(self.out / last / "checkpoints" / latest, self.out / "ckpt")
        self.summary["seconds"] = time.perf_counter() - started
        (self.out / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")
        write_report(self.out, self.summary)
        print(f"\n{json.dumps(self.summary, indent=1)}\n\nopen {self.out / 'report.html'}")


def main() -> None:
    """Parse the command line and run; an older run in the same folder is removed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPO / "runs" / "demo", help="folder of the run")
    out = parser.parse_args().out.absolute()
    if out.exists():
        if any(out.iterdir()) and not (out / "data").is_dir():
            sys.exit(f"error: {out} is not empty and not a demo's folder: choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    Demo(out).run()


if __name__ == "__main__":
    main()
