"""How far long work is: what goes to a callback, what gives one, such as a bar on a terminal, and what a log says of it."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Protocol

WINDOW_SECONDS = 30.0  # the rate is that of the last ones
SILENT_SECONDS = 30.0  # after which a log says again how far work is
NEWS_SECONDS = 5.0  # between two lines of a log, though there is something new, such as another epoch
RECORD_SECONDS = 1.0  # between two records without anything new


class Progress(Protocol):
    """Takes how far work is, and what is known besides: of a training `epochs_done`, `epochs`, `loss` and `accuracy`."""

    def __call__(self, done: int, total: int, /, **facts: float) -> None:
        """Note that so much of a total is done."""


Bar = Callable[[str, str], AbstractContextManager[Progress]]  # (title, unit)


@contextmanager
def no_bar(title: str, unit: str) -> Iterator[Progress]:
    """Show nothing."""

    def ignore(done: int, total: int, /, **facts: float) -> None:
        pass

    yield ignore


class Pace:
    """How fast work goes: by what was done in the last half minute, or between the last two changes where that is longer."""

    def __init__(self) -> None:
        self.seen: deque[tuple[float, int]] = deque()  # at most one a second, but for the last

    def note(self, seconds: float, done: int) -> None:
        """Note what is done at a time in seconds."""
        if self.seen and self.seen[-1][1] >= done:
            return
        if len(self.seen) > 1 and self.seen[-1][0] - self.seen[-2][0] < 1:
            self.seen.pop()
        self.seen.append((seconds, done))
        while len(self.seen) > 2 and self.seen[1][0] <= seconds - WINDOW_SECONDS:
            self.seen.popleft()

    @property
    def measured(self) -> float:
        """The seconds that the rate is measured on."""
        return self.seen[-1][0] - self.seen[0][0] if self.seen else 0.0

    @property
    def rate(self) -> float | None:
        """What is done in a second; None until that is known."""
        return (self.seen[-1][1] - self.seen[0][1]) / self.measured if self.measured else None

    def seconds_left(self, total: int) -> float | None:
        """Return the seconds until all is done; None until that is known."""
        return (total - self.seen[-1][1]) / self.rate if self.rate else None


class Log:
    """Says now and then how far work is: after an epoch of a training, else every half minute; or as records of JSON."""

    def __init__(
        self,
        title: str,
        unit: str,
        write: Callable[[str], None],
        records: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.unit, self.write, self.records, self.clock = title, unit, write, records, clock
        self.pace, self.facts, self.last = Pace(), dict[str, float](), clock()

    def __call__(self, done: int, total: int, /, **facts: float) -> None:
        """Write how far work is, where it is time to."""
        now, news = self.clock(), facts != self.facts
        self.pace.note(now, done)
        if self.records:
            due = news or done == total or now - self.last >= RECORD_SECONDS
        else:
            due = now - self.last >= (NEWS_SECONDS if news else SILENT_SECONDS)
        if due and total:
            self.write(self._record(done, total, facts) if self.records else self._line(done, total, facts))
            self.last, self.facts = now, facts

    def _line(self, done: int, total: int, facts: Mapping[str, float]) -> str:
        rate, left = self.pace.rate, self.pace.seconds_left(total)
        parts = [describe(facts), f"{done:,} of {total:,} {self.unit}", rate and f"{format_rate(rate)}/s"]
        if left is not None and done < total:
            parts.append(f"{format_seconds(left)} left")
        return f"{self.title}: {', '.join(part for part in parts if part)}"

    def _record(self, done: int, total: int, facts: Mapping[str, float]) -> str:
        known = {"work": self.title, "unit": self.unit, "done": done, "total": total, **facts}
        known |= {"rate": self.pace.rate, "seconds_left": self.pace.seconds_left(total)}
        return json.dumps(
            {name: round(value, 6) if isinstance(value, float) else value for name, value in known.items()},
            ensure_ascii=False,
        )


def describe(facts: Mapping[str, float]) -> str:
    """Return what is known of a training in words."""
    parts = []
    if "epochs" in facts:
        parts.append(f"{facts['epochs_done']:.0f} of {facts['epochs']:.0f} epochs")
    if "loss" in facts:
        parts.append(f"loss {facts['loss']:.3f}")
    if "accuracy" in facts:
        parts.append(f"training accuracy {100 * facts['accuracy']:.1f} %")
    return ", ".join(parts)


def describe_for_bar(pace: Pace, done: int, total: int, unit: str, facts: Mapping[str, float]) -> str:
    """Return what stands behind a bar: what is known of a training, else how much is done; rate and time left."""
    parts = [f"{done:,}/{total:,} {unit}"]
    if "epochs" in facts:
        parts = [f"{facts['epochs_done']:.0f}/{facts['epochs']:.0f} epochs"]
    if "loss" in facts:
        parts.append(f"loss {facts['loss']:.3f}")
    if "accuracy" in facts:
        parts.append(f"train {100 * facts['accuracy']:.1f} %")
    if pace.rate:
        parts.append(f"{format_rate(pace.rate)}{'' if parts[0].endswith(unit) else f' {unit}'}/s")
    if done < total and (left := pace.seconds_left(total)) is not None:
        parts.append(f"{format_seconds(left)} left")
    return ", ".join(parts)


def format_rate(rate: float) -> str:
    """Return what is done in a second with a decimal, or with two digits where that would be zero or nearly so."""
    return f"{rate:,.1f}" if rate >= 1 else f"{rate:.2g}"


def format_seconds(seconds: float) -> str:
    """Return a time such as 1:02:03."""
    return str(timedelta(seconds=round(seconds)))
