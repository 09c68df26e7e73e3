"""What a session tells those who asked to hear of it."""

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

from ckptcache.errors import InvalidValue

log = logging.getLogger("ckptcache")
EventName = Literal["resumed", "saved", "evicted", "diverged", "save_failed", "stopped"]
Handler = Callable[[Any], object]


class Events:
    """Functions by the event that they are called at."""

    def __init__(self) -> None:
        self._handlers: dict[str, list[Handler]] = {name: [] for name in get_args(EventName)}

    def on(self, event: str, handler: Handler) -> None:
        """Call `handler` at each `event` from now on; InvalidValue for an event that there is none of."""
        if event not in self._handlers:
            raise InvalidValue(name="event", value=event, reason=f"it must be one of {', '.join(self._handlers)}")
        if not callable(handler):
            raise InvalidValue(name="handler", value=handler, reason="it can't be called")
        self._handlers[event].append(handler)

    def is_heard(self, event: EventName) -> bool:
        """Whether anybody would be told of it."""
        return bool(self._handlers[event])

    def emit(self, event: EventName, told: Any) -> None:
        """Call the handlers of `event` with what it tells, in their order; one that raises is reported, no more."""
        for handler in tuple(self._handlers[event]):
            try:
                handler(told)
            except Exception as error:  # whatever a handler does wrong, training goes on
                name = getattr(handler, "__qualname__", type(handler).__name__)
                log.exception("the handler %s of %r raised %s: %s", name, event, type(error).__name__, error)
