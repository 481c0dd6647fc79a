"""BF16 on a CPU: the mixed-precision optimizer (BF16 weights, FP32 masters and gradients) trains, resumes, reshards."""

import math
from pathlib import Path

import pytest

from qwen3_vlm.checkpoint import layout
from tests.saved import GRADIENT, read_tensors, relative_differences
from tests.train.runs import Run, overrides, train_forked

EVERYTHING = "train.trainable=[decoder,image.encoder,image.resampler,image.projector]"
STEPS = 8
BF16 = 2**-8
"""What one rounding to BF16's 8 bits of mantissa may change, relative."""


def run(checkpoint: Path, data: Path, folder: Path, *more: str, precision: str = "bf16", num_processes: int = 1) -> Run:
    """STEPS steps in which everything trains."""
    made = Run(folder / "run")
    command = [o for o in overrides(checkpoint, data, made.exp_dir) if not o.startswith("precision=")]
    command += [f"precision={precision}", EVERYTHING, f"train.max_steps={STEPS}", "optim.clip_grad=0"]
    command += ["optim.warmup_fraction=0", "optim.decay=constant", "checkpoint.save_every=1", *more]
    train_forked(command, num_processes=num_processes, folder=folder)
    return made


@pytest.fixture(scope="module")
def bf16(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(checkpoint, data, tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="module")
def fp32(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(checkpoint, data, tmp_path_factory.mktemp("fp32"), precision="fp32")


def state(made: Run, step: int) -> Path:
    return made.step_dir(step) / layout.STATE


def test_the_loss_falls_as_in_fp32(bf16: Run, fp32: Run):
    """Step by step within 3.5e-3 and 1.8e-3 of FP32's, relative, on two machines."""
    losses, reference = ([line["loss"] for line in made.metrics] for made in (bf16, fp32))
    assert losses[-1] < 0.8 * losses[0]
    for got, expected in zip(losses, reference, strict=True):
        assert math.isclose(got, expected, rel_tol=4 * BF16)


def compare_first_step(got: Run, expected: Run, *, loss: float, norm: float, gradient: float) -> None:
    """Bounds are relative; the gradient's is that of the worst tensor."""
    first, reference = got.metrics[0], expected.metrics[0]
    assert first["loss_tokens"] == reference["loss_tokens"]
    apart = relative_differences(*(read_tensors(state(r, 1), GRADIENT) for r in (expected, got)))
    assert math.isclose(first["loss"], reference["loss"], rel_tol=loss)
    assert math.isclose(first["grad_norm"], reference["grad_norm"], rel_tol=norm)
    assert max(apart.values()) <= gradient


def test_the_first_step_is_that_of_fp32(bf16: Run, fp32: Run):
    """Processors sum BF16 products in their own order. Two machines measured, the second with AVX512_BF16: loss 7.9e-4
    and 6.0e-4, norm 9.4e-4 and 1.5e-3, gradients at worst (a norm of the tower) 6.1e-2 and 4.7e-2, in the median 2.7e-2
    and 2.5e-2.
    """
    compare_first_step(bf16, fp32, loss=BF16, norm=2 * BF16, gradient=32 * BF16)


@pytest.mark.parametrize("parallel", ["tp2", "pp2"])
def test_the_first_step_at_other_layouts(bf16: Run, checkpoint: Path, data: Path, tmp_path: Path, parallel: str):
    """The same two machines. TP2: loss 5.8e-5 and 4.2e-4, norm 8.6e-4 and 1.1e-3, gradients 3.1e-2 and 2.4e-2.

    PP2: none but the tied embedding's gradient, 1.5e-3 and 1.6e-3.
    """
    options = ("train.max_steps=1", f"parallel={parallel}")
    got = run(checkpoint, data, tmp_path, *options, num_processes=2)
    compare_first_step(got, bf16, loss=BF16, norm=2 * BF16, gradient=16 * BF16)


def test_a_resumed_run_is_the_uninterrupted_one(bf16: Run, checkpoint: Path, data: Path, tmp_path: Path):
    """Bit for bit: metrics, weights, masters and moments."""
    half = run(checkpoint, data, tmp_path, f"train.max_steps={STEPS // 2}")
    assert len(half.metrics) == STEPS // 2
    (tmp_path / "ranks").rename(tmp_path / "ranks_before")
    whole = run(checkpoint, data, tmp_path)
    assert whole.metrics == bf16.metrics
    a, b = read_tensors(state(bf16, STEPS)), read_tensors(state(whole, STEPS))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
