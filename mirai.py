#!/usr/bin/env python3
r"""mirai: evaluate Python asynchronously in other processes, from one file and the standard library.

    >>> from mirai import daemons, mirai
    >>> with daemons(2):
    ...     m = mirai(lambda x: x + 1, 41)
    ...     m.result()
    42

`mirai(f, *args, **kwargs)` returns a future at once; `f` runs in a *daemon*, a background process.
`daemons(n)` sets persistent daemons; without them each call gets a process of its own.
The R package mirai, carried over: the names are R's, the futures are Python's.

    host process                       dispatcher process              daemon process
    mirai(f) -> Task -> Serializer -> Message ->| shell: sockets |-> Message -> Serializer -> evaluate
                                                | core: events   |                               |
    Mirai <- Outcome <- Serializer <- Message <-|  into effects  |<- Message <- Serializer <- Outcome
         \                                              |                              /
          `--- control pipe --- nursery process: parent of every dispatcher and local daemon

host        the process that calls `mirai()`
daemon      a process that evaluates tasks, one at a time
dispatcher  a background process between the two, which owns the queue; it alone listens
nursery     a helper of the host that forks dispatchers and local daemons, and ends them with the host
profile     an independent set of daemons, by name
mirai       a future for one task
link        the host's end of its connection to one dispatcher

Contents (a section knows those above it, never one below):

    Part I, pure
     1. Constants: limits and times, each with its reason
     2. Errors: what a task can come back as
     3. Random streams: L'Ecuyer's, advanced as R does
     4. Wire: frames, and nothing of what is in them
     5. Serializer: objects to bytes and back
     6. Task and outcome: the one place where user code is called
     7. Dispatcher core: events in, effects out
    Part II, moving bytes
     8. Transport: URLs, the handshake, connections
     9. Shared page: what a dispatcher and its local daemons see of each other
    10. Dispatcher shell: sockets around the core
    11. Daemon: dial, evaluate, reply
    12. Nursery: the parent of dispatchers and local daemons
    13. Launchers: what starts daemons on other machines
    Part III, what users call
    14. Mirai: the future
    15. Link: the host's end of the wire
    16. Profiles: daemons, status, the current profile
    17. mirai, map, collect: the verbs
    18. Integrations: what others call parallelism by
    19. Command line: daemon, demo
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal.getsignal() wraps it in enums, at 2 µs a call
import abc
import atexit
import binascii
import builtins
import codecs
import collections
import collections.abc
import concurrent.futures
import contextlib
import contextvars
import copyreg
import enum
import errno
import functools
import gc
import hashlib
import heapq
import hmac
import importlib
import io
import itertools
import json
import marshal
import math
import mmap
import operator
import os
import pickle
import random
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
import weakref
from collections import deque
from concurrent.futures import _base as _futures

TYPE_CHECKING = False       # typing takes longer to import than all of this file; checkers read the name alone
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn

    FutureOfAny = concurrent.futures.Future[Any]
    Stream = tuple[int, ...]
else:
    FutureOfAny = concurrent.futures.Future

__version__ = "0.1.0"
__all__ = [
    "ErrorValue", "LaunchError", "Mirai", "MiraiCancelled", "MiraiConnectionReset", "MiraiError", "MiraiInterrupt",
    "MiraiExecutor", "MiraiMap", "MiraiTimeout", "UNRESOLVED", "call_mirai", "cluster_config", "collect_mirai",
    "daemon", "daemons", "daemons_set", "dumps", "everywhere", "host_url", "http_config", "info", "is_error_value",
    "is_mirai", "is_mirai_error", "is_mirai_interrupt", "is_mirai_map", "launch_local", "launch_remote", "loads",
    "local_daemons", "local_url", "mirai", "mirai_map", "nextcode", "nextget", "nextstream", "on_daemon",
    "race_mirai", "register_serial", "remote_config", "require_daemons", "serial_config", "ssh_config", "status",
    "stop_mirai", "try_mirai", "unresolved", "with_daemons",
]


# ======================================================================
# 1. Constants: limits and times, each with its reason
# ======================================================================
# Knows:  nothing.
# Never:  anything else.

WIRE_VERSION = 1
READ_SIZE = 65536           # recv() of more than this costs three times as much on small frames: malloc maps it
READ_LARGE = 1 << 20        # what a large frame is read in: fewer system calls, once the rest is known to come
STRANGER_LIMIT = 4096       # bytes in a frame before the peer has proven itself: a hello needs a few hundred
NOTICES = 20                # lines in a second for the host's log; what more there are is counted
STRANGERS = 512             # unproven connections at once; for one more the oldest goes: they cost a descriptor each
HANDSHAKE_TIME = 10.0       # for each step; a loaded machine needs a second or two; more only helps who stays silent
DIAL_TIME = 10.0
INTERRUPT_AGAIN = 0.05      # a signal that comes between two instructions right before a system call does not end it
GRACE = 0.2                 # what a daemon whose connection ended may still take before it is killed; R's figure
EXIT_TIME = 1.0             # for callbacks, when the interpreter ends
CLOSE_TIME = 5.0            # for what should take milliseconds; where it does not, something is broken and said to be
START_TIME = 60.0           # for the nursery and the first dispatcher, on a machine that swaps
MAX_FAILED_STARTS = 5       # launches that end in a row before one is ready: after so many it is not bad luck (crew's)
SPINS = 50                  # times a waiter looks before it sleeps in `poll`: a wake-up costs more than a short task
WAIT_MOST = 1e6             # seconds in one wait: poll() takes no more than 2**31 ms; whoever waits longer repeats it
MANY = 64                   # mirais under way from which on a waiter takes results several at a time and spins not
NAP = 0.0003                # seconds between its reads then: one by one they cost the CPU that the daemons need
DOZE = 0.005                # the link's own thread leaves the reading to a waiter that was there so recently
COUNTS_EVERY = 0.02         # how stale `status()` may be: less costs a frame per task
LAST_WORDS = 4096           # the tail of a daemon's stderr that is kept to explain its end
EPHEMERAL_PER_CPU = 4       # processes at once without daemons set: more would only swap
CACHED_CODES = 4096         # code objects whose bytes are remembered, on either side
HASH_SIZE = 16              # bytes of SHA-256 by which a definition is known: no two will ever meet
LARGE = 1 << 16             # bytes; from here on what a function reads is sent ahead, once, and not with each task
KEPT_DEFINITIONS = 64 << 20     # bytes of them that no task needs now: the next may, and else they are sent again
LINK_TIME = 30.0            # seconds without an answer of its kernel after which a peer on another machine is gone
LISTEN_BACKLOG = 1024       # connections that the kernel holds while a dispatcher is busy
CUT_SHORT = 5               # times that a dialer's handshake may be broken off before it gives up
STRANGER_TIME = 0.5         # seconds that an unproven connection has for itself before it may have to make room
PENDING_TIME = 60.0         # seconds that tasks wait for a first daemon before the host hears of it
BRIEF_LIFE, BRIEF_PAUSE = 1.0, 5.0      # seconds: who dies younger, with nothing to do, is replaced so slowly at most
OUTPUT_MOST = 1 << 23       # bytes of tasks' output that a host has not yet taken: then daemons that print wait
UNDO_TIME = 30.0            # seconds for a command that cancels a job
FETCH_TIME = 60.0           # seconds for what a daemon asks of its host
FORWARDED_BYTES = 1 << 28   # of a project's package, with its data, that goes to daemons elsewhere
EX_USAGE, EX_UNAVAILABLE, EX_SOFTWARE, EX_NOPERM = 64, 69, 70, 77      # of sysexits.h
CO_COROUTINE = 0x80         # in a code object's flags; `inspect` has it, but is slow to import
SLOT_SIZE = 8192            # bytes of the shared page per local daemon: more only matters to outcomes that are larger
SLOT_HEAD = 64              # of them for the words in front, one cache line
SLOTS = 16384               # local daemons a dispatcher can have in its lifetime at once; untouched pages cost nothing
CHUNK_TIME = 0.01           # seconds that a daemon is given items for, and between its reports: less costs a frame each
AHEAD = 8                   # short tasks that a daemon has, so that it need not wait for the next
SHORT = 0.001               # seconds
STEAL_AFTER = 0.002         # what somebody else will have done by then is not worth taking from them
REVOKE_TIME = 0.0003        # until every processor sees what another has written, many times over
UNIT_ITEMS = 4096           # items of a map in one frame: more would make the first wait, fewer cost frames
UNIT_BYTES = 1 << 18        # or so many bytes of them: a daemon that takes a share is sent the whole frame
KEPT_UNITS = 4              # frames of items that a daemon keeps: the pieces it is given come from few at a time
KEPT_PACES = 64             # maps of which it is remembered how long their items take
WINDOW_MOST = 16384         # items of a generator that are under way at once, at most
WINDOW_BYTES = 1 << 26      # or so many bytes of them
WINDOW_TIME = 0.05          # seconds that what is taken at once should keep daemons busy; else more is
OUTPUT_TIME = 1.0           # a daemon waits so long for what its task wrote to be passed on
REDIAL_FIRST, REDIAL_MOST = 0.05, 1.0   # seconds between a daemon's attempts to reach a host: the first, the longest


# ======================================================================
# 2. Errors: what a task can come back as
# ======================================================================
# Knows:  texts and codes (R's).
# Never:  sockets, tasks, processes.


class _Unresolved:
    """The type of `UNRESOLVED`, what `.data` is until a mirai resolves: one object, falsy."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "<unresolved>"

    def __reduce__(self) -> str:
        return "UNRESOLVED"


UNRESOLVED = _Unresolved()


class ErrorValue(Exception):
    """What a task comes back as where it does not come back with a value. `code` is R mirai's."""

    code = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.code}: {self}>"


class MiraiError(ErrorValue):
    """The evaluation failed on the daemon.

    `condition_class`: names of the original's classes, most derived first. `stack_trace`: the daemon's
    traceback, a text. `original`: the exception itself where it could be rebuilt here, else None. The
    original's attributes are in `attributes`, and can be read as attributes of this error.
    """

    code = 1000

    def __init__(self, message: str = "", condition_class: Sequence[str] = (), stack_trace: str = "",
                 attributes: Mapping[str, Any] | None = None, original: BaseException | None = None) -> None:
        super().__init__(message)
        self.condition_class = tuple(condition_class)
        self.stack_trace = stack_trace
        self.attributes = dict(attributes or {})
        self.original = original

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("attributes", {})
        if name in attributes:
            return attributes[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __str__(self) -> str:
        """The message, and the daemon's traceback below it, as a chained exception would show it."""
        message = str(self.args[0]) if self.args else ""
        return f"{message}\n\n{self.stack_trace.rstrip()}" if self.stack_trace else message

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.code}: {self.args[0] if self.args else ''}>"


class MiraiInterrupt(MiraiError):
    """The evaluation was interrupted on the daemon: by itself, or by a signal that was no cancellation."""

    code = 1


_TIMEOUTS: Any = tuple(dict.fromkeys((concurrent.futures.TimeoutError, TimeoutError)))      # one class from 3.11 on


class MiraiTimeout(ErrorValue, *_TIMEOUTS):     # type: ignore[misc]
    """The mirai's `_timeout` passed before it resolved."""

    code = 5


class MiraiConnectionReset(ErrorValue, ConnectionResetError):
    """The process that had the task ended first: says which, how it ended, and its last words on stderr."""

    code = 19


class LaunchError(MiraiConnectionReset):
    """Daemons could not be started; the text has what the last of them said."""


class MiraiCancelled(ErrorValue, concurrent.futures.CancelledError):
    """The mirai was cancelled with `stop_mirai()` or `cancel()`."""

    code = 20


class ProtocolError(Exception):
    """The other side of a connection said what it must not say: it is at fault, and the connection ends."""


class Refused(ProtocolError):
    """A connection was refused, by us or by the peer; the text says why."""


class Crowded(Refused):
    """The listener has too much to do to listen: it may be asked again."""


class _Interrupted(KeyboardInterrupt):
    """Raised in a daemon's task that was cancelled; a KeyboardInterrupt, so that the task's own code and
    asyncio loops treat it as one."""


def describe_exit(status: int) -> str:
    """How a process ended, from its `returncode`-like status: negative is a signal."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def describe_loss(who: str, how: str, words: str = "") -> str:
    words = words.strip()
    return f"{who} {how}" + (f"; its last words:\n{words}" if words else "")


# ======================================================================
# 3. Random streams: L'Ecuyer's, advanced as R does
# ======================================================================
# Knows:  arithmetic; `random` and numpy's global generator, which it seeds.
# Never:  who has which stream.
# Source: L'Ecuyer, Simard, Chen and Kelton, "An object-oriented random-number package with many long streams and
#         substreams", Operations Research 50 (2002). MRG32k3a: two recurrences of three numbers each; streams are
#         2**127 steps apart, substreams 2**76, and a step is a product with a matrix.

_MODULI = (4294967087, 4294944443)
_STEPS = (((0, 1, 0), (0, 0, 1), (-810728, 1403580, 0)), ((0, 1, 0), (0, 0, 1), (-1370589, 0, 527612)))
STREAM, SUBSTREAM = 127, 76
R_KIND = 10407              # how R's `.Random.seed` says that it is this generator, with inversion and rejection

# A stream is six ints, three below the first modulus and three below the second.


def seed_stream(seed: int) -> Stream:
    """The state that R's `set.seed(seed)` gives this generator."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not -1 << 31 <= seed < 1 << 32:
        raise ValueError(f"seed={seed!r}: expected an integer of 32 bits, as R takes it")
    state, seed = [], operator.index(seed)
    for i in range(56):
        seed = (69069 * seed + 1) & 0xffffffff
        while i >= 50 and seed >= _MODULI[1]:
            seed = (69069 * seed + 1) & 0xffffffff
        state.append(seed)
    return tuple(state[50:])


def random_stream() -> Stream:
    """One that nobody else has."""
    system = random.SystemRandom()
    return tuple(system.randrange(1, modulus) for modulus in _MODULI for _ in range(3))


@functools.cache
def _doubled(times: int) -> Any:
    """The matrices of both recurrences for 2**times steps."""
    if not times:
        return _STEPS
    return tuple(tuple(tuple(sum([a * b for a, b in zip(row, column)]) % modulus for column in zip(*matrix))
                       for row in matrix) for matrix, modulus in zip(_doubled(times - 1), _MODULI))


def advance_stream(stream: Stream, count: int = 1, distance: int = STREAM) -> Stream:
    """The stream that is `count` further on."""
    while count:
        if count & 1:
            state = []
            for i, (matrix, modulus) in enumerate(zip(_doubled(distance), _MODULI)):
                x, y, z = stream[3 * i:3 * i + 3]
                state += [(a * x + b * y + c * z) % modulus for a, b, c in matrix]
            stream = tuple(state)
        count >>= 1
        distance += 1
    return stream


def stream_to_r(stream: Stream) -> list[int]:
    """As R's `.Random.seed` has it: seven integers, of 32 bits with a sign."""
    return [R_KIND, *(value - (1 << 32) if value >> 31 else value for value in stream)]


def stream_from_r(rs: Sequence[int]) -> Stream:
    """Of what `stream_to_r()` gives; ValueError for anything else."""
    values = tuple(rs) if isinstance(rs, (list, tuple)) else ()
    if len(values) != 7 or values[0] % 100 != R_KIND % 100 or not all(type(value) is int for value in values):
        raise ValueError(f"rs={rs!r}: expected seven integers, as nextstream() gives")
    return tuple(value & 0xffffffff for value in values[1:])


class _Generators:
    """Seeds `random`, and numpy's global generator when it is there: now, or as soon as a task imports it."""

    def __init__(self) -> None:
        self.stream: Stream | None = None

    def seed(self, stream: Stream) -> None:
        self.stream = stream
        random.seed(int.from_bytes(struct.pack("<6I", *stream), "little"))
        numpy_random = sys.modules.get("numpy.random")
        if numpy_random is not None and hasattr(numpy_random, "seed"):
            numpy_random.seed((*stream, 1))     # not what `random` draws
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As a finder of modules: stands aside, but has numpy's generator seeded once it is imported."""
        if name != "numpy.random":
            return None
        self.withdraw()
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                with contextlib.suppress(AttributeError):       # a loader that takes no attributes
                    spec.loader.exec_module = functools.partial(self._load, spec.loader.exec_module)    # type: ignore
                return spec
        return None

    def _load(self, exec_module: Callable[[Any], None], module: Any) -> None:
        exec_module(module)
        if self.stream is not None:
            module.seed((*self.stream, 1))

    def withdraw(self) -> None:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)


GENERATORS = _Generators()


@contextlib.contextmanager
def generators_restored() -> Iterator[None]:
    """Whatever is seeded or drawn inside, afterwards `random` and numpy go on as if it had not been."""
    state, numpy_random = random.getstate(), sys.modules.get("numpy.random")
    numpy_state = numpy_random.get_state() if numpy_random is not None else None
    try:
        yield
    finally:
        GENERATORS.withdraw()
        random.setstate(state)
        if numpy_random is not None:
            numpy_random.set_state(numpy_state)
        elif "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()


# ======================================================================
# 4. Wire: frames, and nothing of what is in them
# ======================================================================
# Knows:  the header, limits.
# Never:  tasks, pickle, sockets.
# Rule:   every message has a kind; nothing is told from a payload's shape.


class Kind:
    """What a message says; who may say it is in each section that handles it."""

    # handshake, JSON
    HELLO, CHALLENGE, PROOF, WELCOME, REFUSED = 1, 2, 3, 4, 5
    # host -> dispatcher -> daemon
    TASK = 10               # id, flags: retries left; payload: a serialized task, the hashes it needs, their number
    CANCEL = 11             # id
    LAUNCH = 12             # host -> dispatcher: flags 0; payload JSON {n, spec}
    DEFINE = 13             # payload: a hash, then the definition that tasks refer to by it
    DROP = 14               # payload: hashes of definitions that are no longer needed
    UNIT = 15               # id: of the first of several tasks, flags: retries; payload: UNIT_HEAD, items, as for TASK
    EVERYWHERE = 16         # id, payload: as for TASK; host: flags: the least number; daemon: FRESH, REPLAY
    END = 17                # whatever else was agreed on, daemons end with their connection
    RUN = 18                # dispatcher -> daemon: id: a unit; payload RANGE of its tasks; flags: FRESH
    LIMIT = 19              # dispatcher -> daemon: id: the position from which on nothing is to be begun
    # daemon -> dispatcher -> host
    RESULT = 20             # id; payload: a serialized outcome; flags: FAILED
    LEAVE = 21              # daemon -> dispatcher: flags: why; id: the position of the last task it may have begun
    LOST = 22               # dispatcher -> host: id: of the unit; payload JSON {how, text, lo, hi}
    COUNTS = 23             # dispatcher -> host: payload struct COUNTS
    NO_LAUNCH = 24          # dispatcher -> host: payload JSON {text}: launching has stopped
    RESULTS = 25            # id: of the unit; payload: RESULTS_HEAD, outcomes
    CUT = 26                # daemon -> dispatcher: id: the position from which on it will begin nothing
    STOPPED = 27            # daemon -> dispatcher: the same, and it has come there
    CLAIM = 28              # daemon -> dispatcher: id: the last position that it may begin before it reports again
    SIZED = 29              # dispatcher -> host: id: of an `everywhere` call; payload RANGE: its answers
    # host, dispatcher <-> nursery, JSON; id: the job
    START = 30              # host -> nursery: a dispatcher
    LISTENING = 31          # dispatcher -> nursery -> host
    FORK = 32               # dispatcher -> nursery: daemons {slots, spec}
    SIGNAL = 33             # dispatcher -> nursery: {slot, pid, signal}
    ENDED = 34              # nursery -> dispatcher, host: {slot, pid, status, words}
    OUTPUT = 35             # nursery -> dispatcher -> host: what tasks wrote; flags: 1, 2, the descriptor; no JSON
    COMMAND = 36            # host -> dispatcher -> nursery: launches n daemons; back: how it ended; id: its own
    LAUNCHED = 37           # dispatcher -> host: what has become of that {joined, status, words}
    NOTICE = 38             # dispatcher -> host: payload JSON {text}: for the log
    WANT = 39               # daemon -> dispatcher -> host: payload JSON, see `provide()`; id: the request
    GIVE = 40               # host -> dispatcher -> daemon: the same id; payload: GIVEN, what it is, or MISSING, why
    WITHDRAW = 41           # host -> dispatcher: payload: ids of tasks that are to be cancelled if they still wait


HEADER = struct.Struct("<QBBHQ")    # payload length, wire version, kind, flags, id
NEEDS = struct.Struct("<I")         # how many hashes stand before it
COUNTS = struct.Struct("<QQQQQ")    # connections, cumulative, awaiting, executing, completed
RANGE = struct.Struct("<II")        # from the first to before the second
ID = struct.Struct("<Q")
UNIT_HEAD = struct.Struct("<IQ")    # how many tasks, and the map that they are of
RESULTS_HEAD = struct.Struct("<QIId")   # position and index of the first, how many, seconds; then the outcomes, apart
KIND_AT = 9                         # of a frame's bytes, the kind
FRESH, REPLAY = 1, 2                # what comes is meant, though the daemon had stopped; nobody waits for the answer
FAILED = 1
GIVEN, MISSING = b"+", b"-"
TOGETHER, APART = b"t", b"a"        # several things in one serialization, or each in its own behind their lengths


class Message(collections.namedtuple("Message", ("kind", "id", "flags", "payload"))):
    """One frame, decoded."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<Message kind={self.kind} id={self.id} flags={self.flags} bytes={len(self.payload)}>"


def encode(kind: int, id: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return HEADER.pack(len(payload), WIRE_VERSION, kind, flags, id) + payload


def encode_parts(kind: int, parts: Sequence[bytes], id: int = 0, flags: int = 0) -> bytes:
    """For a payload that is in pieces: large ones are copied once."""
    return b"".join([HEADER.pack(sum(map(len, parts)), WIRE_VERSION, kind, flags, id), *parts])


def encode_task(kind: int, id: int, parts: Sequence[bytes], needs: Collection[bytes], flags: int) -> bytes:
    """`needs`: hashes of definitions that have to be there before the task. They stand behind what a daemon reads."""
    return encode_parts(kind, [*parts, *needs, NEEDS.pack(len(needs))], id, flags)


def join_apart(parts: Sequence[bytes]) -> list[bytes]:
    """Their lengths, then they themselves."""
    return [struct.pack(f"<{len(parts)}Q", *map(len, parts)), *parts]


def split_apart(data: Any, n: int, at: int = 0) -> list[Any]:
    """What `join_apart()` joined, from `at` on."""
    ends = list(itertools.accumulate(struct.unpack_from(f"<{n}Q", data, at), initial=at + 8 * n))
    return [data[start:end] for start, end in zip(ends, ends[1:])]


def check_results(message: Message) -> tuple[int, int, int, float]:
    """The head of a message of that kind; ProtocolError where it does not hold what it says."""
    payload = message.payload
    with contextlib.suppress(struct.error):
        head = RESULTS_HEAD.unpack_from(payload)
        lengths = struct.unpack_from(f"<{head[2]}Q", payload, RESULTS_HEAD.size)
        if RESULTS_HEAD.size + 8 * head[2] + sum(lengths) == len(payload) and head[2] and 0 <= head[3] < math.inf:
            return head
    raise ProtocolError(f"{message!r} does not hold what it says")


def needs_of(task: bytes) -> bytes:
    """The hashes that `encode_task()` left at the end of a frame, or of its payload, in a row."""
    end = len(task) - NEEDS.size
    return task[end - HASH_SIZE * NEEDS.unpack_from(task, end)[0]:end]


def split_hashes(data: bytes) -> list[bytes]:
    return [data[at:at + HASH_SIZE] for at in range(0, len(data), HASH_SIZE)]


def encode_json(kind: int, content: Any, id: int = 0) -> bytes:
    return encode(kind, id, json.dumps(content).encode())


def decode_json(message: Message) -> dict[str, Any]:
    """The payload of a control message; ProtocolError where it is not a JSON object."""
    try:
        content = json.loads(message.payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{message!r} does not hold JSON: {error}") from None
    if not isinstance(content, dict):
        raise ProtocolError(f"{message!r} does not hold a JSON object")
    return content


class Decoder:
    """Bytes in, messages out: `feed()` what arrived, then iterate over what is complete.

    A message counts as taken only when the next one is asked for: whoever is interrupted while handling one
    gets it again, and loses none. The state changes in single assignments for the same reason, and bytes are
    only ever appended to `chunks`, which a C call may do by itself: a Ctrl-C falls between such steps.
    """

    __slots__ = ("limit", "_state", "_counted")

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._state: tuple[bytes, int, list[bytes], int] = (b"", 0, [], 0)   # buffer, offset, chunks, bytes missing
        self._counted: tuple[list[bytes] | None, int, int] = (None, 0, 0)    # chunks, how many of them, their bytes

    @property
    def chunks(self) -> list[bytes]:
        """Where received bytes are appended."""
        return self._state[2]

    def feed(self, data: bytes) -> None:
        self._state[2].append(data)

    def wanted(self) -> int:
        """How many bytes to read at once: more than usual while a large message is arriving."""
        missing = self._state[3]
        return min(max(missing - self._arrived(), READ_SIZE), READ_LARGE) if missing else READ_SIZE

    def _arrived(self) -> int:
        """Bytes in the chunks; each is counted once, as a large message has thousands."""
        chunks = self._state[2]
        known, number, size = self._counted
        if known is not chunks:
            number = size = 0
        now = len(chunks)
        self._counted = chunks, now, size + sum(map(len, chunks[number:now]))
        return self._counted[2]

    def __iter__(self) -> Iterator[Message]:
        """Raises ProtocolError on another version's frames, or (before the body is there) on too long ones."""
        while (found := self._peek()) is not None:
            buffer, _, chunks, _ = self._state
            yield found[0]
            if self._state[0] is buffer:        # else a nested reader has gone on
                self._state = (buffer, max(found[1], self._state[1]), chunks, 0)
                if found[1] == len(buffer) and not chunks:
                    return

    def pop(self) -> Message | None:
        """Takes one message; None where none is complete."""
        found = self._peek()
        if found is None:
            return None
        self._state = (self._state[0], found[1], self._state[2], 0)
        return found[0]

    def take_rest(self) -> bytes:
        """All that was fed and not taken, which then is no part of it."""
        buffer, at, chunks, _ = self._state
        self._state = (b"", 0, [], 0)
        return b"".join([buffer[at:], *chunks])

    def _peek(self) -> tuple[Message, int] | None:
        """The next message, and where it ends in the buffer."""
        while True:
            buffer, at, chunks, _ = self._state
            start = at + HEADER.size
            if start <= len(buffer):
                length, version, kind, flags, id = HEADER.unpack_from(buffer, at)
                if version != WIRE_VERSION and buffer[at] == 0x16 and buffer[at + 1] == 3:
                    raise ProtocolError("it speaks TLS: tls+tcp:// has to be on both sides, or on none")
                if version != WIRE_VERSION:
                    raise ProtocolError(f"wire version {version} met {WIRE_VERSION}: not mirai, or another version")
                if self.limit is not None and length > self.limit:
                    raise ProtocolError(f"a frame of {length} bytes where at most {self.limit} are allowed")
                end = start + length
                if end <= len(buffer):
                    return Message(kind, id, flags, buffer[start:end]), end
                self._state = (buffer, at, chunks, end - len(buffer))
            if not self._gather():
                return None

    def _gather(self) -> bool:
        """Joins what has arrived, unless a large frame is still too short to be worth the copy."""
        buffer, at, chunks, missing = self._state
        if not chunks or (missing > READ_LARGE and self._arrived() < missing):
            return False
        if at == len(buffer) and len(chunks) == 1:
            self._state = (chunks[0], 0, [], 0)
        else:
            self._state = (b"".join([buffer[at:], *chunks]), 0, [], 0)
        return True


# ======================================================================
# 5. Serializer: objects to bytes and back
# ======================================================================
# Knows:  pickle, code objects, modules.
# Never:  messages, daemons.
# Rule 1. What the other side can import goes by name, all else by value.
# Rule 2. A definition (a function's code, a class) is analysed once and known by the hash of its bytes, the same in
#         every run. `dumps()` puts it in; a task has the hash, and the daemon is sent the definition once.
# Rule 3. What may change in place (globals that are read, closures, defaults, some attributes of classes) is outside
#         of it, and goes with each call, as it is then.
# Rule 4. Classes and type variables are the same object wherever they come back to: each has a token.

SerialConfig = collections.namedtuple("SerialConfig", "cls sfunc ufunc")        # three tuples of equal length
Hooks = collections.namedtuple("Hooks", "by_class hash blob")                   # a configuration as tasks refer to it
_Definition = collections.namedtuple("_Definition", "code about blob hash names chains")

_definition_of: dict[Any, _Definition] = {}             # by id(code), which it holds, and name: wrappers share code
_codes: dict[bytes, tuple[Any, ...]] = {}               # definition or hash -> code, module, name, qualname, doc
_received: dict[bytes, bytes] = {}                      # hash -> definition, of those that were sent ahead
_namespaces: dict[str, dict[str, Any]] = {}             # module -> what its by-value functions share, on a daemon
_written: dict[str, set[str]] = {}                      # the names in them that the last task came with
_held: dict[str, set[str]] = {}                         # those that an `everywhere` call has assigned
_kept: dict[bytes, Any] = {}                            # large constants of maps, loaded once, by hash
_tracked: dict[bytes, _Record] = {}                     # by token, as long as the class lives
_records: dict[int, _Record] = {}                       # by id(class), likewise
_large: weakref.WeakKeyDictionary[Any, dict[int, tuple[bytes, bytes]]] = weakref.WeakKeyDictionary()    # by function
_making = threading.RLock()                             # held while a class is made, for other threads to have it whole
_origin = [b""]                                         # what the tokens of this process begin with
_made: dict[bytes, int] = {}                            # how many classes of a content there have been
_importables: dict[str, tuple[Any, bool]] = {}
_hooks_here: dict[bytes, dict[type, Any]] = {}          # on a daemon: hash -> class -> its functions
_registered: dict[type, Any] = {}                       # class -> its functions, by `register_serial()`
_own_globals = globals()        # this file's functions are on the other side as well
_GLOBAL_OPS = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"))
_CELL_OPS = frozenset(("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"))
_SKIPPED_OPS = frozenset(("CACHE", "EXTENDED_ARG", "PUSH_NULL", "RESUME", "PRECALL"))
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented)))
_EMPTY = object()               # what an empty cell holds
Unpickler = pickle.Unpickler


def dumps(obj: Any) -> bytes:
    """Serializes `obj`: pickle, and by value the functions and classes that another process cannot import.

    Where something can't be serialized it raises an error that is both a TypeError and a pickle.PicklingError, and
    names the path to it, or whatever else an object's own pickling method raises.
    """
    try:
        return dump_after(b"", obj)
    except (TypeError, pickle.PicklingError, RecursionError) as error:
        raise _Unserializable(explain_unserializable(obj, "obj", error)) from error


class _Unserializable(TypeError, pickle.PicklingError):
    """As `pickle` raises the one or the other."""


def dump_after(head: bytes, obj: Any, hooks: Mapping[type, Any] | None = None, home: bool = False) -> bytes:
    """`head`, then what `dumps()` gives, which may be large: without a copy of it. `home`: for the process that
    classes which are not of this one came from."""
    sink = Sink(head)
    Pickler(sink, None, hooks, home).dump(obj)
    return b"".join(sink.parts)


def loads(data: bytes | memoryview) -> Any:
    """The object that `dumps()` made `data` of. Unpickling runs code: only for bytes of a trusted origin."""
    return pickle.loads(data)


def dump_atoms(obj: Any) -> bytes:
    """For what is made of tuples and atoms alone."""
    return pickle.dumps(obj, 5)


def hash_of(*parts: bytes) -> bytes:
    """By what a definition is known."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()[:HASH_SIZE]


def receive_definition(hash: bytes, blob: bytes | None) -> None:
    """None: it will not be needed for a while."""
    _codes.pop(hash, None)
    _kept.pop(hash, None)
    _received.pop(hash, None)
    if blob is not None:
        _received[hash] = blob


def received(hash: bytes) -> bytes | None:
    return _received.get(hash)


def _definition(ref: bytes) -> bytes:
    """`ref` is a definition, or the hash of one that was sent ahead."""
    if len(ref) != HASH_SIZE:
        return ref
    try:
        return _received[ref]
    except KeyError:
        raise pickle.UnpicklingError(f"definition {ref.hex()} has not been sent here") from None


# -- by name or by value

def _is_importable(name: str, module: Any) -> bool:
    """Whether another process that imports `name` gets this module: found out once."""
    known = _importables.get(name)
    if known is None or known[0] is not module:
        known = _importables[name] = module, name == __name__ or _can_be_found(name, module)
    return known[1]


def _can_be_found(name: str, module: Any) -> bool:
    """Modules that were made by hand, or loaded from a path, cannot; but the import of a package may make some."""
    spec = getattr(module, "__spec__", None)
    if name == "__main__":
        return False
    path, package = None, name.rpartition(".")[0]
    if package:
        parent = sys.modules.get(package)
        if parent is None or not _is_importable(package, parent):
            return False
        path = getattr(parent, "__path__", None)
    if spec is None:
        return bool(package) or name in sys.builtin_module_names
    if spec.origin in ("built-in", "frozen"):
        return True
    for finder in sys.meta_path:
        with contextlib.suppress(ImportError, ValueError):      # of one that does not know such names
            found = finder.find_spec(name, path) if hasattr(finder, "find_spec") else None
            if found is not None:
                return not spec.has_location or found.origin == spec.origin
    return False


def _by_reference(obj: Any, name: str) -> bool:
    """Whether importing `obj.__module__` and looking up `name` gives `obj`, here and so elsewhere."""
    if "<" in name:             # a lambda, or local to a function
        return False
    module = getattr(obj, "__module__", None)
    found: Any = sys.modules.get(module) if type(module) is str else None
    if found is None or not _is_importable(str(module), found):
        return False
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is obj


_UNNAMED_TYPES = {id(cls): name for name, cls in vars(types).items() if isinstance(cls, type)
                  and cls.__module__ == "builtins" and cls is not type(None) and not hasattr(builtins, cls.__name__)}


def _class_by_reference(cls: type) -> bool:
    made_here = getattr(cls, "__flags__", 512) & 512        # Py_TPFLAGS_HEAPTYPE: by a class statement
    return not made_here or _by_reference(cls, cls.__qualname__)


def _is_type_variable(obj: Any) -> bool:
    kind = type(obj)
    return kind.__module__ == "typing" and kind.__name__ in ("TypeVar", "ParamSpec", "TypeVarTuple")


def _is_python(f: Any) -> bool:
    """On PyPy built-in ones are functions, too."""
    return type(f) is types.FunctionType and type(f.__code__) is types.CodeType


# -- the pickler

class _Scope:
    """In the definition of a class, the globals of a function."""

    def __init__(self, f: types.FunctionType) -> None:
        self.of = weakref.ref(f)


class _Instead:
    """Stands for something that goes as what it is made by, and of what."""

    def __init__(self, made_by: Callable[..., Any], *made_of: Any) -> None:
        self.reduced = made_by, made_of


class Sink:
    """A file for a pickler: what is large stays in pieces, uncopied."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = list(parts)

    def write(self, data: Any) -> None:
        """A pickler hands over what is large as it is: what may change is copied now."""
        self.parts.append(data if type(data) is bytes else bytes(data))


class Pickler(pickle.Pickler):
    """`needs`: where definitions are left by their hash, for a receiver that is sent them ahead; None: they go in.
    `hooks`: functions for types that pickle can't carry. `home`: see `dump_after()`."""

    def __init__(self, sink: Sink, needs: dict[bytes, Any] | None = None, hooks: Mapping[type, Any] | None = None,
                 home: bool = False) -> None:
        super().__init__(sink, 5)
        self.needs, self.home = needs, home
        self.hooks = _registered if hooks is None else hooks
        self.functions: list[Any] = []          # that went by value, and classes and their methods, to be watched
        self.classes: list[Any] = []
        self.methods: list[Any] = []
        self.unowned: set[int] = set()          # methods that go by themselves, by id
        self.scopes: dict[Any, Any] = {}        # by id(globals); names of modules that are taken
        self.large: dict[int, _Instead] = {}    # by id(bytes)

    by_owner = True     # methods go by their class
    settled = False     # whether that matters, and nothing has gone that may change unseen

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is types.FunctionType and obj.__globals__ is _own_globals and "<" not in obj.__qualname__:
            return NotImplemented
        if self.hooks:
            for cls in kind.__mro__:
                if cls in self.hooks:
                    return _reduce_by_hook(obj, cls, *self.hooks[cls])
        reduce = _REDUCERS.get(kind)
        if reduce is not None:
            return reduce(self, obj)
        if issubclass(kind, type):
            return _reduce_class(self, obj)
        if issubclass(kind, BaseException):
            return _reduce_exception(obj)
        for base in (property, staticmethod, classmethod, types.ModuleType):
            if issubclass(kind, base):
                return _REDUCERS[base](self, obj)
        module = kind.__module__
        if module == "typing":
            return _reduce_typing(self, obj)
        if module == "dataclasses":
            return next((name for name, value in vars(sys.modules[module]).items() if value is obj), NotImplemented)
        if issubclass(kind, enum.Enum):
            return _reduce_member(obj)
        if obj is not None and (obj is sys.stdout or obj is sys.stderr):        # with pythonw, both are None
            return _reduce_file(self, obj)
        return NotImplemented

    def ref(self, blob: bytes, hash: bytes) -> bytes:
        """What goes in for a definition."""
        if self.needs is None:
            return blob
        self.needs[hash] = blob
        return hash

    def scope(self, f: Any) -> Any:
        """What goes in for a function's globals, one object for all that share them. In a task the name of the module:
        its functions share a namespace on the daemon; two namespaces of one name stay apart."""
        space = f.__globals__
        scope = self.scopes.get(id(space))
        if scope is None:
            name = _interned(space.get("__name__"))
            shared = self.needs is not None and type(name) is str and name not in self.scopes
            scope = self.scopes[id(space)] = name if shared else {"__name__": name}
            self.scopes[name if shared else None] = scope
        return scope

    def reads(self, f: types.FunctionType, definition: _Definition) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
        """The globals that a function's code reads, and submodules that it reaches through them."""
        if not definition.names:
            return None, _submodules(definition.chains, _cells_of(f)) if definition.chains else ()
        space = f.__globals__
        read = {name: space[name] for name in definition.names if name in space}
        chains = definition.chains
        imports = _submodules(chains, {**read, **_cells_of(f)} if f.__closure__ else read) if chains else ()
        return read, imports

    def store(self, f: types.FunctionType, values: Iterable[Any]) -> None:
        """Large bytes that `f` reads go ahead, once; they are hashed once, as they cannot change."""
        large = [value for value in values if type(value) is bytes and len(value) >= LARGE]
        if large:
            known = _large.get(f, {})
            found = _large[f] = {id(value): known.get(id(value)) or (value, hash_of(value)) for value in large}
            for key, (value, hash) in found.items():
                self.needs[hash] = value        # type: ignore[index]
                self.large[key] = _Instead(_definition, hash)


class _Watch:
    """What bytes were made from, a class and functions: by identities, so that a change is seen. They must not keep
    the class alive, to which its methods refer: they are guarded by weak references, and by references to atoms."""

    __slots__ = ("functions", "live", "special", "members", "stamp", "atoms", "guards", "dead")

    def __init__(self, cls: type | None, functions: Iterable[types.FunctionType], reads: bool,
                 live: Iterable[str] = ()) -> None:
        self.functions = [(weakref.ref(f), _define(f).names if reads else ()) for f in functions]
        self.live = frozenset(live)                 # attributes of the class that may change
        self.special = cls and (abc if issubclass(type(cls), abc.ABCMeta) else enum if _is_enum(cls) else None)
        self.atoms: list[Any] = []
        self.guards: list[Any] = []
        self.dead: list[Any] = []
        self.members = self._members(cls, self._guard)
        self.stamp = self._functions(self._guard)

    def holds(self, cls: type | None = None) -> bool:
        return not self.dead and self.members == self._members(cls, id) and self.stamp == self._functions(id)

    def holds_members(self, cls: type) -> bool:
        """For those who watch its functions themselves."""
        return not self.dead and self.members == self._members(cls, id)

    def _members(self, cls: Any, id: Callable[[Any], int]) -> list[Any]:
        if cls is None:
            return []
        members: Any = vars(cls)
        if self.live:
            members = {name: value for name, value in members.copy().items() if name not in self.live}
        values: list[Any] = [*members.values(), cls.__qualname__, *cls.__bases__]
        registered: object = 0
        if self.special is enum:
            values += [value for member in cls._member_map_.values() for value in vars(member).values()]
        elif self.special is abc:
            registered = abc.get_cache_token()      # another after each `register()`
        return [*members, registered, *_marks(values, id)]

    def _functions(self, id: Callable[[Any], int]) -> list[Any]:
        values: list[Any] = []
        for ref, names in self.functions:
            f = ref()
            if f is None:
                return []
            values += f.__code__, f.__name__, f.__doc__, *(f.__defaults__ or ())
            for more in (f.__kwdefaults__, f.__dict__):
                if more:
                    values += *more, *more.values()
            if f.__closure__:
                values += map(_contents, f.__closure__)
            if names:
                read = f.__globals__.get
                values += [read(name, _EMPTY) for name in names]
        return _marks(values, id)

    def _guard(self, value: Any) -> int:
        if type(value) in _ATOMS:
            self.atoms.append(value)
        else:
            with contextlib.suppress(TypeError):
                self.guards.append(weakref.ref(value, self.dead.append))
        return id(value)


_HOLLOW = frozenset((tuple, property, staticmethod, classmethod))


def _marks(values: Collection[Any], id: Callable[[Any], int]) -> list[Any]:
    """Identities, and those within what can't be referred to weakly: another could take its place unseen."""
    found: list[Any] = list(map(id, values))
    if _HOLLOW.isdisjoint(map(type, values)):
        return found
    for value in values:
        kind = type(value)
        if kind is tuple:
            found += len(value), *_marks(value, id)
        elif kind is property:
            found += _marks((value.fget, value.fset, value.fdel), id)
        elif kind is staticmethod or kind is classmethod:
            found += _marks((value.__func__,), id)
    return found


def _is_settled(value: Any) -> bool:
    """Whether it changes only by another taking its place, or is watched itself."""
    kind = type(value)
    if kind is tuple:
        return all(map(_is_settled, value))
    if kind is types.BuiltinFunctionType:
        return value.__self__ is None or type(value.__self__) is types.ModuleType       # not a method of a list, say
    return (kind in _ATOMS or value is _EMPTY or kind in (types.FunctionType, types.ModuleType)
            or issubclass(kind, type) or kind.__module__ in ("dataclasses", "typing"))


# -- functions

def _define(f: types.FunctionType) -> _Definition:
    """A function's definition, and the globals that its code and code nested in it name; made once."""
    code = f.__code__
    about = f.__module__, f.__name__, f.__qualname__, f.__doc__, f.__globals__.get("__package__")
    known = _definition_of.get((id(code), f.__qualname__))
    if known is None or known.about != about:
        if len(_definition_of) >= CACHED_CODES:
            _definition_of.clear()
        plain = [x if type(x) is str else None for x in about]
        blob = marshal.dumps((sys.implementation.cache_tag, _dump_code(code), *plain), 2)
        known = _Definition(code, about, blob, hash_of(blob), *_names_of(code))
        _definition_of[id(code), f.__qualname__] = known
    return known


def _dump_code(code: types.CodeType) -> bytes:
    """The same bytes in every run: version 2 of the format does not depend on who else refers to a constant."""
    if sys.version_info < (3, 11):
        code = _with_sets(code, lambda x: ("\0set", *sorted(x, key=repr)) if type(x) is frozenset else x)
    try:
        return marshal.dumps(code, 2)
    except ValueError:          # it has constants that are newer than that
        return marshal.dumps(code)


def _load_code(tag: str, data: bytes) -> types.CodeType:
    if tag != sys.implementation.cache_tag:
        raise _versions_differ(tag, "it has no source of its own")
    code: types.CodeType = marshal.loads(data)
    if sys.version_info < (3, 11):
        code = _with_sets(code, lambda x: frozenset(x[1:]) if type(x) is tuple and x[:1] == ("\0set",) else x)
    return code


def _with_sets(code: types.CodeType, change: Callable[[Any], Any]) -> types.CodeType:
    """Until 3.10 a set among the constants is marshalled in an order that differs from run to run."""
    consts = tuple(_with_sets(x, change) if isinstance(x, types.CodeType) else change(x) for x in code.co_consts)
    same = all(map(operator.is_, consts, code.co_consts))
    return code if same else code.replace(co_consts=consts)


def _names_of(code: types.CodeType) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The globals that code names, and its chains of attributes, as ("xml", "etree", "ElementTree")."""
    import dis
    names: dict[str, None] = {}
    chains: dict[tuple[str, ...], None] = {}
    todo = [code]
    for each in todo:
        chain: tuple[str, ...] = ()
        for instruction in dis.get_instructions(each):
            name = instruction.opname
            if name in _GLOBAL_OPS or name in _CELL_OPS:
                chain = (instruction.argval,)
                if name in _GLOBAL_OPS:
                    names[instruction.argval] = None
            elif name in ("LOAD_ATTR", "LOAD_METHOD") and chain:
                chain = (*chain, instruction.argval)
                chains[chain] = None
            elif name not in _SKIPPED_OPS:
                chain = ()
        todo.extend(c for c in each.co_consts if isinstance(c, types.CodeType))
    return tuple(names), tuple(chains)


def _submodules(chains: Iterable[tuple[str, ...]], read: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that are attributes of their packages here, as they were imported: elsewhere they have to be as well."""
    found: dict[str, None] = {}
    for first, *rest in chains:
        module = read.get(first)
        for part in rest:
            if type(module) is not types.ModuleType or not hasattr(module, "__path__"):
                break
            name = f"{module.__name__}.{part}"
            module = sys.modules.get(name)
            if module is not None:
                found[name] = None
    return tuple(found)


def _cells_of(f: types.FunctionType) -> dict[str, Any]:
    return {name: _contents(cell) for name, cell in zip(f.__code__.co_freevars, f.__closure__ or ())}


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _reduce_function(self: Pickler, f: types.FunctionType) -> Any:
    if not _is_python(f) or _by_reference(f, f.__qualname__):
        return NotImplemented
    if self.by_owner and id(f) not in self.unowned and (owner := _owner_of(f)) is not None:
        return getattr, (owner, f.__name__)
    if "cache_parameters" in f.__dict__:
        return _reduce_lru_cache(self, f)
    definition = _define(f)
    read, imports = self.reads(f, definition)
    more = _attributes_of(f)
    values = *map(_contents, f.__closure__ or ()), *(read or {}).values()
    if self.needs is not None:
        self.store(f, values)
    self.functions.append(f)
    if self.settled:
        self.settled = all(map(_is_settled, (*values, *_kept_by(f))))
    if self.large and read:
        read = {name: self.large.get(id(value), value) for name, value in read.items()}
    arguments = self.ref(definition.blob, definition.hash), f.__closure__, self.scope(f)
    if not (read or more or imports):
        return _make_function, arguments
    return _make_function, arguments, (more, read, imports), None, None, _fill_function


def _kept_by(f: types.FunctionType) -> list[Any]:
    return [f.__defaults__, *(f.__kwdefaults__ or {}).values(), *f.__dict__.values()]


def _owner_of(f: types.FunctionType) -> Any:
    """The class that goes by value, and that the function is a method of."""
    path, _, name = f.__qualname__.rpartition(".")
    if not path or "<" in path:
        return None
    found: Any = sys.modules.get(f.__module__) if type(f.__module__) is str else None
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and vars(found).get(name) is f else None


def _attributes_of(f: types.FunctionType) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if f.__defaults__:
        more["__defaults__"] = f.__defaults__
    if f.__kwdefaults__:
        more["__kwdefaults__"] = f.__kwdefaults__
    try:
        annotations = f.__annotations__
    except NameError:           # from 3.14 on they are evaluated when read
        annotations = {}
    if annotations:
        more["__annotations__"] = annotations
    if getattr(f, "__type_params__", None):
        more["__type_params__"] = f.__type_params__     # type: ignore[attr-defined]
    if f.__dict__:
        more.update((_interned(name), value) for name, value in f.__dict__.items())
    return more


def _make_function(ref: bytes, cells: tuple[types.CellType, ...] | None, scope: Any) -> types.FunctionType:
    known = _codes.get(ref)
    if known is None:
        blob = _definition(ref)
        tag, code, *about = marshal.loads(blob)
        if len(_codes) >= CACHED_CODES:
            _codes.clear()
        same = tag == sys.implementation.cache_tag
        known = _codes[ref] = _load_code(tag, code) if same else _code_by_source(tag, hash_of(blob)), *about
    code, module, name, qualname, doc, package = known
    space = scope if type(scope) is dict else _namespace(scope)
    if "__builtins__" not in space:
        space["__builtins__"] = builtins
    if package is not None and "__package__" not in space:
        space["__package__"] = package
    if type(code) is tuple:         # by source, whose free variables another version may have in another order
        code, order = code
        cells = cells and tuple(cells[i] for i in order)
    f = types.FunctionType(code, space, name, None, cells)
    f.__module__, f.__qualname__, f.__doc__ = module, qualname, doc
    return f


def _fill_function(f: types.FunctionType, state: tuple[Any, ...]) -> None:
    more, read, imports = state
    for name in imports:
        importlib.import_module(name)
    _write_globals(f.__globals__, read or {})
    for name, value in more.items():
        setattr(f, name, value)


def _namespace(module: str) -> dict[str, Any]:
    """The globals that the by-value functions of one module share in this process."""
    scope = _namespaces.get(module)
    if scope is None:
        scope = _namespaces[module] = {"__name__": module, "__builtins__": builtins}
    return scope


def _write_globals(space: dict[str, Any], read: Mapping[str, Any]) -> None:
    name = space.get("__name__")
    if type(name) is str and _namespaces.get(name) is space:
        if name in _held:
            read = {key: value for key, value in read.items() if key not in _held[name]}
        _written.setdefault(name, set()).update(key for key in read if not key.startswith("__"))
    space.update(read)


def copy_namespaces() -> dict[str, dict[str, Any]]:
    return {module: dict(space) for module, space in _namespaces.items()}


def hold_assigned(before: Mapping[str, Mapping[str, Any]]) -> None:
    """What has been assigned since `before` is not to be overwritten by what tasks come with."""
    for module, space in _namespaces.items():
        old = before.get(module, {})
        names = {name for name, value in space.items() if old.get(name, _EMPTY) is not value and name[:2] != "__"}
        if names:
            _held.setdefault(module, set()).update(names)


def copy_held() -> dict[str, set[str]]:
    return {module: set(names) for module, names in _held.items()}


def set_held(held: Mapping[str, set[str]]) -> None:
    _held.clear()
    _held.update((module, set(names)) for module, names in held.items())


def restore_namespaces(kept: Mapping[str, Mapping[str, Any]]) -> None:
    """Whatever tasks have assigned is as it was when `copy_namespaces()` gave `kept`."""
    _written.clear()
    for module, space in _namespaces.items():
        old = kept.get(module) or {"__name__": module, "__builtins__": builtins}
        space.update(old)
        if len(space) > len(old):
            for name in space.keys() - old.keys():
                del space[name]     # on PyPy, functions lose sight of a namespace that is cleared


def forget_globals(before: Mapping[str, set[str]]) -> None:
    """What was written for the last task, and has not been for this one: the host has it no more."""
    for module, names in before.items():
        for name in names.difference(_written.get(module, ()), _held.get(module, ())):
            _namespaces[module].pop(name, None)


def _reduce_cell(self: Pickler, cell: types.CellType) -> Any:
    value = _contents(cell)
    if self.large and id(value) in self.large:
        value = self.large[id(value)]
    return _new_cell, (), None if value is _EMPTY else (value,), None, None, _fill_cell


def _new_cell() -> types.CellType:
    return types.CellType()


def _fill_cell(cell: types.CellType, state: tuple[Any, ...]) -> None:
    cell.cell_contents = state[0]


def _reduce_lru_cache(self: Pickler, f: Any) -> Any:
    if _by_reference(f, f.__qualname__):
        return NotImplemented
    self.settled = False
    return _make_lru_cache, (*f.cache_parameters().values(), f.__wrapped__)


def _make_lru_cache(maxsize: int | None, typed: bool, f: Callable[..., Any]) -> Any:
    return functools.lru_cache(maxsize, typed)(f)


def _generator_module(method: Any, name: str) -> Any:
    """Where it is a method of a module's own random generator, the module: there it means that process's generator."""
    for module in ("random", "numpy.random"):
        found = sys.modules.get(module)
        if found is not None and getattr(found, name, None) == method and method.__self__ is not found:
            return found
    return None


def _reduce_builtin(self: Pickler, function: Any) -> Any:
    module = None if function.__self__ is None or isinstance(function.__self__, types.ModuleType) else (
        _generator_module(function, function.__name__))
    return NotImplemented if module is None else (getattr, (module, function.__name__))


def _reduce_method(self: Pickler, method: types.MethodType) -> Any:
    """By its name where that leads to it, else as what it is made of: a child may have another of that name."""
    f, owner = method.__func__, method.__self__
    name = getattr(f, "__name__", "")
    module = _generator_module(method, name)
    if module is not None:
        return getattr, (module, name)
    found = getattr(owner if isinstance(owner, type) else type(owner), name, None)
    by_name = found is f or found is not None and getattr(found, "__func__", None) is f
    return (getattr, (owner, name)) if by_name else (types.MethodType, (f, owner))


# -- classes

class _Record:
    """What is known of a class, or a type variable, that goes by value."""

    __slots__ = ("of", "token", "own", "current", "version", "watch", "filling")

    def __init__(self, obj: Any, token: bytes, own: bool) -> None:
        self.of = weakref.ref(obj, functools.partial(_untrack, id(obj), token))
        self.token = token
        self.own = own                              # made here, where all others have their copies from
        self.current: _Current | None = None        # its definition, as it was when looked at last
        self.version = b""                          # on the other side: of the definition that was received last,
        self.watch: _Watch | None = None            # what it gave; a task may have changed that
        self.filling: Any = None                    # until it has all of its members: what they come from


# A class's definition. version: its hash, and that of what it refers to by number, deps: classes, type variables and
# _Scopes; early: the number of the class itself: those before it are needed to make it; reads: the number of a _Scope
# -> names and chains that are read; live: attributes that are not in it; at_once: it refers to no other class.
_Current = collections.namedtuple("_Current", "blob version deps early reads live at_once watch")


def _track(obj: Any, token: bytes, own: bool) -> _Record:
    """Its record, or that of the one which another thread has made meanwhile."""
    record = _records[id(obj)] = _Record(obj, token, own)
    known = _tracked.setdefault(token, record)
    if known.of() is None:
        known = _tracked[token] = record
    return known


def _untrack(id: int, token: bytes, ref: Any) -> None:
    """It has ended: lately, where another may have its id by now."""
    known: tuple[tuple[dict[Any, _Record], Any], ...] = ((_records, id), (_tracked, token))
    for table, key in known:
        if key in table and table[key].of is ref:
            del table[key]


def _record_of(obj: Any) -> _Record | None:
    record = _records.get(id(obj))
    return record if record is not None and record.of() is obj else None


def _new_record(obj: Any, *content: bytes) -> _Record:
    """With a token that no other has, but the same in every run: of the content, and of how many had it before. Two
    daemons may well make classes of one content: theirs begin with something that no other process has."""
    kind = hash_of(_origin[0], *content)
    if len(_made) >= CACHED_CODES:
        _made.clear()
        _origin[0] = kind           # numbers begin anew, tokens do not come again
        kind = hash_of(_origin[0], *content)
    _made[kind] = _made.get(kind, 0) + 1
    return _track(obj, hash_of(kind, b"%d" % _made[kind]), True)


class _ClassPickler(Pickler):
    """Makes the definition of a class: other classes, and the globals that its functions read, stay outside."""

    def __init__(self, sink: Sink) -> None:
        super().__init__(sink)
        self.deps: list[Any] = []
        self.numbers: dict[int, int] = {}
        self.read: dict[int, tuple[dict[str, None], dict[Any, None]]] = {}

    by_owner = False

    def persistent_id(self, obj: Any) -> int | None:
        outside = (issubclass(type(obj), type) and not _class_by_reference(obj)) or type(obj) is _Scope or (
            _is_type_variable(obj) and not _by_reference(obj, obj.__name__))
        return self.number(obj) if outside else None

    def number(self, obj: Any) -> int:
        number = self.numbers.setdefault(id(obj), len(self.deps))
        if number == len(self.deps):
            self.deps.append(obj)
        return number

    def scope(self, f: Any) -> Any:
        return self.scopes.setdefault(id(f.__globals__), _Scope(f))

    def reads(self, f: types.FunctionType, definition: _Definition) -> Any:
        names, chains = self.read.setdefault(self.number(self.scope(f)), ({}, {}))
        names.update(dict.fromkeys(definition.names))
        chains.update(dict.fromkeys(definition.chains))
        return None, ()


def _current_of(cls: Any) -> tuple[_Record, _Current]:
    """The record of a class, and its definition as the class is now."""
    record = _record_of(cls)
    if record is not None:
        known = record.current
        if known is not None and known.watch.holds(cls):
            return record, known
    for _ in range(100):            # until no other thread has changed it meanwhile
        before = vars(cls).copy()
        sink = Sink()
        pickler = _ClassPickler(sink)
        head, members, extra = (_enum_parts if _is_enum(cls) else _class_parts)(cls)
        live = tuple(name for name, value in members.items() if not (_is_enum(cls) or _is_fixed(cls, name, value)))
        fixed = {name: _in_order(value) for name, value in members.items() if name not in live}
        pickler.dump(head)
        early = pickler.number(cls)
        for part in (*_split(fixed), live, extra):
            pickler.dump(part)
        watch = _Watch(cls, pickler.functions, False, live)
        after = vars(cls).copy()
        if [*before] == [*after] and all(map(operator.is_, before.values(), after.values())):
            break
    blob, classes = b"".join(sink.parts), [dep for dep in pickler.deps if type(dep) is not _Scope]
    if record is None:
        record = _new_record(cls, blob, *[dep.__name__.encode() for dep in classes])
    deps = [dep if type(dep) is _Scope else weakref.ref(dep) for dep in pickler.deps]
    version = hash_of(blob, *map(_token_of, classes))
    at_once = all(type(dep) is _Scope for dep in deps[early + 1:])
    current = record.current = _Current(blob, version, deps, early, pickler.read, live, at_once, watch)
    return record, current


def _token_of(dep: Any) -> bytes:
    record = _record_of(dep) or (_current_of(dep)[0] if isinstance(dep, type) else _variable_record(dep))
    return record.token


def _is_enum(cls: type) -> bool:
    return "_member_map_" in vars(cls) and "_member_names_" in vars(cls)


_OF_EACH_CLASS = frozenset((
    "__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__slots__", "__orig_bases__", "_abc_impl",
    "_abc_registry", "_abc_cache", "_abc_negative_cache", "_abc_negative_cache_version", "__static_attributes__",
    "__annotations_cache__", "__slotnames__"))


def _members(cls: type) -> dict[str, Any]:
    """What a class holds by its own, but for what making it brings along."""
    return {sys.intern(name): value for name, value in vars(cls).copy().items() if name not in _OF_EACH_CLASS and not (
        type(value) in (types.MemberDescriptorType, types.GetSetDescriptorType) and value.__objclass__ is cls)}


def _interned(value: Any) -> Any:
    """Pickle tells equal strings from the same string: with these there is no difference, in any process."""
    if type(value) is tuple:
        return tuple(map(_interned, value))
    return sys.intern(value) if type(value) is str else value


def _in_order(value: Any) -> Any:
    """A set's own order is another in each run."""
    kind = type(value)
    return _Instead(kind, sorted(value, key=repr)) if kind in (set, frozenset) else _interned(value)


def _split(members: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Methods go first: instances of the class among the rest may need them."""
    methods = {name: value for name, value in members.items()
               if issubclass(type(value), (types.FunctionType, property, staticmethod, classmethod))}
    return methods, {name: value for name, value in members.items() if name not in methods}


def _head(cls: type) -> dict[str, Any]:
    """What has to be in the namespace when a class is made."""
    return {"__qualname__": _interned(cls.__qualname__), **{name: _interned(vars(cls)[name]) for name in (
        "__module__", "__doc__", "__slots__", "__orig_bases__") if name in vars(cls)}}


def _class_parts(cls: Any) -> tuple[Any, ...]:
    registry: list[Any] = []
    if isinstance(cls, abc.ABCMeta):
        refs = vars(cls)["_abc_registry"] if "_abc_registry" in vars(cls) else abc._get_dump(cls)[0]  # type: ignore[attr-defined]
        found = (ref() if isinstance(ref, weakref.ref) else ref for ref in refs)
        registry = sorted(filter(None, found), key=lambda each: (each.__module__, each.__qualname__))
    name = _interned(cls.__name__)
    return (_make_class, type(cls), name, cls.__bases__, _head(cls)), _members(cls), registry


def _enum_parts(cls: Any) -> tuple[Any, ...]:
    """The members with what their data type is made from; none of the class's own constructors runs again."""
    members = {name: value for name, value in _members(cls).items() if not _is_enums_own(cls, name, value)}
    table, attributes = [], {}
    for name, member in cls._member_map_.items():
        table.append((_interned(name), _interned(_data_of(member)), _interned(member._value_)))
        if name == member._name_:       # else another name of it
            attributes[_interned(name)] = {_interned(key): value for key, value in vars(member).items()
                                           if not _is_sunder(key)}
    head = (_make_enum, type(cls), _interned(cls.__name__), cls.__bases__, _head(cls), table,
            getattr(cls, "_boundary_", None))
    return head, members, attributes


def _is_sunder(name: str) -> bool:
    return name.startswith("_") and name.endswith("_") and not name.startswith("__")


def _is_enums_own(cls: Any, name: str, value: Any) -> bool:
    """Whether `enum` makes it, and will again: members, its tables, and where a method stood that it has replaced. Some
    versions make masks of flags only from members that are plain numbers."""
    if _is_sunder(name):
        return not (type(value) in _ATOMS or issubclass(type(value), (types.FunctionType, staticmethod, classmethod)))
    return name in cls._member_map_ or name == "__objclass__" or (
        name == "__new__" and getattr(value, "__module__", "") == "enum")


def _data_of(member: Any) -> tuple[Any, ...]:
    kind = member._member_type_
    if hasattr(kind, "__getnewargs__"):
        return tuple(kind.__getnewargs__(member))
    reduced = kind.__reduce_ex__(member, 2) if kind.__reduce_ex__ is not object.__reduce_ex__ else ()
    return tuple(reduced[1]) if reduced and reduced[0] is type(member) else ()


_UNCHANGING = ("typing", "enum", "abc", "dataclasses")
_FIXED_TYPES = _ATOMS.union((functools.cached_property, functools.partialmethod, types.MemberDescriptorType,
                             types.GetSetDescriptorType, property, type(vars(_Definition)["code"])))  # a tuple's field
_FIXED_NAMES = frozenset((
    "__annotations__", "__annotate_func__", "__match_args__", "__parameters__", "__abstractmethods__", "__total__",
    "__required_keys__", "__optional_keys__", "__readonly_keys__", "__mutable_keys__", "__closed__", "__type_params__",
    "__protocol_attrs__", "__non_callable_proto_members__", "_field_defaults", "_fields"))


def _is_fixed(cls: type, name: str, value: Any) -> bool:
    """Whether an attribute is part of the definition: the class's own functions, atoms, other classes, and what Python
    and its decorators leave there. All else may change in place, or be somewhere else as well."""
    kind = type(value)
    functions: list[Any] = [value.fget, value.fset, value.fdel] if kind is property else [_function_in(value)]
    own = [f for f in functions if _is_python(f)]
    for f in own:
        if f.__module__ != cls.__module__ or not f.__qualname__.startswith(f"{cls.__qualname__}."):
            return False
        if not all(map(_is_settled, (*map(_contents, f.__closure__ or ()), *_kept_by(f)))):
            return False
    if own or name in _FIXED_NAMES or name.startswith(("__dataclass_", "__pydantic_", "__attrs_")):
        return True
    if kind is staticmethod or kind is classmethod:
        return _is_settled(value.__func__)
    return kind in _FIXED_TYPES or issubclass(kind, type) or kind.__module__ in _UNCHANGING


def _reduce_class(self: Pickler, cls: Any) -> Any:
    if id(cls) in _UNNAMED_TYPES:
        return getattr, (types, _UNNAMED_TYPES[id(cls)])
    if _class_by_reference(cls):
        return NotImplemented
    record, current = _current_of(cls)
    try:
        deps = [self.scope(dep.of()) if type(dep) is _Scope else dep() for dep in current.deps]
    except AttributeError:                  # another thread has just replaced the function that it was known by
        record.current = None
        return _reduce_class(self, cls)
    early, late = tuple(deps[:current.early]), tuple(deps[current.early + 1:])
    live = {}
    if current.live:
        live = {name: vars(cls)[name] for name in current.live if name in vars(cls)}
        self.unowned.update(map(id, live.values()))
    reads = []
    for number, (names, chains) in current.reads.items() if record.own or not self.home else ():
        f = current.deps[number].of()
        read = {name: f.__globals__[name] for name in names if name in f.__globals__}
        imports = _submodules(chains, read) if chains else ()
        if read or imports:
            self.settled = self.settled and all(map(_is_settled, read.values()))
            if self.needs is not None:
                self.store(f, read.values())
            read = {name: self.large.get(id(value), value) for name, value in read.items()}
            reads.append((deps[number], read, imports))
    self.settled = self.settled and not live
    if self.settled:
        self.classes.append((record, current))
        self.methods += filter(None, (ref() for ref, _ in current.watch.functions))
    blob = None if self.ref(current.blob, current.version) is current.version else current.blob
    arguments = record.token, current.version, blob, early, late if current.at_once else None
    if current.at_once and not (reads or live):
        return _use_class, arguments
    complete = None if current.at_once else _Instead(_complete_class, cls, late)    # first: the rest may need methods
    return _use_class, arguments, (complete, live, reads), None, None, _fill_class


class _ClassUnpickler(pickle.Unpickler):
    def __init__(self, blob: bytes, early: tuple[Any, ...]) -> None:
        super().__init__(io.BytesIO(blob))
        self.deps = list(early)

    def persistent_load(self, number: int) -> Any:
        return self.deps[number]


def _use_class(token: bytes, version: bytes, blob: bytes | None, early: tuple[Any, ...],
               late: tuple[Any, ...] | None) -> Any:
    """The class with that token: the one that is here, brought up to date unless it is this process's own, or made."""
    with _making:
        record = _tracked.get(token)
        cls = None if record is None else record.of()
        if cls is not None and record is not None and (
                record.own or record.version == version and record.watch and record.watch.holds_members(cls)):
            return cls
        filling = _definition(version) if blob is None else blob, early
        if cls is None or record is None:
            make, *parts = _ClassUnpickler(*filling).load()
            cls = make(*parts)
            record = _track(cls, token, False)
        record.version, record.filling, record.current = version, filling, None
        if late is not None:
            _fill_members(cls, record, late)
        return cls


def _complete_class(cls: Any, late: tuple[Any, ...]) -> None:
    """For classes whose definition refers to others, which may refer to it."""
    record = _record_of(cls)
    if record is not None and not record.own:
        with _making:
            _fill_members(cls, record, late)


def _fill_class(cls: Any, state: tuple[Any, ...]) -> None:
    _, live, reads = state
    record = _record_of(cls)
    if record is None or record.own:
        return
    for name, value in live.items():
        type.__setattr__(cls, name, value)
    for scope, read, imports in reads:
        for name in imports:
            importlib.import_module(name)
        space = scope if type(scope) is dict else _namespace(scope)
        _write_globals(space, read)
        for f in filter(None, map(_function_in, vars(cls).copy().values())):    # should it be here from earlier bytes
            found = f.__globals__
            if found is not space and found.get("__name__") == space.get("__name__") and "__spec__" not in found:
                found.update(read)


def _function_in(value: Any) -> types.FunctionType | None:
    f: Any = value.__func__ if issubclass(type(value), (staticmethod, classmethod)) else value
    f = f.fget if issubclass(type(f), property) else f
    return f if _is_python(f) else None


def _fill_members(cls: Any, record: _Record, late: tuple[Any, ...]) -> None:
    """As they are, past the constructors and `__setattr__` of its metaclass."""
    if record.filling is None:
        return
    unpickler = _ClassUnpickler(*record.filling)
    _, _, name, bases, head, *_ = unpickler.load()
    for key, value in (("__name__", name), ("__qualname__", head["__qualname__"]), ("__doc__", head.get("__doc__")),
                       ("__bases__", bases)):
        if getattr(cls, key) != value:
            type.__setattr__(cls, key, value)
    unpickler.deps += cls, *late
    members: dict[str, Any] = {}
    for _ in ("methods", "what may need them"):
        part = unpickler.load()
        members.update(part)
        for key, value in part.items():
            type.__setattr__(cls, key, value)
    live, extra = unpickler.load(), unpickler.load()
    for key in live:            # they come next; a constructor that makes one may look at another
        if key not in vars(cls):
            type.__setattr__(cls, key, None)
    if _is_enum(cls):
        for key, attributes in extra.items():
            vars(cls._member_map_[key]).update(attributes)
    else:
        for key in _members(cls):
            if key not in members and key not in live:
                type.__delattr__(cls, key)
        for each in filter(None, extra):
            cls.register(each)
    record.watch, record.filling = _Watch(cls, (), False, live), None


def _make_class(meta: Any, name: str, bases: tuple[type, ...], head: dict[str, Any]) -> type:
    """Without running the metaclass's own constructors again: they may want arguments that are not known any more."""
    make: Any = abc.ABCMeta.__new__ if issubclass(meta, abc.ABCMeta) else type.__new__
    cls: Any = None
    for quiet in _QUIET if any(map(_has_hook, bases)) else ():
        with contextlib.suppress(TypeError):        # one of the two has the layout that the others have
            cls = make(meta, name, (quiet, *bases), dict(head))
            cls.__bases__ = bases
            break
    else:
        try:
            cls = make(meta, name, bases, dict(head))
        except TypeError:       # a metaclass of C's
            cls = types.new_class(name, bases, {"metaclass": meta}, lambda scope: scope.update(head))
    for key in _members(cls):       # what making it brought along would keep its place: the order is content, too
        type.__delattr__(cls, key)
    return cls      # type: ignore[no-any-return]


def _has_hook(base: type) -> bool:
    """An `__init_subclass__` that would run again, too."""
    return _is_python(getattr(base.__init_subclass__, "__func__", None))


_QUIET = [type("_Quiet", (), {"__init_subclass__": classmethod(lambda cls, **_: None), **more})
          for more in ({}, {"__slots__": ()})]


def _make_enum(meta: Any, name: str, bases: tuple[type, ...], head: dict[str, Any], table: list[Any],
               boundary: Any) -> type:
    def make(cls: Any, *arguments: Any) -> Any:
        data, value = arguments[0] if len(arguments) == 1 else arguments
        base = next(c for c in cls._member_type_.__mro__ if not _is_python(c.__new__))
        member = base.__new__(cls, *data)
        member._value_ = value
        return member

    scope = meta.__prepare__(name, bases)
    members = {key: (data, value) for key, data, value in table}
    for key, value in {**head, "__new__": make, "__init__": lambda *_: None, **members}.items():
        scope[key] = value
    cls: Any = meta(name, bases, scope) if boundary is None else meta(name, bases, scope, boundary=boundary)
    type.__delattr__(cls, "__init__")
    for key in ("__new_member__", "_new_member_"):
        if vars(cls).get(key) is make:
            type.__delattr__(cls, key)
    return cls      # type: ignore[no-any-return]


def _reduce_member(member: Any) -> Any:
    cls, name = type(member), getattr(member, "_name_", None)
    if cls._member_map_.get(name) is member:
        return getattr, (cls, name)
    return (cls, (member._value_,)) if issubclass(cls, enum.Flag) else NotImplemented


def _reduce_typing(self: Pickler, obj: Any) -> Any:
    kind = type(obj).__name__
    if not _is_type_variable(obj) and kind not in ("NewType", "TypeAliasType") or _by_reference(obj, obj.__name__):
        return NotImplemented
    if kind == "NewType":
        return _make_typing, (kind, obj.__module__, [obj.__name__, obj.__supertype__], {})
    if kind == "TypeAliasType":
        return _make_typing, (kind, None, [obj.__name__, obj.__value__], {"type_params": obj.__type_params__})
    record = _variable_record(obj)
    arguments, options = [obj.__name__, *getattr(obj, "__constraints__", ())], {}
    for name in ("bound", "covariant", "contravariant", "infer_variance"):
        if getattr(obj, f"__{name}__", None):
            options[name] = getattr(obj, f"__{name}__")
    if getattr(obj, "has_default", bool)():
        options["default"] = obj.__default__
    return _use_type_variable, (record.token, kind, obj.__module__, arguments, options)


def _variable_record(obj: Any) -> _Record:
    return _record_of(obj) or _new_record(obj, f"{type(obj).__name__} {obj.__module__} {obj.__name__}".encode())


def _use_type_variable(token: bytes, kind: str, module: str, arguments: list[Any], options: dict[str, Any]) -> Any:
    record = _tracked.get(token)
    found = None if record is None else record.of()
    if found is None:
        found = _make_typing(kind, module, arguments, options)
        return _track(found, token, False).of()
    return found


def _make_typing(kind: str, module: str | None, arguments: list[Any], options: dict[str, Any]) -> Any:
    import typing
    made = getattr(typing, kind)(*arguments, **options)
    if module is not None:
        made.__module__ = module
    return made


# -- other types

def _reduce_module(self: Pickler, module: types.ModuleType) -> Any:
    name = module.__name__
    if sys.modules.get(name) is module and (name == "__main__" or _is_importable(name, module)):
        return importlib.import_module, (sys.intern(name),)
    self.settled = False
    if type(module) is not types.ModuleType:
        return NotImplemented
    content = {key: value for key, value in vars(module).items()
               if key not in ("__builtins__", "__loader__", "__spec__", "__name__")}
    if id(vars(module)) not in self.scopes:
        self.scopes[id(vars(module))] = _Instead(vars, module)
    return types.ModuleType, (name,), content, None, None, _fill_module


def _fill_module(module: types.ModuleType, content: dict[str, Any]) -> None:
    vars(module).update(content, __builtins__=builtins)


def _reduce_exception(error: BaseException) -> Any:
    """Past its own constructor, which need not take what `args` holds; builtin ones, and those that know better, by
    themselves."""
    cls = type(error)
    if not (_is_python(cls.__init__) or _is_python(cls.__new__)) or _is_python(cls.__reduce_ex__) or _is_python(
            cls.__reduce__):
        return NotImplemented
    made_by, arguments, *state = tuple(error.__reduce__())
    group = getattr(builtins, "BaseExceptionGroup", None)
    made_of = (error.message, error.exceptions) if group and isinstance(error, group) else arguments
    return (_make_exception, (cls, made_of, error.args), *state) if made_by is cls else NotImplemented


def _make_exception(cls: Any, made_of: tuple[Any, ...], args: tuple[Any, ...]) -> BaseException:
    base = next(c for c in cls.__mro__ if c.__module__ == "builtins")
    error: BaseException = base.__new__(cls, *made_of)
    base.__init__(error, *made_of)
    error.args = args
    return error


def _reduce_by_hook(obj: Any, cls: type, sfunc: Callable[[Any], bytes], ufunc: Callable[[bytes], Any]) -> Any:
    try:
        data = sfunc(obj)
    except Exception as error:
        raise TypeError(f"the serialization function for {cls.__qualname__} failed: "
                        f"{type(error).__qualname__}: {error}") from error
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"the serialization function for {cls.__qualname__} returned {type(data).__qualname__}, "
                        "expected bytes")
    return _load_by_hook, (cls.__qualname__, ufunc, bytes(data))


def _load_by_hook(name: str, ufunc: Callable[[bytes], Any], data: bytes) -> Any:
    try:
        return ufunc(data)
    except Exception as error:
        raise pickle.UnpicklingError(f"the unserialization function for {name} failed: "
                                     f"{type(error).__qualname__}: {error}") from error


def _reduce_cached_property(self: Pickler, x: Any) -> Any:
    return functools.cached_property, (x.func,), {name: value for name, value in vars(x).items()
                                                  if name not in ("func", "lock")}


def _reduce_memoryview(self: Pickler, view: memoryview) -> Any:
    return _make_memoryview, (view.tobytes() if view.readonly else bytearray(view.tobytes()), view.format, view.shape)


def _make_memoryview(data: bytes, format: str, shape: tuple[int, ...]) -> memoryview:
    view = memoryview(data)
    return view if format == "B" and len(shape) == 1 else view.cast("B").cast(format, shape)     # type: ignore[call-overload]


def _reduce_view(kind: type[dict[Any, Any]], view: str, self: Pickler, x: Any) -> Any:
    content = kind(x if view == "items" else enumerate(x) if view == "values" else zip(x, x))
    return operator.methodcaller(view), (content,)


def _make_ref(obj: Any) -> Any:
    ref = weakref.ref(_QUIET[0]() if obj is None else obj)       # a dead one, where it was dead
    if obj is None and ref() is not None:
        gc.collect()            # PyPy counts no references
    return ref


def _reduce_file(self: Pickler, file: Any) -> Any:
    for name in ("stdout", "stderr"):
        if file is getattr(sys, name, None) or file is getattr(sys, f"__{name}__", None):
            return getattr, (sys, name)
    raise TypeError(f"cannot pickle the open file {getattr(file, 'name', '')!r}: a file is open in one process; send "
                    "its path, and open it there")


def _refuse(what: str, instead: str) -> Callable[[Pickler, Any], NoReturn]:
    def refuse(self: Pickler, obj: Any) -> NoReturn:
        raise TypeError(f"cannot pickle {what}: {instead}")
    return refuse


_REDUCERS: dict[type, Callable[[Any, Any], Any]] = {
    type(functools.lru_cache(repr)): _reduce_lru_cache,         # on PyPy a function, which comes next
    types.FunctionType: _reduce_function,
    types.BuiltinFunctionType: _reduce_builtin,
    types.MethodType: _reduce_method,
    types.CellType: _reduce_cell,
    types.CodeType: lambda self, x: (_load_code, (sys.implementation.cache_tag, _dump_code(x))),
    types.ModuleType: _reduce_module,
    type: _reduce_class,
    property: lambda self, x: (type(x), (x.fget, x.fset, x.fdel, x.__doc__)),
    staticmethod: lambda self, x: (type(x), (x.__func__,)),
    classmethod: lambda self, x: (type(x), (x.__func__,)),
    types.MappingProxyType: lambda self, x: (types.MappingProxyType, (gc.get_referents(x)[0],)),
    **{type(getattr(kind(), view)()): functools.partial(_reduce_view, kind, view)
       for kind in (dict, collections.OrderedDict) for view in ("keys", "values", "items")},
    **dict.fromkeys((types.GetSetDescriptorType, types.MemberDescriptorType),
                    lambda self, x: (getattr, (x.__objclass__, x.__name__))),
    memoryview: _reduce_memoryview,
    weakref.ref: lambda self, x: (_make_ref, (x(),)),
    weakref.WeakValueDictionary: lambda self, x: (weakref.WeakValueDictionary, (), None, None, iter(list(x.items()))),
    weakref.WeakKeyDictionary: lambda self, x: (weakref.WeakKeyDictionary, (), None, None, iter(list(x.items()))),
    functools.cached_property: _reduce_cached_property,
    _Instead: lambda self, x: x.reduced,
    **dict.fromkeys((io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO),
                    _reduce_file),
    contextvars.ContextVar: _refuse("a ContextVar", "it has its values in one process; send the value"),
    contextvars.Context: _refuse("a context", "it has its values in one process; send the values"),
    types.GeneratorType: _refuse("a generator", "it is code that runs; send list(it), or what makes it"),
    types.AsyncGeneratorType: _refuse("an async_generator", "it is code that runs; send what makes it"),
    types.CoroutineType: _refuse("a coroutine", "it is code that runs; send the function, as lambda: asyncio.run(f())"),
    types.FrameType: _refuse("a frame", "it is code that runs"),
    types.TracebackType: _refuse("a traceback", "it refers to code that runs; send traceback.format_exception()"),
}


# -- types that pickle can't carry

def serial_config(cls: Any, sfunc: Any, ufunc: Any) -> SerialConfig:
    """How to serialize a type that pickle can't carry, for `daemons(serial=...)`; its subclasses are included.

    cls: the class. sfunc: a function of an instance that returns bytes. ufunc: a function of these bytes that returns
    an instance. Sequences of equal length register several. Raises TypeError for what is no class or no function,
    ValueError for sequences of different lengths.
    """
    parts = [tuple(x) if isinstance(x, (list, tuple)) else (x,) for x in (cls, sfunc, ufunc)]
    if len({isinstance(x, (list, tuple)) for x in (cls, sfunc, ufunc)}) != 1:
        raise TypeError("expected a class and two functions, or three sequences of them")
    if len({len(part) for part in parts}) != 1:
        raise ValueError(f"{len(parts[0])} classes, {len(parts[1])} sfuncs and {len(parts[2])} ufuncs: expected as "
                         "many of each")
    for each in parts[0]:
        if not isinstance(each, type):
            raise TypeError(f"cls={each!r}: expected a class")
        if each in (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, type(None)):
            raise ValueError(f"cls={each!r}: pickle carries it by itself, and asks nobody")
    for name, functions in (("sfunc", parts[1]), ("ufunc", parts[2])):
        for f in functions:
            if not callable(f):
                raise TypeError(f"{name}={f!r}: expected a function")
    return SerialConfig(*parts)


def register_serial(cls: Any, sfunc: Any, ufunc: Any) -> None:
    """Registers what `serial_config()` describes for `dumps()`, and for all daemons but those set with a `serial` of
    their own."""
    _registered.update(_hooks_of(serial_config(cls, sfunc, ufunc)))


def _hooks_of(config: SerialConfig) -> dict[type, Any]:
    return dict(zip(config[0], zip(config[1], config[2])))


def make_hooks(configs: Any) -> Hooks | None:
    """Of one configuration, or a sequence of them; None: of what is registered, if anything is."""
    each = [configs] if isinstance(configs, SerialConfig) else configs
    if each is None:
        each = [SerialConfig(tuple(_registered), *zip(*_registered.values()))] if _registered else []
    if not isinstance(each, (list, tuple)) or not all(isinstance(config, SerialConfig) for config in each):
        raise TypeError(f"serial={configs!r}: expected what serial_config() returns, or a list of that")
    if not each:
        return None
    whole = SerialConfig(*(tuple(itertools.chain.from_iterable(config[i] for config in each)) for i in range(3)))
    blob = dumps(tuple(whole))
    return Hooks(_hooks_of(whole), hash_of(blob), blob)


def received_hooks(hash: bytes | None) -> dict[type, Any] | None:
    """On a daemon: those of the task."""
    if hash is not None and hash not in _hooks_here:
        _hooks_here[hash] = _hooks_of(SerialConfig(*loads(_definition(hash))))
    return None if hash is None else _hooks_here[hash]


# -- code of another version of Python

SUPPLY: list[Callable[[dict[str, str]], bytes]] = []        # on a daemon: asks its host; LookupError with a reason


def _codes_at(text: str, file: str, name: str, line: int) -> list[types.CodeType]:
    """The code objects of that name which begin at that line, in an order that all versions share."""
    todo, found = [compile(text, file, "exec", dont_inherit=True)], []
    while todo:
        code = todo.pop(0)
        if code.co_name == name and code.co_firstlineno == line:
            found.append(code)
        todo = [each for each in code.co_consts if isinstance(each, types.CodeType)] + todo
    return found


def _versions_differ(tag: str, why: str) -> Exception:
    return pickle.UnpicklingError(
        f"code that was compiled by {tag} can't run on {sys.implementation.cache_tag}, nor be compiled anew here: "
        f"{why}. Use the same Python on both sides, or put the function in a file")


def _code_by_source(tag: str, hash: bytes) -> Any:
    """Code of another version, compiled here; and for its free variables, which of the sender's each one is."""
    if not SUPPLY:
        raise _versions_differ(tag, "this process has nobody to ask for its source")
    try:
        at = json.loads(SUPPLY[0]({"source": hash.hex()}))
        code = _codes_at(at["text"], at["file"], at["name"], at["line"])[at["number"]]
        order = [at["free"].index(name) for name in code.co_freevars]
    except LookupError as error:
        raise _versions_differ(tag, str(error)) from None
    except (SyntaxError, ValueError) as error:
        raise _versions_differ(tag, f"its source does not fit this version: {error}") from None
    import linecache
    if at["file"] not in linecache.cache:
        linecache.cache[at["file"]] = len(at["text"]), None, at["text"].splitlines(True), at["file"]
    return code, order


# -- saying what is wrong

def explain_unserializable(obj: Any, root: str, error: BaseException, hooks: Mapping[type, Any] | None = None) -> str:
    """The path from `root` to the part of `obj` that can't be serialized, and why, as `args[1].lock: …`."""
    path, seen = root, {id(obj)}
    carried = tuple(_registered if hooks is None else hooks)
    try:
        while len(seen) < 100 and not isinstance(error, RecursionError):
            for step, part in () if isinstance(obj, carried) else _parts(obj):
                if id(part) in seen:
                    continue
                try:
                    dump_after(b"", part, hooks)
                except Exception as deeper:
                    path, obj, error = path + step, part, deeper
                    seen.add(id(part))
                    break
            else:
                return f"{path}: {error}"
    except Exception:           # of an object that does not want to be looked at
        return f"{path}: {error}"
    return f"{root}: nested too deeply, or {error}"


def _reduced_parts(obj: Any) -> list[tuple[str, Any]]:
    """None where it says itself that it can't be."""
    reduced: Any = (None, ())
    with contextlib.suppress(Exception):
        reduced = obj.__reduce_ex__(4)
    state = reduced[2] if len(reduced) > 2 and isinstance(reduced[2], dict) else {}
    return [*((f" (argument {i} of its __reduce__)", value) for i, value in enumerate(reduced[1])),
            *((f".{name}", value) for name, value in state.items())]


def _has_own_state(kind: type) -> bool:
    return any(getattr(kind, name, None) is not getattr(object, name, None)
               for name in ("__reduce__", "__reduce_ex__", "__getstate__"))


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    """What an object is made of, each with how one would write it."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield f"[{key!r}]", value
            yield " (a key)", key
    elif isinstance(obj, (list, tuple)):
        for i, value in enumerate(obj):
            yield f"[{i}]", value
    elif isinstance(obj, (set, frozenset)):
        for value in obj:
            yield "{…}", value
    elif _is_python(obj):
        yield from ((f" (closes over {name})", value) for name, value in _cells_of(obj).items() if value is not _EMPTY)
        yield from ((f" (reads global {name})", obj.__globals__[name]) for name in _define(obj).names
                    if name in obj.__globals__)
        names, defaults = obj.__code__.co_varnames[:obj.__code__.co_argcount], obj.__defaults__ or ()
        yield from ((f" (default of {name})", value) for name, value in zip(names[::-1], defaults[::-1]))
        yield from ((f" (default of {name})", value) for name, value in (obj.__kwdefaults__ or {}).items())
        yield from ((f".{name}", value) for name, value in vars(obj).items())
    elif isinstance(obj, (types.MethodType, functools.partial)):
        yield from ((f".{name}", getattr(obj, name)) for name in ("__self__", "__func__", "func", "args", "keywords")
                    if hasattr(obj, name))
    elif isinstance(obj, (staticmethod, classmethod)):
        yield ".__func__", obj.__func__
    elif isinstance(obj, type):
        yield from ((f".{name}", value) for name, value in _members(obj).items())
        yield from ((f" (base {base.__qualname__})", base) for base in obj.__bases__)
    elif _has_own_state(type(obj)):
        yield from _reduced_parts(obj)
    else:
        yield from ((f".{name}", value) for name, value in getattr(obj, "__dict__", {}).items())
        slots = copyreg._slotnames(type(obj))       # type: ignore[attr-defined]
        yield from ((f".{name}", getattr(obj, name)) for name in slots if hasattr(obj, name))
        if "__module__" in vars(type(obj)) and not _class_by_reference(type(obj)):
            yield " (its class)", type(obj)


# ======================================================================
# 6. Task and outcome: the one place where user code is called
# ======================================================================
# Knows:  callables, source text, exceptions; how the items of a map stand in a unit.
# Never:  sockets, who asked.

HOSTS_PATH = [True]             # whether tasks come from this machine, so that their host's import path is good here
_sources: dict[str, tuple[types.CodeType, types.CodeType | None]] = {}
VALUE, FAILURE = b"+", b"-"     # how an outcome begins: whoever only waits knows which it is without opening it
# A task begins with how it is made: TOGETHER, its two pickles share objects, or APART, each stands alone, and the
# length of the first comes before it. In front of that there may be a random stream.
APART_HEAD = struct.Struct("<cQ")
SEEDED = b"s"
SEED_HEAD = struct.Struct("<c6I")
_NUMBERS = frozenset((type(None), bool, int, float, complex))       # of which many are short

Task = collections.namedtuple("Task", "needs parts")    # definitions by hash, bytes or pieces of them; its own pieces


def dump_task(f: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any], path: list[str] | None,
              hooks: Hooks | None = None) -> Task:
    """A task as bytes, and the definitions that they refer to, by hash. `path`: the host's sys.path, where it differs
    from the daemon's. `hooks`: for types that pickle can't carry.

    Raises TypeError where something can't be serialized, with the path to it.
    """
    head = _head_of(f) if type(f) is types.FunctionType and path is None else None
    holds = head is not None and head.hooks == (hooks and hooks.hash) and head.holds()
    if holds and head is not None and head.task is not None:
        if not kwargs and _ATOMS.issuperset(map(type, args)):
            return Task(head.task.needs, [*head.task.parts, dump_atoms((args, kwargs))])
        sink = Sink(*head.task.parts)
        pickler = Pickler(sink, dict(head.task.needs), hooks and hooks.by_class)
        task = _finish(sink, pickler, args, kwargs, "args")
        if not pickler.functions:       # else they may be those that the function itself refers to
            return task
    sink, pickler = _begin(TOGETHER, f, (), {}, path, hooks, head is not None)
    if head is not None:
        if holds and head.holds():
            head.task = Task(dict(pickler.needs or {}), _apart(sink))
        else:
            head.watch_all(pickler, hooks and hooks.hash)
    return _finish(sink, pickler, args, kwargs, "args")


Constant = collections.namedtuple("Constant", "task hooks")     # what the items of a map have in common


def dump_constant(f: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], path: list[str] | None,
                  shape: Any = None, hooks: Hooks | None = None) -> Constant:
    """To be completed by `dump_units()`. `shape`: None for `f(item, …)`, () for `f(*item, …)` or `f(**item, …)`, or
    the names of what items are made of. Arguments that are large go ahead, and are loaded once by each daemon."""
    sink, pickler = _begin(APART, f, args, kwargs, path, hooks, shape=shape)
    parts = _apart(sink)
    sink = Sink(b"")
    pickler = Pickler(sink, dict(pickler.needs or {}), hooks and hooks.by_class)
    needs, pieces = _finish(sink, pickler, args, kwargs, "args")
    second = b"".join(pieces)
    if len(second) >= LARGE:
        hash = hash_of(second)
        needs[hash] = second
        second = dumps(hash)
    return Constant(Task(needs, [*parts, APART_HEAD.pack(APART, len(second)) + second]), hooks)


def dump_units(constant: Constant, map: int, items: list[Any], name: Callable[[int], str],
               streams: Stream | None) -> Iterator[tuple[int, Task]]:
    """Items of the map `map`, UNIT_ITEMS of them at most, as units: how many are in each, and what is sent. `name`: how
    the user would write the i-th. `streams`: the first one's. TypeError where one can't be serialized."""
    kinds = {type(item) for item in items}
    small = kinds <= _NUMBERS or kinds <= _ATOMS and sum(
        [len(item) for item in items if type(item) is str or type(item) is bytes]) <= UNIT_BYTES
    if small and len(items) > 1:
        yield len(items), _unit(constant, map, len(items), streams, TOGETHER, [dump_atoms(items)], {})
        return
    parts: list[bytes] = []
    size = 0
    needs: dict[bytes, Any] = {}
    for i, item in enumerate(items):
        sink = Sink()
        pickler = Pickler(sink, needs, constant.hooks and constant.hooks.by_class)
        try:
            pickler.dump(item)
        except Exception as error:
            if parts:
                yield len(parts), _unit(constant, map, len(parts), streams, APART, join_apart(parts), needs)
            raise _explain(error, pickler.hooks, {name(i): item}) from error
        parts.append(b"".join(sink.parts))
        size += len(parts[-1])
        if i == len(items) - 1 or size >= UNIT_BYTES:
            yield len(parts), _unit(constant, map, len(parts), streams, APART, join_apart(parts), needs)
            streams = streams and advance_stream(streams, len(parts))
            parts, needs, size = [], {}, 0


def _unit(constant: Constant, map: int, n: int, streams: Stream | None, how: bytes, body: list[bytes],
          needs: Mapping[bytes, Any]) -> Task:
    seed = [] if streams is None else [SEED_HEAD.pack(SEEDED, *streams)]
    return Task({**constant.task.needs, **needs}, [UNIT_HEAD.pack(n, map), *seed, *constant.task.parts, how, *body])


def _apart(sink: Sink) -> list[bytes]:
    first = b"".join(sink.parts[1:])
    return [APART_HEAD.pack(APART, len(first)) + first]


def _begin(how: bytes, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any], path: list[str] | None,
           hooks: Hooks | None, watched: bool = False, shape: Any = _EMPTY) -> tuple[Sink, Pickler]:
    """The first pickle of a task; in its place its hash, where it is large: it goes ahead as a definition. With a
    `shape`, of the items of a map, whose arguments stand apart."""
    sink = Sink(how)
    needs: dict[bytes, Any] = {}
    pickler = Pickler(sink, needs, hooks and hooks.by_class)
    pickler.settled = watched
    if hooks is not None:
        needs[hooks.hash] = hooks.blob
    try:
        content = (f, args, kwargs, path, hooks and hooks.hash)
        pickler.dump(content if shape is _EMPTY else (f, path, hooks and hooks.hash, shape))
    except Exception as error:
        raise _explain(error, pickler.hooks, {"f": f, "args": args, "kwargs": kwargs}) from error
    pieces = sink.parts[1:]
    if sum(map(len, pieces)) >= LARGE:
        hash = hash_of(*pieces)
        needs[hash] = pieces
        sink.parts[1:] = [dumps(hash)]
    return sink, pickler


def _finish(sink: Sink, pickler: Pickler, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Task:
    try:
        pickler.dump((args, kwargs))
    except Exception as error:
        parts = {name: args if name == "args" else args[0], "kwargs": kwargs}
        raise _explain(error, pickler.hooks, parts) from error
    return Task(pickler.needs, sink.parts)


_heads: dict[int, tuple[Any, _Head | None]] = {}        # by id(code): the last function that had it, weakly


class _Head:
    """The first pickle of tasks of one function, as long as nothing changes of all that it is made from. The first call
    notes the function; the second says what to watch; the third makes the pickle, between two looks that see no change;
    from then on it is used."""

    watch: _Watch | None = None
    task: Task | None = None
    hooks: bytes | None = None

    def watch_all(self, pickler: Pickler, hooks: bytes | None) -> None:
        self.watch = self.task = None
        if pickler.settled:
            self.hooks, self.classes = hooks, pickler.classes
            self.modules = len(sys.modules)     # one more, and a function may reach it through its package
            self.watch = _Watch(None, (*pickler.functions, *pickler.methods), True)

    def holds(self) -> bool:
        if self.watch is None or not self.watch.holds() or self.modules != len(sys.modules):
            return False
        for record, current in self.classes:
            cls = record.of()
            if cls is None or not current.watch.holds_members(cls):
                return False
        return True


def _head_of(f: types.FunctionType) -> _Head | None:
    """None at a function's first call: most lambdas have no second."""
    key = id(f.__code__)
    ref, head = _heads.get(key, (None, None))
    if ref is None or ref() is not f:
        if len(_heads) >= CACHED_CODES:
            _heads.clear()
        _heads[key] = weakref.ref(f, functools.partial(_drop_head, key)), None
        return None
    if head is None:
        head = _Head()
        _heads[key] = ref, head
    return head


def _drop_head(key: int, ref: Any) -> None:
    if _heads.get(key, (None, None))[0] is ref:
        del _heads[key]


def _explain(error: Exception, hooks: Mapping[type, Any], parts: Mapping[str, Any]) -> Exception:
    for root, part in parts.items():
        try:
            dump_after(b"", part, hooks)
        except Exception as why:
            return TypeError(f"can't send the task to a daemon: {explain_unserializable(part, root, why, hooks)}")
    return error


def _loaded_alone(load: Callable[[Any], Any], data: Any) -> Any:
    """What an earlier task has written into namespaces, and this one does not, is forgotten."""
    before = _written.copy() if _written else None
    _written.clear()
    try:
        return load(data)
    finally:
        if before:
            forget_globals(before)


def _load_task(payload: bytes) -> tuple[Any, ...]:
    """f, args, kwargs, path, hash of the hooks."""
    content, call = _loaded_alone(_load_parts, payload)
    (f, more, options, path, hooks), (args, kwargs) = content, call
    if more or options:
        args, kwargs = (*args, *more), {**options, **kwargs}
    return f, args, kwargs, path, hooks


def _load_parts(payload: bytes) -> tuple[Any, Any]:
    """What the two pickles of a task hold."""
    if payload.startswith(APART):
        view = memoryview(payload)
        end = APART_HEAD.size + APART_HEAD.unpack_from(payload)[1]
        content = loads(view[APART_HEAD.size:end])
        if type(content) is bytes:          # it went ahead
            content = loads(_definition(content))
        return content, loads(view[end:])
    stream = io.BytesIO(payload)
    stream.seek(len(TOGETHER))
    unpickler = Unpickler(stream)
    content = unpickler.load()
    if type(content) is bytes:
        unpickler = Unpickler(io.BytesIO(b"".join([_definition(content), stream.read()])))
        content = unpickler.load()
    return content, unpickler.load()


def seeded(task: Task, stream: Stream | None) -> Task:
    """The task with the stream that the random generators are to have when it begins."""
    if stream is None:
        return task
    return Task(task.needs, [SEED_HEAD.pack(SEEDED, *stream), *task.parts])


def _load_call(payload: bytes) -> tuple[Any, Any, Any, Mapping[type, Any] | None]:
    """f, args, kwargs, hooks of a task; the generators are seeded and the path is set for it."""
    if payload.startswith(SEEDED):
        GENERATORS.seed(SEED_HEAD.unpack_from(payload)[1:])
        payload = payload[SEED_HEAD.size:]
    f, args, kwargs, path, hash = _load_task(payload)
    if path is not None and HOSTS_PATH[0]:
        sys.path[:] = path
    return f, args, kwargs, received_hooks(hash)


def evaluate(payload: bytes) -> bytes:
    """Runs a task and gives its outcome. Everything that user code can raise, `_Interrupted` and SystemExit
    included, is an outcome; an interrupt may still come out of here while the outcome is being made."""
    try:
        f, args, kwargs, hooks = _load_call(payload)
        value = _run_source(f, kwargs) if isinstance(f, str) else f(*args, **kwargs)
    except BaseException as error:
        return dump_failure(error)
    return _dump_value(value, hooks)


def evaluate_everywhere(payload: bytes) -> bytes:
    """The same, in the namespace itself where it is source text; what is assigned there stays for later tasks."""
    before = copy_namespaces()
    try:
        f, args, kwargs, hooks = _load_call(payload)
        before = copy_namespaces()
        value = _run_source(f, kwargs, _namespace("__main__")) if isinstance(f, str) else f(*args, **kwargs)
    except BaseException as error:
        return dump_failure(error)
    finally:
        hold_assigned(before)
    return _dump_value(value, hooks)


class Items:
    """Items of a map on a daemon, as `dump_units()` made them: `begin()` a piece of them, then evaluate one by one."""

    def __init__(self, payload: bytes) -> None:
        self.n = UNIT_HEAD.unpack_from(payload)[0]
        view, at = memoryview(payload), UNIT_HEAD.size
        self.first: Stream | None = None
        if payload.startswith(SEEDED, at):
            self.first = SEED_HEAD.unpack_from(view, at)[1:]
            at += SEED_HEAD.size
        self.seeded: Any = (0, self.first)  # an index, and its stream
        self.constant = []
        for _ in range(2):
            start = at + APART_HEAD.size
            at = start + APART_HEAD.unpack_from(view, at)[1]
            self.constant.append(view[start:at])
        self.together = payload.startswith(TOGETHER, at)
        self.items: Any = view[at + 1:] if self.together else split_apart(view, self.n, at + 1)
        self.failure: bytes | None = None

    def begin(self) -> None:
        """Loads what the items have in common; where that fails it is every item's outcome."""
        self.failure = None
        try:
            if isinstance(self.items, memoryview):
                self.items = loads(self.items)
            self.f, path, hash, self.shape = _loaded_alone(_load_function, self.constant[0])
            self.args, self.kwargs = _load_arguments(self.constant[1])
            self.hooks = received_hooks(hash)
            if path is not None and HOSTS_PATH[0]:
                sys.path[:] = path
        except BaseException as error:
            self.failure = dump_failure(error)

    def evaluate(self, index: int) -> bytes:
        """The outcome of an item; as `evaluate()`."""
        if self.failure is not None:
            return self.failure
        try:
            if self.first is not None:
                at, stream = self.seeded if self.seeded[0] <= index else (0, self.first)
                self.seeded = index, advance_stream(stream, index - at)
                GENERATORS.seed(self.seeded[1])
            item = self.items[index]
            value = self._call(item if self.together else loads(item))
        except BaseException as error:
            return dump_failure(error)
        return _dump_value(value, self.hooks)

    def _call(self, item: Any) -> Any:
        if self.shape is None:
            return self.f(item, *self.args, **self.kwargs)
        if self.shape:
            return self.f(*self.args, **dict(zip(self.shape, item)), **self.kwargs)
        if isinstance(item, collections.abc.Mapping):
            return self.f(*self.args, **item, **self.kwargs)
        return self.f(*item, *self.args, **self.kwargs)


def _load_function(data: memoryview) -> Any:
    content = loads(data)
    return loads(_definition(content)) if type(content) is bytes else content


def _load_arguments(data: memoryview) -> Any:
    content = loads(data)
    if type(content) is not bytes:
        return content
    if content not in _kept:
        _kept[content] = loads(_definition(content))
    return _kept[content]


def _dump_value(value: Any, hooks: Mapping[type, Any] | None) -> bytes:
    try:
        if type(value) in _ATOMS:
            return VALUE + dump_atoms(value)
        return dump_after(VALUE, value, hooks, home=True)
    except BaseException as error:
        if isinstance(error, Exception):
            where = explain_unserializable(value, "result", error, hooks)
            error = TypeError(f"the result can't be sent back: {where}").with_traceback(error.__traceback__)
        return dump_failure(error)


def _compile_source(source: str) -> tuple[types.CodeType, types.CodeType | None]:
    """Source text as statements and, where it ends in an expression, that expression."""
    compiled = _sources.get(source)
    if compiled is None:
        import ast
        import linecache
        name = f"<mirai {len(_sources)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)      # for tracebacks
        tree: Any = compile(source, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        last = None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = compile(ast.Expression(tree.body.pop().value), name, "eval", dont_inherit=True)
        compiled = compile(tree, name, "exec", dont_inherit=True), last
        if len(_sources) >= CACHED_CODES:
            _sources.clear()
        _sources[source] = compiled
    return compiled


def _run_source(source: str, names: dict[str, Any], scope: dict[str, Any] | None = None) -> Any:
    """In a copy of the namespace, unless it is given one."""
    statements, last = _compile_source(source)
    scope = dict(_namespace("__main__")) if scope is None else scope
    scope.update(names)
    exec(statements, scope)
    return None if last is None else eval(last, scope)


def check_source(source: str) -> None:
    """SyntaxError where `source` is no Python."""
    compile(source, "<mirai>", "exec", dont_inherit=True)


@contextlib.contextmanager
def _suppress_all() -> Iterator[None]:
    """For user code in the making of error values, which may raise anything; only an interrupt goes through."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException:
        return


def _class_names(cls: type) -> list[str]:
    return [c.__qualname__ if c.__module__ == "builtins" else f"{c.__module__}.{c.__qualname__}"
            for c in cls.__mro__ if c is not object]


def _trace_text(error: BaseException) -> str:
    """The traceback as Python would print it, without this file's own frames at its head."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    with _suppress_all():
        return "".join(traceback.format_exception(type(error), error, trace))
    return f"{type(error).__qualname__} (its traceback can't be shown)\n"


def dump_failure(error: BaseException) -> bytes:
    """An exception as an outcome: texts that always arrive, and what of the original can be serialized."""
    message = f"{type(error).__qualname__} (its text can't be shown)"
    with _suppress_all():
        message = f"{type(error).__qualname__}: {error}"
    attributes = {}
    for name, value in getattr(error, "__dict__", {}).items():
        with _suppress_all():
            attributes[name] = dumps(value)
    original = None         # where its class or its contents can't travel the texts say what it was
    for bare in (False, True) if isinstance(error, Exception) else ():
        with _suppress_all():
            original = original or dumps(_bare(error, attributes) if bare else error)
    return dump_after(FAILURE, (message, _class_names(type(error)), _trace_text(error), attributes, original,
                                isinstance(error, KeyboardInterrupt)))


def _bare(error: BaseException, attributes: Mapping[str, Any]) -> BaseException:
    """It, with those attributes alone."""
    import copy
    twin = copy.copy(error)
    for name in vars(twin).keys() - attributes.keys():
        delattr(twin, name)
    return twin


def load_outcome(payload: bytes) -> tuple[Any, bool]:
    """The value of an outcome and True, or its error value and False. Whatever goes wrong in rebuilding it
    is an error value too, save a KeyboardInterrupt: that is the user's, who is waiting here."""
    try:
        content = loads(memoryview(payload)[1:])
        return (_load_failure(*content), False) if payload.startswith(FAILURE) else (content, True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        message = f"the outcome can't be rebuilt here: {type(error).__qualname__}: {error}"
        return MiraiError(message, _class_names(type(error)), _trace_text(error)), False


def _load_failure(message: str, classes: list[str], trace: str, attributes: dict[str, bytes],
                  original: bytes | None, interrupted: bool) -> MiraiError:
    kept, rebuilt = {}, None
    for name, value in attributes.items():
        with _suppress_all():
            kept[name] = loads(value)
    if original is not None:
        with _suppress_all():
            rebuilt = loads(original)
    if not isinstance(rebuilt, Exception) or isinstance(rebuilt, StopIteration):
        rebuilt = None      # a StopIteration would end the generator or coroutine that waits, in silence
    return (MiraiInterrupt if interrupted else MiraiError)(message, classes, trace, kept, rebuilt)


# ======================================================================
# 7. Dispatcher core: events in, effects out
# ======================================================================
# Knows:  units of tasks, daemon ids, slots of local daemons, states.       R: nanonext src/dispatcher.c
# Never:  payloads, sockets, the clock.       Thread: any, one at a time.
#
# Rule 1. Tasks come in units: one, or consecutive items of a map. Each goes awaiting -> executing -> completed, and
#         ends in one Resolve, or was cancelled by the host, which has resolved it already.
# Rule 2. Strict FIFO: the oldest awaiting task goes to the next idle daemon; no daemon idles beside a queue.
#         A task put back (its daemon ended before it began, or it has retries left) goes to the head.
#         `direct`: each daemon has a queue of its own instead, and they take turns.
# Rule 3. A daemon is given one task (AHEAD, where they are SHORT), or pieces of units for some CHUNK_TIME, and stays
#         busy until it has answered them, cancelled or not. What it has not begun can be taken back: all is counted
#         (positions), it is told from which on to begin none (Revoke), and is idle once it says that it stopped there.
# Rule 4. A slot is a local daemon that should be: off -> launching -> ready -> (ended) launching, or resting.
#         A resting slot is launched when tasks wait that no coming daemon will take.
# Rule 5. MAX_FAILED_STARTS launches that end before they are ready (or before they begin the first task they are
#         given), no local daemon having answered in between, stop the launching until it is asked for anew.
# Rule 6. `everywhere` calls are counted (epochs): before a daemon begins a task it has run the calls made before that
#         task was submitted. Those there at the call, and the first to join up to its minimum, answer it; others
#         replay.

Assign = collections.namedtuple("Assign", "daemon unit lo hi fresh")    # send these there; fresh: it had stopped
Replay = collections.namedtuple("Replay", "daemon unit fresh")          # have it run an `everywhere` call as others did
Interrupt = collections.namedtuple("Interrupt", "daemon unit lo hi")    # have it drop what it runs or has of these
Revoke = collections.namedtuple("Revoke", "daemon all", defaults=(False,))     # take back half of what it has not begun
Look = collections.namedtuple("Look", "")                       # call `look()` in STEAL_AFTER seconds
Resolve = collections.namedtuple("Resolve", "unit lo hi how")   # how: RESULT (the daemon's), or another
Sized = collections.namedtuple("Sized", "unit n")               # tell the host how many answers there will be
Launch = collections.namedtuple("Launch", "slot")               # start a local daemon
StopLaunching = collections.namedtuple("StopLaunching", "")     # tell the host that it was given up
Drop = collections.namedtuple("Drop", "daemon why")             # end a connection whose peer is at fault

RESULT, RESET, LAUNCH, WITHDRAWN = "result", "reset", "launch", "withdrawn"
IDLE, BUSY, LEAVING = "idle", "busy", "leaving"
LAUNCHING, READY, RESTING = "launching", "ready", "resting"
DIED, IDLETIME, WALLTIME, MAXTASKS = 0, 1, 2, 3     # why a daemon ended; also `daemon()`'s value and exit status

IGNORE = "ignore"       # a late event: allowed, without effect
FAULT = "fault"         # the daemon is wrong, and is dropped

# A daemon's state and what it said -> its next state. A leaving daemon still owes the results of what it has begun.
DAEMON_TABLE = {
    (IDLE, "reported"): FAULT,
    (BUSY, "reported"): BUSY,
    (LEAVING, "reported"): LEAVING,
    (IDLE, "leaving"): LEAVING,
    (BUSY, "leaving"): LEAVING,
    (LEAVING, "leaving"): IGNORE,
}


class _Pace:
    """What is known of the items of one map: seconds each, and how many to give at once."""

    __slots__ = ("seconds", "size")

    def __init__(self) -> None:
        self.seconds: float | None = None
        self.size = 1

    def measured(self, items: int, seconds: float) -> None:
        self.seconds = max(seconds / items, 1e-9)
        self.size = max(1, min(int(CHUNK_TIME / self.seconds), 8 * self.size, UNIT_ITEMS))


class _Unit:
    """Tasks that came as one, by their index: `done` where there are several, and `left` those that are not."""

    __slots__ = ("id", "n", "left", "done", "epoch", "pace", "call", "holders")

    def __init__(self, id: int, n: int, epoch: int, pace: _Pace | None = None, call: _Call | None = None) -> None:
        self.id, self.n, self.left, self.epoch, self.pace, self.call = id, n, n, epoch, pace, call
        self.done = None if n == 1 else bytearray(n)
        self.holders: Any = ()                  # daemons that were given some

    def count(self, lo: int, hi: int) -> int:
        """How many of these are not completed."""
        return self.left if self.done is None else self.done.count(0, lo, hi)

    def complete(self, lo: int, hi: int) -> int:
        """How many of these were not completed, and are now."""
        if self.done is None:
            new, self.left = self.left, 0
            return new
        new = self.done.count(0, lo, hi)
        self.done[lo:hi] = b"\1" * (hi - lo)
        self.left -= new
        return new


class _Call:
    """An `everywhere` call: who still owes an answer, how many answers are open to newcomers, how many were begun."""

    unit: _Unit

    def __init__(self, waiting: Iterable[int], open: int) -> None:
        self.waiting = dict.fromkeys(waiting)
        self.open, self.begun, self.worked = open, 0, False

    def take(self, daemon: int) -> int | None:
        """The index of the answer that this daemon gives, None where it only replays."""
        if daemon in self.waiting:
            del self.waiting[daemon]
        elif self.open:
            self.open -= 1
        else:
            return None
        self.begun += 1
        return self.begun - 1


class _Piece:
    """Tasks of a unit from `lo` to before `hi`, awaiting or given to a daemon; `back`: taken back from one."""

    __slots__ = ("unit", "lo", "hi", "retries", "back")

    def __init__(self, unit: _Unit, lo: int, hi: int, retries: int, back: bool = False) -> None:
        self.unit, self.lo, self.hi, self.retries, self.back = unit, lo, hi, retries, back


class _DaemonRecord:
    """What the core knows of a connected daemon."""

    __slots__ = ("state", "pieces", "own", "position", "sent", "revoking", "stopping", "fresh", "epoch", "replaying",
                 "due", "slot", "why", "proven", "ahead", "seconds", "seen")

    def __init__(self, slot: int | None, ahead: bool) -> None:
        self.state = IDLE
        self.pieces: deque[_Piece] = deque()    # what it was given and has not answered
        self.own: deque[_Piece] = deque()       # its queue, in direct mode
        self.position = 1               # of the first that it has not answered; both sides count
        self.sent = 1                   # the position after the last that it was given
        self.revoking = False           # a Revoke is under way
        self.stopping = False           # something was taken back: it will say that it has stopped
        self.fresh = False              # it has, and is to be told that what comes is meant
        self.epoch = 0                  # `everywhere` calls it has run
        self.replaying = False
        self.due = 0                    # calls that it must have run to be of use
        self.slot = slot
        self.why = DIED                 # unless it says another reason first
        self.proven = False             # it has answered a task
        self.ahead = ahead              # it can be given single tasks ahead: it says which it has begun
        self.seconds = math.inf         # that its last single tasks took
        self.seen = 0                   # its position at the last look

    def given(self) -> int:
        n = 0
        for piece in self.pieces:
            n += piece.hi - piece.lo
        return n


class DispatcherCore:
    """The scheduler: each method is an event and returns the effects to carry out, in order.

    `elastic`: slots rest until tasks wait, and rest again after each daemon: one process per task.
    `direct`: rule 2. `fixed`: how many items to give at once, for those who measure what is best.
    """

    def __init__(self, elastic: bool = False, direct: bool = False, fixed: int | None = None) -> None:
        self.elastic, self.direct, self.fixed = elastic, direct, fixed
        self.units: dict[int, _Unit] = {}           # by the id of its first task; as long as somebody wants an outcome
        self.paces: dict[int, _Pace] = {}           # by map; of the last ones
        self.queue: deque[_Piece] = deque()         # may hold some that were cancelled since
        self.queued = 0                             # tasks in queues that were not
        self.unresolved = 0
        self.calls: list[_Call] = []
        self.daemons: dict[int, _DaemonRecord] = {}
        self.idle: dict[int, None] = {}             # the last to come is the next to be used: its caches are warm
        self.ring: deque[int] = deque()             # in direct mode: whose turn it is
        self.holders: dict[int, None] = {}          # daemons that have several tasks
        self.looking = False
        self.slots: dict[int, str] = {}
        self.resting: deque[int] = deque()
        self.launching = 0
        self.failures = 0
        self.stopped = False                        # launching was given up
        self.expected = 0                           # daemons that were launched elsewhere, and have not joined
        self.cumulative = 0
        self.completed = 0

    # -- tasks

    def submitted(self, id: int, retries: int = 0, n: int = 1, map: int | None = None) -> list[Any]:
        """`n` tasks as one unit; `map`: whose items they are."""
        if id in self.units:
            raise ProtocolError(f"task {id} was submitted twice")
        pace = None if map is None else self._pace(map)
        unit = self.units[id] = _Unit(id, n, len(self.calls), pace)
        self.unresolved += n
        piece = _Piece(unit, 0, n, retries)
        if self.direct:
            return self._enqueue([piece]) + self._next()
        self.queue.append(piece)
        self.queued += n
        return self._next() if self.idle or self.resting or self.stopped else []

    def _pace(self, map: int) -> _Pace:
        pace = self.paces.get(map)
        if pace is None:
            pace = self.paces[map] = _Pace()
            if len(self.paces) > KEPT_PACES:
                del self.paces[next(iter(self.paces))]
        return pace

    def cancelled(self, id: int, lo: int, hi: int) -> list[Any]:
        """The host has resolved these; what is unknown here has finished meanwhile."""
        unit = self.units.get(id)
        if unit is None:
            return []
        effects: list[Any] = []
        held = 0
        for daemon in unit.holders:
            record = self.daemons.get(daemon)
            for piece in record.pieces if record is not None else ():
                a, b = max(lo, piece.lo), min(hi, piece.hi)
                if piece.unit is unit and a < b:
                    held += unit.count(a, b)
                    effects.append(Interrupt(daemon, id, a, b))
        new = unit.complete(lo, hi)
        if unit.call is None:
            self.queued -= new - held
            if len(self.queue) > 64 + 2 * self.queued:      # mostly of what was cancelled
                self.queue = deque(piece for piece in self.queue if piece.unit.count(piece.lo, piece.hi))
        elif not unit.left:
            self.queued -= unit.call.open
            unit.call.open = 0
        self._complete(unit, new)
        return effects

    def withdrawn(self, id: int) -> list[Any]:
        """A single task that is to be cancelled if it waits in a queue."""
        unit = self.units.get(id)
        if unit is None or unit.n > 1 or unit.call is not None or any(
                piece.unit is unit for daemon in unit.holders if daemon in self.daemons
                for piece in self.daemons[daemon].pieces):
            return []
        self.queued -= 1
        return self._reset(unit, 0, WITHDRAWN)

    def reported(self, daemon: int, id: int, lo: int, n: int = 1, seconds: float = 0.0,
                 failed: bool = False) -> list[Any]:
        """The daemon has answered its next n tasks; the shell holds what it said, and Resolve says to pass it on."""
        record = self.daemons[daemon]
        piece, end = record.pieces[0] if record.pieces else None, lo + n
        if DAEMON_TABLE[record.state, "reported"] is FAULT or piece is None or (
                piece.unit.id != id or piece.lo != lo or not lo < end <= piece.hi):
            return [Drop(daemon, f"it answered {n} of task {id} from {lo} on while {record.state}")]
        unit = piece.unit
        piece.lo = end
        record.position += n
        if end == piece.hi:
            record.pieces.popleft()
        if record.slot is not None and not record.replaying:
            self.failures = 0
        effects: list[Any] = []
        new = unit.complete(lo, end)
        if record.replaying:
            record.replaying = False
        elif new:
            self._complete(unit, new)
            effects.append(Resolve(id, lo, end, RESULT))
        record.proven = True
        if record.due:
            self._count_ready(record)
        if unit.call is not None:
            unit.call.worked = unit.call.worked or not failed
        elif unit.pace is None:
            record.seconds = seconds or math.inf
        elif seconds:
            unit.pace.measured(n, seconds)
        effects += self._go_on(daemon, record)
        return effects

    def _complete(self, unit: _Unit, n: int) -> None:
        self.unresolved -= n
        self.completed += n
        if not unit.left:
            self.units.pop(unit.id, None)

    # -- taking back

    def returned(self, daemon: int, position: int) -> list[Any]:
        """It begins nothing from this position on."""
        record = self.daemons.get(daemon)
        if record is None:
            return []
        record.revoking = False
        back = self._take_back(record, position)
        record.stopping = record.stopping or bool(back)
        if not back:
            self.holders.pop(daemon, None)      # it has begun all that it has
        return self._requeue(record, back) + self._next()

    def has_stopped(self, daemon: int, position: int) -> list[Any]:
        """It has not begun what it was given from this position on, and does not know of it any more."""
        record = self.daemons[daemon]
        effects = self._requeue(record, self._take_back(record, position))
        call = None
        if record.pieces and record.pieces[0].unit.call and position <= record.position and record.state is BUSY:
            call = record.pieces.pop()          # not begun: it is told again
        if record.pieces:
            return [*effects, Drop(daemon, f"it stopped at {position}, and owes what comes before")]
        record.revoking = record.stopping = False
        record.fresh = True
        if call is not None and not record.replaying and call.unit.count(call.lo, call.hi):
            return effects + self._give(daemon, record, call) + self._next()
        if call is not None:                    # a replay, or cancelled: as if it had not come to it yet
            record.replaying = False
            record.epoch -= 1
        effects += self._next()                 # those who idle first
        return effects + self._go_on(daemon, record) + self._next()

    def _take_back(self, record: _DaemonRecord, position: int) -> list[_Piece]:
        back: list[_Piece] = []
        excess = record.position + record.given() - position
        while excess > 0 and record.pieces and record.pieces[-1].unit.call is None:     # a call is this daemon's own
            piece = record.pieces.pop()
            kept = max(0, piece.hi - piece.lo - excess)
            excess -= piece.hi - piece.lo - kept
            if kept:
                record.pieces.append(_Piece(piece.unit, piece.lo, piece.lo + kept, piece.retries))
                piece.lo += kept
            back.insert(0, piece)
        return back

    def _requeue(self, record: _DaemonRecord | None, back: list[_Piece]) -> list[Any]:
        """At the head of the queue they came from, or to those whose turn it is."""
        if self.direct and record is None:
            return self._enqueue(back)
        queue = record.own if record is not None and self.direct else self.queue
        for piece in back:
            piece.back = True
        queue.extendleft(reversed(back))
        self.queued += sum([piece.unit.count(piece.lo, piece.hi) for piece in back])
        return []

    def held(self, daemon: int, id: int, lo: int, hi: int) -> tuple[int, int] | None:
        """Between which positions are those of these tasks that a daemon was given and has not answered."""
        record = self.daemons[daemon]
        at = record.position
        for piece in record.pieces if not record.replaying else ():
            first, last = max(lo, piece.lo), min(hi, piece.hi) - 1
            if piece.unit.id == id and first <= last:
                return at + first - piece.lo, at + last - piece.lo
            at += piece.hi - piece.lo
        return None

    def task_at(self, daemon: int, position: int) -> tuple[int, int] | None:
        """Unit and index of what a daemon was given and has not answered."""
        record = self.daemons[daemon]
        at = position - record.position
        for piece in record.pieces if at >= 0 else ():
            if at < piece.hi - piece.lo:
                return piece.unit.id, piece.lo + at
            at -= piece.hi - piece.lo
        return None

    # -- everywhere

    def everywhere(self, id: int, least: int = 1) -> list[Any]:
        """A call for all daemons that are there, and at least so many."""
        there = [daemon for daemon, record in self.daemons.items() if record.state is not LEAVING]
        n = max(1, least, len(there))
        call = _Call(there, n - len(there))
        call.unit = self.units[id] = _Unit(id, n, len(self.calls), None, call)
        self.calls.append(call)
        self.unresolved += n
        self.queued += call.open
        effects: list[Any] = [Sized(id, n)]
        for daemon in list(self.idle):
            effects += self._feed(daemon, self.daemons[daemon])     # which takes it from there
        return effects + self._next()

    def is_replayed(self, id: int) -> bool:
        """Whether newcomers run this call: one that has failed on every daemon is what no task can rely on."""
        return any(call.unit.id == id and (call.worked or call.unit.left) for call in self.calls)

    def _run_calls(self, daemon: int, record: _DaemonRecord) -> list[Any]:
        """The next call that this daemon has not run."""
        while record.epoch < len(self.calls):
            call = self.calls[record.epoch]
            record.epoch += 1
            newcomer = daemon not in call.waiting
            index = call.take(daemon)
            unit = call.unit
            if index is not None:
                self.queued -= newcomer
                if unit.count(index, index + 1):
                    return self._give(daemon, record, _Piece(unit, index, index + 1, 0))
            if call.worked or unit.left:
                record.replaying = True
                replay = _Unit(unit.id, 1, 0, None, call)
                given = self._give(daemon, record, _Piece(replay, 0, 1, 0))
                return [Replay(daemon, unit.id, given[0].fresh)]
        self._count_ready(record)
        return []

    def _count_ready(self, record: _DaemonRecord) -> None:
        """A daemon counts once it has run the calls that were made before it came."""
        if record.due and record.epoch >= record.due:
            record.due = 0
            self.cumulative += 1

    def _leave_calls(self, daemon: int, record: _DaemonRecord, comes_again: bool) -> list[Any]:
        """It has ended without having run these: its answer is open to its successor, or there will be none."""
        effects = []
        for call in self.calls[record.epoch:]:
            if daemon not in call.waiting:
                continue
            if comes_again and call.unit.left:
                del call.waiting[daemon]
                call.open += 1
                self.queued += 1
            else:
                effects += self._reset(call.unit, call.take(daemon) or 0)
        return effects

    def _reset(self, unit: _Unit, index: int, how: str = RESET) -> list[Any]:
        new = unit.complete(index, index + 1)
        self._complete(unit, new)
        return [Resolve(unit.id, index, index + 1, how)] if new else []

    # -- daemons

    def joined(self, daemon: int, slot: int | None = None, expected: bool = False, ahead: bool = False) -> list[Any]:
        """A daemon is there and ready; `slot`: the launch it came from, None where it was started elsewhere, `expected`
        or by hand. `ahead`: it says of each task when it is begun, where a kill leaves it."""
        record = self.daemons[daemon] = _DaemonRecord(slot, ahead and not self.elastic)
        self.expected -= expected
        record.due = len(self.calls)
        self.cumulative += not record.due
        if slot is not None:
            self._mark(slot, READY)
        effects: list[Any] = []
        if self.direct:
            self.ring.append(daemon)
            waiting = list(self.queue)
            self.queue.clear()
            self.queued -= sum([piece.unit.count(piece.lo, piece.hi) for piece in waiting])
            effects = self._enqueue(waiting)
        effects += self._go_on(daemon, record)
        return effects + self._next() if self.stopped else effects      # it may have been the last to come

    def leaving(self, daemon: int, why: int) -> list[Any]:
        """It ends by its own limits, after what it has begun, if anything."""
        record = self.daemons[daemon]
        if DAEMON_TABLE[record.state, "leaving"] is not IGNORE:
            record.state, record.why = LEAVING, why
            self.idle.pop(daemon, None)
        return []

    def lost(self, daemon: int, begun: int) -> list[Any]:
        """Its connection has ended. `begun`: the last position that it may have begun."""
        record = self.daemons.pop(daemon)
        self.idle.pop(daemon, None)
        self.holders.pop(daemon, None)
        if self.direct:
            self.ring.remove(daemon)
        had_begun = begun >= record.position
        useless = record.why is DIED and (record.replaying or (
            bool(record.pieces) and not had_begun and not record.proven))      # ready in name only
        rests = self.elastic or record.why in (IDLETIME, WALLTIME)
        effects = self._lose_tasks(record, begun)
        effects += self._leave_calls(daemon, record, record.slot is not None and not rests)
        if record.slot is None:
            return effects + self._next()
        if useless:
            return effects + self.launch_failed(record.slot)    # else it would go on for ever
        return effects + (self._rest(record.slot) if rests else self._launch(record.slot)) + self._next()

    def _lose_tasks(self, record: _DaemonRecord, begun: int) -> list[Any]:
        """What it may have begun is reset, or tried again; the rest, and its own queue, goes back."""
        effects: list[Any] = []
        back: list[_Piece] = []
        at = record.position
        for piece in record.pieces if not record.replaying else ():
            begun_to = min(piece.hi, piece.lo + max(0, begun + 1 - at))
            at += piece.hi - piece.lo
            for index in range(piece.lo, begun_to):
                if piece.retries and piece.unit.count(index, index + 1):
                    back.append(_Piece(piece.unit, index, index + 1, piece.retries - 1))
                else:
                    effects += self._reset(piece.unit, index)
            if begun_to < piece.hi and piece.unit.call is None:
                back.append(_Piece(piece.unit, begun_to, piece.hi, piece.retries))
            elif begun_to < piece.hi:
                effects += self._reset(piece.unit, piece.lo)
        record.pieces.clear()
        own = list(record.own)
        self.queued -= sum([piece.unit.count(piece.lo, piece.hi) for piece in own])
        return effects + self._requeue(None, back + own)

    # -- slots

    def launch(self, slots: Iterable[int]) -> list[Any]:
        """The host wants these local daemons as well; it may try again after launching had stopped."""
        self.stopped, self.failures = False, 0
        effects: list[Any] = []
        for slot in slots:
            effects += self._rest(slot) if self.elastic else self._launch(slot)
        return effects + self._next()

    def expect(self, n: int) -> list[Any]:
        """So many daemons are being launched elsewhere."""
        self.stopped, self.failures = False, 0
        self.expected += n
        return []

    def not_coming(self, n: int) -> list[Any]:
        """So many of these will not join: their launcher has ended without."""
        self.expected -= n
        if self.expected or self.daemons or self.slots and not self.stopped:
            return []
        effects: list[Any] = [] if self.stopped else [StopLaunching()]
        self.stopped = True
        return effects + self._next()

    def launch_failed(self, slot: int) -> list[Any]:
        """A launched daemon ended before it was of use."""
        self.failures += 1
        if self.failures < MAX_FAILED_STARTS and not self.stopped:
            return (self._rest(slot) if self.elastic else self._launch(slot)) + self._next()
        effects: list[Any] = [] if self.stopped else [StopLaunching()]
        self.stopped = True
        return effects + self._rest(slot) + self._next()

    def _mark(self, slot: int, state: str) -> None:
        self.launching += (state is LAUNCHING) - (self.slots.get(slot) is LAUNCHING)
        self.slots[slot] = state

    def _launch(self, slot: int) -> list[Any]:
        if self.stopped:
            return self._rest(slot)
        self._mark(slot, LAUNCHING)
        return [Launch(slot)]

    def _rest(self, slot: int) -> list[Any]:
        self._mark(slot, RESTING)
        self.resting.append(slot)
        return []

    # -- scheduling

    def _enqueue(self, pieces: list[_Piece]) -> list[Any]:
        """At the end of the queue; in direct mode to daemons in turn, a share of a unit to each."""
        self.queued += sum([piece.unit.count(piece.lo, piece.hi) for piece in pieces])
        if not self.direct or not self.ring:
            self.queue.extend(pieces)
            return []
        effects: list[Any] = []
        for piece in pieces:
            share = -(-(piece.hi - piece.lo) // len(self.ring))
            for lo in range(piece.lo, piece.hi, share):
                daemon = self.ring[0]
                self.ring.rotate(-1)
                record = self.daemons[daemon]
                record.own.append(_Piece(piece.unit, lo, min(lo + share, piece.hi), piece.retries))
                if daemon in self.idle:
                    effects += self._feed(daemon, record)
        return effects

    def _next(self) -> list[Any]:
        """Restores rules 2 and 4."""
        effects: list[Any] = []
        while self.idle and _first_of(self.queue) is not None:
            daemon, _ = self.idle.popitem()
            effects += self._feed(daemon, self.daemons[daemon])
        if self.idle and self.holders and not self.direct:
            effects += self._steal()
        if self.queued <= 0:
            return effects
        if self.stopped and not self.launching and not self.expected:
            effects += self._fail_awaiting()
        while not self.stopped and self.resting and self.queued > self.launching:
            effects += self._launch(self.resting.popleft())
        return effects

    def _go_on(self, daemon: int, record: _DaemonRecord) -> list[Any]:
        """It has answered something, or is new."""
        if daemon in self.holders and record.given() < 2:
            del self.holders[daemon]
        if record.state is LEAVING:
            return self._next()
        if record.pieces or record.stopping:
            return self._prefetch(daemon, record)
        effects = self._feed(daemon, record)
        if not effects:
            record.state = IDLE
            self.idle[daemon] = None
            return self._next()
        return effects + self._prefetch(daemon, record)

    def _feed(self, daemon: int, record: _DaemonRecord) -> list[Any]:
        """Something for an idle daemon, if there is something."""
        queue = record.own if self.direct else self.queue
        head = _first_of(queue)
        if record.epoch < len(self.calls) and (head is None or head.unit.epoch > record.epoch):
            effects = self._run_calls(daemon, record)
            if effects:
                return effects
        return [] if head is None else self._give(daemon, record, self._grant(queue, head))

    def _prefetch(self, daemon: int, record: _DaemonRecord) -> list[Any]:
        """One piece ahead, or some tasks, where they are short, so that the daemon need not wait for the next."""
        queue = record.own if self.direct else self.queue
        room = AHEAD // 2 if record.seconds < SHORT and record.ahead else 1
        if len(record.pieces) > room or record.stopping or record.revoking or self.idle and not self.direct:
            return []
        head = _first_of(queue)
        if head is None or head.unit.epoch > record.epoch or head.back:     # which has waited behind another
            return []
        pace = head.unit.pace
        if pace is None:
            return self._give_ahead(daemon, record, queue) if room > 1 else []
        if len(record.pieces) != 1 or record.pieces[0].unit.pace is None or (
                pace.seconds is None or pace.seconds > CHUNK_TIME):
            return []
        return self._give(daemon, record, self._grant(queue, head))

    def _give_ahead(self, daemon: int, record: _DaemonRecord, queue: deque[_Piece]) -> list[Any]:
        """Single tasks, as long as all that it has are such."""
        effects: list[Any] = []
        last = record.pieces[-1].unit
        while len(record.pieces) < AHEAD and last.pace is None and last.call is None:       # as are those given here
            head = _first_of(queue)
            if head is None or head.unit.pace is not None or head.unit.epoch > record.epoch or head.back:
                break
            effects += self._give(daemon, record, queue.popleft())
        if effects and not self.looking and not self.direct:
            self.looking = True
            effects.append(Look())
        return effects

    def _grant(self, queue: deque[_Piece], head: _Piece) -> _Piece:
        """So much of the head of a queue as a daemon is to have: of the last piece, not what others could do now."""
        unit = head.unit
        if unit.pace is None:
            return queue.popleft()
        size = self.fixed or unit.pace.size
        if len(queue) == 1 and not self.direct and not self.fixed:
            size = min(size, -(-(head.hi - head.lo) // (1 + len(self.idle))))
        hi = min(head.hi, head.lo + size)
        cancelled = -1 if unit.done is None else unit.done.find(1, head.lo, hi)
        if cancelled >= 0:
            hi = cancelled
        if hi == head.hi:
            return queue.popleft()
        piece = _Piece(unit, head.lo, hi, head.retries, head.back)
        head.lo = hi
        return piece

    def _give(self, daemon: int, record: _DaemonRecord, piece: _Piece) -> list[Any]:
        self.idle.pop(daemon, None)
        unit, n = piece.unit, piece.hi - piece.lo
        if not record.pieces:
            record.position = record.sent       # past what was taken back
        record.state = BUSY
        record.pieces.append(piece)
        record.sent += n
        if daemon not in unit.holders:
            unit.holders += (daemon,)
        if unit.call is None:
            self.queued -= n
        if n > 1 or len(record.pieces) > 1:
            self.holders[daemon] = None
        fresh, record.fresh = record.fresh, False
        return [Assign(daemon, unit.id, piece.lo, piece.hi, fresh)]

    def look(self) -> list[Any]:
        """Some time after `Look`: who still has much left is slower than was thought."""
        self.looking = False
        effects = self._free_ahead()
        return effects + self._steal(True) if self.idle and not self.direct else effects

    def _free_ahead(self) -> list[Any]:
        """Takes back the single tasks that wait behind one that is not short, whether anybody idles or not."""
        effects: list[Any] = []
        for daemon in self.holders:
            record = self.daemons[daemon]
            if record.revoking or len(record.pieces) < 2 or record.pieces[-1].unit.pace is not None:
                continue
            if record.seen == record.position and record.state is BUSY:
                record.seconds, record.revoking = math.inf, True
                effects.append(Revoke(daemon, True))
            record.seen = record.position
            if not self.looking:
                self.looking = True
                effects.append(Look())
        return effects

    def _steal(self, slow: bool = False) -> list[Any]:
        """For daemons that idle, half of what others have not begun; not what these will have done in no time."""
        effects: list[Any] = []
        later = False
        revoking = 0
        for daemon in self.holders:
            record = self.daemons[daemon]
            left = record.given() - 1
            if record.revoking:
                revoking += 1
            if record.revoking or record.state is LEAVING or left < 1:
                continue
            pace = record.pieces[-1].unit.pace
            seconds = record.seconds if pace is None else pace.seconds
            if revoking >= len(self.idle):
                continue
            if not slow and seconds is not None and left * seconds < STEAL_AFTER:
                later = True
                continue
            record.revoking = True
            revoking += 1
            effects.append(Revoke(daemon))
        if later and not self.looking:
            self.looking = True
            effects.append(Look())
        return effects

    def _fail_awaiting(self) -> list[Any]:
        """Nobody is coming any more: no newcomers, and where there is nobody else, nobody at all."""
        effects: list[Any] = []
        for call in self.calls:
            while call.open:
                call.open -= 1
                call.begun += 1
                self.queued -= 1
                effects += self._reset(call.unit, call.begun - 1, LAUNCH)
        while not self.daemons and (head := _first_of(self.queue)) is not None:
            self.queued -= 1
            effects += self._reset(head.unit, head.lo, LAUNCH)
        return effects

    # -- looking

    def counts(self) -> tuple[int, int, int, int, int]:
        """connections, cumulative, awaiting, executing, completed."""
        executing = 0
        for record in self.daemons.values():
            if record.pieces and not record.replaying:
                piece = record.pieces[0]
                executing += bool(piece.unit.count(piece.lo, piece.hi))
        return len(self.daemons), self.cumulative, self.unresolved - executing, executing, self.completed


def _first_of(queue: deque[_Piece]) -> _Piece | None:
    """The first piece that holds a task to be done, which it then begins with."""
    while queue:
        piece = queue[0]
        unit = piece.unit
        if unit.left:
            if unit.done is None:
                return piece
            lo = unit.done.find(0, piece.lo, piece.hi)
            if lo >= 0:
                piece.lo = lo
                return piece
        queue.popleft()
    return None


# ======================================================================
# 8. Transport: URLs, the handshake, connections
# ======================================================================
# Knows:  sockets, keys, frames.
# Never:  tasks; it unpickles nothing.
# Rule:   nothing is passed on from a peer that has not proven that it holds the key.

_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: None)
SILENT = f"did not answer for {LINK_TIME:.0f} s: its machine is gone, or the network to it"

Address = collections.namedtuple("Address", "scheme host port")     # ipc: host is the path, port None


def parse_url(url: str) -> Address:
    """`ipc:///path`, `tcp://host:port`, `tls+tcp://[v6]:port`; ValueError says what is wrong, and what would be
    right."""
    right = "expected 'tcp://host:5555' (port 0: a free one), 'tls+tcp://[::1]:5555' or 'ipc:///path'"
    if not isinstance(url, str):
        raise TypeError(f"a URL is a str, not {type(url).__name__}: {right}")
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise ValueError(f"{url!r} is no URL: {right}")
    if scheme == "ipc":
        if not os.path.isabs(rest):
            raise ValueError(f"{url!r} holds no absolute path: {right}")
        return Address(scheme, rest, None)
    if scheme not in ("tcp", "tls+tcp"):
        raise ValueError(f"{url!r} has the unknown scheme {scheme!r}: {right}")
    host, separator, port = rest.rpartition(":")
    if not separator or not port or not host.strip("[]"):
        raise ValueError(f"{url!r} lacks a host or a port: {right}")
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ValueError(f"{url!r}: {port!r} is no port, 0 to 65535: {right}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{url!r}: an IPv6 address goes in brackets: {right}")
    return Address(scheme, host.strip("[]"), int(port))


def format_url(address: Address) -> str:
    if address.scheme == "ipc":
        return f"ipc://{address.host}"
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{address.scheme}://{host}:{address.port}"


_WILDCARDS = ("*", "0.0.0.0", "::")


def is_local(address: Address) -> bool:
    """Whether nobody beyond this machine can get there."""
    return address.scheme == "ipc" or _is_loopback(address.host)


def _is_loopback(host: str) -> bool:
    bare = host[7:] if host.startswith("::ffff:") else host
    return host in ("::1", "localhost") or (bare.startswith("127.") and bare.replace(".", "").isdigit())


def _is_this_machine(host: str) -> bool:
    """Whether it stands for all of this machine's addresses."""
    return host in _WILDCARDS or host.lower() == socket.gethostname().lower()


class HostURL(str):
    """A URL on this machine; `interfaces` has one for each of its network interfaces, by name."""

    interfaces: dict[str, str]


def host_url(tls: bool = False, port: int = 0) -> HostURL:
    """A URL at which daemons on other machines reach this one: `tcp://`, or with `tls` `tls+tcp://`, by its host name;
    on `port`, 0 for a free one. Who listens there does so on all of its addresses, and what `launch_remote()` starts
    tries each of them. `.interfaces` has a URL for every network interface by name, to listen on one alone.
    """
    scheme = "tls+tcp" if tls else "tcp"
    url = HostURL(format_url(Address(scheme, socket.gethostname(), port)))
    url.interfaces = {name: format_url(Address(scheme, host, port)) for name, host in _interfaces().items()}
    return url


def _interfaces() -> dict[str, str]:
    """The addresses of this machine that others may reach, by interface; the one that the default route takes first."""
    found: dict[str, str] = {}
    for family, anywhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((anywhere, 9))        # sends nothing
            found[""] = found.get("") or probe.getsockname()[0]
    addresses = _interface_addresses()
    names = {address: name for name, address in reversed(addresses)}
    first = found.get("")
    known = {names.get(first, "default"): first} if first and not _is_loopback(first) else {}
    for name, address in addresses:
        if address not in known.values():
            known.setdefault(name if name not in known else f"{name} {address}", address)
    return known


def _interface_addresses() -> list[tuple[str, str]]:
    """Of Linux's; elsewhere the host name has to do."""
    found: list[tuple[str, str]] = []
    with contextlib.suppress(OSError, ImportError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        import fcntl
        interfaces = getattr(socket, "if_nameindex", list) if sys.platform == "linux" else list     # not on PyPy 7.3.11
        for _, name in interfaces():
            with contextlib.suppress(OSError):      # it has none
                entry = fcntl.ioctl(sock.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))     # SIOCGIFADDR
                found.append((name, socket.inet_ntoa(entry[20:24])))
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:
        for digits, _, _, scope, _, name in map(str.split, file):
            if scope == "00":                       # global
                found.append((name, socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))))
    if not found:
        with contextlib.suppress(OSError):
            found = [("host", str(info[4][0])) for info in socket.getaddrinfo(socket.gethostname(), None)]
    return [(name, address) for name, address in found if not _is_loopback(address)]


def nearby(address: Address) -> str:
    """The URL by which this machine itself gets there."""
    named = address.scheme == "tls+tcp" and address.host not in _WILDCARDS      # its certificate may say that name
    return format_url(address._replace(host="127.0.0.1") if _is_this_machine(address.host) and not named else address)


def reach(address: Address) -> list[str]:
    """The URLs by which another machine may get to who listens there, one of which will work."""
    if is_local(address) or not _is_this_machine(address.host):
        return [format_url(address)]
    own = [] if address.host in _WILDCARDS else [address.host]
    hosts = [host for host in _interfaces().values() if address.host != "0.0.0.0" or ":" not in host]
    return [format_url(address._replace(host=host)) for host in (*own, *hosts)]


def runtime_dir() -> str:
    """The user's own directory for sockets and key files, mode 0700; OSError where there can be none."""
    own = os.getuid() if hasattr(os, "getuid") else "user"
    run = os.environ.get("XDG_RUNTIME_DIR")
    path = os.path.join(tempfile.gettempdir(), f"mirai-{own}")
    if run and os.path.isdir(run) and (os.name != "posix" or os.stat(run).st_uid == own):      # not after `su`
        path = os.path.join(run, "mirai")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or (os.name == "posix" and (found.st_uid != own or found.st_mode & 0o077)):
        raise PermissionError(errno.EACCES, "not a directory that belongs to this user alone", path)
    return path


def local_url(tcp: bool = False, port: int = 0) -> str:
    """A URL on this machine: a new Unix socket's, or with `tcp` (and where there are no Unix sockets) loopback TCP
    on `port`, 0 for a free one."""
    if tcp or not hasattr(socket, "AF_UNIX"):
        return f"tcp://127.0.0.1:{port}"
    with contextlib.suppress(OSError):
        path = os.path.join(runtime_dir(), os.urandom(8).hex())
        if len(os.fsencode(path)) <= 100:       # sun_path holds 108 bytes on Linux, 104 on macOS
            return f"ipc://{path}"
    return f"tcp://127.0.0.1:{port}"            # the key keeps others out there as well


def parse_key(key: str | bytes, what: str = "key") -> bytes:
    """32 bytes, or the 64 hexadecimal digits of them."""
    if isinstance(key, str):
        try:
            key = bytes.fromhex(key.strip())
        except ValueError:
            raise ValueError(f"{what}: a key as text is 64 hexadecimal digits") from None
    if len(key) != 32:
        raise ValueError(f"{what}: a key has 32 bytes (64 hexadecimal digits), not {len(key)}")
    return key


def write_key_file(url: str, key: bytes) -> str:
    """Leaves the key where this user's daemons started by hand find it; gives the file's path."""
    path = os.path.join(runtime_dir(), f"{os.urandom(8).hex()}.key")
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        json.dump({"url": url, "key": key.hex()}, file)
    return path


def _age(path: str) -> float:
    with contextlib.suppress(OSError):
        return time.time() - os.path.getmtime(path)
    return math.inf


def _passing_over() -> contextlib.suppress:
    """For key files that went away, or that hold something else."""
    return contextlib.suppress(OSError, ValueError, KeyError, TypeError)


def find_key(*urls: str) -> bytes:
    """The key for a URL: MIRAI_KEY, or the key file of this user's own profile there; Refused where there is none."""
    if "MIRAI_KEY" in os.environ:
        return parse_key(os.environ["MIRAI_KEY"], "MIRAI_KEY")
    urls = (*urls, *(url.replace("//localhost:", "//127.0.0.1:") for url in urls))
    with contextlib.suppress(OSError):
        directory = runtime_dir()
        paths = [os.path.join(directory, name) for name in os.listdir(directory) if name.endswith(".key")]
        for path in sorted(paths, key=_age):        # the newest: some may be left from a profile that was killed
            with _passing_over(), open(path) as file:
                entry = json.load(file)
                if entry["url"] in urls:
                    return parse_key(entry["key"])
    raise Refused(f"no key for {' '.join(urls)}: no profile of this user listens there on this machine, or its host is "
                  "gone; give the key in MIRAI_KEY or with --key-file, as the line that launch_remote() returns does")


def sweep_runtime_dir() -> None:
    """Removes sockets that nobody listens on any more, and their key files: their owners died all at once."""
    with contextlib.suppress(OSError):
        directory = runtime_dir()
        gone = set()
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            new = name.endswith("~") and time.time() - os.lstat(path).st_ctime < START_TIME
            if stat.S_ISSOCK(os.lstat(path).st_mode) and not new and not _answers(path):
                gone.add(f"ipc://{path}")
                os.unlink(path)
        for name in os.listdir(directory) if gone else ():
            path = os.path.join(directory, name)
            with _passing_over(), open(path) as file:
                if name.endswith(".key") and json.load(file)["url"] in gone:
                    os.unlink(path)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) != errno.ECONNREFUSED


def listen(address: Address) -> tuple[socket.socket, Address]:
    """A listening socket, and the address with its actual port."""
    if address.scheme == "ipc":
        sock = socket.socket(socket.AF_UNIX)
        try:
            _bind_unix(sock, address.host)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, f"can't listen at {format_url(address)}: {error.strerror or error}") from None
        return sock, address
    try:
        sock = _bind_tcp(address)
    except OSError as error:
        raise OSError(error.errno, f"can't listen at {format_url(address)}: {error.strerror}") from None
    return sock, address._replace(port=sock.getsockname()[1])


def _bind_tcp(address: Address) -> socket.socket:
    if not _is_this_machine(address.host):
        family, where = _resolve(address)[0]
        return socket.create_server(where, family=family, backlog=LISTEN_BACKLOG)
    if socket.has_dualstack_ipv6() and address.host != "0.0.0.0":
        with contextlib.suppress(OSError):          # compiled in, but turned off
            return socket.create_server(("", address.port), family=socket.AF_INET6, backlog=LISTEN_BACKLOG,
                                        dualstack_ipv6=True)
    return socket.create_server(("", address.port), backlog=LISTEN_BACKLOG)


def _resolve(address: Address) -> list[tuple[int, Any]]:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((int(family), where) for family, _, _, _, where in found))


def _bind_unix(sock: socket.socket, path: str) -> None:
    """Binds and listens; under its own name the socket answers from the first moment, or is dead and swept away."""
    if os.path.exists(path):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    try:
        sock.bind(path + "~")
    except FileNotFoundError:       # another host's nursery took the empty run-time directory with it
        runtime_dir()
        sock.bind(path + "~")
    os.chmod(path + "~", 0o600)
    sock.listen(LISTEN_BACKLOG)
    os.rename(path + "~", path)


def keep_alive(sock: socket.socket) -> None:
    """A peer whose machine or network is gone is noticed within LINK_TIME: the kernel asks it now and then."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", LINK_TIME // 3), ("TCP_KEEPINTVL", LINK_TIME // 6), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), int(value))


def is_cut(sock: socket.socket) -> bool:
    """Whether what was sent has gone without any answer for LINK_TIME: then the kernel asks nothing, but sends it again
    for a quarter of an hour. A peer that is stopped, and takes no more, still answers: TCP_USER_TIMEOUT would end
    it."""
    if not hasattr(socket, "TCP_INFO"):
        return False
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    _, _, retransmits, probes = struct.unpack_from("4B", info)
    last_ack: int = struct.unpack_from("I", info, 56)[0]        # milliseconds ago
    return last_ack > 1000 * LINK_TIME and (retransmits > 0 or probes > 1)


class Poller:
    """Waits for descriptors, the same ones again and again; one thread at a time."""

    def __init__(self, *fds: int, write: bool = False) -> None:
        self._fds, self._write = fds, write
        self._poll = None
        if hasattr(select, "poll"):
            poller = select.poll()
            for fd in fds:
                poller.register(fd, select.POLLOUT if write else select.POLLIN)
            self._poll = poller.poll

    def wait(self, timeout: float | None) -> list[int]:
        """Those that can be read (or written) without waiting, after `timeout` seconds or WAIT_MOST at most."""
        timeout = None if timeout is None else min(max(0.0, timeout), WAIT_MOST)
        if self._poll is not None:
            return [fd for fd, _ in self._poll(None if timeout is None else math.ceil(timeout * 1000))]
        fds, none = self._fds, ()
        readable, writable, _ = select.select(none if self._write else fds, fds if self._write else none, none, timeout)
        return readable + writable


def wait_ready(fd: int, timeout: float | None, write: bool = False) -> bool:
    return bool(Poller(fd, write=write).wait(timeout))


class Connection:
    """A socket, what has arrived from it, and what still has to go.

    Nothing here is lost or doubled where a signal handler raises in the middle: what the kernel took or gave
    is noted in the C call that moved it (`list.extend(map(…))`), not in a statement after it.
    """

    def __init__(self, sock: socket.socket, decoder: Decoder | None = None) -> None:
        self.sock = sock
        self._send = sock.send
        self._recv: Callable[[int], bytes] = sock.recv
        self.decoder = decoder or Decoder()
        self.channel: SealedChannel | TLSChannel | None = None      # between the socket and the frames
        self.ended = False                          # the peer will send no more
        self.fault = ""                             # why, where it has not just closed it
        self.terms: Mapping[str, Any] = {}          # what the listener has said of itself
        self._batch: list[bytes] = []
        self._outgoing: deque[list[Any]] = deque()  # [bytes, sent until now, …]
        self._view = memoryview(b"")                # of what is to be sent next
        if sock.family != getattr(socket, "AF_UNIX", None):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self.sock.fileno()

    def seal(self, channel: SealedChannel) -> None:
        """From here on, after what was sent and read so far; of the listener more may have been read."""
        rest = self.decoder.take_rest()
        self.channel = channel
        if rest:
            self.decoder.chunks.extend(channel.unwrap(rest))

    def receive_by(self, recv: Callable[[int], bytes]) -> None:
        """For a way of one's own to read from the socket."""
        self._recv = recv

    def receive(self) -> bool:
        """Reads once. False where nothing was there; sets `ended` at the end."""
        if self.channel is not None:
            return self._receive_by(self.channel)
        chunks = self.decoder.chunks
        try:
            chunks.extend(map(self._recv, (self.decoder.wanted(),)))
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._break(error)
            return False
        if not chunks[-1]:
            self.ended = True
        return not self.ended

    def _break(self, error: OSError) -> None:
        if error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
            self.fault = SILENT
        self.ended = True

    def _receive_by(self, channel: SealedChannel | TLSChannel) -> bool:
        """The same through a channel, where no signal handler raises; what is not as it was sent ends it."""
        try:
            data = self._recv(self.decoder.wanted())
            if data:
                self.decoder.chunks.extend(channel.unwrap(data))
            if channel.answer:
                self._outgoing.append([channel.take_answer(), 0])
                self.flush()
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            data = b""
            self._break(error)
        except ProtocolError as error:
            data, self.fault = b"", str(error)
            with contextlib.suppress(OSError):      # which says why to the other side
                self.sock.send(channel.take_answer())
        self.ended = self.ended or not data
        return not self.ended

    def post(self, frame: bytes) -> None:
        """Adds a frame to what the next `flush()` sends as one."""
        self._batch.append(frame)

    def send(self, frame: bytes) -> bool:
        """Sends what can be sent now; the rest is kept for `flush()`. False where there is a rest."""
        self._enqueue(frame)
        return self.flush()

    def _enqueue(self, data: bytes) -> None:
        if self.channel is None:
            self._outgoing.append([data, 0])
        else:
            self._outgoing.extend([piece, 0] for piece in self.channel.wrap(data))

    def leave(self, frame: bytes) -> None:
        """Adds a frame to what `flush()` sends, in any thread, whoever is sending."""
        self._outgoing.append([frame, 0])

    def flush(self) -> bool:
        """False where the socket takes no more for now. OSError where the connection is broken."""
        if self._batch:
            self._enqueue(b"".join(self._batch))
            self._batch.clear()
        while True:
            try:
                item = self._outgoing[0]
            except IndexError:
                return True
            frame, sent = item[0], item[-1]
            if sent < len(frame):
                self._view.release()            # a signal handler may have come here: whom it interrupted looks again
                view = self._view = memoryview(frame)[sent:sent + READ_LARGE]       # PyPy copies what it is given
                if item[-1] == sent:
                    try:
                        item.extend(itertools.accumulate(map(self._send, (view,)), initial=sent))
                    except (BlockingIOError, InterruptedError):
                        return False
                    except ValueError:              # it was released
                        continue
            else:
                with contextlib.suppress(ValueError):       # a nested call was first
                    self._outgoing.remove(item)

    @property
    def pending(self) -> bool:
        return bool(self._batch or self._outgoing)

    @property
    def unsent(self) -> int:
        """Bytes of whole frames that were not sent."""
        return sum([len(item[0]) for item in self._outgoing])

    def close(self) -> None:
        self.sock.close()


# -- channels: what bytes on a connection go through, where others could read or change them

class SealedChannel:
    """Bytes in records, each with a MAC over its number, so that none can be changed, dropped, repeated or moved by
    whoever is between. Not secret: that is what TLS is for. `mine`, `theirs`: keys, one for each direction."""

    _HEAD = struct.Struct("<QI")        # number, length; the number is not sent
    answer = False

    def __init__(self, mine: bytes, theirs: bytes) -> None:
        self._mine, self._theirs = hmac.new(mine, digestmod="sha256"), hmac.new(theirs, digestmod="sha256")
        self._sent = self._received = 0
        self._buffer = bytearray()

    def take_answer(self) -> bytes:
        """Nothing is asked for."""
        return b""

    def wrap(self, data: bytes) -> list[bytes]:
        view, records = memoryview(data), []
        for start in range(0, len(data), READ_LARGE):
            piece = view[start:start + READ_LARGE]
            head = self._HEAD.pack(self._sent, len(piece))
            records.append(b"".join([head[8:], piece, self._mac(self._mine, head, piece)]))
            self._sent += 1
        return records

    def unwrap(self, data: bytes) -> list[bytes]:
        self._buffer += data
        found, at = [], 0
        while len(self._buffer) - at >= 4:
            length = int.from_bytes(self._buffer[at:at + 4], "little")
            if length > READ_LARGE:
                raise ProtocolError("what came over the network is not what was sent: a record without end")
            end = at + 4 + length
            if end + 32 > len(self._buffer):
                break
            piece = bytes(self._buffer[at + 4:end])
            mac = self._mac(self._theirs, self._HEAD.pack(self._received, length), piece)
            if not hmac.compare_digest(mac, self._buffer[end:end + 32]):
                raise ProtocolError("what came over the network is not what was sent: a wrong MAC")
            self._received += 1
            found.append(piece)
            at = end + 32
        del self._buffer[:at]
        return found

    @staticmethod
    def _mac(keyed: hmac.HMAC, head: bytes, piece: bytes | memoryview) -> bytes:
        mac = keyed.copy()
        mac.update(head)
        mac.update(piece)
        return mac.digest()


class TLSChannel:
    """TLS in memory: what is read from the socket goes in, what is to be sent comes out. Two threads may use it, one
    for each direction; what TLS itself has to say after the handshake goes with what is sent next."""

    def __init__(self, context: Any, host: str | None = None) -> None:
        """`host`: who is dialed; None: this side listens."""
        import ssl
        self._ssl = ssl
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, host is None, host)
        self._lock = threading.Lock()
        self.ready = False
        self.answer = False
        if host is not None:
            self.unwrap(b"")

    def take_answer(self) -> bytes:
        """What is to be sent at once."""
        self.answer = False
        return self._out.read()

    def certificate(self) -> bytes:
        """The listener's, as it was sent."""
        return self._tls.getpeercert(True) or b""

    def wrap(self, data: bytes) -> list[bytes]:
        view, pieces = memoryview(data), []
        with self._lock:
            for start in range(0, len(data), READ_LARGE):
                self._tls.write(view[start:start + READ_LARGE])
                pieces.append(self._out.read())
        return pieces

    def unwrap(self, data: bytes) -> list[bytes]:
        found: list[bytes] = []
        with self._lock:
            try:
                self._in.write(data)
                if not self.ready:
                    self._tls.do_handshake()
                    self.ready = self.answer = True
                while piece := self._tls.read(READ_SIZE):
                    found.append(piece)
            except self._ssl.SSLWantReadError:
                self.answer = not self.ready or self.answer
            except self._ssl.SSLError as error:
                raise ProtocolError(self._why(error)) from None
        return found

    def _why(self, error: Any) -> str:
        if getattr(error, "verify_message", ""):
            return f"TLS: the listener's certificate is not accepted: {error.verify_message}"
        words = (error.reason or str(error)).lower().replace("_", " ")
        if words in ("wrong version number", "http request", "unknown protocol", "record layer failure"):
            return "TLS: the other side does not speak it here (tls+tcp:// has to be on both sides)"
        return f"TLS: {words}"


def listener_context(cert: str, key: str, password: str | None) -> Any:
    """For PEM texts; ValueError says what is wrong with them."""
    ssl = _import_ssl()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.num_tickets = 0
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:       # 0600; OpenSSL reads files alone
        file.write(f"{cert.rstrip()}\n{key.rstrip()}\n")
        file.flush()
        try:
            context.load_cert_chain(file.name, password=(lambda: password or ""))
        except ssl.SSLError as error:
            raise ValueError(f"tls: certificate and key don't load ({error.reason or error}); is the key encrypted, "
                             "with another pass_?") from None
    return context


def dialer_context(cert: str | None) -> Any:
    """`cert`: PEM text of whom to trust; None: any certificate, which the handshake's proof then says to be the right
    one."""
    ssl = _import_ssl()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context
    context.verify_flags |= 0x80000     # X509_V_FLAG_PARTIAL_CHAIN: the listener's own will do, whoever signed it
    try:
        context.load_verify_locations(cadata=cert)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"tlscert holds no certificate in PEM: {getattr(error, 'reason', '') or error}") from None
    return context


def _import_ssl() -> Any:
    try:
        import ssl
    except ImportError:
        raise ValueError("this Python has no ssl module, without which there is no tls+tcp://; ssh_config(tunnel=True) "
                         "needs none") from None
    return ssl


def read_pem(value: Any, what: str) -> str:
    """Of a path, or the text itself."""
    if not isinstance(value, str):
        raise TypeError(f"{what}={value!r}: expected a path, or PEM text")
    if "-----BEGIN" in value:
        return value
    with open(value) as file:
        return file.read()


def split_pem(text: str) -> tuple[str, str]:
    """The certificates in it, and the private key; ValueError where one of them is missing."""
    import re
    found = [re.findall(f"-----BEGIN {what}-----.*?-----END {what}-----", text, re.DOTALL)
             for what in ("CERTIFICATE", "[A-Z ]*PRIVATE KEY")]
    if not all(found):
        raise ValueError("tls: expected a certificate and its private key, in PEM")
    return "\n".join(found[0]) + "\n", found[1][0] + "\n"


def certificate_hash(cert: str) -> bytes:
    """Of the first certificate in PEM text."""
    begin, end = cert.index("-----BEGIN CERTIFICATE-----"), cert.index("-----END CERTIFICATE-----")
    return hashlib.sha256(binascii.a2b_base64(cert[begin + 27:end])).digest()


def make_certificate(hosts: Sequence[str]) -> tuple[str, str]:
    """A new self-signed certificate for these names and addresses, and its key, as PEM texts: by the `openssl` command,
    1.1.1, 3, or LibreSSL's. OSError says what is wrong with that."""
    import subprocess
    names = [f"{'IP' if ':' in host or host.replace('.', '').isdigit() else 'DNS'}:{host.partition('%')[0]}"
             for host in hosts]
    with tempfile.TemporaryDirectory() as directory:        # 0700
        config, key, cert = [os.path.join(directory, name) for name in ("config", "key", "cert")]
        with open(config, "w") as file:
            file.write("\n".join((
                "[req]", "prompt = no", "distinguished_name = name", "x509_extensions = more", "[name]", "CN = mirai",
                "[more]", f"subjectAltName = {','.join(names)}", "subjectKeyIdentifier = hash",
                "authorityKeyIdentifier = keyid:always", "basicConstraints = critical,CA:TRUE",
                "keyUsage = critical,digitalSignature,keyCertSign", "extendedKeyUsage = serverAuth", "")))
        for command in (["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key],
                        ["req", "-new", "-x509", "-sha256", "-days", "3650", "-config", config, "-key", key,
                         "-out", cert]):
            try:
                subprocess.run(["openssl", *command], check=True, timeout=CLOSE_TIME, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            except FileNotFoundError:
                raise OSError(errno.ENOENT, "no openssl command, which makes certificates for tls+tcp://; give tls=, "
                              "or use ssh_config(tunnel=True), which needs none") from None
            except subprocess.SubprocessError as error:
                words = getattr(error, "stderr", None) or error
                raise OSError(errno.EIO, f"openssl {command[0]} failed: {str(words).strip()}") from None
        with open(cert) as certificate, open(key) as private:
            return certificate.read(), private.read()


# -- the handshake

class _Transcript:
    """What two sides have said of themselves, by which either proves that it holds the key. `certificate`: the hash of
    the listener's, in TLS: whoever sits between has another one."""

    def __init__(self, key: bytes) -> None:
        self.key, self.done = key, False
        self._hello = self.challenge = self.certificate = b""

    def proof(self, side: str) -> bytes:
        """The sides differ, so that none can be reflected."""
        return self._digest(f"proof {side}")

    def seal(self, side: str) -> SealedChannel:
        keys = {name: self._digest(f"seal {name}") for name in ("listener", "dialer")}
        mine = keys.pop(side)
        return SealedChannel(mine, *keys.values())

    def _digest(self, what: str) -> bytes:
        label = f"mirai {WIRE_VERSION} {what}\0{len(self._hello)} {len(self.certificate)}\0".encode()
        return hmac.digest(self.key, b"".join([label, self._hello, self.certificate, self.challenge]), "sha256")


class DialerHandshake(_Transcript):
    """The dialing side. `hello()` opens; `receive()` takes each message and gives the frames to answer with.

    `done` once the listener has proven itself and has let us in. Refused where either fails. `terms`: what the listener
    has said of the connection.
    """

    def __init__(self, key: bytes, role: str, about: Mapping[str, Any], certificate: bytes = b"") -> None:
        super().__init__(key)
        self.certificate = certificate
        self.terms: dict[str, Any] = {}
        self._proven = False        # the listener
        self._hello = json.dumps({"role": role, "nonce": os.urandom(32).hex(), "python": sys.version.split()[0],
                                 "pid": os.getpid(), "host": socket.gethostname(), **about}).encode()

    def hello(self) -> bytes:
        return encode(Kind.HELLO, payload=self._hello)

    def receive(self, message: Message) -> bytes:
        if message.kind == Kind.REFUSED:
            said = decode_json(message)
            why = "".join(c if c.isprintable() else "?" for c in str(said.get("why"))[:300])    # a stranger's words
            raise (Crowded if said.get("again") else Refused)(f"refused by the listener: {why}")
        if message.kind == Kind.CHALLENGE and not self._proven:
            proof, self.challenge = message.payload[:32], message.payload[32:]
            if not hmac.compare_digest(proof, self.proof("listener")):
                raise Refused("the listener does not hold the key that this side holds" + (
                    ", or somebody with another certificate is in between" if self.certificate else ""))
            self._proven = True
            self.terms = decode_json(message._replace(payload=self.challenge))
            return encode(Kind.PROOF, payload=self.proof("dialer"))
        if message.kind != Kind.WELCOME or not self._proven:
            raise ProtocolError(f"{message!r} in a handshake")
        self.done = True
        return b""


class ListenerHandshake(_Transcript):
    """The listening side, fed a stranger's messages. `peer` is what its hello said, to be believed once `done`.
    `terms`: what is said to it, `seal` among it."""

    def __init__(self, key: bytes, terms: Mapping[str, Any] | None = None, certificate: bytes = b"") -> None:
        super().__init__(key)
        self.terms, self.certificate = dict(terms or {}), certificate
        self.peer: dict[str, Any] = {}

    def receive(self, message: Message) -> bytes:
        if message.kind == Kind.HELLO and not self._hello:
            self.peer = decode_json(message)
            if self.peer.get("role") not in ("host", "daemon"):
                raise Refused(f"the role {str(self.peer.get('role'))[:40]!r} is unknown here")
            kinds = {"pid": int, "host": str, "slot": (int, type(None)), "serial": (int, type(None)),
                     "launch": (int, type(None))}
            if not all(isinstance(self.peer.get(name), kind) for name, kind in kinds.items()):  # type: ignore[arg-type]
                raise ProtocolError("a hello that makes no sense")
            self._hello = message.payload
            self.challenge = json.dumps({**self.terms, "nonce": os.urandom(32).hex(),
                                         "python": sys.version.split()[0]}).encode()
            return encode(Kind.CHALLENGE, payload=self.proof("listener") + self.challenge)
        if message.kind != Kind.PROOF or not self._hello:
            raise ProtocolError(f"{message!r} in a handshake")
        if not hmac.compare_digest(message.payload, self.proof("dialer")):
            raise Refused("wrong key")
        self.done = True
        return encode(Kind.WELCOME)


# -- dialing

def dial(urls: str | Sequence[str], key: bytes, role: str, about: Mapping[str, Any], timeout: float = DIAL_TIME,
         tlscert: str | None = None) -> Connection:
    """An authenticated connection, its socket blocking. Of several addresses, which all lead to one listener, to the
    first at which it proves itself; the others are tried meanwhile.

    OSError: not reachable; Refused: one side refused. Of several the text has every address with its reason. A crowded
    listener is asked again, three times as long.
    """
    addresses = [parse_url(urls)] if isinstance(urls, str) else [parse_url(url) for url in urls]
    last, left = time.monotonic() + 3 * timeout, CUT_SHORT
    while True:
        try:
            return _dial_once(addresses, key, role, about, timeout, tlscert)
        except (Crowded, ConnectionResetError, BrokenPipeError) as error:
            left -= not isinstance(error, Crowded)      # it may be crowded, but could not say so
            pause = 0.1 + int.from_bytes(os.urandom(1), "big") / 256        # not all at once
            if not left or time.monotonic() + pause > last:
                raise
            time.sleep(pause)


def _dial_once(addresses: Sequence[Address], key: bytes, role: str, about: Mapping[str, Any], timeout: float,
               tlscert: str | None) -> Connection:
    errors: list[tuple[Address, Exception]] = []
    for address, sock in _connected(addresses, time.monotonic() + timeout, errors):
        patience = timeout if len(addresses) == 1 else timeout / (1 + len(addresses))
        try:
            return _shake_hands(address, sock, key, role, about, patience, tlscert)
        except (OSError, Refused) as error:
            sock.close()
            errors.append((address, error))
        except ProtocolError as error:
            sock.close()
            errors.append((address, Refused(f"who listens there is not mirai, or another version: {error}")))
        except BaseException:
            sock.close()
            raise
    if len(errors) == 1:
        url, only = format_url(errors[0][0]), errors[0][1]
        if isinstance(only, OSError) and only.errno and only.filename is None and url not in str(only):
            only.filename = url
        raise only
    text = "; ".join(f"{format_url(address)}: {error}" for address, error in errors)
    for kind in (Crowded, Refused):
        if any(isinstance(error, kind) for _, error in errors):
            raise kind(text)
    cut = any(isinstance(error, (ConnectionResetError, BrokenPipeError)) for _, error in errors)
    raise ConnectionResetError(errno.ECONNRESET, text) if cut else OSError(errno.EHOSTUNREACH, text)


def _connected(addresses: Sequence[Address], deadline: float, errors: list[tuple[Address, Exception]]) -> Iterator[
        tuple[Address, socket.socket]]:
    """Sockets as they get connected: all are tried at once."""
    with selectors.DefaultSelector() as selector:
        try:
            for address in addresses:
                try:
                    if address.scheme == "ipc":
                        yield address, _connect_unix(address, deadline)
                    for family, where in _resolve(address) if address.scheme != "ipc" else ():
                        _begin_connect(selector, address, family, where)
                except OSError as error:
                    errors.append((address, error))
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    errors += [(each.data, TimeoutError(errno.ETIMEDOUT, "no answer in time"))
                               for each in selector.get_map().values()]
                    return
                for each, _ in ready:
                    sock: Any = each.fileobj
                    selector.unregister(sock)
                    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if code:
                        sock.close()
                        errors.append((each.data, OSError(code, os.strerror(code))))
                    else:
                        yield each.data, sock
        finally:
            for each in list(selector.get_map().values()):
                each.fileobj.close()        # type: ignore[union-attr]


def _begin_connect(selector: selectors.BaseSelector, address: Address, family: int, where: Any) -> None:
    sock = socket.socket(family)
    sock.setblocking(False)
    code = sock.connect_ex(where)
    if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
        sock.close()
        raise OSError(code, os.strerror(code))
    selector.register(sock, selectors.EVENT_WRITE, address)


def _connect_unix(address: Address, deadline: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        sock.connect(address.host)
    except BaseException:
        sock.close()
        raise
    return sock


def _shake_hands(address: Address, sock: socket.socket, key: bytes, role: str, about: Mapping[str, Any],
                 patience: float, tlscert: str | None) -> Connection:
    """`patience`: seconds for each step."""
    sock.settimeout(patience)
    deadline = time.monotonic() + patience
    connection = Connection(sock, Decoder(STRANGER_LIMIT))
    certificate = b""
    if address.scheme == "tls+tcp":
        channel = connection.channel = TLSChannel(dialer_context(tlscert), address.host)
        sock.sendall(channel.take_answer())
        while not channel.ready:
            _receive_some(connection, address, deadline)
        certificate = hashlib.sha256(channel.certificate()).digest()
    shake = DialerHandshake(key, role, about, certificate)
    connection.send(shake.hello())
    while not shake.done:
        message = connection.decoder.pop()
        if message is None:
            _receive_some(connection, address, deadline)
            continue
        answer = shake.receive(message)
        if answer:
            connection.send(answer)
        deadline = time.monotonic() + patience
    remote = sock.family != getattr(socket, "AF_UNIX", None) and not _is_loopback(sock.getpeername()[0])
    if shake.terms.get("seal"):
        connection.seal(shake.seal("dialer"))
    elif address.scheme == "tcp":
        raise Refused("the listener offers no sealed frames, without which what comes by TCP may be another's")
    if remote:
        keep_alive(sock)
    sock.settimeout(None)
    connection.decoder.limit = None         # frames of the trusted may follow in the same bytes
    connection.terms = shake.terms
    return connection


def _receive_some(connection: Connection, address: Address, deadline: float) -> None:
    if not wait_ready(connection.fileno(), deadline - time.monotonic()):
        raise TimeoutError(errno.ETIMEDOUT, f"{format_url(address)} did not answer in time")
    if not connection.receive() and connection.ended:
        if connection.fault:
            raise Refused(connection.fault)
        hint = "; does it want tls+tcp://?" if address.scheme == "tcp" else ""
        raise ConnectionResetError(errno.ECONNRESET,
                                   f"{format_url(address)} closed the connection in the handshake{hint}")


# ======================================================================
# 9. Shared page: what a dispatcher and its local daemons see of each other
# ======================================================================
# Knows:  memory that both have mapped; of the pipes that a daemon writes to, whether they are empty.
# Never:  who reads or writes when; each word has one writer.
# Rule:   a word of eight bytes is written in one store. Of two that are written, one by each side, which then looks at
#         the other's, at least one side sees what the other wrote, once a moment has passed (REVOKE_TIME): no processor
#         holds a store back for longer than its buffer of some tens needs to drain.

NO_LIMIT = (1 << 64) - 1
LENGTH = struct.Struct("<I")


class Slot:
    """One local daemon's part of the page: what it is at, how far it may go, and the outcomes of a map's items until
    they are sent, so that a kill loses none."""

    __slots__ = ("words", "area", "used")

    _INTERRUPT, _BEGUN, _LIMIT, _FIRST, _USED, _OUTPUT = range(6)

    def __init__(self, page: memoryview, slot: int) -> None:
        start = slot * SLOT_SIZE
        with page[start:start + SLOT_HEAD] as head:
            self.words = head.cast("Q")
        self.area = page[start + SLOT_HEAD:start + SLOT_SIZE]
        self.used = 0

    def clear(self) -> None:
        """For the next daemon: what the last one had begun is not its own."""
        self.words[:] = memoryview(bytes(SLOT_HEAD)).cast("Q")
        self.words[self._LIMIT] = NO_LIMIT

    def release(self) -> None:
        """Lets go of the page."""
        self.words.release()
        self.area.release()

    # -- the dispatcher writes

    def interrupt(self, task: int) -> None:
        """The task that is to be interrupted, by its id."""
        self.words[0] = task

    def limit(self, position: int) -> None:
        """From here on nothing is to be begun."""
        self.words[2] = position

    def outcomes(self, position: int) -> list[bytes]:
        """Those from this position on that were not sent."""
        first, used = self.words[self._FIRST], self.words[self._USED]
        found, at = [], 0
        while at < used:
            end = at + LENGTH.size + LENGTH.unpack_from(self.area, at)[0]
            found.append(bytes(self.area[at + LENGTH.size:end]))
            at = end
        return found[max(0, position - first):]

    # -- the nursery writes

    def passing_output(self, busy: bool) -> None:
        """Set while it passes on what it has read of the daemon's output."""
        self.words[self._OUTPUT] = busy

    # -- the daemon writes

    def begin(self, position: int) -> bool:
        """Says what is begun, and then looks whether that is allowed."""
        self.words[1] = position
        return position < self.words[2]

    def keep(self, position: int, outcome: bytes) -> bool:
        """False where there is no room for it."""
        at, end = self.used, self.used + LENGTH.size + len(outcome)
        if end > len(self.area):
            return False
        if not at:
            self.words[self._FIRST] = position
        self.area[at:end] = LENGTH.pack(len(outcome)) + outcome
        self.used = self.words[self._USED] = end
        return True

    def sent(self) -> None:
        """They have gone another way."""
        self.used = self.words[self._USED] = 0

    def wait_output(self, fds: Iterable[int], timeout: float) -> None:
        """Until the nursery has taken what was written to these pipes, and has passed it on: it says so when it has."""
        import fcntl
        import termios
        deadline, pause = time.monotonic() + timeout, 0.0
        for fd in fds:
            size = bytearray(4)
            with contextlib.suppress(OSError):
                while time.monotonic() < deadline:
                    fcntl.ioctl(fd, termios.FIONREAD, size)
                    if not int.from_bytes(size, sys.byteorder) and not self.words[self._OUTPUT]:
                        break
                    time.sleep(pause)
                    pause = min(pause + 0.0001, 0.002)

    # -- looking

    @property
    def begun(self) -> int:
        """The last position that was begun; 0: none."""
        return self.words[1]

    @property
    def interrupted(self) -> int:
        return self.words[0]


def new_page(file: int = -1) -> memoryview:
    """Memory for SLOTS local daemons, shared with whoever is forked from here or maps the same file; pages that nobody
    touches cost nothing."""
    return memoryview(mmap.mmap(file, SLOTS * SLOT_SIZE))


def free_page(page: memoryview) -> None:
    """Unmaps it, at once where nobody looks at a part of it any more, else with the last who does."""
    memory = page.obj
    if isinstance(memory, mmap.mmap):
        page.release()
        with contextlib.suppress(BufferError):
            memory.close()


# ======================================================================
# 10. Dispatcher shell: sockets around the core
# ======================================================================
# Knows:  connections, the nursery's reports, the clock.
# Never:  pickle, user code, scheduling rules.        Thread: one, of a process of its own.
# Rule:   one `selectors` loop that waits for nobody; what the core says is done, by one method an effect.
#         In direct mode it runs in a thread of the host.


class _Peer:
    """Somebody connected: a stranger until its handshake is done, then the host or a daemon."""

    def __init__(self, number: int, connection: Connection, shake: ListenerHandshake) -> None:
        self.number = number
        self.connection = connection
        self.shake: ListenerHandshake | None = shake
        self.role = "stranger"
        self.launch: tuple[int, int] | None = None      # slot, serial of a local daemon
        self.launcher: int | None = None                # that started it elsewhere
        self.where = ""                                 # its address, where it comes by TCP
        self.remote = False                             # from another machine
        self.since = time.monotonic()                   # it came, or said the last thing
        self.spoke = self.greeted = False               # whether bytes came of it, and a message
        self.slot: Slot | None = None                   # its part of the page, where it uses that
        self.output = False                             # what its tasks write comes by the nursery
        self.name = ""
        self.pid = 0
        self.known: set[bytes] = set()                  # definitions that were sent to it: hashes, and rows of them
        self.units: deque[int] = deque(maxlen=KEPT_UNITS)   # that it keeps
        self.claimed = 0                                # the last position that it may have begun, without a page
        self.limit = 0                                  # the position of a take-back that is under way
        self.seen = 0                                   # what it had begun when that was last looked at
        self.given = 0.0                                # when it was given the single task that it is at
        self.doomed: tuple[int, int] | None = None      # the task with which it is killed, should that go on for long
        self.events = selectors.EVENT_READ
        self.handle: Callable[[_Peer, Message], None] | None = None


class _Launcher:
    """A command that launches daemons elsewhere."""

    def __init__(self, wish: Mapping[str, Any]) -> None:
        self.n, self.stays = wish["n"], wish["stays"]       # stays: as long as its daemons, so that its end is theirs
        self.joined = 0


class Dispatcher:
    """Between host and daemons: a process, or (direct) a thread of the host. `spec`: url, key (hex), how the core is to
    schedule, what dialers are told, PEM texts for TLS. `page`: shared with local daemons."""

    def __init__(self, spec: Mapping[str, Any], nursery: Connection, page: memoryview) -> None:
        self.core = DispatcherCore(spec["elastic"], spec["direct"], spec["fixed"])
        self.key = bytes.fromhex(spec["key"])
        self.terms = {"module": spec.get("module", __name__)}
        self.tls, self.certificate = None, b""
        if spec.get("tls"):
            self.tls, self.certificate = listener_context(*spec["tls"]), certificate_hash(spec["tls"][0])
        self.nursery, self.page = nursery, page
        self.selector = selectors.DefaultSelector()
        self.listener, self.address = listen(parse_url(spec["url"]))
        self.listener.setblocking(False)
        self.peers: dict[int, _Peer] = {}           # every connection, by number
        self.strangers: dict[int, None] = {}        # the oldest first
        self.numbers = itertools.count(1)
        self.host: _Peer | None = None
        self.frames: dict[int, bytes] = {}          # task -> its frame, until it is resolved
        self.definitions: dict[bytes, bytes] = {}   # hash -> its frame, until the host drops it
        self.specs: dict[int, Any] = {}             # slot -> what its daemons are started with
        self.serials: dict[int, int] = {}           # slot -> which of its launches counts
        self.joined: dict[int, _Peer] = {}          # slot -> its daemon, until the nursery tells of its end
        self.to_fork: list[tuple[int, int]] = []
        self.brief: dict[int, int] = {}             # slot -> how many of its daemons in a row died young, doing nothing
        self.launchers: dict[int, _Launcher] = {}
        self.wants: dict[int, tuple[int, int]] = {}     # requests to the host -> the daemon's number, its own number
        self.notices, self.untold = 0, 0            # said in this second, and not said
        self.alone = False                          # tasks wait and nobody is there: a timer will say so
        self.dirty: set[_Peer] = set()
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.reports: deque[Message] = deque()      # of the nursery, read but not yet handled
        self.outcome: Message | None = None         # the result that is being handed to the core
        self.why = ""                               # how the daemon that is being given up ended
        self.last_words = ""                        # of the last launch that failed
        self.sent_counts: tuple[int, ...] = (0, 0, 0, 0, 0)
        self.counts_due = 0.0
        self.counts_wait = False                    # a timer will have them sent
        self.strangers_watched = False              # so for a look at those who have not proven themselves
        self.watched: set[int] = set()              # daemons that have items of maps: a timer looks at them
        self.running = True
        self.effects: dict[type, Callable[[Any], None]] = {
            Assign: self._assign, Replay: self._replay, Interrupt: self._interrupt, Revoke: self._revoke,
            Look: self._look, Resolve: self._resolve, Sized: self._sized, Launch: self._launch,
            StopLaunching: self._stop_launching, Drop: self._drop}

    # -- the loop

    def run(self) -> int:
        """Serves until the host, or the nursery, is gone."""
        files = [self.address.host] if self.address.scheme == "ipc" else []
        try:
            url = format_url(self.address)
            with contextlib.suppress(OSError):      # no directory for it: daemons started by hand need the key given
                if is_local(self.address):
                    files.append(write_key_file(url, self.key))
            self.nursery.send(encode_json(Kind.LISTENING, {"url": url, "files": files}))
            self.nursery.sock.setblocking(False)
            self._listen()
            self._hear_nursery()
            if not is_local(self.address):
                self._at(LINK_TIME / 6, self._check_links)
            while self.running:
                for key, _ in self.selector.select(self._timeout() if self.timers else None):
                    key.data()
                if self.timers:
                    self._run_timers()
                self._after_events()
        finally:
            for path in files:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            self.close()
        return 0

    def close(self) -> None:
        """Ends all connections; in a forked child, leaves them to the parent."""
        self.selector.close()
        for peer in self.peers.values():
            peer.connection.close()
        self.listener.close()
        self.nursery.close()
        self.timers.clear()
        if self.core.direct:        # else it goes with the process
            for peer in {*self.peers.values(), *self.joined.values()}:
                if peer.slot is not None:
                    peer.slot.release()
                    peer.slot = None
            free_page(self.page)

    def _timeout(self) -> float:
        return max(0.0, self.timers[0][0] - time.monotonic())

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.timers, (time.monotonic() + delay, next(self.numbers), action))

    def _run_timers(self) -> None:
        while self.timers and self.timers[0][0] <= time.monotonic():
            heapq.heappop(self.timers)[2]()

    def _after_events(self) -> None:
        self._take_reports()
        while self.dirty:
            self._flush(self.dirty.pop())
        if self.to_fork:
            self._fork()
        try:
            if self.nursery.pending and not self.nursery.flush():
                self._at(0.01, lambda: None)        # it is busy forking: come round again
        except OSError:
            self._nursery_ended()
        core, sent = self.core, self.sent_counts
        if not self.counts_wait or len(core.daemons) != sent[0] or core.cumulative != sent[1]:
            self._report_counts()

    def _report_counts(self) -> None:
        """The host's `status()` asks nobody: it is told, at most so often, but at once when daemons come or go."""
        counts, now = self.core.counts(), time.monotonic()
        if self.host is None or counts == self.sent_counts:
            return
        if now >= self.counts_due or counts[:2] != self.sent_counts[:2]:
            self._post(self.host, encode(Kind.COUNTS, payload=COUNTS.pack(*counts)))
            self._flush(self.host)
            self.sent_counts = counts
            self.counts_due = now + COUNTS_EVERY
        elif not self.counts_wait:
            self.counts_wait = True
            self._at(self.counts_due - now, self._counts_are_due)

    def _counts_are_due(self) -> None:
        self.counts_wait = False

    # -- connections

    def _listen(self) -> None:
        self.selector.register(self.listener, selectors.EVENT_READ, self._accept)

    def _listen_later(self) -> None:
        """To look again then, and not to spin."""
        self.selector.unregister(self.listener)
        self._at(0.1, self._listen)

    def _accept(self) -> None:
        if not self._has_room():
            self._listen_later()
            return
        try:
            sock, _ = self.listener.accept()
        except BlockingIOError:
            return
        except OSError:                             # no descriptors left
            self._listen_later()
            return
        sock.setblocking(False)
        peer = _Peer(next(self.numbers), Connection(sock, Decoder(STRANGER_LIMIT)), ListenerHandshake(self.key))
        if self.address.scheme != "ipc":
            self._meet(peer, sock)
        self.peers[peer.number] = peer
        self.strangers[peer.number] = None
        self.selector.register(sock, selectors.EVENT_READ, functools.partial(self._serve, peer))
        if not self.strangers_watched:
            self.strangers_watched = True
            self._at(HANDSHAKE_TIME / 10, self._look_at_strangers)

    def _look_at_strangers(self) -> None:
        """One timer for all: many may come in a second."""
        now = time.monotonic()
        for peer in [self.peers[number] for number in self.strangers]:
            if now - peer.since > HANDSHAKE_TIME:
                self._refuse(peer, "no handshake in time", again=True)
        self.strangers_watched = bool(self.strangers)
        if self.strangers:
            self._at(HANDSHAKE_TIME / 10, self._look_at_strangers)

    def _has_room(self) -> bool:
        """For one more stranger: the oldest goes, unless it has only just come; then new ones wait in the kernel."""
        if len(self.strangers) < STRANGERS:
            return True
        oldest = min((self.peers[number] for number in self.strangers), key=lambda peer: (peer.greeted, peer.since))
        if time.monotonic() - oldest.since < STRANGER_TIME:
            return False
        self._refuse(oldest, "too many connections that have not said who they are", again=True)
        return True

    def _meet(self, peer: _Peer, sock: socket.socket) -> None:
        """What is between us is a network, or may be."""
        with contextlib.suppress(OSError):
            host, port = sock.getpeername()[:2]
            peer.remote = not _is_loopback(host)
            host = host[7:] if host.startswith("::ffff:") else host
            peer.where = format_url(Address("tcp", host, port))
        terms = {**self.terms, "seal": self.tls is None}
        peer.shake = ListenerHandshake(self.key, terms, self.certificate)
        if self.tls is not None:
            peer.connection.channel = TLSChannel(self.tls)
        if peer.remote:
            keep_alive(sock)

    def _check_links(self) -> None:
        """Those that the kernel would go on trying to reach."""
        for peer in list(self.peers.values()):
            if peer.remote and is_cut(peer.connection.sock):
                self._notice(f"{peer.name or peer.where} {SILENT}")
                self._at_end(peer, SILENT)
        self._at(LINK_TIME / 6, self._check_links)

    def _serve(self, peer: _Peer) -> None:
        """Something happened on a connection."""
        if peer.number not in self.peers:
            return
        if peer.events & selectors.EVENT_WRITE:
            self._flush(peer)
        if peer.connection.receive():
            peer.spoke = True
        self._take(peer)
        if peer.connection.pending and peer.number in self.peers:
            self._flush(peer)                       # TLS has something to say
        if peer.connection.ended and peer.number in self.peers:
            self._connection_ended(peer, peer.connection.fault)

    def _connection_ended(self, peer: _Peer, fault: str) -> None:
        if peer.shake is not None and peer.spoke:
            self._refuse(peer, fault or ("left in the handshake, as one does that holds another key" if peer.greeted
                                         else "left in the handshake"))
            return
        if fault:
            self._notice(f"{peer.name or peer.where or 'somebody on this machine'}: {fault}")
        self._at_end(peer, fault or "closed its connection")

    def _take(self, peer: _Peer) -> None:
        number, peers = peer.number, self.peers
        try:
            while peer.shake is not None:       # one by one: what follows the last may be sealed
                message = peer.connection.decoder.pop()
                if message is None:
                    return
                self._greet(peer, message)
                if number not in peers:
                    return
            for message in peer.connection.decoder:
                peer.handle(peer, message)          # type: ignore[misc]
                if number not in peers:
                    return
        except ProtocolError as error:
            self._refuse(peer, str(error)) if peer.shake else self._fault(peer, str(error))

    def _greet(self, peer: _Peer, message: Message) -> None:
        assert peer.shake is not None
        peer.since, peer.greeted = time.monotonic(), True
        answer, about = peer.shake.receive(message), peer.shake.peer
        if peer.shake.done:
            role, slot, serial = about["role"], about.get("slot"), about.get("serial") or -1
            if role == "host" and self.host is not None:
                raise Refused("this dispatcher has a host")
            if slot is not None and (self.serials.get(slot) != serial or slot in self.joined):
                raise Refused("this launch was given up")
            peer.launch = None if slot is None else (slot, serial)
        self._post(peer, answer)
        if peer.shake.done:
            if peer.shake.terms.get("seal"):
                self._flush(peer)
                peer.connection.seal(peer.shake.seal("listener"))
            self._admit(peer, about)

    def _admit(self, peer: _Peer, about: Mapping[str, Any]) -> None:
        peer.role, peer.shake, peer.connection.decoder.limit = about["role"], None, None
        peer.pid, peer.name = about["pid"], f"daemon {about['pid']} on {about['host']}"
        del self.strangers[peer.number]
        peer.handle = self._from_host if peer.role == "host" else self._from_daemon
        if peer.role == "host":
            self.host = peer
            return
        if peer.launch:
            self.joined[peer.launch[0]] = peer
            peer.slot = Slot(self.page, peer.launch[0]) if about.get("page") else None
            peer.output = self.specs[peer.launch[0]]["options"].get("output", False)
        launcher = self.launchers.get(about.get("launch") or 0)
        expected = launcher is not None and launcher.joined < launcher.n
        self._do(self.core.joined(peer.number, peer.launch and peer.launch[0], expected, peer.slot is not None))
        if launcher is not None and expected:
            launcher.joined += 1
            self._report_counts()       # the host is to know of it before it is told that this is all
            if launcher.joined == launcher.n:
                self._launched(about["launch"], 0, "")

    def adopt_host(self, connection: Connection) -> None:
        """In direct mode, whose host needs not prove anything."""
        peer = self.host = _Peer(next(self.numbers), connection, ListenerHandshake(self.key))
        connection.sock.setblocking(False)
        peer.role, peer.shake, peer.handle = "host", None, self._from_host
        self.peers[peer.number] = peer
        self.selector.register(connection.sock, selectors.EVENT_READ, functools.partial(self._serve, peer))

    def _post(self, peer: _Peer, frame: bytes) -> None:
        peer.connection.post(frame)
        self.dirty.add(peer)

    def _flush(self, peer: _Peer) -> None:
        if peer.number not in self.peers:
            return
        try:
            wanted = selectors.EVENT_READ | (0 if peer.connection.flush() else selectors.EVENT_WRITE)
        except OSError:
            wanted = selectors.EVENT_READ           # its end is read next, after what it said before
        if wanted != peer.events:
            peer.events = wanted
            self.selector.modify(peer.connection.sock, wanted, self.selector.get_key(peer.connection.sock).data)

    def _close(self, peer: _Peer) -> None:
        self.selector.unregister(peer.connection.sock)
        del self.peers[peer.number]
        self.strangers.pop(peer.number, None)
        peer.connection.close()

    def _refuse(self, peer: _Peer, why: str, again: bool = False) -> None:
        """`again`: it may come again, as it is not known to be at fault."""
        if peer.number in self.peers:
            self._notice(f"refused {peer.where or 'somebody on this machine'}: {why}")
            with contextlib.suppress(OSError):
                peer.connection.send(encode_json(Kind.REFUSED, {"why": why, "again": again}))
            self._close(peer)

    def _fault(self, peer: _Peer, why: str) -> None:
        self._notice(f"{peer.name or peer.role} is dropped: {why}")
        self._at_end(peer, f"is dropped: {why}")

    def _notice(self, text: str) -> None:
        """For the host's log: a few in a second, as strangers may give cause for many."""
        if not self.notices:
            self._at(1.0, self._end_notices)
        self.notices += 1
        if self.notices > NOTICES:
            self.untold += 1
        elif self.host is not None:
            self._post(self.host, encode_json(Kind.NOTICE, {"text": text}))

    def _end_notices(self) -> None:
        self.notices, untold, self.untold = 0, self.untold, 0
        if untold:
            self._notice(f"and {untold} more in that second")

    def _at_end(self, peer: _Peer, how: str = "closed its connection") -> None:
        """A connection has ended. Of a local daemon the nursery will say how; one that stays is killed first."""
        self._close(peer)
        if peer.role == "host":
            self.running = False
        elif peer.role == "daemon" and peer.launch is None:
            self._lose(peer, how)
        elif peer.role == "daemon":
            self._do(self.core.leaving(peer.number, DIED))
            self._at(GRACE, lambda: self._signal(peer, signal.SIGKILL) if peer in self.joined.values() else None)

    def _lose(self, peer: _Peer, how: str, words: str = "") -> None:
        if peer.launch:
            del self.joined[peer.launch[0]]
            record = self.core.daemons[peer.number]
            young = record.why is DIED and not record.pieces and time.monotonic() - peer.since < BRIEF_LIFE
            self.brief[peer.launch[0]] = self.brief.get(peer.launch[0], 0) + 1 if young else 0
        if peer.slot is not None:
            self._recover(peer, peer.slot)
        self.why = self.last_words = describe_loss(peer.name, how, words)
        self._do(self.core.lost(peer.number, peer.claimed if peer.slot is None else peer.slot.begun))

    def _recover(self, peer: _Peer, slot: Slot) -> None:
        """The outcomes that it had not yet sent."""
        self._do(self.core.leaving(peer.number, DIED))
        record = self.core.daemons[peer.number]
        if not record.pieces:
            return
        self._take_outcomes(peer, record, slot.outcomes(record.position))

    def _take_outcomes(self, peer: _Peer, record: Any, outcomes: list[bytes]) -> None:
        """As if the daemon had sent them."""
        if outcomes:
            head = RESULTS_HEAD.pack(record.position, record.pieces[0].lo, len(outcomes), 0.0)
            payload = b"".join([head, *join_apart(outcomes)])
            self._answered(peer, Message(Kind.RESULTS, record.pieces[0].unit.id, 0, payload))

    def _watch_holders(self) -> None:
        """What a daemon has done of its items is passed on, should it be at one of them for long."""
        for number in list(self.watched):
            peer, record = self.peers.get(number), self.core.daemons.get(number)
            if peer is None or peer.slot is None or record is None or not record.pieces:
                self.watched.discard(number)
                continue
            begun, seen, peer.seen = peer.slot.begun, peer.seen, peer.slot.begun
            if begun == seen and begun > record.position:
                outcomes = peer.slot.outcomes(record.position)
                if peer.slot.begun == begun:
                    self._take_outcomes(peer, record, outcomes)
        if self.watched:
            self._at(CHUNK_TIME, self._watch_holders)

    # -- what peers say

    def _from_host(self, peer: _Peer, message: Message) -> None:
        kind, id, flags, payload = message
        if not self.core.daemons:
            self._await_daemons()
        if kind == Kind.TASK:
            self.frames[id] = encode(kind, id, payload)
            self._do(self.core.submitted(id, flags))
        elif kind == Kind.UNIT:
            self.frames[id] = encode(kind, id, payload)
            self._do(self.core.submitted(id, flags, *UNIT_HEAD.unpack_from(payload)))
        elif kind == Kind.CANCEL:
            self._do(self.core.cancelled(id, *RANGE.unpack(payload)))
            self._release(id)
        elif kind == Kind.WITHDRAW:
            for (task,) in ID.iter_unpack(payload):
                self._do(self.core.withdrawn(task))
        elif kind == Kind.EVERYWHERE:
            self.frames[id] = encode(kind, id, payload)
            self._do(self.core.everywhere(id, flags))
        elif kind == Kind.DEFINE:
            self.definitions[payload[:HASH_SIZE]] = encode(kind, 0, payload)
        elif kind == Kind.DROP:
            self._drop_definitions(split_hashes(payload))
        elif kind == Kind.LAUNCH:
            wish = decode_json(message)
            first = len(self.specs)
            slots = range(first, min(first + wish["n"], SLOTS))
            again = not wish["n"]               # for those there are, of which those that idle are outdated
            self.specs.update(dict.fromkeys(self.specs if again else slots, wish["spec"]))
            for daemon in list(self.core.idle) if again else ():
                self._at_end(self.peers[daemon])
            self._do(self.core.launch(slots))
        elif kind == Kind.COMMAND:
            wish = decode_json(message)
            self.launchers[id] = _Launcher(wish)
            self._do(self.core.expect(wish["n"]))
            if wish["argv"]:
                self.nursery.post(encode(kind, id, payload))
        elif kind == Kind.GIVE:
            daemon, number = self.wants.pop(id, (0, 0))
            if daemon in self.peers:
                self._post(self.peers[daemon], encode(kind, number, payload))
        elif kind == Kind.END:
            for daemon in self.core.daemons:
                if daemon in self.peers:
                    self._post(self.peers[daemon], encode(Kind.END))
        else:
            raise ProtocolError(f"{message!r} from a host")

    def _await_daemons(self) -> None:
        """Tasks come, and nobody is there: launches may be pending, but the user should know."""
        if not self.alone:
            self.alone = True
            self._at(PENDING_TIME, self._tell_alone)

    def _tell_alone(self) -> None:
        self.alone = False
        if self.core.queued > 0 and not self.core.daemons and not self.core.launching:
            self._notice(f"tasks have waited for {PENDING_TIME:.0f} s, and no daemon is connected at "
                         f"{format_url(self.address)}; {self.core.expected or 'none'} are being launched")

    def _release(self, unit: int) -> None:
        """A frame goes once nobody wants an outcome of it; those of `everywhere` calls are there for newcomers."""
        if unit not in self.core.units and not (self._is_call(unit) and self.core.is_replayed(unit)):
            self.frames.pop(unit, None)

    def _is_call(self, unit: int) -> bool:
        """Of `everywhere`; its answers go by one id, that of the call."""
        return unit in self.frames and self.frames[unit][KIND_AT] == Kind.EVERYWHERE

    def _drop_definitions(self, hashes: list[bytes]) -> None:
        for hash in hashes:
            self.definitions.pop(hash, None)
        for daemon in self.core.daemons:
            peer = self.peers.get(daemon)
            known = [] if peer is None else [hash for hash in hashes if hash in peer.known]
            if peer is not None and known:
                peer.known = {hash for hash in peer.known if len(hash) == HASH_SIZE}.difference(known)
                self._post(peer, encode(Kind.DROP, 0, b"".join(known)))

    def _from_daemon(self, peer: _Peer, message: Message) -> None:
        kind, id = message.kind, message.id
        if kind == Kind.RESULT or kind == Kind.RESULTS:
            if peer.output:
                self._read_nursery()        # what the task wrote has come before it
            self._answered(peer, message)
        elif kind == Kind.STOPPED:
            peer.limit = 0
            if peer.slot is not None:
                peer.slot.limit(NO_LIMIT)
            self._do(self.core.has_stopped(peer.number, id))
        elif kind == Kind.CUT:
            if 0 < peer.limit <= id:        # else it has stopped since
                self._do(self.core.returned(peer.number, id))
        elif kind == Kind.CLAIM:
            peer.claimed = id
        elif kind == Kind.WANT and self.host is not None:
            number = next(self.numbers)
            self.wants[number] = peer.number, id
            self._post(self.host, encode(kind, number, message.payload))
        elif kind == Kind.LEAVE:
            peer.claimed = id
            self._do(self.core.leaving(peer.number, message.flags))
        else:
            raise ProtocolError(f"{message!r} from a daemon")

    def _answered(self, peer: _Peer, message: Message) -> None:
        record, frame = self.core.daemons[peer.number], self.frames.get(message.id)
        if frame is not None and (frame[KIND_AT] == Kind.UNIT) is not (message.kind == Kind.RESULTS):
            raise ProtocolError(f"{message!r} is no answer to what was asked")
        lo, n, seconds = record.pieces[0].lo if record.pieces else 0, 1, 0.0
        if message.kind == Kind.RESULTS:
            position, lo, n, seconds = check_results(message)
            known = record.position - position
            if known >= n:                  # it was read where the daemon kept it
                return
            if known > 0:
                outcomes = split_apart(message.payload, n, RESULTS_HEAD.size)[known:]
                lo, n = lo + known, n - known
                head = RESULTS_HEAD.pack(record.position, lo, n, seconds)
                message = message._replace(payload=b"".join([head, *join_apart(outcomes)]))
        else:
            now = time.monotonic()
            seconds, peer.given = now - peer.given, now
        self.outcome = message
        self._do(self.core.reported(peer.number, message.id, lo, n, seconds, message.flags == FAILED))

    def _host_is_full(self) -> bool:
        return self.host is not None and self.host.connection.unsent > OUTPUT_MOST

    def _hear_nursery(self) -> None:
        self.selector.register(self.nursery, selectors.EVENT_READ, self._from_nursery)

    def _from_nursery(self) -> None:
        if self._host_is_full():
            self.selector.unregister(self.nursery)
            self._at(0.05, self._hear_nursery)
            return
        self._read_nursery()
        self._take_reports()
        if self.nursery.ended:
            self._nursery_ended()

    def _take_reports(self) -> None:
        while self.reports:
            message = self.reports.popleft()
            if message.kind not in (Kind.ENDED, Kind.COMMAND):
                raise ProtocolError(f"{message!r} from the nursery")
            report = decode_json(message)
            self._daemon_ended(report) if message.kind == Kind.ENDED else self._launcher_ended(message.id, report)

    def _read_nursery(self) -> None:
        """What it has to say can wait; what tasks wrote is passed on at once, unless the host takes no more."""
        while not self._host_is_full() and self.nursery.receive():
            pass
        for message in self.nursery.decoder:
            if message.kind != Kind.OUTPUT:
                self.reports.append(message)
            elif self.host is not None:
                self._post(self.host, encode(Kind.OUTPUT, 0, message.payload, message.flags))

    def _nursery_ended(self) -> None:
        """Nobody is left to end the local daemons but us."""
        for slot, daemon in self.joined.items():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if self.specs[slot]["options"].get("autoexit", True) is True:
                    os.killpg(daemon.pid, signal.SIGKILL)
        self.running = False

    def _launcher_ended(self, id: int, report: Mapping[str, Any]) -> None:
        """One that stays has no daemons any more, and one that failed never had any; else they may still come."""
        launcher, status = self.launchers[id], report["status"]
        missing = launcher.n - launcher.joined
        if missing and (launcher.stays or status):
            launcher.n = launcher.joined
            self.last_words = describe_loss(report["what"], describe_exit(status), report["words"])
            self._launched(id, status, self.last_words)
            self._do(self.core.not_coming(missing))
        elif missing:
            self._launched(id, status, "")

    def _launched(self, id: int, status: int, text: str) -> None:
        if self.host is not None:
            content = {"joined": self.launchers[id].joined, "status": status, "text": text}
            self._post(self.host, encode_json(Kind.LAUNCHED, content, id))

    def _daemon_ended(self, report: Mapping[str, Any]) -> None:
        slot, how = report["slot"], describe_exit(report["status"])
        if self.serials.get(slot) != report["serial"]:
            return
        peer = self.joined.get(slot)
        if peer is None:
            self.serials[slot] = 0                  # should it still be about to join, it is refused
            self.last_words = describe_loss(f"daemon {report['pid']}", how, report["words"])
            self._do(self.core.launch_failed(slot))
            return
        if peer.number in self.peers:               # what it said before it ended counts
            while peer.connection.receive():
                pass
            self._take(peer)
        if peer.number in self.peers:
            self._close(peer)
        self._lose(peer, how, report["words"])

    # -- effects

    def _do(self, effects: Iterable[Any]) -> None:
        for effect in effects:
            self.effects[type(effect)](effect)

    def _assign(self, effect: Any) -> None:
        peer, frame = self.peers[effect.daemon], self.frames[effect.unit]
        kind = frame[KIND_AT]
        if kind == Kind.UNIT:
            if effect.unit not in peer.units:
                peer.units.append(effect.unit)
                self._send(peer, frame)
            if not self.watched:
                self._at(CHUNK_TIME, self._watch_holders)
            self.watched.add(effect.daemon)
            payload = RANGE.pack(effect.lo, effect.hi)
            self._post(peer, encode(Kind.RUN, effect.unit, payload, FRESH if effect.fresh else 0))
        else:
            record = self.core.daemons[effect.daemon]
            peer.claimed = record.sent - 1
            if len(record.pieces) == 1:
                peer.given = time.monotonic()
            self._send(peer, frame, FRESH if effect.fresh else 0)

    def _replay(self, effect: Any) -> None:
        peer = self.peers[effect.daemon]
        peer.claimed = self.core.daemons[effect.daemon].sent - 1
        self._send(peer, self.frames[effect.unit], REPLAY | (FRESH if effect.fresh else 0))

    def _send(self, peer: _Peer, frame: bytes, flags: int = 0) -> None:
        """A task, or a unit of them, after what it needs."""
        needs = needs_of(frame)
        if needs not in peer.known:
            self._define(peer, needs)
        if flags:
            _, _, kind, _, id = HEADER.unpack_from(frame)
            frame = encode(kind, id, frame[HEADER.size:], flags)
        self._post(peer, frame)

    def _define(self, peer: _Peer, needs: bytes) -> None:
        """Sends what the next task needs and this daemon lacks."""
        for hash in split_hashes(needs):
            if hash not in peer.known and hash in self.definitions:
                peer.known.add(hash)
                self._post(peer, self.definitions[hash])
        if peer.known.issuperset(split_hashes(needs)):
            peer.known.add(needs)

    def _interrupt(self, effect: Any, delay: float = INTERRUPT_AGAIN) -> None:
        """Again and again, ever more rarely, until the daemon has given them back. What it runs is interrupted, what it
        has not begun is taken back."""
        number, unit, lo, hi = effect
        peer, core = self.peers.get(number), self.core
        if peer is None or number not in core.daemons:
            return
        held = core.held(number, unit, lo, hi)
        if held is None:
            return
        first, last = held
        self._at(delay, lambda: self._interrupt(effect, min(2 * delay, 2.0)))
        if peer.slot is None:
            self._post(peer, encode(Kind.CANCEL, unit, RANGE.pack(0, 1) if self._is_call(unit) else RANGE.pack(lo, hi)))
            self._doom(peer, core.task_at(number, first))
        elif first <= peer.slot.begun <= last:
            self._interrupt_task(peer, peer.slot)
        begun = core.daemons[number].position if peer.slot is None else peer.slot.begun
        if begun < last:
            self._limit(peer, max(first, begun + 1))

    def _interrupt_task(self, peer: _Peer, slot: Slot) -> None:
        task = self.core.task_at(peer.number, slot.begun)
        if task is None or peer.launch is None:
            return
        slot.interrupt(task[0] if self._is_call(task[0]) else sum(task))
        self._signal(peer, signal.SIGINT)
        self._doom(peer, task)

    def _doom(self, peer: _Peer, task: tuple[int, int] | None) -> None:
        """A local daemon that goes on with a task that was cancelled is killed, where that is wanted."""
        patience = None if peer.launch is None else self.specs[peer.launch[0]]["options"].get("kill_after")
        if patience is not None and task is not None and peer.doomed != task:
            peer.doomed = task
            self._at(patience, lambda: self._kill_still(peer, task))

    def _kill_still(self, peer: _Peer, task: tuple[int, int]) -> None:
        """It has been told to drop this task for long enough."""
        core = self.core
        if peer.number not in core.daemons or core.held(peer.number, task[0], task[1], task[1] + 1) is None:
            return
        if peer.slot is None or core.task_at(peer.number, peer.slot.begun) == task:
            self._signal(peer, signal.SIGKILL)

    def _revoke(self, effect: Any) -> None:
        peer, record = self.peers.get(effect.daemon), self.core.daemons[effect.daemon]
        begun = record.position if peer is None or peer.slot is None else peer.slot.begun
        end = record.position + record.given()
        left = 0 if effect.all else (end - 1 - begun) // 2
        if peer is None or begun >= end - 1 or not self._limit(peer, begun + 1 + left):
            self._do(self.core.returned(effect.daemon, end))

    def _limit(self, peer: _Peer, position: int) -> bool:
        """From this position on it is to begin nothing; what it has begun by now is seen a moment later. False where it
        was told as much before."""
        if peer.limit and peer.limit <= position:
            return False
        peer.limit = position
        if peer.slot is None:
            self._post(peer, encode(Kind.LIMIT, position))
        else:
            peer.slot.limit(position)
            self._at(REVOKE_TIME, lambda: self._cut(peer, position))
        return True

    def _cut(self, peer: _Peer, position: int) -> None:
        if peer.limit != position or peer.slot is None or peer.number not in self.core.daemons:
            return      # it has stopped meanwhile, or ended, or less is left to it
        record = self.core.daemons[peer.number]
        cut = max(position, peer.slot.begun + 1)
        if cut >= record.position + record.given() and not record.stopping:
            peer.limit = 0
            peer.slot.limit(NO_LIMIT)
        self._do(self.core.returned(peer.number, cut))

    def _look(self, effect: Any) -> None:
        self._at(STEAL_AFTER, lambda: self._do(self.core.look()))

    def _signal(self, peer: _Peer, signum: int) -> None:
        """By the nursery: it alone knows that the process id is still that daemon's."""
        assert peer.launch is not None
        self.nursery.post(encode_json(Kind.SIGNAL, {"pid": peer.pid, "signal": int(signum)}))

    def _resolve(self, effect: Any) -> None:
        unit, lo, hi, how = effect
        assert self.host is not None
        if how is not RESULT:
            text = self._launch_text() if how is LAUNCH else "cancelled" if how is WITHDRAWN else self.why
            self._post(self.host, encode_json(Kind.LOST, {"how": how, "text": text, "lo": lo, "hi": hi}, unit))
        elif self.outcome is not None:
            kind, _, _, payload = self.outcome
            if kind == Kind.RESULT and self._is_call(unit):
                head = RESULTS_HEAD.pack(0, lo, 1, 0.0)
                kind, payload = Kind.RESULTS, b"".join([head, *join_apart([payload])])
            self._post(self.host, encode(kind, unit, payload))
            if kind == Kind.RESULT:
                del self.frames[unit]
                return
        self._release(unit)

    def _sized(self, effect: Any) -> None:
        if self.host is not None:
            self._post(self.host, encode(Kind.SIZED, effect.unit, RANGE.pack(0, effect.n)))

    def _launch_text(self) -> str:
        if not self.specs:
            return f"no daemon could be launched: {self.last_words}"
        return (f"no daemon could be started: {MAX_FAILED_STARTS} in a row ended before they were ready; "
                f"{self.last_words}")

    def _launch(self, effect: Any) -> None:
        serial = next(self.numbers)
        self.serials[effect.slot] = serial
        slot = Slot(self.page, effect.slot)
        slot.clear()
        slot.release()
        brief = self.brief.get(effect.slot, 0)
        if brief > 1 and not self.core.elastic:     # ever more slowly: else it would go round all the time
            self._at(min(REDIAL_FIRST * 2 ** brief, BRIEF_PAUSE), lambda: self.to_fork.append((effect.slot, serial)))
        else:
            self.to_fork.append((effect.slot, serial))

    def _fork(self) -> None:
        """Asks the nursery for all daemons that this round of events called for, by what they start with."""
        groups: dict[int, list[tuple[int, int]]] = {}
        for slot, serial in self.to_fork:
            groups.setdefault(id(self.specs[slot]), []).append((slot, serial))
        self.to_fork.clear()
        for launches in groups.values():
            self.nursery.post(encode_json(Kind.FORK, {
                "launches": launches, "spec": self.specs[launches[0][0]], "url": nearby(self.address)}))

    def _stop_launching(self, effect: Any) -> None:
        if self.host is not None:
            self._post(self.host, encode_json(Kind.NO_LAUNCH, {"text": self._launch_text()}))

    def _drop(self, effect: Any) -> None:
        peer = self.peers.get(effect.daemon)
        if peer is not None:
            self._fault(peer, effect.why)


# ======================================================================
# 11. Daemon: dial, evaluate, reply
# ======================================================================
# Knows:  its connection, the tasks it was given, its limits.
# Never:  queueing, other daemons.        Thread: tasks run in the main thread; nowhere else is user code called.

# What this process is and does: is a daemon, one that a nursery began; evaluates a task in sync mode, an item of a map
_here: dict[str, Any] = {"daemon": False, "launched": False, "slot": None, "evaluating": False, "map": False}
DaemonOptions = collections.namedtuple(
    "DaemonOptions", "autoexit cleanup idletime walltime maxtasks stream output cert forward")
_LIMITS = ("idletime", "walltime", "maxtasks")
_SWITCHES = ("asyncdial", "cleanup", "output", "dispatcher", "forward_imports")


def on_daemon() -> bool:
    """Whether this code runs in the evaluation of a mirai."""
    return bool(_here["daemon"] or _here["evaluating"])


def daemon(url: str | Sequence[str], *, dispatcher: bool = True, asyncdial: bool = False, autoexit: bool | None = True,
           cleanup: bool = True, output: bool = False, idletime: float = math.inf, walltime: float = math.inf,
           maxtasks: float = math.inf, tlscert: str | None = None, rs: Sequence[int] | None = None,
           kill_after: float | None = None, forward_imports: bool = True, key: str | bytes | None = None) -> int:
    """Serves the dispatcher (or host) at `url` until one side ends it; call it in the main thread of a process of its
    own.

    url: one, or several addresses of one listener, which are tried at once. dispatcher: for the record; whoever listens
    at the url is served. asyncdial: where nobody listens yet, try until somebody does. autoexit: True ends with the
    connection, a running task 200 ms later; None lets that finish first; False dials the url again, for a next host.
    cleanup: after each task (once per chunk of a map) the names that it assigned in its namespace, sys.path, the
    environment, the working directory and the warnings filters are as they were; what `everywhere()` did stays. output:
    whether what tasks print is shown (local daemons of a host: there). idletime, walltime: seconds without a task, and
    in all, after which it ends (what runs is finished first). maxtasks: tasks after which it ends. tlscert: PEM text or
    its path, of the certificate or authority by which the listener's certificate and host name are verified; by default
    the key alone says that it is the right one. rs: the random stream it begins with, as `nextstream()` gives.
    kill_after: for the host's own local daemons, seconds after which one that does not give back a cancelled task is
    killed. forward_imports: modules of the host's own project that can't be found here are fetched from there. key: the
    profile's, 64 hexadecimal digits or 32 bytes; by default MIRAI_KEY or, for a profile of the same user, its key file.

    Returns 0 (connection ended), 1 (idletime), 2 (walltime) or 3 (maxtasks), see `nextcode()`. Raises OSError where the
    url can't be reached, `Refused` where either side refuses the other.
    """
    options = {"dispatcher": dispatcher, "asyncdial": asyncdial, "autoexit": autoexit, "cleanup": cleanup,
               "output": output, "idletime": idletime, "walltime": walltime, "maxtasks": maxtasks, "tlscert": tlscert,
               "rs": rs, "kill_after": kill_after, "forward_imports": forward_imports}
    check_daemon_options(options)
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("daemon() needs the main thread of a process of its own: that is where tasks run")
    urls = [url] if isinstance(url, str) else list(url)
    check_daemon_urls(urls, tlscert)
    secret = find_key(*urls) if key is None else parse_key(key)
    stream = random_stream() if rs is None else stream_from_r(rs)
    return _serve_at(urls, secret, {}, _daemon_options(options, stream), asyncdial)


def check_daemon_options(options: Mapping[str, Any]) -> None:
    """TypeError or ValueError for options that `daemon()` does not take; the near miss is named."""
    known = (*_LIMITS, *_SWITCHES, "autoexit", "rs", "kill_after", "tlscert")
    for name, value in options.items():
        number = not isinstance(value, bool) and isinstance(value, (int, float)) and value > 0
        if name not in known:
            import difflib
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(f"there is no daemon option {name!r}" + (f"; did you mean {near[0]!r}?" if near else
                                                                     f": there are {', '.join(sorted(known))}"))
        if name in _LIMITS and not number:
            raise ValueError(f"{name}={value!r}: expected a number above 0 (math.inf: no limit)")
        if name == "kill_after" and value is not None and not number:
            raise ValueError(f"kill_after={value!r}: expected seconds above 0, or None for never")
        if name in _SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r}: expected True or False")
        if name == "autoexit" and value is not None and not isinstance(value, bool):
            raise ValueError(f"autoexit={value!r}: expected True, False, or None to finish a running task first")
        if name == "rs" and value is not None:
            stream_from_r(value)
        if name == "tlscert" and value is not None:
            dialer_context(read_pem(value, name))


def check_daemon_urls(urls: Sequence[str], tlscert: Any) -> None:
    """ValueError where one is none, or where the certificate would be asked of nobody."""
    schemes = {parse_url(url).scheme for url in urls}
    if tlscert is not None and schemes != {"tls+tcp"}:
        raise ValueError("tlscert is for tls+tcp:// URLs: at others nobody shows a certificate")


def _daemon_options(options: Mapping[str, Any], stream: Stream) -> DaemonOptions:
    idletime, walltime, maxtasks = [options.get(name, math.inf) for name in _LIMITS]
    cert = options.get("tlscert")
    return DaemonOptions(options.get("autoexit", True), options.get("cleanup", True), idletime, walltime, maxtasks,
                         stream, options.get("output", False), cert and read_pem(cert, "tlscert"),
                         options.get("forward_imports", True))


def nextcode(xc: int) -> str:
    """What a daemon's exit code says, in words."""
    reasons = ("connection terminated", "idletime limit reached", "walltime limit reached", "task limit reached")
    if isinstance(xc, bool) or not isinstance(xc, int) or not 0 <= xc < len(reasons):
        raise ValueError(f"xc={xc!r}: expected 0 to 3, as daemon() returns")
    return f"{xc} | Daemon {reasons[xc]}"


def _serve_at(urls: Sequence[str], key: bytes, about: Mapping[str, Any], options: DaemonOptions, patient: bool) -> int:
    """A daemon without a page: serves at the url, and with `autoexit=False` again and again."""
    dialing = functools.partial(dial, urls, key, "daemon", tlscert=options.cert)
    connection = _dial_patiently(dialing, about, math.inf, OSError) if patient else dialing(about)
    return _serve_from(connection, dialing, options)


def _serve_from(connection: Connection | None, dialing: Callable[[Mapping[str, Any]], Connection],
                options: DaemonOptions) -> int:
    server = _Daemon(options)
    while connection is not None:
        _answer_to(str(connection.terms.get("module", __name__)))
        inbox = _ThreadInbox(connection, options.autoexit)
        SUPPLY[:] = [inbox.fetch]
        if options.forward and not _here["launched"]:
            sys.meta_path[:] = [*(each for each in sys.meta_path if type(each) is not HostFinder), HostFinder()]
        try:
            why = server.serve(inbox)
        finally:
            inbox.over = True
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
        if options.autoexit is not False or why or server.ended:
            return why
        if _here["launched"]:
            _leave_terminal()       # the inbox may not have seen the end that a broken send told of
        # The next host knows nothing of how it was started; there may be others in between, which refuse it.
        connection = _dial_patiently(dialing, {}, time.monotonic() + server.patience(), Refused)
    return server.why_now()


def _dial_patiently(dialing: Callable[[Mapping[str, Any]], Connection], about: Mapping[str, Any], deadline: float,
                    refused: type[Exception]) -> Connection | None:
    """Tries until somebody listens there; None after the deadline."""
    pause = REDIAL_FIRST
    while True:
        try:
            return dialing(about)
        except (OSError, refused):
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            time.sleep(min(pause * random.SystemRandom().uniform(0.5, 1.0), left))      # not all at once
            pause = min(2 * pause, REDIAL_MOST)


def _answer_to(name: str) -> None:
    """This file may have another name with the host, where a project has it in a package of its own: what goes by name
    goes by that one."""
    global __name__
    if name != __name__:
        for value in [value for value in globals().values() if getattr(value, "__module__", None) == __name__]:
            value.__module__ = name
        sys.modules[name], __name__ = sys.modules[__name__], name


def _become_daemon() -> None:
    """What tasks find: a `__main__` of their own, which the host's functions share; a `quit()` that ends it all."""
    _here["daemon"], HOSTS_PATH[0] = True, _here["launched"]
    os.environ.pop("MIRAI_KEY", None)       # it has served; tasks and what they start need not have it
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    _namespaces["__main__"] = vars(main)
    _origin[0] = os.urandom(HASH_SIZE)
    vars(main)["__builtins__"] = builtins
    builtins.quit = builtins.exit = _quit       # type: ignore[assignment]


def _quit(code: Any = 0) -> NoReturn:
    """As `quit()` does in R, and unlike `sys.exit()`, which is an exception like others: ends the daemon, now."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


# Python's own, which its library tries to import where they are not; until 3.9 it has no list of them.
_NO_PROJECTS = getattr(sys, "stdlib_module_names", None) or frozenset((
    "_posixshmem", "_scproxy", "_winapi", "_winreg", "java", "msvcrt", "nt", "org", "readline", "vms_lib", "winreg",
    "winsound", *sys.builtin_module_names))


class HostFinder:
    """On a daemon, the last finder of modules: those that the host alone has are fetched from there, once, as a zip."""

    def __init__(self) -> None:
        self.paths: dict[str, str | None] = {}
        self.files: list[Any] = []
        self.lock = threading.RLock()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if "." in name or not SUPPLY or name in _NO_PROJECTS:
            return None
        with self.lock:
            if name not in self.paths:
                self.paths[name] = self._fetch(name)
        from importlib.machinery import PathFinder
        found = self.paths[name]
        return None if found is None else PathFinder.find_spec(name, [found])

    def _fetch(self, name: str) -> str | None:
        try:
            data = SUPPLY[0]({"module": name})
        except LookupError as error:
            if str(error):
                raise ModuleNotFoundError(str(error), name=name) from None
            return None
        if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
            file = open(os.memfd_create(name), "wb")        # noqa: SIM115
            path = f"/proc/self/fd/{file.fileno()}"
        else:
            file = tempfile.NamedTemporaryFile(suffix=".zip")       # type: ignore[assignment]    # noqa: SIM115
            path = file.name
        file.write(data)
        file.flush()
        self.files.append(file)
        return path


class Surroundings:
    """What tasks may change of a process, as it is now: `restore()` makes it so again."""

    def __init__(self) -> None:
        self.namespaces = copy_namespaces()
        self.path = sys.path[:]
        self.environ = self._environ().copy()
        self.filters = warnings.filters[:]
        self.cwd: str | None = None
        with contextlib.suppress(OSError):
            self.cwd = os.getcwd()

    @staticmethod
    def _environ() -> dict[Any, Any]:
        """The table behind os.environ, where there is one: a fiftieth of the time."""
        return getattr(os.environ, "_data", None) or dict(os.environ)

    def restore(self) -> None:
        restore_namespaces(self.namespaces)
        if sys.path != self.path:
            sys.path[:] = self.path
        if self._environ() != self.environ:
            self._restore_environ()
        if warnings.filters != self.filters:
            warnings.resetwarnings()        # which has the caches of all modules dropped
            warnings.filters[:] = self.filters      # type: ignore[index]
        with contextlib.suppress(OSError):
            if self.cwd is not None and self._left():
                os.chdir(self.cwd)

    def _left(self) -> bool:
        try:
            return os.getcwd() != self.cwd
        except OSError:             # where a task went is no more
            return True

    def _restore_environ(self) -> None:
        decode = getattr(os.environ, "decodekey", str)
        old = {decode(name): decode(value) for name, value in self.environ.items()}
        for name in [name for name in os.environ if name not in old]:
            del os.environ[name]
        for name, value in old.items():
            if os.environ.get(name) != value:
                os.environ[name] = value


class _PageInbox:
    """A local daemon's way to its tasks: it reads the socket itself, and shares a page with the dispatcher."""

    def __init__(self, connection: Connection, slot: Slot) -> None:
        self.connection, self.slot = connection, slot
        self.stops_on_ctrl_c = self.signalled = False
        self.cancelled = functools.partial(slot.words.__getitem__, 0)       # the task that is to be interrupted
        self.keep, self.sent = slot.keep, slot.sent
        self.report: _Report | None = None
        self.pieces_done = 0

    def send_report(self, report: _Report) -> None:
        for frame in report.frames():
            self.connection.send(frame)
            self.sent()

    def begin(self, position: int, task: int) -> bool:
        """Whether the task at this position may still be begun."""
        return self.slot.begin(position)

    def stop(self, position: int) -> None:
        """Says that it begins nothing of what it was sent, from here on."""
        self.connection.send(encode(Kind.STOPPED, position))

    def claims(self, position: int) -> bool:
        """The page says what is begun."""
        return True

    def send(self, frame: bytes) -> None:
        self.connection.send(frame)

    def get(self, timeout: float) -> Message | None:
        """The next message, None at the end of the connection. TimeoutError after `timeout` seconds."""
        connection = self.connection
        while True:
            message = connection.decoder.pop()
            if message is not None:
                return message
            if timeout != math.inf and not wait_ready(connection.fileno(), timeout):
                raise TimeoutError
            if not connection.receive():
                return None


class _ThreadInbox:
    """The way of a daemon without a page: a thread reads, so that a cancel reaches a busy main thread, and that the end
    of the connection ends a busy daemon (unless that is to finish first)."""

    def __init__(self, connection: Connection, autoexit: bool | None) -> None:
        import queue
        self.connection, self.autoexit = connection, autoexit
        self.remote = connection.sock.family != getattr(socket, "AF_UNIX", None)
        self.stops_on_ctrl_c = True
        self.signalled = False          # by this thread: the next SIGINT is no Ctrl-C
        self.over = False               # the daemon has ended by itself
        self.begun = self.claimed = self.task = 0
        self.limit, self.stopped = NO_LIMIT, False
        self.report: _Report | None = None      # of the items that are being evaluated
        self.pieces = self.pieces_done = 0
        self._sending = threading.Lock()
        self._cancelled = 0
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._empty = queue.Empty
        self._wants = itertools.count(1)
        self._given: dict[int, queue.SimpleQueue[bytes]] = {}
        threading.Thread(target=self._read, name="mirai-inbox", daemon=True).start()

    def cancelled(self) -> int:
        return self._cancelled

    def begin(self, position: int, task: int) -> bool:
        """Says what is begun, and then looks whether that is allowed; the reading thread does it the other way
        round."""
        self.task, self.begun = task, position
        return position < self.limit

    def stop(self, position: int) -> None:
        """Says that it begins nothing of what it was sent, from here on."""
        with self._sending:
            self.stopped = True
            self.connection.send(encode(Kind.STOPPED, position))

    def claims(self, position: int) -> bool:
        return position <= self.claimed

    def claim(self, position: int) -> None:
        """Says up to where tasks may be begun before the next report, should it be the last."""
        self.claimed = position
        self.send(encode(Kind.CLAIM, position))

    def keep(self, position: int, outcome: bytes) -> bool:
        """It is kept by the daemon alone."""
        return True

    def sent(self) -> None:
        """Nothing to forget."""

    def send(self, frame: bytes) -> None:
        with self._sending:
            self.connection.send(frame)

    def get(self, timeout: float) -> Message | None:
        try:
            return self._messages.get(timeout=None if timeout == math.inf else max(0.0, timeout))
        except self._empty:
            raise TimeoutError from None

    def fetch(self, wish: Mapping[str, str]) -> bytes:
        """What the host has of it; LookupError says why it has not."""
        import queue
        number, given = next(self._wants), queue.SimpleQueue()      # type: ignore[var-annotated]
        self._given[number] = given
        frame = encode_json(Kind.WANT, wish, number)
        threading.Thread(target=self.send, args=(frame,)).start()   # where no interrupt can fall into it
        try:
            answer = given.get(timeout=FETCH_TIME)
        except queue.Empty:
            raise LookupError(f"the host did not answer within {FETCH_TIME:.0f} s") from None
        finally:
            del self._given[number]
        if answer[:1] != GIVEN:
            raise LookupError(answer[1:].decode())
        return bytes(answer[1:])

    def send_report(self, report: _Report) -> None:
        """By the main thread, or by the one that reads where the main thread is at an item for long."""
        with self._sending:
            for frame in report.frames():
                self.connection.send(frame)

    def _read(self) -> None:
        try:
            while True:
                for message in self.connection.decoder:
                    self._take(message)
                while self.pieces > self.pieces_done and not wait_ready(self.connection.fileno(), CHUNK_TIME):
                    report = self.report
                    if report is not None and report.outcomes and time.monotonic() - report.since > CHUNK_TIME:
                        self.send_report(report)
                while self.remote and not wait_ready(self.connection.fileno(), LINK_TIME / 6):
                    if is_cut(self.connection.sock):
                        self.connection.sock.shutdown(socket.SHUT_RDWR)
                if not self.connection.receive():
                    break
        except OSError:
            return
        finally:
            if self.autoexit is not True and not self.over and _here["launched"]:
                _leave_terminal()
            self._messages.put(None)
            if self.autoexit is True:
                time.sleep(GRACE)       # an idle daemon has long ended by itself
                if not self.over:
                    os._exit(0)

    def _take(self, message: Message) -> None:
        if message.kind == Kind.CANCEL:
            lo, hi = RANGE.unpack(message.payload)
            if message.id + lo <= self.task < message.id + hi:
                self._cancelled, self.signalled = self.task, True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        elif message.kind == Kind.LIMIT:
            with self._sending:
                if not self.stopped:        # else it begins nothing anyway, and has said so
                    self.limit = min(self.limit, message.id)
                    self.connection.send(encode(Kind.CUT, max(message.id, self.begun + 1)))
        else:
            if message.kind == Kind.GIVE:
                if message.id in self._given:
                    self._given[message.id].put(message.payload)
                return
            if message.flags & FRESH and message.kind in (Kind.TASK, Kind.RUN, Kind.EVERYWHERE):
                self.limit, self.stopped = NO_LIMIT, False
            self.pieces += message.kind == Kind.RUN
            self._messages.put(message)


def _leave_terminal() -> None:
    """Whoever read what this process writes may be gone, and what it still does must not fail by that."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                os.dup2(null, fd)
    os.close(null)


class _Daemon:
    """The loop of a daemon: one task at a time, each under a guard that lets an interrupt in."""

    def __init__(self, options: DaemonOptions) -> None:
        self.options = options
        self.idle_since = time.monotonic()
        self.end = self.idle_since + options.walltime
        self.limited = min(options.idletime, options.walltime, options.maxtasks) < math.inf
        self.done = 0               # tasks
        self.armed = 0              # the task that a signal may interrupt now
        self.stopping = False       # Ctrl-C in the terminal of a daemon started by hand
        self.ended = False          # the host wants it to end, whatever else was agreed on
        self.handlers = {Kind.TASK: self._run_task, Kind.RUN: self._run_piece, Kind.EVERYWHERE: self._run_everywhere,
                         Kind.UNIT: self._take_unit, Kind.DEFINE: _take_definition, Kind.DROP: _drop_definitions,
                         Kind.END: self._take_end}
        _become_daemon()
        GENERATORS.seed(options.stream)
        self.surroundings = Surroundings()

    def serve(self, inbox: _PageInbox | _ThreadInbox) -> int:
        """Until the connection ends, or it does by its limits: why."""
        self.inbox = inbox
        self.position = 1               # of the next task; the dispatcher counts as well
        self.units: dict[int, Items] = {}
        self.halted = False             # it was stopped, and goes on with what is said to be meant
        _here["map"] = False
        if self.options.cleanup:        # its last host may have gone before that was done
            self.surroundings.restore()
        signal.signal(signal.SIGINT, self._on_sigint)
        sys.unraisablehook = self._on_unraisable
        try:
            while not self.ended:
                try:
                    message = inbox.get(self.patience() if self.limited else math.inf)
                except TimeoutError:
                    if self.patience() > 0:        # longer than one wait can be
                        continue
                    return self._leave(self.why_now())
                if message is None:
                    if inbox.connection.fault:
                        print(f"mirai: the host's end: {inbox.connection.fault}", file=sys.stderr, flush=True)
                    return DIED
                handle = self.handlers.get(message.kind)
                if handle is None:
                    raise ProtocolError(f"{message!r} from a dispatcher")
                why = handle(message)
                if why is not None:
                    return why
        except OSError:             # the connection broke: the same end by another sign
            return DIED
        return DIED

    def patience(self) -> float:
        options = self.options
        return float(min(self.idle_since + options.idletime, self.end, time.monotonic() + WAIT_MOST) - time.monotonic())

    def why_now(self) -> int:
        return WALLTIME if time.monotonic() >= self.end else IDLETIME

    def _take_end(self, message: Message) -> None:
        self.ended = True

    # -- tasks

    def _skips(self, message: Message, n: int) -> bool:
        """What comes after it was stopped, and was sent before that was known, is somebody else's by now."""
        if message.flags & FRESH:
            self.halted = False
        if self.halted:
            self.position += n
        return self.halted

    def _halt(self, n: int) -> None:
        """It may not begin the task at its position, and drops that and what follows, n in all."""
        self.halted = True
        self.inbox.stop(self.position)
        self.position += n

    def _begins(self, message: Message) -> bool:
        """Whether a single task is to be evaluated."""
        if self._skips(message, 1):
            return False
        if not self.inbox.begin(self.position, message.id):
            self._halt(1)
            return False
        self.position += 1
        return True

    def _run_task(self, message: Message) -> int | None:
        if not self._begins(message):
            return None
        outcome = self._guarded(message.id, evaluate, message.payload)
        self.done += 1
        return self._after([encode(Kind.RESULT, message.id, outcome)])

    def _run_everywhere(self, message: Message) -> int | None:
        """A call that failed here alone, in a replay, means that this daemon is not what tasks expect."""
        if not self._begins(message):
            return None
        outcome = self._guarded(message.id, evaluate_everywhere, message.payload)
        self.surroundings = Surroundings()
        failed = outcome.startswith(FAILURE)
        if failed and message.flags & REPLAY:
            error, _ = load_outcome(outcome)
            print(f"a replay of everywhere() failed: {error}", file=sys.stderr, flush=True)
            raise SystemExit(EX_SOFTWARE)
        return self._after([encode(Kind.RESULT, message.id, outcome, FAILED if failed else 0)], False)

    def _take_unit(self, message: Message) -> None:
        if len(self.units) >= KEPT_UNITS:
            del self.units[next(iter(self.units))]
        self.units[message.id] = Items(message.payload)

    def _run_piece(self, message: Message) -> int | None:
        """Items of a map, one by one; outcomes are sent every CHUNK_TIME, and in between kept where a kill leaves
        them."""
        lo, hi = RANGE.unpack(message.payload)
        inbox, items = self.inbox, self.units[message.id]
        if self._skips(message, hi - lo):
            inbox.pieces_done += 1
            return None
        report = inbox.report = _Report(message.id, lo, self.position)
        _here["map"] = True
        items.begin()
        for index in range(lo, hi):
            if not inbox.claims(self.position):
                self._flush(report)
                inbox.claim(self.position + min(report.pace(), hi - 1 - index))     # type: ignore[union-attr]
            if not inbox.begin(self.position, message.id + index):
                self._flush(report)
                self._halt(hi - index)
                break
            outcome = self._guarded(message.id + index, items.evaluate, index)
            self.done += 1
            self.position += 1
            if not report.add(inbox.keep(self.position - 1, outcome), outcome):
                self._flush(report)
            if (self.limited or self.stopping) and (self.stopping or self._limit_reached()):
                break
        _here["map"] = False
        inbox.report = None
        inbox.pieces_done += 1
        return self._after(report.frames())

    def _flush(self, report: _Report) -> None:
        if self.options.output:
            self._pass_output()
        self.inbox.send_report(report)

    def _after(self, frames: list[bytes], clean: bool = True) -> int | None:
        """Sends what has come of tasks, and makes good what they changed; or leaves."""
        if self.options.output:
            self._pass_output()
        if self.limited or self.stopping:
            self.idle_since = time.monotonic()
            why = self._limit_reached()
            if why or self.stopping:
                return self._leave(why, frames)
        if frames:
            self.inbox.send(b"".join(frames))
            self.inbox.sent()
        if clean and self.options.cleanup:
            self.surroundings.restore()
        return None

    def _limit_reached(self) -> int:
        return MAXTASKS if self.done >= self.options.maxtasks else WALLTIME if time.monotonic() >= self.end else DIED

    def _pass_output(self) -> None:
        """What tasks wrote is to be with the host before their results."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):        # a task's own
                stream.flush()
        if _here["slot"] is not None:
            _here["slot"].wait_output((1, 2), OUTPUT_TIME)

    def _guarded(self, task: int, evaluate: Callable[[Any], bytes], what: Any) -> bytes:
        """Evaluates a task. The interrupt that is meant for it is raised only between arming and disarming, once."""
        try:
            self.armed = task
            if self.inbox.cancelled() == task:
                self.armed = 0
                raise _Interrupted
            outcome = evaluate(what)
            self.armed = 0
        except KeyboardInterrupt as error:
            self.armed = 0
            outcome = dump_failure(error)
        if _signal.getsignal(signal.SIGINT) != self._on_sigint:     # the task changed it
            signal.signal(signal.SIGINT, self._on_sigint)
        return outcome

    def _leave(self, why: int, frames: Sequence[bytes] = ()) -> int:
        """Says why before the last results, so that no task is sent after it; then waits to be let go."""
        self.inbox.send(b"".join([encode(Kind.LEAVE, self.position - 1, flags=why), *frames]))
        with contextlib.suppress(OSError):
            self.inbox.connection.sock.shutdown(socket.SHUT_WR)
            if isinstance(self.inbox, _PageInbox):
                wait_ready(self.inbox.connection.fileno(), GRACE)
                return why
        with contextlib.suppress(TimeoutError):     # by TCP, what is left unread here would undo what was sent last
            while self.inbox.get(CLOSE_TIME) is not None:
                pass
        return why

    # -- signals

    def _on_sigint(self, signum: int, frame: Any) -> None:
        if self.armed and self.armed == self.inbox.cancelled():
            self.armed, self.inbox.signalled = 0, False     # here, so that a second signal does not find the guard up
            raise _Interrupted
        if self.inbox.signalled:        # a cancel that came too late
            self.inbox.signalled = False
        elif self.inbox.stops_on_ctrl_c:
            self.stopping = True
            raise KeyboardInterrupt

    def _on_unraisable(self, unraisable: Any) -> None:
        """An interrupt that fell into a finalizer, where exceptions vanish: it is sent again anyway."""
        if isinstance(unraisable.exc_value, _Interrupted):
            self.armed = self.inbox.cancelled()
        else:
            sys.__unraisablehook__(unraisable)


class _Report:
    """Outcomes of consecutive items, until they are sent."""

    def __init__(self, unit: int, lo: int, position: int) -> None:
        self.unit, self.lo, self.position = unit, lo, position
        self.outcomes: list[bytes] = []     # appended to by the thread of the tasks, taken by whichever sends
        self.lock = threading.Lock()
        self.since = time.monotonic()
        self.each = CHUNK_TIME          # seconds an item, as far as is known

    def add(self, kept: bool, outcome: bytes) -> bool:
        """Whether it may wait."""
        self.outcomes.append(outcome)
        return kept and time.monotonic() - self.since < CHUNK_TIME

    def pace(self) -> int:
        """How many items will fill the time until the next report."""
        return int(CHUNK_TIME / max(self.each, 1e-9))

    def frames(self) -> list[bytes]:
        with self.lock:
            n, now = len(self.outcomes), time.monotonic()
            if not n:
                return []
            outcomes = self.outcomes[:n]
            del self.outcomes[:n]
            self.each = (now - self.since) / n
            head = RESULTS_HEAD.pack(self.position, self.lo, n, now - self.since)
            self.lo, self.position, self.since = self.lo + n, self.position + n, now
        return [encode_parts(Kind.RESULTS, [head, *join_apart(outcomes)], self.unit)]


def _take_definition(message: Message) -> None:
    receive_definition(message.payload[:HASH_SIZE], message.payload[HASH_SIZE:])


def _drop_definitions(message: Message) -> None:
    for hash in split_hashes(message.payload):
        receive_definition(hash, None)


# ======================================================================
# 12. Nursery: the parent of dispatchers and local daemons
# ======================================================================
# Knows:  processes: how they start, that they ended, whose they are.
# Never:  tasks, keys' use, listening sockets.    Thread: the nursery process has one; it forks.
# Rule:   whatever ends the host ends the nursery, and with it every process group that it began.

_NURSERY_COMMAND = (
    "import sys; sys.path[:] = [p for p in sys.path if p]\n"
    "from importlib.util import spec_from_file_location as find, module_from_spec as make\n"
    "spec = find(sys.argv[1], sys.argv[2]); module = sys.modules[sys.argv[1]] = make(spec)\n"
    "spec.loader.exec_module(module); sys.exit(module.nursery_main(int(sys.argv[3])))")


UNDO = "undo"           # what a command is that ends what another has launched
_utf8 = codecs.getincrementaldecoder("utf-8")


class _Child:
    """A process that the nursery forked."""

    def __init__(self, role: str, job: int, pid: int, words: int) -> None:
        self.role, self.job, self.pid = role, job, pid      # job: the dispatcher it is, or belongs to
        self.words = words                                  # the reading end of its stderr
        self.tail = b""
        self.launch = (0, 0)                                # a daemon's slot, serial
        self.control: Connection | None = None              # a dispatcher's
        self.page: memoryview | None = None
        self.key = ""
        self.files: list[str] = []                          # a dispatcher's, to be removed after it
        self.status: int | None = None                      # of a dispatcher that ended before its daemons
        self.direct = False                                 # a dispatcher in a thread of the host
        self.spared = False                                 # a daemon that may outlive its connection
        self.slot: Slot | None = None                       # of a daemon whose output is passed on
        self.out = -1                                       # the reading end of its stdout, likewise; of a command's
        self.said = b""                                     # the tail of what a command wrote there
        self.wish: Mapping[str, Any] = {}                   # what a command was asked for
        self.undo: list[list[str]] = []                     # of a dispatcher: commands that end what others launched
        self.text = {stream: _utf8(errors="backslashreplace") for stream in (1, 2)}     # a read may end in a character


class Nursery:
    """The loop of the nursery process. `run()` returns None at its end, and in each forked child what to run there."""

    def __init__(self, control: Connection, host: int) -> None:
        self.control, self.host = control, host
        self.selector = selectors.DefaultSelector()
        self.children: dict[int, _Child] = {}
        self.dispatchers: dict[int, _Child] = {}            # by job, until it and its daemons have ended
        self.to_fork: deque[tuple[_Child, tuple[int, int], Mapping[str, Any]]] = deque()
        self.to_run: deque[tuple[_Child, int, Mapping[str, Any]]] = deque()     # commands, for a dispatcher
        self.to_kill: list[tuple[float, int]] = []          # when, process id
        self.paused: list[tuple[_Child, int]] = []          # whose output is not read until a dispatcher takes more
        self.unsent: set[Connection] = set()                # to peers that are stopped, say: nobody is waited for
        self.wake, wakeup = socket.socketpair()
        for sock in (self.wake, wakeup):
            sock.setblocking(False)
        self.wakeup = wakeup
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self.wake, selectors.EVENT_READ, lambda: self.wake.recv(4096))
        self.selector.register(control, selectors.EVENT_READ, self._from_host)
        self.become: Callable[[], int] | None = None
        self.ending = False
        self.received: list[int] = []                       # descriptors that came with messages, not yet taken
        control.receive_by(self._receive)
        self._watch_host()

    # -- the loop

    def run(self) -> Callable[[], int] | None:
        while not self.ending:
            for key, _ in self.selector.select(self._timeout()):
                key.data()
                if self.become is not None:
                    return self.become
            if self.to_fork:
                self._fork_daemon(*self.to_fork.popleft())
                if self.become is not None:
                    return self.become
            if self.to_run:
                self._run_command(*self.to_run.popleft())
                if self.become is not None:
                    return self.become
            self._reap()
            self._kill_due()
            for connection in list(self.unsent):
                self._tell(connection)
                if connection not in self.unsent:
                    self._output_passed(connection)
            if os.getppid() != self.host:
                self.ending = True
        self._end()
        return self.become

    def _timeout(self) -> float | None:
        if self.to_fork or self.to_run:
            return 0.0
        if self.unsent:
            return 0.02
        if self.to_kill:
            return max(0.0, min(self.to_kill)[0] - time.monotonic())
        return None if self.watches else 0.1

    def _tell(self, connection: Connection, frame: bytes = b"") -> None:
        """Sends what can be sent now; the rest later. A peer that is gone is noticed when it is read from."""
        try:
            done = connection.send(frame) if frame else connection.flush()
        except OSError:
            done = True
        (self.unsent.discard if done else self.unsent.add)(connection)

    def _watch_host(self) -> None:
        """The end of the control pipe is not enough: a child that the host forked may hold it open."""
        self.watches = False
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self.selector.register(os.pidfd_open(self.host), selectors.EVENT_READ, self._host_ended)
                self.watches = True

    def _host_ended(self) -> None:
        self.ending = True

    def _end(self) -> None:
        for child in self.children.values():
            if not child.spared and child.wish.get("what") != UNDO:
                _kill_group(child.pid)
        for dispatcher in list(self.dispatchers.values()):
            self._remove_files(dispatcher)
            self._undo(dispatcher)
        while self.to_run:
            self._run_command(*self.to_run.popleft())
            if self.become is not None:
                return
        with contextlib.suppress(OSError):          # other hosts' sockets are in it
            os.rmdir(runtime_dir())

    def _remove_files(self, dispatcher: _Child) -> None:
        for path in dispatcher.files:
            with contextlib.suppress(OSError):
                os.unlink(path)

    # -- requests

    def _from_host(self) -> None:
        self.control.receive()
        while (message := self.control.decoder.pop()) is not None:
            content = decode_json(message)
            if message.kind == Kind.START:
                try:
                    (self._meet_dispatcher if content["direct"] else self._start_dispatcher)(message.id, content)
                except OSError as error:
                    self._report_end(message.id, 0, 1, f"it could not be forked: {error}")
                if self.become is not None:
                    return
            elif message.kind == Kind.SIGNAL and message.id in self.dispatchers:
                dispatcher = self.dispatchers[message.id]
                if dispatcher.direct:
                    self._dispatcher_ended(dispatcher, 0)
                elif dispatcher.status is None:
                    _kill_group(dispatcher.pid)
        if self.control.ended:
            self.ending = True

    def _receive(self, size: int) -> bytes:
        """As `recv()`, which would drop the descriptors."""
        data, fds, _, _ = socket.recv_fds(self.control.sock, size, 16)
        self.received += fds
        return data

    def _from_dispatcher(self, child: _Child) -> None:
        if child.control is None:       # hung up a moment ago
            return
        child.control.receive()
        while (message := child.control.decoder.pop()) is not None:
            content = decode_json(message)
            if message.kind == Kind.LISTENING:
                child.files = content["files"]
                self._tell(self.control, encode_json(Kind.LISTENING, content, child.job))
            elif message.kind == Kind.FORK:
                spec = {**content["spec"], "url": content["url"]}
                self.to_fork.extend((child, tuple(launch), spec) for launch in content["launches"])
            elif message.kind == Kind.SIGNAL:
                self._signal(child.job, content["pid"], content["signal"])
            elif message.kind == Kind.COMMAND:
                self.to_run.append((child, message.id, content))
        if child.control.ended:
            self._hang_up(child)
            if child.direct:
                self._dispatcher_ended(child, 0)

    def _hang_up(self, dispatcher: _Child) -> None:
        if dispatcher.control is not None:
            self.selector.unregister(dispatcher.control)
            self.unsent.discard(dispatcher.control)
            dispatcher.control.close()
            dispatcher.control = None

    def _signal(self, job: int, pid: int, signum: int) -> None:
        child = self.children.get(pid)      # not yet reaped, so the number is still its own
        if child is None or child.job != job:
            return
        if signum == signal.SIGKILL:
            _kill_group(pid)
        else:
            os.kill(pid, signum)

    # -- starting

    def _start_dispatcher(self, job: int, spec: Mapping[str, Any]) -> None:
        host = self.received.pop(0) if self.received else -1
        if host < 0:
            raise OSError(errno.EMFILE, "its descriptor did not arrive: too many are open")
        control, theirs = socket.socketpair()
        page = new_page()
        try:
            child = self._fork("dispatcher", job, (theirs.fileno(), host),
                               lambda: _dispatch(spec, Connection(theirs), page, socket.socket(fileno=host)))
        except OSError:
            for fd in (control.detach(), theirs.detach(), host):
                os.close(fd)
            raise
        if child is None:
            control.detach()
            return
        theirs.close()
        os.close(host)
        self._add_dispatcher(child, control, page, spec)

    def _meet_dispatcher(self, job: int, spec: Mapping[str, Any]) -> None:
        """One in the host: its end of a control pipe, and the page, came with the message."""
        if len(self.received) < 2:
            while self.received:
                os.close(self.received.pop())
            raise OSError(errno.EMFILE, "its descriptors did not arrive: too many are open")
        control, file = self.received[:2]
        del self.received[:2]
        child = _Child("dispatcher", job, self.host, -1)
        child.direct = True
        self._add_dispatcher(child, socket.socket(fileno=control), new_page(file), spec)
        os.close(file)

    def _add_dispatcher(self, child: _Child, control: socket.socket, page: memoryview, spec: Mapping[str, Any]) -> None:
        control.setblocking(False)
        child.page, child.control, child.key = page, Connection(control), spec["key"]
        self.dispatchers[child.job] = child
        self.selector.register(child.control, selectors.EVENT_READ, functools.partial(self._from_dispatcher, child))

    def _fork_daemon(self, dispatcher: _Child, launch: tuple[int, int], spec: Mapping[str, Any]) -> None:
        if dispatcher.control is None:
            return
        page = dispatcher.page or memoryview(b"")
        try:
            child = self._fork("daemon", dispatcher.job, (), functools.partial(
                _local_daemon, spec, dispatcher.key, launch, page), spec["options"].get("output", False))
        except OSError as error:
            self._report(dispatcher, launch, 0, 1, f"it could not be forked: {error}")
            return
        if child is not None:
            child.launch = launch
            child.spared = spec["options"].get("autoexit", True) is not True
            child.slot = Slot(page, launch[0]) if child.out >= 0 else None

    def _run_command(self, dispatcher: _Child, id: int, wish: Mapping[str, Any]) -> None:
        """One that launches daemons elsewhere, or undoes that. Its input is a file: it may be larger than a pipe."""
        file = _unnamed_file()
        try:
            with open(os.dup(file), "w", encoding="utf-8", errors="surrogateescape") as writer:
                writer.write(wish.get("input", ""))
            os.lseek(file, 0, os.SEEK_SET)
            child = self._fork("command", dispatcher.job, (file,), functools.partial(_execute, wish, file), True)
        except (OSError, ValueError) as error:
            self._command_ended(dispatcher, id, wish, 1, f"it could not be started: {error}")
            return
        finally:
            if self.become is None:
                os.close(file)
        if child is not None:
            child.launch, child.wish = (id, 0), wish
            if dispatcher.status is not None:
                self.to_kill.append((time.monotonic() + UNDO_TIME, child.pid))

    def _command_ended(self, dispatcher: _Child, id: int, wish: Mapping[str, Any], status: int, words: str,
                       said: str = "") -> None:
        import re
        found = re.search(wish["job"], said) if not status and wish.get("job") else None
        if found is not None:
            dispatcher.undo.append([part.replace("{}", found.group(1)) for part in wish["undo"]])
            if dispatcher.status is not None:
                self._undo(dispatcher)
        if dispatcher.control is not None:
            self._tell(dispatcher.control, encode_json(Kind.COMMAND, {
                "what": wish["what"], "status": status, "words": words or said}, id))

    def _undo(self, dispatcher: _Child) -> None:
        """Ends what was launched elsewhere and might not notice by itself that it is no longer needed."""
        while dispatcher.undo:
            self.to_run.append((dispatcher, 0, {"argv": dispatcher.undo.pop(), "env": {**os.environ}, "what": UNDO}))

    def _fork(self, role: str, job: int, keep: Collection[int], run: Callable[[], int],
              output: bool = False) -> _Child | None:
        """A child in a session of its own, its stderr kept; None in the child itself, which then runs `become`."""
        pipes = [os.pipe() for _ in range(1 + output)]
        try:
            pid = os.fork()
        except OSError:
            for fd in itertools.chain(*pipes):
                os.close(fd)
            raise
        if pid == 0:
            self._enter_child(keep, [theirs for _, theirs in pipes])
            self.become = run
            return None
        child = self.children[pid] = _Child(role, job, pid, pipes[0][0])
        child.out = pipes[1][0] if output else -1
        for stream, (ours, theirs) in zip((2, 1), pipes):
            os.close(theirs)
            os.set_blocking(ours, False)
            self._hear(child, stream)
        return child

    def _enter_child(self, keep: Collection[int], pipes: list[int]) -> None:
        """Leaves everything of the nursery's behind: an inherited descriptor would hide a sibling's end."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for fd, pipe in zip((2, 1), pipes):
            os.dup2(pipe, fd)
        if sys.stderr is None:
            sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)     # noqa: SIM115
        self.selector.close()
        for sock in (self.control.sock, self.wake, self.wakeup):
            sock.detach()
        for child in self.children.values():
            if child.control is not None:
                child.control.sock.detach()
        _close_all_but(keep)

    # -- ending

    def _read_output(self, child: _Child, stream: int, last: bool = False) -> bool:
        """Of what a child wrote on stderr the tail is kept; a daemon's output is passed on, where that is wanted. False
        where there was nothing."""
        fd = child.words if stream == 2 else child.out
        dispatcher = self.dispatchers.get(child.job)
        if child.slot is not None and dispatcher is not None and dispatcher.control in self.unsent and not last:
            self.selector.unregister(fd)        # it takes no more for now, and what wrote this is to wait
            self.paused.append((child, stream))
            return False
        if child.slot is not None:
            child.slot.passing_output(True)     # before it is read
        try:
            data = os.read(fd, READ_SIZE)
        except BlockingIOError:
            data = None
        if data and stream == 2:
            child.tail = (child.tail + data)[-LAST_WORDS:]
        elif data and child.role == "command":
            child.said = (child.said + data)[-LAST_WORDS:]
        if data is not None and child.slot is not None and dispatcher is not None and dispatcher.control is not None:
            text = child.text[stream].decode(data, not data)
            self._tell(dispatcher.control, encode(Kind.OUTPUT, 0, text.encode(), stream))
        if child.slot is not None and (dispatcher is None or dispatcher.control not in self.unsent):
            child.slot.passing_output(False)
        if data == b"":
            self._close_output(child, stream)
        return bool(data)

    def _output_passed(self, control: Connection) -> None:
        for child in self.children.values():
            dispatcher = self.dispatchers.get(child.job)        # one that is spared may have outlived it
            if child.slot is not None and dispatcher is not None and dispatcher.control is control:
                child.slot.passing_output(False)
        paused, self.paused = self.paused, []
        for child, stream in paused:
            self._hear(child, stream)

    def _hear(self, child: _Child, stream: int) -> None:
        fd = child.words if stream == 2 else child.out
        if fd >= 0:
            self.selector.register(fd, selectors.EVENT_READ, functools.partial(self._read_output, child, stream))

    def _close_output(self, child: _Child, stream: int) -> None:
        fd = child.words if stream == 2 else child.out
        if fd >= 0:
            if (child, stream) in self.paused:
                self.paused.remove((child, stream))
            else:
                self.selector.unregister(fd)
            os.close(fd)
        if stream == 2:
            child.words = -1
        else:
            child.out = -1

    def _reap(self) -> None:
        """Buries the dead. Their process groups are killed while they are zombies: the number is still theirs."""
        while self.children:
            if hasattr(os, "waitid"):
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if dead is None:
                    return
                _kill_group(dead.si_pid)
                pid, status = os.waitpid(dead.si_pid, 0)
            else:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)      # the group's number is taken as long as anybody is in it
            child = self.children.pop(pid, None)
            if child is not None:
                self._ended(child, os.waitstatus_to_exitcode(status))

    def _ended(self, child: _Child, status: int) -> None:
        for stream in (1, 2):
            if (child, stream) in self.paused:      # its last words are to be read, whoever waits for them
                self.paused.remove((child, stream))
                self._hear(child, stream)
            while (child.words if stream == 2 else child.out) >= 0 and self._read_output(child, stream, True):
                pass
        for stream in (1, 2):
            self._close_output(child, stream)       # a child of its own may hold the pipe open
        if child.slot is not None:
            child.slot.release()
            child.slot = None
        if child.role == "dispatcher":
            self._dispatcher_ended(child, status)
            return
        dispatcher = self.dispatchers.get(child.job)
        if dispatcher is not None:
            words = child.tail.decode(errors="replace")
            if child.role == "command":
                said = child.said.decode(errors="replace")
                self._command_ended(dispatcher, child.launch[0], child.wish, status, words, said)
            else:
                self._report(dispatcher, child.launch, child.pid, status, words)
            self._finish(dispatcher)

    def _dispatcher_ended(self, dispatcher: _Child, status: int) -> None:
        dispatcher.status = status
        now = time.monotonic()          # a command that is submitting a job is let finish, or nobody could cancel it
        self.to_kill += [(now + (CLOSE_TIME if other.wish.get("job") else GRACE), other.pid)
                         for other in self.children.values() if other.job == dispatcher.job and not other.spared]
        self._undo(dispatcher)
        self._finish(dispatcher)

    def _finish(self, dispatcher: _Child) -> None:
        """Once a dispatcher and all that must end with it have ended the host may know."""
        if dispatcher.status is None or any(each[0] is dispatcher for each in self.to_run) or any(
                child.job == dispatcher.job and not child.spared for child in self.children.values()):
            return
        if self.dispatchers.pop(dispatcher.job, None) is None:
            return
        if dispatcher.page is not None:
            free_page(dispatcher.page)
        self._remove_files(dispatcher)
        self._hang_up(dispatcher)
        words = dispatcher.tail.decode(errors="replace")
        self._report_end(dispatcher.job, dispatcher.pid, dispatcher.status or 0, words)

    def _report_end(self, job: int, pid: int, status: int, words: str) -> None:
        self._tell(self.control, encode_json(Kind.ENDED, {"pid": pid, "status": status, "words": words}, job))

    def _report(self, dispatcher: _Child, launch: tuple[int, int], pid: int, status: int, words: str) -> None:
        if dispatcher.control is not None:
            self._tell(dispatcher.control, encode_json(Kind.ENDED, {
                "slot": launch[0], "serial": launch[1], "pid": pid, "status": status, "words": words}))

    def _kill_due(self) -> None:
        now = time.monotonic()
        for when, pid in self.to_kill:
            if when <= now and pid in self.children:
                _kill_group(pid)
        self.to_kill = [(when, pid) for when, pid in self.to_kill if when > now]


def _dispatch(spec: Mapping[str, Any], nursery: Connection, page: memoryview, host: socket.socket) -> int:
    """A dispatcher's life in a child of the nursery."""
    try:
        dispatcher = Dispatcher(spec, nursery, page)
        dispatcher.adopt_host(Connection(host))
    except OSError as error:        # its last words: no traceback, as it is the URL that is wrong
        print(error.strerror or error, file=sys.stderr, flush=True)
        return 1
    return dispatcher.run()


def _close_all_but(keep: Collection[int]) -> None:
    """Of the descriptors above the standard ones."""
    low = 3
    for fd in sorted({*keep}):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, max_descriptor())


def _execute(wish: Mapping[str, Any], file: int) -> int:
    """In a child of the nursery: becomes another program, as the user would start it."""
    os.dup2(file, 0)
    os.close(file)
    if wish["what"] == UNDO:        # the nursery may end before it, and nobody reads what it says
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_DFL)
    with contextlib.suppress(OSError, KeyError):
        os.chdir(wish["cwd"])
    try:
        os.execvpe(wish["argv"][0], wish["argv"], wish["env"])
    except OSError as error:
        print(f"{wish['argv'][0]}: {error.strerror}", file=sys.stderr, flush=True)
    return 127


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)        # it may not have got as far as its own session


def max_descriptor() -> int:
    """One more than the largest descriptor this process can have open."""
    import resource
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit in (resource.RLIM_INFINITY, -1) or limit > 1 << 20:
        with contextlib.suppress(OSError):
            return max(map(int, os.listdir("/dev/fd"))) + 1
    return min(limit, 1 << 20)


def _local_daemon(spec: Mapping[str, Any], key: str, launch: tuple[int, int], page: memoryview) -> int:
    """A daemon's life in a child of the nursery: in the host's environment, directory, path and limits."""
    import faulthandler
    faulthandler.enable(2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # until there is a task, the page says what is cancelled
    os.environ.clear()
    os.environ.update(spec["env"])
    with contextlib.suppress(OSError):      # it was removed meanwhile: they stay where they are
        os.chdir(spec["cwd"])
    sys.path[:] = spec["path"]
    if spec["nofile"]:
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (spec["nofile"], resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    _here.update(launched=True, slot=Slot(page, launch[0]))
    given = spec["options"]
    stream = advance_stream(tuple(spec["stream"]), launch[1]) if given.get("rs") is None else stream_from_r(given["rs"])
    options = _daemon_options(given, stream)
    if options.output:
        sys.stdout = open(1, "w", buffering=1, errors="backslashreplace", closefd=False)    # noqa: SIM115
    about = {"slot": launch[0], "serial": launch[1], "page": options.autoexit is True}
    try:
        if not about["page"]:
            return _serve_at([spec["url"]], bytes.fromhex(key), about, options, False)
        connection = dial(spec["url"], bytes.fromhex(key), "daemon", about, tlscert=options.cert)
    except (Refused, OSError) as error:
        print(f"mirai: {error}", file=sys.stderr)
        return EX_UNAVAILABLE
    return _Daemon(options).serve(_PageInbox(connection, Slot(page, launch[0])))


def nursery_main(host: int) -> int:
    """The nursery process, its control pipe on descriptor 0."""
    import resource
    for signum in (signal.SIGINT, signal.SIGHUP):       # for the host: it tells us by ending
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())      # the host's thread may have blocked some, for itself
    devnull = os.open(os.devnull, os.O_RDWR)
    while devnull <= 2:             # the host had closed its standard descriptors
        devnull = os.open(os.devnull, os.O_RDWR)
    control = socket.socket(fileno=os.dup(0))
    control.setblocking(False)
    os.dup2(devnull, 0)
    _close_all_but((control.fileno(),))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sweep_runtime_dir()
    if hasattr(gc, "freeze"):
        gc.freeze()
    nursery = Nursery(Connection(control), host)
    become = nursery.run()
    if become is None:
        os._exit(0)         # an interpreter that shuts down would complain of signals from the children just ended
    return become()


def own_source() -> str:
    """This file's text, for those that are sent it."""
    if "__source__" in globals():       # it was sent itself
        return str(globals()["__source__"])
    if not os.path.isfile(__file__):    # in a zip
        return str(globals()["__loader__"].get_source(__name__))
    with open(__file__, encoding="utf-8") as file:
        return file.read()


class NurseryHandle:
    """The host's end: starts the nursery process, asks for dispatchers, hears of their ends. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._jobs = itertools.count(1)
        self._listening: dict[int, Mapping[str, Any]] = {}
        self._ended: dict[int, Mapping[str, Any]] = {}
        import subprocess
        if not sys.executable:
            raise LaunchError("sys.executable is empty, so that no other Python process can be started")
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, *_interpreter_flags(), "-c", _NURSERY_COMMAND, __name__, self._own_path(),
                 str(os.getpid())], stdin=theirs.fileno(), stdout=subprocess.DEVNULL, start_new_session=True)
        self.pid = self.process.pid
        ours.setblocking(False)
        self.connection = Connection(ours)

    def _own_path(self) -> str:
        if "__source__" not in globals() and os.path.isfile(__file__):
            return os.path.abspath(__file__)
        self._file = tempfile.NamedTemporaryFile("w", suffix=".py", encoding="utf-8")    # noqa: SIM115
        self._file.write(own_source())
        self._file.flush()
        return self._file.name

    def start(self, spec: Mapping[str, Any]) -> tuple[int, str, socket.socket]:
        """A dispatcher: its job number, the URL it listens at, and this side's end of the connection to it. LaunchError
        where there will be none."""
        job = next(self._jobs)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._send_with(encode_json(Kind.START, spec, job), theirs.fileno())
            return job, self._await_listening(job), ours
        except BaseException:
            ours.close()
            self.kill(job)
            raise

    def start_direct(self, spec: Mapping[str, Any]) -> tuple[int, str, socket.socket, Dispatcher]:
        """The same in a thread of this process, and itself."""
        job = next(self._jobs)
        file = os.memfd_create("mirai") if hasattr(os, "memfd_create") else _unnamed_file()
        control, theirs = socket.socketpair()
        dispatcher = None
        try:
            os.ftruncate(file, SLOTS * SLOT_SIZE)
            dispatcher = Dispatcher(spec, Connection(control), new_page(file))
            self._send_with(encode_json(Kind.START, spec, job), theirs.fileno(), file)
        except OSError as error:
            if dispatcher is not None:
                dispatcher.close()
            control.close()
            raise LaunchError(str(error.strerror or error)) from None
        finally:
            theirs.close()
            os.close(file)
        ours, host = socket.socketpair()
        dispatcher.adopt_host(Connection(host))
        threading.Thread(target=dispatcher.run, name="mirai-dispatcher", daemon=True).start()
        try:
            self._await_listening(job)
        except BaseException:
            ours.close()        # by which it ends
            raise
        return job, format_url(dispatcher.address), ours, dispatcher

    def _await_listening(self, job: int) -> str:
        self._read_until(lambda: job in self._listening or job in self._ended, START_TIME)
        if job not in self._listening:
            raise LaunchError(f"the dispatcher did not start; {self.describe_end(job, 0.0)}")
        return str(self._listening.pop(job)["url"])

    def _send_with(self, frame: bytes, *fds: int) -> None:
        """A frame, and descriptors."""
        with self._lock:
            socket.send_fds(self.connection.sock, [frame[:1]], fds)
            self._send(frame[1:])

    def kill(self, job: int) -> None:
        with contextlib.suppress(OSError):
            self._send(encode_json(Kind.SIGNAL, {}, job))

    def wait_ended(self, job: int, timeout: float) -> bool:
        """Whether the dispatcher and all its local daemons have ended."""
        self._read_until(lambda: job in self._ended, timeout)
        return job in self._ended or self.connection.ended

    def forget_job(self, job: int) -> None:
        self._ended.pop(job, None)

    def describe_end(self, job: int, timeout: float) -> str:
        self._read_until(lambda: job in self._ended, timeout)
        report = self._ended.get(job)
        if report is None:
            return "the nursery process is gone" if self.connection.ended else "the nursery does not answer"
        who = f"the dispatcher (process {report['pid']})"
        return describe_loss(who, describe_exit(report["status"]), report["words"])

    def _send(self, frame: bytes) -> None:
        with self._lock:
            done = self.connection.send(frame)
            deadline = time.monotonic() + CLOSE_TIME
            while not done and time.monotonic() < deadline:
                wait_ready(self.connection.fileno(), deadline - time.monotonic(), write=True)
                done = self.connection.flush()

    def _read_until(self, done: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not done() and not self.connection.ended:
            left = deadline - time.monotonic()
            if left < 0:
                return
            wait_ready(self.connection.fileno(), min(left, 0.05))     # another thread may read what we wait for
            with self._lock:
                self.connection.receive()
                for message in self.connection.decoder:
                    known = self._listening if message.kind == Kind.LISTENING else self._ended
                    known[message.id] = decode_json(message)

    def alive(self) -> bool:
        if self.connection.ended:
            return False
        with self._lock:
            if wait_ready(self.connection.fileno(), 0):
                self.connection.receive()
        return not self.connection.ended

    def close(self) -> None:
        """Ends the nursery, which ends all that is left, and waits for it."""
        with contextlib.suppress(OSError):
            self.connection.sock.shutdown(socket.SHUT_WR)
        import subprocess
        try:
            self.process.wait(CLOSE_TIME)
        except subprocess.TimeoutExpired:       # it is stopped, say; its dispatchers end the daemons then
            self.process.kill()
            self.process.wait()
        self.connection.close()

    def forget(self) -> None:
        """In a forked child of the host: pipe and process are the parent's."""
        self.connection.close()
        self.process.returncode = 0


def _unnamed_file() -> int:
    file, path = tempfile.mkstemp()
    os.unlink(path)
    return file


def _interpreter_flags() -> list[str]:
    """The host's own interpreter options that the environment does not carry."""
    flags = sys.flags
    options = [("-I", flags.isolated), ("-E", flags.ignore_environment and not flags.isolated),
               ("-s", flags.no_user_site), ("-O", flags.optimize == 1), ("-OO", flags.optimize == 2),
               ("-B", flags.dont_write_bytecode)]
    return [option for option, given in options if given] + (["-X", "utf8"] if flags.utf8_mode else [])


# ======================================================================
# 13. Launchers: what starts daemons on other machines
# ======================================================================
# Knows:  the command lines of ssh and of schedulers, shell scripts; this file's source, and the files of the user's own
#         modules, which daemons elsewhere lack.
# Never:  connections, processes; but for an HTTP request it runs nothing itself.
# Rule:   the key and the source go by standard input, and never in an argument.

Offer = collections.namedtuple("Offer", "urls key options")     # what a daemon needs: where to dial, a key in hex
# what: in words; n: how many daemons it launches; stays: as long as they; job: a pattern of what it prints, for undo
Command = collections.namedtuple("Command", "launcher what argv input n stays job undo", defaults=("", ()))
_launchers = itertools.count(1)

_BOOT = "import sys;exec(sys.stdin.readline())"         # no quotes, and nothing that a shell would look into
_LOADER = """
import sys
if sys.version_info < (3, 9):
    sys.exit("mirai needs Python 3.9 or newer, %s is %s" % (sys.executable, sys.version.split()[0]))
import base64, json, linecache, types, zlib
about, source = [zlib.decompress(base64.b64decode(sys.stdin.readline())).decode() for _ in range(2)]
about = json.loads(about)
module = sys.modules[about["module"]] = types.ModuleType(about["module"])
module.__file__, module.__source__ = "<mirai>", source
linecache.cache["<mirai>"] = len(source), None, source.splitlines(True), "<mirai>"
exec(compile(source, "<mirai>", "exec"), vars(module))
sys.exit(module.serve_launched(about))
"""


@functools.cache
def _packed_source() -> str:
    return _pack(own_source())


def _pack(text: str) -> str:
    import zlib
    return binascii.b2a_base64(zlib.compress(text.encode(), 9), newline=False).decode()


def payload(offer: Offer, launcher: int, n: int) -> str:
    """What a bare `python3 -c BOOT` reads to become n daemons: three lines of plain characters."""
    about = {"module": __name__, "urls": offer.urls, "key": offer.key, "options": offer.options, "launch": launcher,
             "n": n}
    return f"exec({_LOADER!r})\n{_pack(json.dumps(about))}\n{_packed_source()}\n"


def shell_script(python: str, lines: Iterable[str], setup: Any, cwd: str | None, input: str) -> str:
    """For any Bourne shell: `lines`, which may begin with one that says which, then `setup`, then the daemon."""
    import shlex
    head = list(lines)
    if not head or not head[0].startswith("#!"):
        head.insert(0, "#!/bin/sh")
    if cwd is not None:
        head.append(f"cd {shlex.quote(cwd)} || exit")
    return "\n".join([*head, *_lines(setup), f"exec {python} -c '{_BOOT}' <<'MIRAI'", f"{input}MIRAI", ""])


def _lines(text: Any) -> list[str]:
    """Of text, or a sequence of lines; R's way to write them in a script is indented."""
    if isinstance(text, str):
        return [line.strip() for line in text.splitlines() if line.strip()]
    return [str(line) for line in text]


def _words(command: Any) -> list[str]:
    import shlex
    return shlex.split(command) if isinstance(command, str) else [str(word) for word in command]


# -- what a daemon lacks, and its host has

def provide(wish: Mapping[str, Any]) -> bytes:
    """On the host: `{"module": name}`, a zip of a top-level module of the user's; `{"source": hash}`, where a
    definition stands. LookupError says why not."""
    if "module" in wish:
        return _zip_module(str(wish["module"]))
    return json.dumps(_source_of(bytes.fromhex(str(wish["source"])))).encode()


def _zip_module(name: str) -> bytes:
    import zipfile
    files = _project_files(name)
    if not files:
        raise LookupError("")
    if sum(os.path.getsize(path) for _, path in files) > FORWARDED_BYTES:
        raise LookupError(f"the package {name} has more than {FORWARDED_BYTES >> 20} MiB, too much to be sent: install "
                          "it where the daemon runs")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        for inside, path in files:
            if not path.endswith(_EXTENSIONS):
                writer.write(path, inside)
                continue
            module = inside.split(".")[0].replace("/", ".")
            why = (f"{module} is a C extension, which can't be sent to a daemon: install {name} where that runs, with "
                   "its own Python")
            writer.writestr(inside.split(".")[0] + ".py", f"raise ImportError({why!r}, name={module!r})\n")
    return archive.getvalue()


_EXTENSIONS = (".so", ".pyd", ".dylib")


def _project_files(name: str) -> list[tuple[str, str]]:
    """Of a top-level module that is the user's own, neither Python's nor installed: names in an archive, and paths."""
    import importlib.util
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    if spec is None or spec.origin in ("built-in", "frozen"):
        return []
    found = []
    for place in map(os.path.abspath, spec.submodule_search_locations or ()):
        if _is_installed(place):
            continue
        for directory, folders, names in os.walk(place):
            folders[:] = [folder for folder in folders if folder != "__pycache__" and not folder.startswith(".")]
            inside = os.path.normpath(os.path.join(name, os.path.relpath(directory, place))).replace(os.sep, "/")
            found.append((f"{inside}/", directory))         # by which it can be a namespace
            found += [(f"{inside}/{each}", os.path.join(directory, each)) for each in sorted(names)
                      if not each.endswith(".pyc")]
    if spec.origin and not spec.submodule_search_locations and not _is_installed(spec.origin):
        found.append((name + os.path.splitext(spec.origin)[1], spec.origin))
    return found


def _is_installed(path: str) -> bool:
    """With Python, or beside it."""
    import sysconfig
    path = os.path.realpath(path)
    places = {os.path.realpath(place) for place in (*sysconfig.get_paths().values(), os.path.dirname(os.__file__))}
    if os.path.commonpath([path, os.path.realpath(sys.prefix)]) == os.path.realpath(sys.prefix) and (
            os.path.realpath(sys.prefix) != os.path.realpath(os.getcwd())):
        places.add(os.path.join(os.path.realpath(sys.prefix), "lib"))
    return bool({"site-packages", "dist-packages"}.intersection(path.split(os.sep))) or any(
        path.startswith(place + os.sep) for place in places)


def _source_of(hash: bytes) -> dict[str, Any]:
    """Where the code of a definition stands in the text of its file, if compiling that gives this very code."""
    import linecache
    code = next((known.code for known in list(_definition_of.values()) if known.hash == hash), None)
    if code is None:
        raise LookupError("its host does not know it any more")
    text = "".join(linecache.getlines(code.co_filename))
    if not text:
        raise LookupError(f"there is no source of {code.co_name}() at its host, where it was typed in")
    try:
        alike = _codes_at(text, code.co_filename, code.co_name, code.co_firstlineno)
    except (SyntaxError, ValueError):
        alike = []
    number = next((i for i, each in enumerate(alike) if _dump_code(each) == _dump_code(code)), None)
    if number is None:
        raise LookupError(f"the source of {code.co_name}() in {code.co_filename} has changed since it was loaded")
    return {"text": text, "file": code.co_filename, "name": code.co_name, "line": code.co_firstlineno, "number": number,
            "free": code.co_freevars}


# -- the configurations

class ssh_config:
    """Launches daemons by ssh, on machines where key-based login works: `daemons(remote=ssh_config("ssh://node"))`.
    Nothing has to be installed there but Python 3.9 or newer.

    remotes: `"ssh://user@host:port"`, or a name that ssh knows, or a list of them; the daemons are spread over them, by
    one ssh for each. tunnel: the connection to this machine goes through ssh as well, for remotes that cannot reach it;
    the url is on 127.0.0.1. timeout: seconds for ssh to connect. command: ssh, with further options if need be. python:
    on the remote. setup: shell lines to run before it. cwd: a directory there.
    """

    default_n: int

    def __init__(self, remotes: str | Sequence[str], tunnel: bool = False, timeout: float = 10, command: str = "ssh",
                 python: str = "python3", setup: str | Sequence[str] = (), cwd: str | None = None) -> None:
        self.remotes = [_parse_remote(remote) for remote in ([remotes] if isinstance(remotes, str) else remotes)]
        if not self.remotes:
            raise ValueError("remotes is empty: expected 'ssh://user@host:port', or a list of such")
        self.tunnel, self.timeout, self.command = tunnel, timeout, command
        self.python, self.setup, self.cwd = python, setup, cwd
        self.default_n = len(self.remotes)
        self.patience, self.must_join = timeout + START_TIME, True

    def __repr__(self) -> str:
        return f"<ssh_config {', '.join(' '.join(remote) for remote in self.remotes)}>"

    def commands(self, n: int, offer: Offer) -> list[Command]:
        if n < len(self.remotes):
            raise ValueError(f"n={n} daemons on {len(self.remotes)} remotes: expected one for each at least")
        found = []
        for i, remote in enumerate(self.remotes):
            launcher, share, forward, urls = next(_launchers), len(range(i, n, len(self.remotes))), [], offer.urls
            if self.tunnel:
                address = parse_url(offer.urls[0])
                port = random.SystemRandom().randrange(20000, 32000)        # two tunnels may meet on one remote
                forward = ["-R", f"127.0.0.1:{port}:127.0.0.1:{address.port}"]
                urls = [format_url(address._replace(port=port))]
            options = ("BatchMode=yes", "ExitOnForwardFailure=yes", f"ConnectTimeout={math.ceil(self.timeout)}",
                       "ServerAliveInterval=10", "ServerAliveCountMax=3")
            argv = [*_words(self.command), "-T", *itertools.chain.from_iterable(("-o", option) for option in options),
                    *forward, *remote, "exec /bin/sh -s"]
            script = shell_script(self.python, (), self.setup, self.cwd, payload(offer._replace(urls=urls), launcher,
                                                                                 share))
            found.append(Command(launcher, f"ssh {remote[-1]}", argv, script, share, True))
        return found


def _parse_remote(remote: str) -> list[str]:
    """As arguments of ssh."""
    rest = remote[6:] if remote.startswith("ssh://") else remote
    rest = rest.rstrip("/")
    host, separator, port = rest.rpartition(":")
    if not separator or not port.isdigit() or (":" in host and not host.endswith("]")):
        host, port = rest, ""
    user, separator, name = host.rpartition("@")
    name = name.strip("[]")
    if not name or (user or name).startswith("-") or "/" in name or any(map(str.isspace, rest)):
        raise ValueError(f"{remote!r}: expected 'ssh://user@host:port', or a name that ssh knows")
    return [*(["-p", port] if port else []), f"{user}{separator}{name}"]


_Scheduler = collections.namedtuple("_Scheduler", "array lines job undo")       # {n}: how many; {}: the job
_SCHEDULERS = {
    "sbatch": _Scheduler(("--parsable", "--array=1-{n}"), ("#SBATCH --output=/dev/null",), r"(\d+)", ("scancel", "{}")),
    "SGE": _Scheduler(("-terse", "-t", "1-{n}"), ("#$ -S /bin/sh", "#$ -o /dev/null", "#$ -j y"), r"(\d+)",
                      ("qdel", "{}")),
    "PBS": _Scheduler(("-J", "1-{n}"), ("#PBS -o /dev/null", "#PBS -j oe"), r"(\S+)", ("qdel", "{}")),
    "bsub": _Scheduler(("-J", "mirai[1-{n}]"), ("#BSUB -o /dev/null",), r"<(\d+)>", ("bkill", "{}")),
}
_OF_A_JOB = ("SLURM_", "SBATCH_", "SRUN_", "PMI", "PMIX_", "PBS_", "LSB_", "LSF_JOB", "SGE_TASK_", "JOB_ID", "JOB_NAME")
_OF_THE_SITE = ("SLURM_CONF", "PBS_CONF_FILE", "PBS_SERVER", "PBS_EXEC", "PBS_HOME", "PBS_DEFAULT")


def outer_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Without what a batch job that this process is part of has there: daemons would take themselves for its steps."""
    return {name: value for name, value in environ.items() if name != "MIRAI_KEY" and (
        name in _OF_THE_SITE or not name.startswith(_OF_A_JOB))}


class cluster_config:
    """Launches daemons as one array job of a scheduler: `daemons(100, remote=cluster_config("sbatch"))`. They join as
    the jobs start; `daemons(0)`, or the end of the host, cancels what is left.

    command: `"sbatch"` (Slurm), `"qsub"` (SGE, PBS) or `"bsub"` (LSF), with further options if need be; `"ssh login
    sbatch"` works as well. options: lines of the job script, as `"#SBATCH --mem=10G"`; what jobs print is dropped
    unless they say where to. python, cwd: as the jobs' machines have them. setup: shell lines to run before, as
    `"module load python"`.
    """

    default_n, patience, must_join = 1, START_TIME, False

    def __init__(self, command: str = "sbatch", options: str | Sequence[str] = "", python: str = "python3",
                 setup: str | Sequence[str] = (), cwd: str | None = None) -> None:
        self.command, self.options, self.python, self.setup, self.cwd = command, options, python, setup, cwd
        names = [os.path.basename(word) for word in _words(command)]
        self.at = next((i for i, name in enumerate(names) if name in ("sbatch", "qsub", "bsub")), -1)
        self.kind = names[self.at] if names else ""
        if self.kind == "qsub":
            given = "\n".join(_lines(options))
            sge = "SGE_ROOT" in os.environ or any(os.access(os.path.join(path, "qconf"), os.X_OK)
                                                  for path in os.get_exec_path())
            self.kind = "PBS" if "#PBS" in given or not (sge or "#$" in given) else "SGE"
        if self.kind not in _SCHEDULERS:
            raise ValueError(f"command={command!r}: expected sbatch, qsub or bsub, with their options; remote_config() "
                             "is for others")

    def __repr__(self) -> str:
        return f"<cluster_config {self.command}>"

    def commands(self, n: int, offer: Offer) -> list[Command]:
        launcher, scheduler, argv = next(_launchers), _SCHEDULERS[self.kind], _words(self.command)
        array = () if self.kind == "PBS" and n == 1 else scheduler.array       # there is no array of one
        head, input = self._head(scheduler.lines), payload(offer, launcher, 1)
        script = shell_script(self.python, head, self.setup, self.cwd, input)
        name = argv[self.at]
        undo = [*argv[:self.at], os.path.join(os.path.dirname(name), scheduler.undo[0]), *scheduler.undo[1:]]
        return [Command(launcher, name, [*argv, *(part.format(n=n) for part in array)], script, n, False,
                        scheduler.job, undo)]

    def _head(self, lines: Iterable[str]) -> list[str]:
        given = _lines(self.options)
        shell, given = (given[:1], given[1:]) if given and given[0].startswith("#!") else (["#!/bin/sh"], given)
        return [*shell, *lines, *given]


class remote_config:
    """Launches daemons by any other command that runs one elsewhere and passes its standard input on: `srun`,
    `docker run -i`, `kubectl run -i`.

    command: the program; None launches nothing. args: its arguments, `"."` where the daemon's command goes; a list of
    such sequences launches by each of them in turn. python: there. quote: the daemon's command is one argument, quoted
    for a shell, as ssh needs it.
    """

    patience, must_join = 10.0, False

    def __init__(self, command: str | None = None, args: Sequence[Any] = ("", "."), python: str = "python3",
                 quote: bool = False) -> None:
        self.command, self.python, self.quote = command, python, quote
        several = not isinstance(args, str) and any(not isinstance(each, str) for each in args)
        each = args if several else [_words(args)]
        self.args = [list(arguments) for arguments in each]
        for arguments in self.args:
            if "." not in arguments:
                raise ValueError(f"args={args!r}: expected '.' among them, where the daemon's command goes")
        self.default_n = len(self.args)

    def __repr__(self) -> str:
        return f"<remote_config {self.command}>"

    def commands(self, n: int, offer: Offer) -> list[Command]:
        import shlex
        words = [*_words(self.python), "-c", _BOOT]
        found = []
        for i in range(n):
            launcher, argv = next(_launchers), _words(self.command or "")
            for arg in self.args[i % len(self.args)]:
                argv += _words(arg) if arg != "." else [shlex.join(words)] if self.quote else words
            found.append(Command(launcher, argv[0], argv, payload(offer, launcher, 1), 1, True))
        return found


class http_config:
    """Launches daemons through an HTTP API that runs shell commands elsewhere, one request a daemon.

    url: of the API. method, headers (a mapping), cookie, token (sent as `Authorization: Bearer`): of the request. data:
    its body, with `%s` where the daemon's command goes, quoted for JSON; or a function of the command. Any of them may
    be a function, called at the launch. The command is a secret: it holds the profile's key.
    """

    default_n, patience, must_join = 1, 0.0, False

    def __init__(self, url: Any, method: Any = "POST", headers: Any = None, data: Any = None, cookie: Any = None,
                 token: Any = None, python: str = "python3", timeout: float = 10) -> None:
        self.url, self.method, self.headers, self.data = url, method, headers, data
        self.cookie, self.token = cookie, token
        self.python, self.timeout = python, timeout

    def __repr__(self) -> str:
        return "<http_config>"

    def commands(self, n: int, offer: Offer) -> list[Command]:
        """Nothing is left to be run: who awaits them is told to."""
        found = []
        for _ in range(n):
            launcher = next(_launchers)
            self._request(shell_script(self.python, (), (), None, payload(offer, launcher, 1)))
            found.append(Command(launcher, "http", [], "", 1, False))
        return found

    def _request(self, command: str) -> None:
        import urllib.error
        import urllib.request

        class Stay(urllib.request.HTTPRedirectHandler):
            """What is sent has a key and a token in it, which are for nobody else."""

            def redirect_request(self, *_: Any) -> None:
                return None
        url, method, headers, cookie, token = [value() if callable(value) else value for value in (
            self.url, self.method, self.headers, self.cookie, self.token)]
        quoted = json.dumps(command)[1:-1]
        body = self.data(command) if callable(self.data) else str(self.data or "%s").replace("%s", quoted)
        request = urllib.request.Request(url, body.encode() if isinstance(body, str) else body, dict(headers or {}),
                                         method=method)
        if cookie:
            request.add_header("Cookie", cookie)
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.build_opener(Stay).open(request, timeout=self.timeout) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            words = error.read(LAST_WORDS).decode(errors="replace")
            raise LaunchError(describe_loss(url, f"answered {error.code} {error.reason}", words)) from None
        except OSError as error:
            raise LaunchError(f"{url} can't be reached: {error}") from None


# ======================================================================
# 14. Mirai: the future
# ======================================================================
# Knows:  outcomes, waiting threads and event loops; its owner, which will resolve it: a lock that all its mirais
#         share, and what else a `Link` says that a mirai asks for.
# Never:  profiles, wire, processes.      Thread: any.
# Rule:   resolves once; the outcome is kept as bytes until somebody looks at it.


class Mirai(FutureOfAny):
    """A future for one task: a `concurrent.futures.Future` that can be awaited, and R's mirai.

    R's surface never raises for a task that failed: `m.data` is the value, an `ErrorValue`, or `UNRESOLVED`;
    `m[:]` waits for it. Python's surface does: `m.result(timeout=None)`, `m.exception(timeout=None)`, `await m`
    raise the task's own exception from a `MiraiError` that has the daemon's traceback.
    """

    # A stock Future costs seven times as much to make: here the state is the class's until it changes, the
    # condition is the owner's lock (to be held is all that is left for it to do), and the lists for waiters and
    # callbacks are made when first touched.
    _state = _futures.PENDING
    _outcome: bytes | None = None       # as it came, until somebody looks
    _value: Any = UNRESOLVED            # the value or the error value, once looked at
    _failed = False
    needs: tuple[bytes, ...] = ()       # definitions that its task refers to; the owner's
    size = 0                            # bytes of its task; the owner's
    __iter__ = None                     # `m[:]` would otherwise make it iterable, for ever

    def __init__(self, id: int, owner: Any) -> None:
        self.id = id
        self._owner = owner

    @property
    def _condition(self) -> Any:    # type: ignore[override]
        return self.__dict__.get("_watch") or self.__dict__.setdefault("_watch", threading.RLock())

    def __getattr__(self, name: str) -> Any:
        """Only for what `Future.__init__` would have made."""
        if name in ("_waiters", "_done_callbacks"):
            made = self.__dict__.setdefault(name, [])
            self._owner.watched(name == "_done_callbacks")
            return made
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # -- resolving, by the owner

    def settle(self, outcome: bytes | ErrorValue | tuple[Any, bool]) -> bool:
        """Resolves it, the owner's lock held; False where it had resolved. Runs no user code."""
        if self._state is not _futures.PENDING:
            return False
        if isinstance(outcome, bytes):
            self._outcome, self._failed = outcome, outcome.startswith(FAILURE)
        elif isinstance(outcome, tuple):
            self._value, self._failed = outcome
        else:
            self._value, self._failed = outcome, True
        cancelled = isinstance(outcome, MiraiCancelled)
        self._state = _futures.CANCELLED_AND_NOTIFIED if cancelled else _futures.FINISHED
        if "_watch" in self.__dict__:
            with self._condition:
                self._tell(cancelled)
        return True

    def _tell(self, cancelled: bool) -> None:
        mine = self.__dict__
        for waiter in mine.get("_waiters", ()):
            (waiter.add_cancelled if cancelled else waiter.add_exception if self._failed else waiter.add_result)(self)
        if mine.get("_done_callbacks"):
            self._owner.call_back(self._run_callbacks)

    def _run_callbacks(self) -> None:
        for callback in self._done_callbacks:
            try:
                callback(self)
            except BaseException:       # a SystemExit as well: the thread is needed by others
                _futures.LOGGER.exception("exception calling callback for %r", self)

    def _look(self) -> Any:
        """The value or error value of a resolved mirai. Whoever is first rebuilds it, outside the lock: that runs
        user code; of two at once the first to finish decides."""
        outcome = self._outcome
        if outcome is not None:
            value, success = load_outcome(outcome)
            with self._owner.lock:
                if self._outcome is not None:
                    self._value, self._failed = value, not success
                    self._outcome = None
        return self._value

    # -- R's surface

    @property
    def data(self) -> Any:
        """The value, the error value, or `UNRESOLVED`; never waits, never raises for a task that failed."""
        return self._look() if self.done() else UNRESOLVED

    def __getitem__(self, key: slice) -> Any:
        """`m[:]` waits for the value or the error value."""
        if key != slice(None):
            raise TypeError("a mirai has one value: m[:] waits for it")
        if not self.done():
            self._owner.wait(self, None)
        return self._look()

    def __repr__(self) -> str:
        return f"<mirai {self.id}: {'resolved' if self.done() else 'unresolved'}>"

    # -- Python's surface

    def done(self) -> bool:
        return self._state is not _futures.PENDING

    def cancelled(self) -> bool:
        return self._state == _futures.CANCELLED_AND_NOTIFIED

    def set_result(self, result: Any) -> NoReturn:
        raise concurrent.futures.InvalidStateError("a mirai is resolved by its task alone")

    set_exception = set_running_or_notify_cancel = set_result      # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a mirai stays in the process that made it: send its value, m.result()")

    def running(self) -> bool:
        """False: where a task is in the queue, the host does not ask."""
        return False

    def cancel(self) -> bool:
        """Resolves it as `MiraiCancelled` at once and interrupts the task; False where it had resolved before."""
        return bool(self._owner.cancel(self, MiraiCancelled("cancelled")))

    def _settled(self, timeout: float | None) -> Any:
        """Waits, then the value or error value; a cancelled one raises, as `Future` does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if not self.done() and not self._owner.wait(self, deadline):
            raise concurrent.futures.TimeoutError(f"mirai {self.id} did not resolve within {timeout} s")
        value = self._look()
        if isinstance(value, MiraiCancelled) and self._failed:
            raise value.with_traceback(None)
        return value

    def result(self, timeout: float | None = None) -> Any:
        """The value; raises what the task raised. `timeout`: seconds to wait (None: no limit), then TimeoutError."""
        value = self._settled(timeout)
        if not self._failed:
            return value
        original = getattr(value, "original", None)
        if original is None:
            asyncio = sys.modules.get("asyncio")        # too slow an import to be ours
            if asyncio is not None and asyncio.TimeoutError not in MiraiTimeout.__mro__:    # until 3.10, a class apart
                MiraiTimeout.__bases__ += (asyncio.TimeoutError,)
            raise value.with_traceback(None)
        raise original.with_traceback(None) from value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What `result()` would raise, None where it would not; a cancelled one raises `MiraiCancelled`."""
        value = self._settled(timeout)
        if not self._failed:
            return None
        original: BaseException | None = getattr(value, "original", None)
        if original is None:
            return value            # type: ignore[no-any-return]
        original.__cause__ = value
        return original

    def __await__(self) -> Generator[Any, None, Any]:
        """Waits on the running event loop, which reads the socket itself; its being cancelled cancels the task."""
        if not self.done():
            yield from self._await()
        return self.result()

    def _await(self) -> Generator[Any, None, None]:
        import asyncio
        loop = asyncio.get_running_loop()
        waiter = _LoopWaiter(loop)
        with self._condition:
            if self.done():
                return
            self.__dict__.setdefault("_waiters", []).append(waiter)
        self._owner.add_loop(loop)
        try:
            yield from waiter.future
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._owner.remove_loop(loop)


class Block:
    """The outcomes of consecutive items of a map; a Mirai is made of those that somebody looks at. An outcome is None,
    then as it came (bytes, or an error value), then a value and whether it is an error value, once looked at."""

    def __init__(self, id: int, n: int, owner: Any, on_value: Any = None, on_error: Any = None) -> None:
        self.id, self.owner = id, owner
        self.outcomes: list[Any] = [None] * n
        self.left = n or 1              # unresolved; of a call whose answers are not yet counted there is one
        self.mirais: dict[int, Mirai] = {}
        self.waiters: list[_LoopWaiter] = []
        self.promise = on_value, on_error
        self.promised = on_value is not None or on_error is not None
        self.told = bytearray(n)        # of which items the promise knows
        self.needs: tuple[bytes, ...] = ()
        self.held: tuple[bytes, ...] = ()       # of an `everywhere` call: what daemons to come need
        self.size = 0

    def __len__(self) -> int:
        return len(self.outcomes)

    def failed(self) -> bool:
        """Whether there are error values alone."""
        return all(each[1] if isinstance(each, tuple) else isinstance(each, ErrorValue) or each[:1] == FAILURE
                   for each in self.outcomes)

    def resize(self, n: int) -> None:
        """So many answers there will be, the owner's lock held."""
        self.outcomes, self.told, self.left = [None] * n, bytearray(n), n

    # -- resolving, by the owner

    def settle(self, lo: int, outcomes: Sequence[bytes | ErrorValue]) -> list[bool]:
        """Resolves some, the owner's lock held: which had not resolved. Runs no user code. An interrupt in between,
        after which it is done again, leaves nothing out: what is left is counted anew."""
        old = self.outcomes[lo:lo + len(outcomes)]
        new = [outcome is None for outcome in old]
        if all(new):
            self.outcomes[lo:lo + len(outcomes)] = outcomes
        else:
            for i, outcome in enumerate(outcomes):
                if old[i] is None:
                    self.outcomes[lo + i] = outcome
        for index in range(lo, lo + len(outcomes)) if self.mirais else ():
            if index in self.mirais:
                self.mirais[index].settle(self.outcomes[index])
        self.left = self.outcomes.count(None)
        for waiter in self.waiters:
            waiter.add_result(None)
        if self.promised:
            self.owner.call_back(functools.partial(self._tell, lo, lo + len(outcomes)))
        return new

    def _tell(self, lo: int, hi: int) -> None:
        """Calls the promise for those of these that it does not know of; in the one thread that runs callbacks."""
        for index in range(lo, hi):
            if self.told[index]:
                continue
            self.told[index] = 1
            value, failed = self.look(index)
            callback = self.promise[failed]
            try:
                if callback is not None:
                    callback(value)
            except BaseException:
                _futures.LOGGER.exception("exception calling the promise of item %d", index)

    # -- looking

    def look(self, index: int) -> tuple[Any, bool]:
        """The value of a resolved item and False, or its error value and True. Runs user code, the first time."""
        outcome = self.outcomes[index]
        if isinstance(outcome, tuple):
            return outcome
        m = self.mirais.get(index)
        if m is not None:
            value = m.data
            return value, m._failed
        outcome = _look(outcome)
        with self.owner.lock:
            if not isinstance(self.outcomes[index], tuple):     # of two at once the first to finish decides
                self.outcomes[index] = outcome
            return self.outcomes[index]     # type: ignore[no-any-return]

    def look_all(self) -> list[tuple[Any, bool]]:
        """The same of all, which have resolved."""
        if self.mirais:
            return [self.look(index) for index in range(len(self))]
        before = self.outcomes
        looked = [outcome if isinstance(outcome, tuple) else _look(outcome) for outcome in before]
        with self.owner.lock:
            if self.outcomes is before and not self.mirais:
                self.outcomes = looked
                return looked
        return [self.look(index) for index in range(len(self))]

    def mirai(self, index: int) -> Mirai:
        with self.owner.lock:
            m = self.mirais.get(index)
            if m is None:
                m = self.mirais[index] = _Item(self, index)
                if self.outcomes[index] is not None:
                    m.settle(self.outcomes[index])
            return m


def _look(outcome: bytes | ErrorValue) -> tuple[Any, bool]:
    if not isinstance(outcome, bytes):
        return outcome, True
    value, worked = load_outcome(outcome)
    return value, not worked


class _Item(Mirai):
    """A mirai that is an item of a map."""

    def __init__(self, block: Block, index: int) -> None:
        super().__init__(block.id + index, block.owner)
        self._block, self._index = block, index

    def cancel(self) -> bool:
        return bool(self._owner.cancel_items(self._block, self._index, self._index + 1, MiraiCancelled("cancelled"))[0])


class _LoopWaiter:
    """A waiter, as `concurrent.futures` has them, that wakes an asyncio future."""

    def __init__(self, loop: Any) -> None:
        self.loop, self.future = loop, loop.create_future()
        self.thread = threading.get_ident()

    def add_result(self, _: Any) -> None:
        with contextlib.suppress(RuntimeError):     # that loop was closed, and nobody waits on it any more
            if threading.get_ident() == self.thread:
                self._wake()
            else:
                self.loop.call_soon_threadsafe(self._wake)

    add_exception = add_cancelled = add_result

    def _wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


# ======================================================================
# 15. Link: the host's end of the wire
# ======================================================================
# Knows:  one connection to a dispatcher, the mirais that are under way on it.
# Never:  what daemons are, user code.
# Rule:   whoever waits reads. A thread of the link's own reads where nobody else does, and minds the timeouts.
#         One lock guards all state, and is held for a read that does not wait; sends have their own. Locks are taken
#         by `with` alone, and are C's: what a signal handler raises can fall anywhere else, and leaves none locked.
#         Who reads is only a hint (`reader`, `reads`): two who do so at once are slower, not wrong.

_callbacks: Any = None      # the queue of the one thread that runs callbacks
_starting: Any = threading.RLock()


def _run_callbacks(queue: Any) -> None:
    while True:
        queue.get()()


def _start_callbacks() -> None:
    global _callbacks
    with _starting:
        if _callbacks is None:
            import queue
            jobs: Any = queue.SimpleQueue()
            threading.Thread(target=_run_callbacks, args=(jobs,), name="mirai-callbacks", daemon=True).start()
            _callbacks = jobs


def finish_callbacks() -> None:
    """At the end of the process: those of what has resolved are still called, for a second at most."""
    if _callbacks is not None and threading.current_thread().name != "mirai-callbacks":
        done = threading.Event()
        _callbacks.put(done.set)
        done.wait(EXIT_TIME)


def forget_callbacks() -> None:
    """In a forked child, where that thread is not."""
    global _callbacks, _starting
    _callbacks, _starting = None, threading.RLock()


OVERDUE = "the mirai did not resolve within its _timeout"


def _log(text: str) -> None:
    import logging
    logging.getLogger("mirai").warning("%s", text)


_LOST_AS: dict[str, Any] = {LAUNCH: LaunchError, RESET: MiraiConnectionReset, WITHDRAWN: MiraiCancelled}


class Link:
    """The host's end of its connection to a dispatcher. `describe_end` says how that ended, when it has. `capacity`:
    how many bytes of tasks may be under way."""

    def __init__(self, connection: Connection, describe_end: Callable[[], str], capacity: int | None = None,
                 provide: Callable[[Mapping[str, Any]], bytes] | None = None) -> None:
        self.connection, self.provide = connection, provide
        connection.sock.setblocking(False)
        self.describe_end = describe_end
        self.lock = threading.RLock()
        self.sending = threading.RLock()        # reentrant as well: finalizers and signal handlers may use mirais
        self.signalling = threading.RLock()     # innermost: a mirai's waiters come while they hold its condition
        self.writing = threading.RLock()        # to this process's own output
        self.pending: dict[int, Any] = {}       # mirais, and blocks of a map's items, by the first id
        self.blocks: dict[int, Block] = {}      # the latter alone
        self.capacity, self.used, self.peak = capacity, 0, 0
        self.outputs: deque[tuple[int, bytes]] = deque()        # what tasks wrote, until it is written here
        self.written: tuple[int, bytes] | None = None           # of them the last that was begun
        self.deadlines: list[tuple[float, int]] = []
        self.ahead: dict[bytes, list[int]] = {}     # definitions that are there -> tasks that need it, its size
        self.unneeded: dict[bytes, None] = {}       # those that no task needs now, the longest first
        self.unneeded_bytes = 0
        self.spared = b""
        self.counts = (0, 0, 0, 0, 0)
        self.completed = 0
        self.launch_error: str | None = None    # why launching was given up
        self.launched: dict[int, Mapping[str, Any]] = {}        # what has become of launchers
        self.closed: str | None = None          # why the link takes no more tasks
        self.reads = 0                          # grows with each read by a waiter: the thread can doze
        self.reader = 0                         # the waiting thread that reads
        self.sleepers: dict[Any, Callable[[], bool]] = {}       # who waits while another reads: a held lock, for what
        self.loops: dict[Any, int] = {}         # event loops that read, and for how many waiters
        self.eager = False                      # somebody depends on the thread's reading
        self.prompt = threading.Event()         # ends its doze
        self.nudged, self.nudge = os.pipe()     # ends its poll
        self.wakened, self.waken = os.pipe()    # ends a waiter's poll
        for fd in (self.nudged, self.nudge, self.wakened, self.waken):
            os.set_blocking(fd, False)
        self.closing = False
        self.released = False                   # the descriptors are closed: their numbers may be somebody else's
        self.thread = threading.Thread(target=self._mind, name="mirai-link", daemon=True)
        self.thread.start()

    # -- sending

    def submit(self, m: Mirai | Block, task: Task, retries: int, timeout: float | None, call: bool = False,
               wait: bool = True) -> bool:
        """Sends a task (for a block a unit of them, or an `everywhere` call), and what it needs before it;
        MiraiConnectionReset where the dispatcher is gone. False where there is no room for it, and it is not to wait
        for some."""
        kind = Kind.EVERYWHERE if call else Kind.UNIT if isinstance(m, Block) else Kind.TASK
        if self.closed is not None:
            raise MiraiConnectionReset(self.closed)
        deadline = None if timeout is None else time.monotonic() + float(timeout)
        if not self._reserve(m, task, wait, deadline):
            if wait:
                with self.lock:
                    self._settle_overdue(m)
            return wait
        try:
            self.pending[m.id] = m
            if isinstance(m, Block):
                self.blocks[m.id] = m
            if task.needs:
                self._send_ahead(m, task.needs)
            self._send(encode_task(kind, m.id, task.parts, task.needs, retries))
        except BaseException:
            self._forget(m)
            raise
        if deadline is not None:
            with self.lock:
                if len(self.deadlines) > 2 * len(self.pending) + 64:        # mostly of what has resolved
                    self.deadlines = sorted(entry for entry in self.deadlines if entry[1] in self.pending)
                heapq.heappush(self.deadlines, (deadline, m.id))
                first = self.deadlines[0][1] == m.id
            if first:
                self._prompt()
        return True

    def _settle_overdue(self, m: Mirai | Block) -> None:
        """It has waited for room until its deadline."""
        if isinstance(m, Block):
            m.settle(0, [MiraiTimeout(OVERDUE) for _ in range(len(m))])
        else:
            m.settle(MiraiTimeout(OVERDUE))

    def _reserve(self, m: Mirai | Block, task: Task, wait: bool, deadline: float | None) -> bool:
        """Room for a task in the budget, which one alone may exceed; False where there is none, and none comes."""
        size = sum(map(len, task.parts))
        for hash, blob in task.needs.items() if self.capacity is not None else ():
            if hash not in self.ahead:
                size += len(blob) if type(blob) is bytes else sum(map(len, blob))
        while True:
            with self.lock:
                used = self.used + size
                if self.capacity is None or not self.used or used <= self.capacity:
                    m.size, self.used = size, used
                    if used > self.peak:
                        self.peak = used
                    return True
            if not wait:
                return False
            room = self.wait_for(lambda: not self.used or self.used + size <= (self.capacity or 0), deadline)
            if self.closed is not None:
                raise MiraiConnectionReset(self.closed)
            if not room:
                return False

    def _send_ahead(self, m: Mirai | Block, needs: Mapping[bytes, Any]) -> None:
        """Notes that a task needs these definitions, and sends those that are not there. Counted first and noted
        after: an interrupt in between keeps one for longer, and drops none too early."""
        for hash, blob in needs.items():
            with self.lock:
                held = self._count_need(hash)
                m.needs = (*m.needs, hash)
            if held[1]:
                continue
            with self.sending:
                if not held[1]:
                    frame = encode_parts(Kind.DEFINE, [hash, blob] if type(blob) is bytes else [hash, *blob])
                    self._send(frame)
                    held[1] = len(frame)

    def _forget(self, m: Mirai | Block) -> bool:
        """It is under way no more; definitions that it alone needed may go, the longest unneeded first. The last large
        one stays, whatever its size: else each of a row of tasks would have it sent anew."""
        with self.lock:
            if self.pending.pop(m.id, None) is None:
                return False
            self.blocks.pop(m.id, None)
            self.used -= m.size
            over = m.held if isinstance(m, Block) and m.held and m.failed() else ()      # it will not be replayed
            for hash in (*m.needs, *over):
                held = self.ahead[hash]
                held[0] -= 1
                if not held[0]:
                    self.unneeded[hash] = None
                    self.unneeded_bytes += held[1]
                    self.spared = hash if held[1] >= LARGE else self.spared
            if self.unneeded_bytes > KEPT_DEFINITIONS:
                self._drop_unneeded()
            return True

    def _drop_unneeded(self) -> None:
        spare = self.ahead[self.spared][1] if self.spared in self.unneeded else 0
        dropped = []
        for hash in [hash for hash in self.unneeded if hash != self.spared]:
            if self.unneeded_bytes - spare <= KEPT_DEFINITIONS:
                break
            del self.unneeded[hash]
            self.unneeded_bytes -= self.ahead.pop(hash)[1]
            dropped.append(hash)
        if dropped:
            self.connection.leave(encode(Kind.DROP, 0, b"".join(dropped)))

    def _send(self, frame: bytes) -> None:
        with self.sending:
            try:
                done = self.connection.send(frame)
                while not done:     # as long as it takes: a dispatcher that is stopped is slow, not dead
                    wait_ready(self.connection.fileno(), None, write=True)
                    done = self.connection.flush()
            except OSError:
                self._end()
                raise MiraiConnectionReset(self.closed) from None

    def withdraw(self, mirais: Iterable[Mirai]) -> None:
        """Cancels those that no daemon has been given yet."""
        with contextlib.suppress(MiraiConnectionReset):
            self._send(encode(Kind.WITHDRAW, payload=b"".join([ID.pack(m.id) for m in mirais])))

    def hold(self, call: Block, needs: Mapping[bytes, Any]) -> None:
        """Definitions that are to stay: daemons to come will need them."""
        with self.lock:
            for hash in needs:
                self._count_need(hash)
            call.held = tuple(needs)

    def _count_need(self, hash: bytes) -> list[int]:
        held = self.ahead.setdefault(hash, [0, 0])
        held[0] += 1
        if hash in self.unneeded:
            del self.unneeded[hash]
            self.unneeded_bytes -= held[1]
        return held

    def end_daemons(self) -> None:
        """Those too that would wait for a next host."""
        self._send(encode(Kind.END))

    def launch(self, n: int, spec: Mapping[str, Any]) -> None:
        self.launch_error = None
        self._send(encode_json(Kind.LAUNCH, {"n": n, "spec": spec}))

    def command(self, command: Command, wish: Mapping[str, Any]) -> None:
        """Has daemons launched elsewhere, or just awaited where there is nothing to run."""
        self.launch_error = None
        self._send(encode_json(Kind.COMMAND, {**wish, **command._asdict()}, command.launcher))

    # -- reading

    def _read(self) -> None:
        """Takes what is there, without waiting. No user code runs here."""
        with self.lock:
            if self.closed is None and (self.connection.receive() or self.connection.ended):
                self._take()
        while self.outputs:
            self.write_outputs()
            self._take()
        if self.reader not in (0, threading.get_ident()):
            self._signal(self.waken)        # it sleeps in `poll`, and what it sleeps for may just have been taken

    def _take(self) -> None:
        pending, result = self.pending, Kind.RESULT
        with self.lock:
            for message in self.connection.decoder:
                if self.outputs:            # to be written before what comes behind it
                    break
                if message[0] == result:
                    m = pending.get(message[1])
                    if m is not None:
                        self._resolve(m, message[3])
                else:
                    self._take_notice(message)
            if self.connection.ended and not self.outputs:
                self._end()
            if self.sleepers:
                self._wake_sleepers()

    def _take_notice(self, message: Message) -> None:
        """What is no result of a single task."""
        m, kind = self.pending.get(message.id), message.kind
        if kind == Kind.RESULTS and m is not None:
            _, lo, n, _ = RESULTS_HEAD.unpack_from(message.payload)
            self._resolve_items(m, lo, split_apart(message.payload, n, RESULTS_HEAD.size))
        elif kind == Kind.COUNTS:
            self.counts = COUNTS.unpack(message.payload)
        elif kind == Kind.NO_LAUNCH:
            self.launch_error = decode_json(message)["text"]
        elif kind == Kind.WANT:
            with contextlib.suppress(RuntimeError):     # the interpreter is ending
                threading.Thread(target=self._give, args=(message,), name="mirai-give", daemon=True).start()
        elif kind == Kind.LAUNCHED:
            self.launched[message.id] = decode_json(message)
        elif kind == Kind.NOTICE:
            with contextlib.suppress(RuntimeError):     # the interpreter is ending
                _start_callbacks()
            self.call_back(functools.partial(_log, decode_json(message)["text"]))
        elif kind == Kind.OUTPUT:
            self.outputs.append((message.flags, message.payload))
        elif kind == Kind.SIZED and m is not None:
            m.resize(RANGE.unpack(message.payload)[1])
        elif kind == Kind.LOST and m is not None:
            report = decode_json(message)
            error = _LOST_AS[report["how"]]
            if isinstance(m, Block):
                self._resolve_items(m, report["lo"], [error(report["text"]) for _ in range(report["lo"], report["hi"])])
            else:
                self._resolve(m, error(report["text"]))

    def _give(self, message: Message) -> None:
        """Answers what a daemon asks for, in a thread of its own: it may have to be read from files."""
        try:
            if self.provide is None:
                raise LookupError("")
            answer = GIVEN + self.provide(decode_json(message))
        except LookupError as error:
            answer = MISSING + str(error.args[0] if error.args else "").encode()
        except Exception as error:      # files that can't be read
            answer = MISSING + f"its host can't send it: {type(error).__name__}: {error}".encode()
        with contextlib.suppress(MiraiConnectionReset):
            self._send(encode(Kind.GIVE, message.id, answer))

    def _wake_sleepers(self) -> None:
        """Those whose wait is over, the lock held."""
        for gate, done in list(self.sleepers.items()):
            if done() or self.closed is not None:
                self._let_go(gate)

    def _let_go(self, gate: Any) -> None:
        """Released first and forgotten after: an interrupt in between leaves nobody asleep."""
        if gate.locked():
            gate.release()
        self.sleepers.pop(gate, None)

    def _resolve(self, m: Mirai, outcome: bytes | ErrorValue) -> bool:
        """Settled first and forgotten after: an interrupt in between repeats it, which changes nothing."""
        settled = m.settle(outcome)
        if self._forget(m):
            self.completed += 1
        return settled

    def _resolve_items(self, block: Block, lo: int, outcomes: Sequence[bytes | ErrorValue]) -> list[bool]:
        new = block.settle(lo, outcomes)
        self.completed += sum(new)
        if not block.left:
            self._forget(block)
        return new

    def unresolved(self) -> int:
        """How many tasks are under way."""
        with self.lock:
            return len(self.pending) - len(self.blocks) + sum([block.left for block in self.blocks.values()])

    def _end(self) -> None:
        """The connection is gone, and with it what was under way."""
        with self.lock:
            if self.closed is None:
                self.closed = (f"the connection to the dispatcher has ended: {self.describe_end()}; "
                               "daemons(n) sets new ones")
            for m in list(self.pending.values()):
                if isinstance(m, Block):
                    self._resolve_items(m, 0, [MiraiConnectionReset(self.closed) for _ in m.outcomes])
                    self._forget(m)
                else:
                    self._resolve(m, MiraiConnectionReset(self.closed))
            self.counts = (0, *self.counts[1:2], 0, 0, self.counts[4])
            self._wake_sleepers()

    # -- waiting

    def wait(self, m: Mirai, deadline: float | None) -> bool:
        return self.wait_for(m.done, deadline)

    def wait_for(self, done: Callable[[], bool], deadline: float | None) -> bool:
        """Blocks until `done()`, which the arrival of a message makes true; says whether it is."""
        me = threading.get_ident()
        while not done():
            if self.closed is not None:
                with self.lock:         # what was under way is being resolved
                    return done()
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if self.reader not in (0, me):
                self._sleep_until(done, deadline)
                continue
            self.reader = me
            try:
                self._read_until(done, deadline)
            finally:
                self.reader = 0
                self._hand_over()
        return True

    def write_outputs(self) -> None:
        """Writes here what tasks wrote; whoever reads does so before it takes what came after it, holding no lock that
        others need."""
        with self.writing:
            while self.outputs:
                entry = self.outputs[0]
                file = sys.stdout if entry[0] == 1 else sys.stderr
                if self.written is not entry:       # else it is being written, by a stream that waits for mirais
                    self.written = entry
                    with contextlib.suppress(Exception):    # closed, none, or the user's own: results come all the same
                        file.write(entry[1].decode())
                        file.flush()
                if self.outputs and self.outputs[0] is entry:
                    self.outputs.popleft()

    def _read_until(self, done: Callable[[], bool], deadline: float | None) -> None:
        if self.connection.decoder.chunks or self.outputs:
            self._read()                # what an interrupted reader left behind
            if self.connection.decoder.chunks:
                self._take()
        for _ in range(SPINS if len(self.pending) < MANY else 0):
            self._read()
            self.reads += 1
            if done() or self.closed is not None:
                return
            _yield()
        poller = Poller(self.connection.fileno(), self.wakened)
        while not done() and self.closed is None:
            ready = poller.wait(None if deadline is None else deadline - time.monotonic())
            self.reads += 1
            if not ready:
                return
            if self.wakened in ready:
                self._drain(self.wakened)
            elif len(self.pending) >= MANY:
                time.sleep(NAP)
            self._read()

    def _sleep_until(self, done: Callable[[], bool], deadline: float | None) -> None:
        """Another reads: sleeps until it has taken what we wait for, or has left the reading to us."""
        gate = threading.Lock()
        gate.acquire()
        with self.lock:
            if done() or not self.reader:
                return
            self.sleepers[gate] = done
        try:
            left = WAIT_MOST if deadline is None else min(deadline - time.monotonic(), WAIT_MOST)
            gate.acquire(timeout=max(0.0, left))
        finally:
            self.sleepers.pop(gate, None)

    def _hand_over(self) -> None:
        """A reader has left: one of those asleep reads on."""
        if self.sleepers:
            with self.lock:
                for gate in list(self.sleepers)[:1]:
                    self._let_go(gate)

    def _rouse(self) -> None:
        """Something was resolved without a message: all who wait look again."""
        with self.lock:
            self._signal(self.waken)
            self._wake_sleepers()

    def _signal(self, fd: int) -> None:
        with self.signalling, contextlib.suppress(BlockingIOError):
            if not self.released:
                os.write(fd, b"!")

    def _drain(self, fd: int) -> None:
        with self.signalling, contextlib.suppress(BlockingIOError):
            if not self.released:
                os.read(fd, 4096)

    # -- the link's own thread

    def _mind(self) -> None:
        """Reads where nobody else does, and expires timeouts. It leaves a waiter (or loop) alone that was reading
        within the last DOZE seconds, and sleeps in `poll` where there is none."""
        dozing, left_at = False, -1
        poller = Poller(self.connection.fileno(), self.nudged)
        self._take()            # what came right behind the handshake, which the socket will not tell of
        while self.closed is None:
            reads, timeout = self.reads, min(self._expire(), self._send_left())
            if dozing and not self.eager:
                self.prompt.wait(min(timeout, DOZE))
                self.prompt.clear()
                dozing = self.reads != reads
                continue
            ready = poller.wait(timeout if timeout < 1e6 else None)
            if self.nudged in ready:
                self._drain(self.nudged)
            if len(ready) > (self.nudged in ready):
                if self.eager or not (self.reader or self.loops) or left_at == self.reads:
                    self._read()
                else:
                    left_at = self.reads    # left to them, unless nothing has come of it by the next time
                dozing = True               # nobody waits for what comes next, or they read it

    def _send_left(self) -> float:
        """Sends what was left to be sent, unless somebody is sending; seconds until that is worth another try."""
        if self.connection.pending and self.sending.acquire(blocking=False):    # here no signal handler can raise
            try:
                self.connection.flush()
            except OSError:
                self._end()
            finally:
                self.sending.release()
        return DOZE if self.connection.pending else math.inf

    def _expire(self) -> float:
        """Resolves what is overdue; seconds until the next is."""
        now = time.monotonic()
        overdue = []
        with self.lock:
            self.eager = self.eager and bool(self.pending)
            while self.deadlines and (self.deadlines[0][0] <= now or self.deadlines[0][1] not in self.pending):
                overdue.append(self.pending.get(heapq.heappop(self.deadlines)[1]))
            left = self.deadlines[0][0] - now if self.deadlines else math.inf
        for m in overdue:
            error = MiraiTimeout(OVERDUE)
            if isinstance(m, Block):
                self.cancel_items(m, 0, len(m), error)
            elif m is not None:
                self.cancel(m, error)
        return left

    def _prompt(self) -> None:
        """The thread is to look again, whatever it is doing."""
        self.prompt.set()
        self._signal(self.nudge)

    # -- what a mirai asks for

    def cancel(self, m: Mirai, error: ErrorValue) -> bool:
        with self.lock:
            if not self._resolve(m, error):
                return False
        self._rouse()
        self._leave_cancel(m.id, 0, 1)
        return True

    def cancel_items(self, block: Block, lo: int, hi: int, error: ErrorValue) -> list[bool]:
        with self.lock:
            new = self._resolve_items(block, lo, [type(error)(*error.args) for _ in range(lo, hi)])
        if any(new):
            self._rouse()
            self._leave_cancel(block.id, lo, hi)
        return new

    def _leave_cancel(self, id: int, lo: int, hi: int) -> None:
        """Not sent here: another thread may be in a long send."""
        self.connection.leave(encode(Kind.CANCEL, id, RANGE.pack(lo, hi)))
        self._prompt()

    def watched(self, callback: bool) -> None:
        if callback:            # now, as an interpreter that ends can start no thread any more
            _start_callbacks()
        if not self.eager:
            self.eager = True
            self._prompt()

    def call_back(self, job: Callable[[], None]) -> None:
        if _callbacks is not None:      # else a forked child's, whose parent runs them
            _callbacks.put(job)

    def add_loop(self, loop: Any) -> None:
        with self.lock:
            count = self.loops[loop] = self.loops.get(loop, 0) + 1
        if count == 1 and self.closed is None:
            try:
                loop.add_reader(self.connection.fileno(), self._read_on_loop)
            except NotImplementedError:         # Windows' default loop: the thread reads
                self.watched(False)

    def remove_loop(self, loop: Any) -> None:
        with self.lock:
            self.loops[loop] -= 1
            if self.loops[loop]:
                return
            del self.loops[loop]
        if not self.released:
            with contextlib.suppress(NotImplementedError):
                loop.remove_reader(self.connection.fileno())
        if self.closing:
            self._close_descriptors()

    def _read_on_loop(self) -> None:
        self.reads += 1
        self._read()

    # -- ending

    def close(self, why: str) -> None:
        """Ends the connection on purpose; what is under way becomes a 19 that says `why`."""
        with self.lock:
            self.closed = self.closed or why
            self._end()
        self._prompt()
        self._rouse()
        with contextlib.suppress(OSError):
            self.connection.sock.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self.thread:
            self.thread.join(CLOSE_TIME)
        with self.sending, self.lock:
            self.closing = True
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        """Once no event loop has them registered: it would take the next socket of that number for ours."""
        if self.released or not all(loop.is_closed() for loop in self.loops):
            return
        with self.signalling:
            self.released = True
            self.connection.close()
            for fd in (self.nudged, self.nudge, self.wakened, self.waken):
                os.close(fd)

    def forget(self) -> None:
        """In a forked child of the host, whose threads and connections stayed behind: nothing comes any more.
        The locks may be held by threads that do not exist here, and are made anew."""
        self.lock, self.sending, self.writing = threading.RLock(), threading.RLock(), threading.RLock()
        self.signalling = threading.RLock()
        self.closed = "the host process was forked; its daemons are its parent's"
        self.loops.clear()
        for m in self.pending.values():
            m.__dict__.pop("_waiters", None)        # their locks may be held by threads that do not exist here
        for block in self.blocks.values():
            block.waiters.clear()
            for m in block.mirais.values():
                m.__dict__.pop("_waiters", None)
        self._end()
        self._close_descriptors()


# ======================================================================
# 16. Profiles: daemons, status, the current profile
# ======================================================================
# Knows:  dispatchers to start, links, the host's environment; in sync mode, how a task is evaluated.
# Never:  scheduling rules, frames.       Thread: any; `_setting` is held while a profile is set or reset.

Info = collections.namedtuple("Info", "connections cumulative awaiting executing completed")

_setting = threading.RLock()
_profiles: dict[str, Any] = {}                  # a _Profile, or a _SyncProfile
_fixed_chunk: list[int | None] = [None]         # how many items of a map to give at once, for those who measure
_ephemeral: list[_Profile] = []                 # the one that runs tasks where no daemons are set
_nursery: list[NurseryHandle] = []              # the one of this process
_current: contextvars.ContextVar[str] = contextvars.ContextVar("mirai_profile", default="default")
_MISSING: Any = object()
_THREAD_LIMITS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS",
                  "VECLIB_MAXIMUM_THREADS")


class _Settings:
    """What every profile has: random streams, of which each of its mirais has the next, where there is a seed; and
    hooks for types that pickle can't carry. `serial`: its own, else those that are registered."""

    def __init__(self, seed: int | None, serial: Any = None) -> None:
        self.seeded = seed is not None
        self._stream = random_stream() if seed is None else seed_stream(seed)
        self._lock = threading.RLock()
        self._registered = None if serial is not None else dict(_registered)
        self._hooks = make_hooks(serial)

    @property
    def hooks(self) -> Hooks | None:
        if self._registered is not None and self._registered != _registered:
            self._hooks, self._registered = make_hooks(None), dict(_registered)
        return self._hooks

    def next_stream(self, n: int = 1) -> Stream | None:
        """The first of the next n; None without a seed."""
        return self.take_stream(n) if self.seeded else None

    def take_stream(self, n: int = 1) -> Stream:
        with self._lock:
            stream = self._stream
            self._stream = advance_stream(stream, n)
            return stream

    def return_stream(self, stream: Stream) -> None:
        """The next one has not been used; nothing is done where another has been taken since."""
        with self._lock:
            if self._stream == advance_stream(stream):
                self._stream = stream


class _Profile(_Settings):
    """A set of daemons: their dispatcher, and the link to it."""

    def __init__(self, name: str, url: str | None, key: bytes, serial: Any = None, elastic: bool = False,
                 direct: bool = False, seed: int | None = None, memory: int | None = None,
                 tls: Sequence[str | None] | None = None) -> None:
        super().__init__(seed, serial)
        self.name, self.direct, self.key, self.certificate = name, direct, key.hex(), tls and tls[0]
        self.n = self.local = 0         # daemons that were launched, here
        self.nursery = _get_nursery()
        self.dispatcher: Dispatcher | None = None
        spec = {"url": url or local_url(), "key": key.hex(), "elastic": elastic, "direct": direct,
                "fixed": _fixed_chunk[0], "module": __name__, "tls": tls}
        if direct:
            self.job, self.url, sock, self.dispatcher = self.nursery.start_direct(spec)
        else:
            self.job, self.url, sock = self.nursery.start(spec)
        try:
            self.link = Link(Connection(sock), lambda: self.nursery.describe_end(self.job, 1.0), memory, provide)
        except BaseException:
            sock.close()
            self.nursery.kill(self.job)
            raise
        self.path = import_path()       # what its daemons have: a task is sent the host's where that has changed
        self.spec: Mapping[str, Any] = {}
        self.streams = random_stream()  # of its daemons
        self.given: tuple[Any, Any] = (None, None)      # url and key, where the user has chosen them

    def changed_path(self) -> list[str] | None:
        return None if sys.path == self.path else import_path()

    def launch(self, n: int, options: Mapping[str, Any]) -> None:
        """Adds n local daemons; returns when they are ready. LaunchError with their last words where they won't be."""
        link = self.link
        if self.local + n > SLOTS:
            raise ValueError(f"{n} local daemons more than {self.local}: a profile has {SLOTS} at most")
        self.local += n
        wanted = link.counts[1] + n     # those that ever joined: some may have left again
        link.launch(n, _daemon_spec(n, options, self.streams))
        self.n += n
        link.wait_for(lambda: link.counts[1] >= wanted or link.launch_error is not None,
                      time.monotonic() + START_TIME + n)
        if link.counts[1] < wanted:
            late = f"{n} daemons were not ready within {START_TIME + n:.0f} s"
            raise LaunchError(link.launch_error or link.closed or late)

    def launch_remote(self, n: int, remote: Any, options: Mapping[str, Any]) -> list[str]:
        """Has n daemons launched elsewhere: the commands. Waits as long as the configuration wants; LaunchError with
        the words of what failed."""
        given = {name: value for name, value in options.items() if value != math.inf}
        if given.get("tlscert"):
            given["tlscert"] = read_pem(given["tlscert"], "tlscert")
        commands = remote.commands(n, Offer(reach(parse_url(self.url)), self.key, given))
        if given.get("autoexit") is False:      # they are for the next host: this one's end must not cancel their jobs
            commands = [command._replace(job="", undo=()) for command in commands]
        wish = {"env": outer_environment(os.environ), "cwd": os.getcwd()}
        for command in commands:
            self.link.command(command, wish)
        self.n += n
        self._await_launched(commands, remote)
        return [_quoted(command.argv) for command in commands if command.argv]

    def _await_launched(self, commands: Sequence[Command], remote: Any) -> None:
        link, known = self.link, self.link.launched
        link.wait_for(lambda: all(command.launcher in known for command in commands),
                      time.monotonic() + remote.patience)
        failed = [known[command.launcher]["text"] for command in commands
                  if command.launcher in known and known[command.launcher]["text"]]
        late = [command.what for command in commands if command.launcher not in known and remote.must_join]
        if late:
            failed.append(f"{', '.join(late)}: not all daemons joined within {remote.patience:.0f} s")
        if failed or link.closed:
            raise LaunchError("\n".join(failed) or link.closed)

    def refresh(self) -> None:
        """For processes still to come, today's environment and directory."""
        spec = _daemon_spec(1, {"maxtasks": 1}, self.streams)
        if spec != self.spec:
            self.link.launch(0 if self.spec else EPHEMERAL_PER_CPU * cpu_count(), spec)
            self.spec = spec

    def forget(self) -> None:
        """In a forked child of the host."""
        self.link.forget()
        if self.dispatcher is not None:
            self.dispatcher.close()

    def close(self, all: bool = False) -> None:
        """Ends the dispatcher and its daemons, `all` of them or those that do not wait for a next host; waits for
        that."""
        if all:
            with contextlib.suppress(MiraiConnectionReset):
                self.link.end_daemons()
        self.link.close(f"the daemons of profile {self.name!r} were reset")
        if not self.nursery.wait_ended(self.job, CLOSE_TIME):
            self.nursery.kill(self.job)
            self.nursery.wait_ended(self.job, CLOSE_TIME)
        self.nursery.forget_job(self.job)


class _HereLink:
    """In the place of a link, of a profile whose tasks are evaluated in this process, as they are submitted. They go
    through the serializer all the same, so that they get copies, as on a daemon."""

    capacity = launch_error = None
    used = peak = 0

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.completed = 0
        self.closed: str | None = None
        self.base: Any = {}                 # what `everywhere` calls have left in namespaces
        self.held: Any = {}
        self.stream = random_stream()
        self.needs: list[dict[bytes, Any]] = []     # definitions of the tasks that are being evaluated, inner ones last

    @property
    def counts(self) -> tuple[int, ...]:
        return 1, 1, 0, 0, self.completed

    def unresolved(self) -> int:
        return 0

    def submit(self, m: Any, task: Task, retries: int, timeout: float | None, call: bool = False,
               wait: bool = True) -> bool:
        items = isinstance(m, Block) and not call
        with self.lock, self._as_daemon(items, call, task.needs), _ctrl_c() as pressed:
            outcomes = self._evaluate(items, call, b"".join(task.parts), pressed)
        if call:
            m.resize(1)
        with self.lock:
            if isinstance(m, Block):
                m.settle(0, outcomes)
            else:
                m.settle(outcomes[0])
            self.completed += len(outcomes)
        if pressed:
            raise KeyboardInterrupt
        return True

    def _evaluate(self, items: bool, call: bool, payload: bytes, pressed: list[int]) -> list[bytes]:
        if not items:
            return [(evaluate_everywhere if call else evaluate)(payload)]
        unit = Items(payload)
        unit.begin()
        stopped = dump_failure(KeyboardInterrupt())
        return [stopped if pressed else unit.evaluate(index) for index in range(unit.n)]

    @contextlib.contextmanager
    def _as_daemon(self, items: bool, call: bool, needs: dict[bytes, Any]) -> Iterator[None]:
        """The host's own state is afterwards as it was. One task may call for another."""
        before, surroundings, outermost = dict(_here), Surroundings(), not self.needs
        outer, earlier = copy_held(), {hash: received(hash) for hash in needs}
        if outermost:
            restore_namespaces(self.base)
            set_held(self.held)
        self.needs.append(needs)
        for hash, blob in needs.items():
            receive_definition(hash, blob if isinstance(blob, bytes) else b"".join(blob))
        _here.update(evaluating=True, map=items)
        try:
            with generators_restored():
                self.stream = advance_stream(self.stream)
                GENERATORS.seed(self.stream)
                yield
        finally:
            _here.update(before)
            self.needs.pop()
            for hash in needs:
                if not any(hash in others for others in self.needs):
                    receive_definition(hash, earlier[hash])
            if call:
                self.base, self.held = copy_namespaces(), copy_held()
                surroundings.namespaces = surroundings.namespaces if outermost else self.base
            if outermost:
                set_held(outer)
            surroundings.restore()

    def withdraw(self, mirais: Iterable[Mirai]) -> None:
        """Nothing waits."""

    def hold(self, call: Block, needs: Mapping[bytes, Any]) -> None:
        """No daemons are to come."""

    def watched(self, callback: bool) -> None:
        """Nothing is ever waited for."""

    def wait(self, m: Mirai, deadline: float | None) -> bool:
        return m.done()

    def wait_for(self, done: Callable[[], bool], deadline: float | None) -> bool:
        return done()

    def call_back(self, job: Callable[[], None]) -> None:
        job()

    def cancel(self, m: Mirai, error: ErrorValue) -> bool:
        return False

    def cancel_items(self, block: Block, lo: int, hi: int, error: ErrorValue) -> list[bool]:
        return [False] * (hi - lo)

    def add_loop(self, loop: Any) -> None:
        """Nothing is read."""

    def remove_loop(self, loop: Any) -> None:
        """Nothing was."""

    def end_daemons(self) -> None:
        """There are none."""

    def close(self, why: str) -> None:
        self.closed = why

    forget = end_daemons


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Interrupts what is evaluated here, and says so: it is for the user's own code as well."""
    pressed: list[int] = []

    def interrupt(signum: int, frame: Any) -> None:
        pressed.append(signum)
        raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    if mine:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield pressed
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _SyncProfile(_Settings):
    """Where there are no daemons, and tasks are evaluated in this process."""

    url, n, direct, certificate = "sync", 0, True, None

    def __init__(self, name: str, seed: int | None) -> None:
        super().__init__(seed)
        self.name = name
        self.link = _HereLink()

    def changed_path(self) -> None:
        """It is the same process."""

    def close(self, all: bool = False) -> None:
        self.link.close("reset")

    def forget(self) -> None:
        """Nothing is the parent's."""


def _get_nursery() -> NurseryHandle:
    if _nursery and not _nursery[0].alive():
        _nursery.pop().close()
    if not _nursery:
        if not _here.get("hooks"):
            _here["hooks"] = True
            atexit.register(_at_exit)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=_after_fork)
        _nursery.append(NurseryHandle())
    return _nursery[0]


def _at_exit() -> None:
    """The host ends: promptly, and with all that it started."""
    try:
        for profile in [*_profiles.values(), *_ephemeral]:
            profile.link.close("the host process ended")
        finish_callbacks()
    finally:
        _profiles.clear()
        _ephemeral.clear()
        while _nursery:
            _nursery.pop().close()


def _after_fork() -> None:
    """A forked child of the host sees no daemons set, and leaves its parent's connections alone."""
    global _setting, _making
    _setting, _making = threading.RLock(), threading.RLock()
    forget_callbacks()
    for profile in [*_profiles.values(), *_ephemeral]:
        profile.forget()
    for nursery in _nursery:
        nursery.forget()
    _profiles.clear()
    _ephemeral.clear()
    _nursery.clear()


def import_path() -> list[str]:
    """sys.path without what an import passes over, too."""
    return [entry for entry in sys.path if type(entry) is str]


def _daemon_spec(n: int, options: Mapping[str, Any], streams: Stream) -> dict[str, Any]:
    """What local daemons are started with: the host's environment, directory, path and limits, as they are now."""
    env = {name: value for name, value in os.environ.items() if name != "MIRAI_KEY"}
    threads = "" if all(name in env for name in _THREAD_LIMITS) else str(max(1, cpu_count() // max(1, n)))
    for name in _THREAD_LIMITS:
        env.setdefault(name, threads)
    try:
        cwd = os.getcwd()
    except FileNotFoundError:
        cwd = "/"
    nofile = None
    with contextlib.suppress(ImportError):
        import resource
        nofile = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {"env": env, "cwd": cwd, "path": import_path(), "nofile": nofile, "stream": streams,
            "options": {name: value for name, value in options.items() if value != math.inf and name != "asyncdial"}}


def cpu_count() -> int:
    """The CPUs that are really there: by affinity, cgroup quota and SLURM_CPUS_PER_TASK, whichever is least."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu.max") as file:
        quota, period = file.read().split()
        if quota != "max":
            counts.append(math.ceil(int(quota) / int(period)))
    with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:
        quota_us = int(file.read())
        with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as period_file:
            counts.append(math.ceil(quota_us / int(period_file.read())) if quota_us > 0 else counts[0])
    with contextlib.suppress(KeyError, ValueError):
        counts.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, min(counts))


class Daemons:
    """What `daemons()` returns: true where daemons are set. In a `with` statement its profile is the current one,
    and is reset at the end."""

    def __init__(self, compute: str, n: int) -> None:
        self.compute = compute
        self._set = n >= 0
        self._tokens: list[contextvars.Token[str]] = []

    def __bool__(self) -> bool:
        return self._set and self.compute in _profiles

    def __enter__(self) -> Daemons:
        require_daemons(self.compute)
        self._tokens.append(_current.set(self.compute))
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ValueError):       # left in another context, as some test frameworks do
            _current.reset(self._tokens.pop())
        daemons(0, compute=self.compute)

    def __repr__(self) -> str:
        profile = _profiles.get(self.compute) if self else None
        state = f"{profile.link.counts[0]} connected at {profile.url}" if profile else "none set"
        return f"<daemons {self.compute!r}: {state}>"


def daemons(n: int | str | None = _MISSING, url: str | None = None, remote: Any = None, dispatcher: bool = True, *,
            sync: bool = False, seed: int | None = None,
            serial: SerialConfig | Sequence[SerialConfig] | None = None, tls: Any = None, pass_: Any = None,
            memory: int | None = None, key: str | bytes | None = None, compute: str | None = None,
            **daemon_options: Any) -> Daemons:
    """Sets n local daemons, persistent background processes that evaluate mirais; resets those set before.

    n: how many (`"auto"`: the CPUs there are); 0 or None ends them: what is unresolved becomes a
    `MiraiConnectionReset`, and `mirai()` has processes of its own again. None also ends daemons of `autoexit=False`,
    which else wait for a next host. url: where the dispatcher listens, `'tcp://127.0.0.1:0'` or `'ipc:///path'`, so
    that daemons can also be started by hand; with a url n may be left out. dispatcher: False: daemons connect to this
    process, and each has a queue of its own, to which tasks go in turn; the least of processes, good where tasks take
    much the same time. sync: evaluate mirais in this process, at the call, for testing and debugging; disregards all
    but seed and compute. seed: 32 bits: each mirai and each item of a map has a random stream of its own, whatever
    daemon evaluates it, so that results can be reproduced; else each daemon has one. serial: for types that pickle
    can't carry, from `serial_config()`; by default what `register_serial()` was given; needs the dispatcher. memory:
    bytes of tasks that may be under way: `mirai()` waits for room, `try_mirai()` gives None. key: what daemons prove
    themselves by, 64 hexadecimal digits or 32 bytes; random by default. compute: the profile, an independent set of
    daemons; the current one by default. daemon_options: as for `daemon()`.

    remote: what launches daemons on other machines, instead of local ones: from `ssh_config()`, `cluster_config()`,
    `remote_config()` or `http_config()`; the url is then `host_url(tls=True)` by default. tls: for a url
    `'tls+tcp://…'` the certificate: a path to PEM with its key, or a pair of PEM texts or paths, certificate (or
    chain) and key; by default one is made, by the `openssl` command. pass_: the key's password, or a function that
    returns it.

    Returns when the local daemons, and those by ssh, are ready: a `Daemons`, true when set, also for `with daemons(2):
    ...`. Raises LaunchError, an OSError, with the last words of what could not be started or could not listen at the
    url; TypeError or ValueError for arguments that make no sense; RuntimeError in an item of a map, see `mirai_map()`.
    """
    _check_compute(compute)
    name = _current.get() if compute is None else compute
    if sync:
        settings = _SyncProfile(name, seed)
        return _set(name, lambda: settings, 0)
    if n is None or type(n) is int and n == 0:
        if url is not None and n == 0:
            raise ValueError("n=0 resets; to listen at a url without local daemons leave n out")
        _check_options(daemon_options, url, key)
        return _set(name, None, -1, n is None)
    if remote is not None and url is None:
        url = _url_for(remote)
    count = _check_n(n, url, remote)
    _check_options(daemon_options, url, key)
    _check_budget(memory, seed)
    if serial is not None and not dispatcher:
        raise ValueError("serial needs the dispatcher; register_serial() does without")
    if count and _here["map"]:
        raise RuntimeError("daemons(n) in an item of a map would start n daemons for each; where that is meant use "
                           "daemons(url=local_url()); launch_local(n)")
    parsed = os.urandom(32) if key is None else parse_key(key)
    make_hooks(serial)          # what is wrong with it is to be said before anything is reset
    pem = _check_tls(url, tls, pass_)

    def make() -> _Profile:
        profile = _Profile(name, url, parsed, serial, False, not dispatcher, seed, memory, pem)
        profile.given = url, key
        return _launch_all(profile, count, remote, daemon_options)
    return _set(name, make, count)


def _url_for(remote: Any) -> str:
    """Where daemons elsewhere are to come, and the user has not said."""
    return local_url(tcp=True) if getattr(remote, "tunnel", False) else host_url(tls=True)


def _check_tls(url: str | None, tls: Any, pass_: Any) -> Sequence[str | None] | None:
    """Certificate, key and password as texts, made now where none are given; None without TLS."""
    address = parse_url(url) if url is not None else Address("ipc", "", None)
    if address.scheme != "tls+tcp":
        if tls is not None or pass_ is not None:
            raise ValueError("tls and pass_ are for a url 'tls+tcp://…'")
        return None
    if tls is None:
        _import_ssl()
        hosts = [address.host, *_interfaces().values()] if _is_this_machine(address.host) else [address.host]
        return [*make_certificate([host for host in hosts if host != "*"] + ["localhost", "127.0.0.1"]), None]
    pair = [tls, tls] if isinstance(tls, str) else list(tls)
    if len(pair) != 2:
        raise ValueError("tls: expected a path, or a pair of PEM texts, certificate and key")
    cert, private = split_pem("\n".join([read_pem(each, "tls") for each in dict.fromkeys(pair)]))
    found = [cert, private, pass_() if callable(pass_) else pass_]
    listener_context(*found)
    return found


def _launch_all(profile: _Profile, n: int, remote: Any, options: Mapping[str, Any]) -> _Profile:
    try:
        if remote is not None:
            profile.launch_remote(n, remote, options)
        elif n:
            profile.launch(n, options)
    except BaseException:
        profile.close()
        raise
    return profile


def _set(name: str, make: Callable[[], Any] | None, count: int, all: bool = False) -> Daemons:
    """Resets a profile, and sets it anew."""
    with _setting:
        if name in _profiles:
            _profiles.pop(name).close(all)
        if make is not None:
            _profiles[name] = make()
    return Daemons(name, count)


def _check_options(options: Mapping[str, Any], url: str | None, key: Any) -> None:
    check_daemon_options(options)
    if options.get("autoexit", True) is False and (url is None or key is None):
        raise ValueError("autoexit=False is for a next host, which needs the same url= and key=: give both")
    if options.get("rs") is not None:
        raise ValueError("rs= is for one daemon, on its command line; daemons() gives each a stream of its own")


def _check_budget(memory: Any, seed: Any) -> None:
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory <= 0):
        raise ValueError(f"memory={memory!r}: expected bytes above 0, or None for no limit")
    if seed is not None:
        seed_stream(seed)


def _check_n(n: Any, url: str | None, remote: Any) -> int:
    if remote is not None and not hasattr(remote, "commands"):
        raise TypeError(f"remote={remote!r}: expected what ssh_config(), cluster_config(), remote_config() or "
                        "http_config() returns")
    if n is _MISSING:
        if url is None:
            raise TypeError("daemons() needs a number: daemons(4) sets four local daemons, daemons('auto') as many as "
                            "there are CPUs; daemons(0) resets them, daemons(None) also ends those that would persist")
        return 0 if remote is None else int(remote.default_n)
    if n == "auto":
        return cpu_count()
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"n={n!r}: expected an integer, 'auto', or None")
    count = operator.index(n)
    if not 0 < count <= SLOTS:
        raise ValueError(f"n={n}: expected 0 (reset) to {SLOTS} daemons")
    return count


def _find(compute: str | None) -> Any:
    return _profiles.get(_current.get() if compute is None else compute)


def _ephemeral_profile() -> _Profile:
    """For tasks where no daemons are set: processes that are begun with a task and end with it."""
    with _setting:
        if _ephemeral and (_ephemeral[0].link.closed is not None or _ephemeral[0].link.launch_error is not None):
            _ephemeral.pop().close()
        if not _ephemeral:
            _ephemeral.append(_Profile("ephemeral", None, os.urandom(32), elastic=True))
        _ephemeral[0].refresh()
        return _ephemeral[0]


def launch_local(n: int = 1, *, compute: str | None = None, **daemon_options: Any) -> int:
    """Adds n local daemons to a profile that is set, and returns n when they are ready.

    Raises RuntimeError where no daemons are set, and as `daemons()` does.
    """
    require_daemons(compute)
    if isinstance(n, bool) or not hasattr(n, "__index__") or not 0 < n <= SLOTS:
        raise ValueError(f"n={n!r}: expected an integer above 0")
    n = operator.index(n)
    check_daemon_options(daemon_options)
    profile = _find(compute)
    if isinstance(profile, _SyncProfile):
        raise RuntimeError("the profile evaluates mirais in this process: it has no daemons")
    _check_options(daemon_options, *profile.given)
    profile.launch(n, daemon_options)
    return n


class _Commands(list):      # type: ignore[type-arg]
    """Prints ready to paste."""

    def __repr__(self) -> str:
        return "\n".join(self)


def _quoted(words: Iterable[str]) -> str:
    import shlex
    return shlex.join(words)


def launch_remote(n: int | None = None, remote: Any = None, *, compute: str | None = None,
                  **daemon_options: Any) -> list[str]:
    """Adds daemons on other machines to a profile whose url they can reach: n of them (default: one, or one for each
    remote), by a configuration from `ssh_config()`, `cluster_config()`, `remote_config()` or `http_config()`.

    Without `remote` nothing is launched: the commands are for pasting in a shell there, where this file can be imported
    as `mirai`. They hold the profile's key, and are a secret. Returns the commands, a list that prints ready to paste.
    Raises RuntimeError where no daemons are set, LaunchError with the words of what failed, and as `daemons()`.
    """
    require_daemons(compute)
    profile = _find(compute)
    if isinstance(profile, _SyncProfile):
        raise RuntimeError("the profile evaluates mirais in this process: it has no daemons")
    count = _check_n((1 if remote is None else _MISSING) if n is None else n, profile.url, remote)
    _check_options(daemon_options, *profile.given)
    if remote is not None and getattr(remote, "command", "") is not None:
        return _Commands(profile.launch_remote(count, remote, daemon_options))
    if parse_url(profile.url).scheme == "ipc":
        raise ValueError("the profile listens for this machine alone: set it with a url=, as daemons(url=host_url())")
    if daemon_options.get("kill_after") is not None:
        raise ValueError("kill_after is for local daemons: nobody here can kill one elsewhere")
    command = f"echo {profile.key} | {_daemon_command(reach(parse_url(profile.url)), daemon_options)} --key-file -"
    return _Commands([command] * count)


def _daemon_command(urls: Sequence[str], options: Mapping[str, Any]) -> str:
    """For any shell, C shells included, to which brackets are patterns."""
    words = ["python3 -m mirai daemon", *(f"'{url}'" for url in urls)]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name in ("idletime", "walltime", "maxtasks") and value != math.inf:
            words.append(f"--{flag} {value}")
        elif name == "autoexit" and value is not True:
            words.append(f"--autoexit {str(value).lower()}")
        elif name == "cleanup" and not value:
            words.append("--no-cleanup")
        elif name == "forward_imports" and not value:
            words.append("--no-forward-imports")
        elif name in ("output", "asyncdial") and value:
            words.append(f"--{flag}")
        elif name == "tlscert" and value is not None:
            import shlex
            words.append(f"--tlscert {shlex.quote(str(value))}")
    return " ".join(words)


def nextstream(compute: str | None = None) -> list[int] | None:
    """The profile's next random stream, as R's `.Random.seed` has it (seven integers), which also advances it; None
    where no daemons are set. For those who start daemons in ways of their own: `daemon(rs=)` takes it."""
    profile = _find(compute)
    return None if profile is None else stream_to_r(profile.take_stream())


def nextget(x: str, compute: str | None = None) -> Any:
    """An item of a profile, None where there is none: `"n"` (daemons launched), `"url"` (which they dial),
    `"dispatcher"` (the same, where there is one), `"tls"` (the listener's certificate, in PEM)."""
    if x not in ("n", "url", "dispatcher", "tls"):
        raise ValueError(f"x={x!r}: expected 'n', 'url', 'dispatcher' or 'tls'")
    profile = _find(compute)
    if profile is None:
        return None
    if x == "tls":
        return profile.certificate
    return profile.n if x == "n" else None if x == "dispatcher" and profile.direct else profile.url


def status(compute: str | None = None) -> dict[str, Any]:
    """`connections` (daemons connected now), `daemons` (the URL they dial; 0 where none are set), `mirai`, how many are
    awaiting, executing and completed, and `memory`, bytes of the tasks under way: used, at their peak, and the capacity
    (None: no limit). Asks nobody: it is what the dispatcher said last, 20 ms ago at most."""
    profile = _find(compute)
    found = info(compute)
    if profile is None or found is None:
        return {"connections": 0, "daemons": 0}
    return {"connections": found.connections, "daemons": profile.url,
            "mirai": {"awaiting": found.awaiting, "executing": found.executing, "completed": found.completed},
            "memory": {"used": profile.link.used, "peak": profile.link.peak, "capacity": profile.link.capacity}}


def info(compute: str | None = None) -> Info | None:
    """`connections, cumulative, awaiting, executing, completed`, as a named tuple; None where no daemons are set."""
    profile = _find(compute)
    if profile is None:
        return None
    link = profile.link
    connections, cumulative, _, executing, _ = link.counts
    unresolved = link.unresolved()
    executing = min(executing, unresolved)
    return Info(connections, cumulative, unresolved - executing, executing, link.completed)


def daemons_set(compute: str | None = None) -> bool:
    """Whether daemons are set for the profile."""
    return _find(compute) is not None


def require_daemons(compute: str | None = None) -> bool:
    """True where daemons are set for the profile, RuntimeError that says how to set them where not."""
    _check_compute(compute)
    if _find(compute) is None:
        name = _current.get() if compute is None else compute
        arguments = "" if name == "default" else f", compute={name!r}"
        raise RuntimeError(f"no daemons are set for profile {name!r}: set some first, as daemons(4{arguments})")
    return True


# by which those that a context has entered are left; one instance may be entered by many contexts
_entered: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("mirai_entered", default=())


def _check_compute(compute: Any) -> None:
    if compute is not None and not isinstance(compute, str):
        raise TypeError(f"compute={compute!r}: expected the name of a profile")


class with_daemons(contextlib.ContextDecorator):
    """Makes a profile the current one, in a `with` statement or for a decorated function; it must be set."""

    def __init__(self, compute: str) -> None:
        self.compute = compute

    def __call__(self, f: Any) -> Any:
        if not getattr(getattr(f, "__code__", None), "co_flags", 0) & CO_COROUTINE:
            return super().__call__(f)

        @functools.wraps(f)
        async def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return await f(*args, **kwargs)
        return inside

    def __enter__(self) -> None:
        if self.compute is None:
            raise TypeError("with_daemons() needs the name of a profile")
        require_daemons(self.compute)
        _entered.set((_current.set(self.compute), *_entered.get()))

    def __exit__(self, *_: object) -> None:
        token, *others = _entered.get()
        _current.reset(token)
        _entered.set(tuple(others))


def local_daemons(compute: str) -> None:
    """Makes a profile the current one for the rest of this context: this thread, or this asyncio task."""
    require_daemons(compute)
    _current.set(compute)


# ======================================================================
# 17. mirai, map, collect: the verbs
# ======================================================================
# Knows:  profiles, mirais.
# Never:  sockets, messages.

_ids = itertools.count(1)
_OPTIONS = ("_timeout", "_retries", "_compute", "_star", "_promise", "_min")


def _take_ids(n: int) -> int:
    """The first of n consecutive ids, all larger than those taken before."""
    n = max(1, n)
    return next(itertools.islice(_ids, n - 1, None)) - n + 1      # in one C call, which no signal handler interrupts


def mirai(f: Callable[..., Any] | str = _MISSING, /, *args: Any, _timeout: float | None = None, _retries: int = 0,
          _compute: str | None = None, **kwargs: Any) -> Mirai:
    """Evaluates `f(*args, **kwargs)` on a daemon, and returns a future for it at once.

    f: a callable; or Python source as a str, in which the kwargs are names, and whose value is that of its last
    expression. Without daemons set it gets a process of its own (at most 4 x CPUs at once; the rest wait).
    _timeout: seconds from now, waiting in the queue included, after which it resolves as `MiraiTimeout`, and the
    task is interrupted. _retries: how often it is run again after a daemon died while running it. _compute: the
    profile; the current one by default.

    Raises TypeError where `f` or an argument can't be serialized, with the path to the culprit; SyntaxError for
    source that is none; MiraiConnectionReset where the profile's dispatcher has died. An interpreter that ends
    does not wait for unresolved mirais.

        >>> mirai("a + b", a=1, b=2).result()
        3
    """
    m = _submit(f, args, kwargs, _timeout, _retries, _compute, True)
    assert m is not None
    return m


def try_mirai(f: Callable[..., Any] | str, /, *args: Any, _timeout: float | None = None, _retries: int = 0,
              _compute: str | None = None, **kwargs: Any) -> Mirai | None:
    """As `mirai()`, but None at once where the profile's `memory` budget has no room for the task, instead of
    waiting."""
    return _submit(f, args, kwargs, _timeout, _retries, _compute, False)


def _submit(f: Any, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None, retries: int,
            compute: str | None, wait: bool) -> Mirai | None:
    _check_task(f, args, kwargs, timeout, retries)
    return _submit_task(_find(compute) or _ephemeral_profile(), f, args, kwargs, timeout, retries, wait)


def _submit_task(profile: Any, f: Any, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None,
                 retries: int, wait: bool) -> Mirai | None:
    task = dump_task(f, args, kwargs, profile.changed_path(), profile.hooks)
    m = Mirai(_take_ids(1), profile.link)
    stream = profile.next_stream()
    if stream is not None:
        task = seeded(task, stream)
    if profile.link.submit(m, task, retries, timeout, wait=wait):
        return m
    if stream is not None:
        profile.return_stream(stream)
    return None


def _check_task(f: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], timeout: Any, retries: Any) -> None:
    if isinstance(f, str):
        if args:
            raise TypeError("source text takes keyword arguments, the names it sees: mirai('x + 1', x=1)")
        check_source(f)
    elif not callable(f):
        if f is _MISSING:
            raise TypeError("mirai() needs what to evaluate: mirai(f, *args, **kwargs) or mirai('x + 1', x=1)")
        raise TypeError(f"can't evaluate {f!r}: expected a callable, as in mirai(f, 1) and not mirai(f(1)), or source "
                        "text")
    elif getattr(getattr(f, "__code__", None), "co_flags", 0) & CO_COROUTINE:
        raise TypeError(f"{f!r} is a coroutine function: mirai(lambda: asyncio.run(f(…))) evaluates it")
    if timeout is not None and (isinstance(timeout, bool) or not hasattr(timeout, "__float__") or not timeout >= 0):
        raise ValueError(f"_timeout={timeout!r}: expected seconds, or None for no limit")
    if isinstance(retries, bool) or not isinstance(retries, int) or not 0 <= retries <= 65535:
        raise ValueError(f"_retries={retries!r}: expected an integer from 0")
    for name in kwargs:
        if name.startswith("_"):
            import difflib
            near = difflib.get_close_matches(name, _OPTIONS, 1, 0.75)
            if near:
                raise TypeError(f"there is no option {name!r} here" + (
                    "" if near[0] == name else f"; did you mean {near[0]!r}?"))


def mirai_map(items: Any, f: Callable[..., Any], /, *args: Any, _star: bool = False, _promise: Any = None,
              _timeout: float | None = None, _retries: int = 0, _compute: str | None = None, **kwargs: Any) -> MiraiMap:
    """`f(item, *args, **kwargs)` for every item, on daemons: a `MiraiMap`, at once.

    items: a collection; a mapping, whose keys the results then have; a table (2-D numpy array, pandas or polars
    DataFrame, Arrow table), mapped over its rows: `f(*row, …)`, or `f(**row, …)` where columns have names. Items
    that have no length (a generator, `itertools.count()`) are taken a bounded number ahead of whoever consumes them.
    Items go to daemons several at a time where they are short; each has its own outcome, error, timeout and retries
    all the same. args, kwargs: sent once to each daemon, and loaded there once where they are large (64 KiB): not to
    be changed by `f`. _star: `f(*item, …)` for tuples and lists, `f(**item, …)` for mappings. _promise: a function,
    or a pair of them (either may be None), called with each value, and with each error value, as they come, in a thread
    of mirai's own. _timeout, _retries, _compute: as for `mirai()`, for each item.

    Raises RuntimeError where no daemons are set; TypeError where f or an item can't be serialized, with the path to it.

        >>> mirai_map([1, 2, 3], pow, 2)[:]
        [1, 4, 9]
    """
    if not callable(f):
        raise TypeError(f"can't map {f!r}: expected a callable, called as f(item, *args, **kwargs)")
    require_daemons(_compute)
    _check_task(f, args, kwargs, _timeout, _retries)
    profile = _find(_compute)
    assert profile is not None
    source = _source(items, _star)
    constant = dump_constant(f, args, kwargs, profile.changed_path(), source.shape, profile.hooks)
    return MiraiMap(_MapFeed(profile, constant, source, _retries, _timeout, _check_promise(_promise)))


def everywhere(f: Callable[..., Any] | str, /, *args: Any, _min: int = 1, _compute: str | None = None,
               **kwargs: Any) -> MiraiMap:
    """Evaluates `f(*args, **kwargs)`, or source text, once on every daemon: a `MiraiMap` of one item a daemon.

    What it changes there stays, whatever `cleanup` says: names that it assigns (as source: all of them, and the
    kwargs; as a function: those it declares `global`), imports, sys.path, the environment, the working directory.
    Tasks submitted later begin on a daemon only after it has run there; daemons that join later run all these calls
    first, save those that failed on every daemon. One that fails on such a newcomer alone ends it, as a failed launch.
    It does not advance the `seed` stream. _min: evaluate on so many daemons at least, and wait for them to join.

    Raises RuntimeError where no daemons are set, TypeError as `mirai()`.
    """
    require_daemons(_compute)
    _check_task(f, args, kwargs, None, 0)
    if isinstance(_min, bool) or not isinstance(_min, int) or not 0 < _min <= SLOTS:
        raise ValueError(f"_min={_min!r}: expected an integer above 0")
    profile = _find(_compute)
    assert profile is not None
    link = profile.link
    task = dump_task(f, args, kwargs, profile.changed_path(), profile.hooks)
    block = Block(_take_ids(SLOTS), 0, link)
    link.hold(block, task.needs)
    link.submit(block, task, _min, None, call=True)
    if not link.wait_for(lambda: len(block) > 0, time.monotonic() + START_TIME):
        raise MiraiConnectionReset(link.closed or f"the dispatcher did not answer within {START_TIME:.0f} s")
    return MiraiMap(_Answers(link, block))


def _check_promise(promise: Any) -> tuple[Any, Any]:
    pair = promise if isinstance(promise, (tuple, list)) else (promise, None)
    if len(pair) != 2 or not all(each is None or callable(each) for each in pair):
        raise TypeError(f"_promise={promise!r}: expected a function of the value, or a pair of functions, of the value "
                        "and of the error value")
    return pair[0], pair[1]


# -- what is mapped over

# A list, or an iterator; labels or None; whether these are keys; see `dump_constant()`.
_Source = collections.namedtuple("_Source", "values names keyed shape")


def _source(items: Any, star: bool) -> _Source:
    """Whatever can be mapped over, as one list or iterator of items."""
    table = None if star else _table(items)
    if table is not None:
        return table
    shape = () if star else None
    if isinstance(items, collections.abc.Mapping):
        return _Source(_starred(list(items.values()), star), list(items), True, shape)
    try:
        iterator = iter(items)
    except TypeError:
        raise TypeError(f"can't map over {items!r}, which is not iterable: expected a collection, a mapping, a table "
                        "or a generator of items") from None
    if iterator is not items and hasattr(items, "__len__"):
        return _Source(_starred(list(iterator), star), None, False, shape)
    return _Source(map(_check_star, iterator) if star else iterator, None, False, shape)


def _starred(values: list[Any], star: bool) -> list[Any]:
    return [_check_star(value) for value in values] if star else values


def _check_star(item: Any) -> Any:
    if not isinstance(item, (tuple, list, collections.abc.Mapping)):
        raise TypeError(f"_star=True unpacks tuples, lists and mappings, not {item!r}")
    return item


def _table(items: Any) -> _Source | None:
    """The rows of a table, of a kind whose package the user has imported."""
    kind = {cls.__module__.partition(".")[0] + "." + cls.__name__ for cls in type(items).__mro__}
    labels = None
    if "numpy.ndarray" in kind and items.ndim == 2:
        return _Source([tuple(row) for row in items], None, False, ())
    if "pandas.DataFrame" in kind:
        rows, columns = list(items.itertuples(index=False, name=None)), list(items.columns)
        labels = list(items.index)
    elif "polars.DataFrame" in kind:
        rows, columns = items.rows(), list(items.columns)
    elif "pyarrow.Table" in kind or "pyarrow.RecordBatch" in kind:
        columns = list(items.schema.names)
        rows = list(zip(*[items.column(i).to_pylist() for i in range(len(columns))]))
    else:
        return None
    named = all(isinstance(name, str) and name.isidentifier() for name in columns) and len({*columns}) == len(columns)
    return _Source(rows, labels, False, tuple(columns) if named and columns else ())


class _Feed:
    """Blocks, in order, whose items are handed out."""

    blocks: list[Block]
    total = gone = 0            # items under way or done; whose block is gone

    def at(self, index: int) -> tuple[Block, int]:
        at = index - self.gone
        for block in self.blocks if at >= 0 else ():
            if at < len(block):
                return block, at
            at -= len(block)
        raise IndexError(f"item {index} of {self.total}" + (" was handed out before" if 0 <= index < self.gone else ""))


class _Answers(_Feed):
    """The one block of an `everywhere` call; what a map's `_MapFeed` is to maps."""

    names, keyed, lazy, exhausted = None, False, False, True

    def __init__(self, link: Any, block: Block) -> None:
        self.link, self.blocks, self.active, self.total = link, [block], [block], len(block)

    def pull(self, wanted: int) -> None:
        """There is nothing more to come."""

    def end(self) -> None:
        """There never was."""


class _MapFeed(_Feed):
    """Turns what is mapped over into blocks that are under way: all at once, or a window ahead of whoever consumes."""

    def __init__(self, profile: Any, constant: Constant, source: _Source, retries: int, timeout: float | None,
                 promise: tuple[Any, Any]) -> None:
        self.profile, self.link, self.constant = profile, profile.link, constant
        self.names, self.keyed = source.names, source.keyed
        self.retries, self.timeout, self.promise = retries, timeout, promise
        self.blocks: list[Block] = []           # whose items have not all been handed out
        self.active: list[Block] = []           # that hold unresolved items, as far as is known
        self.total = self.taken = self.gone = 0     # items under way or done; handed out; whose block is gone
        self.id = _take_ids(1)
        self.lazy = not isinstance(source.values, list)
        self.exhausted = not self.lazy
        self.failure: BaseException | None = None       # of the generator, or of what it gave
        self.window = 4 * max(1, self.link.counts[0])
        self.pulled = -math.inf                 # when items were last taken
        self.lock = threading.RLock()
        if self.lazy:
            self.source = source.values
            self.pull(0)
        else:
            self._send_all(source.values)

    def _send_all(self, values: list[Any]) -> None:
        try:
            for start in range(0, len(values), UNIT_ITEMS):
                self._send(values[start:start + UNIT_ITEMS])
        except BaseException:
            for block in self.blocks:
                self.link.cancel_items(block, 0, len(block), MiraiCancelled("cancelled"))
            raise

    def _name(self, index: int) -> str:
        return f"items[{index if self.names is None else self.names[index]!r}]"

    def _send(self, values: list[Any]) -> None:
        start, stream = self.total, self.profile.next_stream(len(values))
        for n, task in dump_units(self.constant, self.id, values, lambda i: self._name(start + i), stream):
            block = Block(_take_ids(n), n, self.link, *self.promise)
            if block.promised:
                self.link.watched(True)
            self.link.submit(block, task, self.retries, self.timeout)
            self.blocks.append(block)
            self.active.append(block)
            self.total += n

    # -- of a generator

    def under_way(self) -> int:
        self.active = [block for block in self.active if block.left]
        return sum([block.left for block in self.active])

    def pull(self, wanted: int) -> None:
        """Takes more, where so many have been consumed. A window that soon runs dry is too small, and grows."""
        with self.lock:
            if self.exhausted:
                return
            under_way, ahead = self.under_way(), self.total - wanted
            waits = ahead < 8 * self.window and self._waits(wanted)     # for the daemons, so these are to have enough
            ahead = under_way if waits else max(ahead, under_way)
            most = self.window * (0.75 if waits else 0.5)
            if ahead > most or sum([block.size for block in self.active]) > WINDOW_BYTES:
                return
            now = time.monotonic()
            if not under_way and now - self.pulled < WINDOW_TIME:       # daemons idle, though consumption is fast
                self.window = min(2 * self.window, WINDOW_MOST)
            self.pulled = now
            values: list[Any] = []
            try:
                values.extend(itertools.islice(self.source, min(self.window - ahead, UNIT_ITEMS)))
                self.exhausted = not values
            except Exception as error:
                self._fail(error)
            except BaseException:
                if getattr(self.source, "gi_frame", self) is None:
                    self._fail(RuntimeError("the generator was interrupted, so that nothing more comes of it"))
                raise
            finally:                    # what came before an interrupt, too
                self._send_taken(values)

    def _send_taken(self, values: list[Any]) -> None:
        try:
            if values:
                self._send(values)
        except (TypeError, ValueError, pickle.PicklingError, MiraiConnectionReset) as error:
            self._fail(error)

    def _waits(self, wanted: int) -> bool:
        """Whether whoever consumes must wait for the next item."""
        if not self.gone <= wanted < self.total:
            return True
        block, at = self.at(wanted)
        return block.outcomes[at] is None

    def _fail(self, error: BaseException) -> None:
        """For whoever comes to it, after what came before."""
        self.exhausted, self.failure = True, error

    def take(self) -> Mirai | None:
        """Hands out the next item, None at the end."""
        with self.lock:
            while True:
                self.pull(self.taken)
                if self.taken < self.total:
                    break
                if self.failure is not None:
                    raise self.failure
                if self.exhausted:
                    return None
                left = self.under_way()
                self.link.wait_for(lambda: self.under_way() != left, None)      # noqa: B023
            block, at = self.at(self.taken)
            self.taken += 1
            m = block.mirai(at)
            if at == len(block) - 1:
                self.gone += len(block)
                self.blocks.remove(block)
            return m

    def end(self) -> None:
        """Takes no more."""
        self.exhausted = True


class MiraiMap(collections.abc.Sequence):       # type: ignore[type-arg]
    """The items of a map, in order: iterate over it or index it for their mirais.

    `mp[:]` waits and gives a list of values and error values (a dict where the items were a mapping); `mp.results()`
    raises what the first failed item raised; `async for value in mp` gives values as they come, and raises the same.
    `mp.names`: the mapping's keys, or a table's row labels, else None. Of a generator items are handed out once, by
    whatever iterates, and not kept: its length is known at its end, and `mp[:]` gives those not handed out.
    """

    def __init__(self, feed: Any) -> None:
        self._feed = feed

    def __reduce__(self) -> NoReturn:
        raise TypeError("the mirais of a map stay in the process that made it: send its values, mp.results()")

    # -- shape

    @property
    def names(self) -> list[Any] | None:
        return self._feed.names         # type: ignore[no-any-return]

    def __len__(self) -> int:
        if not self._feed.exhausted:
            raise TypeError("how many items a generator gives is known when it ends")
        return self._count()

    def __bool__(self) -> bool:
        """Whether there are items, or may be."""
        return not self._feed.exhausted or self._count() > 0

    def _count(self) -> int:
        return self._feed.gone + sum([len(block) for block in self._feed.blocks])     # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Mirai]:
        if self._feed.lazy:
            return iter(self._feed.take, None)
        return (block.mirai(i) for block in self._feed.blocks for i in range(len(block)))

    def __getitem__(self, key: Any) -> Any:
        if key == slice(None):
            self._wait(False)
            return self._shape([value for value, _ in self._looked()])
        if isinstance(key, slice):
            raise TypeError("mp[:] waits for all values, mp[i] is the i-th mirai; there are no other slices")
        key = operator.index(key)
        block, at = self._feed.at(key + len(self) if key < 0 else key)
        return block.mirai(at)

    def _kept(self) -> list[tuple[Block, int]]:
        """All items but those of a generator that were handed out."""
        return [(block, i) for block in self._feed.blocks for i in range(len(block))][self._skipped():]

    def _looked(self) -> list[tuple[Any, bool]]:
        """The values of these, which have resolved."""
        return list(itertools.chain.from_iterable(block.look_all() for block in self._feed.blocks))[self._skipped():]

    def _skipped(self) -> int:
        """Items of the first block that were handed out."""
        return self._feed.taken - self._feed.gone if self._feed.lazy else 0

    def _shape(self, values: list[Any]) -> Any:
        return dict(zip(self.names or (), values)) if self._feed.keyed else values

    @property
    def data(self) -> Any:
        """What there is now: values, error values, `UNRESOLVED`."""
        return self._shape([UNRESOLVED if block.outcomes[i] is None else block.look(i)[0] for block, i in self._kept()])

    # -- waiting

    def _left(self) -> int:
        return sum([block.left for block in self._feed.active])

    def _wait(self, progress: bool | None) -> None:
        feed = self._feed
        if progress is not False:
            for _ in self._arriving(progress):
                pass
        while True:
            feed.pull(self._count())
            waiting = next((block for block in list(feed.active) if block.left), None)
            if waiting is not None:
                feed.link.wait_for(lambda block=waiting: not block.left, None)
            elif feed.exhausted:
                break
        self._raise_failure()

    def _raise_failure(self) -> None:
        """Of the generator, which gave no more."""
        if self._feed.lazy and self._feed.failure is not None:
            raise self._feed.failure

    def _arriving(self, progress: bool | None) -> Iterator[tuple[Block, int]]:
        """Items as they resolve."""
        feed, arrivals = self._feed, _Arrivals(self._feed, False)
        with _Progress(None if feed.lazy else len(self), progress) as bar:
            while True:
                feed.pull(arrivals.count)
                left = self._left()
                found = arrivals.new()
                for each in found:
                    bar.advance()
                    yield each
                if not found and feed.exhausted and not left:
                    return
                if not found:
                    feed.link.wait_for(lambda: self._left() != left, None)      # noqa: B023

    def results(self, progress: bool | None = False) -> Any:
        """All values, in item order; raises what the first failed item raised. progress: as for `collect_mirai()`."""
        self._wait(progress)
        looked = self._looked()
        for (_, failed), (block, i) in zip(looked, self._kept()) if any(failed for _, failed in looked) else ():
            if failed:
                block.mirai(i).result()
        return self._shape([value for value, _ in looked])

    @staticmethod
    def _result(block: Block, index: int) -> Any:
        value, failed = block.look(index)
        return block.mirai(index).result() if failed else value

    async def __aiter__(self) -> Any:
        import asyncio
        loop, feed = asyncio.get_running_loop(), self._feed
        arrivals = _Arrivals(feed, feed.lazy)
        feed.link.add_loop(loop)
        try:
            while True:
                feed.pull(arrivals.count)
                waiter = _LoopWaiter(loop)
                blocks = list(feed.active)
                for block in blocks:
                    block.waiters.append(waiter)
                try:
                    left = self._left()
                    found = arrivals.new()
                    if not found and feed.exhausted and not left:
                        break
                    if not found and left:
                        await waiter.future
                finally:
                    for block in blocks:
                        block.waiters.remove(waiter)
                for block, index in found:
                    yield self._result(block, index)
            self._raise_failure()
        finally:
            feed.link.remove_loop(loop)

    def _race(self) -> int | None:
        kept = self._kept()

        def first() -> int | None:
            return next((i for i, (block, at) in enumerate(kept) if block.outcomes[at] is not None), None)

        if kept:
            self._feed.link.wait_for(lambda: first() is not None, None)
        return first()

    def _stop(self) -> list[bool]:
        self._feed.end()
        return [new for block in {**dict.fromkeys(self._feed.blocks), **dict.fromkeys(self._feed.active)}
                for new in self._feed.link.cancel_items(block, 0, len(block), MiraiCancelled("cancelled"))]

    def __repr__(self) -> str:
        known = self._count()
        return f"<mirai map: {known - self._left()} of {known}{'' if self._feed.exhausted else ' or more'} resolved>"


class _Arrivals:
    """Which items of a map have resolved since one last asked; `take`: and are thereby handed out."""

    def __init__(self, feed: Any, take: bool) -> None:
        self.feed, self.take = feed, take
        self.told: dict[Block, bytearray] = {}
        self.count = feed.gone

    def new(self) -> list[tuple[Block, int]]:
        found = []
        for block in list(self.feed.blocks):
            told = self.told.setdefault(block, bytearray(len(block)))
            if told.count(0) > 0:
                found += [(block, i) for i, outcome in enumerate(block.outcomes) if outcome is not None and not told[i]]
        for block, i in found:
            self.told[block][i] = 1
        self.count += len(found)
        if self.take:
            self._let_go()
        return found

    def _let_go(self) -> None:
        feed = self.feed
        with feed.lock:
            for block in [block for block, told in self.told.items() if not told.count(0)]:
                del self.told[block]
                if block in feed.blocks:
                    feed.blocks.remove(block)
                    feed.gone += len(block)
                    feed.taken = max(feed.taken, feed.gone)


def _each(x: Any) -> Sequence[Mirai]:
    """The mirais in `x`, which is one, a map, or a list of them."""
    if isinstance(x, Mirai):
        return [x]
    if isinstance(x, MiraiMap):
        return list(x)
    if isinstance(x, (list, tuple)) and all(isinstance(m, Mirai) for m in x):
        return x
    raise TypeError(f"expected a Mirai, a MiraiMap or a list of Mirai, not {x!r}")


def call_mirai(x: Any) -> Any:
    """Waits until `x` (a Mirai, a MiraiMap or a list of Mirai) has resolved, and returns it."""
    if isinstance(x, MiraiMap):
        x._wait(False)
    else:
        _wait_all(_each(x), False)
    return x


def collect_mirai(x: Any, *, flat: bool = False, progress: bool | None = False, stop: bool = False) -> Any:
    """Waits for `x` and gives its value, or a list (a dict for a map over a mapping) of values; error values in place.

    flat: one flat list: of values that are lists or tuples their elements, else themselves; raises what the first
    failed task raised, and TypeError where they are not all of one type. progress: a bar on stderr. None: where that
    is a terminal; True: elsewhere a line now and then, too. stop: at the first failure cancel the rest and raise what
    that task raised.
    """
    if isinstance(x, MiraiMap):
        if stop:
            _stop_map_at_failure(x, progress)
        x._wait(False if stop else progress)
    elif stop:
        _stop_at_failure(_each(x), progress)
    else:
        _wait_all(_each(x), progress)
    if flat:
        return _flatten([m.result() for m in _each(x)] if not isinstance(x, MiraiMap) else x.results())
    if isinstance(x, (Mirai, MiraiMap)):
        return x[:]
    return [m[:] for m in x]


def _flatten(values: Any) -> list[Any]:
    flat: list[Any] = []
    for value in values.values() if isinstance(values, dict) else values:
        flat.extend(value) if isinstance(value, (list, tuple)) else flat.append(value)
    kinds = {type(value) for value in flat}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__qualname__ for kind in kinds))
        raise TypeError(f"flat=True needs values of one type, these are of {names}")
    return flat


def _stop_map_at_failure(mp: MiraiMap, progress: bool | None) -> None:
    for block, index in mp._arriving(progress):
        try:
            mp._result(block, index)
        except Exception:
            mp._stop()
            raise


def _stop_at_failure(mirais: Sequence[Mirai], progress: bool | None) -> None:
    with _Progress(len(mirais), progress) as bar:
        for m in _as_completed(mirais):
            try:
                m.result()
            except Exception:
                stop_mirai([other for other in mirais if not other.done()])
                raise
            bar.advance()


def _as_completed(mirais: Iterable[Any]) -> Iterator[Any]:
    return concurrent.futures.as_completed(mirais)


def _wait_all(mirais: Sequence[Mirai], progress: bool | None) -> None:
    if progress is False:
        for m in mirais:
            m[:]
        return
    with _Progress(len(mirais), progress) as bar:
        for _ in _as_completed(mirais):
            bar.advance()


def race_mirai(xs: Any) -> int | None:
    """Waits until one of several has resolved: the index of the first in the list that has; None for an empty list. Of
    a map over a generator, among the items that have been taken of it and not handed out."""
    if isinstance(xs, MiraiMap):
        return xs._race()
    mirais = _each(xs)
    if not mirais:
        return None
    if not any(m.done() for m in mirais):
        concurrent.futures.wait(mirais, return_when=concurrent.futures.FIRST_COMPLETED)
    return next(i for i, m in enumerate(mirais) if m.done())


def stop_mirai(x: Any) -> Any:
    """Cancels: each unresolved mirai resolves as `MiraiCancelled` at once, and its task is interrupted.

    True for each that was cancelled, False for each that had resolved: a bool, or a list for several.
    """
    if isinstance(x, MiraiMap):
        return x._stop()
    stopped = [m.cancel() for m in _each(x)]
    return stopped[0] if isinstance(x, Mirai) else stopped


def unresolved(x: Any) -> Any:
    """Whether a mirai is unresolved; for a map or a list, how many are. Anything else is resolved: False, as in R."""
    if isinstance(x, Mirai):
        return not x.done()
    if isinstance(x, MiraiMap):
        return x._left()
    if isinstance(x, (list, tuple)):
        return sum(isinstance(m, Mirai) and not m.done() for m in x)
    return x is UNRESOLVED


def is_mirai(x: Any) -> bool:
    """Whether it is a mirai, resolved or not."""
    return isinstance(x, Mirai)


def is_mirai_map(x: Any) -> bool:
    """Whether it is what `mirai_map()` returns."""
    return isinstance(x, MiraiMap)


def is_mirai_error(x: Any) -> bool:
    """Whether it is the error value of an evaluation that failed (not one that was interrupted)."""
    return isinstance(x, MiraiError) and not isinstance(x, MiraiInterrupt)


def is_mirai_interrupt(x: Any) -> bool:
    """Whether it is the error value of an evaluation that was interrupted on the daemon."""
    return isinstance(x, MiraiInterrupt)


def is_error_value(x: Any) -> bool:
    """Whether it is an error value of any kind."""
    return isinstance(x, ErrorValue)


class _Progress:
    """A bar on stderr with rate and time left; see `collect_mirai` for `wanted`."""

    def __init__(self, total: int | None, wanted: bool | None) -> None:
        self.total, self.done = total, 0        # None: nobody knows
        self.terminal = sys.stderr is not None and sys.stderr.isatty()
        self.shown = wanted is not False and sys.stderr is not None and (self.terminal or bool(wanted))
        self.start = time.monotonic()
        self.due = 0.0 if self.terminal else self.start + 5.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.shown:
            self._show("\n")

    def advance(self) -> None:
        self.done += 1
        if self.shown and time.monotonic() >= self.due:
            self._show("" if self.terminal else "\n")
            self.due = time.monotonic() + (0.05 if self.terminal else 5.0)

    def text(self, width: int) -> str:
        """One line of less than `width` characters."""
        spent = time.monotonic() - self.start
        rate = self.done / spent if spent > 0 else 0.0
        if self.total is None:
            return f"{self.done}  {rate:.{0 if rate >= 10 else 1}f}/s  {_clock(spent)}"[:width - 1]
        left = (self.total - self.done) / rate if rate else math.inf
        took = self.done >= self.total
        clock = f"{_clock(spent)}" if took else f"{_clock(left)} left"
        tail = f" {self.done}/{self.total}  {rate:.{0 if rate >= 10 else 1}f}/s  {clock}"
        room = min(40, width - len(tail) - 3)
        if room < 5:
            return tail.strip()[:width - 1]
        filled = room * self.done // max(1, self.total)
        return f"[{'#' * filled}{'.' * (room - filled)}]{tail}"

    def _show(self, end: str) -> None:
        width = 80
        with contextlib.suppress(OSError, ValueError):
            width = os.get_terminal_size(sys.stderr.fileno()).columns or width
        text = self.text(width)
        with contextlib.suppress(OSError, ValueError):      # a closed stderr must not end the wait
            sys.stderr.write(f"\r{text.ljust(width - 1)}{end}" if self.terminal else f"{text}{end}")
            sys.stderr.flush()


def _clock(seconds: float) -> str:
    if seconds == math.inf:
        return "--:--"
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"


# ======================================================================
# 18. Integrations: what others call parallelism by
# ======================================================================
# Knows:  the verbs.
# Never:  what only they need; nothing here is imported before it is used.

_executors: Any = weakref.WeakSet()
_executors_own: dict[str, Any] = {}        # profiles of executors, until they have been ended
_broken_text = "the initializer failed on every daemon, so that none is fit for a task"


class MiraiExecutor(concurrent.futures.Executor):
    """Daemons behind the standard library's interface: for `loop.run_in_executor()`, and whatever takes an executor.

        >>> from mirai import MiraiExecutor
        >>> with MiraiExecutor(2) as executor:
        ...     list(executor.map(abs, [-1, -2, 3]))
        [1, 2, 3]

    max_workers: how many local daemons, by default as many as there are CPUs. initializer, initargs: called on every
    daemon, those to come included, before its first task. compute: a profile that is set already, which is used and
    not reset; no other argument may be given then. daemon_options: as for `daemons()`, `url` and `remote` among them.

    Futures are mirais: functions and classes go by value, tasks that run can be cancelled, and only the task whose
    daemon died fails, as a MiraiConnectionReset. The interpreter waits at its end for what was submitted, as it does
    for the standard library's; `mirai()` does not. Raises ValueError where `max_workers` is not above 0, otherwise as
    `daemons()`; `submit()` and `map()` raise RuntimeError after `shutdown()`, and BrokenExecutor where the initializer
    failed.
    """

    def __init__(self, max_workers: int | None = None, *, initializer: Callable[..., object] | None = None,
                 initargs: tuple[Any, ...] = (), compute: str | None = None, **daemon_options: Any) -> None:
        if max_workers is not None and max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if compute is not None and (max_workers is not None or daemon_options):
            raise ValueError(f"the profile {compute!r} has the daemons that it has: set them with daemons()")
        self._own = compute is None
        self._name = f"executor {os.urandom(6).hex()}" if compute is None else compute
        self._lock = threading.RLock()
        self._closed = self._broken = False
        self._futures: Any = weakref.WeakSet()      # those that have not resolved are held by their link
        if self._own:
            if "remote" not in daemon_options:
                max_workers = max_workers or cpu_count()
            daemon_options.setdefault("output", True)       # as with processes that share the host's stdout
            daemons(*() if max_workers is None else (max_workers,), compute=self._name, **daemon_options)
        else:
            require_daemons(compute)
        self._profile = _find(self._name)
        if self._own:       # one that is just dropped ends as after `shutdown(wait=False)`
            _executors_own[self._name] = self._profile
            weakref.finalize(self, _end_profile_later, self._name, self._profile).atexit = False
        self._init = None if initializer is None else everywhere(initializer, *initargs, _compute=self._name)
        _await_executors()
        _executors.add(self)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Mirai:
        """`fn(*args, **kwargs)` on a daemon: a Mirai, at once; only the first waits, until the initializer has run.
        All keywords are the function's. Raises as `mirai()`."""
        if not callable(fn):
            raise TypeError(f"can't call {fn!r}")
        with self._lock:
            self._check()
            m = _submit_task(self._profile, fn, args, kwargs, None, 0, True)
            assert m is not None
            self._futures.add(m)
            return m

    def _check(self) -> None:
        if self._init is not None:
            outcomes, self._init = self._init[:], None          # waits for it: nothing can run before
            for error in filter(is_error_value, outcomes):
                _futures.LOGGER.critical("Exception in initializer:\n%s", getattr(error, "stack_trace", error))
            self._broken = all(map(is_error_value, outcomes))
        if self._broken:
            raise concurrent.futures.BrokenExecutor(_broken_text)
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _ending:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def map(self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1,
            buffersize: int | None = None) -> Iterator[Any]:
        """The results of `fn(*items)`, in order, as they come; the first failure is raised in its place, and what is
        left is cancelled. timeout: seconds from the call, TimeoutError after them. chunksize: is found out, whatever is
        said. buffersize: how many items are taken ahead of whoever consumes; None: all, at once."""
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and (isinstance(buffersize, bool) or not isinstance(buffersize, int)):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        deadline = None if timeout is None else time.monotonic() + timeout
        rows = zip(*iterables)
        if buffersize is not None:
            return self._window(fn, rows, buffersize, deadline)
        with self._lock:
            self._check()
            mp = mirai_map(list(rows), fn, _star=True, _compute=self._name)
        return self._drain(mp._feed, deadline)

    def _drain(self, feed: Any, deadline: float | None) -> Iterator[Any]:
        """Keeps no value that was handed out."""
        try:
            for block in feed.blocks:
                for index in range(len(block)):
                    if not feed.link.wait_for(lambda: block.outcomes[index] is not None, deadline):     # noqa: B023
                        raise concurrent.futures.TimeoutError
                    yield self._taken(block, index)
        finally:
            for block in feed.blocks:
                if block.left:
                    feed.link.cancel_items(block, 0, len(block), MiraiCancelled("cancelled"))

    @staticmethod
    def _taken(block: Block, index: int) -> Any:
        value, failed = block.look(index)
        if failed:
            block.mirai(index).result()
        block.outcomes[index] = (None, False)
        return value

    def _window(self, fn: Callable[..., Any], rows: Iterator[Any], size: int, deadline: float | None) -> Iterator[Any]:
        futures = deque(self.submit(fn, *row) for row in itertools.islice(rows, size))

        def results() -> Iterator[Any]:
            try:
                while futures:
                    futures[0].result(None if deadline is None else deadline - time.monotonic())
                    for row in itertools.islice(rows, 1):
                        futures.append(self.submit(fn, *row))
                    yield futures.popleft().result()
            finally:
                for m in futures:
                    m.cancel()
        return results()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more tasks, and ends its daemons once those submitted are done; `wait`: returns after that.
        cancel_futures: those that no daemon has been given are cancelled, those that run are not."""
        with self._lock:
            first, self._closed = not self._closed, True
            if cancel_futures:
                self._profile.link.withdraw([m for m in self._futures if not m.done()])
        if wait:
            self._finish()
        elif first and self._own:
            _end_profile_later(self._name, self._profile)

    def _finish(self) -> None:
        if self._own:
            _end_profile(self._name, self._profile)
        for m in list(self._futures):       # one by one: to look at all with each message is quadratic
            self._profile.link.wait(m, None)


def _end_profile(name: str, profile: Any) -> None:
    """After what it has to do."""
    profile.link.wait_for(lambda: not profile.link.unresolved(), None)
    with _setting:
        if _find(name) is profile:
            daemons(0, compute=name)
    _executors_own.pop(name, None)


def _end_profile_later(name: str, profile: Any) -> None:
    if name in _executors_own:
        threading.Thread(target=_end_profile, args=(name, profile), name="mirai-executor", daemon=True).start()


_ending = False


@functools.cache
def _await_executors() -> None:
    """Has the interpreter wait for them at its end, before it ends threads and calls what `atexit` has."""
    register = getattr(threading, "_register_atexit", atexit.register)
    register(_finish_executors)


def _finish_executors() -> None:
    global _ending
    _ending = True
    for executor in list(_executors):
        executor.shutdown()
    for name, profile in list(_executors_own.items()):
        _end_profile(name, profile)


# ======================================================================
# 19. Command line: daemon, demo
# ======================================================================
# Knows:  all of the above.
# Never:  anything that a caller of the module could not do as well.

def main(arguments: Sequence[str]) -> int:
    """`daemon URL` or `demo`; gives the exit status."""
    import argparse

    class Parser(argparse.ArgumentParser):
        def __init__(self, **options: Any) -> None:
            super().__init__(allow_abbrev=False, **options)     # a --key for --key-file would be in `ps`

        def error(self, message: str) -> NoReturn:
            self.print_usage(sys.stderr)
            self.exit(EX_USAGE, f"{self.prog}: {message}\n")

    parser = Parser(prog="mirai", description="Evaluate Python asynchronously in other processes.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    serve = commands.add_parser("daemon", help="serve a dispatcher", description=(
        "Serve the dispatcher at URL. Exit status: 0 the connection ended, 1 idle time, 2 wall time, 3 maximum of "
        "tasks; 64 usage, 69 nobody listens there, 77 refused."))
    serve.add_argument("url", metavar="URL", nargs="+", help=(
        "as status()['daemons'] shows it; of several addresses of one listener the first that answers"))
    serve.add_argument("-n", type=int, default=1, help="how many daemons to start here (1)")
    for name, text in (("idletime", "end after so many seconds without a task"),
                       ("walltime", "end after so many seconds"), ("maxtasks", "end after so many tasks")):
        serve.add_argument(f"--{name}", type=float, default=math.inf, help=text)
    serve.add_argument("--autoexit", choices=("true", "none", "false"), default="true", help=(
        "end with the connection (true), after a running task (none), or wait for a next host (false)"))
    serve.add_argument("--no-cleanup", dest="cleanup", action="store_false", help="keep what tasks change")
    serve.add_argument("--no-forward-imports", dest="forward_imports", action="store_false",
                       help="fetch no modules from the host")
    serve.add_argument("--output", action="store_true", help="show what tasks print")
    serve.add_argument("--asyncdial", action="store_true", help="try until somebody listens there")
    serve.add_argument("--tlscert", help="a PEM file, of the certificate or authority that the listener must have")
    serve.add_argument("--rs", type=int, nargs=7, help="the random stream to begin with, as nextstream() gives")
    serve.add_argument("--key-file", help="a file with the profile's key, 64 hexadecimal digits; '-': standard input")
    demo = commands.add_parser("demo", help="measure the standard library on daemons, and show what else there is")
    demo.add_argument("--url", help="where the daemons dial, as tls+tcp://127.0.0.1:0")
    options = parser.parse_args(arguments)
    if options.command == "demo" and options.url:
        try:
            parse_url(options.url)
        except ValueError as error:
            return _complain(error, EX_USAGE)
    return _demo(options.url) if options.command == "demo" else _serve(options)


def _serve(options: Any) -> int:
    names = ("cleanup", "forward_imports", "output", "asyncdial", "rs", "tlscert", *_LIMITS)
    given = {name: getattr(options, name) for name in names}
    given["autoexit"] = {"true": True, "none": None, "false": False}[options.autoexit]
    try:
        check_daemon_urls(options.url, options.tlscert)
        check_daemon_options(given)
        if options.n < 1:
            raise ValueError(f"-n {options.n}: expected 1 or more")
        key = _read_key_file(options.key_file) if options.key_file else find_key(*options.url)
    except Refused as error:
        return _complain(error, EX_NOPERM)
    except (ValueError, OSError) as error:
        return _complain(error, EX_USAGE)
    return _several(options.n, lambda: _serve_one(lambda: daemon(options.url, key=key, **given), given["output"]))


def serve_launched(about: Mapping[str, Any]) -> int:
    """The life of daemons that a launcher has sent this file to; see `payload()`."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    options = _daemon_options(about["options"], random_stream())

    def serve() -> int:
        patient = functools.partial(dial, about["urls"], bytes.fromhex(about["key"]), "daemon", tlscert=options.cert)
        hello = {"launch": about["launch"]}
        connection = _dial_patiently(patient, hello, time.monotonic() + DIAL_TIME, ConnectionError) or patient(hello)
        return _serve_from(connection, patient, options)
    return _several(about["n"], lambda: _serve_one(serve, options.output))


def _several(n: int, serve: Callable[[], int]) -> int:
    """In n processes, which a SIGTERM to this one ends as well; the largest of their statuses."""
    if n == 1:
        return serve()
    children = []
    for _ in range(n):
        pid = os.fork()
        if pid == 0:
            return serve()
        children.append(pid)

    def end(signum: int, frame: Any) -> None:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    signal.signal(signal.SIGTERM, end)
    statuses = [_wait_for(pid) for pid in children]
    return max(statuses, key=abs)


def _wait_for(pid: int) -> int:
    while True:
        with contextlib.suppress(KeyboardInterrupt):        # Ctrl-C is for the daemons too, which end by it
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _serve_one(serve: Callable[[], int], output: bool) -> int:
    try:
        if not output:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # what tasks print is dropped
        return serve()
    except Refused as error:
        return _complain(error, EX_NOPERM)
    except OSError as error:
        return _complain(f"can't reach the host: {error}", EX_UNAVAILABLE)
    except KeyboardInterrupt:
        return 130


def _complain(error: object, status: int) -> int:
    print(f"mirai: {error}", file=sys.stderr)
    return status


def _read_key_file(path: str) -> bytes:
    if path == "-":
        return parse_key(next((line for line in sys.stdin or () if line.strip()), ""), "standard input")
    with open(path, encoding="utf-8-sig") as file:
        if os.stat(file.fileno()).st_mode & 0o077 and os.name == "posix":
            _complain(f"others may read {path}, and run code wherever its key is used: chmod 600", 0)
        return parse_key(file.read(), path)


# -- the demo

_DEMO_BYTES = 8 << 20       # of source: a few seconds on one core


def _demo(url: str | None = None) -> int:
    n = max(2, cpu_count())
    files = _demo_files()
    print(f"The longest functions of this Python's standard library: {len(files)} files, "
          f"{sum(map(os.path.getsize, files)) / 1e6:.1f} MB")
    start = time.perf_counter()
    alone = [_longest_functions(path) for path in files]
    sequential = time.perf_counter() - start
    with daemons(n, url):
        start = time.perf_counter()
        found = mirai_map(files, _longest_functions).results(progress=None)
        parallel = time.perf_counter() - start
        assert found == alone
        for length, name, path in heapq.nlargest(10, itertools.chain.from_iterable(each for _, each in found)):
            print(f"{length:6} lines  {name:32} {path}")
        print(f"{sum(count for count, _ in found)} functions; sequential {sequential:.2f} s, "
              f"on {n} daemons {parallel:.2f} s: {sequential / parallel:.1f} times as fast\n")
        _demo_failures()
        print("\nstatus():", status())
    return 0


def _demo_files() -> list[str]:
    """The standard library's own sources, the largest first, `_DEMO_BYTES` of them at most."""
    import sysconfig
    found = []
    for directory, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages", "test", "tests", "__pycache__")]
        found += [os.path.join(directory, name) for name in names if name.endswith(".py")]
    taken, left = [], _DEMO_BYTES
    for size, path in sorted(((os.path.getsize(path), path) for path in found), reverse=True):
        if size <= left:
            taken.append(path)
            left -= size
    return taken


def _longest_functions(path: str) -> tuple[int, list[tuple[int, str, str]]]:
    """How many functions a file has, and the ten longest: lines, name, file."""
    import ast
    with open(path, "rb") as file:
        source = file.read()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return 0, []        # a few files are templates, or another version's
    short = os.path.join(os.path.basename(os.path.dirname(path)), os.path.basename(path))
    found = [((node.end_lineno or 0) - node.lineno + 1, node.name, short) for node in ast.walk(tree)
             if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return len(found), heapq.nlargest(10, found)


def _demo_failures() -> None:
    failed = mirai("int('twelve')")
    print("A task that fails is an error value:", f"{failed[:]!r}", "with the daemon's traceback:")
    print("    " + failed.data.stack_trace.strip().replace("\n", "\n    "))
    running = mirai(time.sleep, 60)
    deadline = time.monotonic() + START_TIME
    while not status()["mirai"]["executing"] and time.monotonic() < deadline:
        time.sleep(0.01)
    stopped = mirai(time.sleep, 60, _timeout=0.2)
    print("One that is cancelled while it sleeps:", f"{stop_mirai(running)} -> {running.data!r}")
    print("One with a _timeout of 0.2 s:", f"{stopped[:]!r}")


def _as_module() -> types.ModuleType:
    """This file under its importable name: run as `__main__` it is what a daemon can't import from."""
    from importlib.util import module_from_spec, spec_from_file_location
    spec = __spec__ or spec_from_file_location(os.path.splitext(os.path.basename(__file__))[0], __file__)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(_as_module().main(sys.argv[1:]))
