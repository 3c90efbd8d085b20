"""XTREME's data: the tasks (`tasks.py`), and readers of its files that give task rows.

The files may be in the layout of XTREME's download script, the hub dataset, plain CoNLL-U or the X-Mixup authors'
folder, with machine translations from those authors or from XTREME's bucket. `prepare.prepare_task` writes JSON lines
with the columns that `data_pipeline.tasks` reads.
"""
