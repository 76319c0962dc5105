"""The ranks that hold parts of a model, as rank 0 sees them.

Rank 0 is the process that has the `Lab`: it runs the model, and with it all taps and edits. The
other ranks do nothing but multiply what they are given with the weights they hold. So there is no
lockstep to keep: a rank that has nothing to do in a forward is not asked, edits may be any Python
function, and recordings are where they are wanted.
"""

from __future__ import annotations

import datetime
import os
import queue
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from ernie_lab.parallel.messages import TIMEOUT, Kind, Link, Message


class RankError(RuntimeError):
    """A rank failed, with its own traceback; or it is gone."""


class Follower(Protocol):
    """What was started as one rank."""

    def epitaph(self, wait: float) -> str | None:
        """Why it is gone, with its last words; None where it lives on for `wait` seconds."""
        ...

    def stop(self) -> None:
        """End it, and see that it has ended."""
        ...


class Ranks:
    """All ranks but this one, which is rank 0.

    `close()` ends them; so do the last reference to this object and the end of Python.
    `reports` tells what each rank loaded, by rank; rank 0 is not among them.
    """

    def __init__(self, link: Link, followers: Sequence[Follower] = ()) -> None:
        self.n_ranks = link.n_ranks
        self.reports: dict[int, dict[str, Any]] = {}
        self._shared = _Shared(link, tuple(followers))
        threading.Thread(target=_work, args=(self._shared.jobs,), daemon=True).start()
        # Not `self.close`, which would hold `self`.
        self._finalizer = weakref.finalize(self, _close, self._shared)

    @property
    def others(self) -> range:
        return range(1, self.n_ranks)

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive

    def close(self) -> None:
        """End them, where they were started for one model; those of torchrun end with rank 0."""
        if self._shared.followers:
            self._finalizer()

    def talk(self) -> Talk:
        return Talk(self._shared)

    def sums(self, number: int, *, heads: bool = False) -> list[str]:
        """What tells the weights of a bank, or of a layer's heads, from others; by rank."""
        question = Message(Kind.SUMS, number, flags=int(heads))
        with self.talk() as talk:
            replies = talk.ask(dict.fromkeys(self.others, question)).result()
        return [replies[rank].text for rank in self.others]

    def tell(self, message: Message) -> None:
        """Say something to all that nobody waits for; from a finalizer, so without the lock."""
        shared, all_of_them = self._shared, dict.fromkeys(self.others, message)
        if not self.closed:
            shared.submit(lambda: shared.mention(all_of_them))


@dataclass(slots=True, eq=False)
class _Shared:
    """What `Ranks`, its talks and the thread that sends and receives have in common.

    Only that thread touches `link` and `waiting`: an interrupt (Ctrl-C) reaches the main thread
    alone, so an exchange is always carried to its end and no half a message is left.
    """

    link: Link
    followers: tuple[Follower, ...]
    jobs: queue.SimpleQueue[Callable[[], None] | None] = field(default_factory=queue.SimpleQueue)
    lock: threading.RLock = field(default_factory=threading.RLock)
    talking: bool = False
    waiting: set[int] = field(default_factory=set)  # ranks that have SHOWN and got no answer
    unsaid: list[Mapping[int, Message]] = field(default_factory=list)
    broken: str | None = None
    ended: bool = False
    owner: int = field(default_factory=os.getpid)

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self.ended:  # nobody would take it up
            future.set_exception(RankError(self.broken))
            return future

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self.jobs.put(run)
        return future

    def exchange(
        self, messages: Mapping[int, Message], timeout: datetime.timedelta
    ) -> dict[int, Message]:
        """Send to each rank, and receive one reply from each."""
        if self.broken:
            raise RankError(self.broken)
        try:
            self.link.send(messages)
            replies = {rank: self.link.receive(rank, timeout) for rank in messages}
        except RuntimeError as error:  # gloo's word for everything
            self.broken = self._post_mortem(error, timeout)
            for follower in self.followers:
                follower.stop()
            raise RankError(self.broken) from error
        self.waiting = {rank for rank, reply in replies.items() if reply.kind is Kind.SHOWN}
        failed = {rank: r.text for rank, r in replies.items() if r.kind is Kind.FAILED}
        if failed:
            self.abort()
            rank, traceback = next(iter(failed.items()))
            raise RankError(f"rank {rank} of {self.link.n_ranks} failed:\n\n{traceback}")
        return replies

    def abort(self) -> None:
        """Call back ranks that wait for an answer which will not come."""
        if self.waiting and not self.broken:
            self.exchange(dict.fromkeys(self.waiting, Message(Kind.ABORT)), TIMEOUT)

    def mention(self, *more: Mapping[int, Message]) -> None:
        """Exchange what can wait, once no rank is in the midst of something."""
        self.unsaid += more
        while self.unsaid and not self.waiting and not self.broken:
            self.exchange(self.unsaid.pop(0), TIMEOUT)

    def _post_mortem(self, error: RuntimeError, timeout: datetime.timedelta) -> str:
        # A connection may end a moment before its process does.
        told = [follower.epitaph(wait=0.5) for follower in self.followers]
        for rank, epitaph in enumerate(told, start=1):
            if epitaph is not None:
                return f"rank {rank} of {self.link.n_ranks} is gone: {epitaph}\n{_AGAIN}"
        if "timed out" in str(error).lower():
            return f"a rank gave no reply within {timeout}: {error}\n{_AGAIN}"
        return f"the connection with a rank is lost: {error}\n{_AGAIN}"


_AGAIN = "The model is not usable any more; load it again"
_CLOSED = "the ranks that hold parts of this model were closed; load it again"


class Talk:
    """One question to some ranks, and what they show of their work until it is done.

    Holds the ranks for one thread. What is left unanswered at its end is called off.
    """

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared

    def __enter__(self) -> Talk:
        if os.getpid() != self._shared.owner:  # the thread that talks was not copied
            raise RankError("a model over ranks is of the process that loaded it, not of its forks")
        self._shared.lock.acquire()
        if self._shared.talking:
            self._shared.lock.release()
            raise RankError(
                "the model was run from inside a tap at a site that other ranks compute (an "
                "expert's gate, up or act, or a head's part); they are in the midst of it. Take "
                "what is needed there, and run the model afterwards"
            )
        self._shared.talking = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._shared.submit(self._shared.abort)
        if self._shared.unsaid:
            self._shared.submit(self._shared.mention)
        self._shared.talking = False
        self._shared.lock.release()

    def ask(
        self, messages: Mapping[int, Message], timeout: datetime.timedelta = TIMEOUT
    ) -> Future[dict[int, Message]]:
        """The replies, later: meanwhile rank 0 may do its own part."""
        shared = self._shared
        return shared.submit(lambda: shared.exchange(messages, timeout) if messages else {})

    def answer(self, changed: Mapping[int, Tensor | None]) -> Future[dict[int, Message]]:
        """To all that have shown something: what flows on in its place, None for the very same."""
        return self.ask(
            {
                rank: Message(Kind.ANSWER, tensors=() if x is None else (x,))
                for rank, x in changed.items()
            }
        )


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # or the last one would be kept alive until the next


def _close(shared: _Shared) -> None:
    shared.broken = shared.broken or _CLOSED
    shared.ended = True
    shared.jobs.put(None)
    for follower in shared.followers:
        follower.stop()
