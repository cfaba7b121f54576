"""A programme as a chain of Slurm jobs: one script for each stage, each job waiting for the success of the one before.

A job starts its stage's processes itself, on its one node. What failed, or ran into its time limit, goes on when the
programme is submitted again.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from launcher.program.stages import Stage
from launcher.start import megacore_command
from megacore.errors import ConfigError, MegacoreError
from megacore.publish import os_errors, replace_file

_TEMPLATE = "stage.sbatch"
_PATIENCE = 120
"""Seconds that sbatch has to answer."""


@dataclass(frozen=True)
class Submission:
    """What all jobs of a programme have in common.

    Args:
        program: the programme's YAML.
        processes: of stages that do not say, where it is not the file's value.
        options: of sbatch, as words, for all stages; they come after the programme's own, and win.
    """

    program: Path
    processes: int | None = None
    options: Sequence[str] = ()


def stage_script(stage: Stage, submission: Submission) -> str:
    """Return the script of a stage's job.

    Raises:
        ConfigError: an option is none.
    """
    template = Template(files("launcher.program").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    program = submission.program.absolute()
    command = megacore_command("program", program, "--stage", str(stage.number))
    if submission.processes is not None:
        command += ["--processes", str(submission.processes)]
    return template.substitute(
        name=stage.name,
        program=program.name,
        job=shlex.quote(f"{program.stem}-{stage.name}"),
        directory=shlex.quote(str(Path.cwd())),
        log=shlex.quote(str(stage.file(".log").absolute()).replace("%", "%%")),
        processes=stage.processes,
        options="".join(f"#SBATCH {line}\n" for line in _option_lines((*stage.sbatch, *submission.options))),
        command=shlex.join(command),
    )


def _option_lines(words: Sequence[str]) -> list[str]:
    """Put each option on a line, with its value where that is a word of its own."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("-"):
            lines.append([word])
        elif lines and len(lines[-1]) == 1 and "=" not in lines[-1][0]:
            lines[-1].append(word)
        else:
            raise ConfigError(f"'{word}' is no option of sbatch, nor the value of one; write --option=value")
        if "\n" in word:
            raise ConfigError(f"{word!r}: an option of sbatch has no line breaks")
    return [shlex.join(line) for line in lines]


def submit(stages: Sequence[Stage], submission: Submission) -> dict[str, str]:
    """Write the scripts of the stages beside their directories, and submit them in a chain: all of them, or none.

    Returns:
        The number of each stage's job, by the stage's name.

    Raises:
        MegacoreError: there is no Slurm, or it refused a job; the message has its words.
    """
    for tool in ("sbatch", "scancel"):
        if shutil.which(tool) is None:
            raise ConfigError(f"--slurm: there is no {tool} here; run this where jobs are submitted")
    jobs: dict[str, str] = {}
    for stage in stages:
        path = stage.file(".sbatch")
        with os_errors(path, ConfigError):
            replace_file(path, stage_script(stage, submission).encode())
        try:
            jobs[stage.name] = _submit(path, next(reversed(jobs.values()), None))
        except BaseException:
            if jobs:
                subprocess.run(["scancel", *jobs.values()], timeout=_PATIENCE)
            raise
    return jobs


def _submit(script: Path, before: str | None) -> str:
    after = [f"--dependency=afterok:{before}"] if before else []
    command = ["sbatch", "--parsable", *after, str(script)]
    # The nodes may have GPUs, though this machine, for which the accelerator was guessed, has none.
    environment = {key: value for key, value in os.environ.items() if (key, value) != ("DS_ACCELERATOR", "cpu")}
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        raise MegacoreError(f"sbatch did not answer in {_PATIENCE} s; is the cluster's controller up?") from None
    if result.returncode:
        reason = result.stderr.strip() or f"exit code {result.returncode}"
        raise MegacoreError(f"sbatch refused {script}: {reason}")
    return result.stdout.strip().partition(";")[0]
