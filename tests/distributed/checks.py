"""What the ranks of a launch check; each function sets up its own layout and runs on every rank.

The folder holds `cases` (a link to what tests.cases wrote) and what one process found: `shapes.json` ({case: {name:
shape}}) and `steps.json` ({case: [[loss, gradient norm] of each step]}).
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from qwen3_vlm.config.schema import ParallelConfig
from qwen3_vlm.model.vlm import VLM
from qwen3_vlm.parallel import topology as topologies
from qwen3_vlm.parallel.topology import Topology
from tests.cases import LAYOUT_SPECS, NEW_TOKENS, PROMPTS, TOLERANCE, Case, open_cases, prompt
from tests.stepper import DOCUMENTS, EVERYTHING, Stepper

SPLIT_DIM = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_q.weight": 0,
    "linear_kv.weight": 0,
    "linear_proj.weight": 1,
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
}
"""End of a parameter's name -> the dimension that tensor parallelism cuts; all other parameters stay whole."""


@contextlib.contextmanager
def layout(parallel: ParallelConfig) -> Iterator[Topology]:
    """This process in a layout; torch.distributed itself stays up for the next one."""
    from megatron.core import parallel_state

    yield topologies.initialize(parallel, seed=1)
    dist.barrier()
    parallel_state.destroy_model_parallel()


def _compare_logits(folder: Path, parallel: ParallelConfig) -> None:
    with layout(parallel) as topology:
        for case in open_cases(folder / "cases", LAYOUT_SPECS).values():
            generator = case.generator(parallel, topology)
            together = generator.logits([prompt(p) for p in PROMPTS])
            for p, packed in zip(PROMPTS, together, strict=True):
                (alone,) = generator.logits([prompt(p)])
                for got in (alone, packed):
                    torch.testing.assert_close(got, case.expected[p], atol=TOLERANCE, rtol=0)


def _compare_answers(folder: Path, parallel: ParallelConfig) -> None:
    with layout(parallel) as topology:
        for case in open_cases(folder / "cases", LAYOUT_SPECS).values():
            answers = case.generator(parallel, topology).generate(
                [prompt(p) for p in PROMPTS], max_new_tokens=NEW_TOKENS
            )
            assert answers == [case.answers[p] for p in PROMPTS]


def _stage(case: Case, parallel: ParallelConfig, topology: Topology) -> VLM:
    return case.load(parallel, topology).model


def _check_parameters(folder: Path, parallel: ParallelConfig) -> None:
    """Shapes are cut by tp; layers are shared out over pp; towers, embedding and head stand where they belong."""
    whole = json.loads((folder / "shapes.json").read_text())
    with layout(parallel) as topology:
        cases = open_cases(folder / "cases", LAYOUT_SPECS)
        for name in ("kv1_tied", "kv8_untied"):
            model = _stage(cases[name], parallel, topology)
            shapes = {n: list(p.shape) for n, p in model.named_parameters()}
            expected = _expected_shapes(whole[name], parallel, topology, tied=cases[name].spec.tied)
            assert shapes == expected


def _expected_shapes(
    whole: dict[str, list[int]], parallel: ParallelConfig, topology: Topology, *, tied: bool
) -> dict[str, list[int]]:
    stack = "language_model.decoder.layers."
    num_layers = 1 + max(int(name.removeprefix(stack).split(".")[0]) for name in whole if name.startswith(stack))
    local_layers = num_layers // parallel.pp
    expected = {}
    for name, shape in whole.items():
        if name.startswith(stack):
            if int(name.removeprefix(stack).split(".")[0]) >= local_layers:
                continue
        elif name.startswith(("towers.", "language_model.embedding.")):
            if not topology.is_first_stage:
                continue
        elif not topology.is_last_stage:  # final norm and output layer
            continue
        expected[name] = _cut(name, shape, parallel.tp)
    if tied and topology.is_last_stage and not topology.is_first_stage:  # the last stage's copy of the embedding
        embedding = "language_model.embedding.word_embeddings.weight"
        expected["language_model.output_layer.weight"] = _cut(embedding, whole[embedding], parallel.tp)
    return expected


def _cut(name: str, shape: list[int], tp: int) -> list[int]:
    dims = [dim for end, dim in SPLIT_DIM.items() if name.endswith(end)]
    if not dims:
        return shape
    local = list(shape)
    local[dims[0]] = -(-shape[dims[0]] // tp)  # only the vocabulary is rounded up
    return local


def take_steps(case: Case, parallel: ParallelConfig, topology: Topology) -> list[list[float]]:
    """[loss, gradient norm] of two steps in which everything trains; the second micro batch has no image."""
    stepper = Stepper(case, topology, parallel, EVERYTHING)
    micro_batches = [stepper.micro_batch([stepper.document(*document)]) for document in DOCUMENTS]
    results = [stepper.take(*micro_batches) for _ in range(2)]
    return [[result.loss or 0.0, result.grad_norm or 0.0] for result in results]


def _compare_steps(folder: Path, parallel: ParallelConfig) -> None:
    """Relative to one process; worst measured: 6e-7."""
    expected = json.loads((folder / "steps.json").read_text())
    with layout(parallel) as topology:
        for name, case in open_cases(folder / "cases", LAYOUT_SPECS).items():
            got = torch.tensor(take_steps(case, parallel, topology))
            torch.testing.assert_close(got, torch.tensor(expected[name]), rtol=1e-5, atol=0)


TP2 = ParallelConfig(tp=2, sequence_parallel=True)
TP2_PLAIN = ParallelConfig(tp=2)
PP2 = ParallelConfig(pp=2)
TP4 = ParallelConfig(tp=4, sequence_parallel=True)
PP4 = ParallelConfig(pp=4)
TP2_PP2 = ParallelConfig(tp=2, pp=2, sequence_parallel=True)


def logits_tp2(folder: Path) -> None:
    """Tensor parallel, the sequence split too."""
    _compare_logits(folder, TP2)


def logits_tp2_without_sequence_parallel(folder: Path) -> None:
    """Tensor parallel, the sequence whole."""
    _compare_logits(folder, TP2_PLAIN)


def logits_pp2(folder: Path) -> None:
    """Two pipeline stages."""
    _compare_logits(folder, PP2)


def answers_tp2(folder: Path) -> None:
    """Greedy answers, tensor parallel."""
    _compare_answers(folder, TP2)


def answers_pp2(folder: Path) -> None:
    """Greedy answers, two stages."""
    _compare_answers(folder, PP2)


def parameters_tp2(folder: Path) -> None:
    """Local shapes, tensor parallel."""
    _check_parameters(folder, TP2)


def parameters_pp2(folder: Path) -> None:
    """Local names, two stages."""
    _check_parameters(folder, PP2)


def steps_tp2(folder: Path) -> None:
    """Gradients of every part, tensor and sequence parallel."""
    _compare_steps(folder, TP2)


def steps_tp2_without_sequence_parallel(folder: Path) -> None:
    """Gradients of every part, tensor parallel."""
    _compare_steps(folder, TP2_PLAIN)


def steps_pp2(folder: Path) -> None:
    """Gradients of every part, two stages: a tied embedding sums those of both ends."""
    _compare_steps(folder, PP2)


def steps_on_four(folder: Path) -> None:
    """Gradients of every part at every layout of four."""
    for parallel in (TP4, PP4, TP2_PP2):
        _compare_steps(folder, parallel)


def logits_tp4(folder: Path) -> None:
    """Four tensor ranks: more than one of the decoders' key/value heads."""
    _compare_logits(folder, TP4)


def logits_pp4(folder: Path) -> None:
    """Four stages of one layer: two of them have neither embedding nor head."""
    _compare_logits(folder, PP4)


def logits_tp2_pp2(folder: Path) -> None:
    """Both."""
    _compare_logits(folder, TP2_PP2)


def answers_on_four(folder: Path) -> None:
    """Greedy answers at every layout of four."""
    for parallel in (TP4, PP4, TP2_PP2):
        _compare_answers(folder, parallel)


def parameters_on_four(folder: Path) -> None:
    """Local names and shapes at every layout of four."""
    for parallel in (TP4, PP4, TP2_PP2):
        _check_parameters(folder, parallel)


TWO_PROCESSES = (
    parameters_tp2,
    parameters_pp2,
    logits_tp2,
    logits_tp2_without_sequence_parallel,
    logits_pp2,
    answers_tp2,
    answers_pp2,
    steps_tp2,
    steps_tp2_without_sequence_parallel,
    steps_pp2,
)
FOUR_PROCESSES = (parameters_on_four, logits_tp4, logits_pp4, logits_tp2_pp2, answers_on_four, steps_on_four)
