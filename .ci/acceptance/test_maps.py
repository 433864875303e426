#!/usr/bin/env python3
"""Acceptance tests of mirai's maps (issue 4, point 1): `cd the repository && python3 test_maps.py [-v] [TestMaps[.test] ...]`.

To be pasted into test_mirai.py after TestVerbs: everything between the two lines of `# >8 ...`.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.environ.get("MIRAI_UNDER_TEST", os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))

import array
import asyncio
import collections
import concurrent.futures
import contextlib
import gc
import importlib.util
import itertools
import operator
import random
import signal
import socket
import tempfile
import threading
import time
import types
import unittest

import mirai
import test_mirai
from mirai import (MiraiCancelled, MiraiConnectionReset, MiraiError, MiraiTimeout, call_mirai, daemons,
                   info, launch_local, mirai_map, race_mirai, status, stop_mirai, unresolved)
from test_mirai import (HOW_IT_SHOWS, LONG, ByHand, Case, Gate, Host, _at_once, _end_process, _enter_gate, _pids,
                        _raise, _strike, _Ugly, dispatcher_pid, family_of, is_alive, joined,
                        run_python, wait_until)

for _it in (_enter_gate, _end_process, _raise, _strike, _Ugly):      # by value, as where test_mirai.py is the script
    _it.__module__ = "__main__"

# >8 ---------------------------------------------------------------------------------------------------------


SOON = 30.0     # seconds; a test of maps that takes longer hangs, and fails


class Trace:
    """Where map items say that they begin and end, in a file that knows whether any ran twice."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.folder.name, "trace")
        return self

    def __exit__(self, *_):
        self.folder.cleanup()

    def lines(self):
        with contextlib.suppress(FileNotFoundError), open(self.path) as file:
            return [(word, int(item), int(pid)) for word, item, pid in map(str.split, file)]
        return []

    def _of(self, wanted):
        return [item for word, item, _ in self.lines() if word == wanted]

    def order(self):
        """The items in the order in which they began."""
        return self._of("begin")

    def begun(self):
        return collections.Counter(self._of("begin"))

    def ended(self):
        return collections.Counter(self._of("end"))


def _note(path, word, item):
    """One line in one write, appended: those of many processes do not mix."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(fd, f"{word} {item} {os.getpid()}\n".encode())
    finally:
        os.close(fd)


def _item(item, path, enter=None, held=(), seconds=0.0):
    """A map item: twice its number. It says that it begins and ends; those of `held` stop at a gate in between."""
    _note(path, "begin", item)
    if item in held:
        enter(item)
    if seconds:
        time.sleep(seconds)
    _note(path, "end", item)
    return 2 * item


def _held(item, enter, held):
    """The same without a trace."""
    return enter(item) if item in held else item


def _deadly(item, path, ways):
    """A map item that ends its daemon where `ways` says how."""
    _note(path, "begin", item)
    if item in ways:
        _end_process(ways[item])
    _note(path, "end", item)
    return item


def _deadly_at_first(item, path, deadly, times):
    """A map item that ends its daemon as often as `times` says, and then lives."""
    _note(path, "begin", item)
    if item in deadly:
        with open(path) as file:
            if sum(line.startswith(f"begin {item} ") for line in file) <= times:
                os.kill(os.getpid(), signal.SIGKILL)
    return item


class _Loud:
    """Says in a file where it is made anew from its bytes; `size` bytes of ballast."""

    def __init__(self, path, size):
        self.path, self.ballast = path, bytes(size)

    def __setstate__(self, state):
        self.__dict__.update(state)
        _note(self.path, "load", len(self.ballast))


class _Locked:
    def __init__(self):
        self.lock = threading.Lock()


@contextlib.contextmanager
def granting(size):
    """Maps give daemons so many items at a time, whatever they take."""
    before = mirai._fixed_chunk[0]
    mirai._fixed_chunk[0] = size
    try:
        yield
    finally:
        mirai._fixed_chunk[0] = before


class Forwarder:
    """A port that passes everything on to a TCP URL, and counts the bytes that come back to those who dialed it."""

    def __init__(self, url):
        host, _, port = url.rpartition("//")[2].rpartition(":")
        self.target = host, int(port)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = "tcp://127.0.0.1:%d" % self.listener.getsockname()[1]
        self.count = 0
        self.lock = threading.Lock()
        self.socks = [self.listener]
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for sock in self.socks:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(LONG)
        for sock in self.socks:
            sock.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(self.target)
                self.socks += [near, far]
                for pair in ((near, far, False), (far, near, True)):
                    self.threads.append(threading.Thread(target=self._pass, args=pair))
                    self.threads[-1].start()

    def _pass(self, source, sink, counted):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                if counted:
                    with self.lock:
                        self.count += len(data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


# Tables of libraries that may not be there: what of their surface a map may use.


class _FakeIndex(list):
    def tolist(self):
        return list(self)

    to_list = tolist


class _FakeArray:
    """numpy.ndarray of one or two dimensions; it travels as lists."""

    def __init__(self, values):
        self.values = values
        self.ndim = 2 if values and isinstance(values[0], list) else 1
        self.shape = (len(values), len(values[0])) if self.ndim == 2 else (len(values),)
        self.size, self.dtype = len(values), types.SimpleNamespace(names=None, kind="i", hasobject=False)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return _FakeArray(self.values[i]) if self.ndim == 2 else self.values[i]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def tolist(self):
        return [list(row) for row in self.values] if self.ndim == 2 else list(self.values)

    def __bool__(self):
        raise ValueError("The truth value of an array with more than one element is ambiguous")

    def __eq__(self, other):
        raise ValueError("arrays are compared by element")

    def __reduce__(self):
        return list, (self.tolist(),)


class _FakeTable:
    """What the tables have in common: columns with names, an ambiguous truth, iteration that gives no rows."""

    ndim = 2

    def __init__(self, columns, index=None):
        self._columns = columns
        self._index = range(len(next(iter(columns.values()), []))) if index is None else index
        self.shape = len(self._index), len(columns)

    def __len__(self):
        return self.shape[0]

    def _rows(self):
        return [tuple(row) for row in zip(*self._columns.values())]

    def _dicts(self):
        return [dict(zip(self._columns, row)) for row in self._rows()]

    def __bool__(self):
        raise ValueError("The truth value of a table is ambiguous")

    def __eq__(self, other):
        raise ValueError("tables are compared by element")

    def __reduce__(self):
        raise TypeError("a whole table should not travel")


class _FakePandas(_FakeTable):
    def __iter__(self):
        return iter(self._columns)

    @property
    def columns(self):
        return _FakeIndex(self._columns)

    @property
    def index(self):
        return _FakeIndex(self._index)

    def __getitem__(self, name):
        return _FakeIndex(self._columns[name])

    def items(self):
        return [(name, self[name]) for name in self._columns]

    def keys(self):
        return self.columns

    def itertuples(self, index=True, name="Pandas"):
        rows = [(label, *row) if index else row for label, row in zip(self._index, self._rows())]
        if name is None:
            return iter(rows)
        fields = (["Index"] if index else []) + [str(column) for column in self._columns]
        return map(collections.namedtuple(name, fields, rename=True)._make, rows)

    def to_dict(self, orient="dict", **_):
        if orient == "records":
            return self._dicts()
        if orient == "list":
            return dict(self._columns)
        if orient == "split":
            return {"index": list(self._index), "columns": list(self._columns), "data": [list(row) for row in self._rows()]}
        return {name: dict(zip(self._index, values)) for name, values in self._columns.items()}


class _FakePolars(_FakeTable):
    def __iter__(self):
        return iter(self._columns.values())

    @property
    def columns(self):
        return list(self._columns)

    @property
    def height(self):
        return self.shape[0]

    @property
    def width(self):
        return self.shape[1]

    def iter_rows(self, *, named=False, buffer_size=512):
        return iter(self.rows(named=named))

    def rows(self, *, named=False):
        return self._dicts() if named else self._rows()

    def row(self, i, *, named=False):
        return self.rows(named=named)[i]

    def to_dicts(self):
        return self._dicts()


class _FakeArrow(_FakeTable):
    def __getitem__(self, key):
        return self.column(key)

    def column(self, key):
        values = list(self._columns[self.column_names[key] if isinstance(key, int) else key])
        return types.SimpleNamespace(to_pylist=lambda: values)

    @property
    def column_names(self):
        return list(self._columns)

    @property
    def columns(self):
        return [self.column(name) for name in self._columns]

    def itercolumns(self):
        return iter(self.columns)

    @property
    def schema(self):
        return types.SimpleNamespace(names=self.column_names)

    @property
    def num_rows(self):
        return self.shape[0]

    @property
    def num_columns(self):
        return self.shape[1]

    def to_pylist(self):
        return self._dicts()

    def to_pydict(self):
        return {name: list(values) for name, values in self._columns.items()}

    def to_batches(self, *_, **__):
        return [self]


@contextlib.contextmanager
def fake_library(cls, package, module, name):
    """A class that passes for `package.name`: so it is called, and there its package has it."""
    kind = type(name, (cls,), {"__module__": module})
    there = types.ModuleType(package)
    setattr(there, name, kind)
    before = {key: sys.modules.pop(key) for key in list(sys.modules) if key.partition(".")[0] == package}
    sys.modules[package] = there
    if module != package:
        sys.modules[module] = there
    try:
        yield kind
    finally:
        for key in {package, module}:
            sys.modules.pop(key, None)
        sys.modules.update(before)


def needs(package):
    return unittest.skipUnless(importlib.util.find_spec(package), f"{package} is not installed")


class TestMaps(Case):
    def setUp(self):
        super().setUp()
        self._alarm = signal.signal(signal.SIGALRM, self._hangs)
        signal.setitimer(signal.ITIMER_REAL, SOON, 10.0)

    def tearDown(self):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._alarm)
        daemons(0)      # whatever a test that failed has left
        super().tearDown()

    @staticmethod
    def _hangs(*_):
        raise AssertionError(f"no end within {SOON} s")

    def settled(self, mp, but=0, timeout=10.0):
        wait_until(lambda: unresolved(mp) <= but, timeout, f"all but {but} items' end")

    # -- chunks and order

    def test_a_hundred_thousand_items_come_back_in_their_order(self):
        with daemons(2):
            mp = mirai_map(range(100_000), lambda x: x * x)
            self.assertEqual(len(mp), 100_000)
            self.assertEqual(mp.results(), [x * x for x in range(100_000)])
            self.assertEqual((mp[0].result(), mp[-1].result(), mp[77_777].data), (0, 99_999 ** 2, 77_777 ** 2))
            self.assertEqual((unresolved(mp), repr(mp)), (0, "<mirai map: 100000 of 100000 resolved>"))
            wait_until(lambda: info()[2:] == (0, 0, 100_000), 10, "every item's being counted")

    def test_every_grant_size_and_number_of_daemons_gives_the_same(self):
        def work(x):
            return x // (x % 100 - 50)

        expected = [x // (x % 100 - 50) if x % 100 != 50 else ZeroDivisionError for x in range(1000)]
        for n, size in itertools.product((1, 3), (None, 1, 2, 7, 64, 999, 1000, 4096)):
            with self.subTest(n=n, size=size), granting(size), daemons(n):
                mp = mirai_map(range(1000), work)
                self.assertEqual([getattr(m.exception(SOON), "__class__", None) is ZeroDivisionError for m in mp],
                                 [x % 100 == 50 for x in range(1000)])
                self.assertEqual([ZeroDivisionError if mirai.is_mirai_error(v) else v for v in mp[:]], expected)

    def test_tiny_items_cost_a_fraction_of_one_task_each(self):
        def took(size):
            with granting(size), daemons(2):
                mirai_map(range(100), operator.neg)[:]
                begin = time.perf_counter()
                self.assertEqual(mirai_map(range(20_000), operator.neg).results()[-1], -19_999)
                return time.perf_counter() - begin

        pairs = [(took(None), took(1)) for _ in range(3)]
        self.assertLess(min(a for a, _ in pairs), 0.5 * min(b for _, b in pairs), pairs)

    def test_a_long_item_holds_none_of_the_others_up_wherever_it_is(self):
        for size, place in itertools.product((None, 64, 4096), (0, 5, 300, 1999)):
            with self.subTest(size=size, place=place), Trace() as trace, Gate() as gate, granting(size), daemons(2):
                mp = mirai_map(range(2000), _item, trace.path, gate.enter, (place,))
                self.settled(mp, but=1)
                self.assertFalse(mp[place].done())
                gate.arrived()
                gate.open()
                self.assertEqual(mp.results(), list(range(0, 4000, 2)))
                self.assertEqual(trace.begun(), collections.Counter(range(2000)))

    def test_a_long_item_that_holds_the_interpreter_lock_holds_none_of_the_others_up(self):
        def work(x, place):
            return len(f"{3 ** 6_000_000:x}") if x == place else x      # C code that lets nobody in: some seconds

        for size in (None, 64):
            with self.subTest(size=size), granting(size), daemons(2):
                mp = mirai_map(range(500), work, 20)
                self.settled(mp, but=1)
                self.assertFalse(mp[20].done())

    def test_items_that_were_granted_to_a_daemon_that_is_stopped_run_elsewhere(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(2):
                mp = mirai_map(range(200), _item, trace.path, gate.enter, (20,))
                pid = gate.arrived()[1]
                os.kill(pid, signal.SIGSTOP)
                try:
                    self.settled(mp, but=1)
                finally:
                    os.kill(pid, signal.SIGCONT)
                gate.open()
                self.assertEqual(mp.results(), list(range(0, 400, 2)))
                self.assertEqual(trace.begun(), collections.Counter(range(200)))

    def test_two_long_items_of_one_chunk_run_on_two_daemons(self):
        for size in (None, 64, 4096):
            with self.subTest(size=size), Gate() as gate, granting(size), daemons(2):
                mp = mirai_map(range(100), _held, gate.enter, (7, 8))
                first, second = gate.arrived(), gate.arrived()
                self.assertEqual({first[0], second[0]}, {7, 8})
                self.assertNotEqual(first[1], second[1])
                gate.open()
                self.assertEqual(mp[:], list(range(100)))

    def test_an_items_value_is_there_while_a_later_one_of_its_chunk_runs(self):
        for size, url in itertools.product((None, 64), (None, "tcp://127.0.0.1:0")):
            with self.subTest(size=size, url=url), Gate() as gate, granting(size), daemons(1, url=url):
                mp = mirai_map(range(60), _held, gate.enter, (40,))
                self.assertEqual([mp[i].result(10) for i in range(40)], list(range(40)))
                self.assertEqual((mp[40].done(), mp[41].done(), unresolved(mp)), (False, False, 20))
                self.assertEqual(mp.data, [*range(40), *[mirai.UNRESOLVED] * 20])
                gate.arrived()
                gate.open()
                self.assertEqual(mp[:], list(range(60)))

    def test_with_one_daemon_items_begin_in_their_order(self):
        for size in (None, 1, 64):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(1):
                mirai_map(range(500), _item, trace.path)[:]
                self.assertEqual(trace.order(), list(range(500)))

    def test_a_map_and_what_is_submitted_before_and_after_it_begin_in_the_order_of_submission(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(1):
                mirai.mirai(gate.enter)
                gate.arrived()
                order = [mirai.mirai(_item, i, trace.path) for i in range(5)]
                order += mirai_map(range(5, 105), _item, trace.path)
                order += [mirai.mirai(_item, 105, trace.path)]
                order += mirai_map(range(106, 206), _item, trace.path)
                order += [mirai.mirai(_item, 206, trace.path)]
                gate.open()
                self.settled(order)
                self.assertEqual(trace.order(), list(range(207)))

    def test_a_task_after_a_running_map_waits_for_its_items_but_not_for_its_long_ones(self):
        for size in (None, 64):
            with self.subTest(size=size), Gate() as gate, granting(size), daemons(2):
                mp = mirai_map(range(500), _held, gate.enter, (3,))
                after = mirai.mirai(abs, -1)
                self.assertEqual(after.result(10), 1)
                self.assertFalse(mp[3].done())
                gate.arrived()
                gate.open()

    def test_what_is_mapped_is_what_it_was_at_the_call(self):
        def offset(x):
            return x[0] + len(x) + more[0]

        more = [10]
        items = [[i] for i in range(500)]
        with Gate() as gate, daemons(1):
            mirai.mirai(gate.enter)
            gate.arrived()
            mp = mirai_map(items, offset)
            for x in items:
                x.append(0)
            items.clear()
            more[0] = 20
            gate.open()
            self.assertEqual(mp[:], list(range(11, 511)))

    def test_every_collection_that_has_a_size_is_mapped_by_its_elements(self):
        table = {"a": 1, "b": 2, "c": 3}
        with daemons(2):
            for items in ([3, 1, 2], (3, 1, 2), range(3, 30, 7), {3, 1, 2}, frozenset((3, 1)), table.keys(), table.values(),
                          table.items(), collections.deque([3, 1, 2]), "abc", b"abc", bytearray(b"abc"), memoryview(b"abc"),
                          array.array("d", [1.5, 2.5]), collections.Counter("aab").elements(), [None, False, 0, "", ()]):
                is_lazy = hasattr(items, "__next__")
                with self.subTest(items=items):
                    mp = mirai_map(items, lambda x: (x, type(x).__name__))
                    expected = [(x, type(x).__name__) for x in (["a", "a", "b"] if is_lazy else items)]
                    if not is_lazy:
                        self.assertEqual(len(mp), len(expected))
                    self.assertEqual((mp[:], mp.names), (expected, None))

    def test_arguments_that_make_no_sense_raise_at_the_call_and_say_what_would(self):
        with daemons(1):
            for error, text, call in (
                    (TypeError, "3", lambda: mirai_map(3, abs)),
                    (TypeError, "None", lambda: mirai_map(None, abs)),
                    (TypeError, "callable", lambda: mirai_map([1], "abs")),
                    (TypeError, "callable", lambda: mirai_map([1], None)),
                    (TypeError, "_promise", lambda: mirai_map([1], abs, _promise=3)),
                    (TypeError, "_promise", lambda: mirai_map([1], abs, _promise=(print, 3))),
                    ((TypeError, ValueError), "_promise", lambda: mirai_map([1], abs, _promise=(print, print, print))),
                    (TypeError, "_star", lambda: mirai_map([1], abs, _stra=True)),
                    (TypeError, "_promise", lambda: mirai_map([1], abs, _promises=print)),
                    (TypeError, "_timeout", lambda: mirai_map([1], abs, _time_out=1)),
                    (ValueError, "_timeout", lambda: mirai_map([1], abs, _timeout=-1)),
                    (ValueError, "_retries", lambda: mirai_map([1], abs, _retries=-1))):
                with self.subTest(text=text), self.assertRaises(error) as caught:
                    call()
                self.assertIn(text, str(caught.exception))
            self.assertEqual(mirai_map([-1], abs)[:], [1])

    def test_a_map_goes_to_the_profile_that_is_named(self):
        try:
            daemons(1, compute="a")
            daemons(2, compute="b")
            a, b = _pids(1, "a"), _pids(2, "b")
            self.assertEqual(set(mirai_map(range(100), lambda _: os.getpid(), _compute="a")[:]), a)
            self.assertLessEqual(set(mirai_map(range(100), lambda _: os.getpid(), _compute="b")[:]), b)
            with self.assertRaisesRegex(RuntimeError, "'c'"):
                mirai_map([1], abs, _compute="c")
            with self.assertRaisesRegex(RuntimeError, "no daemons are set"):
                mirai_map([1], abs)
        finally:
            daemons(0, compute="a")
            daemons(0, compute="b")

    def test_arguments_after_the_item_reach_every_item(self):
        with daemons(2):
            mp = mirai_map(range(300), lambda x, a, b=0, *, c=0, timeout=0: (x, a, b, c, timeout), "a", "b", c="c", timeout=9)
            self.assertEqual(mp[:], [(i, "a", "b", "c", 9) for i in range(300)])

    # -- each item by itself: errors, cancels, timeouts, retries

    def test_an_item_that_fails_costs_no_other_and_keeps_its_own_error(self):
        class Own(ValueError):
            pass

        def fail(x):
            if x % 3 == 0:
                raise Own(f"item {x}")
            return x

        for size in (None, 64):
            with self.subTest(size=size), granting(size), daemons(2):
                mp = mirai_map(range(300), fail)
                values = mp[:]
                for i, (m, value) in enumerate(zip(mp, values)):
                    if i % 3:
                        self.assertEqual((value, m.exception()), (i, None))
                    else:
                        self.assertIs(type(value), MiraiError)
                        self.assertIn(f"item {i}", str(value))
                        self.assertIn("fail", value.stack_trace)
                        self.assertIs(type(m.exception()), Own)
                with self.assertRaisesRegex(Own, "^item 0$") as caught:
                    mp.results()
                self.assertIs(caught.exception.__cause__, mp[0].data)

    def test_results_raises_the_error_of_the_first_item_that_failed_not_of_the_first_to_fail(self):
        def work(x, enter):
            if x == 0:
                enter(x)
            if x in (0, 3):
                raise LookupError(x)
            return x

        with Gate() as gate, daemons(2):
            mp = mirai_map(range(5), work, gate.enter)
            gate.arrived()
            wait_until(mp[3].done, 10)
            self.assertFalse(mp[0].done())
            gate.open()
            with self.assertRaises(LookupError) as caught:
                mp.results()
            self.assertEqual(caught.exception.args, (0,))

    def test_cancelled_items_that_await_never_run(self):
        for size in (None, 1, 64):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(1):
                mirai.mirai(gate.enter)
                gate.arrived()
                mp = mirai_map(range(200), _item, trace.path)
                self.assertTrue(mp[7].cancel())
                self.assertEqual(stop_mirai([mp[i] for i in range(0, 200, 2)]), [True] * 100)
                self.assertFalse(mp[7].cancel())
                self.assertEqual({type(mp[i].data) for i in range(0, 200, 2)}, {MiraiCancelled})
                self.assertEqual(unresolved(mp), 99)
                gate.open()
                self.settled(mp)
                self.assertEqual([mp[i].data for i in range(9, 200, 2)], list(range(18, 400, 4)))
                self.assertEqual(trace.begun(), collections.Counter(i for i in range(1, 200, 2) if i != 7))

    def test_cancelled_items_of_a_chunk_that_runs_never_run(self):
        for size in (None, 64, 4096):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(1):
                mp = mirai_map(range(200), _item, trace.path, gate.enter, (100,))
                self.assertEqual(gate.arrived()[0], 100)
                self.assertEqual(stop_mirai([mp[i] for i in range(101, 200, 2)]), [True] * 50)
                self.assertTrue(all(mp[i].cancelled() and type(mp[i].data) is MiraiCancelled for i in range(101, 200, 2)))
                wait_until(lambda: sum(info()[2:4]) == 50, 10, "the dispatcher's having heard of it")
                gate.open()
                self.settled(mp)
                live = [i for i in range(200) if i <= 100 or i % 2 == 0]
                self.assertEqual([mp[i].result() for i in live], [2 * i for i in live])
                self.assertEqual(trace.begun(), collections.Counter(live))

    def test_the_item_that_runs_can_be_cancelled_and_the_rest_of_its_chunk_runs_on_once(self):
        for size, url in itertools.product((None, 64), (None, "tcp://127.0.0.1:0")):
            with self.subTest(size=size, url=url), Trace() as trace, Gate() as gate, granting(size), daemons(1, url=url):
                pids = _pids(1)
                mp = mirai_map(range(200), _item, trace.path, gate.enter, (50, 120))
                for place in (50, 120):
                    self.assertEqual(gate.arrived()[0], place)
                    self.assertTrue(mp[place].cancel())
                    self.assertEqual((type(mp[place].data), mp[place].cancel()), (MiraiCancelled, False))
                self.settled(mp)        # the gate was never opened: both were interrupted
                self.assertEqual([m.result() for i, m in enumerate(mp) if i not in (50, 120)],
                                 [2 * i for i in range(200) if i not in (50, 120)])
                self.assertEqual(trace.begun(), collections.Counter(range(200)))
                self.assertEqual(set(range(200)) - set(trace.ended()), {50, 120})
                self.assertEqual(_pids(1), pids)

    def test_an_item_that_swallows_its_interrupt_passes_it_on_to_no_other(self):
        def stubborn(x, enter):
            if x == 5:
                try:
                    enter(x)
                except BaseException:
                    return "swallowed"
            return x

        for size in (None, 64):
            with self.subTest(size=size), Gate() as gate, granting(size), daemons(1):
                mp = mirai_map(range(100), stubborn, gate.enter)
                gate.arrived()
                self.assertTrue(mp[5].cancel())
                self.settled(mp)
                self.assertEqual([v for v in mp[:] if not isinstance(v, MiraiCancelled)], [i for i in range(100) if i != 5])
                self.assertTrue(mp[5].cancelled())

    def test_cancels_at_random_moments_hit_their_own_item_and_no_other(self):
        for size in (None, 16):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                chance, said, place = random.Random(3), {}, 0
                mp = mirai_map(range(1500), _item, trace.path, seconds=0.0005)
                while place < 1450:
                    near = place + chance.choice((0, 0, 1, 1, 2, 3, 5, 8, 30))      # runs, was granted, or waits
                    if near not in said:
                        said[near] = mp[near].cancel()
                    place += chance.randrange(6)
                    wait_until(mp[place].done, 10)
                    while mp[place].done() and place < 1450:
                        place += 1
                self.settled(mp)
                for i, m in enumerate(mp):
                    if said.get(i):
                        self.assertIs(type(m.data), MiraiCancelled)
                    else:
                        self.assertEqual(m.data, 2 * i)
                self.assertGreater(sum(said.values()), 50)
                self.assertEqual(max(trace.begun().values()), 1)
                self.assertLessEqual({i for i in range(1500) if not said.get(i)}, set(trace.ended()))
                self.assertEqual(mirai.mirai(abs, -1).result(10), 1)

    def test_stop_ends_a_map_and_its_daemons_are_free_at_once(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(2):
                pids = _pids(2)
                mp = mirai_map(range(500), _item, trace.path, gate.enter, (20, 21))
                gate.arrived(), gate.arrived()
                self.assertEqual([m.result(10) for m in itertools.islice(mp, 20)], list(range(0, 40, 2)))
                wait_until(lambda: unresolved(mp) == 500 - len(trace.ended()), 10)
                done = [m.done() for m in mp]
                stopped = stop_mirai(mp)
                self.assertTrue(all(type(s) is bool for s in stopped))
                self.assertEqual(stopped, [not d for d in done])
                self.assertEqual((unresolved(mp), stop_mirai(mp)), (0, [False] * 500))
                self.assertEqual([mirai.is_error_value(v) for v in mp[:]], stopped)
                self.assertEqual(_pids(2), pids)        # both take tasks: what ran was interrupted
                self.assertEqual(max(trace.begun().values()), 1)
                wait_until(lambda: info()[2:4] == (0, 0), 10)

    def test_items_that_await_when_their_map_is_stopped_never_run(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(2):
                held = [mirai.mirai(gate.enter) for _ in range(2)]
                gate.arrived(), gate.arrived()
                mp = mirai_map(range(2000), _item, trace.path)
                held[0].cancel()        # its daemon begins with the map, at its first items
                wait_until(trace.begun, 10)
                stop_mirai(mp)
                gate.open()
                self.assertEqual(len(_pids(2)), 2)
                late = set(trace.begun()) - set(range(len(trace.begun())))
                self.assertFalse(late, "items that ran after others before them had been stopped")

    def test_each_item_has_its_timeout_from_the_call_and_such_an_item_never_runs(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(1):
                mirai.mirai(gate.enter)
                gate.arrived()
                begin = time.monotonic()
                mp = mirai_map(range(100), _item, trace.path, _timeout=0.2)
                values = mp[:]
                self.assertTrue(0.2 <= time.monotonic() - begin < 5)
                self.assertEqual({type(v) for v in values}, {MiraiTimeout})
                gate.open()
                self.assertEqual(mirai.mirai(abs, -1).result(10), 1)
                self.assertEqual(trace.begun(), {})

    def test_a_timeout_interrupts_the_item_that_runs_and_leaves_those_that_ended_as_they_are(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(1):
                pids = _pids(1)
                mp = mirai_map(range(100), _item, trace.path, gate.enter, (50,), _timeout=0.5)
                self.settled(mp)
                self.assertEqual([mp[i].result() for i in range(50)], list(range(0, 100, 2)))
                self.assertEqual({type(mp[i].data) for i in range(50, 100)}, {MiraiTimeout})
                with self.assertRaises(MiraiTimeout):
                    mp.results()
                self.assertEqual(_pids(1), pids)
                self.assertNotIn(50, trace.ended())
                self.assertLessEqual(set(trace.begun()), set(range(52)))

    def test_an_item_that_ends_its_daemon_runs_again_as_often_as_its_retries_allow_and_no_other_does(self):
        for size, retries, deaths in itertools.product((None, 64), (0, 1, 2), (1, 2)):
            with self.subTest(size=size, retries=retries, deaths=deaths), Trace() as trace, granting(size), daemons(2):
                deadly = (0, 33, 34, 99)
                mp = mirai_map(range(100), _deadly_at_first, trace.path, deadly, deaths, _retries=retries)
                self.settled(mp)
                for i, value in enumerate(mp[:]):
                    if i in deadly and deaths > retries:
                        self.assertIs(type(value), MiraiConnectionReset)
                    else:
                        self.assertEqual(value, i)
                runs = 1 + min(deaths, retries)
                self.assertEqual(trace.begun(), {i: runs if i in deadly else 1 for i in range(100)})

    # -- daemons that die, join and leave

    def test_of_ten_thousand_items_ten_end_their_daemon_and_exactly_those_are_19s(self):
        for size in (None, 256):
            places = random.Random(4).sample(range(10_000), 10)
            ways = dict(zip(places, itertools.cycle(HOW_IT_SHOWS)))
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                mp = mirai_map(range(10_000), _deadly, trace.path, ways)
                self.settled(mp)
                values = mp[:]
                self.assertEqual([v for i, v in enumerate(values) if i not in ways], [i for i in range(10_000) if i not in ways])
                for i, how in ways.items():
                    self.assertIs(type(values[i]), MiraiConnectionReset)
                    self.assertIn(HOW_IT_SHOWS[how], str(values[i]))
                self.assertEqual(trace.begun(), collections.Counter(range(10_000)))
                wait_until(lambda: info().connections == 2, 10, "the daemons' being back")

    def test_deaths_side_by_side_and_at_both_ends_cost_themselves_alone(self):
        for size, deadly in itertools.product((None, 64, 4096), ((0,), (99,), (0, 1, 2), (49, 50, 51, 52), tuple(range(90, 100)))):
            with self.subTest(size=size, deadly=deadly), Trace() as trace, granting(size), daemons(2):
                mp = mirai_map(range(100), _deadly, trace.path, dict.fromkeys(deadly, "SIGKILL"))
                self.settled(mp)
                self.assertEqual([i for i, v in enumerate(mp[:]) if isinstance(v, MiraiConnectionReset)], list(deadly))
                self.assertEqual([v for v in mp[:] if not isinstance(v, MiraiConnectionReset)], sorted(set(range(100)) - {*deadly}))
                self.assertEqual(trace.begun(), collections.Counter(range(100)))

    def test_a_map_of_which_every_item_ends_its_daemon_ends(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                mp = mirai_map(range(20), _deadly, trace.path, dict.fromkeys(range(20), "SIGKILL"))
                self.settled(mp)
                self.assertEqual({type(v) for v in mp[:]}, {MiraiConnectionReset})
                self.assertEqual(trace.begun(), collections.Counter(range(20)))
                self.assertEqual(mirai.mirai(abs, -1).result(10), 1)

    def test_a_daemon_killed_from_outside_costs_the_item_that_runs_there_and_no_other(self):
        for size in (None, 64, 4096):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(1):
                mp = mirai_map(range(300), _item, trace.path, gate.enter, (40, 41, 200))
                for place in (40, 41, 200):
                    label, pid = gate.arrived()
                    self.assertEqual(label, place)
                    os.kill(pid, signal.SIGKILL)
                self.settled(mp)
                self.assertEqual([i for i, m in enumerate(mp) if type(m.data) is MiraiConnectionReset], [40, 41, 200])
                self.assertIn("SIGKILL", str(mp[40].data))
                self.assertEqual([m.data for i, m in enumerate(mp) if i not in (40, 41, 200)],
                                 [2 * i for i in range(300) if i not in (40, 41, 200)])
                self.assertEqual(trace.begun(), collections.Counter(range(300)))

    def test_daemons_killed_at_random_moments_lose_an_item_each_at_most_and_nothing_runs_twice(self):
        for size in (None, 16):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                chance = random.Random(5)
                mp = mirai_map(range(3000), _item, trace.path, seconds=0.0005)
                kills = 0
                while unresolved(mp) > 300 and kills < 20:
                    before = unresolved(mp)
                    wait_until(lambda: unresolved(mp) < before - chance.randrange(1, 150), 10)
                    running = [pid for pid in {pid for _, _, pid in trace.lines()[-20:]} if is_alive(pid)]
                    if running:
                        os.kill(chance.choice(running), signal.SIGKILL)
                        kills += 1
                self.settled(mp)
                self.assertGreater(kills, 3)
                begun, ended = trace.begun(), trace.ended()
                lost = [i for i, m in enumerate(mp) if type(m.data) is MiraiConnectionReset]
                self.assertLessEqual(len(lost), kills)
                self.assertEqual([m.data for i, m in enumerate(mp) if i not in lost], [2 * i for i in range(3000) if i not in lost])
                self.assertEqual(max(begun.values()), 1, "an item that ran twice")
                self.assertLessEqual(set(range(3000)) - set(ended), set(lost), "an item with a value that never ended")

    def test_daemons_of_three_tasks_each_carry_a_map_through(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2, maxtasks=3):
                mp = mirai_map(range(30), _item, trace.path)
                self.settled(mp)
                self.assertEqual(mp[:], list(range(0, 60, 2)))
                self.assertEqual(trace.begun(), collections.Counter(range(30)))
                did = collections.Counter(pid for word, _, pid in trace.lines() if word == "begin")
                self.assertTrue(max(did.values()) <= 3 and len(did) >= 10, did)

    def test_daemons_that_reach_their_walltime_carry_a_map_through(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2, walltime=0.15):
                mp = mirai_map(range(120), _item, trace.path, seconds=0.005)
                self.settled(mp)
                self.assertEqual(mp[:], list(range(0, 240, 2)))
                self.assertEqual(trace.begun(), collections.Counter(range(120)))
                self.assertGreater(len({pid for _, _, pid in trace.lines()}), 2)

    def test_a_daemon_that_joins_takes_over_items_that_another_was_granted(self):
        for size in (None, 4096):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(1):
                mp = mirai_map(range(500), _item, trace.path, gate.enter, (10,))
                held = gate.arrived()[1]
                launch_local(1)
                self.settled(mp, but=1)
                self.assertFalse(mp[10].done())
                self.assertNotIn(held, {pid for _, item, pid in trace.lines() if item > 10})
                gate.open()
                self.assertEqual(mp.results(), list(range(0, 1000, 2)))
                self.assertEqual(trace.begun(), collections.Counter(range(500)))

    def test_a_map_made_before_any_daemon_has_joined_waits_for_one(self):
        key = "ab" * 32
        daemons(url="tcp://127.0.0.1:0", key=key)
        mp = mirai_map(range(100), operator.neg)
        self.assertEqual((unresolved(mp), info().connections), (100, 0))
        with ByHand(status()["daemons"], key=key):
            self.settled(mp)
            self.assertEqual(mp[:], [-i for i in range(100)])
        daemons(0)

    def test_a_daemon_that_leaves_at_its_task_limit_hands_its_items_on(self):
        key = "ab" * 32
        with Trace() as trace, Gate() as gate, granting(64):
            daemons(url="tcp://127.0.0.1:0", key=key)
            url = status()["daemons"]
            mp = mirai_map(range(60), _item, trace.path, gate.enter, (2, 3))
            with ByHand(url, "--maxtasks", "3", key=key) as first:
                gate.arrived()
                gate.open()
                self.assertEqual(first.status()[0], 3)
                self.assertEqual([m.result(5) for m in itertools.islice(mp, 3)], [0, 2, 4])
                self.assertEqual(unresolved(mp), 57)
                with ByHand(url, key=key):
                    gate.arrived()
                    gate.open()
                    self.assertEqual(mp.results(), list(range(0, 120, 2)))
            self.assertEqual(trace.begun(), collections.Counter(range(60)))
            daemons(0)

    def test_a_remote_daemon_that_is_lost_costs_the_item_that_ran_there_and_those_it_may_have_begun(self):
        key = "ab" * 32
        for size, seconds in ((None, 0), (64, 0), (64, 0.012)):
            with self.subTest(size=size, seconds=seconds), Trace() as trace, Gate() as gate, granting(size):
                daemons(url="tcp://127.0.0.1:0", key=key)
                url = status()["daemons"]
                with ByHand(url, key=key) as first:
                    joined(1)
                    mp = mirai_map(range(60), _item, trace.path, gate.enter, (20,), seconds)
                    gate.arrived()
                    self.assertEqual([m.result(5) for m in itertools.islice(mp, 20)], list(range(0, 40, 2)))
                    os.kill(first.pid, signal.SIGKILL)
                    self.assertIs(type(call_mirai(mp[20]).data), MiraiConnectionReset)
                    with ByHand(url, key=key):
                        self.settled(mp)
                lost = [i for i, m in enumerate(mp) if type(m.data) is MiraiConnectionReset]
                self.assertEqual(lost, list(range(20, 20 + len(lost))))     # one range, that it had announced
                if seconds:         # each takes longer than it may announce
                    self.assertEqual(lost, [20])
                self.assertEqual([m.data for i, m in enumerate(mp) if i not in lost], [2 * i for i in range(60) if i not in lost])
                self.assertEqual(trace.begun(), collections.Counter(i for i in range(60) if i == 20 or i not in lost))
                daemons(0)

    def test_a_reset_makes_what_is_unresolved_of_a_map_19s(self):
        for size in (None, 64):
            with self.subTest(size=size), Gate() as gate, granting(size):
                daemons(1)
                mp = mirai_map(range(200), _held, gate.enter, (50,))
                gate.arrived()
                self.assertEqual(mp[49].result(10), 49)
                daemons(0)
                self.assertEqual(unresolved(mp), 0)
                self.assertEqual(mp[:][:50], list(range(50)))
                self.assertEqual({type(v) for v in mp[:][50:]}, {MiraiConnectionReset})
                with self.assertRaises(ConnectionResetError):
                    mp.results()

    def test_a_dispatcher_that_dies_makes_what_is_unresolved_of_a_map_19s(self):
        with Gate() as gate:
            daemons(2)
            mp = mirai_map(range(200), _held, gate.enter, (50, 51))
            gate.arrived(), gate.arrived()
            self.assertEqual([m.result(10) for m in itertools.islice(mp, 50)], list(range(50)))
            os.kill(dispatcher_pid(), signal.SIGKILL)
            self.settled(mp)
            self.assertEqual(mp[:][:50], list(range(50)))
            self.assertEqual({type(m.data) for m in mp if mirai.is_error_value(m.data)}, {MiraiConnectionReset})
            with self.assertRaises(MiraiConnectionReset):
                mirai_map([1], abs)
            daemons(0)

    # -- items that end in odd ways, items and results that do not travel

    def test_items_that_interrupt_exit_or_quit_cost_themselves_alone(self):
        def work(x, path):
            _note(path, "begin", x)
            return ends[x]() if x in ends else x

        ends = {5: lambda: _raise(KeyboardInterrupt()), 15: lambda: _raise(SystemExit(3)), 25: lambda: _raise(GeneratorExit()),
                35: lambda: _raise(StopIteration(1)), 45: lambda: _raise(BaseException("base")),
                55: lambda: _raise(asyncio.CancelledError()), 65: lambda: quit(), 75: lambda: exit(4), 85: lambda: os._exit(5),
                95: lambda: sys.exit("said")}
        names = {5: "KeyboardInterrupt", 15: "SystemExit", 25: "GeneratorExit", 35: "StopIteration", 45: "BaseException",
                 55: "CancelledError", 95: "SystemExit"}
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                mp = mirai_map(range(100), work, trace.path)
                self.settled(mp)
                values = mp[:]
                self.assertEqual([v for i, v in enumerate(values) if i not in ends], [i for i in range(100) if i not in ends])
                self.assertTrue(mirai.is_mirai_interrupt(values[5]), repr(values[5]))
                for i, name in names.items():
                    self.assertTrue(isinstance(values[i], MiraiError), repr(values[i]))
                    self.assertIn(name, values[i].condition_class[0])
                for i, text in ((65, "status 0"), (75, "status 4"), (85, "status 5")):
                    self.assertIs(type(values[i]), MiraiConnectionReset)
                    self.assertIn(text, str(values[i]))
                for i in (15, 25, 35, 45):
                    with self.assertRaises(MiraiError):
                        mp[i].result()
                self.assertEqual(trace.begun(), collections.Counter(range(100)))

    def test_an_item_that_leaves_a_signal_handler_a_thread_or_a_directory_behind_disturbs_no_other(self):
        def rude(x, enter):
            if x == 3:
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            if x == 4:
                threading.Thread(target=time.sleep, args=(0.2,)).start()
            if x == 5:
                os.chdir("/")
                sys.path.clear()
                os.environ.clear()
            return enter(x) if x == 50 else x

        for size in (None, 64):
            with self.subTest(size=size), Gate() as gate, granting(size), daemons(1):
                pids = _pids(1)
                mp = mirai_map(range(100), rude, gate.enter)
                gate.arrived()
                self.assertTrue(mp[50].cancel())        # interrupts reach items after the one that changed the handler
                self.settled(mp)
                self.assertEqual([v for v in mp[:] if not mirai.is_error_value(v)], [i for i in range(100) if i != 50])
                self.assertEqual(_pids(1), pids)

    def test_an_item_that_cant_be_serialized_raises_at_the_call_and_names_it(self):
        for items, path in (([1, 2, [3, _Locked()]], "items[2][1].lock"), ({"a": 1, "b": _Locked()}, "items['b'].lock"),
                            ([_Locked()] * 1000, "items[0].lock"), ([*range(5000), _Locked()], "items[5000].lock")):
            with self.subTest(path=path), Trace() as trace, daemons(1):
                with self.assertRaises(TypeError) as caught:
                    mirai_map(items, _note_any, trace.path)
                self.assertIn(path, str(caught.exception))
                self.assertIn("pickle", str(caught.exception))
                wait_until(lambda: info()[2:4] == (0, 0), 10, "nothing's being left")
                self.assertEqual(mirai_map([-1], abs)[:], [1])

    def test_a_constant_that_cant_be_serialized_raises_at_the_call_and_names_it(self):
        with daemons(1):
            for call, text in ((lambda: mirai_map([1], print, _Locked()), "args[0].lock"),
                               (lambda: mirai_map([1], print, x=[_Locked()]), "kwargs['x'][0].lock")):
                with self.assertRaises(TypeError) as caught:
                    call()
                self.assertIn(text, str(caught.exception))
            self.assertEqual(info()[2:], (0, 0, 0))

    def test_a_result_that_cant_be_serialized_is_the_error_of_its_item_alone(self):
        for size in (None, 64):
            with self.subTest(size=size), granting(size), daemons(2):
                mp = mirai_map(range(200), lambda x: threading.Lock() if x % 50 == 7 else x)
                self.settled(mp)
                for i, value in enumerate(mp[:]):
                    if i % 50 == 7:
                        self.assertIs(type(value), MiraiError)
                        self.assertIn("pickle", str(value))
                    else:
                        self.assertEqual(value, i)

    def test_an_item_that_strikes_where_it_is_unpickled_costs_itself_alone(self):
        for size, how in itertools.product((None, 64), ("exception", "sys.exit", "os._exit", "segfault")):
            with self.subTest(size=size, how=how), granting(size), daemons(2):
                items = [_Ugly("unpickle", how) if i in (11, 12, 40) else i for i in range(100)]
                mp = mirai_map(items, lambda x: x)
                self.settled(mp)
                for i, value in enumerate(mp[:]):
                    if i in (11, 12, 40):
                        self.assertIs(type(value), MiraiConnectionReset if how in HOW_IT_SHOWS else MiraiError, repr(value))
                    else:
                        self.assertEqual(value, i)
                self.assertEqual(mirai.mirai(abs, -1).result(10), 1)

    def test_an_item_whose_result_strikes_where_it_is_pickled_costs_itself_alone(self):
        for size, how in itertools.product((None, 64), ("exception", "sys.exit", "os._exit", "segfault")):
            with self.subTest(size=size, how=how), granting(size), daemons(2):
                mp = mirai_map(range(100), lambda x: _Ugly("pickle", how) if x in (11, 12, 40) else x)
                self.settled(mp)
                for i, value in enumerate(mp[:]):
                    if i in (11, 12, 40):
                        self.assertIs(type(value), MiraiConnectionReset if how in HOW_IT_SHOWS else MiraiError, repr(value))
                    else:
                        self.assertEqual(value, i)

    def test_a_result_that_cant_be_unpickled_is_the_error_of_its_item_alone(self):
        for size, how in itertools.product((None, 64), ("exception", "sys.exit")):
            with self.subTest(size=size, how=how), granting(size), daemons(2):
                mp = mirai_map(range(100), lambda x: _Ugly("unpickle", how) if x in (11, 12, 40) else x)
                self.settled(mp)
                for i, value in enumerate(mp[:]):
                    if i in (11, 12, 40):
                        self.assertIs(type(value), MiraiError, repr(value))
                        self.assertIn("SystemExit" if how == "sys.exit" else "ugly", str(value))
                    else:
                        self.assertEqual(value, i)
                with self.assertRaises((MiraiError, ValueError)):
                    mp.results()

    def test_what_one_item_keeps_no_other_finds(self):
        shared = []
        with daemons(1):
            for size in (None, 64):
                with self.subTest(size=size), granting(size):
                    mp = mirai_map([shared] * 100, lambda x: x.append(1) or len(x))     # one object, an item each
                    self.assertEqual(mp[:], [1] * 100)
        self.assertEqual(shared, [])

    def test_large_items_and_large_results_cross_whole(self):
        def check(x):
            return len(x), x[0], x[-1], x.count(x[0])

        items = [bytes([i]) * 1_000_000 for i in range(40)]
        for size in (None, 16):
            with self.subTest(size=size), granting(size), daemons(2):
                self.assertEqual(mirai_map(items, check)[:], [(1_000_000, i, i, 1_000_000) for i in range(40)])
                self.assertEqual(mirai_map(range(40), lambda i: bytes([i]) * 1_000_000)[:], items)
                mixed = [b"x" * (5_000_000 if i % 25 == 3 else 3) for i in range(100)]
                self.assertEqual(mirai_map(mixed, lambda x: x + b"y")[:], [x + b"y" for x in mixed])

    # -- constants

    def test_a_large_constant_crosses_to_each_daemon_once(self):
        key, size = "ab" * 32, 10_000_000
        ballast = random.Random(1).randbytes(size) if hasattr(random.Random, "randbytes") else os.urandom(size)
        daemons(url="tcp://127.0.0.1:0", key=key)
        with Forwarder(status()["daemons"]) as forwarder, ByHand(forwarder.url, key=key), ByHand(forwarder.url, key=key):
            joined(2)
            before = forwarder.count
            mp = mirai_map(range(1000), lambda x, data: (os.getpid(), data[x]), ballast)
            self.settled(mp)
            self.assertEqual([v for _, v in mp[:]], list(ballast[:1000]))
            pids = {pid for pid, _ in mp[:]}
            crossed = forwarder.count - before
            self.assertTrue(len(pids) * size <= crossed < 2.2 * size, f"{crossed} bytes to {len(pids)} daemons")
            daemons(0)

    def test_a_hundred_megabytes_as_a_constant_of_a_thousand_items_take_no_longer_than_four_copies(self):
        ballast = bytes(100_000_000)
        with daemons(4):
            begin = time.monotonic()
            self.assertEqual(mirai.mirai(len, ballast).result(SOON), 100_000_000)
            one = time.monotonic() - begin
            begin = time.monotonic()
            mp = mirai_map(range(1000), lambda x, data: x + len(data), ballast)
            self.assertEqual(mp[:], list(range(100_000_000, 100_001_000)))
            took = time.monotonic() - begin
        self.assertLess(took, max(12 * one, 5.0), f"one copy took {one:.2f} s")

    def test_a_constant_is_serialized_once_whatever_the_number_of_items(self):
        class Counted:
            def __reduce__(self):
                made.append(1)
                return int, ("7",)

        made = []
        with daemons(2):
            self.assertEqual(mirai_map(range(500), operator.add, Counted())[:], list(range(7, 507)))
            self.assertEqual(len(made), 1)

    def test_a_relaunched_daemon_is_sent_the_constant_too(self):
        def work(x, data):
            if x % 30 == 7:
                os.kill(os.getpid(), signal.SIGKILL)
            return data[x]

        data = os.urandom(1_000_000)
        for size in (None, 16):
            with self.subTest(size=size), granting(size), daemons(2):
                mp = mirai_map(range(150), work, data)
                self.settled(mp)
                self.assertEqual([v for i, v in enumerate(mp[:]) if i % 30 != 7], [data[i] for i in range(150) if i % 30 != 7])
                self.assertEqual({type(mp[i].data) for i in range(7, 150, 30)}, {MiraiConnectionReset})

    # -- mappings, _star, tables

    def test_mappings_of_every_kind_keep_their_keys_and_order(self):
        class Own(collections.abc.Mapping):
            def __getitem__(self, key):
                return {3: 30, "x": 40, None: 50}[key]

            def __iter__(self):
                return iter([3, "x", None])

            def __len__(self):
                return 3

        large = {f"key {i}": i for i in range(1000, 0, -1)}
        with daemons(2):
            for items in (large, collections.OrderedDict([("b", 1), ("a", 2)]), types.MappingProxyType({(1, 2): 3}), Own(),
                          collections.ChainMap({"a": 1}, {"b": 2}), collections.Counter("aab")):
                mp = mirai_map(items, lambda x: -x)
                expected = {key: -value for key, value in items.items()}
                for found in (mp[:], mp.results(), mp.data, mirai.collect_mirai(mp)):
                    self.assertEqual((type(found), found, list(found)), (dict, expected, list(expected)))
                self.assertEqual((mp.names, len(mp), [m.result() for m in mp]), (list(items), len(items), list(expected.values())))
            mp = mirai_map({"a": 1, "b": 0}, lambda x: 1 / x)
            self.assertEqual((mp[:]["a"], mirai.is_mirai_error(mp[:]["b"])), (1.0, True))

    def test_star_unpacks_tuples_lists_and_mappings(self):
        def work(*args, **kwargs):
            return args, kwargs

        Pair = collections.namedtuple("Pair", "a b")
        items = [(1, 2), [3, 4], {"a": 5, "b": 6}, Pair(7, 8), (), [], {}, ((1, 2), [3])]
        expected = [((1, 2), {}), ((3, 4), {}), ((), {"a": 5, "b": 6}), ((7, 8), {}), *[((), {})] * 3, (((1, 2), [3]), {})]
        with daemons(2):
            self.assertEqual(mirai_map(items, work, _star=True)[:], expected)
            self.assertEqual(mirai_map([collections.OrderedDict(c=9)], work, _star=True)[:], [((), {"c": 9})])
            self.assertEqual(mirai_map([(1, 2), {"a": 3}], work, "x", z="y", _star=True)[:],
                             [((1, 2, "x"), {"z": "y"}), (("x",), {"a": 3, "z": "y"})])
            self.assertEqual(mirai_map({"k": (1, 2)}, operator.add, _star=True)[:], {"k": 3})
            self.assertEqual(mirai_map(zip(range(200), range(200)), operator.add, _star=True)[:], list(range(0, 400, 2)))
            self.assertEqual(mirai_map([(1, 2)] * 300, operator.add, _star=True)[:], [3] * 300)
            self.assertEqual(mirai_map([(1, 2), [3]], lambda x: x)[:], [(1, 2), [3]])       # as they are, without
            wrong = mirai_map([(1, 2), (1,), {"nothing": 1}], operator.add, _star=True)[:]
            self.assertEqual((wrong[0], [mirai.is_mirai_error(v) for v in wrong]), (3, [False, True, True]))

    def _check_frame(self, frame, names):
        """A table of two columns: a = [1, 2, 3], b = ['x', 'y', 'z']."""
        with daemons(2):
            mp = mirai_map(frame, lambda b, a: (a, b))          # by name, not by position
            self.assertEqual((mp[:], mp.names, len(mp)), ([(1, "x"), (2, "y"), (3, "z")], names, 3))
            self.assertEqual(mirai_map(frame, lambda a, b, c, d=0: f"{a}{b}{c}{d}", c=4, d=5)[:], ["1x45", "2y45", "3z45"])
            self.assertEqual(mirai_map(frame, lambda **row: sorted(row))[:], [["a", "b"]] * 3)
            self.assertEqual((mirai.collect_mirai(mp), mp.data, mp.results()), (*[[(1, "x"), (2, "y"), (3, "z")]] * 3,))

    def _check_unnamed_frame(self, frame):
        """A table of two columns whose names are no identifiers: [1, 2], ['x', 'y']."""
        with daemons(1):
            self.assertEqual(mirai_map(frame, lambda x, y, z=0: (x, y, z), z=3)[:], [(1, "x", 3), (2, "y", 3)])

    ABC = {"a": [1, 2, 3], "b": ["x", "y", "z"]}
    ODD = {"a column": [1, 2], "b": ["x", "y"]}

    @unittest.skipIf(importlib.util.find_spec("pandas"), "the real pandas is here")
    def test_a_frame_with_the_surface_of_pandas_maps_over_its_rows_and_keeps_its_labels(self):
        with fake_library(_FakePandas, "pandas", "pandas.core.frame", "DataFrame") as DataFrame:
            self._check_frame(DataFrame(self.ABC, ["r1", "r2", "r3"]), ["r1", "r2", "r3"])
            self._check_frame(DataFrame(self.ABC), [0, 1, 2])
            self._check_unnamed_frame(DataFrame(self.ODD))
            self._check_unnamed_frame(DataFrame({0: [1, 2], 1: ["x", "y"]}))

    @unittest.skipIf(importlib.util.find_spec("polars"), "the real polars is here")
    def test_a_frame_with_the_surface_of_polars_maps_over_its_rows(self):
        with fake_library(_FakePolars, "polars", "polars.dataframe.frame", "DataFrame") as DataFrame:
            self._check_frame(DataFrame(self.ABC), None)
            self._check_unnamed_frame(DataFrame(self.ODD))

    @unittest.skipIf(importlib.util.find_spec("pyarrow"), "the real pyarrow is here")
    def test_a_table_with_the_surface_of_arrow_maps_over_its_rows(self):
        for name in ("Table", "RecordBatch"):
            with fake_library(_FakeArrow, "pyarrow", "pyarrow.lib", name) as Table:
                self._check_frame(Table(self.ABC), None)
                self._check_unnamed_frame(Table(self.ODD))

    @unittest.skipIf(importlib.util.find_spec("numpy"), "the real numpy is here")
    def test_an_array_with_the_surface_of_numpy_maps_over_its_rows(self):
        with fake_library(_FakeArray, "numpy", "numpy", "ndarray") as ndarray, daemons(2):
            mp = mirai_map(ndarray([[1, 2], [3, 4], [5, 6]]), lambda x, y, z=0: (x, y, z), 7)
            self.assertEqual((mp[:], mp.names, len(mp)), ([(1, 2, 7), (3, 4, 7), (5, 6, 7)], None, 3))
            self.assertEqual(mirai_map(ndarray([1, 2]), operator.neg)[:], [-1, -2])

    @needs("numpy")
    def test_numpy_arrays_map_over_their_rows_by_position_and_vectors_over_their_elements(self):
        import numpy
        with daemons(2):
            mp = mirai_map(numpy.arange(6).reshape(3, 2), lambda x, y, z=0: (int(x), int(y), z), 7)
            self.assertEqual((mp[:], mp.names, len(mp)), ([(0, 1, 7), (2, 3, 7), (4, 5, 7)], None, 3))
            found = mirai_map(numpy.arange(300.0), lambda x: x * 2)[:]
            self.assertEqual((found, isinstance(found[0], float)), ([2.0 * i for i in range(300)], True))
            self.assertEqual(mirai_map(numpy.ones((1000, 3)), lambda *row: sum(row))[:], [3.0] * 1000)
            self.assertEqual(mirai_map(numpy.empty((0, 2)), max)[:], [])
            self.assertEqual(mirai_map(numpy.array([["a", "b"]], dtype=object), lambda x, y: x + y)[:], ["ab"])
            self.assertEqual(mirai_map(numpy.arange(6).reshape(2, 3).T, lambda x, y: int(y - x))[:], [3, 3, 3])
            self.assertEqual(mirai_map([numpy.arange(2), numpy.arange(3)], len)[:], [2, 3])      # a list of arrays is a list
            with self.assertRaises(TypeError):
                mirai_map(numpy.array(3), abs)

    @needs("pandas")
    def test_pandas_frames_map_over_their_rows_by_name_and_keep_their_labels(self):
        import pandas
        self._check_frame(pandas.DataFrame(self.ABC), [0, 1, 2])
        self._check_frame(pandas.DataFrame(self.ABC, index=["r1", "r2", "r3"]), ["r1", "r2", "r3"])
        self._check_frame(pandas.DataFrame(self.ABC, index=["same", "same", "same"]), ["same"] * 3)
        self._check_unnamed_frame(pandas.DataFrame(self.ODD))
        self._check_unnamed_frame(pandas.DataFrame({0: [1, 2], 1: ["x", "y"]}))
        same = pandas.DataFrame([[1, "x"], [2, "y"]], columns=["a", "a"])       # no dict has room for both
        self._check_unnamed_frame(same)
        with daemons(1):
            self.assertEqual(mirai_map(pandas.DataFrame({"a": [1], "b": [0.5]}), lambda a, b: (int(a) == a, type(a).__name__[:3], b))[:],
                             [(True, "int", 0.5)])      # a row keeps the types of its columns
            self.assertEqual(mirai_map(pandas.DataFrame({"a": []}), abs)[:], [])
            self.assertEqual(mirai_map(pandas.Series([1, 2, 3]), lambda x: int(x) + 1)[:], [2, 3, 4])

    @needs("polars")
    def test_polars_frames_map_over_their_rows_by_name(self):
        import polars
        self._check_frame(polars.DataFrame(self.ABC), None)
        self._check_unnamed_frame(polars.DataFrame(self.ODD))
        with daemons(1):
            self.assertEqual(mirai_map(polars.DataFrame({"a": []}), abs)[:], [])
            self.assertEqual(mirai_map(polars.Series([1, 2, 3]), operator.neg)[:], [-1, -2, -3])

    @needs("pyarrow")
    def test_arrow_tables_map_over_their_rows_by_name(self):
        import pyarrow
        self._check_frame(pyarrow.table(self.ABC), None)
        self._check_frame(pyarrow.RecordBatch.from_pydict(self.ABC), None)
        self._check_unnamed_frame(pyarrow.table(self.ODD))
        self._check_unnamed_frame(pyarrow.Table.from_arrays([pyarrow.array([1, 2]), pyarrow.array(["x", "y"])], names=["a", "a"]))
        with daemons(1):
            self.assertEqual(mirai_map(pyarrow.table({"a": pyarrow.array([], "int64")}), abs)[:], [])

    # -- promises

    def test_a_promise_is_called_with_each_value_as_it_resolves_on_the_callbacks_thread(self):
        seen = []
        for size in (None, 64):
            with self.subTest(size=size), Gate() as gate, granting(size), daemons(2):
                seen.clear()
                mp = mirai_map(range(100), _held, gate.enter, (7,),
                               _promise=lambda value: seen.append((value, threading.current_thread().name)))
                wait_until(lambda: len(seen) == 99, 10, "the call for all but the one that is held")
                self.assertFalse(mp[7].done())
                gate.arrived()
                gate.open()
                wait_until(lambda: len(seen) == 100, 10)
                self.assertEqual((sorted(seen), seen[-1][0]), ([(i, "mirai-callbacks") for i in range(100)], 7))

    def test_a_pair_of_promises_is_called_with_values_and_with_errors_and_either_may_be_none(self):
        def wrong(error):
            return mirai.is_error_value(error) or isinstance(error, Exception)

        with daemons(2):
            for left, right in ((True, True), (True, False), (False, True), (False, False)):
                values, errors = [], []
                mp = mirai_map([1, 0, 2, 0], lambda x: 1 / x, _promise=(values.append if left else None, errors.append if right else None))
                call_mirai(mp)
                wait_until(lambda: (len(values), len(errors)) == (2 * left, 2 * right), 5)
                self.assertEqual(sorted(values), [0.5, 1.0] if left else [])
                self.assertTrue(all(map(wrong, errors)), errors)
            values = []
            call_mirai(mirai_map([1, 0, 2], lambda x: 1 / x, _promise=values.append))       # alone: values only
            wait_until(lambda: len(values) == 2, 5)
            self.assertEqual(sorted(values), [0.5, 1.0])

    def test_a_promise_hears_of_cancels_timeouts_and_deaths(self):
        errors, values = [], []
        with Gate() as gate, daemons(1):
            mp = mirai_map(range(3), _held, gate.enter, (0,), _promise=(values.append, errors.append))
            pid = gate.arrived()[1]
            mp[1].cancel()
            wait_until(lambda: len(errors) == 1, 5)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: (len(errors), values) == (2, [2]), 5)
            self.assertEqual([getattr(e, "code", None) for e in errors], [20, 19])

    def test_a_promise_that_raises_disturbs_nothing(self):
        seen = []

        def promise(value):
            seen.append(value)
            raise RuntimeError("of the promise")

        with self.assertLogs("concurrent.futures", "ERROR"), daemons(1):
            mp = mirai_map(range(50), operator.neg, _promise=promise)
            self.assertEqual(mp[:], [-i for i in range(50)])
            wait_until(lambda: len(seen) == 50, 5)

    def test_a_promise_of_a_lazy_map_is_called_for_what_was_pulled(self):
        seen = []
        with daemons(1):
            self.assertEqual(mirai_map(iter(range(50)), operator.neg, _promise=seen.append)[:], [-i for i in range(50)])
            wait_until(lambda: len(seen) == 50, 5)
            self.assertEqual(sorted(seen), list(range(-49, 1)))

    # -- generators

    def test_an_endless_generator_is_pulled_a_bounded_window_ahead_by_whoever_consumes(self):
        pulled, by = [0], set()

        def endless():
            for i in itertools.count():
                pulled[0] = i + 1
                by.add(threading.get_ident())
                yield i

        for size in (None, 64):
            with self.subTest(size=size), granting(size), daemons(2):
                by.clear()
                mp = mirai_map(endless(), operator.neg)
                self.assertEqual([m.result(10) for m in itertools.islice(mp, 10)], [-i for i in range(10)])
                after_ten = pulled[0]
                self.assertLessEqual(after_ten, 50_000)
                self.assertEqual([mirai.mirai(abs, -i).result(10) for i in range(50)], list(range(50)))
                self.assertEqual(pulled[0], after_ten, "pulled though nobody consumed")
                self.assertEqual([m.result(10) for m in itertools.islice(mp, 1000)], [-i for i in range(10, 1010)])
                self.assertEqual(by, {threading.get_ident()})

    def test_a_window_is_wide_enough_for_every_daemon(self):
        for n in (1, 4):
            with self.subTest(n=n), Gate() as gate, daemons(n):
                mp = mirai_map((i for i in range(100)), gate.enter)
                consumer = threading.Thread(target=lambda mp=mp: [m.result() for m in mp], daemon=True)
                consumer.start()
                for _ in range(100 // n):
                    self.assertEqual(len({gate.arrived()[1] for _ in range(n)}), n)
                    gate.open()
                consumer.join(10)
                self.assertFalse(consumer.is_alive())

    def test_len_of_a_lazy_map_raises_until_it_is_exhausted(self):
        with daemons(2):
            mp = mirai_map((i for i in range(300)), operator.neg)
            with self.assertRaises(TypeError):
                len(mp)
            self.assertEqual(next(iter(mp)).result(10), 0)
            self.assertEqual([m.result(10) for m in mp], [-i for i in range(1, 300)])
            self.assertEqual(len(mp), 300)
            for pull in (lambda mp: mp[:], lambda mp: mp.results(), mirai.collect_mirai, lambda mp: mirai.call_mirai(mp)[:]):
                mp = mirai_map((i for i in range(300)), operator.neg)
                self.assertEqual(pull(mp), [-i for i in range(300)])
                self.assertEqual((len(mp), mp[:], mp.data), (300, *[[-i for i in range(300)]] * 2))     # kept
                self.assertEqual((mp[5].result(), unresolved(mp), mp.names), (-5, 0, None))
            self.assertEqual(mirai_map(iter([]), abs)[:], [])
            self.assertEqual(list(mirai_map(iter([]), abs)), [])

    def test_unsized_iterables_of_every_kind_are_lazy(self):
        class Unsized:
            def __iter__(self):
                return iter(range(5))

        class Endless:
            def __iter__(self):
                return itertools.count()

        class Old:
            def __getitem__(self, i):
                if i == 5:
                    raise IndexError
                return i

        with daemons(2), tempfile.TemporaryFile("w+") as file:
            file.write("a\nb\n")
            file.seek(0)
            for items in (Unsized(), Old(), iter([0, 1, 2, 3, 4]), map(int, "01234"), filter(lambda x: x < 5, itertools.chain(range(9)))):
                mp = mirai_map(items, operator.neg)
                with self.assertRaises(TypeError):
                    len(mp)
                self.assertEqual(mp[:], [0, -1, -2, -3, -4])
            self.assertEqual([m.result(10) for m in itertools.islice(mirai_map(Endless(), operator.neg), 3)], [0, -1, -2])
            self.assertEqual(mirai_map(file, str.strip)[:], ["a", "b"])

    def test_a_generator_that_raises_does_so_to_the_consumer_after_what_it_gave(self):
        def broken():
            yield from range(100)
            raise LookupError("broken")

        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                values = []
                with self.assertRaisesRegex(LookupError, "^'?broken'?$"):
                    for m in mirai_map(broken(), _item, trace.path):
                        values.append(m.result(10))
                self.assertEqual(values, list(range(0, 200, 2)))
                self.assertEqual(trace.begun(), collections.Counter(range(100)))
                for pull in (lambda mp: mp[:], lambda mp: mp.results(), mirai.collect_mirai, mirai.call_mirai):
                    with self.assertRaises(LookupError):
                        pull(mirai_map(broken(), operator.neg))
                wait_until(lambda: info()[2:4] == (0, 0), 10)
                self.assertEqual(mirai_map([-1], abs)[:], [1])

    def test_a_generator_may_use_mirais_itself(self):
        def nested():
            for i in range(50):
                yield mirai.mirai(operator.neg, i).result(10)

        with daemons(2):
            self.assertEqual(mirai_map(nested(), operator.neg)[:], list(range(50)))
            self.assertEqual([m.result(10) for m in mirai_map((m.result(10) for m in mirai_map(range(50), operator.neg)), operator.neg)],
                             list(range(50)))

    def test_two_threads_that_consume_one_lazy_map_get_every_item_once_between_them(self):
        with daemons(2):
            mp = mirai_map((i for i in range(2000)), operator.neg)
            found = _at_once(2, lambda _: [m.result(10) for m in mp])
            self.assertEqual(sorted(found[0] + found[1]), list(range(-1999, 1)))

    def test_an_item_of_a_generator_that_cant_be_serialized_is_said_where_it_is_consumed(self):
        def items():
            yield from (1, 2)
            yield _Locked()
            yield 3

        with daemons(1):
            mp = mirai_map(items(), _id)
            found = []
            try:
                for m in mp:
                    found.append(m[:])
            except TypeError as error:
                self.assertEqual(found, [1, 2])
                self.assertIn("lock", str(error))
            else:
                self.assertEqual((found[:2], found[3:]), ([1, 2], [3]))
                self.assertTrue(mirai.is_error_value(found[2]))
                self.assertIn("lock", str(found[2]))
            wait_until(lambda: info()[2:4] == (0, 0), 10)

    def test_errors_deaths_and_order_of_a_lazy_map_are_those_of_any_map(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                ways = {100: "SIGKILL", 250: "os._exit", 251: "SIGKILL"}
                values = [m[:] for m in mirai_map(iter(range(400)), _deadly, trace.path, ways)]
                self.assertEqual([i for i, v in enumerate(values) if type(v) is MiraiConnectionReset], list(ways))
                self.assertEqual([v for i, v in enumerate(values) if i not in ways], [i for i in range(400) if i not in ways])
                self.assertEqual(trace.begun(), collections.Counter(range(400)))
                self.assertEqual([mirai.is_mirai_error(m[:]) for m in mirai_map(iter([1, 0, 2]), lambda x: 1 / x)], [False, True, False])

    def test_looking_at_an_endless_map_ends(self):
        with daemons(1):
            mp = mirai_map(itertools.count(), operator.neg)
            self.assertIn("mirai map", repr(mp))
            self.assertIsInstance(unresolved(mp), int)
            self.assertTrue(mirai.is_mirai_map(mp))
            self.assertEqual(next(iter(mp)).result(10), 0)
            repr(mp), unresolved(mp), bool(mp is mp)
            self.assertIsInstance(stop_mirai(mp), list)
            self.assertEqual(mirai.mirai(abs, -1).result(10), 1)

    def test_a_stopped_lazy_map_pulls_no_more(self):
        pulled = [0]

        def endless():
            for pulled[0] in itertools.count(1):
                yield pulled[0]

        with Gate() as gate, daemons(1):
            mp = mirai_map(endless(), gate.enter)
            first = next(iter(mp))
            gate.arrived()
            stop_mirai(mp)
            self.assertTrue(first.cancelled() or not first.done())
            first.cancel()
            before = pulled[0]
            left = list(itertools.islice(mp, 10))       # whatever it gives, it is over
            self.assertTrue(all(m.done() for m in left))
            self.assertEqual(pulled[0], before)
            self.assertEqual(mirai.mirai(abs, -1).result(10), 1)

    def test_a_lazy_map_that_is_dropped_lets_its_generator_go(self):
        closed = []

        def endless():
            try:
                yield from itertools.count()
            finally:
                closed.append(1)

        with daemons(1):
            mp = mirai_map(endless(), operator.neg)
            self.assertEqual([m.result(10) for m in itertools.islice(mp, 3)], [0, -1, -2])
            del mp
            wait_until(lambda: gc.collect() is not None and closed, 10, "the generator's end")
            self.assertEqual(mirai.mirai(abs, -1).result(10), 1)

    MEMORY = """
        import itertools, os, sys, mirai
        def size(pid):
            with open(f"/proc/{pid}/statm") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        def family():
            parents = {}
            for name in os.listdir("/proc"):
                if name.isdigit():
                    try:
                        with open(f"/proc/{name}/stat") as file:
                            parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
                    except OSError:
                        pass
            found = [os.getpid()]
            for pid in found:
                found += [child for child, parent in parents.items() if parent == pid]
            return found
        n, ballast = int(sys.argv[1]), 300
        with mirai.daemons(2):
            pids, most, base, seen = None, {}, {}, 0
            for m in mirai.mirai_map((b"%d" % i + b"x" * ballast for i in range(n)), bytes.upper):
                value = m.result()
                assert value.endswith(b"XXX") and int(value.rstrip(b"X")) == seen
                seen += 1
                if seen == n // 10:
                    pids = family()
                    base = {pid: size(pid) for pid in pids}
                if pids and seen % 2000 == 0:
                    most = {pid: max(most.get(pid, 0), size(pid)) for pid in pids}
            print(seen, max(most[pid] - base[pid] for pid in pids) >> 20, most[os.getpid()] - base[os.getpid()] >> 20)
        """

    def test_a_map_over_a_generator_keeps_memory_flat(self):
        n = 1_000_000 if os.environ.get("MIRAI_LONG") else 200_000
        signal.setitimer(signal.ITIMER_REAL, 0)
        done = run_python(self.MEMORY, str(n), timeout=LONG if n < 1_000_000 else 4 * LONG)
        self.assertEqual(done.returncode, 0, done.stderr)
        seen, most, host = map(int, done.stdout.split())        # kept items or results would be 54 MB and more
        self.assertEqual(seen, n)
        self.assertLess(host, 15, "MB that the host grew by")
        self.assertLess(most, 25, "MB that one of its processes grew by")

    def test_a_map_that_is_dropped_leaves_nothing_in_the_host(self):
        done = run_python("""
            import gc, os, mirai
            def size():
                with open("/proc/self/statm") as file:
                    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
            with mirai.daemons(2):
                sizes = []
                for i in range(15):
                    mp = mirai.mirai_map([b"x" * 50_000] * 200, bytes.upper)
                    if i % 2:
                        assert mp.results()[-1][:1] == b"X"
                    del mp
                    mirai.mirai(abs, -1).result()       # after it, in order
                    while mirai.info()[2:4] != (0, 0):
                        pass
                    gc.collect()
                    sizes.append(size())
                print(sizes[4], max(sizes[4:]))
            """, timeout=SOON)
        self.assertEqual(done.returncode, 0, done.stderr)
        base, most = map(int, done.stdout.split())
        self.assertLess(most - base, 40, "MB; kept results would be 100")

    def test_items_of_a_map_that_is_dropped_run_all_the_same(self):
        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                mirai_map(range(300), _item, trace.path)
                gc.collect()
                wait_until(lambda: len(trace.ended()) == 300, 10)
                self.assertEqual(trace.begun(), collections.Counter(range(300)))
                wait_until(lambda: info()[2:4] == (0, 0), 10)

    def test_a_mirai_outlives_its_map(self):
        with daemons(2):
            mp = mirai_map(range(500), lambda x: [x] * 3)
            kept = [mp[i] for i in (0, 250, 499)]
            del mp
            gc.collect()
            self.assertEqual([m.result(10) for m in kept], [[0] * 3, [250] * 3, [499] * 3])

    # -- collecting: flat, progress, stop; loops; whoever else waits

    def test_flat_gives_one_list_of_the_elements(self):
        def flat(items, f=lambda x: x):
            return mirai.collect_mirai(mirai_map(items, f), flat=True)

        with daemons(2):
            self.assertEqual(flat([[1, 2], [], [3]]), [1, 2, 3])
            self.assertEqual(flat([(1, 2), [3], 4]), [1, 2, 3, 4])
            self.assertEqual(flat(["ab", "c"]), ["ab", "c"])         # texts are values, not their letters
            self.assertEqual(flat([[[1], [2]], [[3]]]), [[1], [2], [3]])        # one level
            self.assertEqual(flat({"a": [1], "b": [2, 3]}), [1, 2, 3])
            self.assertEqual((flat([]), flat([[], []])), ([], []))
            self.assertEqual(flat(iter([[1], [2, 3]])), [1, 2, 3])
            self.assertEqual(mirai.collect_mirai([mirai.mirai(list, "ab"), mirai.mirai(str, "c")], flat=True), ["a", "b", "c"])
            self.assertEqual(flat(range(1000), lambda x: [x, x]), [x for x in range(1000) for _ in "ab"])
            for wrong in ([1, "a"], [[1], ["a"]], [[1, "a"]], [1, None]):
                with self.subTest(wrong=wrong), self.assertRaises(TypeError) as caught:
                    flat(wrong)
                self.assertIn("int", str(caught.exception))
            with self.assertRaises(ZeroDivisionError):
                flat([1, 0, 2], lambda x: 1 / x)
            self.assertEqual(mirai.collect_mirai(mirai_map([[1], [2]], list), flat=False), [[1], [2]])

    def test_stop_raises_at_the_first_failure_and_cancels_what_has_not_run(self):
        def work(x, path, enter):
            _note(path, "begin", x)
            if x in (28, 29, 30):
                enter(x)
            if x == 30:
                raise LookupError(x)
            return x

        for size in (None, 64):
            with self.subTest(size=size), Trace() as trace, Gate() as gate, granting(size), daemons(3):
                mp = mirai_map(range(500), work, trace.path, gate.enter)
                labels = [gate.arrived()[0] for _ in range(3)]
                self.assertEqual(sorted(labels), [28, 29, 30])
                self.assertEqual([m.result(10) for m in itertools.islice(mp, 28)], list(range(28)))
                with self.assertRaises(LookupError) as caught:
                    gate.held.pop(labels.index(30)).close()
                    mirai.collect_mirai(mp, stop=True)
                self.assertEqual((caught.exception.args, unresolved(mp)), ((30,), 0))
                self.assertTrue(mp[28].cancelled() and mp[29].cancelled())
                self.assertEqual(len(_pids(3)), 3)      # those two were interrupted: their gate is closed
                begun = trace.begun()
                self.assertLessEqual({i for i, m in enumerate(mp) if not m.cancelled()}, set(begun))
                self.assertEqual(max(begun.values()), 1)

    def test_stop_ends_a_map_over_an_endless_generator(self):
        with daemons(2):
            with self.assertRaises(ZeroDivisionError):
                mirai.collect_mirai(mirai_map(itertools.count(), lambda x: 1 // (50 - x)), stop=True)
            self.assertEqual(mirai.mirai(abs, -1).result(10), 1)

    def test_progress_counts_items_and_works_without_knowing_how_many_there_are(self):
        done = run_python("""
            import operator, mirai
            mirai.daemons(2)
            for items in (range(3000), iter(range(500)), dict.fromkeys("abc", 1)):
                mirai.collect_mirai(mirai.mirai_map(items, operator.neg), progress=True)
            mirai.mirai_map(range(7), operator.neg).results(progress=True)
            """, timeout=SOON)
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
        for text in ("3000/3000", "500", "3/3", "7/7"):
            self.assertIn(text, done.stderr)

    def test_async_for_gives_values_in_the_order_of_completion(self):
        async def main(mp, gate):
            found = []
            async for value in mp:
                found.append(value)
                if len(found) == 99:
                    gate.arrived()
                    gate.open()
            return found

        for size, lazy in itertools.product((None, 64), (False, True)):
            with self.subTest(size=size, lazy=lazy), Gate() as gate, granting(size), daemons(2):
                mp = mirai_map(iter(range(100)) if lazy else range(100), _held, gate.enter, (3,))
                found = asyncio.run(asyncio.wait_for(main(mp, gate), SOON))
                self.assertEqual((sorted(found), found[-1]), (list(range(100)), 3))

    def test_async_for_raises_what_the_first_to_fail_raised(self):
        async def main(mp):
            found = []
            try:
                async for value in mp:
                    found.append(value)
            except LookupError:
                return found
            return None

        with Gate() as gate, daemons(2):
            mp = mirai_map(range(100), lambda x, enter: enter(x) if x == 3 else _raise(LookupError(x)) if x == 50 else x, gate.enter)
            gate.arrived()
            found = asyncio.run(asyncio.wait_for(main(mp), 20))
            self.assertIsNotNone(found)
            self.assertTrue(set(found) <= set(range(100)) - {3, 50}, found)
            gate.open()

    def test_async_for_over_an_endless_generator_can_be_left(self):
        async def main():
            found, ticks = [], [0]

            async def tick():
                while True:
                    ticks[0] += 1
                    await asyncio.sleep(0)

            ticking = asyncio.ensure_future(tick())
            async for value in mirai_map(itertools.count(), lambda x: time.sleep(0.001) or x):
                found.append(value)
                if len(found) == 200:
                    break
            ticking.cancel()
            return found, ticks[0]

        with daemons(2):
            found, ticks = asyncio.run(asyncio.wait_for(main(), 20))
            self.assertEqual(len(set(found)), 200)
            self.assertGreater(ticks, 20, "the loop was blocked")
            self.assertEqual(mirai.mirai(abs, -1).result(10), 1)

    def test_two_event_loops_may_go_through_one_map(self):
        async def main(mp):
            return sorted([value async for value in mp])

        with daemons(2):
            mp = mirai_map(range(300), operator.neg)
            self.assertEqual(_at_once(2, lambda _: asyncio.run(asyncio.wait_for(main(mp), 20))), [list(range(-299, 1))] * 2)
            self.assertEqual(asyncio.run(main(mp)), list(range(-299, 1)))
            self.assertEqual(asyncio.run(main(mirai_map([], abs))), [])

    def test_gather_and_await_take_the_items_of_a_map(self):
        async def main(mp):
            first = await mp[0]
            return first, await asyncio.gather(*mp)

        with daemons(2):
            self.assertEqual(asyncio.run(asyncio.wait_for(main(mirai_map(range(1000), operator.neg)), 20)), (0, [-i for i in range(1000)]))

            async def failing():
                return await asyncio.gather(*mirai_map([1, 0], lambda x: 1 / x), return_exceptions=True)

            found = asyncio.run(asyncio.wait_for(failing(), 20))
            self.assertEqual((found[0], type(found[1])), (1.0, ZeroDivisionError))

    def test_what_waits_for_futures_takes_the_items_of_a_map(self):
        for size in (None, 64):
            with self.subTest(size=size), Gate() as gate, granting(size), daemons(2):
                mp = mirai_map(range(200), _held, gate.enter, (3,))
                gate.arrived()
                done, not_done = concurrent.futures.wait(mp, 10, return_when=concurrent.futures.FIRST_COMPLETED)
                self.assertTrue(done)
                completed = concurrent.futures.as_completed(mp, 20)
                self.assertEqual(sorted(next(completed).result() for _ in range(199)), [i for i in range(200) if i != 3])
                self.assertTrue(race_mirai(mp) in range(200) and race_mirai([mp[3], mp[4]]) == 1)
                called = []
                mp[3].add_done_callback(called.append)
                mp[5].add_done_callback(called.append)
                wait_until(lambda: called == [mp[5]], 5)
                self.assertIs(mp[3], mp[3])
                gate.open()
                self.assertIs(next(completed), mp[3])
                wait_until(lambda: called == [mp[5], mp[3]], 5)

    def test_results_come_in_order_while_the_map_runs(self):
        for size in (None, 64):
            with self.subTest(size=size), Gate() as gate, granting(size), daemons(2):
                mp = mirai_map(range(100), _held, gate.enter, (30,))
                found = []
                for m in mp:
                    if len(found) == 30:
                        self.assertFalse(m.done())
                        gate.arrived()
                        gate.open()
                    found.append(m.result(10))
                self.assertEqual(found, list(range(100)))
                self.assertEqual([m.result() for m in mp], found)       # and again

    def test_two_maps_at_once_from_two_threads_keep_apart(self):
        for size in (None, 64):
            with self.subTest(size=size), granting(size), daemons(2):
                found = _at_once(2, lambda k: [mirai_map(range(3000), lambda x, k: (k, x), k).results() for _ in range(3)])
                self.assertEqual(found, [[[(k, x) for x in range(3000)]] * 3 for k in range(2)])

    def test_eight_threads_wait_for_one_map_and_cancel_in_it(self):
        with Trace() as trace, granting(None), daemons(2):
            mp = mirai_map(range(800), _item, trace.path, seconds=0.0002)

            def work(k):
                cancelled = [i for i in range(k, 800, 40) if mp[i].cancel()]
                return cancelled, mp[:]

            found = _at_once(8, work)
            cancelled = {i for some, _ in found for i in some}
            self.assertGreater(len(cancelled), 0)
            for _, values in found:
                self.assertEqual([MiraiCancelled if i in cancelled else 2 * i for i in range(800)],
                                 [type(v) if mirai.is_error_value(v) else v for v in values])
            self.assertEqual(max(trace.begun().values()), 1)

    def test_ctrl_c_while_waiting_for_a_map_leaves_the_map_running(self):
        with Gate() as gate, daemons(2):
            mp = mirai_map(range(200), _held, gate.enter, (50,))
            gate.arrived()
            for wait in (lambda: mp[:], mp.results, lambda: mirai.collect_mirai(mp), lambda: mirai.call_mirai(mp), lambda: mp[50].result()):
                timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
                timer.start()
                with self.assertRaises(KeyboardInterrupt):
                    wait()
                timer.join()
            self.settled(mp, but=1)
            gate.open()
            self.assertEqual(mp[:], list(range(200)))

    def test_a_host_that_is_killed_in_mid_map_leaves_no_process_behind(self):
        with Host("""
                import time, mirai
                mirai.daemons(2)
                mp = mirai.mirai_map(range(100_000), lambda x: time.sleep(0.001))
                mp[10].result()
                print("ready")
                mp[:]
                """) as host:
            self.assertEqual(host.line(), "ready")
            family = family_of(host.pid)
            self.assertGreaterEqual(len(family), 4)
            host.process.kill()
            wait_until(lambda: not any(map(is_alive, family)), 2.0, "the end of all that the host began")

    # -- maps within maps

    def test_daemons_in_a_map_item_is_refused_and_says_how_in_two_steps(self):
        def nested(_, how):
            import mirai
            try:
                with mirai.daemons(2, **how):
                    return "allowed"
            except RuntimeError as error:
                return str(error)

        for size in (None, 64):
            with self.subTest(size=size), granting(size), daemons(1):
                for text in mirai_map(range(3), nested, {})[:] + mirai_map(iter(range(3)), nested, {"compute": "inner"})[:]:
                    self.assertIn("local_url()", text)
                    self.assertIn("launch_local(", text)
                self.assertEqual(mirai.mirai(nested, 0, {}).result(20), "allowed")       # a task of its own may

    def test_the_two_step_way_is_open_to_map_items(self):
        def nested(x):
            import mirai
            mirai.daemons(url=mirai.local_url())
            mirai.launch_local(1)
            found = mirai.mirai_map(range(5), lambda y, x: (x, y), x)[:]
            mirai.daemons(0)
            return found

        for size in (None, 64):
            with self.subTest(size=size), granting(size), daemons(2):
                mp = mirai_map(range(4), nested)
                self.settled(mp)
                self.assertEqual(mp[:], [[(x, y) for y in range(5)] for x in range(4)])

    def test_a_reset_in_a_map_item_is_allowed(self):
        def nested(_):
            import mirai
            return bool(mirai.daemons(0)), mirai.daemons_set(), mirai.on_daemon()

        with daemons(1):
            self.assertEqual(mirai_map(range(3), nested)[:], [(False, False, True)] * 3)

    # -- random streams

    def test_with_a_seed_each_item_has_its_own_stream_whatever_runs_it(self):
        def draw(x):
            return random.random(), random.getrandbits(32)

        found = []
        for n, size, lazy in ((1, None, False), (2, None, False), (5, None, True), (2, 1, False), (3, 64, False), (2, 16, True)):
            with granting(size), daemons(n, seed=1):
                before = mirai.mirai(draw, 0).result(10)
                values = mirai_map(iter(range(300)) if lazy else range(300), draw)[:]
                found.append((before, values, mirai.mirai(draw, 0).result(10)))
        for other in found[1:]:
            self.assertEqual(other, found[0])
        self.assertEqual(len({found[0][0], *found[0][1], found[0][2]}), 302)
        with daemons(2, seed=2):
            self.assertNotEqual(mirai_map(range(300), draw)[:][0], found[0][1][0])

    def test_with_a_seed_an_item_that_is_run_again_draws_the_same(self):
        def draw(x, path, deadly):
            drawn = random.random()
            if x in deadly:
                _note(path, "begin", x)
                with open(path) as file:
                    if sum(line.startswith(f"begin {x} ") for line in file) < 2:
                        os.kill(os.getpid(), signal.SIGKILL)
            return drawn

        with Trace() as trace:
            found = []
            for deadly in ((), (3, 50)):
                with daemons(2, seed=7):
                    found.append(mirai_map(range(100), draw, trace.path, deadly, _retries=1)[:])
            self.assertEqual(found[0], found[1])

    def test_with_a_seed_cancels_and_deaths_shift_nobodys_stream(self):
        def draw(x, enter):
            if enter and x == 0:
                enter(x)
            return random.random()

        with daemons(1, seed=7):
            plain = mirai_map(range(100), draw, None)[:]
        with Gate() as gate, daemons(2, seed=7):
            mp = mirai_map(range(100), draw, gate.enter)
            os.kill(gate.arrived()[1], signal.SIGKILL)
            self.settled(mp)
            self.assertEqual(mp[:][1:], plain[1:])
        with Gate() as gate, daemons(1, seed=7):
            mp = mirai_map(range(100), draw, gate.enter)
            gate.arrived()
            stop_mirai([mp[i] for i in range(1, 50)])
            gate.open()
            self.settled(mp)
            self.assertEqual(mp[:][50:], plain[50:])


def _note_any(x, path):
    _note(path, "begin", 0)


def _id(x):
    return x


# >8 ---------------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    if not hasattr(mirai, "_fixed_chunk"):
        mirai._fixed_chunk = [None]     # before maps go in chunks
    arguments = sys.argv[1:]
    names = [a for a in arguments if not a.startswith("-")] or ["TestMaps"]
    names = [a if a.startswith("TestMaps") else "TestMaps." + a for a in names]
    test_mirai.__dict__["TestMaps"] = TestMaps
    suite = unittest.TestLoader().loadTestsFromNames(names, sys.modules[__name__])
    result = unittest.TextTestRunner(verbosity=2 if "-v" in arguments else 1, resultclass=test_mirai._Result).run(suite)
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed, {len(result.skipped)} skipped", flush=True)
    sys.exit(1 if failed else 0)
