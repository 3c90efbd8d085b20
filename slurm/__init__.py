"""Slurm: submits a checked run file as a job that saves, requeues itself and resumes until the run is finished.

`spec.py` (what a job is) and `site.py` (a site's defaults) -> `request.py` (what to submit) -> `render.py` (the batch
script, a pure function) -> `submit.py` (freeze the source, sbatch, record). `node.py` runs on the nodes and needs
only the standard library. `jobs.py` queries and stops jobs; `client.py` is the only file that runs Slurm's programs;
`commands.py` is the command line.
"""
