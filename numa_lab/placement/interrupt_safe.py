"""``with`` blocks whose undoing no interrupt prevents: what each thread has entered, and owes to undo.

A signal's handler (Ctrl-C's, an alarm's) may raise wherever Python looks for signals: where a function begins, after a call of
compiled code, where a loop turns. So a block may end before its ``__exit__`` has run a single line. Therefore what is entered is on
its thread's chain before anything is changed; to undo it is safe again and again; and what a block that has ended left behind is
undone when its thread enters or leaves the next one.

Whether a block has ended is known from how Python runs it: it looks ``__exit__`` up, then calls ``__enter__``, and keeps what it
found until the block is over, in whichever way. ``Exit`` lets each look-up find another object, and holds it weakly. That object is no
local variable of any function here, so a traceback that somebody keeps, as IPython does, does not keep it.

Limits: what is entered by hand (``__enter__()``) lasts until it is left, or a block around it is. ``contextlib.ExitStack``, and a
generator that holds a block, are objects of Python's own: if an exception comes in their few lines, undoing waits until nobody keeps
the traceback. It comes with the next enter or leave, not at once: in a weak reference's callback, or in ``__del__``, Python would drop
what a handler raises.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial


class Ticket:
    """One look-up of ``__exit__``: of whose, whether it was used to enter, and whether what it found was called, or is gone."""

    __slots__ = "found", "is_over", "owner", "used"

    def __init__(self, owner: object) -> None:
        self.owner = None if owner is None else id(owner)  # None for a class, where contextlib.ExitStack looks
        self.used = self.is_over = False
        self.found: Callable[[], object]


class Exit:
    """Makes an ``__exit__`` of a function ``(self, ticket, *exception)``; the ticket says which block is left."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __get__(self, owner: object, kind: type | None = None) -> Callable[..., None]:
        ticket = Ticket(owner)
        found = partial(self._of_class, ticket) if owner is None else partial(self._function, owner, ticket)
        ticket.found = weakref.ref(found)
        _of_thread.asked = ticket
        return found

    def _of_class(self, ticket: Ticket, owner: object, *exception: object) -> None:
        ticket.is_over = True  # where an exception comes now, ExitStack's frame may outlive it
        self._function(owner, ticket, *exception)


class Entered(ABC):
    """What a thread has entered; ``undo`` gives back what that changed, and may be called again after it was interrupted."""

    def __init__(self, owner: object = None, ticket: Ticket | None = None) -> None:
        self.owner = owner
        self.outer: Entered | None = None
        self.ticket = ticket
        self.is_over = False

    @abstractmethod
    def undo(self) -> None:
        """Give back whatever has been changed since ``begin``; nothing where that was done."""

    def begin(self) -> None:
        """Put this on the calling thread's chain: from now on it is undone, whatever happens."""
        entered()
        self.is_over = False
        self.outer, _of_thread.innermost = _of_thread.innermost, self

    def end(self) -> None:
        """Undo this and whatever was entered inside of it; nothing where that was done.

        In another thread than the one that entered it, that one is left to undo it.
        """
        self.is_over = True
        entered()


class _OfThread(threading.local):
    """What a thread entered last, and for what it looked ``__exit__`` up last."""

    innermost: Entered | None = None
    asked: Ticket | None = None


_of_thread = _OfThread()


def ticket_for(owner: object) -> Ticket | None:
    """In ``__enter__``: the look-up that a ``with`` block of this object has just made; None where it is called by hand."""
    ticket, _of_thread.asked = _of_thread.asked, None
    if ticket is None or ticket.owner not in (None, id(owner)) or ticket.found() is None:
        return None
    ticket.used = True
    return ticket


def end(owner: object, ticket: Ticket) -> None:
    """In ``__exit__``: end what was entered by this ticket; or, where it is called by hand, what was entered so last."""
    one = _of_thread.innermost
    while one is not None:
        by_hand = not (ticket.used or one.ticket or one.is_over) and one.owner is owner
        if one.ticket is ticket or by_hand:
            one.is_over = True
            break
        one = one.outer
    entered()


def entered() -> list[Entered]:
    """What the calling thread is inside of, the innermost first, when what is over is undone, with all that is inside of it."""
    while True:
        found, over, one = [], False, _of_thread.innermost
        while one is not None:
            found.append(one)
            ticket = one.ticket
            over = over or one.is_over or (ticket is not None and (ticket.is_over or ticket.found() is None))
            one = one.outer
        if not over:
            return found
        found[0].undo()
        if _of_thread.innermost is found[0]:  # a handler that enters something may have come here first
            _of_thread.innermost = found[0].outer
