"""Counting optimizer steps: which iteration a training loop is at, wherever in its body it asks."""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer


class StepCounter:
    """Optimizer steps taken.

    Within the body of a step the count rises when the optimizer steps, so that a checkpoint made
    before it and one made after it carry the right iteration. Where no optimizer is known, the body
    is taken to have trained already whenever it asks.
    """

    def __init__(self, iteration: int, objects: Iterable[Any] = ()) -> None:
        self._completed = iteration
        self._in_body = False
        self._has_stepped = False
        self._hooks: list[Any] = []
        self.watch(objects)

    def watch(self, objects: Iterable[Any]) -> None:
        """Listen to every optimizer among `objects`."""
        for value in objects:
            if isinstance(value, Optimizer):
                self._hooks.append(value.register_step_post_hook(self.note))

    def note(self, *_: object) -> None:
        """The step of this body was made."""
        self._has_stepped = True

    @property
    def iteration(self) -> int:
        """Steps taken so far."""
        return self._completed + (self._in_body and (self._has_stepped or not self._hooks))

    @property
    def begun(self) -> int:
        """Steps taken before the present body: the iteration of the weights that its loss is computed with."""
        return self._completed

    def begin(self) -> int:
        """A body begins; returns its number, from 0."""
        self._in_body, self._has_stepped = True, False
        return self._completed

    def end(self) -> None:
        """A body has come to its end."""
        self._completed, self._in_body = self._completed + 1, False

    def abandon(self) -> None:
        """A body was left early: what it did counts."""
        self._completed, self._in_body = self.iteration, False

    def remove(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()
