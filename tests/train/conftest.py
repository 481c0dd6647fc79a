"""One small imported model, one data set, and the runs that several tests look at."""

from pathlib import Path

import pytest

from qwen3_vlm.parallel.topology import Topology
from tests.hf_folders import import_folders, write_llm, write_tower
from tests.train.runs import TWO_EPOCHS, Run, overrides, prepared, row, train


@pytest.fixture(scope="session")
def checkpoint(topology: Topology, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import: 4 decoder layers, tied embeddings, 4 tokens an image."""
    folder = tmp_path_factory.mktemp("import")
    write_llm(folder / "llm", tie_word_embeddings=True)
    write_tower(folder / "tower")
    import_folders(folder / "llm", folder / "tower", folder / "ckpt", ["modality.image.resampler.num_tokens=4"])
    return folder / "ckpt"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 samples with none, one or two images: about 6 steps of 2 rows a pass."""
    return prepared(tmp_path_factory.mktemp("data"), [row(n, images=(1, 2, 1, 0)[n % 4]) for n in range(23)])


@pytest.fixture(scope="session")
def straight(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs in one process, never interrupted."""
    run = Run(tmp_path_factory.mktemp("runs") / "straight")
    done = train(overrides(checkpoint, data, run.exp_dir, *TWO_EPOCHS))
    assert done.returncode == 0, done.describe()
    return run
