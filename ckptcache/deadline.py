"""A limit of time for a training: when the next step could make it late."""

import math


class Deadline:
    """Ends a training early enough for a last save.

    What a step takes is the longest of those seen, whatever was done in it; the first, in which things
    are compiled and loaded, counts only until there is another. What a save takes is the longest seen.

    Args:
        seconds: how long it may take from its start to the end of the last save; None: no limit.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self._first: float | None = None
        self._longest = 0.0
        self._save = 0.0

    def stepped(self, seconds: float) -> None:
        """A step took so many seconds."""
        if self._first is None:
            self._first = seconds
        else:
            self._longest = max(self._longest, seconds)

    def saved(self, seconds: float) -> None:
        """A save was durable after so many seconds."""
        self._save = max(self._save, seconds)

    @property
    def reserve(self) -> float:
        """Seconds that one more step and the last save are reckoned to take."""
        return (self._longest or self._first or 0.0) + self._save

    def is_due(self, elapsed: float) -> bool:
        """Whether to end now, so many seconds after the start; before the first step only when time is up already."""
        return elapsed + (0.0 if self._first is None else self.reserve) >= self.seconds
