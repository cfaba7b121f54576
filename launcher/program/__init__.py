"""Growth schedules: a whole programme of training and growing from one YAML, here or as a chain of Slurm jobs."""
