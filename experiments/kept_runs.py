"""Runs of a validation on disk: of one that was killed, no finished run is done again."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import fields
from pathlib import Path

from experiments.records import Records
from experiments.validation_cases import Case
from experiments.validation_runs import Run
from hrm.errors import InvalidSchedule
from simulator import Timeline

__all__ = ["KeptRuns"]

_APART = ("case", "timeline", "before", "after", "rounds")
"""What a line does not hold as it is."""


class KeptRuns:
    """Every run of every round: a line among the records, and its timeline in a file.

    Parameters
    ----------
    records : Records
        Their conditions hold for the runs too.
    folder : Path
        For the timelines; made when the first is written.
    """

    def __init__(self, records: Records, folder: Path) -> None:
        self._records, self._folder = records, folder

    def find(self, case: Case, number: int) -> Run | None:
        """The run of a case in a round, or None if it is not kept, or not whole."""
        found = self._records.find(run_of=case.key, round=number)
        if found is None:
            return None
        try:
            timeline = Timeline.load(self._folder / found["timeline"])
        except InvalidSchedule:
            return None
        before, after = ([{(n, x): s for n, x, s in one} for one in found[when]] for when in ("before", "after"))
        return Run(case=case, timeline=timeline, before=before, after=after, **found["measured"])

    def add(self, run: Run, number: int) -> None:
        """Keep a run, on disk before this returns."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{uuid.uuid4().hex}.json.gz"
        run.timeline.save(self._folder / name)
        passes = {
            when: [[[n, x, s] for (n, x), s in one.items()] for one in getattr(run, when)]
            for when in ("before", "after")
        }
        measured = {field.name: getattr(run, field.name) for field in fields(Run) if field.name not in _APART}
        self._records.add(run_of=run.case.key, round=number, timeline=name, **passes, measured=measured)

    def forget(self) -> None:
        """Delete the timelines; the records are not this object's."""
        shutil.rmtree(self._folder, ignore_errors=True)
