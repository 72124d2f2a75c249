"""Reports: tables, charts, figures and pages; and here what a user chooses of them, without a heavy import."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cafe.results.protocols import ProtocolName, TestTime

MISTAKES = 24  # faces that a gallery of mistakes shows


@dataclass(frozen=True)
class ReportSettings:
    """How runs are compared; `cafe compare` and `cafe report` have an option for each field."""

    versus: str | None = field(
        default=None,
        metadata={
            "help": "Test the accuracy of every other row against this method, tag or row.",
            "metavar": "ROW",
        },
    )
    protocol: ProtocolName | None = field(
        default=None,
        metadata={"help": "How the runs were evaluated; default: clean, where any of them was."},
    )
    test_time: tuple[Literal[TestTime, "seeds"], ...] = field(
        default=(),
        metadata={
            "help": "Add rows as evaluated with this option; seeds: the mean over the seeds of each row. Repeatable.",
            "multiple": True,
        },
    )
    by: str = field(
        default="",
        metadata={
            "help": "Part each target's faces by this column of its manifest: label, group, width, agreement (of people who "
            "voted), or one that was kept, such as sex.",
            "metavar": "COLUMN",
        },
    )
    exclude_leaks: bool = field(
        default=False, metadata={"help": "Add columns without copies of the source's training faces."}
    )
    as_printed: bool = field(
        default=False,
        metadata={"help": "Add the supplement's Table 2 as the paper prints it, and the errors by class and target."},
    )
    shared_classes: bool = field(
        default=False, metadata={"help": "Predict only among the classes that model and target share."}
    )
