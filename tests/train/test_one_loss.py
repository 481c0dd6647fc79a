"""One global batch gives one loss and one gradient for every trainable tensor, whatever cuts it up.

The whole data set is one step: how it is packed, ordered, split into micro batches or shared among ranks cannot change
what the step contains. Gradients are read back from the saved optimizer: after the first step Adam's first moment is
(1 - beta1) * gradient (Kingma and Ba 2015, algorithm 1), and a checkpoint names it the same at every layout.

The reference has every sample alone in its row, its micro batch and its process.
"""

import itertools
from dataclasses import astuple, dataclass
from pathlib import Path

import pytest
import torch

from qwen3_vlm.checkpoint import layout
from tests.hf_folders import import_folders, write_llm, write_tower
from tests.saved import GRADIENT, read_tensors, relative_differences
from tests.train.runs import Run, overrides, prepared, row, train_forked

EVERYTHING = "train.trainable=[decoder,image.encoder,image.resampler,image.projector]"
ONE_STEP = (EVERYTHING, "train.max_steps=1", "train.global_batch_size=8", "optim.clip_grad=0")


@dataclass(frozen=True)
class Cut:
    """A way to take the step."""

    ranks: str
    """Processes in front of the layout: 4tp2 is TP2 x DP2."""
    micro_batch: int = 1
    packed: bool = True
    tied: bool = True
    sequence_parallel: bool = False

    @property
    def num_processes(self) -> int:
        return int(self.ranks[0])

    @property
    def overrides(self) -> list[str]:
        """For the command line."""
        parallel = self.ranks[1:] or "single"
        return [
            f"parallel={parallel}",
            f"parallel.sequence_parallel={self.sequence_parallel}",
            f"train.micro_batch_size={self.micro_batch}",
            f"data.pack={self.packed}",
        ]

    def __str__(self) -> str:
        words = [self.ranks, f"mb{self.micro_batch}", "packed" if self.packed else "unpacked"]
        words += ["tied" if self.tied else "untied", *(["sp"] if self.sequence_parallel else [])]
        return "-".join(words)


RANKS = ("1", "2", "2tp2", "2pp2", "4pp4", "4tp2pp2", "4tp2")
VALUES = ((1, 2, 4), (True, False), (True, False), (True, False))
"""Of the other fields, in order."""
REFERENCE = Cut("1", packed=False)
ALL_CUTS = [
    cut
    for cut in (Cut(ranks, *values) for ranks in RANKS for values in itertools.product(*VALUES))
    if "tp" in cut.ranks or not cut.sequence_parallel
]


def pairs(cut: Cut) -> set[tuple[tuple[int, object], ...]]:
    """Every two fields of a cut with their values."""
    return set(itertools.combinations(enumerate(astuple(cut)), 2))


def covering(cuts: list[Cut]) -> list[Cut]:
    """Few of the cuts that have every pair of values that all have (greedy, the first of equals)."""
    wanted = set().union(*map(pairs, cuts))
    chosen = []
    while wanted:
        chosen.append(max(cuts, key=lambda cut: len(wanted & pairs(cut))))
        wanted -= pairs(chosen[-1])
    return sorted(chosen, key=cuts.index)


PAIRWISE = covering(ALL_CUTS)


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 samples with 0, 1, 2 or 3 images: single rows, pairs of rows and whole ranks differ in images, or have none."""
    return prepared(
        tmp_path_factory.mktemp("one_batch"),
        [row(n, images=images) for n, images in enumerate((0, 1, 0, 3, 0, 0, 2, 1))],
    )


@pytest.fixture(scope="module")
def starts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tied or not -> the imported model."""
    folder = tmp_path_factory.mktemp("untied")
    write_llm(folder / "llm", tie_word_embeddings=False)
    write_tower(folder / "tower")
    import_folders(folder / "llm", folder / "tower", folder / "ckpt", ["modality.image.resampler.num_tokens=4"])
    return {True: checkpoint, False: folder / "ckpt"}


def step(cut: Cut, starts: dict[bool, Path], data: Path, folder: Path) -> Run:
    """Take it."""
    run = Run(folder / "run")
    command = overrides(starts[cut.tied], data, run.exp_dir, *ONE_STEP, *cut.overrides)
    train_forked(command, num_processes=cut.num_processes, folder=folder)
    return run


@pytest.fixture(scope="module")
def references(starts: dict[bool, Path], one_batch: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Run]:
    """Tied or not -> the reference's step."""
    return {
        tied: step(Cut("1", packed=False, tied=tied), starts, one_batch, tmp_path_factory.mktemp("reference"))
        for tied in starts
    }


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """(1 - beta1) * gradient of every trainable tensor."""
    return read_tensors(run.step_dir(1) / layout.STATE, GRADIENT)


def test_the_reference_has_a_gradient_for_every_tensor(references: dict[bool, Run], starts: dict[bool, Path]):
    """Else equal gradients would say nothing."""
    for tied, run in references.items():
        found = gradients(run)
        assert {name.removeprefix(GRADIENT) for name in found} == read_tensors(starts[tied] / layout.STATE).keys()
        assert all(gradient.norm() > 0 for gradient in found.values())


@pytest.mark.parametrize(
    "cut", [pytest.param(c, marks=() if c in PAIRWISE else pytest.mark.full) for c in ALL_CUTS], ids=str
)
def test_one_loss_and_one_gradient(
    cut: Cut, references: dict[bool, Run], starts: dict[bool, Path], one_batch: Path, tmp_path: Path
):
    """Worst |difference| / |gradient| of a tensor: 2.3e-7 without tp, 1.2e-6 with; of loss 5e-8, norm 2e-7."""
    reference, run = references[cut.tied], step(cut, starts, one_batch, tmp_path)
    [got], [expected] = run.metrics, reference.metrics
    counts = ("samples", "images", "loss_tokens")
    assert {k: got[k] for k in counts} == {k: expected[k] for k in counts}
    apart = relative_differences(gradients(reference), gradients(run))
    assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6, abs=0)
    assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5, abs=0)
    assert {name: a for name, a in apart.items() if a > 1e-5} == {}
