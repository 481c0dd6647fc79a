"""`python -m qwen3_vlm.train --config-name stage1_align key=value ...`: compose, build the parts, hand them to the
trainer.

The command line is checked strictly before anything is built; then NeMo's hydra_runner composes it once more and calls
`main`.
Imports are inside the functions: megatron-core's checkpoint writer starts a process that imports this file again.
"""

import os
import sys
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qwen3_vlm.config.schema import RunConfig


def main() -> None:
    """Entry point.

    Raises:
        SystemExit: 1 with one line on stderr for an error that the user can mend.
    """
    from qwen3_vlm.logging import quiet_libraries

    quiet_libraries()
    from qwen3_vlm.checkpoint.layout import read_architecture
    from qwen3_vlm.config.compose import HydraSchema, compose, conf_dir, from_hydra, parse_command_line
    from qwen3_vlm.config.validate import validate
    from qwen3_vlm.errors import Qwen3VLMError
    from qwen3_vlm.parallel.topology import world_size_from_env

    try:
        command = parse_command_line(sys.argv[1:])
        if not command.shows:
            config = compose(command.config_name, command.overrides, read_architecture=read_architecture)
            validate(config, world_size_from_env())
    except Qwen3VLMError as error:
        sys.exit(f"error: {error}")

    from nemo.core.config import hydra_runner

    sys.argv[1:] = command.hydra_argv
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # an unexpected error keeps its whole traceback
    warnings.filterwarnings("ignore", message=r"\s*'.*' is validated against ConfigStore schema")

    @hydra_runner(config_path=str(conf_dir()), config_name=command.config_name, schema=HydraSchema)
    def run(tree: "DictConfig") -> None:
        try:
            train(from_hydra(tree, command.overrides, read_architecture=read_architecture))
        except Qwen3VLMError as error:
            sys.exit(f"error: {error}")

    run()


def train(config: "RunConfig") -> None:
    """Build the parts of a run and fit.

    Raises:
        ConfigError: the run has nothing to start from.
        CheckpointError: a checkpoint does not fit the run.
        DataError: the data cannot be used.
    """
    from pathlib import Path

    import torch
    from megatron.core import parallel_state

    from qwen3_vlm.checkpoint import layout, sharded
    from qwen3_vlm.config.compose import to_yaml
    from qwen3_vlm.data.loader import RowLoader
    from qwen3_vlm.data.order import Share
    from qwen3_vlm.data.source import train_samples
    from qwen3_vlm.data.tokenizer import ChatTokenizer
    from qwen3_vlm.errors import ConfigError
    from qwen3_vlm.logging import get_logger
    from qwen3_vlm.modality.registry import build_modalities
    from qwen3_vlm.model.vlm import VLM
    from qwen3_vlm.parallel import topology as topologies
    from qwen3_vlm.parallel.apply import build_stage
    from qwen3_vlm.parallel.broadcast import gather_objects
    from qwen3_vlm.train import callbacks
    from qwen3_vlm.train.batches import StepBatches
    from qwen3_vlm.train.optimizer import ProgressSchedule, build_optimizer
    from qwen3_vlm.train.plan import check_architecture, describe_run, total_samples
    from qwen3_vlm.train.trainer import Trainer

    log = get_logger("qwen3_vlm.train")
    if config.checkpoint.init_from is None:
        raise ConfigError(
            "checkpoint.init_from is not set: a run starts from pretrained weights. Import them with tools/convert.py "
            "import and give its --out."
        )
    exp_dir = Path(config.exp_dir)
    resumed = layout.latest_step_dir(exp_dir)
    source = resumed or layout.resolve(config.checkpoint.init_from)
    check_architecture(config, layout.read_architecture(source), source)
    modalities = build_modalities(config.modality)
    tokenizer = ChatTokenizer.from_folder(source / layout.PROCESSOR, modalities)
    samples = train_samples(config.data.path)

    topology = topologies.initialize(config.parallel, seed=config.train.seed)
    try:
        if topology.rank == 0:
            exp_dir.mkdir(parents=True, exist_ok=True)
            (exp_dir / "config.yaml").write_text(to_yaml(config))
            log.info(topology.backend.describe())
        loader = (
            RowLoader(
                config.data,
                seq_length=config.train.seq_length,
                modalities=modalities,
                tokenizer=tokenizer,
                seed=config.train.seed,
                share=Share(
                    global_batch_size=config.train.global_batch_size,
                    dp_rank=topology.dp_rank,
                    dp_size=topology.dp_size,
                ),
                gather=lambda mine: gather_objects(mine, parallel_state.get_data_parallel_group()),
                cache=exp_dir / "sizes.npz",
            )
            if topology.is_model_parallel_source
            else None
        )
        if topology.rank == 0 and loader is not None:
            for line in describe_run(config, topology, samples=samples, rows=loader.rows_per_pass, fill=loader.fill):
                log.info(line)
        torch.use_deterministic_algorithms(config.train.deterministic)

        model, wrapped = build_stage(
            lambda: VLM(
                decoder=config.model,
                modalities=config.modality,
                parallel=config.parallel,
                precision=config.precision,
                topology=topology,
                deterministic=config.train.deterministic,
            ),
            # A resumed run is filled later, together with its optimizer.
            lambda stage: None if resumed else sharded.load_model(stage, source / layout.STATE),
            trainable=config.train.trainable,
            precision=config.precision,
            device=topology.backend.device,
        )
        optimizer = build_optimizer(config.optim, config.precision, wrapped)
        whole_run = config.train.max_steps or total_samples(config, samples)
        watchers: list[callbacks.Callback] = []
        if topology.rank == 0:
            watchers = [callbacks.MetricsFile(exp_dir), callbacks.SkippedFile(exp_dir)]
            watchers += [callbacks.SampleKeysFile(exp_dir)] if config.logging.sample_keys else []
            watchers += [callbacks.TensorBoard(exp_dir)] if config.logging.tensorboard else []
            watchers += [callbacks.ProgressBar()] if config.logging.progress_bar else []
        trainer = Trainer(
            config=config,
            topology=topology,
            model=model,
            wrapped=wrapped,
            optimizer=optimizer,
            schedule=ProgressSchedule(optimizer, config.optim, whole_run),
            batches=StepBatches(
                loader=loader,
                modalities=modalities,
                topology=topology,
                seq_length=config.train.seq_length,
                pad_id=tokenizer.pad_id,
                micro_batch_size=config.train.micro_batch_size,
                global_batch_size=config.train.global_batch_size,
                gather_keys=config.logging.sample_keys,
            ),
            loader=loader,
            samples_per_epoch=samples,
            total_samples=None if config.train.max_steps is not None else whole_run,
            source=source,
            callbacks=watchers,
        )
        try:
            trainer.fit()
        finally:
            if loader is not None:
                loader.close()
    finally:
        topologies.shutdown()


if __name__ == "__main__":
    main()
