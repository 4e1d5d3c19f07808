"""Functions that take turns: each runs until it asks for something, and goes on when its owner answers.

Every function has a thread of its own, but only one thread runs at a time, so nothing needs a lock. Threads and not
generators, because the question comes from deep inside a `Trainer`, which knows nothing of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any


class Cancelled(BaseException):
    """Raised inside a function that its owner does not let go on; no `except Exception` catches it."""


@dataclass(frozen=True)
class Ended:
    """The function has returned `value`, or raised `error`."""

    value: Any = None
    error: BaseException | None = None


class Turns:
    """A function that can be stopped at every question it asks.

    Args:
        function: Called without arguments; inside, `ask` is called with questions.

    Example:
        >>> turns = Turns(lambda: turns.ask("one?") + turns.ask("two?"))
        >>> turns.go_on(), turns.go_on(1), turns.go_on(2).value
        ('one?', 'two?', 3)
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._questions: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._runs = self._ended = False

    def go_on(self, answer: Any = None) -> Any:
        """Answer the last question and let the function run; an exception as the answer is raised in it.

        Returns:
            Its next question, or `Ended`.
        """
        self._runs = True
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(answer)
        return self._wait()

    def ask(self, question: Any) -> Any:
        """Stop until the owner answers; called inside the function, in its own thread."""
        self._questions.put(question)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def cancel(self) -> None:
        """End the function at the question where it stands; does nothing if it has ended or was never started."""
        if self._runs:  # the owner was interrupted while it waited
            self._wait()
        while self._thread.ident is not None and not self._ended:
            self.go_on(Cancelled())

    def _wait(self) -> Any:
        question = self._questions.get()
        self._runs = False
        if isinstance(question, Ended):
            self._ended = True
            self._thread.join()
        return question

    def _run(self) -> None:
        try:
            ended = Ended(self._function())
        except BaseException as error:
            ended = Ended(error=error)
        self._questions.put(ended)
