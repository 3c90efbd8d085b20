"""XTREME's data: what each task is (`tasks.py`), and its files read as task rows.

In: a folder as XTREME's download script leaves it, the hub's dataset, plain CoNLL-U, or the X-Mixup authors' folder;
and machine translations, theirs or those of XTREME's bucket. Out: JSON lines with the columns that
`data_pipeline.tasks` reads (`prepare.prepare_task`). Next: `training`, `evals.xtreme`.
"""
