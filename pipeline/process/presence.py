"""What of a cluster is there and what was, as nodes come and go, and how long those that are gone are waited for."""

from __future__ import annotations

from threading import Event


class Presence:
    """What of the connected cluster's cores and GPUs is there, and what was: nodes that are gone may come back.

    They are waited for so many `minutes`, or without a limit where these are none, and no longer than the connection lasts.
    """

    def __init__(self, minutes: int = 0) -> None:
        self.minutes = minutes
        self.most: dict[str, int] = {}
        self.gone: set[str] = set()
        self.left = Event()

    def begin(self, minutes: int) -> None:
        """Wait for so many from now on."""
        self.minutes = minutes
        self.left.clear()

    def end(self) -> None:
        """Let nobody wait any more, and forget what was there."""
        self.left.set()
        self.most.clear()
        self.gone.clear()

    def note(self, resource: str, there: int) -> str:
        """Note how many there are of a resource; return what is to be said of it, mostly nothing."""
        self.most[resource] = max(there, self.most.get(resource, 0))
        if self.most[resource] and not there and resource not in self.gone:
            self.gone.add(resource)
            return (
                f"The cluster has lost all its {resource}s: what needs one waits {self.patience} for some to be back "
                "(--scale-minutes); what is done is kept, and after Ctrl-C the same command goes on from it, too."
            )
        if there and resource in self.gone:
            self.gone.remove(resource)
            return f"The cluster has {there} {resource}s again: going on."
        return ""

    def had(self, resource: str, wanted: int) -> bool:
        """Whether there were as many once."""
        return self.most.get(resource, 0) >= wanted

    @property
    def patience(self) -> str:
        """How long what is gone is waited for, in words."""
        return f"{self.minutes} minutes" if self.minutes else "as long as it takes"

    def pause(self, seconds: float) -> None:
        """Wait; raise `InterruptedError` as soon as the cluster is left."""
        if self.left.wait(seconds):
            raise InterruptedError("The command that waited for the cluster has ended.")
