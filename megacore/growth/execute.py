"""Execute a growth plan: stream a source checkpoint into a grown one, file by file, in parallel over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megacore.checkpoint.attached import Attached
from megacore.checkpoint.files import MAX_FILE_BYTES, layout_of, plan_files, share_of
from megacore.checkpoint.manifest import WEIGHT, Annealing, Manifest, parameter_records
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import FileToWrite, write_checkpoint
from megacore.communicator import Communicator, together
from megacore.config import ParallelConfig
from megacore.growth.apply import Grower
from megacore.growth.plan import GrowthPlan


@dataclass(frozen=True)
class GrowthOutput:
    """How the grown checkpoint is written.

    Args:
        parallel: its layout; each tensor-parallel rank will find its own files.
        keep_optimizer: map Adam's moments too; otherwise only weights are written.
        dtype: of all tensors, or ``None`` for the source's.
        hold_steps: training steps during which the learning-rate multipliers hold.
        anneal_steps: steps over which they then go to one.
        max_file_bytes: a tensor-parallel rank's tensors are spread over files of about this size.
    """

    parallel: ParallelConfig
    keep_optimizer: bool = True
    dtype: str | None = None
    hold_steps: int = 500
    anneal_steps: int = 500
    max_file_bytes: int = MAX_FILE_BYTES


def grow_checkpoint(
    reader: CheckpointReader,
    plan: GrowthPlan,
    path: Path,
    output: GrowthOutput,
    group: Communicator,
    on_progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the grown checkpoint; every rank of ``group`` calls this and writes its share of the files.

    What is written depends on the plan and the layout only, never on the number of ranks.

    Args:
        reader: the source.
        plan: made from the source's configuration.
        path: the directory to write; must not exist.
        output: layout and options.
        group: the ranks that work together.
        on_progress: called with the number of bytes of each block this rank has written.

    Raises:
        ConfigError: the layout does not fit the grown model.
        CheckpointError: the source is damaged, or the target cannot be written.
    """
    with together(group):
        files = planned_files(reader, plan, output)
        manifest = _manifest(reader, plan, output)
    attached = Attached.of(reader.path, group)
    write_checkpoint(path, group, share_of(files, group, on_progress), manifest, attached.write)


def planned_files(reader: CheckpointReader, plan: GrowthPlan, output: GrowthOutput) -> list[FileToWrite]:
    """List all files of the grown checkpoint with their pieces; nothing is computed yet.

    Raises:
        ConfigError: the layout does not fit the grown model.
    """
    reader.specs()
    output.parallel.check(plan.target)
    states = reader.manifest.states if output.keep_optimizer else (WEIGHT,)

    layout = layout_of(output.parallel)
    grower = Grower(reader, plan, output.dtype)
    return plan_files(plan.specs, states, layout, grower.dtype, grower.box, output.max_file_bytes)


def _manifest(reader: CheckpointReader, plan: GrowthPlan, output: GrowthOutput) -> Manifest:
    source = reader.manifest
    exponent = source.annealing.exponent(source.progress.step)
    multipliers = {}
    for name in plan.specs:
        inherited = source.parameters[plan.rules[name].source]
        multipliers[name] = (
            inherited.learning_rate_multiplier**exponent * plan.learning_rate_multiplier(name),
            inherited.adam_eps_multiplier * plan.adam_eps_multiplier(name),
        )
    event = {
        "event": "grow",
        "source": {"name": reader.path.name, "sha256": source.digest},
        "step": source.progress.step,
        **plan.changes,
        "optimizer": "map" if output.keep_optimizer else "reset",
        "noise_scale": plan.symmetry.noise_scale,
        "share_scale": plan.symmetry.share_scale,
        "seed": plan.symmetry.seed,
    }
    return Manifest(
        model=plan.target,
        layout=layout_of(output.parallel),
        progress=source.progress if output.keep_optimizer else source.progress.model_copy(update={"optimizer_step": 0}),
        annealing=Annealing(
            since_step=source.progress.step, hold_steps=output.hold_steps, anneal_steps=output.anneal_steps
        ),
        parameters=parameter_records(plan.specs, multipliers),
        files={},
        lineage=(*source.lineage, event),
        training_data=source.training_data,
    )
