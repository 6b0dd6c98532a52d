"""The story of a job, told as plain functions: survey → plan → process tasks → summary.

`survey.py` lists and diffs, `task.py` takes one task from its first byte to its commits,
`local.py` runs everything in this process; `cluster/` runs the same functions on Ray.
"""
