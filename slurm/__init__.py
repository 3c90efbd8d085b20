"""Slurm: from a checked run file to jobs that end by themselves only when the run is done.

`spec.py` (what a job is) and `site.py` (what a site always wants) -> `render.py` (the batch script, pure) ->
`submit.py` (freeze, sbatch, note down). On the nodes runs `node.py`, which needs the standard library alone.
`jobs.py` asks Slurm about jobs and stops them; `client.py` is the only file that calls Slurm's programs;
`commands.py` is the command line. No other room is imported: `crosslift.py` hands over what belongs to one.
"""
