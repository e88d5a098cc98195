"""Context managers whose undoing no interrupt prevents: each thread's chain of what it has entered and has to undo.

A signal's handler (that of Ctrl-C, or of an alarm) may raise an exception wherever Python looks for signals: where a function
begins, after a call of compiled code, and where a loop turns. A ``with`` block may therefore end before its ``__exit__`` has run a
single line. This module is built on three rules against that. What is entered is put on its thread's chain before anything is
changed. Undoing it may be repeated safely. And what an ended block left behind is undone when its thread enters or leaves the next
block.

The module learns that a block has ended from the way in which Python runs it. Python looks ``__exit__`` up, then calls
``__enter__``, and keeps the object that it found until the block is over, however it ends. ``Exit`` returns a new object for each
look-up and holds it by a weak reference alone, so the block is over once that object is gone. Once the look-up has returned it, no
function of this module has the object in a local variable, so a traceback that somebody keeps, as IPython does, does not keep it alive.

Limits: what is entered by hand (by calling ``__enter__()``) lasts until it is left, or until a block around it ends.
``contextlib.ExitStack``, and a generator that holds a block, are Python code of their own: if an exception comes in their few lines,
the undoing waits until nobody keeps the traceback any more. It happens at the next enter or leave, and not at once, because
Python drops what a handler raises in a weak reference's callback or in ``__del__``.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial


class Ticket:
    """One look-up of ``__exit__``, which stands for the one ``with`` block that made it.

    It knows the object whose ``__exit__`` was looked up, whether ``__enter__`` has used it, and whether the block is over: the
    function that the look-up returned was called, or is gone.
    """

    __slots__ = "exit_function", "is_over", "owner", "used"

    def __init__(self, owner: object) -> None:
        self.owner = None if owner is None else id(owner)  # None for a class, where contextlib.ExitStack looks
        self.used = self.is_over = False
        self.exit_function: Callable[[], object]  # a weak reference


class Exit:
    """A descriptor that makes ``__exit__`` of a function ``(self, ticket, *exception)``; the ticket says which block is left."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __get__(self, owner: object, kind: type | None = None) -> Callable[..., None]:
        ticket = Ticket(owner)
        exit_function = partial(self._of_class, ticket) if owner is None else partial(self._function, owner, ticket)
        ticket.exit_function = weakref.ref(exit_function)
        _of_thread.last_ticket = ticket
        return exit_function

    def _of_class(self, ticket: Ticket, owner: object, *exception: object) -> None:
        ticket.is_over = True  # where an exception comes now, ExitStack's frame may outlive it
        self._function(owner, ticket, *exception)


class Entered(ABC):
    """Something that a thread has entered; ``undo`` takes back what was changed, and may be called again after an interrupt."""

    def __init__(self, owner: object = None, ticket: Ticket | None = None) -> None:
        self.owner = owner
        self.outer: Entered | None = None
        self.ticket = ticket
        self.is_over = False

    @abstractmethod
    def undo(self) -> None:
        """Take back whatever has been changed since ``begin``; do nothing where that was done before."""

    def begin(self) -> None:
        """Put this on the calling thread's chain: from now on it is undone, whatever happens."""
        entered()
        self.is_over = False
        self.outer, _of_thread.innermost = _of_thread.innermost, self

    def end(self) -> None:
        """Undo this and whatever was entered inside of it; do nothing where that was done before.

        When another thread calls this than the one that entered, the undoing is left to the thread that entered.
        """
        self.is_over = True
        entered()


class _ThreadChain(threading.local):
    """What a thread entered last, from which the chain leads outwards, and its last look-up of an ``__exit__``."""

    innermost: Entered | None = None
    last_ticket: Ticket | None = None


_of_thread = _ThreadChain()


def ticket_for(owner: object) -> Ticket | None:
    """Return, for an ``__enter__``, the look-up that a ``with`` block of this object has just made.

    It is None where ``__enter__`` is called by hand.
    """
    ticket, _of_thread.last_ticket = _of_thread.last_ticket, None
    if ticket is None or ticket.owner not in (None, id(owner)) or ticket.exit_function() is None:
        return None
    ticket.used = True
    return ticket


def end(owner: object, ticket: Ticket) -> None:
    """End, for an ``__exit__``, what was entered by this ticket; where it is called by hand, what was entered by hand last."""
    candidate = _of_thread.innermost
    while candidate is not None:
        by_hand = not (ticket.used or candidate.ticket or candidate.is_over) and candidate.owner is owner
        if candidate.ticket is ticket or by_hand:
            candidate.is_over = True
            break
        candidate = candidate.outer
    entered()


def entered() -> list[Entered]:
    """Undo all that is over, with whatever was entered inside of it; return what the calling thread is still in, innermost first."""
    while True:
        chain, over, member = [], False, _of_thread.innermost
        while member is not None:
            chain.append(member)
            ticket = member.ticket
            over = over or member.is_over or (ticket is not None and (ticket.is_over or ticket.exit_function() is None))
            member = member.outer
        if not over:
            return chain
        chain[0].undo()
        if _of_thread.innermost is chain[0]:  # a handler that enters something may have come here first
            _of_thread.innermost = chain[0].outer
