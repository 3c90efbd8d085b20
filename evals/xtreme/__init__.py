"""XTREME: predictions in its file layout, judged as its own scorer judges them.

In: a folder of predictions and one of labels. Out: scores by task and language, their averages, and a table.
Next: the command line, and comparisons between runs.
"""
