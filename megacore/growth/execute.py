"""Execute a growth plan: stream a source checkpoint into a grown one, file by file, in parallel over ranks."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megacore.checkpoint.files import MAX_FILE_BYTES, layout_of, plan_files, share_of
from megacore.checkpoint.manifest import MOMENTS, WEIGHT, Annealing, Manifest, parameter_records
from megacore.checkpoint.writer import Check, FileToWrite, write_checkpoint
from megacore.communicator import Communicator, together
from megacore.config import ParallelConfig
from megacore.growth.apply import Grower
from megacore.growth.describe import Dtypes, notes
from megacore.growth.plan import GrowthPlan
from megacore.growth.source import GrowthSource, companions, origin

_THREADS = 2
"""That compute while others read, write and flush."""


@dataclass(frozen=True)
class GrowthOutput:
    """How the grown checkpoint is written.

    Args:
        parallel: its layout; each tensor-parallel rank of each pipeline stage will find its own files.
        keep_optimizer: map Adam's moments too, if the source has them; otherwise only weights are written.
        dtype: of all tensors, or ``None`` for the source's; bfloat16 is of the weights alone.
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
    source: GrowthSource,
    plan: GrowthPlan,
    path: Path,
    output: GrowthOutput,
    group: Communicator,
    on_progress: Callable[[int], None] = lambda size: None,
    check: Check = lambda grown: (),
) -> None:
    """Write the grown checkpoint; every rank of ``group`` calls this and writes its share of the files.

    What is written depends on the plan and the layout only, never on the number of ranks.

    Args:
        source: the small model's checkpoint.
        plan: made from the source's configuration.
        path: the directory to write; must not exist.
        output: layout and options.
        group: the ranks that work together.
        on_progress: called with the number of bytes of each block this rank has written.
        check: looks at the grown checkpoint before it is published, on rank 0; what it raises prevents that.

    Raises:
        ConfigError: the layout does not fit the grown model.
        CheckpointError: the source is damaged, or the target cannot be written.
    """
    with ThreadPoolExecutor(_THREADS, "grow") as pool:
        with together(group):
            files = planned_files(source, plan, output, pool)
            manifest = _manifest(source, plan, output)
        attach = companions(source, group)
        write_checkpoint(path, group, share_of(files, group, on_progress), manifest, attach, check)


def planned_files(
    source: GrowthSource, plan: GrowthPlan, output: GrowthOutput, pool: Executor | None = None
) -> list[FileToWrite]:
    """List all files of the grown checkpoint with their pieces; nothing is computed yet.

    Args:
        source: the small model's checkpoint.
        plan: made from the source's configuration.
        output: layout and options.
        pool: computes the values.

    Raises:
        ConfigError: the layout does not fit the grown model.
    """
    source.specs()
    output.parallel.check(plan.target)
    layout, states = layout_of(output.parallel), written_states(source, output)
    grower = Grower(source, plan, output.dtype)
    return plan_files(plan.specs, states, layout, grower.dtype, grower.box, output.max_file_bytes, pool)


def written_states(source: GrowthSource, output: GrowthOutput) -> tuple[str, ...]:
    """Return what is written of every parameter."""
    return source.states if output.keep_optimizer and set(MOMENTS) <= set(source.states) else (WEIGHT,)


def dtypes_of(source: GrowthSource, plan: GrowthPlan, output: GrowthOutput) -> Dtypes:
    """Return what tells the types that are read and written."""
    return Dtypes(source.dtype, Grower(source, plan, output.dtype).dtype)


def _manifest(source: GrowthSource, plan: GrowthPlan, output: GrowthOutput) -> Manifest:
    known = source.manifest
    exponent = known.annealing.exponent(known.progress.step)
    multipliers = {}
    for name in plan.specs:
        inherited = known.parameters[plan.rules[name].source]
        multipliers[name] = (
            inherited.learning_rate_multiplier**exponent * plan.learning_rate_multiplier(name),
            inherited.adam_eps_multiplier * plan.adam_eps_multiplier(name),
        )
    keeps = len(written_states(source, output)) > 1
    found = notes(plan, dtypes_of(source, plan, output), output.keep_optimizer, keeps)
    event = {
        "event": "grow",
        "source": origin(source),
        "step": known.progress.step,
        **plan.changes,
        "optimizer": "map" if keeps else "reset",
        "noise_scale": plan.symmetry.noise_scale,
        "share_scale": plan.symmetry.share_scale,
        "seed": plan.symmetry.seed,
        "not_exact": [f"{note.about}: {note.reason}" for note in found],
    }
    return Manifest(
        model=plan.target,
        layout=layout_of(output.parallel),
        progress=known.progress if keeps else known.progress.model_copy(update={"optimizer_step": 0}),
        annealing=Annealing(
            since_step=known.progress.step, hold_steps=output.hold_steps, anneal_steps=output.anneal_steps
        ),
        parameters=parameter_records(plan.specs, multipliers),
        files={},
        lineage=(*known.lineage, event),
        training_data=known.training_data,
    )
