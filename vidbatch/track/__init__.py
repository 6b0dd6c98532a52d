"""Tracks: which boxes of a video are the same thing, from the committed tables alone.

rule        the tracker file
associate   boxes in the order of time → track ids; pure
sources     the committed outputs that it is made from
tasks       one task of the plan → rows of `tracks`
work        `vidbatch track`

A tracker is an output like a model: it commits each first-generation task of the plan for itself,
so a rerun finds by one LIST what is left, two at once make one set of files, and `verify` covers
it. A task is taken when every clip of its videos has ended for good: ok, partial, or failed beyond
the retries that come by themselves. Until then its videos wait; what is tracked is never tracked
again by the same rule.
"""

from vidbatch.track.rule import TrackRule, TrackWhat, load_rule
from vidbatch.track.work import TrackReport, report_lines, track

__all__ = ["TrackReport", "TrackRule", "TrackWhat", "load_rule", "report_lines", "track"]
