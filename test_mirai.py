#!/usr/bin/env python3
"""The tests of mirai.py: `python test_mirai.py [-v] [--durations N] [Class[.test] ...]`, on the standard library alone.

One class per section of mirai.py, in its order; a test's name is a promise. Nothing sleeps to synchronise: tests
wait for conditions (`wait_until`), and hold tasks at gates (`Gate`). LONG only catches hangs: a test that takes
longer ends the run with the stack of every thread. After each class no process, thread, descriptor or file is left.
"""

from __future__ import annotations

import array
import ast
import asyncio
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import faulthandler
import functools
import gc
import http.server
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import operator
import os
import pickle
import pwd
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
import warnings
import zlib

import mirai
from mirai import (LaunchError, MiraiCancelled, MiraiConnectionReset, MiraiError, MiraiInterrupt, MiraiTimeout,
                   call_mirai, cluster_config, daemons, host_url, http_config, info, launch_local, launch_remote,
                   mirai_map, race_mirai, remote_config, ssh_config, status, stop_mirai, unresolved)

LONG = 60.0         # seconds; a wait this long means a hang
HERE = os.path.dirname(os.path.abspath(__file__))
FILE = os.path.join(HERE, "mirai.py")
PYPY = sys.implementation.name == "pypy"
MIRAI_LONG = bool(os.environ.get("MIRAI_LONG"))         # whether tests that take long are run, and others count further
takes_long = unittest.skipUnless(MIRAI_LONG, "takes long: MIRAI_LONG=1 runs it")


def at_length(short, long):
    """What a test does as a rule, and what under MIRAI_LONG: how often, how many, which cases."""
    return long if MIRAI_LONG else short


def crossed(*axes):
    """Every combination under MIRAI_LONG; as a rule each value once at least, beside ever others of the rest."""
    return at_length([tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))],
                     list(itertools.product(*axes)))


if PYPY:
    with contextlib.suppress(ImportError):
        import readline         # noqa: F401  # doctest does, and PyPy's keeps two descriptors for ever

# Sockets and key files of these tests, apart from those of whatever else this user runs.
os.environ["XDG_RUNTIME_DIR"] = RUN = tempfile.mkdtemp(prefix="mirai-test-")
atexit.register(shutil.rmtree, RUN, True)


# -- helpers


def wait_until(predicate, timeout=LONG, what="the condition"):
    """Waits for a condition that other processes bring about; fails after `timeout` seconds, gives its value."""
    deadline = time.monotonic() + timeout
    pause = 0.0005
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true in {timeout} s")
        time.sleep(pause)
        pause = min(pause * 2, 0.02)


def needs(*packages):
    there = all(map(importlib.util.find_spec, packages))
    return unittest.skipUnless(there, f"needs {' and '.join(packages)}")


def is_alive(pid):
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def no_more(pids, seconds=2.0):
    wait_until(lambda: not any(map(is_alive, pids)), seconds, "the end of all processes")


def family_of(pid):
    """The process ids of all descendants of `pid`."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        children = [child for child, of in parents.items() if of == parent]
        found += children
        todo += children
    return found


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def nursery_pid():
    return mirai._nursery[0].pid


def dispatcher_pid(compute="default"):
    """The dispatcher of a profile: the child of the nursery that holds the listening socket."""
    url = mirai._profiles[compute].url
    with open("/proc/net/unix") as file:
        inode = next(line.split()[6] for line in file
                     if line.rstrip().endswith(url[len("ipc://"):] + "~"))     # the name it was bound to
    for pid in family_of(nursery_pid()):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]":
                        return pid
    raise AssertionError("no dispatcher found")


def spent():
    """The seconds so far: of the clock, of this process's and its ended children's processors (user, system)."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), own.ru_utime + ended.ru_utime, own.ru_stime + ended.ru_stime


class Gate:
    """Where tasks are held: `mirai(gate.enter, label)` blocks there until `open()`. `arrived()` waits for one.

    The task calls back over loopback TCP: the host learns that it runs, and nobody sleeps.
    """

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.listener.settimeout(LONG)
        self.address = self.listener.getsockname()
        self.held = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open()
        self.listener.close()

    @property
    def enter(self):
        """A function for a daemon: says that it has arrived, blocks until released, gives back its argument."""
        return functools.partial(_enter_gate, self.address)

    def arrived(self):
        """Waits for the next task to arrive: its label and its daemon's process id."""
        sock, _ = self.listener.accept()
        sock.settimeout(LONG)
        self.held.append(sock)
        with sock.makefile("r") as file:
            return json.loads(file.readline())

    def open(self):
        """Lets go those that have arrived."""
        for sock in self.held:
            sock.close()
        self.held.clear()


def _enter_gate(address, label=None):
    with socket.create_connection(address) as sock:
        sock.sendall(json.dumps([label, os.getpid()]).encode() + b"\n")
        sock.recv(1)
    return label


def run_python(code, *arguments, timeout=LONG, python=sys.executable, mode="file", env=None, **options):
    """Runs a host script in a fresh interpreter that finds mirai: gives the CompletedProcess, text mode.

    mode: 'file' (a script), '-c', '-' (standard input) or '-i' (typed at the prompt)."""
    env = {**(os.environ if env is None else env), "PYTHONPATH": HERE, "PYTHONDONTWRITEBYTECODE": "1"}
    code = textwrap.dedent(code)
    with tempfile.TemporaryDirectory() as folder:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "timeout": timeout, "env": env,
                   "cwd": folder, **options}
        if mode == "file":
            path = os.path.join(folder, "script.py")
            with open(path, "w") as file:
                file.write(code)
            return subprocess.run([python, path, *arguments], **options)
        if mode == "-c":
            return subprocess.run([python, "-c", code, *arguments], **options)
        return subprocess.run([python, "-q", mode, *arguments] if mode == "-i" else [python, mode, *arguments], input=code,
                              **options)


class Host:
    """A host in a process of its own, to be killed: runs `code`, which prints lines that `line()` waits for."""

    def __init__(self, code, **options):
        env = {**os.environ, "PYTHONPATH": HERE, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True,
                                        env=env, **options)
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LONG)
        self.process.stdout.close()

    def line(self):
        found = self.process.stdout.readline()
        if not found:
            raise AssertionError(f"the host ended with {self.process.wait(LONG)} before it said anything")
        return found.strip()


class Case(unittest.TestCase):
    """Looks for leaks after each class: processes, threads, descriptors, temporary files, shared memory."""

    @classmethod
    def setUpClass(cls):
        cls._began = spent()
        gc.collect()
        cls._before = cls._held()

    @classmethod
    def tearDownClass(cls):
        for compute in list(mirai._profiles):
            daemons(0, compute=compute)
        mirai._at_exit()        # the nursery and the ephemeral profile, which a process otherwise keeps to its end
        gc.collect()
        try:
            wait_until(lambda: cls._held() == cls._before, 5.0)
        except AssertionError:
            raise AssertionError(f"{cls.__name__} leaks: before {cls._before}, after {cls._held()}") from None
        finally:
            known = _Result.classes.get(cls.__name__, (0.0, 0.0, 0.0))      # where tests are named it may come twice
            _Result.classes[cls.__name__] = [so_far + after - before for so_far, before, after in zip(known, cls._began, spent())]

    @staticmethod
    def _held():
        """What a class must leave as it found it."""
        threads = sorted(t.name for t in threading.enumerate() if t.name != "mirai-callbacks")     # one, for ever
        shared = sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else []
        return {"children": [p for p in family_of(os.getpid()) if is_alive(p)], "threads": threads,
                "descriptors": descriptors(), "run-time files": sorted(os.listdir(mirai.runtime_dir())), "shared": shared}

    def setUp(self):
        faulthandler.dump_traceback_later(2 * LONG, exit=True)

    def tearDown(self):
        faulthandler.cancel_dump_traceback_later()

    def end_with_the_test(self, *pids):
        """Daemons that outlive their host are gone after the test, whatever comes."""
        def end():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

        self.addCleanup(no_more, pids)
        self.addCleanup(end)


# -- 0. The house: what holds for the file as a whole


PURE = ("2", "3", "4", "5", "6", "7")
WORLD = {"socket", "selectors", "select", "signal", "ssl", "subprocess", "threading", "time", "os", "mmap", "tempfile"}
RESERVED = {"pickle": "5", "random": "3"}      # what one pure section may name, and no other
EXCEPTED = {    # section, what it names -> why that is no input or output
    ("5", "threading.RLock"): "two threads may load the same new class",
    ("2", "signal.Signals"): "the names of signals",
}
LONG_FUNCTIONS: dict = {}       # name -> why it is better in one piece


class TestHouse(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        with open(FILE, encoding="utf-8") as file:
            cls.text = file.read()
        cls.lines = cls.text.splitlines()
        cls.tree = ast.parse(cls.text)
        cls.banners = [(i, re.fullmatch(r"# (\d+)\. (.+)", line)) for i, line in enumerate(cls.lines, 1)
                       if i > 1 and re.fullmatch("# =+", cls.lines[i - 2]) and re.fullmatch("# =+", cls.lines[i])]

    def section_of(self, line):
        """The number of the section that a line is in, a text; "0" above the first."""
        return max((found for found in self.banners if found[0] <= line), default=(0, ["", "0"]))[1][1]

    def nodes(self, *kinds):
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def top_level(self):
        """The statements of the module, those under an `if` or `try` included."""
        todo, found = list(self.tree.body), []
        while todo:
            node = todo.pop(0)
            found.append(node)
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
                todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.ExceptHandler))]
        return found

    def definitions(self):
        """Every name that the module defines itself -> the section where it first does."""
        found = {}
        for node in self.top_level():
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n.id for target in targets for n in ast.walk(target)
                         if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            else:
                continue
            for name in names:
                found.setdefault(name, int(self.section_of(node.lineno)))
        return found

    def uses(self):
        """(name, line) of every global that compiled code reads or writes: annotations, which are texts, are not."""
        import dis
        todo, found = [compile(self.text, FILE, "exec", dont_inherit=True)], []
        while todo:
            code = todo.pop()
            todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]
            line, own = code.co_firstlineno, set()
            lines = dict(dis.findlinestarts(code))
            for step in dis.get_instructions(code):
                line = lines.get(step.offset) or line
                if step.opname == "STORE_NAME":
                    own.add(step.argval)        # of a class body
                elif step.opname in ("LOAD_GLOBAL", "STORE_GLOBAL") or step.opname == "LOAD_NAME" and step.argval not in own:
                    found.append((step.argval, line))
        return found

    def test_the_banners_are_the_contents(self):
        contents = re.findall(r"^ +(\d+)\. (.+)$", mirai.__doc__.partition("Contents")[2], re.MULTILINE)
        self.assertGreater(len(contents), 10)
        self.assertEqual(contents, [(m[1], m[2]) for _, m in self.banners])
        self.assertEqual([int(number) for number, _ in contents], list(range(1, len(contents) + 1)))

    def test_every_heading_in_the_file_is_a_banner(self):
        headings = [i for i, line in enumerate(self.lines, 1) if re.match(r"# \d+\. ", line)]
        self.assertEqual(headings, [i for i, _ in self.banners])

    def test_every_section_says_what_it_knows_and_never_does(self):
        for line, match in self.banners:
            head = "\n".join(self.lines[line + 1:line + 6])
            with self.subTest(section=match[0]):
                self.assertRegex(head, r"(?m)^# Knows:  \S")
                self.assertRegex(head, r"(?m)^# Never:  \S")

    def test_no_section_uses_a_name_of_a_section_below_it(self):
        defined = self.definitions()
        self.assertGreater(len(defined), 100)
        uses = self.uses()
        self.assertGreater(len(uses), 1000)
        upward = sorted({f"{FILE}:{line}: section {self.section_of(line)} uses {name} of section {defined[name]}"
                         for name, line in uses
                         if int(self.section_of(line)) and defined.get(name, 0) > int(self.section_of(line))})
        self.assertEqual(upward, [])

    def test_the_pure_sections_name_nothing_of_the_world(self):
        attribute_of = {id(n.value): n.attr for n in self.nodes(ast.Attribute)}
        found, excepted = [], set()
        for node in self.nodes(ast.Name, ast.Import, ast.ImportFrom):
            section = self.section_of(node.lineno)
            if section not in PURE:
                continue
            if isinstance(node, ast.Name):
                names = [node.id]
            else:
                names = [a.name.partition(".")[0] for a in node.names] + [getattr(node, "module", None)]
            for name in names:
                full = f"{name}.{attribute_of[id(node)]}" if id(node) in attribute_of else name
                if (section, full) in EXCEPTED:
                    excepted.add((section, full))
                elif name in WORLD or RESERVED.get(name, section) != section:
                    found.append(f"line {node.lineno}, section {section}: {full}")
        self.assertEqual(found, [])
        self.assertEqual(excepted, set(EXCEPTED), "an exception that nothing needs")

    def test_no_function_is_longer_than_sixty_lines(self):
        sizes = {node.name: node.end_lineno - node.lineno + 1 for node in self.nodes(ast.FunctionDef, ast.AsyncFunctionDef)}
        self.assertGreater(len(sizes), 200)
        too_long = {name: size for name, size in sizes.items() if size > 60}
        self.assertEqual(set(too_long), set(LONG_FUNCTIONS), too_long)

    def test_the_file_keeps_to_its_budget(self):
        # 5,000 were planned for the whole, 420 of them for the serializer, which takes three times that. Maps in pieces
        # that can be taken back, everywhere(), direct and sync modes, daemon options, random streams and tables, which
        # the plan took for small additions, are as much again as it had for the verbs: 2,200 lines. Other machines (TLS,
        # sealed frames, launchers, modules that are forwarded) have 1,500.
        self.assertLessEqual(len(self.lines), 10_200)

    def test_every_public_name_exists_and_is_documented(self):
        self.assertEqual(sorted(set(mirai.__all__)), sorted(mirai.__all__))
        for name in mirai.__all__:
            with self.subTest(name):
                self.assertTrue((getattr(mirai, name).__doc__ or "").strip())

    def test_every_function_is_annotated(self):
        bare, seen = [], 0
        for scope in [self.tree, *self.nodes(ast.ClassDef)]:
            for node in scope.body:
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    seen += 1
                    a = node.args
                    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
                    unmethodical = arguments[1:] if scope is not self.tree and not any(
                        getattr(d, "id", "") == "staticmethod" for d in node.decorator_list) else arguments
                    if node.returns is None or any(x.annotation is None for x in unmethodical):
                        bare.append(f"line {node.lineno}: {node.name}")
        self.assertGreater(seen, 200)
        self.assertEqual(bare, [])

    @unittest.skipUnless(hasattr(sys, "stdlib_module_names"), "Python before 3.10 has no list of its modules")
    def test_nothing_outside_the_standard_library_is_imported(self):
        names = {a.name for node in self.top_level() if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in self.top_level() if isinstance(node, ast.ImportFrom)}
        self.assertIn("pickle", names)
        self.assertEqual({n for n in names if n.partition(".")[0] not in sys.stdlib_module_names}, set())

    def test_the_examples_in_the_docstring_run(self):
        import doctest
        examples = doctest.DocTestParser().get_doctest(mirai.__doc__, {"__name__": "__main__"}, "mirai", FILE, 0)
        self.assertGreater(len(examples.examples), 1)
        said = io.StringIO()
        failed, _ = doctest.DocTestRunner(verbose=False).run(examples, out=said.write)
        self.assertEqual(failed, 0, said.getvalue())


# -- 2. Errors


ERRORS = {mirai.ErrorValue: 0, mirai.MiraiInterrupt: 1, mirai.MiraiTimeout: 5, mirai.MiraiConnectionReset: 19,
          mirai.LaunchError: 19, mirai.MiraiCancelled: 20, mirai.MiraiError: 1000}


class TestErrors(Case):
    def test_codes_are_those_of_r(self):
        self.assertEqual({cls.__name__: cls.code for cls in ERRORS}, {cls.__name__: code for cls, code in ERRORS.items()})
        self.assertTrue(all(issubclass(cls, mirai.ErrorValue) for cls in ERRORS))

    def test_every_class_survives_pickle_at_every_protocol(self):
        for cls in ERRORS:
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                with self.subTest(cls.__name__, protocol=protocol):
                    error = cls("it broke")
                    error.note = [1]
                    copy = pickle.loads(pickle.dumps(error, protocol))
                    self.assertIs(type(copy), cls)
                    self.assertEqual((str(copy), copy.args, copy.code, copy.note),
                                     ("it broke", ("it broke",), ERRORS[cls], [1]))

    def test_a_mirai_error_survives_pickle_with_all_that_it_knows(self):
        error = MiraiError("ValueError: no", ["ValueError", "Exception"], "Traceback…\nValueError: no\n", {"at": 3},
                           ValueError("no"))
        copy = pickle.loads(pickle.dumps(error))
        self.assertEqual((copy.condition_class, copy.stack_trace, copy.attributes, str(copy), repr(copy)),
                         (error.condition_class, error.stack_trace, error.attributes, str(error), repr(error)))
        self.assertIs(type(copy.original), ValueError)
        self.assertEqual(copy.at, 3)

    def test_errors_are_what_python_calls_them(self):
        for cls, base in [(MiraiTimeout, TimeoutError), (MiraiTimeout, concurrent.futures.TimeoutError),
                          (MiraiConnectionReset, ConnectionResetError), (mirai.LaunchError, MiraiConnectionReset),
                          (MiraiCancelled, concurrent.futures.CancelledError), (MiraiInterrupt, MiraiError)]:
            with self.subTest(cls.__name__, base=base.__name__), self.assertRaises(base):
                raise cls("it broke")

    def test_an_interrupt_does_not_end_the_host(self):
        self.assertFalse(issubclass(MiraiInterrupt, KeyboardInterrupt))
        self.assertTrue(all(issubclass(cls, Exception) for cls in ERRORS))

    def test_the_text_of_a_mirai_error_ends_in_the_daemons_traceback(self):
        self.assertEqual(str(MiraiError("ValueError: no")), "ValueError: no")
        self.assertEqual(str(MiraiError("ValueError: no", (), "Traceback\n  there\n")),
                         "ValueError: no\n\nTraceback\n  there")
        self.assertEqual(repr(MiraiError("ValueError: no", (), "Traceback\n")), "<MiraiError 1000: ValueError: no>")
        self.assertEqual(str(MiraiError()), "")

    def test_attributes_of_the_original_are_read_from_the_error(self):
        error = MiraiError("no", attributes={"errno": 2, "args": "not these"})
        self.assertEqual((error.errno, error.attributes["args"], error.args), (2, "not these", ("no",)))
        self.assertFalse(hasattr(error, "filename"))
        with self.assertRaisesRegex(AttributeError, "'MiraiError' object has no attribute 'filename'"):
            error.filename

    def test_attribute_access_of_a_half_made_error_does_not_recurse(self):
        with self.assertRaises(AttributeError):
            MiraiError.__new__(MiraiError).attributes

    def test_unresolved_is_one_falsy_object(self):
        self.assertFalse(mirai.UNRESOLVED)
        self.assertEqual((repr(mirai.UNRESOLVED), str(mirai.UNRESOLVED)), ("<unresolved>", "<unresolved>"))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            self.assertIs(pickle.loads(pickle.dumps(mirai.UNRESOLVED, protocol)), mirai.UNRESOLVED)
        self.assertIs(mirai.loads(mirai.dumps([mirai.UNRESOLVED]))[0], mirai.UNRESOLVED)

    def test_the_end_of_a_process_is_told_in_words(self):
        for status_, words in [(0, "exited with status 0"), (3, "exited with status 3"), (-9, "was killed by SIGKILL"),
                               (-signal.SIGSEGV, "was killed by SIGSEGV"), (-99, "was killed by signal 99")]:
            with self.subTest(status_):
                self.assertEqual(mirai.describe_exit(status_), words)

    def test_a_loss_ends_in_the_last_words_where_there_are_any(self):
        self.assertEqual(mirai.describe_loss("daemon 7", "exited with status 1", " \n"), "daemon 7 exited with status 1")
        self.assertEqual(mirai.describe_loss("daemon 7", "was killed by SIGKILL", "\nhelp\n"),
                         "daemon 7 was killed by SIGKILL; its last words:\nhelp")


# -- 3. Random streams

SOON = 20.0         # seconds; what takes longer hangs, and fails
MODES = ({"dispatcher": True}, {"dispatcher": False})


def outcome(m):
    """The value or error value of a mirai, which is to be there soon."""
    done, _ = concurrent.futures.wait([m], SOON)
    if not done:
        raise AssertionError(f"{m!r} did not resolve in {SOON} s")
    return m.data


def outcomes(ms):
    """The same of a map, or a list of mirais."""
    wait_until(lambda: not unresolved(ms), SOON, "the end of all tasks")
    return ms[:] if mirai.is_mirai_map(ms) else [m.data for m in ms]


R_STREAMS = """
seed 0
    -835792825 1280795612 -169270483 -442010614 -603558397 -222347416
    -994253523 -2025289096 -1999543919 745267815 1237002977 287006634
    992173198 -1991630577 -1823393640 1162964974 -556911557 -830094812
    1977995887 1117280151 -953831626 -475740103 1484380418 1284401962
    -175571783 -1062219173 1112355733 163098794 247024303 -1258508778
    -1353495786 1624336640 627421325 1708384105 -45711463 1969995427
seed 1
    1280795612 -169270483 -442010614 -603558397 -222347416 1489374793
    4246464 -231956060 -471632796 1620595781 533443421 594164961
    317200966 -183608609 -331475888 -286302502 -854727955 -608024097
    329312609 1836843925 -1481558119 -156903236 -989007769 556931653
    867834292 352478644 -1119136754 1704148475 1755264716 1803175825
    1758599292 395847541 373354099 -1616541142 1293554115 -1180290192
seed 42
    -2133391687 507561766 1260545903 1362917092 -1772566379 -1344458670
    -94575036 -24861725 357812871 346211554 -1301022835 440649733
    -358246211 -1411857254 -488221791 1069515918 -1720689715 1070199760
    1805183335 -1982978684 1500882842 -1897959390 -204266259 -2006625641
    -860779432 1203324979 -1993452634 -1372834584 704149361 1348506385
    -1871565002 1968597656 -505666782 1055078269 658163990 1090264187
seed 123
    1806547166 -983674937 643431772 1162448557 -959247990 -133913213
    1801422725 -2057975723 1156894209 1595475487 210384600 -1655729657
    -1618675118 902610736 -520029923 -1096480050 1501459956 -283668411
    1788230969 -1347111405 2142194448 1111390192 -462721366 1540954117
    -1508851964 965321203 -1085942248 489720281 -152362437 -1454180809
    701401935 -355687987 1513178397 1735140456 -1584327974 -452417912
seed 2024
    1056809551 -190317500 1855485557 -997208910 -2126646133 -1735204272
    550512540 -1086738260 -156673210 588268615 -379965450 1105225819
    -1158897757 578039374 -122988588 -1034373648 -1528821448 -1836220567
    1988921798 130330115 -1512657341 980099996 1371499847 1265983638
    961413722 357830394 349717673 835302534 567528262 -1314401539
    -2017351296 -1938889364 141785349 -1811111809 -1242362179 701666636
seed -7
    1527957300 -1453643611 1739910434 688823867 1022932032 680499009
    1808819806 -1014215410 601534232 852513277 782743327 -1909612273
    1011837074 -1194588600 842535397 434937283 593085301 1572731847
    -691784098 -690717756 -366117519 1786946991 1589016382 -1864559657
    1259296206 -490387319 -122063486 1132458309 456166313 651383053
    -77413399 1063761410 22031304 -1215815912 56237751 -1416455902
seed 2147483647
    -804897614 583378059 -2044014000 1867020817 1162714270 213414023
    1986407099 -258657415 -606689535 -410049274 -2023945838 -143260021
    -84584388 -416237758 -99238161 622503157 -676702030 542962503
    370229616 -1872734906 1544290565 -1781846740 -862592290 518485615
    -425361631 140074415 -1195414015 630183026 489805487 -762896955
    239905537 -204419120 -2001924062 -801251566 -619286284 1979152354
"""


def r_streams():
    """seed -> the state, the next four streams, the next substream; each as `.Random.seed`."""
    found = {}
    for line in R_STREAMS.split("\n"):
        words = line.split()
        if words[:1] == ["seed"]:
            rows = found[int(words[1])] = []
        elif words:
            rows.append([10407, *map(int, words)])
    return found


def later_stream(rs, power=127):
    """The state 2**power steps on, by the definition of the generator."""
    def product(a, b, modulus):
        return [[sum(x * y for x, y in zip(row, column)) % modulus for column in zip(*b)] for row in a]

    state = []
    for at, modulus, matrix in ((1, 4294967087, [[0, 1, 0], [0, 0, 1], [-810728, 1403580, 0]]),
                                (4, 4294944443, [[0, 1, 0], [0, 0, 1], [-1370589, 0, 527612]])):
        for _ in range(power):
            matrix = product(matrix, matrix, modulus)
        state += [value for [value] in product(matrix, [[x & 0xffffffff] for x in rs[at:at + 3]], modulus)]
    return [10407, *((value ^ (1 << 31)) - (1 << 31) for value in state)]


class TestStreams(Case):
    def test_the_table_is_what_the_definition_gives(self):
        self.assertEqual(len(r_streams()), 7)
        for state, *following, substream in r_streams().values():
            for stream in following:
                state, previous = stream, state
                self.assertEqual(later_stream(previous), state)
            self.assertEqual(len(following), 4)
        state, substream = r_streams()[42][0], r_streams()[42][-1]
        self.assertEqual(later_stream(state, 76), substream)

    def test_nextstream_gives_rs_own_integers(self):
        for seed, (*streams, _) in r_streams().items():
            with self.subTest(seed=seed), daemons(sync=True, seed=seed):
                self.assertEqual([mirai.nextstream() for _ in streams], streams)

    def test_it_gives_them_with_a_dispatcher_and_without(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(1, seed=-7, **mode):
                found = [mirai.nextstream() for _ in range(5)]
                self.assertEqual(found, r_streams()[-7][:5])
                self.assertEqual({type(value) for stream in found for value in stream}, {int})

    def test_the_functions_below_give_them_too(self):
        for seed, (state, *following, substream) in r_streams().items():
            stream = mirai.seed_stream(seed)
            self.assertEqual(mirai.stream_to_r(stream), state)
            self.assertEqual(mirai.stream_from_r(state), stream)
            self.assertEqual([mirai.stream_to_r(mirai.advance_stream(stream, i)) for i in range(1, 5)], following)
            self.assertEqual(mirai.stream_to_r(mirai.advance_stream(stream, 1, mirai.SUBSTREAM)), substream)

    def test_setting_anew_begins_anew_and_each_profile_has_its_own(self):
        first, second = r_streams()[1][:2]
        for _ in range(2):
            with daemons(sync=True, seed=1, compute="a"), daemons(sync=True, seed=42, compute="b"):
                self.assertEqual(mirai.nextstream("a"), first)
                self.assertEqual(mirai.nextstream("b"), r_streams()[42][0])
                self.assertEqual(mirai.nextstream(compute="a"), second)
                self.assertEqual(mirai.nextstream(), r_streams()[42][1])

    def test_without_a_seed_they_are_streams_of_their_own(self):
        firsts = []
        for _ in range(2):
            with daemons(sync=True):
                one, two = mirai.nextstream(), mirai.nextstream()
                self.assertEqual((len(one), one[0]), (7, 10407))
                self.assertEqual(two, later_stream(one))
                firsts.append(one)
        self.assertNotEqual(*firsts)

    def test_each_mirai_and_each_item_takes_one_and_everywhere_none(self):
        for mode in (*MODES, {"sync": True}):
            with self.subTest(**mode), daemons(1, seed=123, **mode):
                expected = [r_streams()[123][0]]
                for _ in range(12):
                    expected.append(later_stream(expected[-1]))
                self.assertEqual(mirai.nextstream(), expected[0])
                outcome(mirai.mirai(abs, -1))
                self.assertEqual(mirai.nextstream(), expected[2])
                outcomes(mirai_map([1, 2, 3], abs))
                self.assertEqual(mirai.nextstream(), expected[6])
                outcomes(mirai.everywhere("import math"))
                self.assertEqual(mirai.nextstream(), expected[7])
                outcome(mirai.try_mirai(abs, -1))
                outcomes(mirai_map((i for i in range(2)), abs))
                self.assertEqual(mirai.nextstream(), expected[11])

    def test_where_no_daemons_are_set_there_is_none(self):
        self.assertIsNone(mirai.nextstream())
        self.assertIsNone(mirai.nextstream("never set"))
        for name in ("n", "url", "dispatcher", "tls"):
            self.assertIsNone(mirai.nextget(name))

    def test_threads_never_get_the_same_one(self):
        with daemons(sync=True, seed=2024):
            found = [stream for streams in _at_once(8, lambda i: [tuple(mirai.nextstream()) for _ in range(50)])
                     for stream in streams]
            self.assertEqual(len(set(found)), 400)
            expected = {tuple(stream) for stream in r_streams()[2024][:5]}
            self.assertLessEqual(expected, set(found))

    def test_a_seed_that_is_no_integer_of_32_bits_is_refused(self):
        for seed in ("1", 1.5, True, [1], 1 << 40):
            with self.subTest(seed=seed), self.assertRaisesRegex((TypeError, ValueError), "seed"):
                daemons(1, seed=seed)
            self.assertFalse(mirai.daemons_set())

    def test_nextget_looks_things_up(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(2, url="tcp://127.0.0.1:0", compute="other", **mode):
                self.assertEqual(mirai.nextget("n", compute="other"), 2)
                self.assertEqual(mirai.nextget("n"), 2)
                self.assertEqual(mirai.nextget("url"), status()["daemons"])
                self.assertEqual(bool(mirai.nextget("dispatcher")), mode["dispatcher"])
                self.assertIsNone(mirai.nextget("tls"))
                self.assertIsNone(mirai.nextget("n", compute="default"))

    def test_nextcode_says_why_a_daemon_ended(self):
        self.assertEqual([mirai.nextcode(code) for code in range(4)],
                         ["0 | Daemon connection terminated", "1 | Daemon idletime limit reached",
                          "2 | Daemon walltime limit reached", "3 | Daemon task limit reached"])


# -- everywhere


MODEL = """
    import os

    model, seen = None, 0

    def load(scale, *, shift=0):
        global model
        model = [scale, shift]
        return os.getpid()

    def use(x):
        return model[0] * x + model[1]

    def peek():
        return globals().get("model"), globals().get("extra")
    """


# -- 4. Wire


class TestWire(Case):
    FRAMES = [mirai.encode(mirai.Kind.TASK, 7, b"payload", 3), mirai.encode(mirai.Kind.CANCEL, (1 << 64) - 1)]
    MESSAGES = [(mirai.Kind.TASK, 7, 3, b"payload"), (mirai.Kind.CANCEL, (1 << 64) - 1, 0, b"")]

    def decode(self, pieces, limit=None):
        """Every message, taken as soon as it is there."""
        decoder, found = mirai.Decoder(limit), []
        for piece in pieces:
            decoder.feed(piece)
            found += map(tuple, decoder)
        return found

    def test_outcomes_of_a_map_may_have_more_than_4_gib(self):
        class Huge(bytes):
            def __len__(self):
                return 1 << 33
        self.assertEqual(struct.unpack("<2Q", mirai.join_apart([Huge(), b"x"])[0]), (1 << 33, 1))
        self.assertEqual(mirai.split_apart(b"head" + b"".join(mirai.join_apart([b"ab", b"", b"c"])), 3, 4), [b"ab", b"", b"c"])

    def test_a_message_comes_out_as_it_went_in(self):
        message = next(iter(self.fed(self.FRAMES[0])))
        self.assertEqual((message.kind, message.id, message.flags, message.payload), self.MESSAGES[0])
        self.assertEqual(repr(message), f"<Message kind={mirai.Kind.TASK} id=7 flags=3 bytes=7>")

    def fed(self, *pieces, limit=None):
        decoder = mirai.Decoder(limit)
        for piece in pieces:
            decoder.feed(piece)
        return decoder

    def test_kinds_are_distinct_and_fit_a_byte(self):
        kinds = [value for name, value in vars(mirai.Kind).items() if name.isupper()]
        self.assertGreater(len(kinds), 10)
        self.assertEqual(len(set(kinds)), len(kinds))
        self.assertTrue(all(0 < kind < 256 for kind in kinds))

    def test_every_split_of_two_frames_gives_the_same_two_messages(self):
        stream = b"".join(self.FRAMES)
        for first, second in itertools.combinations_with_replacement(range(len(stream) + 1), 2):
            pieces = [piece for piece in (stream[:first], stream[first:second], stream[second:]) if piece]
            self.assertEqual(self.decode(pieces), self.MESSAGES, (first, second))

    def test_one_byte_at_a_time_is_enough(self):
        stream = b"".join(self.FRAMES) * 3
        self.assertEqual(self.decode([stream[i:i + 1] for i in range(len(stream))]), self.MESSAGES * 3)

    def test_a_message_comes_with_its_last_byte_and_no_sooner(self):
        decoder = mirai.Decoder()
        for byte in self.FRAMES[0][:-1]:
            decoder.feed(bytes([byte]))
            self.assertIsNone(decoder.pop())
        decoder.feed(self.FRAMES[0][-1:])
        self.assertEqual(decoder.pop(), self.MESSAGES[0])

    def test_several_frames_in_one_piece_come_one_by_one(self):
        self.assertEqual(self.decode([b"".join(self.FRAMES) * 50 + self.FRAMES[0][:5], self.FRAMES[0][5:]]),
                         self.MESSAGES * 50 + self.MESSAGES[:1])

    def test_an_empty_payload_is_a_message(self):
        self.assertEqual(self.decode([mirai.encode(mirai.Kind.WELCOME)]), [(mirai.Kind.WELCOME, 0, 0, b"")])

    def test_what_is_too_long_is_refused_before_its_body_arrives(self):
        header = mirai.HEADER.pack(1 << 60, mirai.WIRE_VERSION, mirai.Kind.HELLO, 0, 0)
        with self.assertRaisesRegex(mirai.ProtocolError, f"{1 << 60} bytes where at most 4096"):
            list(self.fed(header, limit=4096))
        with self.assertRaises(mirai.ProtocolError):
            self.fed(header, limit=4096).pop()

    def test_the_limit_itself_is_allowed(self):
        self.assertEqual(len(self.decode([mirai.encode(mirai.Kind.TASK, 1, bytes(100))], limit=100)), 1)
        with self.assertRaises(mirai.ProtocolError):
            self.decode([mirai.encode(mirai.Kind.TASK, 1, bytes(101))], limit=100)

    def test_an_announced_length_costs_no_memory_until_it_comes(self):
        decoder = self.fed(mirai.HEADER.pack(1 << 62, mirai.WIRE_VERSION, mirai.Kind.TASK, 0, 1))
        for _ in range(100):        # to set so much aside would be a MemoryError
            self.assertEqual(list(decoder), [])
            self.assertLessEqual(decoder.wanted(), 16 << 20)
            decoder.feed(bytes(1000))

    def test_more_is_read_at_once_while_a_large_message_arrives_and_never_past_reason(self):
        decoder = mirai.Decoder()
        small = decoder.wanted()
        decoder.feed(mirai.HEADER.pack(100 << 20, mirai.WIRE_VERSION, mirai.Kind.TASK, 0, 1))
        self.assertEqual(list(decoder), [])
        self.assertGreater(decoder.wanted(), small)
        decoder.feed(bytes(100 << 20))
        self.assertEqual(len(list(decoder)), 1)
        self.assertEqual(decoder.wanted(), small)

    def test_another_wire_version_is_refused(self):
        frame = mirai.HEADER.pack(0, mirai.WIRE_VERSION + 1, mirai.Kind.HELLO, 0, 0)
        with self.assertRaisesRegex(mirai.ProtocolError, f"wire version {mirai.WIRE_VERSION + 1} met {mirai.WIRE_VERSION}"):
            list(self.fed(frame))

    def test_a_browser_is_refused(self):
        with self.assertRaises(mirai.ProtocolError):
            list(self.fed(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"))

    def test_messages_before_the_refused_one_still_come(self):
        decoder, found = self.fed(self.FRAMES[0] + b"\xff" * mirai.HEADER.size), []
        with self.assertRaises(mirai.ProtocolError):
            for message in decoder:
                found.append(message)
        self.assertEqual(found, self.MESSAGES[:1])

    def test_json_goes_there_and_back(self):
        message = self.fed(mirai.encode_json(mirai.Kind.START, {"ü": [1, None]}, 9)).pop()
        self.assertEqual((message.kind, message.id, mirai.decode_json(message)), (mirai.Kind.START, 9, {"ü": [1, None]}))

    def test_what_is_no_json_object_is_the_peers_fault(self):
        for payload in (b"", b"{", b"\xff\xfe\x00", b"[]", b"1", b"null", b'"text"', b'{"a": 1} x'):
            with self.subTest(payload), self.assertRaises(mirai.ProtocolError):
                mirai.decode_json(mirai.Message(mirai.Kind.HELLO, 0, 0, payload))

    def test_json_nested_beyond_measure_is_the_peers_fault(self):
        for payload in (b"[" * 4000, b'{"a":' * 800, b"[" * 1_000_000):     # the first two fit a stranger's frame
            with self.subTest(payload[:10]), self.assertRaises(mirai.ProtocolError):
                mirai.decode_json(mirai.Message(mirai.Kind.HELLO, 0, 0, payload))

    def test_a_message_whose_handling_was_interrupted_comes_again(self):
        decoder, handled = self.fed(*self.FRAMES), []
        with self.assertRaises(KeyboardInterrupt):
            for message in decoder:
                raise KeyboardInterrupt
        for message in decoder:
            handled.append(tuple(message))
        self.assertEqual(handled, self.MESSAGES)
        self.assertEqual(list(decoder), [])

    def test_only_the_message_at_hand_comes_again(self):
        decoder = self.fed(*self.FRAMES)
        with self.assertRaises(KeyboardInterrupt):
            for message in decoder:
                if message == self.MESSAGES[1]:
                    raise KeyboardInterrupt
        self.assertEqual(list(map(tuple, decoder)), self.MESSAGES[1:])

    def test_pop_takes_the_message(self):
        decoder = self.fed(*self.FRAMES)
        self.assertEqual([decoder.pop(), decoder.pop(), decoder.pop()], [*self.MESSAGES, None])

    def test_bytes_appended_to_the_chunks_are_fed(self):
        decoder = mirai.Decoder()
        for frame in self.FRAMES:
            decoder.chunks.append(frame)
            self.assertEqual(len(list(decoder)), 1)

    @unittest.skipIf(PYPY, "on PyPy the garbage collector's share grows faster than the bytes")
    def test_a_large_frame_in_small_pieces_takes_linear_time(self):
        piece = bytes(65536)

        def seconds(count):
            decoder = self.fed(mirai.HEADER.pack(count * len(piece), mirai.WIRE_VERSION, mirai.Kind.TASK, 0, 1))
            began = time.process_time()
            for _ in range(count):
                self.assertIsNone(decoder.pop())
                decoder.feed(piece)
            self.assertEqual(len(decoder.pop().payload), count * len(piece))
            return time.process_time() - began

        seconds(256)
        small, large = map(min, zip(*[(seconds(256), seconds(1024)) for _ in range(3)]))
        self.assertLess(large, 10 * small, "4 times the bytes took more than 10 times the time: 16 were quadratic")

    def test_many_small_frames_in_one_piece_take_linear_time(self):
        def seconds(count):
            decoder = self.fed(self.FRAMES[1] * count)
            began = time.process_time()
            self.assertEqual(sum(1 for _ in decoder), count)
            return time.process_time() - began

        small, large = map(min, zip(*[(seconds(4000), seconds(32000)) for _ in range(5)]))
        self.assertLess(large, 32 * small)

    def test_random_streams_in_random_pieces_come_out_as_they_went_in(self):
        for seed in range(200):
            chance = random.Random(seed)
            sent = [(chance.randrange(256), chance.randrange(1 << 64), chance.randrange(1 << 16),
                     bytes(chance.choice([0, 1, 20, 70, 3000, 200000 if seed % 10 == 0 else 300])))
                    for _ in range(chance.randrange(1, 20))]
            stream = b"".join(mirai.encode(kind, id, payload, flags) for kind, id, flags, payload in sent)
            decoder, got, at = mirai.Decoder(), [], 0
            while at < len(stream):
                size = chance.choice([1, 19, 20, 21, 400, 70000])
                decoder.feed(stream[at:at + size])
                at += size
                for message in decoder:         # now and then the handling is broken off before it took effect
                    if chance.random() < 0.1:
                        break
                    got.append(tuple(message))
            got += map(tuple, decoder)
            self.assertEqual(got, sent, f"seed {seed}")

    def test_a_task_names_at_its_end_what_it_needs(self):
        hashes = [bytes([i]) * mirai.HASH_SIZE for i in range(3)]
        for needs in ([], hashes[:1], hashes):
            for task in (mirai.Kind.TASK, mirai.Kind.UNIT, mirai.Kind.EVERYWHERE):
                frame = mirai.encode_task(task, 7, [b"one ", b"task"], needs, 2)
                (kind, id, flags, payload), = self.decode([frame])
                self.assertEqual((kind, id, flags), (task, 7, 2))
                self.assertTrue(payload.startswith(b"one task"))
                self.assertEqual([mirai.needs_of(frame), mirai.needs_of(payload)], [b"".join(needs)] * 2)
                self.assertEqual(mirai.split_hashes(b"".join(needs)), needs)

    def test_a_frames_kind_can_be_read_without_decoding_it(self):
        for kind in (mirai.Kind.TASK, mirai.Kind.UNIT, mirai.Kind.EVERYWHERE):
            self.assertEqual(mirai.encode_task(kind, (1 << 64) - 1, [bytes(70000)], [], 65535)[mirai.KIND_AT], kind)

    def test_parts_make_the_frame_that_the_whole_would(self):
        parts = [b"", b"a", bytes(100_000), b""]
        self.assertEqual(mirai.encode_parts(mirai.Kind.RESULTS, parts, 3, 4),
                         mirai.encode(mirai.Kind.RESULTS, 3, b"".join(parts), 4))

    def test_what_was_joined_apart_is_split_into_the_same_parts(self):
        for parts in ([], [b""], [b"one"], [b"", b"two", b"", bytes(100_000), b"\0"], [bytes([i]) * i for i in range(256)]):
            data = b"".join([b"head", *mirai.join_apart(parts)])
            for whole in (data, memoryview(data), data + b"of no interest"):
                self.assertEqual([bytes(part) for part in mirai.split_apart(whole, len(parts), 4)], parts)
            self.assertEqual(mirai.split_apart(data[4:], len(parts)), parts)

    def test_a_view_is_split_without_a_copy(self):
        data = bytearray(b"".join(mirai.join_apart([b"one", b"two"])))
        _, second = mirai.split_apart(memoryview(data), 2)
        data[-1:] = b"!"
        self.assertEqual(bytes(second), b"tw!")

    def test_what_is_too_short_to_hold_their_lengths_is_not_split(self):
        with self.assertRaises(struct.error):
            mirai.split_apart(b"".join(mirai.join_apart([b"one"])), 3)

    def test_ranges_units_and_results_go_there_and_back_at_their_limits(self):
        most = (1 << 32) - 1
        for packing, values in ((mirai.RANGE, (0, 0)), (mirai.RANGE, (most, most)), (mirai.UNIT_HEAD, (most, (1 << 64) - 1)),
                                (mirai.RESULTS_HEAD, ((1 << 64) - 1, most, most, 0.25)), (mirai.COUNTS, ((1 << 64) - 1,) * 5)):
            with self.subTest(values=values):
                (_, id, _, payload), = self.decode([mirai.encode(mirai.Kind.RUN, (1 << 64) - 1, packing.pack(*values))])
                self.assertEqual((id, packing.unpack(payload)), ((1 << 64) - 1, values))

    def test_results_carry_their_outcomes_apart_behind_the_head(self):
        outcomes = [b"+1", b"", b"-no"]
        payload = b"".join([mirai.RESULTS_HEAD.pack(7, 5, 3, 0.5), *mirai.join_apart(outcomes)])
        (kind, id, _, got), = self.decode([mirai.encode(mirai.Kind.RESULTS, 9, payload)])
        self.assertEqual((kind, id, mirai.RESULTS_HEAD.unpack_from(got)), (mirai.Kind.RESULTS, 9, (7, 5, 3, 0.5)))
        self.assertEqual(mirai.split_apart(got, 3, mirai.RESULTS_HEAD.size), outcomes)

    def test_the_flags_of_a_kind_are_distinct_bits(self):
        self.assertEqual(sorted((mirai.FRESH, mirai.REPLAY)), [1, 2])


# -- 5. Serializer


class Elsewhere:
    """A fresh interpreter that knows mirai and nothing of this file: calls what it is sent, sends the value back."""

    CODE = """
        import struct, sys
        import mirai
        answers, sys.stdout = sys.stdout.buffer, sys.stderr
        while True:
            size = sys.stdin.buffer.read(8)
            if not size:
                break
            data = sys.stdin.buffer.read(*struct.unpack("<Q", size))
            try:
                f, args, kwargs = mirai.loads(data)
                answer = mirai.dumps((True, f(*args, **kwargs)))
            except Exception as error:
                answer = mirai.dumps((False, f"{type(error).__name__}: {error}"))
            answers.write(struct.pack("<Q", len(answer)) + answer)
            answers.flush()
    """

    def __init__(self, *folders):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([HERE, *folders]), "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(self.CODE)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env=env)

    def __call__(self, f, *args, **kwargs):
        data = mirai.dumps((f, args, kwargs))
        self.process.stdin.write(struct.pack("<Q", len(data)) + data)
        self.process.stdin.flush()
        size, = struct.unpack("<Q", self.process.stdout.read(8))
        success, value = mirai.loads(self.process.stdout.read(size))
        if not success:
            raise RuntimeError(value)
        return value

    def close(self):
        self.process.stdin.close()
        self.process.wait(LONG)
        self.process.stdout.close()


def as_script(source):
    """The namespace that a script of this text would leave, its functions and classes being those of `__main__`."""
    scope = {"__name__": "__main__"}
    exec(textwrap.dedent(source), scope)
    return scope


SHELF = """
class Book:
    def __init__(self, title):
        self.title = title

def find(title):
    return Book(title)

def make_finder():
    return lambda title: Book(title)
"""


class TestSerializer(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = tempfile.mkdtemp()
        with open(os.path.join(cls.folder, "mirai_test_shelf.py"), "w") as file:
            file.write(SHELF)
        sys.path.insert(0, cls.folder)
        import mirai_test_shelf
        cls.shelf = mirai_test_shelf
        cls.there = Elsewhere(cls.folder)
        cls.call = staticmethod(cls.there)

    @classmethod
    def tearDownClass(cls):
        cls.there.close()
        sys.path.remove(cls.folder)
        del sys.modules["mirai_test_shelf"]
        shutil.rmtree(cls.folder)
        super().tearDownClass()

    # functions

    def test_a_lambda_runs_elsewhere(self):
        self.assertEqual(self.call(lambda x, *more, key=1: (x, more, key), 1, 2, 3, key=4), (1, (2, 3), 4))
        self.assertNotEqual(self.call(lambda: __import__("os").getpid()), os.getpid())

    def test_a_closure_takes_along_what_it_closes_over(self):
        n, words = 2, {"a": [1]}

        def outer():
            return lambda: (n, words)
        self.assertEqual(self.call(outer()), (2, {"a": [1]}))

    def test_a_closure_made_elsewhere_comes_home(self):
        def adder(n):
            return lambda x: x + n
        self.assertEqual(self.call(adder, 5)(1), 6)

    def test_functions_that_share_a_variable_share_it_elsewhere(self):
        def make():
            count = 0

            def increase():
                nonlocal count
                count += 1
            return increase, lambda: count

        def use(pair):
            pair[0]()
            pair[0]()
            return pair[1]()
        self.assertEqual(use(make()), 2)
        self.assertEqual(self.call(use, make()), 2)

    def test_a_local_function_can_call_itself(self):
        def factorial(n):
            return n * factorial(n - 1) if n else 1
        self.assertEqual(self.call(factorial, 5), 120)

    def test_local_functions_can_call_each_other(self):
        def even(n):
            return odd(n - 1) if n else True

        def odd(n):
            return even(n - 1) if n else False
        self.assertEqual([self.call(even, 10), self.call(odd, 10)], [True, False])

    def test_functions_of_a_script_can_call_themselves_and_each_other(self):
        script = as_script("""
            def factorial(n): return n * factorial(n - 1) if n else 1
            def even(n): return n == 0 or odd(n - 1)
            def odd(n): return n != 0 and even(n - 1)
        """)
        self.assertEqual([self.call(script["factorial"], 5), self.call(script["even"], 9)], [120, False])

    def test_a_variable_that_is_not_set_yet_is_unset_elsewhere(self):
        def make():
            def late():
                return value
            if not late:
                value = 1
            return late
        with self.assertRaisesRegex(RuntimeError, "^NameError: .*'?value'?"):
            self.call(make())

    def test_globals_are_as_they_are_at_the_call(self):
        script = as_script("""
            x = 1
            def f(): return x
        """)
        self.assertEqual(self.call(script["f"]), 1)
        script["x"] = 2
        self.assertEqual(self.call(script["f"]), 2)

    def test_functions_of_one_script_see_the_same_globals(self):
        script = as_script("""
            x = 1
            def read(): return x
            def change_and_read():
                global x
                x = 5
                return read()
        """)
        self.assertEqual(self.call(script["change_and_read"]), 5)

    def test_globals_of_inner_functions_and_comprehensions_go_along(self):
        script = as_script("""
            def double(x): return 2 * x
            def f(xs):
                def inner(x): return double(x)
                return [inner(x) for x in xs] + [double(x) for x in xs] + list(map(lambda x: double(x), xs))
        """)
        self.assertEqual(self.call(script["f"], [1, 2]), [2, 4] * 3)

    def test_globals_that_a_function_does_not_name_stay_at_home(self):
        script = as_script("""
            import threading
            lock = threading.Lock()
            class Lock: lock = lock
            def f(): return sorted(n for n in globals() if n == "lock")
        """)
        self.assertEqual(self.call(script["f"]), [])

    def test_a_missing_global_is_missed_where_it_is_missed_at_home(self):
        with self.assertRaisesRegex(RuntimeError, "NameError: name 'nowhere' is not defined"):
            self.call(as_script("def f(): return nowhere")["f"])

    def test_a_global_may_have_the_name_of_a_builtin(self):
        script = as_script("""
            def len(x): return -1
            def f(): return len([1]), max(1, 2)
        """)
        self.assertEqual(self.call(script["f"]), (-1, 2))

    def test_what_a_function_says_of_itself_goes_along(self):
        def f(a, b: int = 2, *, c=3, d: list = [4]) -> str:
            """What f does."""
            return a, b, c, d
        f.note = "kept"
        g = mirai.loads(mirai.dumps(f))
        self.assertIsNot(g, f)
        for name in ("__name__", "__qualname__", "__module__", "__doc__", "__defaults__", "__kwdefaults__",
                     "__annotations__", "note"):
            self.assertEqual(getattr(g, name), getattr(f, name), name)
        self.assertEqual(self.call(f, 1), (1, 2, 3, [4]))
        self.assertEqual(self.call(lambda f: (f.__doc__, f.note, f.__name__), f), ("What f does.", "kept", "f"))

    def test_generator_functions_and_coroutine_functions_arrive(self):
        def count(n):
            for i in range(n):
                yield i

        async def add(a, b):
            return a + b

        def run(count, add):
            import asyncio
            return list(count(3)), asyncio.run(add(1, 2))
        self.assertEqual(self.call(run, count, add), ([0, 1, 2], 3))

    def test_a_partial_arrives(self):
        def f(*args, **kwargs):
            return args, kwargs
        self.assertEqual(self.call(functools.partial(f, 1, a=2), 3, b=4), ((1, 3), {"a": 2, "b": 4}))

    def test_a_decorated_function_arrives_decorated(self):
        def twice(f):
            @functools.wraps(f)
            def wrapper(*args):
                return f(*args), f(*args)
            return wrapper

        @twice
        def f(x):
            """f's own text."""
            return x + 1
        self.assertEqual(self.call(f, 1), (2, 2))
        self.assertEqual(self.call(lambda f: (f.__name__, f.__doc__, f.__wrapped__(1)), f), ("f", "f's own text.", 2))

    def test_one_function_twice_is_one_function_elsewhere(self):
        def f():
            pass
        self.assertTrue(self.call(lambda a, b: a is b[0], f, [f]))

    # by reference

    def test_what_can_be_imported_goes_by_name(self):
        for thing in (os.path.join, json.dumps, len, dict, collections.OrderedDict, self.shelf.find, self.shelf.Book,
                      self.shelf.Book.__init__, types.SimpleNamespace):
            with self.subTest(repr(thing)):
                data = mirai.dumps(thing)
                self.assertIs(mirai.loads(data), thing)
                self.assertLess(len(data), 100)

    def test_a_changed_function_of_a_module_goes_by_value(self):
        """What a module's name gives is no longer it: the function that was meant is the one that runs."""
        original = self.shelf.find
        try:
            self.shelf.find = lambda title: None
            self.assertEqual(self.call(lambda f: f("x").title, original), "x")
        finally:
            self.shelf.find = original

    def test_modules_go_by_name(self):
        self.assertIs(mirai.loads(mirai.dumps(os.path)), os.path)
        self.assertEqual(self.call(lambda m: m.sqrt(4.0), math), 2.0)
        self.assertEqual(self.call(as_script("import math\ndef f(): return math.sqrt(9.0)")["f"]), 3.0)

    def test_an_instance_of_an_importable_class_comes_home_as_one(self):
        self.assertIs(type(self.call(self.shelf.find, "x")), self.shelf.Book)

    def test_a_lambda_of_a_module_gives_instances_of_that_modules_classes(self):
        there = Elsewhere(self.folder)      # one that has not met the module
        try:
            book = there(self.shelf.make_finder(), "x")
            self.assertEqual(book.title, "x")
            self.assertIs(type(book), self.shelf.Book)
            self.assertIs(type(there(self.shelf.find, "y")), self.shelf.Book)
        finally:
            there.close()

    # classes

    def test_methods_super_and_inheritance_arrive(self):
        class Base:
            def __init__(self, x):
                self.x = x

            def value(self):
                return self.x

        class Derived(Base):
            factor = 10

            def value(self):
                return super().value() * self.factor

        self.assertEqual(self.call(Derived(4).value), 40)
        self.assertEqual(self.call(lambda: (Derived(2).value(), isinstance(Derived(2), Base))), (20, True))
        self.assertEqual(self.call(lambda cls: [c.__name__ for c in cls.__mro__], Derived), ["Derived", "Base", "object"])

    def test_classes_of_a_script_arrive(self):
        script = as_script("""
            class Node:
                \"\"\"A node.\"\"\"
                made = []
                def __init__(self, *children): self.children = children
                def __eq__(self, other): return isinstance(other, Node) and self.children == other.children
                def depth(self): return 1 + max((c.depth() for c in self.children), default=0)
                def grow(self): return Node(self)
                class Inner:
                    kind = "inner"
            def tree(): return Node(Node(), Node(Node()))
        """)
        tree = self.call(script["tree"])
        self.assertIs(type(tree), script["Node"])
        self.assertEqual(tree, script["tree"]())
        self.assertEqual(self.call(lambda a, b, cls: (a == b, a == cls(), cls() == cls()), tree, tree, script["Node"]),
                         (True, False, True))
        self.assertEqual(self.call(script["Node"].depth, tree), 3)
        self.assertEqual(self.call(tree.grow).depth(), 4)
        self.assertEqual(self.call(lambda c: (c.__doc__, c.__module__, c.__qualname__, c.Inner.kind), script["Node"]),
                         ("A node.", "__main__", "Node", "inner"))

    def test_instances_keep_their_state(self):
        class Point:
            def __init__(self, x, y):
                self.x, self.y = x, y
        p = Point(1, [2])
        copy = self.call(lambda p: p, p)
        self.assertIsNot(copy, p)
        self.assertEqual((type(copy), vars(copy)), (Point, {"x": 1, "y": [2]}))

    def test_slots_arrive(self):
        class Pair:
            __slots__ = ("a", "b")

            def __init__(self, a, b):
                self.a, self.b = a, b

        class Triple(Pair):
            __slots__ = ("c",)

        def change(t):
            t.c = t.a + t.b
            try:
                t.d = 1
            except AttributeError:
                return t
        t = self.call(change, Triple(1, 2))
        self.assertEqual((type(t), t.a, t.b, t.c), (Triple, 1, 2, 3))

    def test_class_methods_static_methods_and_properties_arrive(self):
        class Circle:
            def __init__(self, r):
                self.r = r

            @classmethod
            def unit(cls):
                return cls(1)

            @staticmethod
            def double(x):
                return 2 * x

            @property
            def diameter(self):
                """Twice the radius."""
                return self.double(self.r)

            @diameter.setter
            def diameter(self, d):
                self.r = d / 2

        def use(cls):
            c = cls.unit()
            c.diameter *= 2
            return type(c) is cls, c.r, c.diameter, cls.double(4), cls.diameter.__doc__
        self.assertEqual(self.call(use, Circle), (True, 2, 4, 8, "Twice the radius."))

    def test_a_class_comes_home_as_the_very_same_class(self):
        class Sample:
            pass
        self.assertIs(self.call(lambda cls: cls, Sample), Sample)
        self.assertIs(type(self.call(lambda: Sample())), Sample)
        self.assertIs(type(self.call(lambda xs: xs, [Sample()])[0]), Sample)

    def test_what_a_class_became_at_home_is_not_undone_by_its_return(self):
        class Sample:
            level = 1
        data = mirai.dumps(Sample)
        Sample.level = 2
        self.assertIs(mirai.loads(data), Sample)
        self.assertEqual(Sample.level, 2)

    def test_a_class_sent_twice_is_one_class_elsewhere(self):
        class Sample:
            pass

        def keep(cls):
            import sys
            sys.kept_by_test = cls

        def same(x):
            import sys
            return sys.kept_by_test is type(x)
        self.call(keep, Sample)
        self.assertTrue(self.call(same, Sample()))

    def test_a_class_made_elsewhere_comes_home(self):
        def make():
            class Made:
                def hello(self):
                    return f"hello from {type(self).__name__}"
            return Made(), Made
        instance, cls = self.call(make)
        self.assertIs(type(instance), cls)
        self.assertEqual(cls().hello(), "hello from Made")
        self.assertIs(type(self.call(lambda x: x, instance)), cls)

    def test_classes_that_know_each_other_arrive(self):
        script = as_script("""
            class A:
                def other(self): return B()
            class B:
                def other(self): return A()
        """)
        self.assertIs(type(self.call(lambda a: a.other().other(), script["A"]())), script["A"])

    def test_a_metaclass_arrives(self):
        class Meta(type):
            def shout(cls):
                return cls.__name__.upper()

        class Quiet(metaclass=Meta):
            pass
        self.assertEqual(self.call(lambda: Quiet.shout()), "QUIET")

    def test_an_exception_class_arrives(self):
        class Broken(ValueError):
            def __init__(self, text, level):
                super().__init__(text, level)
                self.level = level
        error = self.call(lambda: Broken("no", 3))
        self.assertEqual((type(error), error.args, error.level), (Broken, ("no", 3), 3))

    def test_an_abstract_class_arrives(self):
        import abc

        class Shape(abc.ABC):
            @abc.abstractmethod
            def area(self):
                """Of the shape."""

        class Square(Shape):
            def area(self):
                return 4

        def use():
            try:
                Shape()
            except TypeError:
                return Square().area(), isinstance(Square(), Shape)
        self.assertEqual(self.call(use), (4, True))

    def test_a_dataclass_arrives(self):
        @dataclasses.dataclass
        class Point:
            x: int
            y: list = dataclasses.field(default_factory=list)
        point = self.call(lambda p: Point(p.x + 1, p.y + [3]), Point(1, [2]))
        self.assertEqual(point, Point(2, [2, 3]))
        self.assertEqual(self.call(lambda: (Point(1), Point(1).y)), (Point(1), []))
        to_dict = dataclasses.asdict
        self.assertEqual(self.call(lambda: to_dict(Point(1))), {"x": 1, "y": []})

    def test_an_enum_arrives(self):
        import enum

        class Colour(enum.Enum):
            RED = 1
            BLUE = 2

            def lower(self):
                return self.name.lower()
        self.assertIs(self.call(lambda c: c, Colour.RED), Colour.RED)
        self.assertEqual(self.call(lambda: ([c.lower() for c in Colour], Colour(2) is Colour.BLUE)), (["red", "blue"], True))

    def test_a_named_tuple_arrives(self):
        Pair = collections.namedtuple("Pair", "a b")
        pair = self.call(lambda p: p._replace(a=5), Pair(1, 2))
        self.assertEqual((type(pair), pair), (Pair, (5, 2)))

    # what can't be sent

    def explanation(self, f, *args, **kwargs):
        with self.assertRaisesRegex(TypeError, "can't send the task to a daemon") as caught:
            mirai.dump_task(f, args, kwargs, None)
        self.assertIsNotNone(caught.exception.__cause__)
        return str(caught.exception)

    def test_the_error_names_the_path_to_the_culprit(self):
        class Holder:
            def __init__(self):
                self.name, self.lock = "x", threading.Lock()
        lock = threading.Lock()
        for where, args, kwargs in [("args[0]", [lock], {}), ("args[1].lock", [1, Holder()], {}),
                                    ("args[0]['a'][2]", [{"b": 1, "a": [1, 2, lock]}], {}),
                                    ("kwargs['key'].lock", [], {"key": Holder()}), ("args[0][1]", [(1, lock)], {})]:
            with self.subTest(where):
                text = self.explanation(print, *args, **kwargs)
                self.assertIn(f"{where}: ", text)
                self.assertIn("lock", text.rpartition(f"{where}: ")[2])

    def test_the_error_names_what_a_function_takes_along(self):
        lock = threading.Lock()
        self.assertIn("f (closes over lock): ", self.explanation(lambda: lock))
        script = as_script("import threading\nlock = threading.Lock()\ndef f(): return lock\ndef g(): return f()")
        self.assertIn("f (reads global lock): ", self.explanation(script["f"]))
        self.assertIn("f (reads global f) (reads global lock): ", self.explanation(script["g"]))
        self.assertIn("args[0] (closes over lock): ", self.explanation(map, lambda: lock))

    def test_the_error_names_the_culprit_in_what_refers_to_itself(self):
        knot = [threading.Lock()]
        knot.insert(0, knot)
        self.assertIn("args[0][1]: ", self.explanation(print, knot))

    def test_an_objects_own_refusal_is_told(self):
        class Proud:
            def __reduce__(self):
                raise ValueError("I do not travel")
        self.assertIn("args[0][0]: I do not travel", self.explanation(print, [Proud()]))

    @unittest.skipIf(PYPY, "its compiler decides such times")
    def test_a_known_function_costs_less_than_ten_microseconds_over_pickle(self):
        class Helper:
            def get(self):
                return math.pi

        def f(x, y=1):
            return Helper().get() + x + y + len(textwrap.dedent(""))

        def cost(call):
            best = math.inf
            for _ in range(30):
                start = time.perf_counter()
                for _ in range(200):
                    call()
                best = min(best, time.perf_counter() - start)
            return best / 200
        plain = cost(lambda: pickle.dumps((len, (1,), {}), 5))
        known = cost(lambda: mirai.dump_task(f, (1,), {}, None))
        self.assertLess(known - plain, max(10e-6, 5 * plain))       # five times: on a busy machine all takes longer

    def test_a_function_and_its_classes_are_analysed_once(self):
        class Helper:
            def get(self):
                return math.pi

        def f(x):
            return Helper().get() + x
        seen = []
        analyse = mirai._names_of
        with replaced(mirai, "_names_of", lambda code: seen.append(code) or analyse(code)):
            tasks = [mirai.dump_task(f, (Helper(), i), {}, None) for i in range(50)]
            for i in range(50):
                mirai.dumps((f, Helper(), i))
        self.assertEqual(len(seen), 2)
        self.assertTrue(all(task.needs == tasks[0].needs for task in tasks))
        self.assertLess(len(b"".join(tasks[-1].parts)), 600)

    def test_wrappers_that_share_their_code_are_analysed_once_each(self):
        def wrap(f):
            kept = []

            @functools.wraps(f)
            def inner():
                return kept, f()
            return inner
        functions = [wrap(f) for f in (textwrap.dedent, json.loads, math.sqrt)]
        seen = []
        analyse = mirai._names_of
        with replaced(mirai, "_names_of", lambda code: seen.append(code) or analyse(code)):
            for _ in range(5):
                for f in functions:
                    mirai.dumps(f)
        self.assertEqual(len(seen), 3)

    def test_what_is_large_is_sent_ahead_by_its_hash(self):
        blob = os.urandom(mirai.LARGE)
        for large in (blob, bytearray(blob), [bytes(1000) for _ in range(100)]):
            task, again = (mirai.dump_task(lambda i: (large, i), (i,), {}, None) for i in range(2))
            self.assertLess(sum(map(len, task.parts)), 1000)
            self.assertEqual(set(task.needs), set(again.needs))
            if not isinstance(large, bytes):
                large[:1] = []
                self.assertNotEqual(set(mirai.dump_task(lambda i: (large, i), (2,), {}, None).needs), set(task.needs))

    def test_large_bytes_are_hashed_once_and_kept_no_longer_than_their_function(self):
        hashed = []
        hash_of = mirai.hash_of
        large = [os.urandom(mirai.LARGE) for _ in range(2)]

        def make():
            data = large[0]

            def f(new=None):
                nonlocal data
                data = data if new is None else new
                return len(data)
            return f
        f = make()
        with replaced(mirai, "hash_of", lambda *parts: hashed.append(sum(map(len, parts))) or hash_of(*parts)):
            for _ in range(3):
                mirai.dump_task(f, (), {}, None)
            f(large[1])
            for _ in range(3):
                mirai.dump_task(f, (), {}, None)
        self.assertEqual(hashed.count(mirai.LARGE), 2)
        self.assertEqual([value for value, _ in mirai._large[f].values()], [large[1]])
        del f
        gc.collect()
        self.assertFalse(any(value is large[1] for known in mirai._large.values() for value, _ in known.values()))

    def test_objects_that_do_not_want_to_be_looked_at_are_no_hurdle(self):
        class Meta(type):
            def __getattr__(cls, name):
                return 42

            def __eq__(cls, other):
                return True

            def __hash__(cls):
                return 7

        class Strange(metaclass=Meta):
            x = 1

        class Faceless:
            def __getattribute__(self, name):
                if name == "__class__":
                    raise RuntimeError("no class")
                return object.__getattribute__(self, name)

        self.assertEqual(self.call(lambda: Strange.x), 1)
        self.assertIs(mirai.loads(mirai.dumps(Strange)), Strange)
        self.assertEqual(len(self.call(lambda x: [x], Strange())), 1)
        self.assertIn("args[0]: no class", self.explanation(print, Faceless()))

    def test_what_is_known_of_a_class_ends_with_it(self):
        def make(n):
            class Short:
                x = n
                kept = []

                def get(self):
                    return Short.x, super().__init__

                @property
                def twin(self):
                    return other
            other = type("Other", (), {"back": Short})
            Short.forth = other
            return Short
        gc.collect()
        before = len(mirai._records), len(mirai._tracked), len(mirai._heads)
        for n in range(20):
            mirai.dumps(make(n)())
            mirai.dump_task(lambda cls=make(n): cls, (), {}, None)

        def gone():
            gc.collect()
            now = len(mirai._records), len(mirai._tracked), len(mirai._heads)
            return all(map(operator.le, now, before))
        wait_until(gone, LONG, "the end of all that is known of them")      # PyPy takes several collections

    def test_threads_that_load_the_same_new_class_at_once_have_one_whole_class(self):
        data = self.there(lambda: [__import__("mirai").dumps(type(f"New{i}", (), {
            f"m{k}": (lambda self, k=k: k) for k in range(40)})()) for i in range(20)])
        for each in data:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                barrier = threading.Barrier(8)

                def load(_):
                    barrier.wait(LONG)
                    it = mirai.loads(each)
                    return type(it), [getattr(it, f"m{k}")() for k in range(40)]
                found = list(pool.map(load, range(8)))
            self.assertEqual({cls for cls, _ in found}, {found[0][0]})
            self.assertEqual([values for _, values in found], [list(range(40))] * 8)

    def test_what_can_not_be_imported_elsewhere_is_said_by_name(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "mirai_test_only_here.py"), "w") as file:
                file.write("x = 1\n")
            sys.path.insert(0, folder)
            try:
                import mirai_test_only_here
            finally:
                sys.path.remove(folder)
            sys.path.insert(0, folder)      # while it is found here it goes by name
            try:
                with self.assertRaisesRegex(RuntimeError, "mirai_test_only_here"):
                    self.call(repr, mirai_test_only_here)
            finally:
                sys.path.remove(folder)
                del sys.modules["mirai_test_only_here"]

    def test_code_of_another_python_is_refused_in_words(self):
        tag = sys.implementation.cache_tag
        other = tag[::-1]
        data = mirai.dumps(lambda: 1)
        self.assertEqual(data.count(tag.encode()), 1)
        with self.assertRaisesRegex(pickle.UnpicklingError, f"compiled by {other} can't run on {tag}, nor be .* Use the same"):
            mirai.loads(data.replace(tag.encode(), other.encode()))

# Small programs, each as somebody would write it in a script or a cell: `subject` is what is sent, `check` says in the
# other process whether it still does what it should. `$` stands for `_` and the snippet's name, so that all of them
# can be one program. A first line `# needs 3.11` or `# not PyPy: reason` limits where a snippet runs.

FEATURES = {

    # functions

    "function_plain": r"""
def area$(width, height: int = 2, *more, scale=3, **rest) -> float:
    "The area."
    return width * height * scale, more, rest
area$.unit = ["m2"]
subject = area$

def check(it):
    assert it(5) == (30, (), {})
    assert it(1, 2, 3, scale=1, key=4) == (2, (3,), {"key": 4})
    assert (it.__name__, it.__qualname__, it.__module__) == ("area$", "area$", __name__)
    assert (it.__doc__, it.unit, it.__defaults__, it.__kwdefaults__) == ("The area.", ["m2"], (2,), {"scale": 3})
    assert it.__annotations__ == {"height": int, "return": float}
""",
    "function_signature": r"""
import inspect
def f$(a, b=1, /, c=2, *, d, e=None): return [a, b, c, d, e]
subject = f$

def check(it):
    assert it(0, d=3) == [0, 1, 2, 3, None]
    assert str(inspect.signature(it)) == "(a, b=1, /, c=2, *, d, e=None)"
    try:
        it(a=1, d=2)
    except TypeError:
        return
    raise AssertionError("a positional-only argument was taken by name")
""",
    "lambda_nested": r"""
subject = lambda x: (lambda y, k=10: (lambda z: x + y * k + z))

def check(it):
    assert it(1)(2)(3) == 24
    assert it(1)(2, k=0)(3) == 4
    assert it.__name__ == "<lambda>"
""",
    "function_default_is_a_function": r"""
def key$(x): return -x
def order$(xs, key=key$, make=lambda: []): return make() + sorted(xs, key=key)
subject = order$

def check(it):
    assert it([1, 3, 2]) == [3, 2, 1]
    assert it.__defaults__[0] is key$
""",
    "function_attributes_count_calls": r"""
def counted$(x):
    counted$.calls += 1
    return x
counted$.calls = 0
subject = counted$

def check(it):
    before = it.calls
    it(1), it(2)
    assert it.calls == before + 2
    assert it is counted$
""",
    "closure": r"""
def make$(n, words):
    def inner(x):
        return x * n, words
    return inner
subject = make$(3, {"a": [1]})

def check(it):
    assert it(2) == (6, {"a": [1]})
    assert it(0)[1] is it(0)[1]
    assert it.__qualname__ == "make$.<locals>.inner"
""",
    "closure_shares_a_cell": r"""
def counter$():
    count = 0
    def increase(by=1):
        nonlocal count
        count += by
    return increase, lambda: count
subject = counter$()

def check(it):
    increase, read = it
    assert read() == 0
    increase(), increase(5)
    assert read() == 6
""",
    "closure_empty_cell": r"""
def make$():
    if not make$:
        value = 1
    def read():
        return value
    def write(x):
        nonlocal value
        value = x
    return read, write
subject = make$()

def check(it):
    read, write = it
    try:
        read()
    except NameError:
        write(7)
        assert read() == 7
    else:
        raise AssertionError("a variable that was never set has a value")
""",
    "closure_recursion": r"""
def make$():
    def factorial(n):
        return n * factorial(n - 1) if n else 1
    return factorial
subject = make$()

def check(it):
    assert it(5) == 120
    assert it.__closure__[0].cell_contents is it
""",
    "closure_mutual_recursion": r"""
def make$():
    def even(n): return odd(n - 1) if n else True
    def odd(n): return even(n - 1) if n else False
    return {"even": even, "odd": odd}
subject = make$()

def check(it):
    assert it["even"](10) and it["odd"](7) and not it["odd"](10)
    assert it["even"].__closure__[0].cell_contents is it["odd"]
""",
    "closure_self_reference": r"""
def make$():
    def f(): return f
    f.me, f.box = f, [f]
    return f
subject = make$()

def check(it):
    assert it() is it and it.me is it and it.box[0] is it
""",
    "closure_over_a_class": r"""
def make$():
    class Box:
        def __init__(self, x): self.x = x
        def grow(self): return Box(self.x + 1)
    return lambda x: Box(x), Box
subject = make$()

def check(it):
    make, Box = it
    assert type(make(1)) is Box
    assert make(1).grow().grow().x == 3
    assert Box.__qualname__ == "make$.<locals>.Box"
""",
    "closure_of_three_levels": r"""
def outer$(a):
    def middle(b):
        def inner(c):
            nonlocal a
            a += c
            return a * b
        return inner
    return middle
subject = outer$(1)

def check(it):
    inner = it(10)
    assert [inner(1), inner(1), it(1)(1)] == [20, 30, 4]
""",
    "closure_over_itself_in_a_list": r"""
def make$():
    steps = []
    def walk(n): return [n] + (steps[n](n + 1) if n < 2 else [])
    steps += [walk, walk]
    return steps
subject = make$()

def check(it):
    assert it[0] is it[1] and it[0](0) == [0, 1, 2]
    assert it[0].__closure__[0].cell_contents is it
""",
    "globals_recursion": r"""
def fib$(n): return n if n < 2 else fib$(n - 1) + fib$(n - 2)
subject = fib$

def check(it):
    assert it(10) == 55
    assert it is fib$
""",
    "globals_mutual_recursion": r"""
def even$(n): return n == 0 or odd$(n - 1)
def odd$(n): return n != 0 and even$(n - 1)
subject = odd$

def check(it):
    assert it(9) and not it(8)
    assert even$(8)
""",
    "globals_shared": r"""
state$ = {"count": 0}
level$ = 1
def increase$():
    global level$
    level$ += 1
    state$["count"] += 1
def read$(): return level$, state$
subject = [increase$, read$, state$]

def check(it):
    increase, read, state = it
    level, before = read()[0], state["count"]
    increase(), increase()
    assert read()[0] == level + 2
    assert read()[1] is state and state["count"] == before + 2
""",
    "globals_named_as_builtins": r"""
saved$ = len
def f$():
    import builtins
    return max(1, 2), list$([3]), builtins.list([4])
def list$(x): return ("mine", x)
subject = f$

def check(it):
    assert it() == (2, ("mine", [3]), [4])
    assert saved$ is len
""",
    "globals_of_inner_code": r"""
def double$(x): return 2 * x
class Tool$:
    rows = [double$(i) for i in range(2)]
    def use(self): return [double$(i) for i in (lambda: [double$(1), 5])()]
def f$(xs):
    def inner(): return {double$(x): (lambda: double$(x))() for x in xs}
    return inner(), Tool$().use(), sum(double$(x) for x in xs)
subject = f$

def check(it):
    assert it([1, 2]) == ({2: 2, 4: 4}, [4, 10], 6)
    assert Tool$.rows == [0, 2]
""",
    "globals_made_and_deleted": r"""
def f$():
    global made$
    made$ = [1]
    made$.append(2)
    found = list(made$)
    del made$
    try:
        made$
    except NameError:
        return found
subject = f$

def check(it):
    assert it() == [1, 2] == it()
""",
    "function_of_exec": r"""
scope$ = {"start": 10}
exec("def f(x): return g(x) + start\ndef g(x):\n    global start\n    start += 1\n    return x", scope$)
subject = scope$["f"]

def check(it):
    start = it.__globals__["start"]
    assert it(1) == 1 + start + 1
    assert it(1) == 1 + start + 2
""",
    "functions_of_two_namespaces": r"""
def load$(x):
    scope = {"__name__": "plugin", "x": x}
    exec("def f(): return x, g()\ndef g(): return -x", scope)
    return scope["f"]
subject = [load$(1), load$(2)]

def check(it):
    assert [f() for f in it] == [(1, -1), (2, -2)]
""",
    "function_under_anothers_name": r"""
import json
def impostor$(x): return ("mine", x)
impostor$.__module__, impostor$.__name__, impostor$.__qualname__ = "json", "dumps", "dumps"
def lost$(x): return ("lost", x)
lost$.__module__ = None
subject = impostor$, lost$, json.dumps

def check(it):
    impostor, lost, real = it
    assert impostor([1]) == ("mine", [1]) and lost(2) == ("lost", 2) and real([1]) == "[1]"
    assert (impostor.__module__, impostor.__name__, lost.__module__) == ("json", "dumps", None)
""",
    "functions_of_one_factory": r"""
subject = [lambda x, i=i: x + i for i in range(3)] + [(lambda n: lambda x: x * n)(n) for n in (5, 6)]

def check(it):
    assert [f(10) for f in it] == [10, 11, 12, 50, 60]
    assert it[3] is not it[4]
""",
    "generator_function": r"""
def count$(n):
    total = 0
    while total < n:
        got = yield total
        total += 1 if got is None else got
    return "end"
def relay$(n):
    result = yield from count$(n)
    yield result
subject = relay$

def check(it):
    assert list(it(3)) == [0, 1, 2, "end"]
    running = it(10)
    assert [next(running), running.send(4), running.send(6)] == [0, 4, "end"]
""",
    "async_function": r"""
import asyncio
async def add$(a, b):
    await asyncio.sleep(0)
    return a + b
async def all$(n): return await asyncio.gather(*[add$(i, i) for i in range(n)])
subject = all$

def check(it):
    assert asyncio.run(it(3)) == [0, 2, 4]
    assert asyncio.iscoroutinefunction(it)
""",
    "async_generator_function": r"""
async def count$(n):
    for i in range(n):
        yield i * i
async def gather$(n): return [x async for x in count$(n) if x]
subject = gather$

def check(it):
    try:
        it(4).send(None)
    except StopIteration as end:
        assert end.value == [1, 4, 9]
    else:
        raise AssertionError("it waits for something")
""",
    "awaitable_class": r"""
class Ready$:
    def __init__(self, x): self.x = x
    def __await__(self):
        yield "pause"
        return self.x
async def use$(x): return await Ready$(x) + 1
subject = use$

def check(it):
    running = it(4)
    assert running.send(None) == "pause"
    try:
        running.send(None)
    except StopIteration as end:
        assert end.value == 5
    else:
        raise AssertionError("it did not end")
""",
    "builtin_callables": r"""
subject = [len, "-".join, str.upper, (5).__add__, int.__add__, dict.fromkeys, [3, 1].index, object.__new__, max]

def check(it):
    size, join, upper, five, add, fromkeys, index, new, biggest = it
    assert (size("ab"), join("ab"), upper("a"), five(1), add(1, 2)) == (2, "a-b", "A", 6, 3)
    assert fromkeys("a", 1) == {"a": 1} and index(1) == 1 and type(new(object)) is object and biggest is max
""",
    "operators": r"""
import operator
subject = operator.itemgetter(1), operator.attrgetter("real"), operator.methodcaller("upper"), operator.add

def check(it):
    second, real, upper, add = it
    assert (second("ab"), real(3 + 1j), upper("a"), add(1, 2)) == ("b", 3.0, "A", 3)
""",

    # functools, contextlib, decorators

    "decorated": r"""
import functools
def twice$(f):
    @functools.wraps(f)
    def wrapper(*args): return f(*args), f(*args)
    return wrapper
@twice$
@twice$
def f$(x: int):
    "Its own text."
    return x + 1
subject = f$

def check(it):
    assert it(1) == ((2, 2), (2, 2))
    assert it.__wrapped__(1) == (2, 2) and it.__wrapped__.__wrapped__(1) == 2
    assert (it.__name__, it.__doc__, it.__annotations__) == ("f$", "Its own text.", {"x": int})
""",
    "decorated_by_a_class": r"""
import functools
class Memo$:
    def __init__(self, f):
        functools.update_wrapper(self, f)
        self.f, self.seen = f, {}
    def __call__(self, n):
        if n not in self.seen:
            self.seen[n] = self.f(n)
        return self.seen[n]
@Memo$
def fib$(n):
    "Of Fibonacci."
    return n if n < 2 else fib$(n - 1) + fib$(n - 2)
subject = fib$

def check(it):
    assert it(30) == 832040
    assert len(it.seen) == 31 and it.__doc__ == "Of Fibonacci." and it.__wrapped__ is it.f
""",
    "decorator_with_arguments": r"""
import functools
def tag$(*tags, **more):
    def decorate(f):
        f.tags = getattr(f, "tags", ()) + tags
        @functools.wraps(f)
        def wrapper(*args): return f(*args), wrapper.tags, more
        return wrapper
    return decorate
@tag$("a", k=1)
@tag$("b")
def f$(x): return x
subject = f$

def check(it):
    assert it(1) == ((1, ("b", "a"), {}), ("b", "a"), {"k": 1})
""",
    "partial": r"""
import functools
def f$(*args, **kwargs): return args, kwargs
inner$ = functools.partial(f$, 1, a=2)
inner$.note = ["kept"]
subject = functools.partial(inner$, 3, b=4), inner$

def check(it):
    assert it[0](5, a=6) == ((1, 3, 5), {"a": 6, "b": 4})
    assert it[1]() == ((1,), {"a": 2}) and it[1].note == ["kept"] and it[1].func is f$
""",
    "partial_in_a_cycle": r"""
import functools
box$ = []
box$.append(functools.partial(lambda box, n: (len(box), n), box$))
subject = box$

def check(it):
    assert it[0](5) == (1, 5)
    assert it[0].args[0] is it
""",
    "lru_cache": r"""
import functools
calls$ = []
@functools.lru_cache(maxsize=2, typed=True)
def square$(x):
    "Its square."
    calls$.append(x)
    return x * x
subject = square$, calls$

def check(it):
    square, calls = it
    square.cache_clear(), calls.clear()
    assert [square(2), square(2), square(2.0)] == [4, 4, 4.0]
    assert calls == [2, 2.0]
    assert square.cache_parameters() == {"maxsize": 2, "typed": True}
    assert square.cache_info().hits == 1 and square.__doc__ == "Its square." and square.__wrapped__(3) == 9
""",
    "cache_recursion": r"""
import functools
@functools.cache
def fib$(n): return n if n < 2 else fib$(n - 1) + fib$(n - 2)
def make$():
    @functools.lru_cache
    def fact(n): return n * fact(n - 1) if n else 1
    return fact
subject = fib$, make$()

def check(it):
    fib, fact = it
    assert fib(60) == 1548008755920 and fact(20) == 2432902008176640000
    assert fib.cache_info().currsize == 61 and fact.cache_parameters()["maxsize"] == 128
""",
    "lru_cache_method": r"""
import functools
class Sum$:
    def __init__(self, xs): self.xs, self.added = xs, 0
    @functools.lru_cache(maxsize=None)
    def total(self, k):
        self.added += 1
        return sum(self.xs) * k
subject = Sum$([1, 2])

def check(it):
    assert [it.total(2), it.total(2), it.total(3)] == [6, 6, 9]
    assert it.added == 2 and type(it).total.cache_info().hits >= 1
""",
    "singledispatch": r"""
import functools
class Base$: pass
class Derived$(Base$): pass
@functools.singledispatch
def show$(x): return "something"
@show$.register
def _(x: int): return f"int {x}"
@show$.register(list)
def _(x): return [show$(i) for i in x]
@show$.register(Base$)
def _(x): return "base"
subject = show$, Derived$

def check(it):
    show, Derived = it
    assert show([1, "a", Derived()]) == ["int 1", "something", "base"]
    assert show.dispatch(bool)(True) == "int True"
    show.register(str, lambda x: "text")
    assert show("a") == "text" and set(show.registry) == {object, int, list, Base$, str}
""",
    "singledispatchmethod": r"""
import functools
class Writer$:
    end = "."
    @functools.singledispatchmethod
    def write(self, x): return "something" + self.end
    @write.register
    def _(self, x: int): return f"int {x}" + self.end
    @write.register(list)
    def _(self, x): return [self.write(i) for i in x]
subject = Writer$()

def check(it):
    assert it.write(["a", 2]) == ["something.", "int 2."]
    it.end = "!"
    assert it.write(True) == "int True!"
""",
    "cached_property": r"""
import functools
class Data$:
    made = 0
    @functools.cached_property
    def table(self):
        "What is in it."
        self.made += 1
        return [self.made]
subject = Data$

def check(it):
    data = it()
    assert data.table is data.table and data.made == 1
    del data.table
    assert data.table == [2] and it.table.__doc__ == "What is in it."
""",
    "cached_property_computed": r"""
import functools
class Data$:
    made = 0
    @functools.cached_property
    def table(self):
        self.made += 1
        return [self.made]
subject = Data$()
subject.table.append("kept")

def check(it):
    assert it.table == [1, "kept"] and it.made == 1
    del it.table
    assert it.table == [2]
""",
    "partialmethod": r"""
import functools
class Cell$:
    alive = False
    def set_state(self, state, *, loud=False):
        self.alive = state
        return (self, loud)
    wake = functools.partialmethod(set_state, True, loud=True)
    kill = functools.partialmethod(set_state, False)
subject = Cell$()

def check(it):
    assert it.wake() == (it, True) and it.alive is True
    assert it.kill() == (it, False) and it.alive is False
""",
    "total_ordering": r"""
import functools
@functools.total_ordering
class Version$:
    def __init__(self, *parts): self.parts = parts
    def __eq__(self, other): return self.parts == other.parts
    def __lt__(self, other): return self.parts < other.parts
    def __hash__(self): return hash(self.parts)
subject = [Version$(2, 0), Version$(1, 9)]

def check(it):
    assert it[0] > it[1] and it[0] >= it[1] and not it[0] <= it[1] and it[0] != it[1]
    assert sorted(it)[0] is it[1] and max(it) is it[0] and len({*it, Version$(2, 0)}) == 2
""",
    "sorting_with_cmp_to_key": r"""
import functools
def compare$(a, b): return (a > b) - (a < b)
by$ = functools.cmp_to_key(lambda a, b: -compare$(a, b))
def order$(xs): return sorted(xs, key=functools.cmp_to_key(compare$)), functools.reduce(compare$, xs)
subject = order$

def check(it):
    assert it([3, 1, 2]) == ([1, 2, 3], -1)
""",
    "contextmanager": r"""
import contextlib
log$ = []
@contextlib.contextmanager
def opened$(name):
    "Opens it."
    log$.append("open " + name)
    try:
        yield name.upper()
    except KeyError:
        log$.append("caught")
    finally:
        log$.append("close " + name)
subject = opened$, log$

def check(it):
    opened, log = it
    log.clear()
    with opened("a") as name:
        assert name == "A"
        raise KeyError
    assert log == ["open a", "caught", "close a"] and opened.__doc__ == "Opens it."
    @opened("b")
    def f(): return len(log)
    assert (f(), f()) == (4, 6)
""",
    "asynccontextmanager": r"""
import contextlib
@contextlib.asynccontextmanager
async def opened$(log):
    log.append("open")
    yield len(log)
    log.append("close")
async def use$(log):
    async with opened$(log) as n:
        return n
subject = use$

def check(it):
    log = []
    try:
        it(log).send(None)
    except StopIteration as end:
        assert (end.value, log) == (1, ["open", "close"])
    else:
        raise AssertionError("it waits for something")
""",
    "context_managing_class": r"""
import contextlib
class Suppress$(contextlib.ContextDecorator):
    def __init__(self, *kinds): self.kinds, self.seen = kinds, []
    def __enter__(self): return self
    def __exit__(self, kind, error, trace):
        self.seen.append(kind)
        return kind is not None and issubclass(kind, self.kinds)
subject = Suppress$(ValueError)

def check(it):
    with it as same:
        int("x")
    assert same is it and it.seen == [ValueError]
    assert it(lambda: int("y"))() is None and it.seen == [ValueError] * 2
""",

    # methods

    "bound_method": r"""
class Account$:
    def __init__(self): self.total = 0
    def add(self, x):
        self.total += x
        return self.total
subject = [Account$().add]
subject.append(subject[0].__self__)

def check(it):
    add, account = it
    total = account.total
    assert (add(1), add(2)) == (total + 1, total + 3)
    assert add.__self__ is account and account.total == total + 3
    assert add == account.add and add.__func__ is Account$.add
""",
    "bound_method_in_its_own_object": r"""
class Node$:
    def __init__(self, x):
        self.x, self.act = x, self.step
        self.table = {"step": self.step}
    def step(self): return self.x + 1
subject = Node$(1)

def check(it):
    it.x = 5
    assert it.act() == 6 and it.table["step"]() == 6 and it.act.__self__ is it
""",
    "class_methods_and_static_methods": r"""
class Shape$:
    sides = 0
    @classmethod
    def make(cls, *names): return cls, cls.sides, names
    @staticmethod
    def double(x): return 2 * x
class Square$(Shape$):
    sides = 4
subject = Square$.make, Shape$.make, Square$.double, Square$

def check(it):
    make, make_base, double, Square = it
    assert make("a") == (Square, 4, ("a",)) and make_base()[:2] == (Shape$, 0) and double(4) == 8
    assert Square.make(1)[0] is Square and Square().double(1) == 2 and make.__self__ is Square
""",
    "parents_method_bound_to_a_child": r"""
class Parent$:
    def hello(self): return "parent of " + self.name
    @classmethod
    def kind(cls): return "parent's " + cls.__name__
class Child$(Parent$):
    name = "child"
    def hello(self): return "child"
    @classmethod
    def kind(cls): return "child's"
    def parts(self): return super().hello, super().kind
subject = [Parent$.hello.__get__(Child$()), *Child$().parts(), Child$().hello, super(Child$, Child$).kind]

def check(it):
    assert [f() for f in it] == ["parent of child", "parent of child", "parent's Child$", "child", "parent's Child$"]
    assert type(it[0].__self__) is Child$ and it[2].__self__ is Child$
""",
    "function_bound_to_an_instance": r"""
import types
class Thing$:
    x = 5
def get$(self, k): return self.x * k
thing$ = Thing$()
thing$.get = types.MethodType(get$, thing$)
thing$.count = types.MethodType(lambda self: len(vars(self)), thing$)
subject = types.MethodType(get$, [].__class__), thing$

def check(it):
    free, thing = it
    thing.x = 7
    assert thing.get(2) == 14 and thing.count() == 3
    assert free.__self__ is list and free.__func__ is get$
""",
    "private_method_bound": r"""
class Vault$:
    def __init__(self): self.__code = 7
    def __secret(self): return self.__code
    def key(self): return self.__secret
subject = Vault$().key()

def check(it):
    assert it() == 7 and it.__name__ == "__secret"
    assert it.__self__.key()() == 7
""",
    "method_of_a_builtin_subclass": r"""
class Stack$(list):
    limit = 2
    def append(self, x):
        if len(self) < self.limit:
            super().append(x)
        return len(self)
subject = Stack$([0]).append

def check(it):
    assert (it(1), it(2)) == (2, 2) and it.__self__ == [0, 1] and type(it.__self__) is Stack$
""",

    # classes

    "class_plain": r"""
class Point$:
    "A point."
    origin = (0, 0)
    made = []
    def __init__(self, x, y): self.x, self.y = x, y
    def __eq__(self, other): return isinstance(other, Point$) and (self.x, self.y) == (other.x, other.y)
    def __hash__(self): return hash((self.x, self.y))
    def __add__(self, other): return Point$(self.x + other.x, self.y + other.y)
    def __repr__(self): return f"{type(self).__name__}({self.x}, {self.y})"
subject = Point$(1, [2])

def check(it):
    assert type(it) is Point$ and vars(it) == {"x": 1, "y": [2]}
    assert it == Point$(1, [2]) != Point$(2, [2]) and repr(it + it) == "Point$(2, [2, 2])"
    assert len({Point$(1, 2), Point$(1, 2)}) == 1
    assert (Point$.__doc__, Point$.__qualname__, Point$.__module__) == ("A point.", "Point$", __name__)
""",
    "class_nested": r"""
class Outer$:
    class Inner:
        class Core:
            kind = "core"
            def up(self): return Outer$.Inner
        def core(self): return self.Core()
    inner = Inner()
subject = Outer$

def check(it):
    assert it.Inner.Core.__qualname__ == "Outer$.Inner.Core"
    assert type(it.inner) is it.Inner and type(it.inner.core()) is it.Inner.Core
    assert it.inner.core().up() is it.Inner and it.Inner.Core.kind == "core"
""",
    "class_local_with_closure": r"""
def make$(start):
    class Base:
        def total(self): return start
    class Derived(Base):
        step = start + 1
        def total(self): return super().total() * 10 + self.step
    return Derived
subject = make$(4)()

def check(it):
    assert it.total() == 45
    assert [c.__name__ for c in type(it).__mro__] == ["Derived", "Base", "object"]
""",
    "classes_of_one_factory": r"""
def make$(n):
    class Made:
        size = n
        def get(self): return n
    return Made
subject = [make$(i) for i in range(3)]
subject += [subject[1](), make$]

def check(it):
    *classes, instance, make = it
    assert len(set(map(id, classes))) == 3 and [c.size for c in classes] == [c().get() for c in classes] == [0, 1, 2]
    assert type(instance) is classes[1] and not isinstance(instance, classes[0])
    assert make(7)().get() == 7
""",
    "class_made_by_type": r"""
import types
Made$ = type("Made$", (dict,), {"__init__": lambda self, **k: self.update(k), "n": 5, "get_n": lambda self: self.n})
Other$ = types.new_class("Other$", (Made$,), {}, lambda scope: scope.update(n=6))
subject = Other$(a=1)

def check(it):
    assert it == {"a": 1} and it.get_n() == 6 and Made$(b=2).get_n() == 5
    assert type(it).__name__ == "Other$" and isinstance(it, Made$)
""",
    "class_patched": r"""
class Tool$:
    def old(self): return "old"
    def gone(self): return "gone"
def outside$(self): return "new " + type(self).__name__
Tool$.old = outside$
Tool$.added = lambda self: self.old().upper()
Tool$.helper = staticmethod(lambda: 3)
Tool$.size = property(lambda self: 9)
del Tool$.gone
subject = Tool$()

def check(it):
    assert it.old() == "new Tool$" and it.added() == "NEW TOOL$".replace("TOOL$", "Tool$".upper())
    assert it.helper() == 3 and it.size == 9 and not hasattr(it, "gone") and Tool$.old is outside$
""",
    "class_refers_to_itself": r"""
class Tree$:
    table = {}
    def __init__(self, *kids): self.kids = kids
Tree$.empty, Tree$.cls, Tree$.table["tree"] = Tree$(), Tree$, [Tree$]
subject = Tree$

def check(it):
    assert it.cls is it and it.table["tree"][0] is it and type(it.empty) is it and it.cls.empty.kids == ()
    assert it is Tree$
""",
    "classes_refer_to_each_other": r"""
class Hen$:
    def lay(self): return Egg$()
class Egg$:
    parent = Hen$
    def hatch(self): return self.parent()
Hen$.child = Egg$
Hen$.pair = Hen$(), Egg$()
subject = Egg$()

def check(it):
    hen = it.hatch()
    assert type(hen.lay()) is type(it) is hen.child and hen.child.parent is type(hen)
    assert [type(x) for x in Hen$.pair] == [Hen$, Egg$]
""",
    "super_and_diamond": r"""
class A$:
    def __init__(self): self.path = ["A"]
    def who(self): return "a"
class B$(A$):
    def __init__(self):
        super().__init__()
        self.path.append("B")
    def who(self): return "b" + super().who()
class C$(A$):
    def __init__(self):
        super().__init__()
        self.path.append("C")
    def who(self): return "c" + super(C$, self).who()
class D$(B$, C$):
    def who(self): return "d" + super().who() + __class__.__name__[0]
    @classmethod
    def make(cls): return super().__new__(cls), cls()
subject = D$()

def check(it):
    assert it.path == D$().path == ["A", "C", "B"] and it.who() == "dbcaD"
    assert [c.__name__[0] for c in type(it).__mro__] == ["D", "B", "C", "A", "o"]
    assert [type(x) for x in D$.make()] == [D$, D$]
""",
    "init_subclass": r"""
class Plugin$:
    known = []
    def __init_subclass__(cls, /, tag="none", **more):
        super().__init_subclass__(**more)
        Plugin$.known.append(cls)
        cls.tag = tag
class First$(Plugin$, tag="first"): pass
class Second$(First$): pass
subject = [Plugin$, First$, Second$]

def check(it):
    Plugin, First, Second = it
    assert Plugin.known[:2] == [First, Second] and (First.tag, Second.tag) == ("first", "none")
    assert len(Plugin.known) == 2, "subclasses were announced again"
    class Third(Plugin, tag="third"): pass
    assert Plugin.known.pop() is Third and Third.tag == "third"
""",
    "init_subclass_that_needs_a_keyword": r"""
class Table$:
    def __init_subclass__(cls, *, name, **more):
        super().__init_subclass__(**more)
        cls.name = name.upper()
class Users$(Table$, name="users"): pass
subject = Users$

def check(it):
    assert it.name == "USERS" and it.__mro__[1] is Table$
    try:
        type("Bad", (it,), {})
    except TypeError:
        class Good(it, name="good"): pass
        assert Good.name == "GOOD"
    else:
        raise AssertionError("the keyword is no longer needed")
""",
    "set_name": r"""
class Field$:
    named = 0
    def __init__(self, check): self.check = check
    def __set_name__(self, owner, name):
        self.owner, self.name, self.named = owner, "_" + name, self.named + 1
    def __get__(self, instance, owner): return self if instance is None else getattr(instance, self.name)
    def __set__(self, instance, value):
        if not self.check(value):
            raise ValueError(self.name)
        setattr(instance, self.name, value)
class Person$:
    age = Field$(lambda x: x >= 0)
    name = Field$(str.isalpha)
    def __init__(self, name, age): self.name, self.age = name, age
subject = Person$("Ann", 5)

def check(it):
    assert (it.name, it.age, vars(it)) == ("Ann", 5, {"_name": "Ann", "_age": 5})
    it.age = 6
    assert it.age == 6 and type(it).age.owner is type(it) and type(it).age.named == 1
    try:
        it.age = -1
    except ValueError as error:
        assert str(error) == "_age"
    else:
        raise AssertionError("the descriptor does not check")
""",
    "properties": r"""
class Circle$:
    def __init__(self, r): self._r = r
    @property
    def r(self):
        "The radius."
        return self._r
    @r.setter
    def r(self, r): self._r = r
    @r.deleter
    def r(self): self._r = 0
    area = property(lambda self: 3 * self._r ** 2, doc="About.")
class Ring$(Circle$):
    @property
    def r(self): return -super().r
    @Circle$.area.getter
    def area(self): return 1
subject = [Circle$(2), Ring$(3)]

def check(it):
    circle, ring = it
    circle.r = 4
    assert (circle.r, circle.area, ring.r, ring.area) == (4, 48, -3, 1)
    del circle.r
    assert circle.r == 0 and Circle$.r.__doc__ == "The radius." and Circle$.area.__doc__ == "About."
    try:
        ring.r = 1
    except AttributeError:
        return
    raise AssertionError("a property without setter was set")
""",
    "descriptor_objects": r"""
class Upper$:
    def __init__(self, name): self.name = name
    def __get__(self, instance, owner): return self.name.upper(), instance is None, owner.__name__
class Host$:
    x = Upper$("x")
subject = vars(Host$)["x"], Host$, staticmethod(len), classmethod(lambda cls: cls), property(lambda self: 5)

def check(it):
    descriptor, Host, static, of_class, prop = it
    assert Host.x == ("X", True, "Host$") and Host().x == ("X", False, "Host$") and vars(Host)["x"] is descriptor
    Made = type("Made", (), {"size": static, "kind": of_class, "five": prop})
    assert Made.size("ab") == 2 and Made().kind() is Made and Made().five == 5
""",
    "class_getitem": r"""
class Vector$:
    def __class_getitem__(cls, n): return type(f"{cls.__name__}{n}", (cls,), {"n": n})
    def __len__(self): return self.n
Two$ = Vector$[2]
subject = Two$(), Vector$

def check(it):
    two, Vector = it
    assert len(two) == 2 and isinstance(two, Vector) and len(Vector[5]()) == 5
""",
    "getattr_and_setattr": r"""
class Proxy$:
    def __init__(self, target): self.__dict__["target"] = target
    def __getattr__(self, name):
        if name == "target":        # asked for before there is one
            raise AttributeError(name)
        return getattr(self.target, name)
    def __setattr__(self, name, value): self.target[name] = value
    def __getitem__(self, key): return self.target[key]
subject = Proxy$({"a": 1})

def check(it):
    it.b = 2
    assert it.target == {"a": 1, "b": 2} and sorted(it.keys()) == ["a", "b"] and it["a"] == 1
    assert list(vars(it)) == ["target"]
""",
    "metaclass": r"""
class Meta$(type):
    def __new__(meta, name, bases, scope):
        cls = super().__new__(meta, name, bases, scope)
        cls.made = getattr(cls, "made", 0) + 1
        return cls
    def __call__(cls, *args):
        made = super().__call__(*args)
        made.stamped = True
        return made
    def __len__(cls): return len(cls.__name__)
    @property
    def loud(cls): return cls.__name__.upper()
class Quiet$(metaclass=Meta$):
    def __init__(self, x): self.x = x
class Still$(Quiet$): pass
subject = Still$(3)

def check(it):
    assert type(type(it)) is Meta$ and len(Quiet$) == len("Quiet$") and Quiet$.loud == "Quiet$".upper()
    assert it.stamped and Still$(1).stamped and (Quiet$.made, Still$.made) == (1, 2)
    assert type(Meta$("New", (Still$,), {})) is Meta$
""",
    "metaclass_keywords": r"""
class Meta$(type):
    @classmethod
    def __prepare__(meta, name, bases, *, table, **more): return {"prepared": table}
    def __new__(meta, name, bases, scope, *, table, **more):
        cls = super().__new__(meta, name, bases, dict(scope), **more)
        cls.table = table
        return cls
    def __init__(cls, name, bases, scope, *, table, **more): super().__init__(name, bases, scope)
class Row$(metaclass=Meta$, table="rows"):
    def where(self): return self.table + "!"
class SubRow$(Row$, table="subrows"): pass
subject = SubRow$()

def check(it):
    assert (it.where(), it.prepared, Row$.table) == ("subrows!", "subrows", "rows") and type(Row$) is Meta$
    class New(type(it), table="new"): pass
    assert New().where() == "new!"
""",
    "metaclass_that_forbids_changes": r"""
class Frozen$(type):
    def __setattr__(cls, name, value): raise AttributeError("no: " + name)
    def __delattr__(cls, name): raise AttributeError("no: " + name)
class Constants$(metaclass=Frozen$):
    pi = 3
    def both(self): return self.pi, Constants$.pi
subject = Constants$

def check(it):
    assert it().both() == (3, 3)
    try:
        it.pi = 4
    except AttributeError as error:
        assert str(error) == "no: pi"
    else:
        raise AssertionError("the class was changed")
""",
    "metaclass_that_counts_its_classes": r"""
class Registry$(type):
    classes = {}
    def __init__(cls, name, bases, scope):
        super().__init__(name, bases, scope)
        assert name not in Registry$.classes, "made twice"
        Registry$.classes[name] = cls
    def __instancecheck__(cls, x): return hasattr(x, "walks")
    def __contains__(cls, x): return x in cls.parts
class Duck$(metaclass=Registry$): parts = ["bill"]
class Drake$(Duck$): parts = ["tail"]
subject = Drake$()
subject.walks = True

def check(it):
    assert Registry$.classes == {"Duck$": Duck$, "Drake$": Drake$} and type(it) is Drake$
    assert isinstance(it, Duck$) and not isinstance(3, Duck$) and "bill" in Duck$ and "bill" not in Drake$
""",
    "slots": r"""
class Pair$:
    "Two."
    __slots__ = ("a", "b")
    def __init__(self, a): self.a = a
class Triple$(Pair$):
    __slots__ = ("c", "__hidden")
    def hide(self, x):
        self.__hidden = x
        return self
    def seek(self): return self.__hidden
class Loose$(Pair$): pass
subject = [Triple$(1).hide([5]), Loose$(2)]
subject[0].c, subject[1].extra = subject[0], "more"

def check(it):
    triple, loose = it
    assert (triple.a, triple.seek()) == (1, [5]) and triple.c is triple and not hasattr(triple, "b")
    assert (loose.a, loose.extra, vars(loose)) == (2, "more", {"extra": "more"})
    try:
        triple.d = 1
    except AttributeError:
        assert Pair$(1).__slots__ == ("a", "b") and not hasattr(triple, "__dict__") and Pair$.__doc__ == "Two."
    else:
        raise AssertionError("it takes any attribute")
""",
    "slots_in_other_forms": r"""
class One$: __slots__ = "name"
class Documented$:
    __slots__ = {"x": "Its x.", "y": None}
class Weak$:
    __slots__ = ["x", "__weakref__", "__dict__"]
subject = [One$(), Documented$(), Weak$()]
subject[0].name, subject[1].x, subject[2].x, subject[2].free = "n", 1, 2, 3

def check(it):
    import weakref
    one, documented, weak = it
    assert (one.name, documented.x, weak.x, vars(weak)) == ("n", 1, 2, {"free": 3})
    assert weakref.ref(weak)() is weak and Documented$.__slots__ == {"x": "Its x.", "y": None}
    for thing in (one, documented):
        try:
            thing.z = 1
        except AttributeError:
            continue
        raise AssertionError("it takes any attribute")
""",
    "pickling_methods": r"""
import copyreg
class Stateful$:
    def __init__(self): self.n, self.cache = 1, lambda: "no"
    def __getstate__(self): return {"n": self.n}
    def __setstate__(self, state): self.n, self.cache = state["n"] + 100, "rebuilt"
class Reduced$:
    def __init__(self, *parts): self.parts = parts
    def __reduce__(self): return Reduced$.join, (self.parts, "by reduce")
    @classmethod
    def join(cls, parts, how): return cls(*parts, how)
class New$(tuple):
    def __new__(cls, a, *, b): return super().__new__(cls, (a, b))
    def __getnewargs_ex__(self): return self[:1], {"b": self[1]}
class Registered$:
    def __init__(self, x): self.x = x
copyreg.pickle(Registered$, lambda r: (Registered$, (r.x + 1,)))
subject = [Stateful$(), Reduced$(1), New$(1, b=2), Registered$(5)]

def check(it):
    stateful, reduced, new, registered = it
    if stateful.cache != "rebuilt":     # before it was sent
        return
    assert stateful.n == 101 and reduced.parts == (1, "by reduce") and new == (1, 2) and type(new) is New$
    assert registered.x == 6
""",
    "builtin_subclasses": r"""
class Words$(list):
    sep = ","
    def join(self): return self.sep.join(self)
class Table$(dict):
    def __missing__(self, key): return key * 2
class Number$(int):
    def __add__(self, other): return Number$(int(self) - other)
class Text$(str):
    def shout(self): return Text$(self.upper())
class Row$(tuple):
    def __new__(cls, *xs): return super().__new__(cls, xs)
    def __getnewargs__(self): return tuple(self)
class Bag$(set):
    def total(self): return sum(self)
words$ = Words$(["a", "b"])
words$.sep, words$.me = ";", words$
subject = [words$, Table$(x=1), Number$(5), Text$("a"), Row$(1, 2), Bag$([3])]

def check(it):
    words, table, number, text, row, bag = it
    assert words.join() == "a;b" and words.me is words and (table["x"], table["y"]) == (1, "yy")
    assert number + 2 == 3 and type(number + 2) is Number$ and type(text.shout()) is Text$ and text.shout() == "A"
    assert row == (1, 2) and type(row) is Row$ and bag.total() == 3 and type(bag) is Bag$
""",
    "hash_and_equality": r"""
class Key$:
    def __init__(self, name): self.name = name
    def __eq__(self, other): return self.name == other.name
    def __hash__(self): return hash(self.name)
class Unhashable$:
    def __eq__(self, other): return True
subject = [{Key$("a"): 1, Key$("b"): 2}, Unhashable$()]

def check(it):
    table, thing = it
    assert table[Key$("a")] == 1 and table[Key$("b")] == 2 and Unhashable$.__hash__ is None and thing == 5
    try:
        hash(thing)
    except TypeError:
        return
    raise AssertionError("it has a hash")
""",
    "iteration_and_operators": r"""
class Range$:
    def __init__(self, n): self.n = n
    def __iter__(self): return iter(range(self.n))
    def __len__(self): return self.n
    def __getitem__(self, i): return Range$(len(range(self.n)[i])) if isinstance(i, slice) else range(self.n)[i]
    def __contains__(self, x): return x == "x"
    def __matmul__(self, k): return Range$(self.n * k)
    def __bool__(self): return self.n > 1
    def __format__(self, spec): return f"<{self.n}{spec}>"
    def __call__(self, *args): return args
subject = Range$(3)

def check(it):
    assert list(it) == [0, 1, 2] and len(it) == 3 and it[1] == 1 and list(it[:2]) == [0, 1]
    assert "x" in it and 1 not in it and len(it @ 2) == 6 and not Range$(1) and f"{it:!}" == "<3!>" and it(1) == (1,)
""",
    "new_and_singleton": r"""
class Only$:
    instance = None
    def __new__(cls):
        if cls.instance is None:
            cls.instance = super().__new__(cls)
        return cls.instance
subject = Only$()

def check(it):
    assert it is Only$() is Only$.instance
""",
    "finalizer": r"""
# not PyPy: its collector runs finalizers when it likes
class Ended$:
    def __init__(self, log): self.log = log
    def __del__(self): self.log.append("end")
subject = Ended$([])

def check(it):
    log = it.log
    Ended$(log)
    assert log == ["end"]
""",
    "annotations_of_a_class": r"""
class Other$: pass
class Holder$:
    x: int
    other: Other$ = None
    def set(self, other: Other$) -> "Holder$":
        self.other = other
        return self
subject = Holder$()

def check(it):
    assert type(it).__annotations__ == {"x": int, "other": Other$} and it.set(Other$()) is it
    assert Holder$.set.__annotations__ == {"other": Other$, "return": "Holder$"} and isinstance(it.other, Other$)
""",
    "class_decorator": r"""
registry$ = {}
def register$(cls):
    registry$[cls.__name__] = cls
    cls.registered = True
    return cls
@register$
class Tool$:
    def find(self): return registry$["Tool$"]
subject = Tool$()

def check(it):
    assert it.find() is type(it) and it.registered
""",
    "match_statement": r"""
# needs 3.10
class Point$:
    __match_args__ = ("x", "y")
    def __init__(self, x, y): self.x, self.y = x, y
def where$(p):
    match p:
        case Point$(0, 0): return "origin"
        case Point$(x, 0) if x > 0: return f"right {x}"
        case [Point$() as first, *_]: return where$(first)
        case {"point": Point$(y=y)}: return y
        case _: return "elsewhere"
subject = where$

def check(it):
    found = [it(Point$(0, 0)), it([Point$(3, 0), 1]), it({"point": Point$(1, 2)}), it(5)]
    assert found == ["origin", "right 3", 2, "elsewhere"]
""",

    # abstract classes

    "abstract_class": r"""
import abc
class Shape$(abc.ABC):
    @abc.abstractmethod
    def area(self): "Of the shape."
    @property
    @abc.abstractmethod
    def name(self): ...
    def text(self): return f"{self.name} {self.area()}"
class Square$(Shape$):
    name = "square"
    def area(self): return 4
class Half$(Shape$):
    name = "half"
subject = Square$()

def check(it):
    assert it.text() == "square 4" and isinstance(it, Shape$)
    assert Shape$.__abstractmethods__ == {"area", "name"} and Half$.__abstractmethods__ == {"area"}
    for cls in (Shape$, Half$):
        try:
            cls()
        except TypeError:
            continue
        raise AssertionError("an abstract class was instantiated")
""",
    "abstract_registry": r"""
import abc
class Walker$(abc.ABC):
    pass
class Robot$: pass
class Bird$(Walker$): pass
Walker$.register(Robot$)
Walker$.register(int)
isinstance("", Walker$)
subject = Walker$, Robot$()

def check(it):
    Walker, robot = it
    assert isinstance(robot, Walker) and isinstance(3, Walker)
    assert issubclass(Bird$, Walker) and issubclass(bool, Walker)
    assert not isinstance("", Walker)
    Walker.register(str)
    assert isinstance("", Walker)
""",
    "abstract_subclass_hook": r"""
import collections.abc
class Quacker$(collections.abc.Sized):
    @classmethod
    def __subclasshook__(cls, other): return any("quack" in vars(c) for c in other.__mro__) or NotImplemented
class Duck$:
    def quack(self): return "quack"
class Items$(collections.abc.Mapping):
    def __init__(self, **items): self.items_ = items
    def __getitem__(self, key): return self.items_[key]
    def __iter__(self): return iter(self.items_)
    def __len__(self): return len(self.items_)
subject = [Duck$(), Items$(a=1)]

def check(it):
    duck, items = it
    assert isinstance(duck, Quacker$) and not isinstance(3, Quacker$)
    assert items == {"a": 1} and items.get("b", 2) == 2 and isinstance(items, collections.abc.Mapping)
    assert list(items.keys() & {"a"}) == ["a"]
""",

    # data classes

    "dataclass": r"""
import dataclasses
@dataclasses.dataclass(order=True)
class Item$:
    name: str
    price: float = 1.0
    tags: list = dataclasses.field(default_factory=list, compare=False, repr=False, metadata={"unit": "tag"})
    serial: int = dataclasses.field(default=7, init=False)
    def double(self): return dataclasses.replace(self, price=2 * self.price)
subject = Item$("a", tags=["x"])

def check(it):
    assert it == Item$("a") and it < Item$("b") and repr(it) == "Item$(name='a', price=1.0, serial=7)"
    assert dataclasses.asdict(it) == {"name": "a", "price": 1.0, "tags": ["x"], "serial": 7}
    assert it.double().price == 2.0 and it.double().tags is it.tags
    assert [f.name for f in dataclasses.fields(it)] == ["name", "price", "tags", "serial"]
    assert dataclasses.fields(it)[2].metadata["unit"] == "tag" and Item$("c").tags is not Item$("c").tags
    assert dataclasses.fields(it)[0].default is dataclasses.MISSING and dataclasses.is_dataclass(Item$)
""",
    "dataclass_frozen": r"""
import dataclasses
@dataclasses.dataclass(frozen=True)
class Point$:
    x: int
    y: int = 0
@dataclasses.dataclass(frozen=True)
class Point3$(Point$):
    z: int = 9
subject = {Point3$(1, 2): "here"}

def check(it):
    assert it[Point3$(1, 2, 9)] == "here" and hash(Point$(1)) == hash(Point$(1, 0)) and Point$(1) != Point3$(1)
    point = next(iter(it))
    try:
        point.x = 5
    except dataclasses.FrozenInstanceError:
        assert dataclasses.astuple(dataclasses.replace(point, z=3)) == (1, 2, 3)
    else:
        raise AssertionError("a frozen one was changed")
""",
    "dataclass_initvar_classvar": r"""
import dataclasses
from dataclasses import InitVar
from typing import ClassVar
@dataclasses.dataclass
class Box$:
    count: ClassVar[int] = 0
    side: int
    scale: InitVar[int] = 2
    volume: int = dataclasses.field(init=False)
    def __post_init__(self, scale):
        Box$.count += 1
        self.volume = (self.side * scale) ** 3
subject = Box$(1)

def check(it):
    count = Box$.count
    assert it.volume == 8 and Box$(1, 3).volume == 27 and Box$.count == count + 1
    assert [f.name for f in dataclasses.fields(it)] == ["side", "volume"] and "scale" not in vars(it)
    assert dataclasses.replace(it, side=2, scale=1).volume == 8
""",
    "dataclass_slots": r"""
# needs 3.10
import dataclasses
@dataclasses.dataclass(slots=True, frozen=True)
class Point$:
    x: int
    y: list = dataclasses.field(default_factory=list)
@dataclasses.dataclass(slots=True)
class Pixel$(Point$.__base__):
    colour: str = "red"
    def paint(self, colour): self.colour = colour
subject = [Point$(1, [2]), Pixel$()]

def check(it):
    point, pixel = it
    pixel.paint("blue")
    assert (point.x, point.y, pixel.colour) == (1, [2], "blue") and Point$.__slots__ == ("x", "y")
    assert point == Point$(1, [2]) and not hasattr(point, "__dict__") and not hasattr(pixel, "__dict__")
    try:
        point.x = 3
    except dataclasses.FrozenInstanceError:
        return
    raise AssertionError("a frozen one was changed")
""",
    "dataclass_kw_only": r"""
# needs 3.10
import dataclasses
@dataclasses.dataclass(kw_only=True)
class Base$:
    name: str = "n"
@dataclasses.dataclass
class Derived$(Base$):
    x: int
    _: dataclasses.KW_ONLY
    y: int = 5
subject = Derived$(1, y=2)

def check(it):
    assert it == Derived$(1, name="n", y=2) and Derived$.__match_args__ == ("x",)
    try:
        Derived$(1, 2)
    except TypeError:
        return
    raise AssertionError("a keyword-only field was taken by position")
""",
    "dataclass_made": r"""
import dataclasses
Made$ = dataclasses.make_dataclass("Made$", [("x", int), ("y", list, dataclasses.field(default_factory=list))],
                                   namespace={"size": lambda self: self.x + len(self.y)})
subject = Made$(1, [2])

def check(it):
    assert it.size() == 2 and it == Made$(1, [2]) and Made$(3).y == [] and repr(it) == "Made$(x=1, y=[2])"
""",

    # enums

    "enum_plain": r"""
import enum
class Colour$(enum.Enum):
    "Of things."
    RED = 1
    BLUE = 2
    def lower(self): return self.name.lower()
    @classmethod
    def first(cls): return next(iter(cls))
    @property
    def twice(self): return self.value * 2
    @staticmethod
    def size(): return 9
    def __str__(self): return "colour " + self.lower()
subject = Colour$.BLUE

def check(it):
    assert it is Colour$.BLUE is Colour$(2) is Colour$["BLUE"] and [c.lower() for c in Colour$] == ["red", "blue"]
    assert Colour$.first() is Colour$.RED and it.twice == 4 and it.size() == 9 and str(it) == "colour blue"
    assert {it: 1}[Colour$.BLUE] == 1 and Colour$.__doc__ == "Of things." and len(Colour$) == 2
    try:
        Colour$(3)
    except ValueError:
        return
    raise AssertionError("there is no third")
""",
    "enum_auto": r"""
import enum
class Plain$(enum.Enum):
    A = enum.auto()
    B = enum.auto()
class Named$(enum.Enum):
    def _generate_next_value_(name, start, count, last): return name.lower()
    LEFT = enum.auto()
    RIGHT = enum.auto()
subject = [Plain$.B, Named$.RIGHT]

def check(it):
    assert it == [Plain$(2), Named$("right")] and it[0] is Plain$.B and it[1] is Named$.RIGHT
    assert [m.value for m in Named$] == ["left", "right"]
""",
    "enum_aliases": r"""
import enum
class Status$(enum.Enum):
    OK = 200
    FINE = 200
    BAD = [400]
    WORSE = [400]
subject = Status$.FINE, Status$

def check(it):
    status, Status = it
    assert status is Status.OK is Status.FINE and status.name == "OK" and list(Status) == [Status.OK, Status.BAD]
    assert list(Status.__members__) == ["OK", "FINE", "BAD", "WORSE"] and Status([400]) is Status.WORSE is Status.BAD
""",
    "enum_mixins": r"""
import enum
class Level$(enum.IntEnum):
    LOW = 1
    HIGH = 10
class Word$(str, enum.Enum):
    YES = "y"
    def upper2(self): return self.value.upper() * 2
class Ordered$(enum.Enum):
    def __lt__(self, other): return self.value < other.value
class Size$(Ordered$):
    S = 1
    L = 2
subject = [Level$.HIGH, Word$.YES, Size$.L]

def check(it):
    level, word, size = it
    assert level is Level$.HIGH and level + 1 == 11 and level > Level$.LOW and sorted(Level$)[-1] is level
    assert word is Word$.YES and word == "y" and word.upper2() == "YY" and word.upper() == "Y"
    assert size is Size$.L and Size$.S < size and sorted([size, Size$.S])[0] is Size$.S
""",
    "enum_with_its_own_init": r"""
import enum
class Planet$(enum.Enum):
    EARTH = (6.0, 6.4)
    MARS = (0.6, 3.4)
    def __init__(self, mass, radius): self.mass, self.radius = mass, radius
    @property
    def density(self): return round(self.mass / self.radius, 3)
subject = Planet$.MARS

def check(it):
    assert it is Planet$.MARS is Planet$((0.6, 3.4)) and (it.mass, it.radius, it.density) == (0.6, 3.4, 0.176)
    assert Planet$.EARTH.density == 0.938 and it.value == (0.6, 3.4)
""",
    "enum_with_its_own_new": r"""
import enum
class Coord$(bytes, enum.Enum):
    def __new__(cls, value, label):
        made = bytes.__new__(cls, [value])
        made._value_, made.label = value, label
        return made
    PX = (0, "x")
    PY = (1, "y")
class Numbered$(enum.Enum):
    def __new__(cls):
        made = object.__new__(cls)
        made._value_ = len(cls.__members__) + 1
        return made
    ONE = ()
    TWO = ()
subject = [Coord$.PY, Numbered$.TWO]

def check(it):
    coord, numbered = it
    assert coord is Coord$.PY is Coord$(1) and coord == b"\x01" and coord.label == "y" and Coord$.PX.label == "x"
    assert numbered is Numbered$.TWO is Numbered$(2) and [n.value for n in Numbered$] == [1, 2]
""",
    "enum_missing_and_private": r"""
import enum
@enum.unique
class Answer$(enum.Enum):
    _ignore_ = ["i"]
    YES = "y"
    NO = "n"
    @classmethod
    def _missing_(cls, value):
        return cls.YES if value in (1, True) else None
    def __bool__(self): return self is Answer$.YES
Answer$.YES.opposite, Answer$.NO.opposite = Answer$.NO, Answer$.YES
subject = Answer$.NO

def check(it):
    assert Answer$(1) is Answer$.YES and not it and it.opposite is Answer$.YES and it.opposite.opposite is it
    assert len(Answer$) == 2 and Answer$.YES and not hasattr(Answer$, "i")
""",
    "enum_functional": r"""
import enum
Animal$ = enum.Enum("Animal$", "CAT DOG", module=__name__)
Given$ = enum.IntEnum("Given$", {"A": 5, "B": 7})
subject = [Animal$.DOG, Given$.B]

def check(it):
    assert it[0] is Animal$.DOG is Animal$(2) and it[1] is Given$.B and it[1] == 7 and len(Animal$) == 2
    assert type(it[0]).__name__ == "Animal$"
""",
    "enum_values_of_its_own_kind": r"""
import enum
class Money$:
    def __init__(self, n): self.n = n
    def __eq__(self, other): return isinstance(other, Money$) and self.n == other.n
class Coin$(enum.Enum):
    CENT = Money$(1)
    EURO = Money$(100)
    calls = lambda self: self.value.n
class User$:
    best = Coin$.EURO
    def __init__(self, coin=Coin$.CENT): self.coin = coin
subject = User$(), {Coin$.CENT: [Coin$.EURO]}

def check(it):
    user, table = it
    assert user.best is Coin$.EURO and user.coin is Coin$.CENT and table[Coin$.CENT][0] is Coin$.EURO
    assert Coin$(Money$(100)) is Coin$.EURO and user.best.calls() == 100 and len(Coin$) == 2
""",
    "flags": r"""
import enum
class Access$(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()
    RUN = enum.auto()
    BOTH = READ | WRITE
    def short(self): return "".join(m.name[0] for m in (Access$.READ, Access$.WRITE, Access$.RUN) if m in self)
class Mode$(enum.IntFlag):
    R = 4
    W = 2
subject = [Access$.BOTH, Access$.READ | Access$.RUN, Access$(0), Mode$.R | Mode$.W, ~Mode$.R]

def check(it):
    both, some, none, mode, rest = it
    assert both is Access$.BOTH is Access$.READ | Access$.WRITE and some.short() == "RR" and not none
    assert some is Access$.READ | Access$.RUN and Access$.WRITE not in some and (some ^ Access$.RUN) is Access$.READ
    assert mode == 6 and mode & 4 == Mode$.R and Mode$.R not in rest and Mode$.W in rest and type(mode) is Mode$
    assert (both.value, Access$.RUN.value) == (3, 4)
""",
    "flags_with_boundaries": r"""
# needs 3.11
import enum
class Strict$(enum.Flag, boundary=enum.STRICT):
    A = 1
    B = 2
class Keep$(enum.Flag, boundary=enum.KEEP):
    A = 1
class Conform$(enum.Flag, boundary=enum.CONFORM):
    A = 1
subject = [Strict$.A | Strict$.B, Keep$(9), Conform$(5)]

def check(it):
    strict, keep, conform = it
    assert list(strict) == [Strict$.A, Strict$.B] and keep.value == 9
    assert conform is Conform$.A and Keep$(17).value == 17
    try:
        Strict$(8)
    except ValueError:
        return
    raise AssertionError("a strict flag took bits that it has not")
""",
    "enum_string_and_members": r"""
# needs 3.11
import enum
class Word$(enum.StrEnum):
    YES = enum.auto()
    NO = "never"
class Mixed$(enum.Enum):
    ONE = 1
    @enum.member
    def act(): return "acts"
    plain = enum.nonmember(7)
subject = [Word$.YES, Mixed$.act]

def check(it):
    word, act = it
    assert word is Word$.YES and word == "yes" and f"{Word$.NO}!" == "never!"
    assert act is Mixed$.act and act.value() == "acts" and Mixed$.plain == 7 and len(Mixed$) == 2
""",

    # tuples and dicts with names

    "named_tuple": r"""
import collections
Pair$ = collections.namedtuple("Pair$", "a b c", defaults=(5,))
class Named$(Pair$):
    __slots__ = ()
    def total(self): return self.a + self.b + self.c
    def __repr__(self): return f"<{self.total()}>"
subject = [Pair$(1, 2), Named$(1, b=2)]

def check(it):
    pair, named = it
    assert pair == (1, 2, 5) and pair._asdict() == {"a": 1, "b": 2, "c": 5} and pair._replace(a=9) == (9, 2, 5)
    assert type(pair._replace(a=9)) is Pair$ and Pair$._fields == ("a", "b", "c") and Pair$._field_defaults == {"c": 5}
    assert repr(pair) == "Pair$(a=1, b=2, c=5)" and repr(named) == "<8>" and type(Named$._make([1, 1, 1])) is Named$
    assert not hasattr(named, "__dict__")
""",
    "typed_named_tuple": r"""
from typing import NamedTuple
class Employee$(NamedTuple):
    "Who works."
    name: str
    id: int = 3
    def badge(self): return f"{self.name}{self.id}"
    @property
    def loud(self): return self.name.upper()
    @classmethod
    def nobody(cls): return cls("", 0)
class Boss$(Employee$):
    def badge(self): return "boss " + super().badge()
subject = [Employee$("ann"), Boss$("bob", id=1)]

def check(it):
    ann, bob = it
    assert ann == ("ann", 3) and ann.badge() == "ann3" and ann.loud == "ANN" and Employee$.nobody() == ("", 0)
    assert bob.badge() == "boss bob1" and isinstance(bob, Employee$) and Employee$.__annotations__["id"] is int
    name, id = ann
    assert (name, id) == ("ann", 3) and Employee$.__doc__ == "Who works."
""",
    "typed_dict": r"""
from typing import TypedDict
class Movie$(TypedDict):
    name: str
class Rated$(Movie$, total=False):
    stars: int
Point$ = TypedDict("Point$", {"x": int, "y-z": str})
subject = [Rated$, Point$, Rated$(name="n", stars=5)]

def check(it):
    Rated, Point, movie = it
    assert movie == {"name": "n", "stars": 5} and Rated(name="m") == {"name": "m"}
    assert Rated.__annotations__.keys() == {"name", "stars"} and Point.__annotations__.keys() == {"x", "y-z"}
    assert (Rated.__required_keys__, Rated.__optional_keys__, Rated.__total__) == ({"name"}, {"stars"}, False)
""",

    # typing

    "generic_class": r"""
from typing import Generic, TypeVar, List
T$ = TypeVar("T$")
K$ = TypeVar("K$", bound=int)
class Box$(Generic[T$]):
    def __init__(self, x: T$): self.x = x
    def get(self) -> T$: return self.x
class Pair$(Box$[T$], Generic[K$, T$]): pass
class Ints$(Box$[int]): pass
subject = [Box$[int](3), Pair$[int, str], Ints$(4), List[T$], Box$]

def check(it):
    box, pair, ints, listed, Box = it
    assert box.get() == 3 and type(box) is Box and box.__orig_class__ == Box[int] and ints.get() == 4
    assert pair(7).get() == 7 and pair.__args__ == (int, str) and Pair$.__parameters__ == (K$, T$)
    assert Box.__parameters__ == (T$,) and listed[int] == List[int] and Box.get.__annotations__["return"] is T$
""",
    "type_variables": r"""
from typing import Callable, Dict, TypeVar
class Base$: pass
T$ = TypeVar("T$")
B$ = TypeVar("B$", bound=Base$, covariant=True)
C$ = TypeVar("C$", int, str)
def f$(x: T$, y: B$) -> Dict[T$, C$]: return x
subject = [T$, B$, C$, f$, Callable[[T$], T$], {T$: "by identity"}]

def check(it):
    T, B, C, f, calls, table = it
    assert f.__annotations__["x"] is T and f.__annotations__["y"] is B and table[T] == "by identity" and T is T$
    assert B.__bound__ is Base$ and B.__covariant__ and not T.__covariant__ and C.__constraints__ == (int, str)
    assert calls.__parameters__ == (T,) and f.__annotations__["return"] == Dict[T, C] and T.__name__ == "T$"
""",
    "typing_objects": r"""
import typing
from typing import Any, Callable, Dict, List, Literal, Optional, Tuple, Type, Union, Annotated, NewType
class Own$: pass
UserId$ = NewType("UserId$", int)
subject = [Optional[int], Union[int, Own$], Callable[[Own$], int], Literal["a", 1], List[Own$], Dict[str, List[int]],
           Tuple[int, ...], Type[Own$], Any, Callable[..., Any], Annotated[int, "unit", Own$]]
named$ = {"Optional": Optional, "UserId": UserId$}
subject.append(named$)

def check(it):
    optional, union, calls, literal, listed, dicts, tuples, types, anything, loose, annotated, named = it
    assert optional == Optional[int] and union == Union[int, Own$] and calls == Callable[[Own$], int]
    assert literal == Literal["a", 1] and listed == List[Own$] and dicts == Dict[str, List[int]]
    assert tuples == Tuple[int, ...] and types == Type[Own$] and anything is Any and loose == Callable[..., Any]
    assert annotated == Annotated[int, "unit", Own$] and typing.get_args(annotated)[2] is Own$
    assert named["Optional"] is Optional and named["UserId"](5) == 5 and named["UserId"].__supertype__ is int
    assert named["UserId"] is UserId$ and UserId$.__name__ == "UserId$"
""",
    "generic_aliases": r"""
import collections, typing
class Own$: pass
subject = [list[int], dict[str, list[Own$]], tuple[int, ...], type[Own$], collections.deque[Own$], list]

def check(it):
    ints, dicts, tuples, own, deques, plain = it
    assert ints == list[int] and dicts == dict[str, list[Own$]] and tuples == tuple[int, ...] and own == type[Own$]
    assert typing.get_args(deques) == (Own$,) and deques([1]) == collections.deque([1]) and plain is list
    assert ints([1]) == [1] and dicts.__origin__ is dict
""",
    "union_types": r"""
# needs 3.10
import types
class Own$: pass
def f$(x: int | Own$ | None = None): return isinstance(x, int | Own$)
subject = [int | str, Own$ | None, list[int] | int, f$]

def check(it):
    ints, own, lists, f = it
    assert ints == int | str and isinstance(3, ints) and not isinstance(b"", ints) and own == Own$ | None
    assert lists.__args__ == (list[int], int) and f(Own$()) and not f() and f.__annotations__["x"] == int | Own$ | None
""",
    "parameter_specifications": r"""
# needs 3.10
from typing import Callable, Concatenate, Generic, ParamSpec, TypeVar
P$ = ParamSpec("P$")
R$ = TypeVar("R$")
def logged$(f: Callable[P$, R$]) -> Callable[Concatenate[int, P$], R$]:
    def inner(n: int, *args: P$.args, **kwargs: P$.kwargs) -> R$: return f(*args, **kwargs)
    return inner
class Task$(Generic[P$, R$]):
    def __init__(self, f): self.f = f
subject = [P$, logged$, Task$[[int], str]]

def check(it):
    P, logged, task = it
    assert P is P$ and logged(lambda x: x)(0, 5) == 5 and logged.__annotations__["f"] == Callable[P, R$]
    assert task(len).f("ab") == 2 and Task$.__parameters__ == (P, R$)
    assert logged(len).__annotations__["args"] == P.args
""",
    "variadic_generics": r"""
# needs 3.11
from typing import Generic, TypeVarTuple, Unpack, NamedTuple, TypeVar
Ts$ = TypeVarTuple("Ts$")
T$ = TypeVar("T$")
class Array$(Generic[Unpack[Ts$]]):
    def __init__(self, *shape: Unpack[Ts$]): self.shape = shape
class Item$(NamedTuple, Generic[T$]):
    x: T$
subject = [Ts$, Array$[int, str](1, "a"), Item$[int](5)]

def check(it):
    Ts, array, item = it
    assert Ts is Ts$ and array.shape == (1, "a") and Array$.__parameters__ == (Ts,) and type(array) is Array$
    assert item == (5,) and type(item) is Item$ and Item$.__parameters__ == (T$,)
""",
    "type_parameter_syntax": r"""
# needs 3.12
class Box$[T]:
    def __init__(self, x: T): self.x = x
    def pair[U](self, y: U) -> tuple[T, U]: return self.x, y
def first$[T: (int, str)](xs: list[T]) -> T: return xs[0]
type Pairs$[A] = list[tuple[A, A]]
type Either$ = int | str
subject = [Box$[int](3), Box$, first$, Pairs$, Either$]

def check(it):
    box, Box, first, Pairs, Either = it
    assert type(box) is Box and box.x == 3 and box.pair("y") == (3, "y") and first([7]) == 7
    T, = Box.__type_params__
    assert Box.__parameters__ == (T,) and Box.__init__.__annotations__["x"] is T
    assert first.__type_params__[0].__constraints__ == (int, str)
    A, = Pairs.__type_params__
    assert Pairs.__value__ == list[tuple[A, A]] and Pairs.__name__ == "Pairs$" and Either.__value__.__args__ == (int, str)
""",
    "protocol": r"""
from typing import Protocol, TypeVar, runtime_checkable
T$ = TypeVar("T$", covariant=True)
@runtime_checkable
class Closes$(Protocol):
    name: str
    def close(self) -> int: ...
class Source$(Protocol[T$]):
    def read(self) -> T$: ...
class Door$:
    name = "door"
    def close(self): return 1
class Wall$:
    name = "wall"
class Window$(Closes$):
    name = "window"
    def close(self): return 2
subject = [Closes$, Door$(), Wall$(), Window$()]

def check(it):
    Closes, door, wall, window = it
    assert isinstance(door, Closes) and not isinstance(wall, Closes) and isinstance(window, Closes)
    assert window.close() == 2 and Source$.__parameters__ == (T$,) and Closes._is_protocol
    try:
        Closes()
    except TypeError:
        return
    raise AssertionError("a protocol was instantiated")
""",
    "generic_dataclass": r"""
import dataclasses
from typing import Generic, List, Optional, TypeVar
T$ = TypeVar("T$")
@dataclasses.dataclass
class Node$(Generic[T$]):
    value: T$
    next: "Optional[Node$[T$]]" = None
    def values(self) -> List[T$]: return [self.value] + (self.next.values() if self.next else [])
subject = Node$(1, Node$[int](2))

def check(it):
    assert it.values() == [1, 2] and it == Node$(1, Node$(2)) and type(it) is Node$ and Node$.__parameters__ == (T$,)
    assert dataclasses.fields(Node$)[0].type is T$
""",

    # modules

    "modules_by_name": r"""
import math, os.path as paths$, collections.abc
from json import dumps as to_json$
import json.decoder as decoder$
def f$(x): return math.floor(x), paths$.join("a", "b"), to_json$([x]), decoder$.JSONDecoder().decode("[1]")
class Uses$:
    module = math
    def root(self): return self.module.sqrt(16)
subject = f$, math, Uses$()

def check(it):
    import math as here, os
    f, module, user = it
    assert f(1.5) == (1, os.path.join("a", "b"), "[1.5]", [1]) and module is here and user.root() == 4.0
    assert user.module is here
""",
    "submodule_as_attribute": r"""
import xml.etree.ElementTree
def parse$(text): return xml.etree.ElementTree.fromstring(text).tag
subject = parse$

def check(it):
    assert it("<a><b/></a>") == "a"
""",
    "submodule_in_methods_and_inner_functions": r"""
import email.mime.text, wsgiref.util, unittest.mock
class Mail$:
    def make(self, text): return (lambda: email.mime.text.MIMEText(text).get_payload())()
    rows = property(lambda self: [wsgiref.util.guess_scheme(e) for e in ({}, {"HTTPS": "on"})])
    mock = staticmethod(lambda: unittest.mock.Mock(return_value=5)())
subject = Mail$()

def check(it):
    assert it.make("hello") == "hello" and it.rows == ["http", "https"] and it.mock() == 5
""",
    "import_within_a_function": r"""
def f$(text):
    import html.parser
    from textwrap import dedent
    found = []
    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs): found.append(tag)
    Parser().feed(dedent(text))
    return found
subject = f$

def check(it):
    assert it("<p><b>") == ["p", "b"]
""",
    "dynamic_module": r"""
import types
shelf$ = types.ModuleType("shelf$", "Its text.")
source$ = (
    "items = []\nclass Book:\n    pass\n"
    "def add(x):\n    global last\n    last = x\n    items.append(Book())\n    return len(items)\n")
exec(source$, shelf$.__dict__)
def use$(x): return shelf$.add(x)
subject = shelf$, use$

def check(it):
    shelf, use = it
    size = len(shelf.items)
    assert use("a") == size + 1 and shelf.last == "a" and type(shelf.items[-1]) is shelf.Book
    assert shelf.add.__globals__ is vars(shelf) and (shelf.__name__, shelf.__doc__) == ("shelf$", "Its text.")
    assert isinstance(shelf, types.ModuleType)
""",
    "dynamic_module_that_is_imported": r"""
import sys, types
module$ = types.ModuleType("plugin$")
exec("x = 1\ndef get(): return x\nclass Thing:\n    def get(self): return get()", module$.__dict__)
sys.modules["plugin$"] = module$
subject = module$, module$.Thing(), module$.get

def check(it):
    module, thing, get = it
    assert thing.get() == get() == module.x
    module.x += 1
    assert thing.get() == get() == module.x and type(thing) is module.Thing
""",

    # other objects

    "memoryviews": r"""
# not PyPy: a slice's tobytes() is a MemoryError there
import array
subject = [memoryview(b"abcdef")[1:4], memoryview(bytearray(b"xyz")), memoryview(array.array("i", [1, -2, 3]))]

def check(it):
    part, writable, numbers = it
    assert part.tobytes() == b"bcd" and part[0] == ord("b") and len(part) == 3
    assert bytes(writable) == b"xyz" and numbers.tobytes() == array.array("i", [1, -2, 3]).tobytes()
    assert all(isinstance(x, memoryview) for x in it) and numbers.tolist() == [1, -2, 3] and part.readonly
""",
    "dict_views": r"""
import collections
table$ = {"a": 1, "b": [2]}
ordered$ = collections.OrderedDict(x=1, y=2)
subject = [table$.keys(), table$.values(), table$.items(), ordered$.keys(), ordered$.values(), ordered$.items()]

def check(it):
    keys, values, items, o_keys, o_values, o_items = it
    assert keys & {"a", "c"} == {"a"} and list(keys) == ["a", "b"] and list(values) == [1, [2]] and ("a", 1) in items
    assert list(o_keys) == ["x", "y"] and list(o_values) == [1, 2] and list(o_items) == [("x", 1), ("y", 2)]
    assert [type(x) for x in it[:3]] == [type({}.keys()), type({}.values()), type({}.items())]
    assert list(reversed(keys)) == ["b", "a"] and len(values) == 2
""",
    "loggers": r"""
import logging
log$ = logging.getLogger("shop$.till")
class Till$:
    log = log$
    def __init__(self): self.root = logging.getLogger()
    def ring(self): return self.log.isEnabledFor(logging.ERROR)
subject = Till$(), log$, logging.LoggerAdapter(log$, {"user": "ann"})

def check(it):
    till, log, adapter = it
    assert log is logging.getLogger("shop$.till") is till.log and till.root is logging.getLogger() and till.ring()
    assert adapter.logger is log and adapter.process("hi", {}) == ("hi", {"extra": {"user": "ann"}})
""",
    "weak_references": r"""
import weakref
class Node$:
    def __init__(self, parent=None): self.parent, self.kids = parent and weakref.ref(parent), []
    def add(self):
        self.kids.append(Node$(self))
        return self.kids[-1]
root$ = Node$()
root$.add().add()
def dead$():
    ref = weakref.ref(Node$())
    import gc
    gc.collect()
    return ref
subject = root$, weakref.ref(root$), dead$(), weakref.ref(Node$)

def check(it):
    root, ref, dead, of_class = it
    assert ref() is root and root.kids[0].parent() is root and root.kids[0].kids[0].parent() is root.kids[0]
    assert dead() is None and of_class() is Node$ is type(root) and isinstance(ref, weakref.ref)
""",
    "weak_collections": r"""
import weakref
class Key$:
    def __init__(self, name): self.name = name
a$, b$ = Key$("a"), Key$("b")
subject = [a$, b$, weakref.WeakSet([a$, b$]), weakref.WeakValueDictionary(a=a$, b=b$),
           weakref.WeakKeyDictionary({a$: [b$]})]

def check(it):
    import gc
    a, b, some, values, keys = it
    assert a in some and len(some) == 2 and values["b"] is b and keys[a][0] is b and len(values) == 2
    c = Key$("c")
    some.add(c)
    values["c"], keys[c] = c, 3
    assert len(some) == 3
    del c
    gc.collect()
    assert (len(some), sorted(values), list(keys)) == (2, ["a", "b"], [a])
    assert [type(x) for x in (some, values)] == [weakref.WeakSet, weakref.WeakValueDictionary]
""",
    "singletons": r"""
subject = [None, ..., NotImplemented, True, type(None), type(...), type(NotImplemented), {type(None): ...},
           object, type]

def check(it):
    none, dots, no, yes, *types, table, plain, meta = it
    assert none is None and dots is ... and no is NotImplemented and yes is True and plain is object and meta is type
    assert types == [type(None), type(...), type(NotImplemented)] and table[type(None)] is ...
""",
    "unnamed_types": r"""
import types
def f$(x): return isinstance(x, KINDS$[0]), isinstance(x, types.ModuleType)
KINDS$ = (types.FunctionType, types.MethodType, types.GeneratorType, types.CodeType, types.ModuleType, types.CellType,
          types.MappingProxyType, types.BuiltinFunctionType, types.CoroutineType, types.TracebackType, types.FrameType)
subject = f$, KINDS$

def check(it):
    f, kinds = it
    assert f(f) == (True, False) and f(types) == (False, True) and kinds[0] is type(f)
    assert kinds[2] is type(x for x in ()) and kinds[5] is types.CellType and kinds[3] is type(f.__code__)
""",
    "code_objects": r"""
import types
def f$(a, b=2):
    def inner(): return a, KEY$
    return inner()
KEY$ = "k"
subject = compile("x = y + 1", "<text>", "exec"), compile("y * 2", "<text>", "eval"), f$.__code__, [f$.__code__]

def check(it):
    statements, expression, code, again = it
    scope = {"y": 4}
    exec(statements, scope)
    assert scope["x"] == 5 and eval(expression, scope) == 8 and again[0] is code
    assert types.FunctionType(code, {"KEY$": "other"}, "g", (9,))(1) == (1, "other") and code.co_name == "f$"
""",
    "standard_streams": r"""
import sys
def say$(*words, file=sys.stderr): return file
class Printer$:
    out = sys.stdout
subject = sys.stdout, sys.stderr, say$, Printer$()

def check(it):
    out, err, say, printer = it
    assert out is sys.stdout and err is sys.stderr and say("x") is sys.stderr and printer.out is sys.stdout
""",
    "standard_values": r"""
import array, collections, datetime, decimal, fractions, pathlib, re, types, uuid, io, random
buffer$ = io.BytesIO(b"abc")
buffer$.seek(1)
subject = [array.array("d", [1.5]), collections.deque([1], 3), collections.Counter("aab"), decimal.Decimal("1.10"),
           fractions.Fraction(1, 3), pathlib.PurePosixPath("/a/b"), re.compile("a(b+)", re.I),
           types.SimpleNamespace(x=1), uuid.UUID(int=5), range(2, 9, 3), slice(1, None), 1 + 2j,
           bytearray(b"x"), datetime.date(2020, 2, 29),
           types.MappingProxyType({"k": 1}), buffer$, collections.ChainMap({"a": 1}, {"b": 2}), float("inf"), 2 ** 200]

def check(it):
    arr, deq, cnt, dec, frac, path, pattern, space, uid, rng, sl, cpx, ba, date, proxy, buffer, chain, inf, big = it
    assert arr[0] == 1.5 and (deq.maxlen, list(deq)) == (3, [1]) and cnt.most_common(1) == [("a", 2)]
    assert str(dec) == "1.10" and frac * 3 == 1 and path.name == "b" and pattern.match("ABB").group(1) == "BB"
    assert space.x == 1 and uid.int == 5 and list(rng) == [2, 5, 8] and "abc"[sl] == "bc" and cpx.imag == 2
    assert ba == b"x" and date.month == 2 and proxy["k"] == 1 and not hasattr(proxy, "update")
    assert buffer.read() == b"bc" and chain["b"] == 2 and inf > 1e308 and big == 2 ** 200
""",
    "containers_with_own_functions": r"""
import collections
groups$ = collections.defaultdict(lambda: ["new"])
groups$["a"].append(1)
class Latest$(collections.OrderedDict):
    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.move_to_end(key, last=False)
class Text$(collections.UserString):
    def loud(self): return self.upper() + "!"
subject = [groups$, Latest$(a=1, b=2), Text$("x"), collections.deque([len, lambda: 5])]

def check(it):
    groups, latest, text, functions = it
    assert groups["a"] == ["new", 1] and groups["b"] == ["new"] and text.loud() == "X!" and functions[1]() == 5
    latest["c"] = 3
    assert next(iter(latest)) == "c" and dict(latest) == {"a": 1, "b": 2, "c": 3}
""",
    "cycles": r"""
class Node$:
    def __init__(self): self.links = []
a$, b$ = Node$(), Node$()
a$.links += [a$, b$, lambda: a$]
b$.links = {"a": a$, "row": (a$, [b$])}
b$.links["self"] = b$.links
subject = [a$, b$]
subject.append(subject)

def check(it):
    a, b, me = it
    assert me is it and a.links[0] is a and a.links[1] is b and a.links[2]() is a
    assert b.links["a"] is a and b.links["self"] is b.links and b.links["row"][1][0] is b
""",
    "shared_between_global_and_argument": r"""
data$ = [1]
class Kept$: pass
def read$(): return data$, Kept$
subject = read$, data$, Kept$(), {"read": read$}

def check(it):
    read, data, kept, table = it
    assert read()[0] is data and type(kept) is read()[1] and table["read"] is read
    data.append(2)
    assert read()[0][-1] == 2
""",
    "own_time_zone": r"""
import datetime
class Zone$(datetime.tzinfo):
    def __init__(self, hours=0): self.hours = hours
    def utcoffset(self, when): return datetime.timedelta(hours=self.hours)
    def dst(self, when): return datetime.timedelta(0)
    def tzname(self, when): return f"Z{self.hours}"
    def __reduce__(self): return Zone$, (self.hours,)
subject = datetime.datetime(2020, 1, 1, 12, tzinfo=Zone$(3))

def check(it):
    assert it.tzname() == "Z3" and it.astimezone(datetime.timezone.utc).hour == 9
""",
    "iterators": r"""
subject = [iter([1, 2, 3]), enumerate("ab"), zip([1], "a"), reversed([1, 2]), iter(range(3))]
next(subject[0])

def check(it):
    assert [list(x) for x in it] == [[2, 3], [(0, "a"), (1, "b")], [(1, "a")], [2, 1], [0, 1, 2]]
""",
    "sets": r"""
class Item$:
    def __init__(self, n): self.n = n
    def __hash__(self): return hash(self.n)
    def __eq__(self, other): return self.n == other.n
subject = [{"a", "b", 3}, frozenset([("x", 1), frozenset()]), {Item$(1), Item$(2)}, {int, len, Item$}]

def check(it):
    words, frozen, items, kinds = it
    assert words == {"a", "b", 3} and ("x", 1) in frozen and frozenset() in frozen and type(frozen) is frozenset
    assert Item$(2) in items and len(items) == 2 and kinds == {int, len, Item$}
""",

    # exceptions

    "exception_plain": r"""
class Broken$(ValueError):
    code = 5
    def hint(self): return f"code {self.code}: {self.args[0]}"
def fail$(x): raise Broken$("no", x)
subject = fail$, Broken$("kept")

def check(it):
    fail, kept = it
    try:
        fail(3)
    except ValueError as error:
        assert type(error) is Broken$ and error.args == ("no", 3) and error.hint() == "code 5: no"
    else:
        raise AssertionError("nothing was raised")
    assert type(kept) is Broken$ and str(kept) == "kept"
""",
    "exception_with_several_arguments": r"""
class Demanding$(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")
        self.a, self.b = a, b
class Silent$(Exception):
    def __init__(self, a, b): self.pair = (a, b)
    def __str__(self): return f"silent {self.pair}"
subject = [Demanding$(1, [2]), Silent$(3, 4)]

def check(it):
    demanding, silent = it
    assert (type(demanding), str(demanding), demanding.a, demanding.b) == (Demanding$, "1 and [2]", 1, [2])
    assert demanding.args == ("1 and [2]",)
    assert (type(silent), str(silent), silent.pair, silent.args) == (Silent$, "silent (3, 4)", (3, 4), (3, 4))
""",
    "exception_with_required_keywords": r"""
class Keyed$(RuntimeError):
    made = 0
    def __init__(self, message, *, code, level="high"):
        super().__init__(message)
        Keyed$.made += 1
        self.code, self.level = code, level
    def __str__(self): return f"[{self.code}] {self.args[0]}"
class Built$(Keyed$):
    def __init__(self, *, user): super().__init__(f"no such user: {user}", code=404)
subject = [Keyed$("no", code=7), Built$(user="ann")]

def check(it):
    keyed, built = it
    assert (type(keyed), str(keyed), keyed.code, keyed.level) == (Keyed$, "[7] no", 7, "high")
    assert (type(built), str(built), built.args) == (Built$, "[404] no such user: ann", ("no such user: ann",))
    assert str(Built$(user="bob")) == "[404] no such user: bob"
""",
    "exception_attributes": r"""
error$ = KeyError("missing")
error$.where, error$.more = "here", {"f": lambda: 5}
class Own$(LookupError):
    pass
own$ = Own$("x")
own$.depth, own$.peer = 3, error$
subject = [error$, own$]

def check(it):
    error, own = it
    assert (error.args, error.where, error.more["f"]()) == (("missing",), "here", 5)
    assert (own.args, own.depth) == (("x",), 3) and own.peer is error
""",
    "exception_os_errors": r"""
import errno
class Gone$(FileNotFoundError):
    def advice(self): return f"look for {self.filename}"
class Stuck$(OSError):
    def __init__(self, path):
        super().__init__(errno.EBUSY, "stuck", path)
        self.path = path
subject = [OSError(errno.ENOENT, "no", "a.txt"), Gone$(errno.ENOENT, "gone", "b.txt"), Stuck$("c.txt"),
           ConnectionError("x")]

def check(it):
    plain, gone, stuck, reset = it
    assert (type(plain), plain.errno, plain.filename) == (FileNotFoundError, errno.ENOENT, "a.txt")
    assert (type(gone), gone.errno, gone.strerror, gone.advice()) == (Gone$, errno.ENOENT, "gone", "look for b.txt")
    assert (type(stuck), stuck.errno, stuck.filename, stuck.path) == (Stuck$, errno.EBUSY, "c.txt", "c.txt")
    assert reset.args == ("x",) and reset.errno is None
""",
    "exception_unicode_and_key_errors": r"""
class BadText$(UnicodeDecodeError):
    def __init__(self, data, hint):
        super().__init__("utf-8", data, 1, 2, "bad")
        self.hint = hint
class NoUser$(KeyError):
    def __init__(self, user):
        super().__init__(user)
        self.user = user
    def __str__(self): return f"no user {self.user}"
class Syntax$(SyntaxError): pass
class Done$(StopIteration): pass
subject = [BadText$(b"a\xff", "latin?"), NoUser$("ann"), Syntax$("bad", ("f.py", 3, 1, "x x")), Done$(5)]

def check(it):
    text, user, syntax, done = it
    assert (type(text), text.object, text.start, text.end, text.hint) == (BadText$, b"a\xff", 1, 2, "latin?")
    assert "can't decode byte 0xff" in str(text)
    assert (type(user), str(user), user.user) == (NoUser$, "no user ann", "ann")
    assert (type(syntax), syntax.lineno, syntax.text, syntax.filename) == (Syntax$, 3, "x x", "f.py")
    assert type(done) is Done$ and done.value == 5
""",
    "exception_groups": r"""
# needs 3.11
class Failures$(ExceptionGroup):
    def __new__(cls, message, errors, level):
        made = super().__new__(cls, message, errors)
        made.level = level
        return made
    def derive(self, errors): return Failures$(self.message, errors, self.level)
class Own$(ValueError): pass
subject = [ExceptionGroup("two", [Own$("a"), ExceptionGroup("in", [KeyError("b")])]),
           Failures$("f", [Own$("c"), KeyError("d")], 3)]
subject[0].add_note("noted")

def check(it):
    group, failures = it
    assert group.subgroup(KeyError).exceptions[0].exceptions[0].args == ("b",) and type(group.exceptions[0]) is Own$
    assert group.__notes__ == ["noted"] and (type(failures), failures.message, failures.level) == (Failures$, "f", 3)
    own, rest = failures.split(Own$)
    assert type(own) is Failures$ and own.level == 3 and rest.exceptions[0].args == ("d",)
""",
    "exceptions_raised_and_caught": r"""
class Base$(Exception): pass
class Low$(Base$):
    def __init__(self, n, *, why): self.n, self.why = n, why
def low$(n): raise Low$(n, why="deep")
def high$(n):
    try:
        low$(n)
    except Low$ as error:
        raise Base$("high") from error
def f$(n):
    try:
        high$(n)
    except Base$ as error:
        return error.args, error.__cause__.n, error.__cause__.why, type(error.__cause__) is Low$
subject = f$

def check(it):
    assert it(3) == (("high",), 3, "deep", True)
""",
}

# What must be refused: the text says the reason, and the path to it from what was given to dumps().
REFUSED = {
    "open_file": (r"""
import os
class Keeper$:
    def __init__(self): self.file = open(os.devnull)
subject = {"a": [Keeper$()]}
""", r"(?s)\['a'\]\[0\]\.file.*(file|TextIOWrapper)"),
    "open_binary_file": (r"""
import os
subject = [1, open(os.devnull, "rb")]
""", r"(?s)\[1\].*(file|BufferedReader)"),
    "context_variable": (r"""
import contextvars
user$ = contextvars.ContextVar("user$")
def f$(): return user$.get()
subject = f$
""", r"(?s)(user$).*ContextVar|ContextVar.*(user$)"),
    "generator": (r"""
subject = {"rows": (x for x in range(3))}
""", r"(?s)\['rows'\].*generator"),
    "coroutine": (r"""
async def f$(): return 1
subject = [f$()]
subject_name$ = subject[0].close()
""", r"(?s)\[0\].*coroutine"),
    "asynchronous_generator": (r"""
async def f$(): yield 1
subject = [0, f$()]
""", r"(?s)\[1\].*async_generator"),
    "lock_in_a_closure": (r"""
import threading
def make$():
    guard = threading.Lock()
    return lambda: guard
subject = make$()
""", r"(?s)guard.*lock"),
    "lock_in_an_instance": (r"""
import threading
class Safe$:
    def __init__(self): self.inner = {"guard": threading.Lock()}
subject = Safe$()
""", r"(?s)\.inner\['guard'\].*lock"),
    "lock_in_a_class": (r"""
import threading
class Safe$:
    guard = threading.Lock()
    def use(self): return self.guard
subject = Safe$()
""", r"(?s)guard.*lock"),
    "lock_in_slots": (r"""
import threading
class Safe$:
    __slots__ = ("guard",)
    def __init__(self): self.guard = threading.Lock()
subject = [Safe$()]
""", r"(?s)\[0\]\.guard.*lock"),
    "lock_in_a_default": (r"""
import threading
def f$(x, guard=threading.Lock()): return x
subject = f$
""", r"(?s)guard.*lock"),
    "lock_in_a_partial": (r"""
import functools, threading
subject = functools.partial(print, 1, guard=threading.Lock())
""", r"(?s)guard.*lock"),
    "lock_in_a_bound_method": (r"""
import threading
class Safe$:
    def __init__(self): self.guard = threading.Lock()
    def use(self): return 1
subject = Safe$().use
""", r"(?s)\.guard.*lock"),
    "lock_as_global_of_a_helper": (r"""
import threading
guard$ = threading.Lock()
def helper$(): return guard$
class Uses$:
    def use(self): return helper$()
subject = [Uses$()]
""", r"(?s)guard$.*lock"),
    "thread": (r"""
import threading
subject = [threading.Thread(target=print)]
""", r"(?s)\[0\].*(lock|[Tt]hread)"),
    "socket": (r"""
import socket
subject = {"peer": socket.socket()}
""", r"(?s)\['peer'\].*socket"),
    "frame": (r"""
import sys
subject = [sys._getframe()]
""", r"(?s)\[0\].*frame"),
    "traceback": (r"""
import sys
def trace$():
    try:
        1 / 0
    except ZeroDivisionError:
        return sys.exc_info()[2]
subject = [trace$()]
""", r"(?s)\[0\].*traceback"),
    "objects_own_refusal": (r"""
class Proud$:
    def __reduce__(self): raise TypeError("I do not travel")
subject = [[Proud$()]]
""", r"(?s)\[0\]\[0\].*I do not travel"),
}

# Those with sets of their own data, whose bytes may follow the order of hashes.
WITH_SETS = {"sets", "weak_collections", "typed_dict"}

FEATURES = {name: source.replace("$", "_" + name) for name, source in FEATURES.items()}
REFUSED = {name: tuple(text.replace("$", "_" + name) for text in pair) for name, pair in REFUSED.items()}


def runs_here(snippet):
    """Whether a snippet's first line lets it run on this Python; else the reason, as a text that is false in `not`."""
    first = snippet.lstrip().partition("\n")[0]
    if first.startswith("# needs "):
        return sys.version_info >= tuple(map(int, first.split()[2].split(".")))
    return not (PYPY and first.startswith("# not PyPy"))


class Interpreters:
    """Fresh interpreters for the price of a fork: each runs one program as `__main__` and ends.

    They come from a process that has imported mirai and what mirai imports, and has loaded nothing.
    """

    CODE = """
        import mirai

        def serve():        # all that it needs is local: a child clears the globals, which are those of its program
            import gc, json, linecache, os, signal, sys, traceback
            scope = sys.modules["__main__"].__dict__
            requests, answers = sys.stdin, sys.stdout
            gc.collect()
            gc.freeze() if hasattr(gc, "freeze") else None
            for line in requests:
                name, program, limit = json.loads(line)
                read, write = os.pipe()
                pid = os.fork()
                if not pid:
                    status = 1
                    try:
                        signal.alarm(limit)
                        os.dup2(write, 1), os.dup2(write, 2)
                        sys.stdin = open(os.devnull)
                        for key in [k for k in scope if not k.startswith("__")]:
                            del scope[key]
                        linecache.cache[name] = len(program), None, program.splitlines(True), name
                        exec(compile(program, name, "exec"), scope)
                        status = 0
                    except BaseException:
                        traceback.print_exc()
                    finally:
                        sys.stdout.flush(), sys.stderr.flush()
                        os._exit(status)
                os.close(write)
                with open(read, encoding="utf-8", errors="replace") as output:
                    text = output.read()
                answers.write(json.dumps([os.waitpid(pid, 0)[1], text]) + "\\n")
                answers.flush()
        serve()
    """

    def __init__(self, hash_seed):
        env = {**os.environ, "PYTHONPATH": HERE, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": str(hash_seed),
               "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(self.CODE)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=env)

    def __call__(self, name, program):
        """Runs a program to its end: what it printed. An AssertionError with all that it said where it failed."""
        self.process.stdin.write(json.dumps([name, program, int(LONG)]) + "\n")
        self.process.stdin.flush()
        status, text = json.loads(self.process.stdout.readline())
        if status:
            raise AssertionError(f"{name} ended with {mirai.describe_exit(os.waitstatus_to_exitcode(status))}:\n{text}")
        return text

    def close(self):
        self.process.stdin.close()
        self.process.wait(LONG)
        self.process.stdout.close()


class TwoInterpreters(Case):
    """`here` and `there` differ in their hash seeds, and have a folder in common."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = tempfile.mkdtemp()
        cls.here, cls.there = Interpreters(1), Interpreters(2)
        cls.known = {}

    @classmethod
    def tearDownClass(cls):
        cls.here.close()
        cls.there.close()
        shutil.rmtree(cls.folder)
        super().tearDownClass()


class TestFeatureTable(TwoInterpreters):
    """Each feature sent by a process whose `__main__` defines it, to one that has never seen it nor any other.

    The two differ in their hash seeds. The test methods are made from the tables, below.
    """

    DUMP = "\nimport mirai\nwith open({!r}, 'wb') as file: file.write(mirai.dumps((check, subject)))\n"
    CHECK = "import mirai\nwith open({!r}, 'rb') as file: check, it = mirai.loads(file.read())\ncheck(it)\n"
    AGAIN = ("import mirai\nwith open({!r}, 'rb') as file: both = mirai.loads(file.read())\n"
             "with open({!r}, 'wb') as file: file.write(mirai.dumps(both))\n")
    REFUSE = ("\nimport mirai, pickle\ntry: mirai.dumps(subject)\n"
              "except (TypeError, pickle.PicklingError) as error: print(error)\nelse: print('it was serialized')\n")

    def dumped(self, name, interpreters=None):
        """The path of what a fresh interpreter made of a feature, and its bytes: once for each of the two."""
        interpreters = interpreters or self.here
        if (name, interpreters) not in self.known:
            path = os.path.join(self.folder, f"{name} {interpreters.process.pid}")
            interpreters(name, FEATURES[name] + self.DUMP.format(path))
            with open(path, "rb") as file:
                self.known[name, interpreters] = path, file.read()
        return self.known[name, interpreters]

    def carry(self, name):
        path, _ = self.dumped(name)
        self.there("a process that loads " + name, self.CHECK.format(path))

    def refuse(self, name):
        source, pattern = REFUSED[name]
        self.assertRegex(self.here(name, source + self.REFUSE), pattern)

    def test_each_snippet_holds_at_home(self):
        """Else a feature that fails to arrive would say nothing."""
        for name in filter(lambda name: runs_here(FEATURES[name]), FEATURES):
            with self.subTest(name):
                self.here(name, FEATURES[name] + "\ncheck(subject)\n")

    def test_the_bytes_do_not_depend_on_the_process(self):
        for name in sorted(FEATURES.keys() - WITH_SETS):
            if runs_here(FEATURES[name]):
                with self.subTest(name):
                    self.assertTrue(self.dumped(name)[1] == self.dumped(name, self.there)[1], "they differ")

    def test_functions_that_were_loaded_give_the_same_bytes_again(self):
        """What else an object holds need not: pickle tells one string from two that are equal."""
        for name in FEATURES:
            if runs_here(FEATURES[name]) and name.startswith(("lambda", "closure", "generator")):
                with self.subTest(name):
                    path, data = self.dumped(name)
                    again = path + ".again"
                    self.there("a process that loads " + name, self.AGAIN.format(path, again))
                    with open(again, "rb") as file:
                        self.assertTrue(file.read() == data, "they differ")

    def test_the_interpreters_know_nothing_of_each_other(self):
        """Of this test's own means: a fork that kept anything would hide what does not travel."""
        self.there("one", "import xml.etree.ElementTree\nleft = 1\nimport mirai\nmirai.left = 1\n")
        program = "import sys\nassert 'left' not in globals()\nassert 'xml' not in sys.modules\n" \
                  "import mirai\nassert not hasattr(mirai, 'left')\nprint(__name__)\n"
        self.assertEqual(self.there("another", program), "__main__\n")
        with self.assertRaisesRegex(AssertionError, "(?s)ended with .*line 2.*ZeroDivisionError"):
            self.there("a third", "x = 0\n1 / x\n")


def _add_table_tests():
    def method(work, name):
        return lambda self: getattr(self, work)(name)
    for name, source in FEATURES.items():
        test = unittest.skipUnless(runs_here(source), source.strip().partition("\n")[0])(method("carry", name))
        setattr(TestFeatureTable, f"test_{name}_arrives", test)
    for name in REFUSED:
        setattr(TestFeatureTable, f"test_{name}_is_refused_by_path", method("refuse", name))


_add_table_tests()


class TestObjectGraphs(TwoInterpreters):
    """Random graphs of everything that can hold something else, shared nodes and cycles included, sent to a process
    that has only mirai: there and on the way home they must be the same graph, in values and in who is whom."""

    GRAPHS = 400

    # What both sides run. The host's `__main__` defines the classes; the other side gets `outline` with the graphs.
    MAKER = """
import functools, random, sys, types

class Loose:
    kinds = 0
    def step(self, *args): return self, args
    def __call__(self): return "called"

class Tight:
    __slots__ = ("left", "right")
    def step(self): return getattr(self, "left", None)

class Mixed(Tight):
    note = ("class", [1])

class Own(list):
    def last(self): return self[-1]

class Table(dict):
    pass

class Keeps:                    # has its own ideas of its state
    def __init__(self): self.inner = []
    def __getstate__(self): return ("state", self.inner)
    def __setstate__(self, state): self.inner = state[1]

class Broken(Exception):
    pass

def closure(*kept):
    one, rest = kept[0], kept[1:]
    def inner(extra=None):
        return one, rest, extra
    return inner

def knot():
    def me(): return me, them
    them = [me]
    return me

def make_class(chance, nodes):
    name = f"Made{chance.randrange(1000)}"
    return type(name, (chance.choice([object, Loose]),), {"payload": chance.choice(nodes), "number": len(nodes)})

LEAVES = [None, True, 0, -1, 2 ** 70, 1.5, float("inf"), 2j, "", "text", "\\u00fc\\ud800", b"", b"bytes", ..., len, int,
          range(3), frozenset(), (), sys.maxsize, NotImplemented, "text" * 50, b"x" * 300]

def make_graph(seed, size, home=False):
    '''A random graph: nodes hold earlier ones, then those that can change get links to any, and so cycles arise.

    home: one that can be compared after it came home, where classes are those that it left: with what they hold.
    '''
    chance = random.Random(seed)
    nodes = [[], {}, Loose()] + chance.sample(LEAVES, 3)
    hashable = [1, "key", (), Loose()]
    def pick(k=3): return [chance.choice(nodes) for _ in range(chance.randrange(k + 1))]
    for _ in range(size):
        kind = chance.randrange(22)
        if kind == 0: new = pick(5)
        elif kind == 1: new = {chance.choice(hashable): x for x in pick(4)}
        elif kind == 2: new = tuple(pick(3))
        elif kind == 3: new = set(chance.sample(hashable[:2], chance.randrange(3)))
        elif kind == 4: new = frozenset([chance.choice(hashable)])
        elif kind == 5: new = bytearray(chance.randrange(256) for _ in range(chance.randrange(5)))
        elif kind == 6: new = Loose()
        elif kind == 7: new = Tight()
        elif kind == 8: new = Mixed()
        elif kind == 9: new = Own(pick(2))
        elif kind == 10: new = Table({i: x for i, x in enumerate(pick(2))})
        elif kind == 11: new = Keeps()
        elif kind == 12: new = closure(*(pick(3) or [None]))
        elif kind == 13: new = knot()
        elif kind == 14: new = chance.choice([Loose().step, Own(pick(2) or [1]).last] + [Loose.step] * (not home))
        elif kind == 15: new = functools.partial(closure, *pick(2), **{"k": 1} if chance.random() < 0.3 else {})
        elif kind == 16: new = Broken(*pick(2))
        elif kind == 17: new = make_class(chance, LEAVES if home else nodes)
        elif kind == 18: new = chance.choice([n for n in nodes if isinstance(n, type)] or [Loose])()
        elif kind == 19: new = types.SimpleNamespace(x=chance.choice(nodes))
        elif kind == 20: new = types.MethodType(closure, chance.choice(nodes[:3]))
        else: new = chance.choice(LEAVES)
        nodes.append(new)
        if isinstance(new, (Loose, tuple)):
            try:
                hash(new)
            except TypeError:           # it holds something that can change
                continue
            hashable.append(new)
    for node in nodes:              # the links back: what can be changed gets some to any node
        for _ in range(chance.randrange(3)):
            other = chance.choice(nodes)
            if isinstance(node, list): node.append(other)
            elif isinstance(node, dict): node[chance.choice(hashable)] = other
            elif isinstance(node, set) and isinstance(other, Loose): node.add(other)
            elif isinstance(node, (Loose, types.SimpleNamespace, Broken)): setattr(node, chance.choice("abc"), other)
            elif isinstance(node, Tight): setattr(node, chance.choice(["left", "right"]), other)
            elif isinstance(node, Keeps): node.inner.append(other)
            elif isinstance(node, types.FunctionType) and "<locals>" in node.__qualname__:     # no class's own
                if chance.random() < 0.5: setattr(node, "mark", other)
                else: node.__defaults__ = (other,) if node.__defaults__ else node.__defaults__
            elif isinstance(node, type) and node.__name__.startswith("Made"):
                setattr(node, "later", chance.choice(LEAVES) if home else other)
    chance.shuffle(nodes)
    return nodes
"""

    # A canonical text of a graph: nodes are numbered as they are first met, and a node met again is its number.
    OUTLINE = """
def outline(root):
    import types
    numbers, held, lines, todo = {}, [], [], [root]
    atoms = (type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented))
    def name(x):
        if type(x) in atoms:
            return repr(x)
        if isinstance(x, types.BuiltinFunctionType):
            return x.__qualname__
        if isinstance(x, type) and x.__module__ == "builtins":
            return "class " + x.__name__
        if type(x) in (tuple, frozenset) and not x:
            return repr(x)          # one object or several: an interpreter may have either
        if id(x) not in numbers:
            numbers[id(x)] = len(numbers)
            held.append(x)          # else a bound method made here could give its id to the next
            todo.append(x)
        return f"#{numbers[id(x)]}"
    def key(x):                     # of what has no order: values that say themselves, then what they hold
        if isinstance(x, tuple):
            return "(" + ",".join(key(y) for y in x) + ")"
        return repr(x) if type(x) in atoms else type(x).__name__
    def parts(x):
        if isinstance(x, dict):
            for k, v in x.items():
                yield name(k) + "=" + name(v)
        if isinstance(x, (list, tuple)):
            yield from map(name, x)
        if isinstance(x, (set, frozenset)):
            # members that look alike can't be told apart by what they look like: those met elsewhere come first
            for y in sorted(x, key=lambda y: (key(y), numbers.get(id(y), 1 << 30))):
                yield name(y)
        if isinstance(x, bytearray):
            yield repr(x)
        if isinstance(x, types.FunctionType):
            yield f"{x.__module__} {x.__qualname__} {x.__code__.co_name}"
            for cell in x.__closure__ or ():
                yield "cell " + name(cell)
            yield name(x.__defaults__)
        if isinstance(x, types.CellType):
            yield name(x.cell_contents)
        if isinstance(x, types.MethodType):
            yield name(x.__func__)
            yield name(x.__self__)
        if isinstance(x, type):
            yield x.__qualname__
            yield from map(name, x.__bases__)
            for k in ("payload", "later", "number", "note"):
                if k in vars(x):
                    yield k + "=" + name(vars(x)[k])
        elif hasattr(type(x), "func"):                  # a partial
            yield from map(name, (x.func, x.args, x.keywords))
        if isinstance(x, BaseException):
            yield name(x.args)
        for slot in ("left", "right"):
            if not isinstance(x, type) and hasattr(type(x), "left") and hasattr(x, slot):
                yield slot + "=" + name(getattr(x, slot))
        if hasattr(x, "__dict__") and not isinstance(x, (type, types.MethodType)):
            for k, v in sorted(x.__dict__.items(), key=lambda item: item[0]):
                yield "." + k + "=" + name(v)
    name(root)
    while todo:                     # breadth first, and no recursion: graphs may be deep
        x = todo.pop(0)
        kind = type(x)
        of = kind.__name__ if kind.__module__ in ("builtins", "functools", "types") else name(kind)
        lines.append(f"{name(x)}: {of} " + " ".join(parts(x)))
    return "\\n".join(lines)
"""

    SEND = """
import json, mirai
makings = [(seed, 3 + seed % 40) for seed in range({first}, {last})]
wanted = []
with open({path!r}, "wb") as file:
    for seed, size in makings:
        graph = make_graph(seed, size)
        before = outline(graph)
        data = mirai.dumps((outline, graph))
        assert outline(graph) == before, f"seed {{seed}}: dumping changed the graph"
        wanted.append(before)
        file.write(len(data).to_bytes(8, "little") + data)
with open({path!r} + ".json", "w") as file:
    json.dump(wanted, file)
"""

    READ = """
def messages(path):
    with open(path, "rb") as file:
        while True:
            size = file.read(8)
            if not size:
                return
            yield file.read(int.from_bytes(size, "little"))
"""

    COMPARE = """
import json, mirai
with open({path!r} + ".json") as file:
    wanted = json.load(file)
bad = []
with open({path!r} + ".back", "wb") as back:
    for seed, data in enumerate(messages({path!r}), {first}):
        try:
            outline, graph = mirai.loads(data)
            got = outline(graph)
            again = mirai.dumps(graph)
        except Exception as error:
            bad.append(seed)
            print(f"seed {{seed}}: {{type(error).__name__}}: {{error}}")
            continue
        expected = wanted[seed - {first}]
        if got != expected:
            bad.append(seed)
            pairs = zip(expected.split("\\n") + ["(end)"], got.split("\\n") + ["(end)"])
            here, there = next((a, b) for a, b in pairs if a != b)
            print(f"seed {{seed}}: sent {{here}}\\n  arrived {{there}}")
        back.write(len(again).to_bytes(8, "little") + again)
print("bad:", *bad)
"""

    HOME = """
import mirai
graphs = [make_graph(seed, 3 + seed % 40, home=True) for seed in range({first}, {last})]
wanted = [outline(graph) for graph in graphs]
def give_back(x): return x
with mirai.daemons(1):
    came = [mirai.mirai(give_back, graph) for graph in graphs]
    came = [m.result(60) for m in came]
fixed = Loose, Tight, Mixed, Own, Table, Keeps, Broken
for seed, (graph, copy, text) in enumerate(zip(graphs, came, wanted), {first}):
    assert outline(copy) == text, f"seed {{seed}} came home as another graph"
    for sent, back in zip(graph, copy):
        if type(sent) in fixed or isinstance(sent, type):
            assert back is sent if isinstance(sent, type) else type(back) is type(sent), f"seed {{seed}}: {{sent}}"
    assert outline(graph) == text, f"seed {{seed}}: what came home changed what was sent"
print("all")
"""

    def test_random_graphs_arrive_as_they_are(self):
        for first in range(0, self.GRAPHS, 100):
            path = os.path.join(self.folder, f"from {first}")
            names = {"path": path, "first": first, "last": first + 100}
            self.here("the maker of graphs", self.MAKER + self.OUTLINE + self.SEND.format(**names))
            output = self.there("a process that loads graphs", self.READ + self.COMPARE.format(**names))
            with self.subTest(f"seeds from {first}"):
                self.assertTrue(output.endswith("bad:\n"), output[-4000:])

    def test_random_graphs_come_home_as_instances_of_the_classes_here(self):
        program = self.MAKER + self.OUTLINE + self.HOME.format(first=1000, last=1000 + self.GRAPHS // 4)
        done = run_python(program, timeout=2 * LONG)
        self.assertEqual(done.stdout.strip(), "all", done.stderr[-3000:])

    def test_the_outline_tells_graphs_apart(self):
        """Of this test's own means: what it compares by must see who is whom."""
        scope = {}
        exec(self.OUTLINE, scope)
        outline = scope["outline"]
        one, loop = [], []
        loop.append(loop)
        pairs = [([one, one], [[], []]), (loop, [[]]), ([1], [2]), ([1], (1,)), ({1: 2}, {1: 3}), ([True], [1]),
                 ([one, [one]], [one, [[]]]), ({1, 2}, {1, 3}), ([[1], [2]], [[2], [1]]), ([1.0], [1]),
                 (functools.partial(len, 1), functools.partial(len, 2)),
                 (types.SimpleNamespace(a=1), types.SimpleNamespace(b=1)), (bytearray(b"a"), bytearray(b"b"))]
        for a, b in pairs:
            self.assertNotEqual(outline(a), outline(b))
        self.assertEqual(outline([one, {1: loop}]), outline([[], {1: loop}]))


class TestCustomSerialization(Case):
    """register_serial() and serial_config(): for types that pickle can't carry. What is registered
    stays; the tests alone forget it."""

    def tearDown(self):
        mirai._registered.clear()
        super().tearDown()

    @staticmethod
    def make_type():
        """A type that can't be pickled, and its hooks."""
        class Till:
            made = 0

            def __init__(self, total):
                self.total, self.lock = total, threading.Lock()

            def add(self, n):
                with self.lock:
                    self.total += n
                return self

        return Till, lambda till: str(till.total).encode(), lambda data: Till(int(data))

    def registered(self):
        Till, sfunc, ufunc = self.make_type()
        mirai.register_serial(Till, sfunc, ufunc)
        return Till

    # dumps and loads

    def test_without_hooks_such_a_type_is_refused(self):
        Till, *_ = self.make_type()
        with self.assertRaisesRegex((TypeError, pickle.PicklingError), "lock"):
            mirai.dumps(Till(1))

    def test_a_registered_type_goes_through_its_hooks(self):
        Till = self.registered()
        till = Till(5)
        copy = mirai.loads(mirai.dumps(till))
        self.assertIsNot(copy, till)
        self.assertEqual((type(copy), copy.add(2).total, till.total), (Till, 7, 5))

    def test_it_goes_wherever_it_is_held(self):
        Till = self.registered()
        till = Till(3)
        holder = types.SimpleNamespace(till=till)
        held = [till, {"key": (till,)}, lambda: till, functools.partial(till.add, 1), holder]
        copies = mirai.loads(mirai.dumps(held))
        first = copies[0]
        self.assertIs(copies[1]["key"][0], first)       # one object is one object
        self.assertIs(copies[2](), first)
        self.assertIs(copies[4].till, first)
        self.assertIs(copies[3](), first)
        self.assertEqual(first.total, 4)

    def test_the_class_itself_still_goes_as_a_class(self):
        Till = self.registered()
        self.assertIs(mirai.loads(mirai.dumps(Till)), Till)
        self.assertEqual(mirai.loads(mirai.dumps({"cls": Till}))["cls"], Till)

    def test_its_subclasses_go_through_its_hooks(self):
        Till, _, ufunc = self.make_type()
        mirai.register_serial(Till, lambda till: f"{type(till).__name__} {till.total}".encode(), bytes.decode)

        class Drawer(Till):
            pass

        class Box(Drawer):
            pass
        for cls in (Till, Drawer, Box):
            self.assertEqual(mirai.loads(mirai.dumps(cls(2))), f"{cls.__name__} 2")

    def test_the_nearest_registered_class_decides(self):
        Till = self.registered()

        class Drawer(Till):
            pass

        class Box(Drawer):
            pass
        mirai.register_serial(Drawer, lambda drawer: b"drawer", bytes.decode)
        self.assertEqual([mirai.loads(mirai.dumps(x)) for x in (Drawer(1), Box(1))], ["drawer"] * 2)
        self.assertEqual(mirai.loads(mirai.dumps(Till(1))).total, 1)

    def test_what_is_registered_last_holds(self):
        Till = self.registered()
        self.assertEqual(mirai.loads(mirai.dumps(Till(1))).total, 1)
        mirai.register_serial(Till, lambda till: b"second", bytes.decode)
        self.assertEqual(mirai.loads(mirai.dumps(Till(1))), "second")

    def test_hooks_come_before_what_pickle_would_do(self):
        class Point:
            def __init__(self, x):
                self.x = x

            def __reduce__(self):
                return str, ("by pickle",)
        mirai.register_serial(Point, lambda p: bytes([p.x]), lambda data: Point(data[0] + 1))
        self.assertEqual(mirai.loads(mirai.dumps([Point(4)]))[0].x, 5)

    def test_hooks_of_a_builtin_subclass(self):
        class Words(list):
            pass
        mirai.register_serial(Words, lambda words: " ".join(words).encode(), lambda data: Words(data.decode().split()))
        copy = mirai.loads(mirai.dumps({"w": Words(["a", "b"]), "l": ["c"]}))
        self.assertEqual((type(copy["w"]), copy["w"], type(copy["l"])), (Words, ["a", "b"], list))

    def test_hooks_may_give_any_bytes(self):
        class Blob:
            def __init__(self, data):
                self.data = data
        mirai.register_serial(Blob, lambda blob: blob.data, Blob)
        for data in (b"", b"\x00" * 10, bytes(range(256)), os.urandom(1 << 20)):
            self.assertEqual(mirai.loads(mirai.dumps([Blob(data)]))[0].data, data)

    def test_sequences_register_several(self):
        A, sa, ua = self.make_type()
        B, sb, ub = self.make_type()
        for make in (list, tuple):
            mirai.register_serial(make([A, B]), make([sa, lambda b: b"-" + sb(b)]), make([ua, ub]))
            copies = mirai.loads(mirai.dumps([A(1), B(2)]))
            self.assertEqual([(type(x), x.total) for x in copies], [(A, 1), (B, -2)])

    def test_what_was_dumped_needs_no_registration_elsewhere(self):
        """A script's own type, its own hooks: a process that knows neither has what is needed in the bytes."""
        here, there = Interpreters(1), Interpreters(2)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "data")
            try:
                here("a script that registers", textwrap.dedent("""
                    import threading
                    import mirai
                    unit = "eur"
                    class Till:
                        def __init__(self, total): self.total, self.lock = total, threading.Lock()
                    def write(till): return f"{till.total} {unit}".encode()
                    def read(data): return Till(data.decode().split())
                    mirai.register_serial(Till, write, read)
                    with open(%r, "wb") as file: file.write(mirai.dumps([Till(5)]))
                """) % path)
                self.assertEqual(there("a process that loads", textwrap.dedent("""
                    import mirai
                    with open(%r, "rb") as file: till, = mirai.loads(file.read())
                    with till.lock: print(type(till).__name__, till.total)
                """) % path), "Till ['5', 'eur']\n")
            finally:
                here.close()
                there.close()

    # in tasks

    def test_a_registered_type_is_an_argument_and_a_result(self):
        Till = self.registered()
        with daemons(2):
            result = mirai.mirai(lambda till, more: [till.add(1), more["x"].add(2)], Till(1), more={"x": Till(10)})
            self.assertEqual([(type(x), x.total) for x in result.result(LONG)], [(Till, 2), (Till, 12)])
            self.assertEqual([x.total for x in mirai_map([Till(i) for i in range(6)], lambda t: t.add(1)).results()],
                             [1, 2, 3, 4, 5, 6])

    def test_a_result_that_only_the_daemon_had_goes_through_the_hooks(self):
        Till = self.registered()
        with daemons(1):
            self.assertEqual([type(x) for x in mirai.mirai(lambda: [Till(1)]).result(LONG)], [Till])
            self.assertEqual(mirai.mirai(lambda: Till(4).add(1)).result(LONG).total, 5)

    def test_an_open_file_goes_by_its_path(self):
        class Log:
            def __init__(self, path):
                self.file = open(path)

        def read(data):
            return Log(data.decode())
        mirai.register_serial(Log, lambda log: log.file.name.encode(), read)
        with tempfile.NamedTemporaryFile("w") as file, daemons(1):
            file.write("one line")
            file.flush()
            log = Log(file.name)
            try:
                self.assertEqual(mirai.mirai(lambda log: log.file.read(), log).result(LONG), "one line")
            finally:
                log.file.close()

    def test_a_configuration_holds_for_its_profile(self):
        Till, sfunc, ufunc = self.make_type()
        with daemons(2, serial=mirai.serial_config(Till, sfunc, ufunc)), daemons(1, compute="mirai-test-plain"):
            result = mirai.mirai(lambda till: [till.add(1)], Till(5), _compute="default").result(LONG)
            self.assertEqual((type(result[0]), result[0].total), (Till, 6))
            self.assertEqual(mirai.mirai(lambda: Till(7), _compute="default").result(LONG).total, 7)
            with self.assertRaisesRegex(TypeError, r"args\[0\].*lock"):
                mirai.mirai(lambda till: till, Till(5))
            with self.assertRaisesRegex((TypeError, pickle.PicklingError), "lock"):
                mirai.dumps(Till(5))
        with daemons(1), self.assertRaisesRegex(TypeError, r"args\[0\].*lock"):
            mirai.mirai(lambda till: till, Till(5))

    def test_a_configuration_of_several_types(self):
        A, sa, ua = self.make_type()
        B, sb, ub = self.make_type()
        config = mirai.serial_config([A, B], [sa, sb], [ua, lambda data: ub(data + b"0")])
        with daemons(1, serial=config):
            result = mirai.mirai(lambda *tills: list(tills), A(1), B(2)).result(LONG)
        self.assertEqual([(type(x), x.total) for x in result], [(A, 1), (B, 200)])   # 20 there, and once more home

    def test_a_configuration_comes_before_what_is_registered(self):
        Till = self.registered()
        config = mirai.serial_config(Till, lambda till: b"configured", bytes.decode)
        with daemons(1, serial=config):
            self.assertEqual(mirai.mirai(lambda x: x, Till(1)).result(LONG), "configured")
        with daemons(1):
            self.assertEqual(mirai.mirai(lambda x: x.total, Till(1)).result(LONG), 1)

    # hooks that fail

    def refusal(self, sfunc):
        Till, _, ufunc = self.make_type()
        mirai.register_serial(Till, sfunc, ufunc)
        with self.assertRaises((TypeError, pickle.PicklingError)) as alone:
            mirai.dumps([Till(1)])
        with daemons(1):
            with self.assertRaises(TypeError) as sent:
                mirai.mirai(len, [0, Till(1)])
            returned = mirai.mirai(lambda: [Till(1)])
            returned.exception(LONG)
            self.assertIsInstance(returned.data, MiraiError)
            self.assertEqual(mirai.mirai(len, "ab").result(LONG), 2)        # and nobody is the worse for it
        self.assertIn("args[0][1]", str(sent.exception))
        return [str(error) for error in (alone.exception, sent.exception, returned.data)]

    def test_a_hook_that_gives_no_bytes_is_told_so_with_its_class(self):
        for made in ("text", 5, None, [b"x"]):
            with self.subTest(repr(made)):
                for text in self.refusal(lambda till: made):
                    self.assertRegex(text, r"(?s)Till.*bytes")
                    self.assertIn(type(made).__name__, text)

    def test_a_hook_that_raises_is_told_in_its_words(self):
        def sfunc(till):
            raise ValueError("the till is locked")
        for text in self.refusal(sfunc):
            self.assertIn("the till is locked", text)
            self.assertIn("Till", text)

    def test_a_hook_that_raises_on_the_other_side_is_an_error_value(self):
        Till, sfunc, _ = self.make_type()

        def ufunc(data):
            raise ValueError("no such till: " + data.decode())
        mirai.register_serial(Till, sfunc, ufunc)
        with self.assertRaisesRegex(Exception, "no such till: 3"):
            mirai.loads(mirai.dumps(Till(3)))
        with daemons(1):
            for failed in (mirai.mirai(lambda till: till, Till(5)), mirai.mirai(lambda: Till(5))):
                failed.exception(LONG)
                self.assertIsInstance(failed.data, MiraiError)
                self.assertIn("no such till: 5", str(failed.data))
            self.assertEqual(mirai.mirai(len, "ab").result(LONG), 2)

    # wrong arguments

    def test_wrong_arguments_are_refused_at_once(self):
        A, sa, ua = self.make_type()
        B, sb, ub = self.make_type()
        wrong = [("A", sa, ua), (A(1), sa, ua), (None, sa, ua), (A, None, ua), (A, sa, "ua"), (A, b"", ua),
                 ([A, "B"], [sa, sb], [ua, ub]), ([A, B], [sa], [ua, ub]), ([A], [sa], [ua, ub]),
                 ([A, B], [sa, sb], [ua]), ([A, B], sa, ua), (A, [sa], [ua]), ([A, B], [sa, None], [ua, ub]),
                 ([A, B], [sa, sb], [ua, 5])]
        for call in (mirai.serial_config, mirai.register_serial):
            for arguments in wrong:
                with self.subTest(call.__name__, arguments=arguments), self.assertRaises((TypeError, ValueError)):
                    call(*arguments)
            for arguments in ((), (A,), (A, sa)):
                with self.subTest(call.__name__, arguments=arguments), self.assertRaises(TypeError):
                    call(*arguments)
        with self.assertRaisesRegex((TypeError, pickle.PicklingError), "lock"):      # nothing of it took effect
            mirai.dumps(A(1))

    def test_daemons_take_a_configuration_only(self):
        Till, sfunc, ufunc = self.make_type()
        for wrong in (5, "serial", Till, (Till, sfunc)):
            with self.subTest(repr(wrong)), self.assertRaises((TypeError, ValueError)):
                daemons(1, serial=wrong)
        self.assertFalse(mirai.daemons_set())

    def test_a_configuration_registers_nothing(self):
        Till, sfunc, ufunc = self.make_type()
        mirai.serial_config(Till, sfunc, ufunc)
        with self.assertRaisesRegex((TypeError, pickle.PicklingError), "lock"):
            mirai.dumps(Till(1))


# -- 6. Task and outcome


def task_here(f, args=(), kwargs={}, path=None):
    """A task as a daemon has it, and in this process what it was sent ahead of it."""
    needs, parts = mirai.dump_task(f, args, kwargs, path)
    for hash, definition in needs.items():
        mirai.receive_definition(hash, b"".join(definition) if isinstance(definition, list) else definition)
    return b"".join(parts)


def evaluated(f, /, *args, **kwargs):
    """What a task comes back as when it goes there and back within this process: a value and True, or an error."""
    return mirai.load_outcome(mirai.evaluate(task_here(f, args, kwargs)))


class Reduced:
    """Pickles to a call of `f`, which so runs where this is unpickled."""

    def __init__(self, f, *args):
        self.how = f, args

    def __reduce__(self):
        return self.how


class Refusing:
    """Raises `error` when it is pickled."""

    def __init__(self, error):
        self.error = error

    def __reduce__(self):
        raise self.error


class TestTask(Case):
    def failed(self, f, /, *args, **kwargs):
        error, success = evaluated(f, *args, **kwargs)
        self.assertFalse(success)
        self.assertIsInstance(error, MiraiError)
        return error

    def raised(self, error):
        def f():
            raise error
        return self.failed(f)

    # values

    def test_a_value_comes_back(self):
        for value in (42, None, [1, {"a": (2.5, b"x")}], mirai.UNRESOLVED, {1, 2}):
            self.assertEqual(evaluated(lambda x: x, value), (value, True))
        self.assertEqual(evaluated(lambda a, *, b: a - b, 5, b=3), (2, True))

    def test_an_error_that_is_returned_is_a_value(self):
        value, success = evaluated(lambda: ValueError("mine"))
        self.assertTrue(success)
        self.assertEqual((type(value), value.args), (ValueError, ("mine",)))
        value, success = evaluated(lambda: MiraiError("mine"))
        self.assertEqual((type(value), success), (MiraiError, True))

    def test_a_task_finds_what_its_host_finds(self):
        before = sys.path[:]
        try:
            payload = task_here(lambda: __import__("sys").path[-1], path=[*before, "a folder of the host"])
            self.assertEqual(mirai.load_outcome(mirai.evaluate(payload)), ("a folder of the host", True))
        finally:
            sys.path[:] = before

    # source text

    def test_the_value_of_source_is_that_of_its_last_expression(self):
        for source, value in [("1 + 1", 2), ("x = 1\nx + 1", 2), ("import math\nmath.floor(2.5)  # a comment\n\n", 2),
                              ("'text'", "text"), ("(1,\n 2)", (1, 2)), ("x = 5; x", 5)]:
            with self.subTest(source):
                self.assertEqual(evaluated(source), (value, True))

    def test_source_that_ends_in_a_statement_gives_none(self):
        for source in ("", "x = 1", "1\nx = 2", "if True:\n    5", "def f(): return 1", "# nothing"):
            with self.subTest(source):
                self.assertEqual(evaluated(source), (None, True))

    def test_keyword_arguments_are_names_in_source(self):
        self.assertEqual(evaluated("a * b", a=6, b=7), (42, True))
        self.assertEqual(evaluated("[x * k for x in range(3)]", k=2), ([0, 2, 4], True))
        self.assertEqual(evaluated("f(2)", f=lambda x: x + 1), (3, True))

    def test_functions_of_source_see_its_names_and_themselves(self):
        self.assertEqual(evaluated("def f(n):\n    return n * f(n - 1) if n else start\nf(4)", start=2), (48, True))
        self.assertEqual(evaluated("class A:\n    def other(self): return A\nA().other() is A"), (True, True))

    def test_source_leaves_no_names_to_the_next(self):
        self.assertEqual(evaluated("left_by_test = 1\nleft_by_test"), (1, True))
        self.assertEqual(self.failed("left_by_test").condition_class[0], "NameError")

    def test_source_inherits_no_future_of_this_file(self):
        self.assertEqual(evaluated("def f(a: int): pass\nf.__annotations__['a'] is int"), (True, True))
        source = "from __future__ import annotations\ndef f(a: int): pass\nf.__annotations__['a']"
        self.assertEqual(evaluated(source), ("int", True))

    def test_what_is_no_python_is_a_syntax_error_at_once(self):
        for source in ("1 +", "def", "return 1", "a b", "  x = 1\n y = 2"):
            with self.subTest(source), self.assertRaises(SyntaxError):
                mirai.check_source(source)
        mirai.check_source("def f(a: int): return a\nf(1)")

    def test_the_traceback_of_source_shows_its_lines(self):
        error = self.failed("def f(x):\n    return int(x)    # here it breaks\nf('twelve')")
        self.assertIn("return int(x)    # here it breaks", error.stack_trace)
        self.assertIn("f('twelve')", error.stack_trace)

    # exceptions

    def test_an_exception_comes_back_as_an_error_value(self):
        def f(x):
            return int(x)
        error = self.failed(f, "twelve")
        text = "invalid literal for int() with base 10: 'twelve'"
        self.assertEqual(error.args, (f"ValueError: {text}",))
        self.assertEqual(error.condition_class, ("ValueError", "Exception", "BaseException"))
        self.assertEqual((type(error.original), error.original.args), (ValueError, (text,)))
        self.assertTrue(error.stack_trace.rstrip().endswith(f"ValueError: {text}"))
        self.assertIn("in f\n", error.stack_trace)

    def test_class_names_outside_builtins_have_their_module(self):
        self.assertEqual(self.raised(json.JSONDecodeError("no", "", 0)).condition_class[:2],
                         ("json.decoder.JSONDecodeError", "ValueError"))

    def test_what_would_end_a_process_ends_a_task(self):
        for cls in (SystemExit, GeneratorExit):
            with self.subTest(cls.__name__):
                error = self.raised(cls(3))
                self.assertEqual((type(error), error.condition_class[0], error.original), (MiraiError, cls.__name__, None))
        self.assertEqual(self.failed(sys.exit, 3).condition_class[0], "SystemExit")

    def test_an_interrupt_within_a_task_is_a_mirai_interrupt(self):
        for cls in (KeyboardInterrupt, mirai._Interrupted):
            error = self.raised(cls())
            self.assertEqual((type(error), error.code, error.original), (MiraiInterrupt, 1, None))
            self.assertIn("KeyboardInterrupt", error.condition_class)

    def test_a_stop_iteration_ends_nobody_who_waits(self):
        error = self.failed(next, iter(()))
        self.assertEqual((error.condition_class[0], error.original), ("StopIteration", None))

    def test_a_stop_async_iteration_comes_back(self):
        self.assertEqual(self.raised(StopAsyncIteration()).condition_class[0], "StopAsyncIteration")

    def test_an_exception_of_a_script_comes_back_as_its_own_class(self):
        class Broken(Exception):
            pass
        error = self.failed(lambda: (_ for _ in ()).throw(Broken("no", 1)))
        self.assertEqual((type(error.original), error.original.args), (Broken, ("no", 1)))
        self.assertTrue(error.condition_class[0].endswith("Broken"))

    def test_an_exception_that_can_not_be_rebuilt_is_told_in_texts(self):
        class Demanding(Exception):
            def __init__(self, a, b):
                super().__init__(f"{a} and {b}")

            def __setstate__(self, state):
                raise ValueError("not again")

        def f():
            error = Demanding(1, 2)
            error.a = 1
            raise error
        error = self.failed(f)
        self.assertIsNone(error.original)
        self.assertTrue(error.args[0].endswith("Demanding: 1 and 2"), error.args)
        self.assertTrue(error.condition_class[0].endswith("Demanding"))
        self.assertIn("raise error", error.stack_trace)

    def test_an_exception_that_has_no_text_still_comes_back(self):
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("no text")

        class Odd(Exception):
            def __str__(self):
                return 1
        for cls in (Mute, Odd):
            error = self.raised(cls())
            self.assertIn(cls.__name__, error.args[0])
            self.assertIn("can't be shown", error.args[0])
            self.assertIn("in f\n", error.stack_trace)

    def test_attributes_are_kept_save_those_that_can_not_travel(self):
        error = ValueError("no")
        error.level, error.lock, error.refusing = [1, 2], threading.Lock(), Refusing(ValueError())
        back = self.raised_here(error)
        self.assertEqual((back.attributes, back.level), ({"level": [1, 2]}, [1, 2]))
        self.assertEqual((type(back.original), back.original.level), (ValueError, [1, 2]))      # what `except` catches

    def raised_here(self, error):
        """As `raised`, for an error that could not be sent: it need not be part of the task."""
        return mirai.load_outcome(mirai.dump_failure(error))[0]

    def test_an_attribute_that_can_not_be_rebuilt_is_dropped(self):
        error = ValueError("no")
        error.level, error.bomb = 1, Reduced(int, "twelve")
        self.assertEqual(self.raised_here(error).attributes, {"level": 1})

    def test_the_traceback_begins_in_the_users_code(self):
        def files(error):
            return re.findall('File "(.*?)"', error.stack_trace)

        def f():
            raise ValueError("no")
        self.assertEqual(files(self.failed(f)), [os.path.abspath(f.__code__.co_filename)])
        self.assertNotEqual(files(self.failed(json.loads, "{"))[0], FILE)
        self.assertNotEqual(files(self.failed(print, Reduced(f)))[0], FILE)
        self.assertNotIn(FILE, self.failed("1 / 0").stack_trace)

    def test_the_traceback_shows_the_cause(self):
        def f():
            try:
                int("twelve")
            except ValueError as error:
                raise KeyError("number") from error
        self.assertRegex(self.failed(f).stack_trace, "(?s)ValueError: .*direct cause.*KeyError: 'number'")

    def test_endless_recursion_is_an_error_value(self):
        def f():
            return f()
        error = self.failed(f)
        self.assertEqual(error.condition_class[0], "RecursionError")
        self.assertLess(len(error.stack_trace), 20000)

    # what does not survive the trip

    def test_a_task_that_can_not_be_rebuilt_there_is_an_error_value(self):
        error = self.failed(print, Reduced(int, "twelve"))
        self.assertEqual(error.condition_class[0], "ValueError")
        self.assertEqual(self.failed(print, Reduced(sys.exit, 3)).condition_class[0], "SystemExit")
        self.assertIsInstance(mirai.load_outcome(mirai.evaluate(b"garbage"))[0], MiraiError)

    def test_a_result_that_can_not_be_sent_names_the_path(self):
        def f():
            import threading
            return {"a": [1, threading.Lock()]}
        error = self.failed(f)
        self.assertRegex(error.args[0], r"the result can't be sent back: result\['a'\]\[1\]: .*lock")
        self.assertEqual(error.condition_class[0], "TypeError")

    def test_a_result_whose_pickling_raises_is_an_error_value(self):
        for cls in (ValueError, SystemExit, KeyboardInterrupt):
            with self.subTest(cls.__name__):
                self.assertFalse(evaluated(lambda cls: Refusing(cls("no")), cls)[1])

    def test_an_exception_whose_text_or_pickling_exits_is_an_error_value(self):
        class Quitting(Exception):
            def __str__(self):
                sys.exit(1)

        class Leaving(Exception):
            def __reduce__(self):
                sys.exit(1)
        for cls in (Quitting, Leaving):
            with self.subTest(cls.__name__):
                try:
                    error = self.raised_here(cls())
                except SystemExit:
                    self.fail("SystemExit came out of where outcomes are made: the daemon would be gone")
                self.assertIn(cls.__name__, error.condition_class[0])

    def test_a_result_nested_too_deeply_is_an_error_value_soon_and_in_few_words(self):
        def f(levels):
            deep = []
            for _ in range(levels):
                deep = [deep]
            return deep
        began = time.process_time()
        error = self.failed(f, 2500 if PYPY else 20000)     # beyond what either can pickle
        self.assertLess(time.process_time() - began, 10.0)
        self.assertIn("recursion", error.args[0])
        self.assertLess(len(error.args[0]), 2000)

    def test_a_result_that_can_not_be_rebuilt_here_is_an_error_value(self):
        error = self.failed(lambda: Reduced(int, "twelve"))
        self.assertRegex(error.args[0], "the outcome can't be rebuilt here: ValueError: invalid literal")
        self.assertEqual(error.condition_class[0], "ValueError")
        self.assertIn("SystemExit", self.failed(lambda: Reduced(sys.exit, 3)).args[0])

    def test_a_ctrl_c_while_an_outcome_is_rebuilt_is_the_users(self):
        def interrupt():
            raise KeyboardInterrupt
        payload = mirai._dump_value(Reduced(interrupt), None)
        with self.assertRaises(KeyboardInterrupt):
            mirai.load_outcome(payload)

    def test_half_an_outcome_is_an_error_value(self):
        payload = mirai.evaluate(task_here(lambda: [1, "two", {3: 4.0}]))
        for size in range(len(payload)):
            error, success = mirai.load_outcome(payload[:size])
            self.assertFalse(success)
            self.assertIn("can't be rebuilt here", str(error))


# -- 7. Dispatcher core


def check_core(core):
    """Asserts what must hold between any two events."""
    assert all([core.daemons[d].state is mirai.IDLE for d in core.idle]), "one that idles is no longer idle"
    calls = waiting = ready = 0
    for daemon, record in core.daemons.items():
        given = record.given()
        assert (daemon in core.idle) == (record.state is mirai.IDLE), f"daemon {daemon} is {record.state}"
        assert record.state is not mirai.IDLE or not given and not record.stopping, "an idle daemon owes something"
        assert record.state is not mirai.IDLE or record.epoch == len(core.calls), "a daemon idles beside a call"
        assert record.state is not mirai.BUSY or given or record.stopping, "a busy daemon has nothing to do"
        assert not given or record.position + given <= record.sent, "more is owed than was given"
        assert all(piece.lo < piece.hi for piece in record.pieces)
        assert given < 2 or daemon in core.holders or record.revoking is False, "what it holds can't be seen"
        calls += bool(record.pieces) and record.pieces[0].unit.call is not None
        ready += record.slot is not None
        if record.own:
            there = count_tasks(record.own)
            waiting += there
            assert not there or record.state is not mirai.IDLE, "a daemon idles beside its queue"
    common = count_tasks(core.queue)
    waiting += common + sum([call.open for call in core.calls])
    assert not (core.idle and common), "a daemon idles beside a queue"
    assert core.queued == waiting, f"{waiting} tasks wait, and {core.queued} are counted"
    assert core.unresolved == sum([unit.left for unit in core.units.values()]), "the unresolved are miscounted"
    for unit in core.units.values():
        assert 0 < unit.left == (1 if unit.done is None else unit.done.count(0)), f"unit {unit.id} is miscounted"
    assert all(holder in core.daemons for holder in core.holders)
    assert not core.direct or sorted(core.ring) == sorted(core.daemons) and not (core.ring and common)
    states = list(core.slots.values())
    assert core.launching == states.count(mirai.LAUNCHING)
    assert ready == states.count(mirai.READY)
    assert sorted(core.resting) == sorted(s for s, state in core.slots.items() if state is mirai.RESTING)
    assert len(core.paces) <= mirai.KEPT_PACES
    if waiting and not core.stopped:
        # A daemon at an `everywhere` call comes back for a task, as one that is launched comes for one.
        assert not core.resting or core.launching + calls >= waiting, "tasks wait beside a resting slot"
    if core.stopped and not core.launching:
        assert core.daemons or not common, "tasks wait for what will never come"
        assert not any([call.open for call in core.calls]), "an answer is open to those who will never come"


def check_nothing_left(core):
    """Asserts that no record outlives the tasks: for a core with nothing to do and daemons that all answered."""
    assert not core.units and not core.queued and not core.unresolved, "tasks are left"
    assert not core.holders, "a daemon is said to hold tasks"
    assert all(not call.waiting and not call.open for call in core.calls), "an answer is still owed"
    for record in core.daemons.values():
        assert record.state is mirai.IDLE and not record.revoking and not record.stopping and not record.replaying


def count_tasks(pieces):
    return sum([piece.unit.count(piece.lo, piece.hi) for piece in pieces]) if pieces else 0


Assign, Replay, Interrupt, Revoke, Resolve, Launch, Drop = (
    mirai.Assign, mirai.Replay, mirai.Interrupt, mirai.Revoke, mirai.Resolve, mirai.Launch, mirai.Drop)
RESULT, RESET, LAUNCH = mirai.RESULT, mirai.RESET, mirai.LAUNCH
STOP, LOOK = mirai.StopLaunching(), mirai.Look()


def random_events(seed, count):
    """Events, as (name, which, how): each finds its subject among those there are, so that any part makes sense too.

    Every fifty events the habits change: tasks come in bursts, and at times there are more daemons than they need.
    """
    chance = random.Random(seed)
    events = []
    while len(events) < count:
        weights = [chance.choice(habits) for _, habits in HABITS]
        names = chance.choices([name for name, _ in HABITS], weights, k=50)
        events += [(name, chance.randrange(1 << 16), chance.randrange(1 << 16)) for name in names]
    return events[:count]


# An event of the played world -> how often it may come, as compared to others.
HABITS = [
    ("work", [8, 16, 32]), ("deliver", [6, 12, 24]), ("read", [0.5, 2, 8]), ("cut", [0.2, 1, 2]), ("look", [1]),
    ("submit", [0, 0, 0.5, 3]), ("map", [0, 0, 0.5, 3]), ("cancel", [0, 0.5, 2]), ("cancel_many", [0, 0.2, 1]),
    ("withdraw", [0, 0.2, 1]),
    ("interrupt_again", [0, 1]), ("call", [0, 0, 0.5]), ("join", [0.2, 2, 4]), ("join_from_elsewhere", [0.2, 2]),
    ("leave", [0, 0.1, 1]), ("lose", [0, 0.3, 2]), ("fail", [0, 0.2, 8]), ("ask", [0.2, 1]), ("answer_wrongly", [0, 0.2])]


def shrink(events, fails):
    """The shortest sequence found by leaving events out while it still fails."""
    size = len(events)
    while size:
        at, before = 0, len(events)
        while at < len(events):
            shorter = events[:at] + events[at + size:]
            if fails(shorter):
                events = shorter
            else:
                at += size
        if size > 1 or len(events) == before:
            size //= 2
    return events


class Played:
    """A daemon of the played world. In front what the dispatcher's side knows of it, then what it knows itself.

    A task is a pair, unit and index; -1 is a replay. `paged`: it shares memory with the dispatcher, which sees what is
    begun and sets the limit at once. Else all goes over the wire, and a thread reads.
    """

    def __init__(self, number, slot, paged, maxtasks):
        self.number, self.slot, self.paged, self.maxtasks = number, slot, paged, maxtasks
        self.given = {}             # position -> task, of what it has not answered and was not taken back
        self.sent = 1               # the next position
        self.known = 0              # what it may have begun, without a page
        self.fresh = False          # it has stopped, and has been given nothing since
        self.limited = 0            # the limit that was set, or sent
        self.cuts = []              # limits that were set on the page, and not seen to be seen
        self.stopping = False       # something was taken back: it may not go on before it has said that it stopped
        self.reason = None
        self.useful = False
        self.calls = []             # `everywhere` calls that it was given, by their number
        self.owed = None            # the one that it was given and had not begun when it stopped

        self.wire_in, self.inbox, self.wire_out = collections.deque(), collections.deque(), collections.deque()
        self.position, self.begun, self.claimed, self.limit = 1, 0, 0, math.inf
        self.piece = None           # unit, the next index, the last + 1, of a map or not
        self.phase = "between"      # two tasks; or "checks" whether it may run what it said it begins; or "runs" it
        self.report = None          # unit, first index, count of what it has done and not said
        self.halted = self.silent = self.over = False
        self.done = 0

    def say(self, *message):
        self.wire_out.append(message)

    def flush(self):
        if self.report:
            self.say("reported", *self.report)
            self.report = None

    def read(self):
        """What the thread does with the next message. A stopped daemon has nothing to say to a limit."""
        name, *rest = self.wire_in.popleft()
        if name == "limit":
            if not self.silent:
                self.limit = min(self.limit, rest[0])
                self.say("returned", max(rest[0], self.begun + 1))
        else:
            if rest[-1]:
                self.limit, self.silent = math.inf, False
            self.inbox.append(rest)

    def quits(self, why):
        self.over = True
        self.say("leaving", why, self.position - 1)
        self.flush()

    def step(self, how, world):
        """The next thing that the main thread does; whether there was one."""
        if self.over:
            return False
        if self.phase == "runs":
            self.phase = "between"
            self.finishes(how, world)
        elif self.phase == "checks":
            self.phase = "between"
            if self.position < self.limit:
                self.phase = "runs"
                world.runs(self, (self.piece[0], self.piece[1]))
            else:
                self.flush()
                self.say("has_stopped", self.position)
                self.halted = self.silent = True
                self.position += self.piece[2] - self.piece[1]
                self.piece = None
        elif self.piece:
            _, lo, hi, is_map = self.piece
            if is_map and not self.paged and self.position > self.claimed:
                self.flush()
                self.claimed = self.position + min(how % 4, hi - 1 - lo)
                self.say("claim", self.claimed)
            self.begun, self.phase = self.position, "checks"
        elif self.inbox:
            unit, lo, hi, is_map, fresh = self.inbox.popleft()
            self.halted = self.halted and not fresh
            if self.halted:
                self.position += hi - lo
            else:
                self.piece = [unit, lo, hi, is_map]
        else:
            return False
        return True

    def finishes(self, how, world):
        unit, index, hi, is_map = self.piece
        if index < 0 and world.called[unit].fails:      # a replay that fails ends it
            world.lose_one(self, False)
            return
        self.report = [unit, index, 1] if self.report is None else [unit, self.report[1], self.report[2] + 1]
        self.position += 1
        self.piece[1] += 1
        self.done += unit not in world.called
        if self.piece[1] == hi:
            self.piece = None
        if self.done >= self.maxtasks:
            self.quits(mirai.MAXTASKS)
        elif self.piece is None or how % 4 == 0:
            self.flush()


class Called:
    """An `everywhere` call of the played world: who owes an answer, how many newcomers may give one."""

    def __init__(self, number, there, open, fails):
        self.number, self.waiting, self.open, self.fails = number, there, open, fails
        self.given, self.left = 0, len(there) + open
        self.worked = self.void = False         # void: nobody wants it, and it worked nowhere, at one time


class World:
    """Plays host, daemons, shell and nursery to a core, and knows by the rules alone what the core must answer.

    Daemons run what they are given in steps, and messages travel; so a limit may be set, an end may come and a call may
    be made between any two of them. A slot is launching, ready, resting, or due (its daemon has ended, and the next must
    be launched within the event).
    """

    MOST = 24       # tasks that wait; fewer daemons and slots: enough for every case, and quick

    def __init__(self, core, tell=None):
        self.core, self.tell = core, tell
        self.waiting = []           # tasks that wait, in the order in which they must be assigned
        self.retries = {}           # task -> how often it may still be tried again
        self.may_run = {}           # task -> how often it may be begun in all
        self.ran = collections.Counter()
        self.ended = {}             # task -> how
        self.epochs = {}            # unit -> how many calls came before it
        self.maps = set()           # units of maps
        self.called = {}            # unit -> Called
        self.calls = []             # the same, in their order
        self.daemons = {}
        self.slots = {}
        self.todo = collections.deque()
        self.interrupts = []
        self.joins = self.tasks = self.unresolved = self.failures = self.looks = self.useless = 0
        self.stopped = False

    @classmethod
    def play(cls, make_core, events, tell=None):
        world = cls(make_core(), tell)
        for name, which, how in events:
            getattr(world, name)(which, how)
        world.finish_all()

    @classmethod
    def failure(cls, make_core, events):
        """What goes wrong, None where nothing does."""
        try:
            cls.play(make_core, events)
        except Exception as error:
            return error
        return None

    @classmethod
    def story(cls, make_core, events):
        """The events as calls, each with its effects, and what goes wrong."""
        lines = []
        try:
            cls.play(make_core, events, lines.append)
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
        return "\n".join(lines)

    # what the host does

    def submit(self, which, how):
        self.submit_unit(1, max(0, how % 6 - 3))

    def map(self, which, how):
        self.submit_unit(1 + how % 16, max(0, which % 6 - 3), 1 + which % 3)

    def submit_unit(self, n, retries, map=None):
        if len(self.waiting) + n > self.MOST:
            return
        unit, self.tasks = self.tasks + 1, self.tasks + n
        self.epochs[unit] = len(self.calls)
        self.unresolved += n
        for index in range(n):
            self.waiting.append((unit, index))
            self.retries[unit, index], self.may_run[unit, index] = retries, 1
        if map is not None:
            self.maps.add(unit)
        self.event("submitted", unit, retries, n, map)

    def cancel(self, which, how):
        """Mostly of a task that waits or runs; at times of one that has ended."""
        held = [task for d in self.daemons.values() for task in d.given.values() if task[1] >= 0]
        task = self.pick(held + self.waiting, which) if how % 8 else self.pick(self.ended, which)
        if task and task[0] not in self.called:
            self.cancel_these(task[0], task[1], task[1] + 1)

    def cancel_many(self, which, how):
        """Of a range, or all that a unit or a call has."""
        held = [task for d in self.daemons.values() for task in d.given.values() if task[1] >= 0]
        unit, _ = self.pick(held + self.waiting, which) or (None, 0)
        if unit is not None:
            n = self.called[unit].n if unit in self.called else sum(1 for i in range(16) if (unit, i) in self.retries)
            lo = 0 if unit in self.called else how % n
            self.cancel_these(unit, lo, n if unit in self.called or how % 3 else lo + 1 + how % (n - lo))

    def cancel_these(self, unit, lo, hi):
        must = []
        for daemon in self.daemons.values():
            held = [index for of, index in daemon.given.values()
                    if of == unit and lo <= index < hi and (unit, index) not in self.ended]
            if held:
                must.append((daemon.number, unit, set(held)))
        for index in range(lo, hi):
            if (unit, index) not in self.ended:
                self.end((unit, index), "cancelled")
                if (unit, index) in self.waiting:
                    self.waiting.remove((unit, index))
        if unit in self.called:
            self.called[unit].open = 0
        before = len(self.interrupts)
        self.event("cancelled", unit, lo, hi)
        for number, _, held in must:
            for effect in self.interrupts[before:]:
                if (effect.daemon, effect.unit) == (number, unit):
                    held.difference_update(range(effect.lo, effect.hi))
            assert not held, f"{held} of unit {unit}, which daemon {number} holds, are not interrupted"
        for effect in self.interrupts[before:]:
            self.interrupt(effect)

    def withdraw(self, which, how):
        held = [task for d in self.daemons.values() for task in d.given.values() if task[1] >= 0]
        unit, index = self.pick(held + self.waiting, which) or (None, 0)
        if unit is None or unit in self.maps or unit in self.called:
            return
        waits = (unit, index) in self.waiting
        if waits:
            self.waiting.remove((unit, index))
            self.end((unit, index), "withdrawn")
        self.event("withdrawn", unit, must=[Resolve(unit, 0, 1, "withdrawn")] if waits else [])

    def call(self, which, how):
        if len(self.calls) >= 4 and how % 8:
            return
        self.tasks += 1
        there = dict.fromkeys(d.number for d in self.daemons.values() if d.reason is None)
        n = max(1, how % 4, len(there))
        call = self.called[self.tasks] = Called(len(self.calls), there, n - len(there), which % 5 == 0)
        call.n = n
        self.calls.append(call)
        self.unresolved += n
        self.event("everywhere", self.tasks, how % 4, must=[mirai.Sized(self.tasks, n)])

    # what daemons do

    def join(self, which, how):
        slot = self.pick(self.slots_that("launching"), which)
        if slot is not None:
            self.slots[slot] = "ready"
            self.enter(slot, how % 8 > 0, 1 if self.core.elastic and how % 9 else how % 25 or math.inf)

    def join_from_elsewhere(self, which, how):
        if sum(d.slot is None for d in self.daemons.values()) < 4:
            self.enter(None, False, how % 25 or math.inf)

    def enter(self, slot, paged, maxtasks=math.inf):
        self.joins += 1
        self.daemons[self.joins] = Played(self.joins, slot, paged, maxtasks)
        self.event("joined", self.joins, slot, False, paged)

    def work(self, which, how):
        daemon = self.pick_daemon(which, lambda d: not d.over and (d.piece or d.inbox))
        for _ in range(1 + how % 5 if daemon else 0):
            if not daemon.step(how >> 4, self):
                break

    def read(self, which, how):
        daemon = self.pick_daemon(which, lambda d: d.wire_in)
        for _ in range(min(1 + how % 3, len(daemon.wire_in)) if daemon else 0):
            daemon.read()

    def deliver(self, which, how):
        daemon = self.pick_daemon(which, lambda d: d.wire_out)
        for _ in range(min(1 + how % 3, len(daemon.wire_out)) if daemon else 0):
            self.hear(daemon, how)

    def hear(self, daemon, how=0):
        """The shell reads the next message of a daemon."""
        name, *rest = daemon.wire_out.popleft()
        if name == "claim":
            daemon.known, = rest
        elif name == "leaving":
            daemon.known = rest[1]
            self.leave_one(daemon, rest[0])
        elif name == "returned":
            self.take_back(daemon, name, rest[0])
        elif name == "has_stopped":
            daemon.limited = 0
            if daemon.paged:
                daemon.limit = math.inf
            call = next((task for task in daemon.given.values() if task[0] in self.called), None)
            daemon.owed = call if call and call not in self.ended else None
            if call:
                daemon.given.clear()
                if call[1] < 0 or call in self.ended:       # as if it had not come to it yet
                    daemon.calls.pop()
                    daemon.owed = None
            daemon.fresh = True
            self.take_back(daemon, name, rest[0])
        else:
            self.answer(daemon, *rest, seconds=rest[2] * (0.0001, 0.003, 0.05)[how % 3])

    def answer(self, daemon, unit, lo, n, seconds=0.0):
        call = self.called.get(unit)
        keys = [(unit, index) for index in range(lo, lo + n)]
        for position, task in zip(list(daemon.given), keys):
            assert daemon.given.pop(position) == task, f"{task} was not to be answered"     # of the world itself
        daemon.useful = True
        if daemon.slot is not None and lo >= 0:
            self.failures = 0
        if call:
            call.worked = call.worked or not call.fails
        new = [task for task in keys if lo >= 0 and task not in self.ended]
        for task in new:
            self.end(task, RESULT)
        if call and lo < 0:
            lo = 0
        self.event("reported", daemon.number, unit, lo, n, seconds, bool(call and call.fails),
                   must=[Resolve(unit, lo, lo + n, RESULT)] if new else [])

    def take_back(self, daemon, name, position):
        back = [task for at, task in daemon.given.items() if at >= position and task[0] not in self.called]
        daemon.stopping = name == "returned" and (daemon.stopping or bool(back))
        daemon.given = {at: task for at, task in daemon.given.items() if at < position or task[0] in self.called}
        self.put_back(back)
        self.event(name, daemon.number, position)

    def put_back(self, tasks):
        self.waiting[:0] = [task for task in tasks if task not in self.ended]

    def runs(self, daemon, task):
        """A daemon has really begun one: the last moment to find that it should not have."""
        assert daemon.given.get(daemon.position) == task, f"daemon {daemon.number} runs {task}, which was taken back"
        if task[0] in self.called:
            return
        self.ran[task] += 1
        assert self.ran[task] <= self.may_run[task], f"{task} runs for the {self.ran[task]}. time"

    def answer_wrongly(self, which, how):
        daemon = self.pick_daemon(which)
        if daemon is None or how % 4:
            return
        while daemon.wire_out:
            self.hear(daemon)
        if daemon.number in self.daemons:
            self.event("reported", daemon.number, self.tasks + 1, 0, drops=daemon.number)
            if daemon.slot is not None:
                self.leave_one(daemon, mirai.DIED)
            self.lose_one(daemon, False)

    def leave(self, which, how):
        """One that finds nothing to do has waited for long enough."""
        daemon = self.pick_daemon(which, lambda d: not d.over and not d.piece and not d.inbox and not d.halted)
        if daemon is not None:
            daemon.quits((mirai.IDLETIME, mirai.WALLTIME)[how % 2])

    def leave_one(self, daemon, why):
        daemon.reason = why if daemon.reason is None else daemon.reason
        self.event("leaving", daemon.number, why)

    def lose(self, which, how):
        daemon = self.pick_daemon(which, (lambda d: d.over) if how % 3 else None)
        if daemon is not None:
            self.lose_one(daemon, True)

    def lose_one(self, daemon, heard):
        """Its end. What it said before counts; of what it did, what the page holds."""
        daemon.over = True
        while daemon.wire_out:
            self.hear(daemon)
        report, daemon.report = daemon.report, None
        if daemon.paged:
            self.leave_one(daemon, mirai.DIED)
            if report and heard:
                self.answer(daemon, *report)
        del self.daemons[daemon.number]
        begun = daemon.begun if daemon.paged else daemon.known
        replaying = any(index < 0 for _, index in daemon.given.values())
        useless = not daemon.reason and (replaying or bool(daemon.given) and begun < min(daemon.given)
                                         and not daemon.useful)
        must, back = [], []
        for position, task in daemon.given.items():
            call = task[0] in self.called
            if task in self.ended or task[1] < 0:
                continue
            if not call and position > begun:
                back.append(task)
            elif not call and self.retries[task]:
                self.retries[task] -= 1
                self.may_run[task] += 1
                back.append(task)
            else:
                must.append(Resolve(task[0], task[1], task[1] + 1, RESET))
        self.put_back(back)
        rests = self.core.elastic or daemon.reason in (mirai.IDLETIME, mirai.WALLTIME)
        for unit, call in self.called.items():
            if daemon.number in call.waiting:
                del call.waiting[daemon.number]
                if daemon.slot is not None and not rests and call.left:
                    call.open += 1
                elif call.left:
                    must.append(Resolve(unit, call.given, call.given + 1, RESET))
                    call.given += 1
        if daemon.slot is not None and useless:
            must += self.failed_start(daemon.slot)
        elif daemon.slot is not None:
            self.slots[daemon.slot] = "resting" if rests else "due"
        self.useless += bool(self.core.daemons[daemon.number].due)
        self.event("lost", daemon.number, begun, must=must)

    # what the shell does

    def interrupt(self, effect):
        """What is not begun of what was cancelled is taken back. (To interrupt what runs is only to have it end soon.)"""
        daemon = self.daemons.get(effect.daemon)
        held = [at for at, (unit, index) in daemon.given.items()
                if unit == effect.unit and effect.lo <= index < effect.hi] if daemon else []
        if daemon:
            found = self.core.held(daemon.number, effect.unit, effect.lo, effect.hi)
            assert found == ((held[0], held[-1]) if held else None), f"{effect} is held at {found}, not {held}"
        if held:
            begun = daemon.begun if daemon.paged else min(daemon.given)
            if begun < held[-1]:
                self.limit(daemon, max(held[0], begun + 1))

    def interrupt_again(self, which, how):
        if self.interrupts:
            self.interrupt(self.interrupts.pop(which % len(self.interrupts)))

    def revoke(self, number, all):
        daemon = self.daemons[number]
        assert daemon.given and not self.core.direct, f"daemon {number} has nothing that could be taken back"
        begun = daemon.begun if daemon.paged else min(daemon.given)
        end = max(daemon.given) + 1
        if begun >= end - 1:
            self.take_back(daemon, "returned", end)
        else:
            self.limit(daemon, begun + 1 + (0 if all else (end - 1 - begun) // 2))

    def limit(self, daemon, position):
        if daemon.limited and daemon.limited <= position:
            return
        daemon.limited = position
        if daemon.paged:
            daemon.limit = position
            daemon.cuts.append(position)
        else:
            daemon.wire_in.append(("limit", position))

    def cut(self, which, how):
        daemon = self.pick_daemon(which, lambda d: d.cuts)
        position = daemon.cuts.pop(0) if daemon else 0
        if not daemon or daemon.limited != position:
            return
        cut = max(position, daemon.begun + 1)
        if (not daemon.given or cut > max(daemon.given)) and not daemon.stopping:
            daemon.limited, daemon.limit = 0, math.inf
        self.take_back(daemon, "returned", cut)

    def look(self, which, how):
        if self.looks:
            self.looks = 0
            self.event("look")

    # what the nursery does

    def fail(self, which, how):
        slot = self.pick(self.slots_that("launching"), which)
        if slot is not None:
            self.event("launch_failed", slot, must=self.failed_start(slot))

    def failed_start(self, slot):
        self.failures += 1
        self.slots[slot] = "resting" if self.core.elastic else "due"
        if self.stopped or self.failures < mirai.MAX_FAILED_STARTS:
            return []
        self.stopped = True
        return [STOP]

    def ask(self, which, how):
        wanted = range(len(self.slots), min(len(self.slots) + how % 3, 6))
        self.slots.update(dict.fromkeys(wanted, "resting" if self.core.elastic else "due"))
        self.stopped, self.failures = False, 0
        self.event("launch", wanted)

    def finish_all(self):
        """The world comes to rest: every daemon does all it can and says it, and others come where tasks still wait."""
        for _ in range(10_000):
            active = False
            for daemon in list(self.daemons.values()):
                while daemon.wire_in:
                    daemon.read()
                    active = True
                while daemon.cuts and daemon.number in self.daemons:
                    self.cut_all(daemon)
                    active = True
                while daemon.number in self.daemons and daemon.step(1, self):
                    active = True
                while daemon.wire_out and daemon.number in self.daemons:
                    self.hear(daemon)
                    active = True
                if daemon.over and daemon.number in self.daemons:
                    self.lose_one(daemon, True)
                    active = True
            if self.looks:
                self.look(0, 0)
            elif not active and self.unresolved:
                self.enter(None, False)
            elif not active:
                break
        assert not self.unresolved, f"{self.unresolved} tasks never end"
        assert not self.waiting
        for daemon in self.daemons.values():
            assert all(call.void or call.number in daemon.calls for call in self.calls), "a daemon has missed a call"
        check_nothing_left(self.core)

    def cut_all(self, daemon):
        numbers = [n for n, d in self.daemons.items() if d.cuts]
        self.cut(numbers.index(daemon.number), 0)

    # what must hold

    def event(self, name, *arguments, must=(), drops=None):
        """One event: its effects must be allowed in their order, those in `must` must all be among them."""
        effects = getattr(self.core, name)(*arguments)
        if self.tell:
            self.tell(f"{name}{arguments} -> {effects}")
        must = list(must)
        revokes = []
        for effect in effects:
            kind = type(effect)
            if kind is Assign:
                self.assigned(*effect)
            elif kind is Replay:
                self.replayed(*effect)
            elif kind is Launch:
                self.launched(effect.slot)
            elif kind is Revoke:
                revokes.append((effect.daemon, effect.all))
            elif kind is mirai.Look:
                assert not self.looks, "it looks twice"
                self.looks = 1
            elif kind is Interrupt:
                self.interrupts.append(effect)
            elif kind is Drop:
                assert effect.daemon == drops, f"{effect} of a daemon without fault"
                drops = None
            elif kind is Resolve and effect.how == LAUNCH:
                self.given_up(effect)
            else:
                assert effect in must, f"{effect} is out of place"
                must.remove(effect)
                if kind is Resolve and effect.how == RESET:
                    self.end((effect.unit, effect.lo), RESET)
        assert not must and drops is None, f"{must or 'Drop'} is missing"
        for call in self.calls:
            call.void = call.void or not call.left and not call.worked
        check_core(self.core)
        self.at_rest()
        assert len(set(revokes)) == len(revokes)
        self.todo.extend(revokes)
        if revokes and len(self.todo) == len(revokes):
            for count in itertools.count():
                if not self.todo:
                    break
                assert count < 100, "what has nothing to give is asked for it again and again"
                self.revoke(*self.todo[0])
                self.todo.popleft()

    def assigned(self, number, unit, lo, hi, fresh):
        daemon = self.daemons[number]
        assert lo < hi
        if unit in self.called:
            self.call_given(daemon, unit, lo)
            assert hi == lo + 1
            self.give(daemon, unit, lo, hi, False, fresh)
            return
        for index in range(lo, hi):
            assert (unit, index) not in self.ended, f"{(unit, index)} has ended, and is assigned"
            assert (unit, index) in self.waiting, f"{(unit, index)} is assigned twice"
            if not self.core.direct:
                assert self.waiting[0] == (unit, index), f"{(unit, index)} is not the first in the queue"
            self.waiting.remove((unit, index))
        for call in self.calls[:self.epochs[unit]]:
            assert call.void or call.number in daemon.calls, f"{unit} is assigned before a call that came before it"
        self.give(daemon, unit, lo, hi, unit in self.maps, fresh)

    def replayed(self, number, unit, fresh):
        daemon, call = self.daemons[number], self.called[unit]
        assert daemon.number not in call.waiting or not call.left, f"daemon {number} owes an answer to {unit}"
        assert not call.open, f"daemon {number} could give an answer to {unit}"
        assert call.left or call.worked, "what worked nowhere is replayed"
        self.call_begins(daemon, call)
        self.give(daemon, unit, -1, 0, False, fresh)

    def call_given(self, daemon, unit, index):
        call = self.called[unit]
        assert (unit, index) not in self.ended, f"answer {index} of call {unit} is there or not wanted"
        if daemon.owed == (unit, index):
            daemon.owed = None
            return
        assert index == call.given, f"answer {index} of call {unit} comes after {call.given}"
        call.given += 1
        if daemon.number in call.waiting:
            del call.waiting[daemon.number]
        else:
            assert call.open, f"daemon {daemon.number} gives an answer to {unit} that nobody asked for"
            call.open -= 1
        self.call_begins(daemon, call)

    def call_begins(self, daemon, call):
        assert call.number > max(daemon.calls, default=-1), f"daemon {daemon.number} has run call {call.number}, or later ones"
        for earlier in self.calls[:call.number]:
            assert earlier.void or earlier.number in daemon.calls, f"call {call.number} comes before {earlier.number}"
        daemon.calls.append(call.number)

    def give(self, daemon, unit, lo, hi, is_map, fresh):
        number = daemon.number
        assert daemon.reason is None, f"{unit} goes to daemon {number}, which is leaving"
        assert daemon.owed is None, f"daemon {number} is given {unit}, and has not run its call"
        assert fresh == daemon.fresh, f"daemon {number} had {'' if daemon.fresh else 'not '}stopped"
        single = not is_map and unit not in self.called
        assert not daemon.given or is_map and all(task[0] in self.maps for task in daemon.given.values()) or (
            daemon.paged and single and not any(task[0] in self.maps or task[0] in self.called for task in daemon.given.values())
            and len(daemon.given) < mirai.AHEAD), f"daemon {number} is given {unit} beside {daemon.given}"
        daemon.fresh = False
        for index in range(lo, hi):
            daemon.given[daemon.sent] = unit, index
            assert index < 0 or self.core.task_at(number, daemon.sent) in ((unit, index), None)
            daemon.sent += 1
        if not is_map:
            daemon.known = daemon.sent - 1
        if daemon.paged:
            daemon.inbox.append((unit, lo, hi, is_map, fresh))
        else:
            daemon.wire_in.append(("run", unit, lo, hi, is_map, fresh))

    def launched(self, slot):
        assert not self.stopped, f"slot {slot} is launched though launching was given up"
        assert self.slots[slot] in ("due", "resting"), f"slot {slot} is launched while {self.slots[slot]}"
        assert self.slots[slot] == "due" or self.queued() > len(self.slots_that("launching")), \
            f"nothing waits for slot {slot}"
        self.slots[slot] = "launching"

    def given_up(self, effect):
        unit, lo, hi, _ = effect
        call = self.called.get(unit)
        assert self.stopped and not self.slots_that("launching") and (call or not self.daemons), f"{effect} too soon"
        assert hi == lo + 1
        if call:
            assert call.open and lo == call.given
            call.open -= 1
            call.given += 1
        else:
            assert (unit, lo) in (self.waiting if self.core.direct else self.waiting[:1]), \
                f"{effect} of what does not wait, or not in order"
            self.waiting.remove((unit, lo))
        self.end((unit, lo), LAUNCH)

    def end(self, task, how):
        assert task not in self.ended, f"{task} ends by {how} after {self.ended[task]}"
        self.ended[task] = how
        self.unresolved -= 1
        if task[0] in self.called:
            self.called[task[0]].left -= 1

    def queued(self):
        return len(self.waiting) + sum([call.open for call in self.calls])

    def at_rest(self):
        """Between two events."""
        if self.stopped:
            self.slots.update(dict.fromkeys(self.slots_that("due"), "resting"))
        assert not self.slots_that("due"), "a slot was not launched"
        assert self.core.queued == self.queued(), f"{self.queued()} tasks wait, and {self.core.queued} are counted"
        connections, cumulative, awaiting, executing, completed = self.core.counts()
        ready = self.joins - self.useless - sum(record.due > 0 for record in self.core.daemons.values())
        assert (connections, cumulative, awaiting + executing, completed) == (
            len(self.daemons), ready, self.unresolved, len(self.ended)), f"counts are {self.core.counts()}"
        assert 0 <= executing <= sum([bool(d.given) for d in self.daemons.values()])

    def slots_that(self, state):
        return [slot for slot, now in self.slots.items() if now == state]

    def pick_daemon(self, which, suits=None):
        return self.pick(self.daemons.values() if suits is None else filter(suits, self.daemons.values()), which)

    @staticmethod
    def pick(things, which):
        things = list(things)
        return things[which % len(things)] if things else None


class TestCore(Case):
    """Examples for each rule at the head of the section, then events at random against a model of the world."""

    def core(self, daemons=0, slots=0, **options):
        """A core that daemons 1, 2, … from elsewhere have joined, and that was asked for these local ones."""
        core = mirai.DispatcherCore(**options)
        for daemon in range(1, daemons + 1):
            self.assertEqual(core.joined(daemon), [])
        if slots:
            core.launch(range(slots))
        return core

    def holding(self, n=8, **options):
        """A core whose daemon 1 holds all n items of unit 10, at positions 1 to n; nobody knows how long they take."""
        core = self.core(1, fixed=n, **options)
        self.assertEqual(core.submitted(10, 0, n, 1), [Assign(1, 10, 0, n, False)])
        return core

    def measured(self, seconds, daemons=1, n=100):
        """A core that has measured one item of unit 10, with so many left; daemon 1 has just been given the next."""
        core = self.core(1)
        self.assertEqual(core.submitted(10, 0, n + 1, 1), [Assign(1, 10, 0, 1, False)])
        effects = core.reported(1, 10, 0, 1, seconds)
        self.assertEqual(effects[0], Resolve(10, 0, 1, RESULT))
        return core, effects[1:]

    # rule 1: each task ends once

    def test_a_task_goes_to_the_idle_daemon_and_ends_with_its_answer(self):
        core = self.core(1)
        self.assertEqual(core.counts(), (1, 1, 0, 0, 0))
        self.assertEqual(core.submitted(7), [Assign(1, 7, 0, 1, False)])
        self.assertEqual(core.counts(), (1, 1, 0, 1, 0))
        self.assertEqual(core.reported(1, 7, 0), [Resolve(7, 0, 1, RESULT)])
        self.assertEqual(core.counts(), (1, 1, 0, 0, 1))
        check_nothing_left(core)

    def test_a_task_without_a_daemon_waits_for_one(self):
        core = self.core()
        self.assertEqual(core.submitted(7), [])
        self.assertEqual(core.counts(), (0, 0, 1, 0, 0))
        self.assertEqual(core.joined(1), [Assign(1, 7, 0, 1, False)])

    def test_items_of_a_unit_are_answered_in_parts(self):
        core = self.holding(8)
        self.assertEqual(core.reported(1, 10, 0, 3), [Resolve(10, 0, 3, RESULT)])
        self.assertEqual(core.counts(), (1, 1, 4, 1, 3))
        self.assertEqual(core.reported(1, 10, 3, 5), [Resolve(10, 3, 8, RESULT)])
        self.assertEqual(core.counts(), (1, 1, 0, 0, 8))
        check_nothing_left(core)

    def test_a_task_ends_with_its_daemon(self):
        core = self.core(1)
        core.submitted(7)
        self.assertEqual(core.lost(1, 1), [Resolve(7, 0, 1, RESET)])
        self.assertEqual(core.counts(), (0, 1, 0, 0, 1))

    def test_of_a_piece_only_what_had_begun_ends_with_the_daemon(self):
        core = self.holding(8)
        core.reported(1, 10, 0, 2)
        self.assertEqual(core.lost(1, 4), [Resolve(10, 2, 3, RESET), Resolve(10, 3, 4, RESET)])
        self.assertEqual(core.joined(2), [Assign(2, 10, 4, 8, False)])

    def test_submitting_a_task_twice_is_the_hosts_fault(self):
        core = self.core(1)
        core.submitted(1)
        core.submitted(2)
        for task in (1, 2):
            with self.assertRaisesRegex(mirai.ProtocolError, f"task {task} was submitted twice"):
                core.submitted(task)
        check_core(core)

    def test_cancel_of_an_awaiting_task_never_runs_it(self):
        core = self.core(1)
        for task in (1, 2, 3):
            core.submitted(task)
        self.assertEqual(core.cancelled(2, 0, 1), [])
        self.assertEqual(core.reported(1, 1, 0), [Resolve(1, 0, 1, RESULT), Assign(1, 3, 0, 1, False)])
        self.assertEqual(core.counts(), (1, 1, 0, 1, 2))

    def test_cancel_of_awaiting_items_never_runs_them(self):
        core = self.core(fixed=8)
        core.submitted(10, 0, 8, 1)
        self.assertEqual([core.cancelled(10, 0, 2), core.cancelled(10, 4, 5), core.cancelled(10, 7, 8)], [[], [], []])
        check_core(core)
        self.assertEqual(core.joined(1), [Assign(1, 10, 2, 4, False)])
        self.assertEqual(core.reported(1, 10, 2, 2), [Resolve(10, 2, 4, RESULT), Assign(1, 10, 5, 7, False)])
        core.reported(1, 10, 5, 2)
        self.assertEqual(core.counts(), (1, 1, 0, 0, 8))
        check_nothing_left(core)

    def test_cancel_of_an_executing_task_interrupts_it_and_drops_its_answer(self):
        core = self.core(1)
        core.submitted(1)
        self.assertEqual(core.cancelled(1, 0, 1), [Interrupt(1, 1, 0, 1)])
        self.assertEqual(core.counts(), (1, 1, 0, 0, 1))
        self.assertEqual(core.reported(1, 1, 0), [])
        self.assertEqual(core.counts(), (1, 1, 0, 0, 1))

    def test_cancel_of_a_unit_interrupts_each_daemon_that_has_some_of_it(self):
        core = self.core(2, fixed=3)
        core.submitted(10, 0, 10, 1)
        self.assertEqual(sorted(core.cancelled(10, 0, 10)), [Interrupt(1, 10, 3, 6), Interrupt(2, 10, 0, 3)])
        self.assertEqual(core.counts(), (2, 2, 0, 0, 10))
        self.assertFalse([e for e in core.reported(2, 10, 0, 3) + core.reported(1, 10, 3, 3) if type(e) is not Revoke])
        core.returned(1, 4)
        check_nothing_left(core)

    def test_an_answer_of_which_a_part_is_wanted_is_passed_on(self):
        core = self.holding(4)
        self.assertEqual(core.cancelled(10, 1, 2), [Interrupt(1, 10, 1, 2)])
        self.assertEqual(core.reported(1, 10, 0, 4), [Resolve(10, 0, 4, RESULT)])
        self.assertEqual(core.counts(), (1, 1, 0, 0, 4))

    def test_cancel_of_what_has_ended_or_never_was_does_nothing(self):
        core = self.core(1)
        core.submitted(1)
        core.reported(1, 1, 0)
        before = core.counts()
        self.assertEqual((core.cancelled(1, 0, 1), core.cancelled(99, 0, 5), core.counts()), ([], [], before))

    def test_a_second_cancel_changes_nothing(self):
        core = self.core(1)
        core.submitted(1)
        core.cancelled(1, 0, 1)
        self.assertEqual((core.cancelled(1, 0, 1), core.counts()), ([], (1, 1, 0, 0, 1)))

    def test_a_cancelled_task_ends_with_its_daemon_in_silence(self):
        for begun in (0, 1):
            core = self.core(1)
            core.submitted(1, retries=5)
            core.cancelled(1, 0, 1)
            self.assertEqual(core.lost(1, begun), [])
            self.assertEqual(core.counts(), (0, 1, 0, 0, 1))

    # rule 2: first in, first out

    def test_tasks_are_assigned_in_the_order_they_came(self):
        core, order = self.core(2), []
        for task in range(10):
            order += core.submitted(task)
        for effect in order:
            order += [e for e in core.reported(effect.daemon, effect.unit, 0) if type(e) is Assign]
        self.assertEqual([effect.unit for effect in order], list(range(10)))

    def test_a_map_does_not_pass_what_came_before_it(self):
        core = self.core(1, fixed=4)
        core.submitted(1)
        core.submitted(2)
        core.submitted(10, 0, 4, 1)
        core.submitted(20)
        self.assertEqual(core.reported(1, 1, 0)[1:], [Assign(1, 2, 0, 1, False)])
        self.assertEqual(core.reported(1, 2, 0)[1:], [Assign(1, 10, 0, 4, False)])
        self.assertEqual(core.reported(1, 10, 0, 4)[1:], [Assign(1, 20, 0, 1, False)])

    def test_a_task_that_had_not_begun_goes_back_to_the_head(self):
        core = self.core(1)
        for task in (1, 2, 3):
            core.submitted(task)
        self.assertEqual(core.lost(1, 0), [])
        self.assertEqual([core.joined(2), core.joined(3)], [[Assign(2, 1, 0, 1, False)], [Assign(3, 2, 0, 1, False)]])

    def test_a_task_that_had_not_begun_goes_to_the_next_idle_daemon_at_once(self):
        core = self.core(2)
        daemon = core.submitted(1)[0].daemon
        self.assertEqual(core.lost(daemon, 0), [Assign(3 - daemon, 1, 0, 1, False)])

    def test_a_task_that_a_new_local_daemon_lets_fall_goes_to_the_idle_one_at_once(self):
        core = self.core(slots=2)
        core.joined(1, 0)
        core.joined(2, 1)
        daemon = core.submitted(1)[0].daemon
        effects = core.lost(daemon, 0)
        check_core(core)
        self.assertCountEqual(effects, [Assign(3 - daemon, 1, 0, 1, False), Launch(daemon - 1)])

    def test_not_having_begun_costs_no_retry(self):
        core = self.core(1)
        core.submitted(1)
        for daemon in range(1, 20):
            self.assertEqual(core.lost(daemon, 0), [])
            self.assertEqual(core.joined(daemon + 1), [Assign(daemon + 1, 1, 0, 1, False)])
        self.assertEqual(core.lost(20, 1), [Resolve(1, 0, 1, RESET)])

    def test_a_task_is_tried_again_as_often_as_it_may(self):
        core = self.core(1)
        core.submitted(1, retries=2)
        core.submitted(2)
        for daemon in (1, 2):
            self.assertEqual(core.lost(daemon, 1), [])
            self.assertEqual(core.joined(daemon + 1), [Assign(daemon + 1, 1, 0, 1, False)])
        self.assertEqual(core.lost(3, 1), [Resolve(1, 0, 1, RESET)])
        self.assertEqual(core.counts(), (0, 3, 1, 0, 1))

    def test_only_the_item_that_had_begun_uses_up_a_retry(self):
        core = self.core(1, fixed=4)
        core.submitted(10, 1, 4, 1)
        self.assertEqual(core.lost(1, 1), [])
        self.assertEqual(core.joined(2), [Assign(2, 10, 0, 1, False)])
        self.assertEqual(core.lost(2, 1), [Resolve(10, 0, 1, RESET)])
        self.assertEqual(core.joined(3), [Assign(3, 10, 1, 4, False)])
        self.assertEqual(core.lost(3, 1), [])
        self.assertEqual(core.counts(), (0, 3, 3, 0, 1))

    def test_a_task_that_was_put_back_can_be_cancelled(self):
        core = self.core(1)
        core.submitted(1, retries=1)
        core.lost(1, 1)
        self.assertEqual(core.cancelled(1, 0, 1), [])
        self.assertEqual(core.joined(2), [])
        self.assertEqual(core.counts(), (1, 2, 0, 0, 1))

    def test_the_daemon_that_was_busy_last_is_used_next(self):
        core = self.core(3)
        first = core.submitted(1)[0].daemon
        second = core.submitted(2)[0].daemon
        core.reported(first, 1, 0)
        self.assertEqual(core.submitted(3), [Assign(first, 3, 0, 1, False)])
        core.reported(second, 2, 0)
        core.reported(first, 3, 0)
        self.assertEqual(core.submitted(4), [Assign(first, 4, 0, 1, False)])

    def test_direct_tasks_go_to_daemons_in_turn_and_wait_for_theirs(self):
        core = self.core(2, direct=True)
        self.assertEqual(core.submitted(1), [Assign(1, 1, 0, 1, False)])
        self.assertEqual(core.submitted(2), [Assign(2, 2, 0, 1, False)])
        self.assertEqual([core.submitted(3), core.submitted(4)], [[], []])
        self.assertEqual(core.reported(2, 2, 0), [Resolve(2, 0, 1, RESULT), Assign(2, 4, 0, 1, False)])
        self.assertEqual(core.reported(2, 4, 0), [Resolve(4, 0, 1, RESULT)])       # 3 is the other's
        self.assertEqual(core.reported(1, 1, 0), [Resolve(1, 0, 1, RESULT), Assign(1, 3, 0, 1, False)])

    def test_direct_each_daemon_has_a_share_of_a_unit(self):
        core = self.core(3, direct=True, fixed=100)
        self.assertEqual(core.submitted(10, 0, 8, 1),
                         [Assign(1, 10, 0, 3, False), Assign(2, 10, 3, 6, False), Assign(3, 10, 6, 8, False)])

    def test_direct_what_came_before_any_daemon_goes_to_the_first(self):
        core = self.core(direct=True)
        core.submitted(1)
        core.submitted(2)
        self.assertEqual(core.joined(1), [Assign(1, 1, 0, 1, False)])
        self.assertEqual(core.joined(2), [])
        self.assertEqual(core.reported(1, 1, 0)[1:], [Assign(1, 2, 0, 1, False)])

    def test_direct_the_queue_of_a_daemon_that_ends_goes_to_the_others(self):
        core = self.core(2, direct=True)
        for task in (1, 2, 3, 5):
            core.submitted(task)
        self.assertEqual(core.lost(1, 1), [Resolve(1, 0, 1, RESET)])
        self.assertEqual(core.reported(2, 2, 0)[1:], [Assign(2, 5, 0, 1, False)])
        self.assertEqual(core.reported(2, 5, 0)[1:], [Assign(2, 3, 0, 1, False)])
        self.assertEqual(core.lost(2, 0), [])
        check_core(core)
        self.assertEqual(core.joined(3), [Assign(3, 3, 0, 1, False)])

    def test_direct_takes_nothing_from_a_busy_daemon_for_an_idle_one(self):
        core = self.core(2, direct=True, fixed=100)
        core.submitted(10, 0, 8, 1)
        self.assertEqual(core.reported(1, 10, 0, 4), [Resolve(10, 0, 4, RESULT)])
        self.assertEqual(core.look(), [])

    # rule 3: one task at a time, or pieces

    def test_a_daemon_has_one_task_at_a_time(self):
        core = self.core(1)
        self.assertEqual([core.submitted(1), core.submitted(2)], [[Assign(1, 1, 0, 1, False)], []])
        self.assertEqual(core.reported(1, 1, 0), [Resolve(1, 0, 1, RESULT), Assign(1, 2, 0, 1, False)])

    def test_a_cancelled_task_keeps_its_daemon_until_it_answers(self):
        core = self.core(1)
        core.submitted(1)
        core.submitted(2)
        core.cancelled(1, 0, 1)
        self.assertEqual(core.submitted(3), [])
        self.assertEqual(core.reported(1, 1, 0), [Assign(1, 2, 0, 1, False)])

    def test_a_map_begins_with_single_items(self):
        core = self.core(2)
        self.assertCountEqual(core.submitted(10, 0, 100, 1), [Assign(2, 10, 0, 1, False), Assign(1, 10, 1, 2, False)])

    def test_a_piece_takes_some_chunk_time(self):
        core, effects = self.measured(mirai.CHUNK_TIME / 4)
        self.assertEqual(effects, [Assign(1, 10, 1, 5, False), Assign(1, 10, 5, 9, False)])

    def test_a_piece_grows_eightfold_at_most(self):
        core, effects = self.measured(1e-9)
        self.assertEqual(effects, [Assign(1, 10, 1, 9, False), Assign(1, 10, 9, 17, False)])
        self.assertEqual(core.reported(1, 10, 1, 8, 8e-9)[1:], [Assign(1, 10, 17, 81, False)])

    def test_items_longer_than_chunk_time_come_one_by_one_and_none_ahead(self):
        core, effects = self.measured(2 * mirai.CHUNK_TIME)
        self.assertEqual(effects, [Assign(1, 10, 1, 2, False)])

    def test_a_daemon_has_one_piece_ahead_and_no_more(self):
        core, effects = self.measured(mirai.CHUNK_TIME / 4)
        self.assertEqual(core.reported(1, 10, 1, 2, mirai.CHUNK_TIME / 2), [Resolve(10, 1, 3, RESULT)])
        self.assertEqual(core.reported(1, 10, 3, 2, mirai.CHUNK_TIME / 2), [Resolve(10, 3, 5, RESULT), Assign(1, 10, 9, 13, False)])

    def test_of_the_last_piece_each_idle_daemon_gets_a_share(self):
        core = self.core(1)
        core.submitted(10, 0, 1, 1)
        core.reported(1, 10, 0, 1, 1e-6)
        core.joined(2)
        core.joined(3)
        self.assertEqual([(e.lo, e.hi) for e in core.submitted(20, 0, 9, 1)], [(0, 3), (3, 6), (6, 9)])

    def test_units_of_one_map_share_what_was_measured(self):
        core, _ = self.measured(1e-9, n=0)
        self.assertEqual(core.submitted(20, 0, 100, 1)[0], Assign(1, 20, 0, 8, False))
        core.reported(1, 20, 0, 8)
        self.assertEqual(self.core(1).submitted(20, 0, 100, 2), [Assign(1, 20, 0, 1, False)])

    def test_fixed_pieces_have_that_size(self):
        core = self.core(2, fixed=3)
        self.assertEqual([(e.lo, e.hi) for e in core.submitted(10, 0, 8, 1) if type(e) is Assign], [(0, 3), (3, 6)])
        self.assertEqual(core.reported(2, 10, 0, 3, 1e-9)[1:], [Assign(2, 10, 6, 8, False)])

    def test_old_maps_are_forgotten(self):
        core = self.core(1)
        for map in range(3 * mirai.KEPT_PACES):
            core.submitted(map, 0, 1, map)
            core.reported(1, map, 0)
            self.assertLessEqual(len(core.paces), mirai.KEPT_PACES)
        check_nothing_left(core)

    def test_positions_count_what_a_daemon_was_given(self):
        core = self.core(1, fixed=5)
        core.submitted(1)
        core.submitted(10, 0, 5, 1)
        self.assertEqual((core.held(1, 1, 0, 1), core.task_at(1, 1), core.task_at(1, 2)), ((1, 1), (1, 0), None))
        core.reported(1, 1, 0)
        self.assertEqual((core.held(1, 10, 0, 5), core.held(1, 10, 3, 9), core.held(1, 10, 5, 9)), ((2, 6), (5, 6), None))
        core.reported(1, 10, 0, 2)
        self.assertEqual((core.held(1, 10, 0, 5), core.held(1, 10, 0, 2), core.held(1, 1, 0, 1)), ((4, 6), None, None))
        self.assertEqual([core.task_at(1, at) for at in (3, 4, 6, 7)], [None, (10, 2), (10, 4), None])

    def test_what_a_daemon_has_not_begun_is_taken_back_for_one_that_idles(self):
        core = self.holding(8)
        self.assertEqual(core.joined(2), [Revoke(1)])
        core.reported(1, 10, 0, 2)
        self.assertEqual(core.returned(1, 5), [Assign(2, 10, 4, 8, False)])
        check_core(core)
        self.assertEqual(core.reported(1, 10, 2, 2), [Resolve(10, 2, 4, RESULT)])
        self.assertEqual(core.submitted(20), [])            # it is not idle before it has said that it stopped
        self.assertEqual(core.has_stopped(1, 5), [Assign(1, 20, 0, 1, True)])
        self.assertEqual(core.task_at(1, 9), (20, 0))       # after all that it was ever given
        core.reported(1, 20, 0)
        self.assertEqual(core.submitted(21), [Assign(1, 21, 0, 1, False)])

    def test_what_it_begins_in_that_moment_it_keeps(self):
        core = self.holding(8)
        core.joined(2)
        self.assertEqual(core.returned(1, 8), [Assign(2, 10, 7, 8, False)])
        self.assertEqual(core.lost(1, 7)[-1], Resolve(10, 6, 7, RESET))

    def test_what_it_was_about_to_begin_it_gives_back_when_it_has_stopped(self):
        core = self.holding(4)
        core.joined(2)
        core.reported(1, 10, 0, 2)
        self.assertEqual(core.returned(1, 4), [Assign(2, 10, 3, 4, False)])     # said to be begun: the third
        self.assertEqual(core.has_stopped(1, 3), [Assign(1, 10, 2, 3, True)])

    def test_what_a_daemon_gives_back_as_it_stops_is_for_all_that_idle(self):
        core = self.holding(4)
        core.joined(2)
        core.fixed = 1
        effects = core.has_stopped(1, 1)
        check_core(core)
        self.assertEqual(effects, [Assign(2, 10, 0, 1, False), Assign(1, 10, 1, 2, True)])      # others first

    def test_one_that_has_stopped_and_owes_what_came_before_is_at_fault(self):
        core = self.holding(4)
        effect = core.has_stopped(1, 3)[-1]
        self.assertEqual((type(effect), effect.daemon), (Drop, 1))
        self.assertRegex(effect.why, "it stopped at 3, and owes what comes before")
        check_core(core)

    def test_what_comes_back_is_the_first_to_go_out_again(self):
        core = self.holding(8)
        core.submitted(20)
        self.assertEqual(core.returned(1, 5), [])
        self.assertEqual(core.joined(2), [Assign(2, 10, 4, 8, False)])

    def ahead(self, n=20):
        """A core whose paged daemon 1 has answered the first of n tasks in no time."""
        core = mirai.DispatcherCore()
        core.joined(1, None, False, True)
        for task in range(1, n + 1):
            core.submitted(task)
        return core, core.reported(1, 1, 0, 1, mirai.SHORT / 2)

    def test_short_tasks_are_given_ahead(self):
        core, effects = self.ahead()
        given = range(2, 2 + mirai.AHEAD)
        self.assertEqual(effects, [Resolve(1, 0, 1, RESULT), *(Assign(1, task, 0, 1, False) for task in given), mirai.Look()])
        self.assertEqual(core.counts()[2:4], (18, 1))
        for task in given[:3]:
            self.assertEqual(core.reported(1, task, 0, 1, mirai.SHORT / 2), [Resolve(task, 0, 1, RESULT)])     # not one by one
        refill = core.reported(1, given[3], 0, 1, mirai.SHORT / 2)
        self.assertEqual(refill[1:], [Assign(1, task, 0, 1, False) for task in range(10, 14)])
        self.assertEqual(core.reported(1, given[4], 0, 1, mirai.SHORT * 2), [Resolve(given[4], 0, 1, RESULT)])

    def test_tasks_that_wait_behind_one_that_is_not_short_are_taken_back(self):
        core, _ = self.ahead()
        self.assertEqual(core.look(), [mirai.Look()])       # it may have begun only now
        self.assertEqual(core.look(), [Revoke(1, True), mirai.Look()])
        self.assertEqual(core.look(), [])
        self.assertEqual(core.returned(1, 3), [])
        self.assertEqual(core.joined(2, None, False, True), [Assign(2, 3, 0, 1, False)])        # the oldest, at once
        self.assertEqual(core.reported(1, 2, 0, 1, 1.0), [Resolve(2, 0, 1, RESULT)])
        self.assertEqual(core.has_stopped(1, 3), [Assign(1, 4, 0, 1, True)])

    def test_of_tasks_given_ahead_a_daemon_that_ends_costs_the_one_it_had_begun(self):
        core, _ = self.ahead()
        effects = core.lost(1, 2)
        self.assertEqual(effects, [Resolve(2, 0, 1, RESET)])
        self.assertEqual(core.joined(2), [Assign(2, 3, 0, 1, False)])

    def test_nothing_is_given_ahead_to_those_who_do_not_say_what_they_begin_or_end_after_each_task(self):
        for core, daemon in ((mirai.DispatcherCore(), (1,)), (mirai.DispatcherCore(elastic=True), (1, None, False, True))):
            core.joined(*daemon)
            for task in range(1, 9):
                core.submitted(task)
            self.assertEqual(core.reported(1, 1, 0, 1, 0.0001), [Resolve(1, 0, 1, RESULT), Assign(1, 2, 0, 1, False)])

    def test_what_was_taken_back_waits_behind_no_other_daemons_items(self):
        core = self.holding(8)
        self.assertEqual(core.joined(2), [Revoke(1)])
        core.submitted(20, 0, 8, 1)
        self.assertEqual(core.returned(1, 5), [])
        self.assertEqual(core.reported(2, 20, 0, 2, 0.0002), [Resolve(20, 0, 2, RESULT)])       # nothing ahead of its turn
        self.assertEqual(core.reported(2, 20, 2, 6, 0.0006), [Resolve(20, 2, 8, RESULT), Assign(2, 10, 4, 8, False)])

    def test_what_was_cancelled_and_taken_back_never_runs(self):
        core = self.holding(8)
        self.assertEqual(core.cancelled(10, 4, 8), [Interrupt(1, 10, 4, 8)])
        self.assertEqual(core.returned(1, 5), [])
        check_core(core)
        self.assertEqual(core.joined(2), [Revoke(1)])       # of those that are left
        core.reported(1, 10, 0, 4)
        core.has_stopped(1, 5)
        self.assertEqual(core.counts(), (2, 2, 0, 0, 8))
        check_nothing_left(core)

    def test_one_that_has_begun_all_is_not_asked_again_until_it_has_more(self):
        core = self.holding(4)
        self.assertEqual(core.joined(2), [Revoke(1)])
        self.assertEqual(core.returned(1, 5), [])
        self.assertEqual(core.joined(3), [])
        core.leaving(2, mirai.IDLETIME)
        core.leaving(3, mirai.IDLETIME)
        core.submitted(20, 0, 4, 1)
        self.assertEqual(core.reported(1, 10, 0, 4)[1:], [Assign(1, 20, 0, 4, False)])
        self.assertEqual(core.joined(4), [Revoke(1)])

    def test_no_more_are_asked_than_idle(self):
        core = self.core(3, fixed=4)
        core.submitted(10, 0, 12, 1)
        self.assertEqual(sum(type(effect) is Revoke for effect in core.joined(4)), 1)
        self.assertEqual(sum(type(effect) is Revoke for effect in core.joined(5)), 1)

    def test_a_daemon_is_asked_once_until_it_has_answered(self):
        core = self.holding(8)
        self.assertEqual([core.joined(2), core.joined(3)], [[Revoke(1)], []])

    def test_what_will_be_done_in_no_time_is_taken_only_if_it_is_not(self):
        core, effects = self.measured(mirai.STEAL_AFTER / 100, n=16)
        self.assertEqual(effects, [Assign(1, 10, 1, 9, False), Assign(1, 10, 9, 17, False)])
        self.assertEqual([core.joined(2), core.joined(3)], [[LOOK], []])
        self.assertEqual(core.look(), [Revoke(1)])
        self.assertEqual(core.look(), [])

    def test_what_is_done_by_then_is_not_taken(self):
        core, _ = self.measured(mirai.STEAL_AFTER / 100, n=16)
        core.joined(2)
        core.reported(1, 10, 1, 8)
        core.reported(1, 10, 9, 8)
        self.assertEqual(core.look(), [])

    def test_what_takes_long_is_taken_at_once(self):
        core, effects = self.measured(mirai.STEAL_AFTER, n=10)
        self.assertEqual([(e.lo, e.hi) for e in effects], [(1, 6), (6, 11)])
        self.assertEqual(core.joined(2), [Revoke(1)])

    def test_nothing_is_taken_from_a_daemon_that_leaves_or_is_no_more(self):
        core = self.holding(8)
        core.leaving(1, mirai.MAXTASKS)
        self.assertEqual(core.joined(2), [])
        core.lost(1, 2)
        self.assertEqual(core.returned(1, 5), [])
        check_core(core)

    def test_an_end_while_something_is_taken_back_loses_nothing(self):
        core = self.holding(8)
        core.returned(1, 5)
        self.assertEqual(core.lost(1, 2), [Resolve(10, 0, 1, RESET), Resolve(10, 1, 2, RESET)])
        check_core(core)
        self.assertEqual(core.joined(2), [Assign(2, 10, 2, 4, False)])
        self.assertEqual(core.reported(2, 10, 2, 2)[1:], [Assign(2, 10, 4, 8, False)])

    # the table of daemon states

    def in_state(self, state):
        """A core whose daemon 1 is in a state, with task 1 unless it is idle."""
        core = self.core(1)
        if state is not mirai.IDLE:
            core.submitted(1)
        if state is mirai.LEAVING:
            core.leaving(1, mirai.MAXTASKS)
        self.assertIs(core.daemons[1].state, state)
        check_core(core)
        return core

    def test_the_table_has_every_state_and_event(self):
        self.assertEqual(set(mirai.DAEMON_TABLE), set(itertools.product((mirai.IDLE, mirai.BUSY, mirai.LEAVING),
                                                                        ("reported", "leaving"))))

    def test_the_table_is_what_happens(self):
        for (state, event), then in mirai.DAEMON_TABLE.items():
            with self.subTest(state=state, event=event):
                core = self.in_state(state)
                effects = core.reported(1, 1, 0) if event == "reported" else core.leaving(1, mirai.WALLTIME)
                if then is mirai.FAULT:
                    self.assertEqual([type(effect) for effect in effects], [Drop])
                elif then is mirai.IGNORE:
                    self.assertEqual((effects, core.daemons[1].state), ([], state))
                elif (state, event) == (mirai.BUSY, "reported"):        # and idle, once it has answered all
                    self.assertIs(core.daemons[1].state, mirai.IDLE)
                else:
                    self.assertIs(core.daemons[1].state, then)
                check_core(core)

    def test_idle_reported_is_a_fault(self):
        core = self.in_state(mirai.IDLE)
        effect, = core.reported(1, 1, 0)
        self.assertEqual((type(effect), effect.daemon), (Drop, 1))
        self.assertRegex(effect.why, "it answered 1 of task 1 from 0 on while idle")

    def test_busy_reported_is_busy_until_all_is_answered(self):
        core = self.holding(4)
        core.reported(1, 10, 0, 3)
        self.assertIs(core.daemons[1].state, mirai.BUSY)
        core.reported(1, 10, 3)
        self.assertIs(core.daemons[1].state, mirai.IDLE)

    def test_leaving_reported_is_leaving_and_its_answer_counts(self):
        core = self.in_state(mirai.LEAVING)
        core.submitted(2)
        self.assertEqual(core.reported(1, 1, 0), [Resolve(1, 0, 1, RESULT)])
        self.assertIs(core.daemons[1].state, mirai.LEAVING)
        self.assertEqual(core.counts(), (1, 1, 1, 0, 1))

    def test_idle_leaving_gets_no_more_tasks(self):
        core = self.in_state(mirai.IDLE)
        self.assertEqual(core.leaving(1, mirai.IDLETIME), [])
        self.assertEqual(core.submitted(1), [])
        check_core(core)
        self.assertEqual(core.joined(2), [Assign(2, 1, 0, 1, False)])

    def test_busy_leaving_gets_no_more_tasks(self):
        core = self.in_state(mirai.BUSY)
        core.leaving(1, mirai.MAXTASKS)
        core.submitted(2)
        self.assertEqual(core.reported(1, 1, 0), [Resolve(1, 0, 1, RESULT)])

    def test_leaving_leaving_keeps_the_first_reason(self):
        core = self.in_state(mirai.LEAVING)
        self.assertEqual(core.leaving(1, mirai.WALLTIME), [])
        self.assertEqual(core.daemons[1].why, mirai.MAXTASKS)

    def test_one_that_leaves_in_the_middle_of_a_piece_gives_back_the_rest(self):
        core = self.holding(8)
        core.leaving(1, mirai.MAXTASKS)
        self.assertEqual(core.reported(1, 10, 0, 3), [Resolve(10, 0, 3, RESULT)])
        self.assertEqual(core.lost(1, 3), [])
        self.assertEqual(core.joined(2), [Assign(2, 10, 3, 8, False)])

    def test_an_answer_to_another_task_is_a_fault(self):
        for state in (mirai.IDLE, mirai.BUSY, mirai.LEAVING):
            for answer in ((99, 0), (1, 1), (1, 0, 2), (1, 0, 0)):
                core = self.in_state(state)
                before = core.counts()
                effect, = core.reported(1, *answer)
                self.assertEqual((type(effect), effect.daemon, core.counts()), (Drop, 1, before))
                check_core(core)

    def test_a_second_answer_is_a_fault(self):
        for state in (mirai.BUSY, mirai.LEAVING):
            core = self.in_state(state)
            core.reported(1, 1, 0)
            effect, = core.reported(1, 1, 0)
            self.assertIs(type(effect), Drop)
            self.assertEqual(core.counts(), (1, 1, 0, 0, 1))

    def test_a_dropped_daemons_task_ends_with_it(self):
        core = self.in_state(mirai.BUSY)
        core.reported(1, 99, 0)
        self.assertEqual(core.lost(1, 1), [Resolve(1, 0, 1, RESET)])

    # rule 4: slots

    def test_local_daemons_are_launched_when_asked_for_and_again_when_they_end(self):
        core = self.core()
        self.assertEqual(core.launch(range(2)), [Launch(0), Launch(1)])
        core.joined(1, 0)
        self.assertEqual(core.lost(1, 0), [Launch(0)])
        core.joined(2, 1)
        core.submitted(1)
        self.assertEqual(core.lost(2, 1), [Resolve(1, 0, 1, RESET), Launch(1)])
        check_core(core)

    def test_a_daemon_from_elsewhere_is_not_launched_again(self):
        self.assertEqual(self.core(1).lost(1, 0), [])

    def test_a_daemon_that_has_had_its_tasks_is_replaced(self):
        core = self.core(slots=1)
        core.joined(1, 0)
        core.leaving(1, mirai.MAXTASKS)
        self.assertEqual(core.lost(1, 0), [Launch(0)])

    def test_a_daemon_that_has_had_its_time_rests_until_tasks_wait(self):
        for why in (mirai.IDLETIME, mirai.WALLTIME):
            core = self.core(slots=1)
            core.joined(1, 0)
            core.leaving(1, why)
            self.assertEqual(core.lost(1, 0), [])
            self.assertEqual(core.submitted(1), [Launch(0)])
            self.assertEqual(core.submitted(2), [])
            self.assertEqual(core.joined(2, 0), [Assign(2, 1, 0, 1, False)])
            check_core(core)

    def test_a_resting_slot_is_not_launched_for_a_task_that_a_coming_daemon_will_take(self):
        core = self.core(slots=2)
        core.joined(1, 0)
        core.leaving(1, mirai.IDLETIME)
        core.lost(1, 0)
        self.assertEqual(core.submitted(1), [])     # slot 1 is being launched
        self.assertEqual(core.submitted(2), [Launch(0)])
        check_core(core)

    def test_a_resting_slot_is_launched_for_items_that_wait(self):
        core = self.core(slots=3, elastic=True)
        self.assertEqual(core.submitted(10, 0, 2, 1), [Launch(0), Launch(1)])

    def test_direct_a_resting_slot_is_launched_when_tasks_wait_for_others(self):
        core = self.core(slots=2, direct=True)
        core.joined(1, 0)
        core.joined(2, 1)
        core.leaving(2, mirai.IDLETIME)
        core.lost(2, 0)
        self.assertEqual([core.submitted(1), core.submitted(2)], [[Assign(1, 1, 0, 1, False)], [Launch(1)]])
        check_core(core)

    def test_direct_a_daemon_that_ends_is_replaced_by_one(self):
        core = self.core(slots=2, direct=True)
        core.joined(1, 0)
        core.joined(2, 1)
        core.leaving(2, mirai.IDLETIME)
        core.lost(2, 0)
        core.submitted(1)
        core.leaving(1, mirai.MAXTASKS)
        self.assertEqual(core.lost(1, 0), [Launch(0)])
        check_core(core)

    def test_elastic_slots_rest_until_tasks_wait(self):
        core = self.core(elastic=True)
        self.assertEqual(core.launch(range(2)), [])
        self.assertEqual([core.submitted(1), core.submitted(2), core.submitted(3)], [[Launch(0)], [Launch(1)], []])
        self.assertEqual(core.joined(1, 0), [Assign(1, 1, 0, 1, False)])
        core.leaving(1, mirai.MAXTASKS)
        self.assertEqual(core.reported(1, 1, 0), [Resolve(1, 0, 1, RESULT)])
        self.assertEqual(core.lost(1, 1), [Launch(0)])
        check_core(core)

    def test_elastic_slots_rest_again_after_each_daemon(self):
        core = self.core(slots=1, elastic=True)
        core.submitted(1)
        core.joined(1, 0)
        core.leaving(1, mirai.MAXTASKS)
        core.reported(1, 1, 0)
        self.assertEqual(core.lost(1, 1), [])
        self.assertEqual(core.submitted(2), [Launch(0)])

    def test_tasks_that_waited_for_slots_launch_them(self):
        core = self.core(elastic=True)
        core.submitted(1)
        self.assertEqual(core.launch(range(3)), [Launch(0)])

    # rule 5: failed starts

    def fail_until_stopped(self, core, slot=0):
        for _ in range(mirai.MAX_FAILED_STARTS - 1):
            self.assertEqual(core.launch_failed(slot), [Launch(slot)])
        return core.launch_failed(slot)

    def test_five_failed_starts_in_a_row_stop_the_launching(self):
        self.assertEqual(mirai.MAX_FAILED_STARTS, 5)
        core = self.core(slots=1)
        self.assertEqual(self.fail_until_stopped(core), [STOP])
        check_core(core)

    def test_failed_starts_of_different_slots_count_together(self):
        core = self.core(slots=5)
        self.assertEqual([core.launch_failed(slot) for slot in range(5)], [[Launch(slot)] for slot in range(4)] + [[STOP]])
        self.assertEqual(core.launch_failed(0), [])     # one that was still under way
        check_core(core)

    def test_when_the_launching_stops_the_tasks_that_wait_for_it_end(self):
        core = self.core(slots=1)
        core.submitted(1)
        core.submitted(10, 0, 3, 1)
        core.cancelled(10, 1, 2)
        self.assertEqual(self.fail_until_stopped(core), [
            STOP, Resolve(1, 0, 1, LAUNCH), Resolve(10, 0, 1, LAUNCH), Resolve(10, 2, 3, LAUNCH)])
        self.assertEqual(core.counts(), (0, 0, 0, 0, 4))
        self.assertEqual(core.submitted(20), [Resolve(20, 0, 1, LAUNCH)])
        check_nothing_left(core)

    def test_tasks_still_wait_for_daemons_that_are_there_or_coming(self):
        core = self.core(daemons=1, slots=1)
        core.submitted(1)
        core.submitted(2)
        self.assertEqual(self.fail_until_stopped(core), [STOP])
        self.assertEqual(core.reported(1, 1, 0), [Resolve(1, 0, 1, RESULT), Assign(1, 2, 0, 1, False)])
        core.submitted(3)
        self.assertEqual(core.lost(1, 2), [Resolve(2, 0, 1, RESET), Resolve(3, 0, 1, LAUNCH)])

    def test_an_answer_ends_the_row_of_failed_starts(self):
        core = self.core(slots=2)
        for _ in range(mirai.MAX_FAILED_STARTS - 1):
            core.launch_failed(0)
        core.joined(1, 1)
        core.submitted(1)
        core.reported(1, 1, 0)
        self.assertEqual(self.fail_until_stopped(core), [STOP])

    def test_an_answer_of_a_daemon_from_elsewhere_does_not(self):
        core = self.core(1, slots=1)
        for _ in range(mirai.MAX_FAILED_STARTS - 1):
            core.launch_failed(0)
        core.submitted(1)
        core.reported(1, 1, 0)
        self.assertEqual(core.launch_failed(0), [STOP])

    def test_ready_in_name_only_is_a_failed_start(self):
        core = self.core(slots=1)
        core.submitted(1)
        for daemon in range(1, mirai.MAX_FAILED_STARTS + 1):
            self.assertEqual(core.joined(daemon, 0), [Assign(daemon, 1, 0, 1, False)])
            effects = core.lost(daemon, 0)
        self.assertEqual(effects, [STOP, Resolve(1, 0, 1, LAUNCH)])

    def test_the_end_of_a_daemon_that_was_of_use_is_no_failed_start(self):
        core = self.core(slots=1)
        for daemon in range(1, 3 * mirai.MAX_FAILED_STARTS):
            core.joined(daemon, 0)
            core.submitted(daemon)
            self.assertEqual(core.lost(daemon, 1), [Resolve(daemon, 0, 1, RESET), Launch(0)])

    def test_launching_goes_on_when_asked_anew(self):
        core = self.core(slots=2)
        core.launch_failed(1)
        for _ in range(mirai.MAX_FAILED_STARTS - 1):
            core.launch_failed(0)
        core.launch_failed(1)
        self.assertTrue(core.stopped)
        self.assertEqual(core.launch([2]), [Launch(2)])
        self.assertEqual(core.submitted(1), [])
        self.assertEqual(core.submitted(2), [Launch(0)])    # the old slots serve as well
        self.assertEqual(core.launch_failed(2), [Launch(2)])
        check_core(core)

    def test_asking_anew_for_no_more_launches_the_old_slots_when_tasks_wait(self):
        core = self.core(slots=1)
        self.fail_until_stopped(core)
        self.assertEqual(core.launch([]), [])
        self.assertEqual(core.submitted(1), [Launch(0)])

    def test_elastic_launches_that_fail_are_tried_again_and_then_given_up(self):
        core = self.core(slots=2, elastic=True)
        self.assertEqual(core.submitted(1), [Launch(0)])
        failed = [core.launch_failed(i % 2) for i in range(mirai.MAX_FAILED_STARTS)]
        self.assertEqual(failed, [[Launch(1)], [Launch(0)], [Launch(1)], [Launch(0)], [STOP, Resolve(1, 0, 1, LAUNCH)]])
        check_core(core)

    def test_many_cancelled_tasks_leave_nothing_behind(self):
        core = self.core(1)
        core.submitted(0)
        for task in range(1, 1000):
            core.submitted(task)
            core.cancelled(task, 0, 1)
        core.reported(1, 0, 0)
        self.assertEqual(core.counts(), (1, 1, 0, 0, 1000))
        self.assertEqual((len(core.queue), len(core.units)), (0, 0))
        check_nothing_left(core)

    # rule 6: everywhere

    def test_everywhere_runs_once_on_each_daemon(self):
        core = self.core(2)
        self.assertEqual(core.everywhere(50), [mirai.Sized(50, 2), Assign(1, 50, 0, 1, False), Assign(2, 50, 1, 2, False)])
        self.assertEqual(core.reported(2, 50, 1), [Resolve(50, 1, 2, RESULT)])
        self.assertEqual(core.reported(1, 50, 0), [Resolve(50, 0, 1, RESULT)])
        check_nothing_left(core)

    def test_later_tasks_wait_for_everywhere_and_earlier_ones_do_not(self):
        core = self.core(1)
        core.submitted(1)
        core.submitted(2)
        self.assertEqual(core.everywhere(50), [mirai.Sized(50, 1)])
        core.submitted(3)
        self.assertEqual(core.reported(1, 1, 0)[1:], [Assign(1, 2, 0, 1, False)])
        self.assertEqual(core.reported(1, 2, 0)[1:], [Assign(1, 50, 0, 1, False)])
        self.assertEqual(core.reported(1, 50, 0)[1:], [Assign(1, 3, 0, 1, False)])

    def test_nothing_that_came_after_everywhere_is_sent_ahead_of_it(self):
        core = self.core(1)
        core.submitted(10, 0, 1, 1)
        core.reported(1, 10, 0, 1, 1e-6)
        self.assertEqual(core.submitted(20, 0, 8, 1), [Assign(1, 20, 0, 8, False)])
        core.everywhere(50)
        core.submitted(30, 0, 8, 1)
        self.assertEqual(core.reported(1, 20, 0, 4), [Resolve(20, 0, 4, RESULT)])
        self.assertEqual(core.reported(1, 20, 4, 4)[1:], [Assign(1, 50, 0, 1, False)])

    def test_newcomers_run_the_earlier_calls_in_order_before_their_first_task(self):
        core = self.core(1)
        for call in (50, 51):
            core.everywhere(call)
            core.reported(1, call, 0)
        core.submitted(1)
        core.submitted(2)
        self.assertEqual(core.joined(2), [Replay(2, 50, False)])
        self.assertEqual(core.counts(), (2, 1, 1, 1, 2))        # a replay is nobody's task, nor is it ready before
        self.assertEqual(core.reported(2, 50, 0), [Replay(2, 51, False)])
        self.assertEqual(core.counts(), (2, 1, 1, 1, 2))
        self.assertEqual(core.reported(2, 51, 0), [Assign(2, 2, 0, 1, False)])
        self.assertEqual(core.counts()[:2], (2, 2))

    def test_the_first_to_join_answer_up_to_the_minimum(self):
        core = self.core(1)
        self.assertEqual(core.everywhere(50, 3), [mirai.Sized(50, 3), Assign(1, 50, 0, 1, False)])
        check_core(core)
        self.assertEqual([core.joined(daemon) for daemon in (2, 3, 4)],
                         [[Assign(2, 50, 1, 2, False)], [Assign(3, 50, 2, 3, False)], [Replay(4, 50, False)]])

    def test_answers_that_are_open_launch_what_rests(self):
        core = self.core(slots=3, elastic=True)
        self.assertEqual(core.everywhere(50, 2), [mirai.Sized(50, 2), Launch(0), Launch(1)])

    def test_a_call_that_worked_nowhere_is_not_replayed(self):
        core = self.core(1)
        core.everywhere(50)
        self.assertEqual(core.reported(1, 50, 0, failed=True), [Resolve(50, 0, 1, RESULT)])
        self.assertEqual(core.joined(2), [])

    def test_a_call_that_worked_somewhere_is_replayed(self):
        core = self.core(2)
        core.everywhere(50)
        core.reported(1, 50, 0, failed=True)
        core.reported(2, 50, 1)
        self.assertEqual(core.joined(3), [Replay(3, 50, False)])

    def test_a_newcomer_that_ends_in_a_replay_is_a_failed_start(self):
        core = self.core(1, slots=1)
        core.everywhere(50)
        core.reported(1, 50, 0)
        for daemon in range(2, 2 + mirai.MAX_FAILED_STARTS):
            self.assertEqual(core.joined(daemon, 0), [Replay(daemon, 50, False)])
            effects = core.lost(daemon, 1)
        self.assertEqual(effects, [STOP])

    def test_a_daemon_that_ends_in_a_call_answers_with_its_end(self):
        core = self.core(2)
        core.everywhere(50)
        self.assertEqual(core.lost(2, 1), [Resolve(50, 1, 2, RESET)])

    def test_a_daemon_that_ends_before_a_call_leaves_its_answer_to_its_successor(self):
        core = self.core(slots=1)
        core.joined(1, 0)
        core.submitted(1)
        core.everywhere(50)
        self.assertEqual(core.lost(1, 1), [Resolve(1, 0, 1, RESET), Launch(0)])
        check_core(core)
        self.assertEqual(core.joined(2, 0), [Assign(2, 50, 0, 1, False)])

    def test_a_daemon_that_has_no_successor_leaves_no_answer_open(self):
        core = self.core(1)
        core.submitted(1)
        core.everywhere(50)
        self.assertEqual(core.lost(1, 1), [Resolve(1, 0, 1, RESET), Resolve(50, 0, 1, RESET)])
        check_nothing_left(core)

    def test_an_answer_is_not_open_when_the_launching_has_stopped(self):
        core = self.core(1, slots=1)
        core.everywhere(50, 2)
        core.reported(1, 50, 0)
        self.assertEqual(self.fail_until_stopped(core), [STOP, Resolve(50, 1, 2, LAUNCH)])
        check_core(core)

    def test_an_answer_is_not_open_when_the_last_newcomer_does_something_else(self):
        core = self.core(slots=2)
        core.submitted(1)
        self.assertEqual(core.everywhere(50, 2), [mirai.Sized(50, 2)])
        self.assertEqual(self.fail_until_stopped(core), [STOP])
        self.assertEqual(core.joined(1, 1), [Assign(1, 1, 0, 1, False), Resolve(50, 0, 1, LAUNCH), Resolve(50, 1, 2, LAUNCH)])
        check_core(core)

    def test_a_call_that_is_cancelled_runs_on_no_more_daemons(self):
        core = self.core(2)
        core.submitted(1)
        daemon = core.everywhere(50, 4)[1].daemon
        self.assertEqual(core.cancelled(50, 0, 4), [Interrupt(daemon, 50, 0, 1)])
        check_core(core)
        self.assertEqual(core.reported(3 - daemon, 1, 0), [Resolve(1, 0, 1, RESULT)])
        self.assertEqual(core.joined(3), [])
        self.assertEqual(core.reported(daemon, 50, 0, failed=True), [])
        check_nothing_left(core)

    def test_a_call_that_is_cancelled_after_it_worked_is_replayed(self):
        core = self.core(1)
        core.everywhere(50, 3)
        core.reported(1, 50, 0)
        core.cancelled(50, 0, 3)
        self.assertEqual([core.joined(2), core.joined(3)], [[Replay(2, 50, False)], [Replay(3, 50, False)]])

    def test_one_answer_that_is_cancelled_does_not_spare_a_newcomer_the_call(self):
        core = self.core(1)
        core.everywhere(50, 2)
        core.reported(1, 50, 0)
        core.cancelled(50, 1, 2)
        self.assertEqual(core.joined(2), [Replay(2, 50, False)])
        core.reported(2, 50, 0)
        check_core(core)

    def test_a_cancelled_call_leaves_no_answer_to_a_successor(self):
        core = self.core(slots=1)
        core.joined(1, 0)
        core.submitted(1)
        core.everywhere(50)
        core.cancelled(50, 0, 1)
        self.assertEqual(core.lost(1, 1), [Resolve(1, 0, 1, RESET), Launch(0)])
        check_core(core)

    def test_a_call_is_not_taken_back_for_others(self):
        core = self.holding(4)
        core.everywhere(50)
        self.assertEqual(core.joined(2), [Replay(2, 50, False)])
        core.reported(2, 50, 0)
        self.assertEqual(core.reported(1, 10, 0, 4)[1:], [Assign(1, 50, 0, 1, False)])
        self.assertEqual(core.returned(1, 5), [])           # an answer to what was asked before
        check_core(core)
        self.assertEqual(core.has_stopped(1, 5), [Assign(1, 50, 0, 1, True)])
        self.assertEqual(core.reported(1, 50, 0), [Resolve(50, 0, 1, RESULT)])
        check_nothing_left(core)

    def test_a_replay_that_had_not_begun_is_told_again(self):
        core = self.core(1)
        core.everywhere(50)
        core.reported(1, 50, 0)
        self.assertEqual(core.joined(2), [Replay(2, 50, False)])
        self.assertEqual(core.has_stopped(2, 1), [Replay(2, 50, True)])
        self.assertEqual(core.reported(2, 50, 0), [])
        check_nothing_left(core)

    def test_a_replay_is_nothing_that_a_cancel_could_find(self):
        core = self.core(3)
        core.everywhere(50)
        core.reported(1, 50, 0)
        core.cancelled(50, 1, 3)
        self.assertEqual(core.held(2, 50, 0, 3), (1, 1))
        self.assertEqual(core.has_stopped(2, 1), [Replay(2, 50, True)])
        self.assertEqual(core.held(2, 50, 0, 3), None)

    def test_direct_everywhere_comes_before_what_was_submitted_later(self):
        core = self.core(2, direct=True)
        core.submitted(1)
        self.assertEqual(core.everywhere(50), [mirai.Sized(50, 2), Assign(2, 50, 0, 1, False)])
        core.submitted(2)
        core.submitted(3)
        self.assertEqual(core.reported(1, 1, 0)[1:], [Assign(1, 50, 1, 2, False)])
        self.assertEqual(core.reported(2, 50, 0)[1:], [Assign(2, 2, 0, 1, False)])
        self.assertEqual(core.reported(1, 50, 1)[1:], [Assign(1, 3, 0, 1, False)])

    # random events

    def test_random_events_with_persistent_daemons(self):
        self.survives(mirai.DispatcherCore, seeds=range(at_length(60, 200)))

    def test_random_events_with_a_process_per_task(self):
        self.survives(functools.partial(mirai.DispatcherCore, elastic=True), seeds=range(200, at_length(230, 300)))

    def test_random_events_with_queues_of_their_own(self):
        self.survives(functools.partial(mirai.DispatcherCore, direct=True), seeds=range(300, at_length(330, 400)))

    def test_random_events_with_pieces_of_one_size(self):
        self.survives(functools.partial(mirai.DispatcherCore, fixed=6), seeds=range(400, at_length(430, 500)))

    def survives(self, make_core, seeds):
        for seed in seeds:
            events = random_events(seed, 400)
            if World.failure(make_core, events):
                shortest = shrink(events, lambda some: World.failure(make_core, some))
                self.fail(f"seed {seed}, the shortest sequence that fails:\n" + World.story(make_core, shortest))

    def test_a_planted_defect_is_found_and_told_in_a_few_events(self):
        for planted, most, words in PLANTED:
            with self.subTest(planted.__name__):
                make_core = functools.partial(planted, fixed=3)
                found = (events for events in map(lambda seed: random_events(seed, 400), range(200))
                         if World.failure(make_core, events))
                shortest = min((shrink(events, lambda some: World.failure(make_core, some))
                                for events in itertools.islice(found, 3)), key=len)
                story = World.story(make_core, shortest)
                self.assertLessEqual(len(shortest), most, story)
                self.assertRegex(story, f"(?s){words}", story)


class Unfair(mirai.DispatcherCore):
    """Puts tasks back at the wrong end."""
    def _requeue(self, record, back):
        effects = super()._requeue(record, back)
        self.queue.rotate(-len(back))
        return effects


class Talkative(mirai.DispatcherCore):
    """Passes on the answer of a task that was cancelled."""
    def reported(self, daemon, id, lo, n=1, *more):
        effects = super().reported(daemon, id, lo, n, *more)
        return effects if effects else [Resolve(id, lo, lo + n, RESULT)]


class Greedy(mirai.DispatcherCore):
    """Gives tasks to daemons that are leaving."""
    def leaving(self, daemon, why):
        idle = daemon in self.idle
        super().leaving(daemon, why)
        if idle:
            self.idle[daemon] = None
        return []


class Hasty(mirai.DispatcherCore):
    """Takes back one more than was returned: what has just been begun."""
    def returned(self, daemon, position):
        return super().returned(daemon, position - 1)


class Credulous(mirai.DispatcherCore):
    """Believes that what a lost daemon had begun last was not begun."""
    def lost(self, daemon, begun):
        return super().lost(daemon, begun - 1)


class Forgetful(mirai.DispatcherCore):
    """Does not tell one that had stopped that it is to go on."""
    def has_stopped(self, daemon, position):
        return [effect._replace(fresh=False) if type(effect) in (Assign, Replay) else effect
                for effect in super().has_stopped(daemon, position)]


class Unprepared(mirai.DispatcherCore):
    """Does not have newcomers run the earlier calls."""
    def _run_calls(self, daemon, record):
        return super()._run_calls(daemon, record) if record.epoch or record.proven else []


class Hoarding(mirai.DispatcherCore):
    """Keeps what is known of a unit after its end."""
    def _complete(self, unit, n):
        super()._complete(unit, n)
        self.units[unit.id] = unit


class Stubborn(mirai.DispatcherCore):
    """Asks one that has begun all it has again and again."""
    def returned(self, daemon, position):
        effects = super().returned(daemon, position)
        return effects or [Revoke(daemon)] * (daemon in self.daemons and bool(self.idle))


# A defect, in how many events at most it is told, and what is told of it.
PLANTED = [
    (Unfair, 8, "submitted.*not the first in the queue"),
    (Talkative, 8, "submitted.*cancelled.*reported.*out of place"),
    (Greedy, 6, "joined.*leaving"),
    (Hasty, 16, "submitted.*returned"),
    (Credulous, 8, "submitted.*lost.*reset"),
    (Forgetful, 16, "has_stopped.*had stopped"),
    (Unprepared, 6, "everywhere.*a daemon idles beside a call"),
    (Hoarding, 6, "submitted.*unit 1 is miscounted"),
    (Stubborn, 18, r"returned.*Revoke\(daemon=\d+, all=False\)"),
]


# -- 8. Transport


@contextlib.contextmanager
def changed_environ(**values):
    """Environment variables as given, None for absent; as they were afterwards."""
    before = {name: os.environ.get(name) for name in values}

    def put(names):
        for name, value in names.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def own_runtime_dir():
    """An empty run-time directory that the rest of the machine does not see: its path."""
    with tempfile.TemporaryDirectory() as folder, changed_environ(XDG_RUNTIME_DIR=folder, MIRAI_KEY=None):
        yield mirai.runtime_dir()


@contextlib.contextmanager
def replaced(owner, name, value):
    """An attribute replaced for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def converse(dialer, listener, alter=lambda frame: frame):
    """Carries a handshake's frames between its two ends, with no socket, until neither has more to say."""
    to_dialer, to_listener = mirai.Decoder(), mirai.Decoder(mirai.STRANGER_LIMIT)
    to_listener.feed(alter(dialer.hello()))
    while True:
        if (message := to_listener.pop()) is not None:
            to_dialer.feed(alter(listener.receive(message)))
        elif (message := to_dialer.pop()) is not None:
            to_listener.feed(alter(dialer.receive(message)))
        else:
            return


def only_message(frame):
    decoder = mirai.Decoder()
    decoder.feed(frame)
    return decoder.pop()


def flipped(frame, bit):
    changed = bytearray(frame)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def harassed(step, seconds):
    """Calls `step` for so long while a signal handler raises KeyboardInterrupt at random moments; how often it did."""
    armed, hits = False, 0

    def raising(*_):
        nonlocal armed
        if armed:
            armed = False
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raising)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-4))
                step()
                armed = False
            except KeyboardInterrupt:
                hits += 1
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_IGN)       # forgets one that is pending
        signal.signal(signal.SIGALRM, before)
    return hits


def numbered_frame(number):
    """A frame that shows where its bytes were moved: of one to 20,000 bytes, by its number."""
    return mirai.encode(mirai.Kind.TASK, number, number.to_bytes(4, "little") * (number * 7919 % 5000))


class TestTransport(Case):
    KEY = bytes(range(32))

    # -- URLs

    def test_a_url_is_parsed_and_formatted_back(self):
        for url, address in (
            ("tcp://127.0.0.1:5555", ("tcp", "127.0.0.1", 5555)),
            ("tcp://127.0.0.1:0", ("tcp", "127.0.0.1", 0)),
            ("tcp://localhost:65535", ("tcp", "localhost", 65535)),
            ("tcp://[::1]:5555", ("tcp", "::1", 5555)),
            ("ipc:///run/user/1/mirai/0123", ("ipc", "/run/user/1/mirai/0123", None)),
            ("ipc:///with space/and:colon", ("ipc", "/with space/and:colon", None)),
        ):
            with self.subTest(url=url):
                self.assertEqual(mirai.parse_url(url), address)
                self.assertEqual(mirai.format_url(mirai.parse_url(url)), url)

    def test_a_bad_url_is_answered_with_what_is_wrong_and_what_would_be_right(self):
        for url, wrong in (
            ("", "is no URL"),
            ("127.0.0.1:5555", "is no URL"),
            ("ipc:/run/socket", "is no URL"),
            ("http://127.0.0.1:5555", "unknown scheme 'http'"),
            ("tcp://127.0.0.1", "lacks a host or a port"),
            ("tcp://127.0.0.1:", "lacks a host or a port"),
            ("tcp://:5555", "lacks a host or a port"),
            ("tcp://[]:5555", "lacks a host or a port"),
            ("tcp://127.0.0.1:http", "port"),
            ("tcp://127.0.0.1:-1", "port"),
            ("tcp://127.0.0.1:65536", "port"),
            ("tcp://127.0.0.1:\u00b2", "port"),
            ("tcp://::1:5555", "brackets"),
            ("tcp://[::1:5555", "brackets"),
            ("ipc://", "absolute path"),
            ("ipc://socket", "absolute path"),
        ):
            with self.subTest(url=url):
                with self.assertRaises(ValueError) as caught:
                    mirai.parse_url(url)
                self.assertIn(wrong, str(caught.exception))
                self.assertIn(repr(url), str(caught.exception))
                self.assertIn("expected 'tcp://host:5555'", str(caught.exception))
        for url in (None, 5555, b"tcp://127.0.0.1:5555"):
            with self.subTest(url=url), self.assertRaisesRegex(TypeError, "a URL is a str, not .*: expected 'tcp://"):
                mirai.parse_url(url)

    def test_local_url_is_a_new_socket_in_the_users_own_directory_or_loopback(self):
        with own_runtime_dir() as folder:
            first, second = mirai.parse_url(mirai.local_url()), mirai.parse_url(mirai.local_url())
            self.assertEqual((first.scheme, os.path.dirname(first.host)), ("ipc", folder))
            self.assertNotEqual(first, second)
        self.assertEqual(mirai.local_url(tcp=True), "tcp://127.0.0.1:0")
        self.assertEqual(mirai.local_url(tcp=True, port=7), "tcp://127.0.0.1:7")

    def test_where_a_socket_path_would_be_too_long_local_url_is_loopback(self):
        with tempfile.TemporaryDirectory() as folder:
            deep = os.path.join(folder, "d" * 90)
            os.mkdir(deep)
            with changed_environ(XDG_RUNTIME_DIR=deep):
                self.assertEqual(mirai.local_url(), "tcp://127.0.0.1:0")

    # -- the run-time directory

    def test_the_runtime_dir_is_made_for_this_user_alone(self):
        with tempfile.TemporaryDirectory() as folder:
            before = os.umask(0)
            try:
                with changed_environ(XDG_RUNTIME_DIR=folder):
                    path = mirai.runtime_dir()
                    self.assertEqual(path, os.path.join(folder, "mirai"))
                    self.assertEqual(os.stat(path).st_mode & 0o777, 0o700)
                    self.assertEqual(mirai.runtime_dir(), path)
                with changed_environ(XDG_RUNTIME_DIR=None), replaced(tempfile, "tempdir", folder):
                    path = mirai.runtime_dir()
                    self.assertEqual(path, os.path.join(folder, f"mirai-{os.getuid()}"))
                    self.assertEqual(os.stat(path).st_mode & 0o777, 0o700)
            finally:
                os.umask(before)

    def test_the_runtime_dir_must_not_be_open_to_others(self):
        with own_runtime_dir() as path:
            for mode in (0o750, 0o701, 0o720, 0o777):
                with self.subTest(mode=oct(mode)):
                    os.chmod(path, mode)
                    with self.assertRaisesRegex(PermissionError, "belongs to this user alone.*mirai"):
                        mirai.runtime_dir()
            os.chmod(path, 0o700)
            self.assertEqual(mirai.runtime_dir(), path)

    def test_the_runtime_dir_must_not_be_anothers_nor_a_symlink_nor_a_file(self):
        with own_runtime_dir() as path:
            with replaced(os, "getuid", lambda: os.stat(path).st_uid + 1), self.assertRaises(PermissionError):
                mirai.runtime_dir()
            elsewhere = f"{path}-elsewhere"
            os.rename(path, elsewhere)
            os.symlink(elsewhere, path)
            with self.assertRaises(PermissionError):
                mirai.runtime_dir()
            os.unlink(path)
            open(path, "w").close()
            os.chmod(path, 0o600)
            with self.assertRaises(PermissionError):
                mirai.runtime_dir()

    def test_sweeping_removes_dead_sockets_with_their_keys_and_leaves_living_ones(self):
        with own_runtime_dir() as folder, contextlib.ExitStack() as stack:
            paths, keys = {}, {}
            for name in ("dead", "living"):
                paths[name] = os.path.join(folder, name)
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.bind(paths[name])
                sock.listen(1)
                keys[name] = mirai.write_key_file(f"ipc://{paths[name]}", self.KEY)
                if name == "dead":
                    sock.close()
                    os.utime(paths[name], (0, 0))
            tcp_key = mirai.write_key_file("tcp://127.0.0.1:1", self.KEY)
            mirai.sweep_runtime_dir()
            left = sorted(os.path.join(folder, name) for name in os.listdir(folder))
            self.assertEqual(left, sorted([paths["living"], keys["living"], tcp_key]))

    def test_sweeping_leaves_a_socket_that_is_about_to_listen(self):
        with own_runtime_dir() as folder, socket.socket(socket.AF_UNIX) as sock:
            path = os.path.join(folder, "new~")
            sock.bind(path)         # as `listen()` does for a moment, in a dispatcher of another host
            mirai.sweep_runtime_dir()
            self.assertTrue(os.path.exists(path))

    def test_sweeping_minds_no_foreign_files(self):
        with own_runtime_dir() as folder:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(os.path.join(folder, "dead"))
            os.utime(os.path.join(folder, "dead"), (0, 0))
            contents = {"a.key": "", "b.key": "{", "c.key": "[]", "d.key": "\"text\"", "e.key": "{}", "notes": "text"}
            for name, text in contents.items():
                with open(os.path.join(folder, name), "w") as file:
                    file.write(text)
            os.mkdir(os.path.join(folder, "folder"))
            mirai.sweep_runtime_dir()
            self.assertEqual(sorted(os.listdir(folder)), sorted([*contents, "folder"]))

    # -- keys

    def test_a_key_is_32_bytes_or_their_hexadecimal_digits(self):
        for key in (self.KEY, self.KEY.hex(), self.KEY.hex().upper(), f" {self.KEY.hex()}\n"):
            self.assertEqual(mirai.parse_key(key), self.KEY)

    def test_what_is_no_key_is_said_without_showing_it(self):
        for key in (self.KEY[:31], self.KEY + b"x", self.KEY.hex()[:-2], self.KEY.hex()[:-1], "", b"", "secret!" * 9 + "x"):
            with self.subTest(key=key), self.assertRaisesRegex(ValueError, "64 hexadecimal digits") as caught:
                mirai.parse_key(key)
            if key:
                text = key if isinstance(key, str) else repr(key)[2:-1]
                self.assertNotIn(text, str(caught.exception))

    def test_a_key_file_is_for_this_user_alone_and_is_found_by_url(self):
        with own_runtime_dir() as folder:
            before = os.umask(0)
            try:
                path = mirai.write_key_file("tcp://127.0.0.1:1", self.KEY)
            finally:
                os.umask(before)
            other = mirai.write_key_file("tcp://127.0.0.1:2", bytes(32))
            for each in (path, other):
                self.assertEqual(os.path.dirname(each), folder)
                self.assertEqual(os.stat(each).st_mode & 0o777, 0o600)
            self.assertEqual(mirai.find_key("tcp://127.0.0.1:1"), self.KEY)
            self.assertEqual(mirai.find_key("tcp://127.0.0.1:2"), bytes(32))

    def test_the_environments_key_comes_first(self):
        with own_runtime_dir():
            mirai.write_key_file("tcp://127.0.0.1:1", bytes(32))
            with changed_environ(MIRAI_KEY=self.KEY.hex()):
                self.assertEqual(mirai.find_key("tcp://127.0.0.1:1"), self.KEY)
                self.assertEqual(mirai.find_key("tcp://127.0.0.1:9"), self.KEY)

    def test_where_no_key_is_found_the_ways_to_give_one_are_named(self):
        with own_runtime_dir():
            mirai.write_key_file("tcp://127.0.0.1:1", self.KEY)
            with self.assertRaisesRegex(mirai.Refused, "(?s)tcp://127.0.0.1:9.*MIRAI_KEY.*--key-file"):
                mirai.find_key("tcp://127.0.0.1:9")

    def test_key_files_that_hold_something_else_are_passed_over(self):
        url = "tcp://127.0.0.1:1"
        with own_runtime_dir() as folder:
            for i, text in enumerate(("", "{", "[]", "null", "\"text\"", "{}", json.dumps({"url": url}), "{\"url\": 5}",
                                      json.dumps({"url": url, "key": 5}), json.dumps({"url": url, "key": "abc"}))):
                with open(os.path.join(folder, f"{i}.key"), "w") as file:
                    file.write(text)
            os.mkdir(os.path.join(folder, "folder.key"))
            with self.assertRaises(mirai.Refused):
                mirai.find_key(url)
            mirai.write_key_file(url, self.KEY)
            self.assertEqual(mirai.find_key(url), self.KEY)

    # -- the handshake, without sockets

    def ends(self, dialers=KEY, listeners=KEY, role="daemon", **about):
        return mirai.DialerHandshake(dialers, role, about), mirai.ListenerHandshake(listeners)

    def test_with_the_same_key_both_sides_are_done_and_the_listener_knows_who_it_is(self):
        for role in ("daemon", "host"):
            dialer, listener = self.ends(role=role, slot=7)
            converse(dialer, listener)
            self.assertTrue(dialer.done and listener.done)
            self.assertEqual((listener.peer["role"], listener.peer["slot"]), (role, 7))
            self.assertEqual(listener.peer["pid"], os.getpid())

    def test_the_key_is_never_sent(self):
        frames = []
        dialer, listener = self.ends()
        converse(dialer, listener, lambda frame: frames.append(frame) or frame)
        self.assertEqual([frame[9] for frame in frames if frame], [
            mirai.Kind.HELLO, mirai.Kind.CHALLENGE, mirai.Kind.PROOF, mirai.Kind.WELCOME])
        for secret in (self.KEY, self.KEY.hex().encode()):
            self.assertNotIn(secret, b"".join(frames))

    def test_a_listener_with_another_key_learns_no_proof(self):
        dialer, listener = self.ends(listeners=bytes(32))
        with self.assertRaisesRegex(mirai.Refused, "does not hold the key"):
            converse(dialer, listener)
        self.assertFalse(dialer.done or listener.done)

    def test_a_dialer_with_another_key_is_refused(self):
        dialer, listener = self.ends(dialers=bytes(32))
        challenge = only_message(listener.receive(only_message(dialer.hello())))
        dialer.challenge = challenge.payload[32:]
        proof = dialer.proof("dialer")
        with self.assertRaisesRegex(mirai.Refused, "wrong key"):
            listener.receive(mirai.Message(mirai.Kind.PROOF, 0, 0, proof))
        self.assertFalse(listener.done)

    def test_a_proof_that_is_reflected_proves_nothing(self):
        dialer, listener = self.ends()
        challenge = only_message(listener.receive(only_message(dialer.hello())))
        with self.assertRaisesRegex(mirai.Refused, "wrong key"):
            listener.receive(mirai.Message(mirai.Kind.PROOF, 0, 0, challenge.payload[:32]))
        self.assertFalse(listener.done)

    def test_a_conversation_that_is_replayed_proves_nothing(self):
        frames = []
        converse(*self.ends(), lambda frame: frames.append(frame) or frame)
        hello, challenge, proof = map(only_message, frames[:3])
        listener = mirai.ListenerHandshake(self.KEY)
        self.assertNotEqual(only_message(listener.receive(hello)), challenge)
        with self.assertRaisesRegex(mirai.Refused, "wrong key"):
            listener.receive(proof)
        dialer, _ = self.ends()
        with self.assertRaisesRegex(mirai.Refused, "does not hold the key"):
            dialer.receive(challenge)
        self.assertFalse(dialer.done or listener.done)

    def test_a_listener_that_has_not_proven_itself_is_not_believed(self):
        dialer, _ = self.ends()
        dialer.hello()
        with self.assertRaises(mirai.ProtocolError):
            dialer.receive(mirai.Message(mirai.Kind.WELCOME, 0, 0, b""))
        self.assertFalse(dialer.done)

    def test_an_unknown_role_is_refused_by_name(self):
        for role in ("nursery", "", None, 5, ["host"], {}):
            dialer, listener = self.ends(role=role)
            with self.subTest(role=role), self.assertRaisesRegex(mirai.Refused, "role .* is unknown"):
                converse(dialer, listener)
            self.assertFalse(listener.done)

    def test_messages_out_of_order_end_the_handshake(self):
        kinds = [kind for name, kind in vars(mirai.Kind).items() if name.isupper()]
        for kind in kinds:
            dialer, listener = self.ends()
            with self.subTest(kind=kind, first=True):
                if kind != mirai.Kind.HELLO:
                    with self.assertRaises(mirai.ProtocolError):
                        listener.receive(mirai.Message(kind, 0, 0, b"{}"))
                with self.assertRaises(mirai.ProtocolError):
                    dialer.receive(mirai.Message(kind, 0, 0, b"{}"))
            dialer, listener = self.ends()
            hello = only_message(dialer.hello())
            listener.receive(hello)
            with self.subTest(kind=kind, first=False), self.assertRaises(mirai.ProtocolError):
                listener.receive(hello if kind == mirai.Kind.HELLO else mirai.Message(kind, 0, 0, b"{}"))
            self.assertFalse(dialer.done or listener.done)

    def test_a_refusal_says_why(self):
        dialer, _ = self.ends()
        with self.assertRaisesRegex(mirai.Refused, "by the listener: too late"):
            dialer.receive(only_message(mirai.encode_json(mirai.Kind.REFUSED, {"why": "too late"})))

    def test_a_hello_over_4_kib_is_refused_before_its_body_is_there(self):
        dialer, _ = self.ends(padding="x" * 4096)
        decoder = mirai.Decoder(mirai.STRANGER_LIMIT)
        decoder.feed(dialer.hello()[:mirai.HEADER.size])
        with self.assertRaisesRegex(mirai.ProtocolError, "at most 4096"):
            decoder.pop()

    def test_a_hello_that_is_no_json_object_ends_the_handshake(self):
        for payload in (b"", b"{", b"[]", b"5", b"\xff\xfe", b"\"role\"", b"[" * 4000, b"{\"role\":" * 400,
                        b"9" * 4000, b"NaN", b"\x00" * 100):
            _, listener = self.ends()
            with self.subTest(payload=payload[:10]), self.assertRaises(mirai.ProtocolError):
                listener.receive(mirai.Message(mirai.Kind.HELLO, 0, 0, payload))

    def test_a_bit_flipped_in_any_message_never_lets_anybody_in(self):
        frames = []
        converse(*self.ends(), lambda frame: frames.append(frame) or frame)
        for number, name in enumerate(("HELLO", "CHALLENGE", "PROOF")):
            silent = range(10 * 8, mirai.HEADER.size * 8)       # flags and id: without meaning in a handshake
            for bit in range(len(frames[number]) * 8):
                if bit in silent:
                    continue
                dialer, listener = self.ends()
                kind = frames[number][9:10]
                with contextlib.suppress(mirai.ProtocolError):
                    converse(dialer, listener,
                             lambda frame: flipped(frame, bit) if frame[9:10] == kind else frame)
                if dialer.done or listener.done:
                    self.fail(f"bit {bit} of {name} was flipped, and somebody was let in")

    # -- connections

    def pair(self):
        """A connection over a non-blocking socket, and the plain socket at its other end."""
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        ours.setblocking(False)
        return mirai.Connection(ours), theirs

    def test_what_a_socket_does_not_take_at_once_is_sent_later(self):
        connection, theirs = self.pair()
        frames = [mirai.encode(mirai.Kind.TASK, i, os.urandom(300_000)) for i in range(5)]
        self.assertFalse(all([connection.send(frame) for frame in frames]))
        connection.post(b"last")
        self.assertTrue(connection.pending)
        expected, arrived = b"".join(frames) + b"last", bytearray()
        while len(arrived) < len(expected):
            connection.flush()
            arrived += theirs.recv(100_000)
        self.assertEqual(arrived, expected)
        self.assertTrue(connection.flush())
        self.assertFalse(connection.pending)

    def test_a_large_frame_is_read_in_larger_pieces(self):
        connection, theirs = self.pair()
        frame = mirai.encode(mirai.Kind.TASK, 5, os.urandom(3_000_000))
        sender = threading.Thread(target=theirs.sendall, args=(frame,))
        sender.start()
        self.assertEqual(connection.decoder.wanted(), mirai.READ_SIZE)
        wanted, message = [], None
        while message is None:
            mirai.wait_ready(connection.fileno(), LONG)
            connection.receive()
            message = connection.decoder.pop()
            wanted.append(connection.decoder.wanted())
        sender.join()
        self.assertEqual(message, (mirai.Kind.TASK, 5, 0, frame[mirai.HEADER.size:]))
        self.assertEqual(wanted, sorted(wanted, reverse=True))
        self.assertEqual((wanted[0], wanted[-1]), (mirai.READ_LARGE, mirai.READ_SIZE))

    def test_a_connection_knows_its_end(self):
        connection, theirs = self.pair()
        self.assertFalse(connection.receive())
        self.assertFalse(connection.ended)
        theirs.sendall(mirai.encode(mirai.Kind.TASK, 1))
        theirs.close()
        self.assertTrue(connection.receive())
        self.assertEqual(connection.decoder.pop().id, 1)
        self.assertFalse(connection.receive())
        self.assertTrue(connection.ended)
        with self.assertRaises(OSError):
            connection.send(mirai.encode(mirai.Kind.RESULT, 1))

    def test_a_send_that_is_interrupted_loses_and_doubles_nothing(self):
        connection, theirs = self.pair()
        arrived, numbers, sent = [], itertools.count(1), []

        def drain():
            while data := theirs.recv(65536):
                arrived.append(data)

        def step():
            if connection.pending:
                mirai.wait_ready(connection.fileno(), LONG, write=True)
                connection.flush()
            else:
                number = next(numbers)
                connection.send(numbered_frame(number))
                sent.append(number)

        reader = threading.Thread(target=drain)
        reader.start()
        hits = harassed(step, at_length(0.4, 1.0))
        while not connection.flush():
            mirai.wait_ready(connection.fileno(), LONG, write=True)
        connection.sock.shutdown(socket.SHUT_WR)
        reader.join()
        decoder = mirai.Decoder()
        decoder.feed(b"".join(arrived))
        got = []
        for message in decoder:
            self.assertEqual(mirai.encode(message.kind, message.id, message.payload), numbered_frame(message.id))
            got.append(message.id)
        self.assertEqual(sum(len(numbered_frame(number)) for number in got), sum(map(len, arrived)))
        self.assertEqual(got, sorted(set(got)), "a frame came twice, or out of order")
        self.assertEqual(set(sent) - set(got), set(), "a frame was lost")
        self.assertGreater(hits, 50)
        self.assertGreater(len(got), 50)

    def test_a_receive_that_is_interrupted_loses_and_doubles_nothing(self):
        connection, theirs = self.pair()
        got, again, stop, last = {}, [], threading.Event(), []

        def fill():
            for number in itertools.count(1):
                theirs.sendall(numbered_frame(number))
                if stop.is_set():
                    last.append(number)
                    return

        def step():
            mirai.wait_ready(connection.fileno(), 0.01)
            connection.receive()
            for message in connection.decoder:      # one that is being handled when it happens comes again
                if message.id in got and message.id != max(got):
                    again.append(message.id)
                got[message.id] = message.payload

        writer = threading.Thread(target=fill)
        writer.start()
        hits = harassed(step, at_length(0.4, 1.0))
        stop.set()
        wait_until(lambda: (step(), last and last[0] in got)[1], what="the last frame's arrival")
        writer.join()
        self.assertEqual(list(got), list(range(1, last[0] + 1)))
        self.assertEqual([n for n in got if got[n] != numbered_frame(n)[mirai.HEADER.size:]], [])
        self.assertEqual(again, [])
        self.assertGreater(hits, 50)

    def test_a_flush_within_a_flush_sends_each_byte_once(self):
        """As from a signal handler, at each line of it."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            connection = mirai.Connection(ours)
            code, lines = mirai.Connection.flush.__code__, []

            def count(frame, event, arg):
                if frame.f_code is code:
                    lines.append(frame.f_lineno)
                    return count
            sys.settrace(count)
            connection.send(b"outer ")
            sys.settrace(None)
            self.assertEqual(theirs.recv(100), b"outer ")
            for nth in range(len(lines)):
                seen = itertools.count()

                def nested(frame, event, arg):
                    if frame.f_code is code and next(seen) == nth:      # noqa: B023
                        sys.settrace(None)
                        frame.f_trace = None
                        connection.send(b"nested ")
                    return nested
                sys.settrace(nested)
                connection.send(b"outer ")
                sys.settrace(None)
                self.assertTrue(connection.flush())
                self.assertEqual(sorted(theirs.recv(100).split()), [b"nested", b"outer"], nth)

    # -- dialing

    def test_dialing_gives_up_on_a_listener_that_says_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            start = time.monotonic()
            with self.assertRaises(OSError):
                mirai.dial(url, self.KEY, "daemon", {}, timeout=0.1)
            self.assertLess(time.monotonic() - start, 2.0)

    def test_dialing_says_where_nobody_listens_or_somebody_hangs_up(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            thread = threading.Thread(target=lambda: [listener.accept()[0].close() for _ in range(mirai.CUT_SHORT)])
            thread.start()
            with self.assertRaises(ConnectionError):
                mirai.dial(url, self.KEY, "daemon", {})
            thread.join()
        with self.assertRaises(ConnectionRefusedError):
            mirai.dial(url, self.KEY, "daemon", {})

    def test_dialing_sends_no_task_to_a_listener_without_the_key(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def welcome():
                with listener.accept()[0] as sock:
                    sock.sendall(mirai.encode(mirai.Kind.WELCOME))
                    sock.recv(65536)

            thread = threading.Thread(target=welcome)
            thread.start()
            try:
                with self.assertRaises(mirai.ProtocolError):
                    mirai.dial(f"tcp://127.0.0.1:{listener.getsockname()[1]}", self.KEY, "daemon", {}).close()
            finally:
                thread.join()

    def test_listening_says_where_it_cannot(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with self.assertRaisesRegex(OSError, f"can't listen at tcp://127.0.0.1:{port}: "):
                mirai.listen(mirai.Address("tcp", "127.0.0.1", port))
        with tempfile.TemporaryDirectory() as folder:
            with self.assertRaisesRegex(OSError, "can't listen at ipc:///"):
                mirai.listen(mirai.Address("ipc", os.path.join(folder, "no", "such"), None))

    def test_a_socket_file_is_for_this_user_alone(self):
        with tempfile.TemporaryDirectory() as folder:
            sock, address = mirai.listen(mirai.Address("ipc", os.path.join(folder, "socket"), None))
            with sock:
                self.assertEqual(os.stat(address.host).st_mode & 0o777, 0o600)


# -- 9. Shared page


class TestPage(Case):
    def slot(self, number=1, slots=3):
        return mirai.Slot(memoryview(bytearray(slots * mirai.SLOT_SIZE)), number)

    def test_a_cleared_slot_has_begun_nothing_and_has_no_limit(self):
        slot = self.slot()
        slot.begin(7)
        slot.interrupt(8)
        slot.limit(9)
        slot.keep(7, b"outcome")
        slot.passing_output(True)
        slot.clear()
        self.assertEqual((slot.begun, slot.interrupted, slot.outcomes(1), sum(slot.words)), (0, 0, [], mirai.NO_LIMIT))
        self.assertTrue(slot.begin(mirai.NO_LIMIT - 1))

    def test_slots_lie_side_by_side_and_nobody_writes_into_anothers(self):
        page = memoryview(bytearray(3 * mirai.SLOT_SIZE))
        slot = mirai.Slot(page, 1)
        slot.clear()
        slot.begin(1)
        slot.interrupt(2)
        slot.limit(3)
        slot.passing_output(True)
        self.assertTrue(slot.keep(1, b"x" * (mirai.SLOT_SIZE - mirai.SLOT_HEAD - mirai.LENGTH.size)))
        self.assertEqual(bytes(page[:mirai.SLOT_SIZE]) + bytes(page[2 * mirai.SLOT_SIZE:]), bytes(2 * mirai.SLOT_SIZE))
        self.assertEqual(page[2 * mirai.SLOT_SIZE - 1], ord("x"))

    def test_each_word_has_one_writer(self):
        def written(act):
            slot = self.slot()
            act(slot)
            return {i for i, word in enumerate(slot.words) if word}

        dispatcher = [written(lambda slot: slot.interrupt(5)), written(lambda slot: slot.limit(5))]
        daemon = [written(lambda slot: slot.begin(5)), written(lambda slot: slot.keep(5, b"outcome"))]
        nursery = [written(lambda slot: slot.passing_output(True))]
        self.assertEqual([len(words) for words in (*dispatcher, *daemon, *nursery)], [1, 1, 1, 2, 1])
        self.assertEqual(sorted(itertools.chain(*dispatcher, *daemon, *nursery)), list(range(6)))

    def test_what_one_side_writes_the_other_reads(self):
        with tempfile.TemporaryFile() as file:
            file.truncate(mirai.SLOTS * mirai.SLOT_SIZE)
            here, there = (mirai.Slot(mirai.new_page(file.fileno()), mirai.SLOTS - 1) for _ in range(2))
            here.clear()
            here.limit(3)
            self.assertEqual([there.begin(1), there.begin(2), there.begin(3), there.begin(4)], [True, True, False, False])
            self.assertEqual(here.begun, 4)         # said before it was looked whether that is allowed
            here.interrupt((1 << 64) - 1)
            self.assertEqual(there.interrupted, (1 << 64) - 1)
            there.keep(4, b"four")
            self.assertEqual(here.outcomes(4), [b"four"])
            self.assertLess(os.fstat(file.fileno()).st_blocks * 512, 1 << 20)   # what nobody touches costs nothing

    def test_a_page_is_shared_with_whoever_is_forked(self):
        page = mirai.new_page()
        self.assertEqual(len(page), mirai.SLOTS * mirai.SLOT_SIZE)
        pid = os.fork()
        if pid == 0:
            try:
                mirai.Slot(page, 5).begin(77)
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        self.assertEqual(mirai.Slot(page, 5).begun, 77)

    def test_outcomes_are_kept_from_any_position_on(self):
        slot = self.slot()
        slot.clear()
        outcomes = [b"", b"one", b"\0" * 5, b"x" * 300]
        for position, outcome in enumerate(outcomes, 10):
            self.assertTrue(slot.keep(position, outcome))
        for position in range(16):
            self.assertEqual(slot.outcomes(position), outcomes[max(0, position - 10):])

    def test_what_finds_no_room_is_not_kept_and_spoils_nothing(self):
        room = mirai.SLOT_SIZE - mirai.SLOT_HEAD
        slot = self.slot()
        self.assertFalse(slot.keep(1, b"x" * (room - mirai.LENGTH.size + 1)))
        self.assertEqual(slot.outcomes(1), [])
        self.assertTrue(slot.keep(1, b"x" * (room - mirai.LENGTH.size)))
        self.assertFalse(slot.keep(2, b""))
        self.assertEqual(slot.outcomes(1), [b"x" * (room - mirai.LENGTH.size)])
        slot.sent()
        kept = 0
        while slot.keep(2 + kept, b"y" * 96):
            kept += 1
        self.assertEqual(kept, room // 100)
        self.assertEqual(slot.outcomes(2), [b"y" * 96] * kept)

    def test_what_was_sent_is_forgotten_and_what_came_after_is_kept(self):
        slot = self.slot()
        for position in (1, 2, 3):
            slot.keep(position, b"%d" % position)
        slot.sent()
        self.assertEqual(slot.outcomes(1), [])
        slot.keep(4, b"4")
        slot.keep(5, b"5")
        self.assertEqual([slot.outcomes(position) for position in (4, 5, 6)], [[b"4", b"5"], [b"5"], []])

    def test_after_a_partial_flush_only_what_was_not_received_counts(self):
        slot = self.slot()      # killed between sending and forgetting: the dispatcher has read two of three
        for position in (7, 8, 9):
            slot.keep(position, b"%d" % position)
        self.assertEqual(slot.outcomes(9), [b"9"])

    def test_an_outcome_that_was_half_written_is_not_there(self):
        slot = self.slot()
        slot.keep(1, b"whole")
        slot.area[slot.used:slot.used + 40] = mirai.LENGTH.pack(1000) + b"x" * 36
        self.assertEqual(slot.outcomes(1), [b"whole"])

    def test_output_is_waited_for_until_it_was_read_and_passed_on(self):
        ours, theirs = os.pipe()
        try:
            slot = self.slot()
            slot.wait_output([theirs], LONG)            # nothing was written
            os.write(theirs, b"said")
            steps = []

            def nursery():
                slot.passing_output(True)
                steps.append(os.read(ours, 10))
                wait_until(lambda: waiter.is_alive() and len(steps) == 1)
                time.sleep(0.05)
                steps.append("passed on")
                slot.passing_output(False)

            waiter = threading.Thread(target=lambda: (slot.wait_output([theirs], LONG), steps.append("waited")))
            waiter.start()
            nursery()
            waiter.join(LONG)
            self.assertEqual(steps, [b"said", "passed on", "waited"])
        finally:
            os.close(ours)
            os.close(theirs)

    def test_output_that_nobody_reads_is_not_waited_for_for_ever(self):
        ours, theirs = os.pipe()
        os.write(theirs, b"said")
        start = time.monotonic()
        self.slot().wait_output([theirs, 1 << 20], 0.05)        # nor for a descriptor that a task has closed
        self.assertLess(time.monotonic() - start, 5.0)
        os.close(ours)
        os.close(theirs)

    RUNNER = """
        import sys
        import mirai
        page = mirai.new_page(int(sys.argv[1]))
        slot, told = mirai.Slot(page, 0), mirai.Slot(page, 1).words
        RAN, STOPPED, ROUND, END = range(4)     # words of the other slot, for the test alone: the last that was run, ...
        begin, position, rounds = slot.begin, 1, 0
        while True:
            while begin(position):
                told[RAN] = position
                position += 1
            told[STOPPED] = position
            rounds += 1
            while told[ROUND] < rounds:
                if told[END]:
                    sys.exit()
        """

    def test_nothing_at_or_beyond_the_cut_is_ever_run_and_nothing_before_it_is_left_out(self):
        # One process runs what it may, as fast as it can; this one takes back, as a dispatcher does.
        with tempfile.TemporaryFile() as file:
            file.truncate(mirai.SLOTS * mirai.SLOT_SIZE)
            page = mirai.new_page(file.fileno())
            slot, told = mirai.Slot(page, 0), mirai.Slot(page, 1).words
            slot.clear()
            runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(self.RUNNER), str(file.fileno())],
                                      pass_fds=[file.fileno()], env={**os.environ, "PYTHONPATH": HERE})
            try:
                wait_until(lambda slot=slot: slot.begun)
                chance, beyond, before, rounds = random.Random(3), 0, 0, 0
                end = time.monotonic() + 2.5
                while time.monotonic() < end and rounds < at_length(1500, 5000):
                    limit = slot.begun + chance.choice([0, 0, 1, 1, 2, 3, 5, 10, 30, 100, 300, 1000, 5000])
                    slot.limit(limit)
                    time.sleep(mirai.REVOKE_TIME)
                    cut = max(limit, slot.begun + 1)
                    before += cut == limit
                    while not told[1]:
                        time.sleep(0.00005)
                    ran, stopped = told[0], told[1]
                    self.assertLess(ran, cut, f"round {rounds}, limit {limit}")
                    self.assertEqual((ran, slot.begun), (stopped - 1, stopped), f"round {rounds}, limit {limit}")
                    self.assertLessEqual(stopped, cut)
                    self.assertGreaterEqual(stopped, limit)
                    beyond += stopped > limit
                    slot.limit(mirai.NO_LIMIT)
                    told[1] = 0
                    rounds += 1
                    told[2] = rounds
                self.assertGreater(rounds, 300)
                self.assertGreater(beyond, 0, "it never ran on")
                self.assertGreater(before, 0, "it was always there before one looked")
            finally:
                told[3] = 1
                slot.limit(0)
                try:
                    runner.wait(5.0)
                finally:
                    runner.kill()
                    runner.wait()
            del slot, told, page


# -- 10. Dispatcher shell

NO_PROCESS = (1 << 22) + 1      # more than a process id can be: killing it kills nobody


class Peer:
    """A scripted host or daemon on an authenticated connection."""

    def __init__(self, connection):
        self.connection = connection
        connection.sock.settimeout(LONG)
        self.waiting = collections.deque()
        self.notices = []

    def say(self, kind, id=0, payload=b"", flags=0):
        self.say_bytes(mirai.encode(kind, id, payload, flags))

    def say_bytes(self, data):
        channel = self.connection.channel
        for piece in [data] if channel is None else channel.wrap(data):
            self.connection.sock.sendall(piece)

    def hear(self, counts=False):
        """The next message, None at the end of the connection; a host's COUNTS are passed over unless asked for, and its
        NOTICEs are kept."""
        while True:
            message = self.connection.decoder.pop()
            if message is None:
                if not self.connection.receive():
                    return None
            elif message.kind == mirai.Kind.NOTICE:
                self.notices.append(mirai.decode_json(message)["text"])
            elif counts or message.kind != mirai.Kind.COUNTS:
                return message

    def told(self, words):
        """Waits for a NOTICE with these words, and nothing else."""
        while not any(words in text for text in self.notices):
            message = self.connection.decoder.pop()
            if message is None:
                assert self.connection.receive(), f"no notice of {words!r}, but {self.notices}"
            elif message.kind == mirai.Kind.NOTICE:
                self.notices.append(mirai.decode_json(message)["text"])
            else:
                assert message.kind == mirai.Kind.COUNTS, message

    def close(self):
        self.connection.close()


class Shell:
    """A real dispatcher in a thread, a scripted nursery at the other end of its control pipe."""

    def __init__(self, url=None, slots=8, **spec):
        self.key = os.urandom(32)
        ours, theirs = socket.socketpair()
        self.nursery = Peer(mirai.Connection(ours))
        self.page = memoryview(bytearray(slots * mirai.SLOT_SIZE))
        self.dispatcher = mirai.Dispatcher({"url": url or mirai.local_url(), "key": self.key.hex(), "elastic": False,
                                            "direct": False, "fixed": None, **spec}, mirai.Connection(theirs), self.page)
        self.status = None
        self.thread = threading.Thread(target=self._run, name="dispatcher")
        self.peers = []

    def _run(self):
        try:
            self.status = self.dispatcher.run()
        except BaseException as error:      # for the test to see
            self.status = error
        dispatcher = self.dispatcher        # as when its process ends:
        for each in (dispatcher.nursery, dispatcher.listener, dispatcher.selector,
                     *(peer.connection for peer in dispatcher.peers.values())):
            each.close()

    def __enter__(self):
        self.thread.start()
        self.listening = mirai.decode_json(self.nursery.hear())
        self.url, self.files = self.listening["url"], self.listening["files"]
        return self

    def __exit__(self, *problem):
        self.nursery.close()
        self.thread.join(LONG)
        for peer in self.peers:
            peer.close()
        if isinstance(self.status, BaseException):
            raise AssertionError(f"the dispatcher failed: {self.status!r}") from self.status
        if self.thread.is_alive():
            raise AssertionError("the dispatcher did not end")

    def dial(self, role, **about):
        peer = Peer(mirai.dial(self.url, self.key, role, about))
        self.peers.append(peer)
        return peer

    def host(self):
        return self.dial("host")

    def daemon(self):
        return self.dial("daemon")

    def local_daemon(self, launch, pid=NO_PROCESS, page=True):
        return self.dial("daemon", slot=launch[0], serial=launch[1], pid=pid, page=page)

    def slot(self, launch):
        """The part of the page that a local daemon shares with the dispatcher."""
        return mirai.Slot(self.page, launch[0])

    def stranger(self):
        """A socket that has connected and said nothing."""
        address = mirai.parse_url(self.url)
        if address.scheme == "ipc":
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(address.host)
        else:
            sock = socket.create_connection((address.host, address.port))
        peer = Peer(mirai.Connection(sock))
        self.peers.append(peer)
        return peer


class TestDispatcher(Case):
    K = mirai.Kind

    def shell(self, **options):
        shell = Shell(**options)
        self.addCleanup(shell.__exit__, None, None, None)
        return shell.__enter__()

    def expect(self, message, kind, id, payload=None):
        self.assertIsNotNone(message, "the connection has ended")
        self.assertEqual((message.kind, message.id), (kind, id), message)
        if payload is not None:
            self.assertEqual(message.payload, payload)

    def expect_refusal(self, stranger, why):
        """A REFUSED frame that says why, and then the end."""
        message = stranger.hear()
        self.expect(message, self.K.REFUSED, 0)
        self.assertRegex(mirai.decode_json(message)["why"], why)
        self.assertIsNone(stranger.hear())

    def launched(self, shell, host, n=1, **options):
        """Asks for n local daemons, and gives their launches as the nursery is told."""
        host.say(self.K.LAUNCH, payload=json.dumps({"n": n, "spec": {"env": {}, "options": options}}).encode())
        message = shell.nursery.hear()
        self.expect(message, self.K.FORK, 0)
        launches = mirai.decode_json(message)["launches"]
        self.assertEqual(len(launches), n)
        return launches

    def ended(self, shell, launch, status=1, words=""):
        """The nursery reports the end of a local daemon."""
        shell.nursery.say(self.K.ENDED, payload=json.dumps({
            "slot": launch[0], "serial": launch[1], "pid": NO_PROCESS, "status": status, "words": words}).encode())

    def local(self, shell, host, **options):
        """One local daemon: its launch, itself, and its part of the page."""
        launch, = self.launched(shell, host, **options)
        return launch, shell.local_daemon(launch), shell.slot(launch)

    def cancel(self, host, id, lo=0, hi=1):
        host.say(self.K.CANCEL, id, mirai.RANGE.pack(lo, hi))

    def unit(self, host, id, n, needs=(), retries=0, map=1):
        """The host sends n items of a map; gives the payload."""
        frame = mirai.encode_task(self.K.UNIT, id, [mirai.UNIT_HEAD.pack(n, map), b"items"], needs, retries)
        host.connection.sock.sendall(frame)
        return frame[mirai.HEADER.size:]

    def expect_run(self, message, id, lo, hi, fresh=False):
        self.expect(message, self.K.RUN, id, mirai.RANGE.pack(lo, hi))
        self.assertEqual(message.flags, mirai.FRESH if fresh else 0)

    def results(self, daemon, id, lo, hi, seconds=0.0):
        """A daemon answers items; gives the payload. Of what took no time nothing is learnt."""
        outcomes = [b"outcome %d" % index for index in range(lo, hi)]
        position = 1 << 40      # none of them is known already, whatever it is at
        payload = b"".join([mirai.RESULTS_HEAD.pack(position, lo, hi - lo, seconds), *mirai.join_apart(outcomes)])
        daemon.say(self.K.RESULTS, id, payload)
        return payload

    def expect_lost(self, message, id, lo=0, hi=1):
        self.expect(message, self.K.LOST, id)
        report = mirai.decode_json(message)
        self.assertEqual((report["lo"], report["hi"]), (lo, hi))
        return report["text"]

    # -- tasks and results

    def test_a_task_goes_to_a_daemon_and_its_result_to_the_host(self):
        for url in (None, "tcp://127.0.0.1:0"):
            with self.subTest(url=url):
                shell = self.shell(url=url)
                host, daemon = shell.host(), shell.daemon()
                host.say(self.K.TASK, 5, b"the task")
                self.expect(daemon.hear(), self.K.TASK, 5, b"the task")
                daemon.say(self.K.RESULT, 5, b"the outcome")
                self.expect(host.hear(), self.K.RESULT, 5, b"the outcome")

    def test_tasks_go_out_in_order_to_whoever_is_idle(self):
        shell = self.shell()
        host = shell.host()
        for task in range(1, 8):
            host.say(self.K.TASK, task)
        first = shell.daemon()
        self.expect(first.hear(), self.K.TASK, 1)
        second = shell.daemon()
        self.expect(second.hear(), self.K.TASK, 2)
        for daemon, done, then in ((second, 2, 3), (second, 3, 4), (first, 1, 5), (second, 4, 6), (first, 5, 7)):
            daemon.say(self.K.RESULT, done)
            self.expect(host.hear(), self.K.RESULT, done)
            self.expect(daemon.hear(), self.K.TASK, then)

    def define(self, host, *names):
        """The host sends definitions; gives their hashes."""
        hashes = [name * mirai.HASH_SIZE for name in names]
        for name, hash in zip(names, hashes):
            host.say(self.K.DEFINE, payload=hash + b"definition " + name)
        return hashes

    def submit(self, host, task, needs):
        host.connection.sock.sendall(mirai.encode_task(self.K.TASK, task, [b"task"], needs, 0))

    def test_each_daemon_is_sent_a_definition_once_before_the_first_task_that_needs_it(self):
        shell = self.shell()
        host = shell.host()
        a, b = self.define(host, b"a", b"b")
        first = shell.daemon()
        for task, needs, expected in ((1, [a], [a]), (2, [a], []), (3, [a, b], [b]), (4, [], [])):
            self.submit(host, task, needs)
            for hash in expected:
                self.expect(first.hear(), self.K.DEFINE, 0, hash + b"definition " + hash[:1])
            self.expect(first.hear(), self.K.TASK, task)
            first.say(self.K.RESULT, task)
            self.expect(host.hear(), self.K.RESULT, task)
        self.submit(host, 5, [])
        self.expect(first.hear(), self.K.TASK, 5)
        second = shell.daemon()
        self.submit(host, 6, [b])
        self.expect(second.hear(), self.K.DEFINE, 0, b + b"definition b")
        self.expect(second.hear(), self.K.TASK, 6)

    # -- items of a map

    def test_items_are_sent_once_to_each_daemon_that_is_told_to_run_some(self):
        shell = self.shell(fixed=2)
        host, first = shell.host(), shell.daemon()
        a, = self.define(host, b"a")
        payload = self.unit(host, 10, 7, [a])
        self.expect(first.hear(), self.K.DEFINE, 0, a + b"definition a")
        self.expect(first.hear(), self.K.UNIT, 10, payload)
        self.expect_run(first.hear(), 10, 0, 2)
        second = shell.daemon()
        self.expect(second.hear(), self.K.DEFINE, 0)
        self.expect(second.hear(), self.K.UNIT, 10, payload)
        self.expect_run(second.hear(), 10, 2, 4)
        for daemon, done, then in ((first, (0, 2), (4, 6)), (second, (2, 4), (6, 7))):
            results = self.results(daemon, 10, *done)
            self.expect(host.hear(), self.K.RESULTS, 10, results)
            self.expect_run(daemon.hear(), 10, *then)

    def test_of_many_frames_of_items_a_daemon_that_may_have_dropped_one_is_sent_it_again(self):
        shell = self.shell(fixed=1)
        host, first, second = shell.host(), shell.daemon(), shell.daemon()
        payload = self.unit(host, 1, 2)
        for daemon, index in ((second, 0), (first, 1)):
            self.expect(daemon.hear(), self.K.UNIT, 1)
            self.expect_run(daemon.hear(), 1, index, index + 1)
        done = 1, 0
        for id in range(11, 11 + mirai.KEPT_UNITS):
            self.unit(host, id, 1)
            self.results(second, *done[:1], done[1], done[1] + 1)
            self.expect(host.hear(), self.K.RESULTS, done[0])
            self.expect(second.hear(), self.K.UNIT, id)
            self.expect_run(second.hear(), id, 0, 1)
            done = id, 0
        first.close()                   # it has claimed nothing
        wait_until(lambda: len(shell.dispatcher.core.daemons) == 1)
        self.results(second, done[0], 0, 1)
        self.expect(second.hear(), self.K.UNIT, 1, payload)
        self.expect_run(second.hear(), 1, 1, 2)

    def test_a_frame_of_items_is_kept_until_all_are_resolved_and_no_longer(self):
        shell = self.shell(fixed=2)
        host, daemon = shell.host(), shell.daemon()
        self.unit(host, 1, 4)
        self.unit(host, 5, 4)
        self.expect(daemon.hear(), self.K.UNIT, 1)
        for lo in (0, 2):
            wait_until(lambda: sorted(shell.dispatcher.frames) == [1, 5])
            self.expect_run(daemon.hear(), 1, lo, lo + 2)
            self.results(daemon, 1, lo, lo + 2)
            self.expect(host.hear(), self.K.RESULTS, 1)
        self.expect(daemon.hear(), self.K.UNIT, 5)
        self.assertEqual(sorted(shell.dispatcher.frames), [5])
        self.expect_run(daemon.hear(), 5, 0, 2)
        self.cancel(host, 5, 0, 4)
        wait_until(lambda: not shell.dispatcher.frames)

    def test_results_are_passed_on_as_they_come(self):
        shell = self.shell(fixed=5)
        host, daemon = shell.host(), shell.daemon()
        self.unit(host, 1, 5)
        self.expect(daemon.hear(), self.K.UNIT, 1)
        self.expect_run(daemon.hear(), 1, 0, 5)
        for lo, hi in ((0, 1), (1, 4), (4, 5)):
            results = self.results(daemon, 1, lo, hi)
            self.expect(host.hear(), self.K.RESULTS, 1, results)
        host.say(self.K.TASK, 6)
        self.expect(daemon.hear(), self.K.TASK, 6)

    def test_a_daemon_that_answers_items_out_of_turn_is_dropped_and_nothing_of_it_is_passed_on(self):
        for lo, hi in ((1, 2), (0, 6), (0, 0), (5, 6)):
            with self.subTest(lo=lo, hi=hi), contextlib.redirect_stderr(io.StringIO()):
                shell = self.shell(fixed=5)
                host, liar = shell.host(), shell.daemon()
                self.unit(host, 1, 5)
                self.expect(liar.hear(), self.K.UNIT, 1)
                self.expect_run(liar.hear(), 1, 0, 5)
                self.results(liar, 1, lo, hi)
                self.assertIsNone(liar.hear())
                honest = shell.daemon()
                self.expect(honest.hear(), self.K.UNIT, 1)
                self.expect_run(honest.hear(), 1, 0, 5)
                results = self.results(honest, 1, 0, 5)
                self.expect(host.hear(), self.K.RESULTS, 1, results)

    def test_a_daemon_whose_results_make_no_sense_is_dropped(self):
        for payload in (b"", b"short"):
            with self.subTest(payload=payload), contextlib.redirect_stderr(io.StringIO()):
                shell = Shell(fixed=5)
                shell.__enter__()
                try:
                    host, liar = shell.host(), shell.daemon()
                    self.unit(host, 1, 5)
                    self.expect(liar.hear(), self.K.UNIT, 1)
                    liar.say(self.K.RESULTS, 1, payload)
                    self.expect(shell.daemon().hear(), self.K.UNIT, 1)
                finally:
                    shell.__exit__()

    def shared(self, kind, begun=0):
        """Ten items that a foreign daemon, or a local one that has begun some, is to share with another that has come."""
        shell = self.shell(fixed=10)
        host = shell.host()
        slot = None
        if kind == "local":
            launch, slow, slot = self.local(shell, host)
        else:
            slow = shell.daemon()
        self.unit(host, 1, 10)
        self.expect(slow.hear(), self.K.UNIT, 1)
        self.expect_run(slow.hear(), 1, 0, 10)
        if begun:
            slot.begin(begun)
        other = shell.daemon()
        return shell, host, slow, other, slot

    def test_a_daemon_has_half_of_what_it_has_not_begun_taken_back_for_one_that_idles(self):
        for cut in (6, 8, 10):          # as it was asked; and where it has begun more meanwhile
            with self.subTest(cut=cut):
                shell, host, slow, other, _ = self.shared("foreign")
                self.expect(slow.hear(), self.K.LIMIT, 6)       # of positions 1 to 10, the first may have been begun
                slow.say(self.K.CUT, cut)
                self.expect(other.hear(), self.K.UNIT, 1)
                self.expect_run(other.hear(), 1, cut - 1, 10)
                for daemon, lo, hi in ((other, cut - 1, 10), (slow, 0, cut - 1)):
                    results = self.results(daemon, 1, lo, hi)
                    self.expect(host.hear(), self.K.RESULTS, 1, results)
                self.assertEqual(shell.dispatcher.core.unresolved, 0)

    def test_one_that_was_stopped_is_given_nothing_until_it_has_and_then_is_told_that_it_is_meant(self):
        shell, host, slow, other, _ = self.shared("foreign")
        self.expect(slow.hear(), self.K.LIMIT, 6)
        slow.say(self.K.CUT, 6)
        self.expect(other.hear(), self.K.UNIT, 1)
        self.expect_run(other.hear(), 1, 5, 10)
        self.results(slow, 1, 0, 5)
        self.expect(host.hear(), self.K.RESULTS, 1)
        host.say(self.K.TASK, 50)
        self.results(other, 1, 5, 10)
        self.expect(host.hear(), self.K.RESULTS, 1)
        self.expect(other.hear(), self.K.TASK, 50)      # though the other was first to be done
        host.say(self.K.TASK, 51)
        slow.say(self.K.STOPPED, 6)
        message = slow.hear()
        self.expect(message, self.K.TASK, 51)
        self.assertEqual(message.flags, mirai.FRESH)
        slow.say(self.K.RESULT, 51)
        self.expect(host.hear(), self.K.RESULT, 51)
        host.say(self.K.TASK, 52)
        message = slow.hear()
        self.expect(message, self.K.TASK, 52)
        self.assertEqual(message.flags, 0)

    def test_what_it_stopped_before_goes_to_others_though_it_said_nothing_of_a_cut(self):
        shell, host, slow, other, _ = self.shared("foreign")
        self.expect(slow.hear(), self.K.LIMIT, 6)
        self.results(slow, 1, 0, 5)
        slow.say(self.K.STOPPED, 6)
        self.expect(host.hear(), self.K.RESULTS, 1)
        self.expect(other.hear(), self.K.UNIT, 1)       # and not to itself, while the other idles
        self.expect_run(other.hear(), 1, 5, 10)

    def test_a_cut_that_comes_after_the_stop_it_announced_takes_nothing_back(self):
        shell, host, slow, other, _ = self.shared("foreign")    # they are said by two threads of the daemon
        self.expect(slow.hear(), self.K.LIMIT, 6)
        host.say(self.K.TASK, 50)
        self.expect(other.hear(), self.K.TASK, 50)
        self.results(slow, 1, 0, 5)
        self.expect(host.hear(), self.K.RESULTS, 1)
        slow.say(self.K.STOPPED, 6)
        self.expect_run(slow.hear(), 1, 5, 10, fresh=True)
        slow.say(self.K.CUT, 6)
        self.results(slow, 1, 5, 10)
        self.expect(host.hear(), self.K.RESULTS, 1)

    def test_a_daemon_that_stops_before_it_has_answered_is_dropped(self):
        shell, host, slow, other, _ = self.shared("foreign")
        self.expect(slow.hear(), self.K.LIMIT, 6)
        slow.say(self.K.STOPPED, 6)
        self.assertIsNone(slow.hear())
        host.told("stopped at 6")

    def test_of_a_local_daemon_it_is_taken_back_through_the_page(self):
        for begun, limit, cut in ((1, 6, 6), (4, 8, 8), (4, 8, 10)):     # the last: it went on before it saw the limit
            with self.subTest(begun=begun, cut=cut), replaced(mirai, "REVOKE_TIME", 0.05 if cut > limit else 0.0003):
                shell, host, slow, other, slot = self.shared("local", begun)
                wait_until(lambda: slot.words[2] != mirai.NO_LIMIT, what="the limit")
                self.assertEqual(slot.words[2], limit)
                slot.words[1] = max(begun, cut - 1)
                self.expect(other.hear(), self.K.UNIT, 1)
                self.expect_run(other.hear(), 1, cut - 1, 10)
                self.results(slow, 1, 0, cut - 1)
                self.expect(host.hear(), self.K.RESULTS, 1)
                self.assertFalse(slot.begin(cut))
                slow.say(self.K.STOPPED, cut)
                host.say(self.K.TASK, 50)
                message = slow.hear()
                self.expect(message, self.K.TASK, 50)
                self.assertEqual(message.flags, mirai.FRESH)
                self.assertTrue(slot.begin(11))         # positions go on behind what was taken back

    def test_a_local_daemon_that_has_begun_its_last_item_keeps_it_and_may_go_on(self):
        with replaced(mirai, "REVOKE_TIME", 0.2):
            shell, host, slow, other, slot = self.shared("local", 9)
            wait_until(lambda: slot.words[2] == 10, what="the limit")
            slot.words[1] = 10          # it has not seen that yet
            self.unit(host, 20, 1)      # this one goes to the daemon that idles
            self.expect(other.hear(), self.K.UNIT, 20)
            wait_until(lambda: slot.words[2] == mirai.NO_LIMIT, what="the end of the limit")
            self.results(slow, 1, 0, 10)
            self.expect(host.hear(), self.K.RESULTS, 1)

    def test_what_a_lost_daemon_had_claimed_is_lost_and_the_rest_is_given_to_another(self):
        shell = self.shell(fixed=10)
        host, lost = shell.host(), shell.daemon()
        self.unit(host, 1, 10)
        self.expect(lost.hear(), self.K.UNIT, 1)
        self.expect_run(lost.hear(), 1, 0, 10)
        lost.say(self.K.CLAIM, 3)
        self.results(lost, 1, 0, 3)
        self.expect(host.hear(), self.K.RESULTS, 1)
        lost.say(self.K.CLAIM, 5)
        lost.close()
        self.assertIn(f"daemon {os.getpid()}", self.expect_lost(host.hear(), 1, 3, 4))
        self.expect_lost(host.hear(), 1, 4, 5)
        other = shell.daemon()
        self.expect(other.hear(), self.K.UNIT, 1)
        self.expect_run(other.hear(), 1, 5, 10)

    def test_claimed_items_with_retries_are_tried_again_first(self):
        shell = self.shell(fixed=10)
        host, lost = shell.host(), shell.daemon()
        self.unit(host, 1, 4, retries=1)
        self.expect(lost.hear(), self.K.UNIT, 1)
        lost.say(self.K.CLAIM, 2)
        lost.close()
        second = shell.daemon()
        self.expect(second.hear(), self.K.UNIT, 1)
        self.expect_run(second.hear(), 1, 0, 1)
        second.say(self.K.CLAIM, 1)
        second.close()
        self.expect_lost(host.hear(), 1, 0, 1)
        third = shell.daemon()
        self.expect(third.hear(), self.K.UNIT, 1)
        self.expect_run(third.hear(), 1, 1, 2)

    def test_a_daemon_that_leaves_in_the_middle_says_where_and_the_rest_is_given_to_another(self):
        shell = self.shell(fixed=10)
        host, leaver = shell.host(), shell.daemon()
        self.unit(host, 1, 10)
        self.expect(leaver.hear(), self.K.UNIT, 1)
        self.expect_run(leaver.hear(), 1, 0, 10)
        leaver.say(self.K.CLAIM, 8)
        leaver.say(self.K.LEAVE, 3, flags=mirai.MAXTASKS)       # no further than this, whatever it has claimed
        results = self.results(leaver, 1, 0, 3)
        leaver.close()
        self.expect(host.hear(), self.K.RESULTS, 1, results)
        other = shell.daemon()
        self.expect(other.hear(), self.K.UNIT, 1)
        self.expect_run(other.hear(), 1, 3, 10)

    def test_outcomes_that_a_killed_local_daemon_had_not_sent_are_taken_from_the_page(self):
        shell = self.shell(fixed=10)
        host = shell.host()
        launch, daemon, slot = self.local(shell, host)
        self.unit(host, 1, 10)
        self.expect(daemon.hear(), self.K.UNIT, 1)
        for position in range(1, 6):
            slot.begin(position)
            slot.keep(position, b"outcome %d" % (position - 1))
        slot.begin(6)
        sent = self.results(daemon, 1, 0, 2)        # and died before it forgot them
        daemon.close()
        self.ended(shell, launch, -signal.SIGKILL)
        self.expect(host.hear(), self.K.RESULTS, 1, sent)
        message = host.hear()
        self.expect(message, self.K.RESULTS, 1)
        self.assertEqual(mirai.RESULTS_HEAD.unpack_from(message.payload)[1:3], (2, 3))
        self.assertEqual(mirai.split_apart(message.payload, 3, mirai.RESULTS_HEAD.size),
                         [b"outcome 2", b"outcome 3", b"outcome 4"])
        self.assertIn("SIGKILL", self.expect_lost(host.hear(), 1, 5, 6))
        other = shell.daemon()
        self.expect(other.hear(), self.K.UNIT, 1)
        self.expect_run(other.hear(), 1, 6, 10)

    def test_cancelled_items_are_not_run_and_those_around_them_are(self):
        shell = self.shell(fixed=4)
        host = shell.host()
        self.unit(host, 1, 8)
        self.cancel(host, 1, 2, 3)
        self.cancel(host, 1, 6, 8)
        wait_until(lambda: shell.dispatcher.core.unresolved == 5)
        daemon = shell.daemon()
        self.expect(daemon.hear(), self.K.UNIT, 1)
        for lo, hi in ((0, 2), (3, 6)):
            self.expect_run(daemon.hear(), 1, lo, hi)
            results = self.results(daemon, 1, lo, hi)
            self.expect(host.hear(), self.K.RESULTS, 1, results)
        self.assertEqual(shell.dispatcher.core.unresolved, 0)

    def test_items_that_a_foreign_daemon_has_are_cancelled_by_their_range_and_taken_back(self):
        shell = self.shell(fixed=10)
        host, daemon = shell.host(), shell.daemon()
        self.unit(host, 1, 10)
        self.expect(daemon.hear(), self.K.UNIT, 1)
        self.expect_run(daemon.hear(), 1, 0, 10)
        self.cancel(host, 1, 3, 6)
        self.expect(daemon.hear(), self.K.CANCEL, 1, mirai.RANGE.pack(3, 6))
        self.expect(daemon.hear(), self.K.LIMIT, 4)
        daemon.say(self.K.CUT, 4)
        self.results(daemon, 1, 0, 3)
        daemon.say(self.K.STOPPED, 4)
        self.expect(host.hear(), self.K.RESULTS, 1)
        self.expect_run(daemon.hear(), 1, 6, 10, fresh=True)

    # -- everywhere

    def answer(self, daemon, id, outcome=b"+", failed=False):
        daemon.say(self.K.RESULT, id, outcome, mirai.FAILED if failed else 0)

    def expect_answers(self, host, id, *indices):
        """As many answers, in any order."""
        found = []
        for _ in indices:
            message = host.hear()
            self.expect(message, self.K.RESULTS, id)
            _, lo, n, _ = mirai.RESULTS_HEAD.unpack_from(message.payload)
            self.assertEqual(n, 1)
            found.append(lo)
        self.assertEqual(sorted(found), sorted(indices))

    def everywhere(self, host, id, least=1):
        host.connection.sock.sendall(mirai.encode_task(self.K.EVERYWHERE, id, [b"call"], [], least))

    def test_a_call_is_run_by_every_daemon_and_replayed_by_those_that_come_later_before_their_first_task(self):
        shell = self.shell()
        host, first, second = shell.host(), shell.daemon(), shell.daemon()
        self.everywhere(host, 1)
        self.expect(host.hear(), self.K.SIZED, 1, mirai.RANGE.pack(0, 2))
        for daemon in (first, second):
            message = daemon.hear()
            self.expect(message, self.K.EVERYWHERE, 1, b"call" + mirai.NEEDS.pack(0))
            self.assertEqual(message.flags & mirai.REPLAY, 0)
            self.answer(daemon, 1)
        self.expect_answers(host, 1, 0, 1)
        self.everywhere(host, 10)
        self.expect(host.hear(), self.K.SIZED, 10, mirai.RANGE.pack(0, 2))
        for daemon in (first, second):
            self.expect(daemon.hear(), self.K.EVERYWHERE, 10)
        late = shell.daemon()
        host.say(self.K.TASK, 20)
        for id in (1, 10):
            message = late.hear()
            self.expect(message, self.K.EVERYWHERE, id)
            self.assertEqual(message.flags, mirai.REPLAY)
            self.answer(late, id)
        self.expect(late.hear(), self.K.TASK, 20)
        late.say(self.K.RESULT, 20)
        self.expect(host.hear(), self.K.RESULT, 20)         # of a replay nothing is told

    def test_daemons_that_come_answer_a_call_up_to_its_minimum(self):
        shell = self.shell()
        host, first = shell.host(), shell.daemon()
        self.everywhere(host, 1, 3)
        self.expect(host.hear(), self.K.SIZED, 1, mirai.RANGE.pack(0, 3))
        daemons = [first, shell.daemon(), shell.daemon(), shell.daemon()]
        for daemon in daemons:
            message = daemon.hear()
            self.expect(message, self.K.EVERYWHERE, 1)
            self.assertEqual(message.flags, mirai.REPLAY if daemon is daemons[-1] else 0)
            self.answer(daemon, 1)
        self.expect_answers(host, 1, 0, 1, 2)
        wait_until(lambda: not shell.dispatcher.core.unresolved)

    def test_a_call_comes_after_the_tasks_before_it_and_before_those_after_it(self):
        shell = self.shell()
        host, daemon = shell.host(), shell.daemon()
        host.say(self.K.TASK, 1)
        host.say(self.K.TASK, 2)
        self.everywhere(host, 3)
        host.say(self.K.TASK, 4)
        self.expect(host.hear(), self.K.SIZED, 3)
        for kind, id in ((self.K.TASK, 1), (self.K.TASK, 2), (self.K.EVERYWHERE, 3), (self.K.TASK, 4)):
            self.expect(daemon.hear(), kind, id)
            daemon.say(self.K.RESULT, id)
            self.assertEqual(host.hear().id, id)

    def test_a_call_that_failed_on_every_daemon_is_not_replayed(self):
        for failed in ((True, True), (True, False)):
            with self.subTest(failed=failed):
                shell = self.shell()
                host, first, second = shell.host(), shell.daemon(), shell.daemon()
                self.everywhere(host, 1)
                self.expect(host.hear(), self.K.SIZED, 1)
                for daemon, fails in zip((first, second), failed):
                    self.expect(daemon.hear(), self.K.EVERYWHERE, 1)
                    self.answer(daemon, 1, failed=fails)
                self.expect_answers(host, 1, 0, 1)
                for daemon, task in ((second, 10), (first, 11)):
                    host.say(self.K.TASK, task)
                for daemon in (first, second):
                    daemon.hear()
                late = shell.daemon()
                host.say(self.K.TASK, 12)
                if all(failed):
                    self.expect(late.hear(), self.K.TASK, 12)
                else:
                    self.expect(late.hear(), self.K.EVERYWHERE, 1)

    def test_the_answer_of_a_lost_daemon_is_lost_and_that_of_a_local_one_is_its_successors(self):
        shell = self.shell()
        host = shell.host()
        foreign = shell.daemon()
        launch, daemon, slot = self.local(shell, host)
        for task in (1, 2):
            host.say(self.K.TASK, task)
        for each in (foreign, daemon):
            each.hear()
        slot.begin(1)
        self.everywhere(host, 5)
        self.expect(host.hear(), self.K.SIZED, 5, mirai.RANGE.pack(0, 2))
        foreign.close()
        self.expect_lost(host.hear(), 2 if shell.dispatcher.core.daemons else 1)
        message = host.hear()
        self.expect(message, self.K.LOST, 5)
        daemon.close()
        self.ended(shell, launch, -signal.SIGKILL)
        self.expect(host.hear(), self.K.LOST, 1)
        message = shell.nursery.hear()
        self.expect(message, self.K.FORK, 0)
        again, = mirai.decode_json(message)["launches"]
        successor = shell.local_daemon(again)
        message = successor.hear()
        self.expect(message, self.K.EVERYWHERE, 5)
        self.assertEqual(message.flags, 0)
        self.answer(successor, 5)
        self.expect(host.hear(), self.K.RESULTS, 5)

    # -- output

    def expect_output_first(self, host, size):
        """All that was written, and only then the result of task 1."""
        got = 0
        while (message := host.hear()).kind == self.K.OUTPUT:
            self.assertEqual(message.flags, 1)
            got += len(message.payload)
        self.expect(message, self.K.RESULT, 1)
        self.assertEqual(got, size)

    def test_what_a_task_wrote_is_passed_on_before_its_result(self):
        for size in (1, 1000, 30 * 65536):
            with self.subTest(size=size):
                shell = self.shell()
                host = shell.host()
                launch, daemon, slot = self.local(shell, host, output=True)
                host.say(self.K.TASK, 1)
                self.expect(daemon.hear(), self.K.TASK, 1)
                slot.begin(1)
                sizes = [65536] * (size // 65536) + [size % 65536] * (size % 65536 > 0)
                for part in sizes:      # a daemon waits until all that it wrote was passed on
                    shell.nursery.say(self.K.OUTPUT, 0, b"x" * part, 1)
                daemon.say(self.K.RESULT, 1)
                self.expect_output_first(host, size)

    def test_while_the_dispatcher_is_busy_output_still_comes_before_results(self):
        shell = self.shell()
        host = shell.host()
        launch, daemon, slot = self.local(shell, host, output=True)
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)
        slot.begin(1)
        peer = next(iter(shell.dispatcher.joined.values()))
        handle = peer.handle

        def late(*arguments):           # it comes to the daemon first, and finds all of this in the nursery's pipe
            for _ in range(2):
                shell.nursery.say(self.K.OUTPUT, 0, b"x" * 50000, 1)
            return handle(*arguments)

        peer.handle = late
        daemon.say(self.K.RESULT, 1)
        self.expect_output_first(host, 100000)

    def test_what_the_nursery_says_with_output_is_not_forgotten(self):
        shell = self.shell()
        host = shell.host()
        launches = self.launched(shell, host, 2, output=True)
        ones = {launch[0]: shell.local_daemon(launch) for launch in launches}
        host.say(self.K.TASK, 1)
        busy = wait_until(lambda: [d for d in shell.dispatcher.core.daemons.values() if d.pieces])[0].slot
        self.expect(ones[busy].hear(), self.K.TASK, 1)
        dead, = [launch for launch in launches if launch[0] != busy]
        peer = shell.dispatcher.joined[busy]
        handle = peer.handle

        def meanwhile(*arguments):      # between the waiting for something and the reading of this result
            self.ended(shell, dead, -signal.SIGKILL)
            return handle(*arguments)

        peer.handle = meanwhile
        ones[busy].say(self.K.RESULT, 1)
        self.expect(host.hear(), self.K.RESULT, 1)
        shell.nursery.connection.sock.settimeout(5.0)
        message = shell.nursery.hear()
        self.expect(message, self.K.FORK, 0)
        self.assertEqual(mirai.decode_json(message)["launches"][0][0], dead[0])

    # -- a host in the same process

    def test_in_direct_mode_daemons_take_turns_and_each_has_a_queue_of_its_own(self):
        shell = self.shell(direct=True)
        host, first, second = shell.host(), shell.daemon(), shell.daemon()
        for task in range(1, 7):
            host.say(self.K.TASK, task)
        for task in (1, 3, 5):
            self.expect(first.hear(), self.K.TASK, task)
            first.say(self.K.RESULT, task)
            self.expect(host.hear(), self.K.RESULT, task)
        for task in (2, 4, 6):
            self.expect(second.hear(), self.K.TASK, task)
            second.say(self.K.RESULT, task)
            self.expect(host.hear(), self.K.RESULT, task)

    def test_in_direct_mode_each_has_its_share_of_a_maps_items_and_what_a_lost_one_had_goes_to_others(self):
        shell = self.shell(direct=True, fixed=4)
        host, first, second = shell.host(), shell.daemon(), shell.daemon()
        self.unit(host, 1, 8)
        for daemon, lo, hi in ((first, 0, 4), (second, 4, 8)):
            self.expect(daemon.hear(), self.K.UNIT, 1)
            self.expect_run(daemon.hear(), 1, lo, hi)
        second.say(self.K.CLAIM, 2)         # positions are each daemon's own
        second.close()
        self.expect_lost(host.hear(), 1, 4, 5)
        self.expect_lost(host.hear(), 1, 5, 6)
        self.results(first, 1, 0, 4)
        self.expect(host.hear(), self.K.RESULTS, 1)
        self.expect_run(first.hear(), 1, 6, 8)

    def test_an_adopted_host_needs_not_prove_itself_and_ends_it_by_leaving(self):
        shell = Shell(direct=True)
        ours, theirs = socket.socketpair()
        shell.dispatcher.adopt_host(mirai.Connection(theirs))
        shell.__enter__()
        self.addCleanup(shell.__exit__, None, None, None)
        host, daemon = Peer(mirai.Connection(ours)), shell.daemon()
        self.addCleanup(host.close)
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)
        with self.assertRaisesRegex(mirai.Refused, "has a host"):
            shell.host()
        host.close()
        shell.thread.join(LONG)
        self.assertEqual(shell.status, 0)
        self.assertEqual([path for path in shell.files if os.path.exists(path)], [])

    # -- other

    def test_the_end_is_passed_on_to_all_daemons_though_the_host_leaves_at_once(self):
        shell = self.shell()
        host, ones = shell.host(), [shell.daemon() for _ in range(3)]
        host.say(self.K.TASK, 1)
        self.expect(ones[-1].hear(), self.K.TASK, 1)
        host.say(self.K.END)
        host.close()
        for one in ones:
            self.expect(one.hear(), self.K.END, 0)
            self.assertIsNone(one.hear())

    def test_a_local_daemon_without_a_page_is_served_as_a_foreign_one(self):
        shell = self.shell(fixed=10)
        host = shell.host()
        launch, = self.launched(shell, host, autoexit=None)
        daemon = shell.local_daemon(launch, page=False)
        before = bytes(shell.page)
        self.unit(host, 1, 10)
        self.expect(daemon.hear(), self.K.UNIT, 1)
        self.expect_run(daemon.hear(), 1, 0, 10)
        daemon.say(self.K.CLAIM, 2)
        shell.daemon()
        self.expect(daemon.hear(), self.K.LIMIT, 6)
        self.cancel(host, 1, 0, 1)
        self.expect(daemon.hear(), self.K.CANCEL, 1, mirai.RANGE.pack(0, 1))
        self.assertEqual(bytes(shell.page), before)
        daemon.close()
        self.ended(shell, launch, 3)
        self.expect_lost(host.hear(), 1, 1, 2)

    def test_a_definition_that_is_dropped_is_dropped_where_it_was_sent(self):
        shell = self.shell()
        host = shell.host()
        a, b = self.define(host, b"a", b"b")
        first = shell.daemon()
        self.submit(host, 1, [a])
        self.expect(first.hear(), self.K.DEFINE, 0)
        self.expect(first.hear(), self.K.TASK, 1)
        second = shell.daemon()
        host.say(self.K.DROP, payload=a + b)
        self.expect(first.hear(), self.K.DROP, 0, a)        # behind the task that needs it; b it never had
        self.submit(host, 2, [])
        self.expect(second.hear(), self.K.TASK, 2, b"task" + mirai.NEEDS.pack(0))
        self.define(host, b"a")
        first.say(self.K.RESULT, 1)
        self.submit(host, 3, [a])
        self.expect(first.hear(), self.K.DEFINE, 0, a + b"definition a")
        self.expect(first.hear(), self.K.TASK, 3)
        self.assertEqual(list(shell.dispatcher.definitions), [a])

    def test_a_task_that_is_put_back_takes_its_definitions_to_the_next_daemon(self):
        shell = self.shell()
        host = shell.host()
        a, = self.define(host, b"a")
        first = shell.daemon()
        host.connection.sock.sendall(mirai.encode_task(self.K.TASK, 1, [b"task"], [a], 1))
        self.expect(first.hear(), self.K.DEFINE, 0)
        self.expect(first.hear(), self.K.TASK, 1)
        first.close()
        second = shell.daemon()
        self.expect(second.hear(), self.K.DEFINE, 0, a + b"definition a")
        self.expect(second.hear(), self.K.TASK, 1)

    def test_it_never_unpickles(self):
        bomb = b"cos\n_exit\n(I77\ntR."
        shell = self.shell()
        host, daemon = shell.host(), shell.daemon()

        def never(*_, **__):
            raise AssertionError("the dispatcher unpickled")

        with contextlib.ExitStack() as stack:
            for module, names in ((pickle, ("loads", "load", "Unpickler")), (mirai.marshal, ("loads", "load")),
                                  (mirai, ("loads", "load_outcome", "evaluate"))):
                for name in names:
                    stack.enter_context(replaced(module, name, never))
            host.say(self.K.TASK, 1, bomb)
            self.expect(daemon.hear(), self.K.TASK, 1, bomb)
            daemon.say(self.K.RESULT, 1, bomb)
            self.expect(host.hear(), self.K.RESULT, 1, bomb)

    def test_bytes_may_come_one_at_a_time(self):
        shell = self.shell(url="tcp://127.0.0.1:0")
        host, daemon = shell.host(), shell.stranger()

        def dribble(data):
            for i in range(len(data)):
                daemon.connection.sock.sendall(data[i:i + 1])

        shake = mirai.DialerHandshake(shell.key, "daemon", {})
        dribble(shake.hello())
        while not shake.done:
            dribble(shake.receive(daemon.hear()))
        daemon.connection.seal(shake.seal("dialer"))
        host.say(self.K.TASK, 1, b"x")
        self.expect(daemon.hear(), self.K.TASK, 1, b"x")
        for record in daemon.connection.channel.wrap(mirai.encode(self.K.RESULT, 1, b"outcome")):
            dribble(record)
        self.expect(host.hear(), self.K.RESULT, 1, b"outcome")

    def test_frames_may_follow_a_proof_in_the_same_bytes(self):
        shell = self.shell()
        daemon, host = shell.daemon(), shell.stranger()
        shake = mirai.DialerHandshake(shell.key, "host", {})
        host.connection.sock.sendall(shake.hello())
        proof = shake.receive(host.hear())
        host.connection.sock.sendall(proof + mirai.encode(self.K.TASK, 1, b"x" * 10_000))
        self.expect(daemon.hear(), self.K.TASK, 1, b"x" * 10_000)

    def test_a_daemon_that_does_not_read_holds_up_nobody(self):
        shell = self.shell()
        host, deaf = shell.host(), shell.daemon()
        host.say(self.K.TASK, 1, b"x" * (8 << 20))
        wait_until(lambda: shell.dispatcher.core.counts()[3] == 1)
        other = shell.daemon()
        host.say(self.K.TASK, 2)
        self.expect(other.hear(), self.K.TASK, 2)
        other.say(self.K.RESULT, 2)
        self.expect(host.hear(), self.K.RESULT, 2)
        self.assertEqual(len(deaf.hear().payload), 8 << 20)

    def test_counts_come_to_the_host_unasked(self):
        shell = self.shell()
        host = shell.host()
        counts = (0, 0, 0, 0, 0)

        def until(*expected):
            nonlocal counts
            while counts != expected:
                message = host.hear(counts=True)
                if message.kind == self.K.COUNTS:
                    counts = mirai.COUNTS.unpack(message.payload)

        daemon = shell.daemon()
        until(1, 1, 0, 0, 0)
        for task in (1, 2, 3):
            host.say(self.K.TASK, task)
        until(1, 1, 2, 1, 0)
        daemon.say(self.K.RESULT, 1)
        until(1, 1, 1, 1, 1)
        daemon.close()
        until(0, 1, 1, 0, 2)
        self.cancel(host, 3)
        until(0, 1, 0, 0, 3)

    # -- strangers

    def test_a_stranger_that_sends_garbage_is_dropped_and_nobody_else_is_disturbed(self):
        shell = self.shell()
        host, daemon = shell.host(), shell.daemon()
        random_bytes = random.Random(1)
        hello = mirai.DialerHandshake(shell.key, "daemon", {}).hello()
        garbage = [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\0" * 100, b"\xff" * 100,
                   mirai.encode(self.K.TASK, 1, b"x"), mirai.encode(self.K.PROOF, 0, bytes(32)), mirai.encode(self.K.WELCOME),
                   mirai.encode(self.K.HELLO, 0, b"{"), mirai.encode(self.K.HELLO, 0, b"[]"), hello + hello,
                   mirai.encode(self.K.HELLO, 0, json.dumps({"role": "daemon"}).encode()) + mirai.encode(self.K.RESULT, 1)]
        garbage += [random_bytes.getrandbits(8 * 50).to_bytes(50, "little") for _ in range(50)]
        for number, data in enumerate(garbage):
            stranger = shell.stranger()
            stranger.connection.sock.sendall(data)
            with self.subTest(data=data[:40]), contextlib.suppress(ConnectionResetError):
                while (message := stranger.hear()) is not None:
                    self.assertIn(message.kind, (self.K.CHALLENGE, self.K.REFUSED))
            stranger.close()
            host.say(self.K.TASK, number)
            self.expect(daemon.hear(), self.K.TASK, number)
            daemon.say(self.K.RESULT, number)
            self.expect(host.hear(), self.K.RESULT, number)

    def test_a_strangers_deeply_nested_hello_harms_nobody(self):
        shell = self.shell()
        for payload in (b"[" * 4000, b"{\"a\":" * 800, b"9" * 4096):
            stranger = shell.stranger()
            stranger.say(self.K.HELLO, payload=payload)
            self.expect(stranger.hear(), self.K.REFUSED, 0)
        shell.daemon()

    def test_silent_strangers_hold_up_nobody_and_are_bounded(self):
        shell = self.shell()
        host = shell.host()
        strangers = [shell.stranger() for _ in range(mirai.STRANGERS + 44)]
        half_a_hello = mirai.DialerHandshake(shell.key, "daemon", {}).hello()[:50]
        for stranger in strangers[-20:]:
            stranger.connection.sock.sendall(half_a_hello)
        start = time.monotonic()
        daemon = shell.daemon()
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)
        self.assertLess(time.monotonic() - start, 1.0)
        self.assertLessEqual(len(shell.dispatcher.strangers), mirai.STRANGERS)
        self.assertLessEqual(len(shell.dispatcher.peers), mirai.STRANGERS + 2)
        for stranger in strangers[:44]:
            self.expect_refusal(stranger, "too many connections")

    def test_strangers_that_come_and_go_leave_nothing_behind(self):
        shell = self.shell()
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", mirai.DialerHandshake(bytes(32), "daemon", {}).hello()):
            for _ in range(200):
                stranger = shell.stranger()
                stranger.connection.sock.sendall(data)
                stranger.close()
        shell.daemon()
        wait_until(lambda: not shell.dispatcher.strangers, SOON)
        self.assertEqual(len(shell.dispatcher.peers), 1)
        self.assertLess(len(shell.dispatcher.timers), 10)

    def test_one_with_another_key_is_in_the_log(self):
        shell = self.shell(url="tcp://127.0.0.1:0")
        host = shell.host()
        with self.assertRaisesRegex(mirai.Refused, "does not hold the key"):
            mirai.dial(shell.url, bytes(32), "daemon", {})
        host.told("left in the handshake, as one does that holds another key")
        self.assertRegex(host.notices[-1], r"refused tcp://127.0.0.1:\d+: ")

    def test_who_is_crowded_out_comes_again(self):
        with replaced(mirai, "STRANGERS", 2):
            shell = self.shell()
            silent = [shell.stranger() for _ in range(2)]
            half = mirai._connect_unix(mirai.parse_url(shell.url), time.monotonic() + SOON)
            with half:
                refused = mirai._dial_once
                found = []

                def dial_once(*args):
                    try:
                        return refused(*args)
                    except mirai.Crowded as error:
                        found.append(error)
                        raise
                with replaced(mirai, "_dial_once", dial_once):
                    dialers = [threading.Thread(target=lambda: mirai.dial(shell.url, shell.key, "daemon", {}).close())
                               for _ in range(20)]
                    for dialer in dialers:
                        dialer.start()
                    for dialer in dialers:
                        dialer.join(LONG)
            self.assertFalse(any(dialer.is_alive() for dialer in dialers))
            self.expect_refusal(silent[0], "too many connections")

    def test_a_stranger_that_says_nothing_is_refused_in_time(self):
        with replaced(mirai, "HANDSHAKE_TIME", 0.05):
            shell = self.shell()
            silent = shell.stranger()
            self.expect_refusal(silent, "no handshake in time")
            daemon, host = shell.daemon(), shell.host()
            self.expect_refusal(shell.stranger(), "no handshake in time")
        host.say(self.K.TASK, 1)        # who came in time stays
        self.expect(daemon.hear(), self.K.TASK, 1)

    def test_a_wrong_key_is_refused_and_told_so(self):
        shell = self.shell()
        with self.assertRaisesRegex(mirai.Refused, "does not hold the key"):
            mirai.dial(shell.url, bytes(32), "daemon", {})
        stranger = shell.stranger()
        stranger.connection.sock.sendall(mirai.DialerHandshake(bytes(32), "daemon", {}).hello())
        self.expect(stranger.hear(), self.K.CHALLENGE, 0)
        stranger.say(self.K.PROOF, payload=bytes(32))
        self.expect_refusal(stranger, "wrong key")
        wait_until(lambda: not shell.dispatcher.strangers)
        self.assertEqual(shell.dispatcher.core.counts()[:2], (0, 0))

    def test_before_the_proof_a_frame_over_4_kib_is_refused_unread(self):
        shell = self.shell()
        for before in (False, True):
            stranger = shell.stranger()
            if before:
                stranger.connection.sock.sendall(mirai.DialerHandshake(shell.key, "daemon", {}).hello())
                self.expect(stranger.hear(), self.K.CHALLENGE, 0)
            stranger.connection.sock.sendall(mirai.HEADER.pack(4097, mirai.WIRE_VERSION, self.K.HELLO, 0, 0))
            self.expect_refusal(stranger, "4097 bytes where at most 4096")

    def test_a_peer_with_the_key_whose_hello_makes_no_sense_is_refused(self):
        shell = self.shell()
        for about in ({"pid": None, "host": None}, {"slot": [0], "serial": 0}, {"slot": "0"}, {"slot": {}}):
            with self.subTest(about=about), self.assertRaises((mirai.ProtocolError, OSError)):
                shell.dial("daemon", **about).close()
        stranger = shell.stranger()
        shake = mirai.DialerHandshake(shell.key, "daemon", {})
        shake._hello = json.dumps({"role": "daemon"}).encode()
        stranger.connection.sock.sendall(shake.hello())
        with self.assertRaises(mirai.Refused):
            shake.receive(stranger.hear())
        host, daemon = shell.host(), shell.daemon()
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)

    def test_a_length_that_is_only_announced_costs_nothing(self):
        shell = self.shell()
        host, boaster = shell.host(), shell.daemon()
        host.say(self.K.TASK, 1)
        self.expect(boaster.hear(), self.K.TASK, 1)
        boaster.connection.sock.sendall(mirai.HEADER.pack(1 << 62, mirai.WIRE_VERSION, self.K.RESULT, 0, 1) + b"x" * 100)
        other = shell.daemon()
        host.say(self.K.TASK, 2)
        self.expect(other.hear(), self.K.TASK, 2)
        boaster.close()
        self.expect(host.hear(), self.K.LOST, 1)

    def test_another_version_is_refused_by_name(self):
        shell = self.shell()
        stranger = shell.stranger()
        stranger.connection.sock.sendall(mirai.HEADER.pack(0, mirai.WIRE_VERSION + 1, self.K.HELLO, 0, 0))
        self.expect_refusal(stranger, "wire version 2 met 1")

    def test_a_second_host_is_refused(self):
        shell = self.shell()
        host, daemon = shell.host(), shell.daemon()
        with self.assertRaisesRegex(mirai.Refused, "has a host"):
            shell.host()
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)

    # -- daemons at fault, lost, leaving

    def test_a_daemon_that_answers_a_task_it_does_not_have_is_dropped(self):
        for task in (None, 1):
            with self.subTest(task=task):
                shell = self.shell()
                host, liar = shell.host(), shell.daemon()
                if task is not None:
                    host.say(self.K.TASK, task)
                    self.expect(liar.hear(), self.K.TASK, task)
                liar.say(self.K.RESULT, 7)
                self.assertIsNone(liar.hear())
                if task is not None:
                    self.expect(host.hear(), self.K.LOST, task)
                host.told("answered 1 of task 7")
                honest = shell.daemon()
                host.say(self.K.TASK, 7)
                self.expect(honest.hear(), self.K.TASK, 7)

    def test_a_daemon_that_says_what_only_others_say_is_dropped(self):
        for kind in (self.K.TASK, self.K.CANCEL, self.K.LAUNCH, self.K.LOST, self.K.COUNTS, self.K.ENDED, self.K.HELLO,
                     self.K.UNIT, self.K.RUN, self.K.LIMIT, self.K.EVERYWHERE, self.K.END, self.K.SIZED, self.K.OUTPUT, 99):
            with self.subTest(kind=kind), contextlib.redirect_stderr(io.StringIO()):
                shell = self.shell()
                host, liar = shell.host(), shell.daemon()
                liar.say(kind, 1, b"{}")
                self.assertIsNone(liar.hear())
                honest = shell.daemon()
                host.say(self.K.TASK, 1)
                self.expect(honest.hear(), self.K.TASK, 1)

    def test_the_task_of_a_lost_daemon_is_lost_and_no_other(self):
        shell = self.shell()
        host, lost, other = shell.host(), shell.daemon(), None
        host.say(self.K.TASK, 1)
        self.expect(lost.hear(), self.K.TASK, 1)
        other = shell.daemon()
        host.say(self.K.TASK, 2)
        self.expect(other.hear(), self.K.TASK, 2)
        host.say(self.K.TASK, 3)
        lost.close()
        message = host.hear()
        self.expect(message, self.K.LOST, 1)
        report = mirai.decode_json(message)
        self.assertEqual(report["how"], RESET)
        self.assertIn(f"daemon {os.getpid()} on ", report["text"])
        for task, then in ((2, 3), (3, None)):
            other.say(self.K.RESULT, task)
            self.expect(host.hear(), self.K.RESULT, task)
            if then:
                self.expect(other.hear(), self.K.TASK, then)

    def test_a_lost_task_with_retries_is_given_to_another(self):
        shell = self.shell()
        host, lost = shell.host(), shell.daemon()
        host.say(self.K.TASK, 1, b"x", flags=1)
        self.expect(lost.hear(), self.K.TASK, 1)
        host.say(self.K.TASK, 2)
        lost.close()
        second = shell.daemon()
        self.expect(second.hear(), self.K.TASK, 1, b"x")
        second.close()
        self.expect(host.hear(), self.K.LOST, 1)

    def test_a_daemon_that_leaves_is_sent_no_task_after(self):
        shell = self.shell()
        host, leaver = shell.host(), shell.daemon()
        host.say(self.K.TASK, 1)
        host.say(self.K.TASK, 2)
        self.expect(leaver.hear(), self.K.TASK, 1)
        leaver.say(self.K.LEAVE, 1, flags=mirai.MAXTASKS)
        leaver.say(self.K.RESULT, 1, b"last")
        self.expect(host.hear(), self.K.RESULT, 1, b"last")
        leaver.connection.sock.shutdown(socket.SHUT_WR)
        self.assertIsNone(leaver.hear())
        self.expect(shell.daemon().hear(), self.K.TASK, 2)

    def test_a_task_that_crossed_with_a_leave_is_given_to_another(self):
        shell = self.shell()
        host, leaver = shell.host(), shell.daemon()
        host.say(self.K.TASK, 1, b"x")
        host.say(self.K.TASK, 2, b"y")
        wait_until(lambda: shell.dispatcher.core.counts()[3] == 1)
        leaver.say(self.K.LEAVE, 0, flags=mirai.IDLETIME)
        leaver.close()
        second = shell.daemon()
        self.expect(second.hear(), self.K.TASK, 1, b"x")
        second.say(self.K.RESULT, 1)
        self.expect(host.hear(), self.K.RESULT, 1)

    # -- cancelling

    def test_an_awaiting_task_that_is_cancelled_is_never_sent(self):
        shell = self.shell()
        host = shell.host()
        for task in (1, 2):
            host.say(self.K.TASK, task)
        self.cancel(host, 1)
        wait_until(lambda: shell.dispatcher.core.counts()[2] == 1)
        self.expect(shell.daemon().hear(), self.K.TASK, 2)

    def test_a_foreign_daemon_is_told_of_a_cancel_and_is_busy_until_it_answers(self):
        shell = self.shell()
        host, daemon = shell.host(), shell.daemon()
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)
        self.cancel(host, 1)
        host.say(self.K.TASK, 2)
        self.expect(daemon.hear(), self.K.CANCEL, 1, mirai.RANGE.pack(0, 1))
        daemon.say(self.K.RESULT, 1, b"of no interest")
        self.expect(daemon.hear(), self.K.TASK, 2)
        daemon.say(self.K.RESULT, 2)
        self.expect(host.hear(), self.K.RESULT, 2)

    def test_a_local_daemon_is_cancelled_through_the_page_and_the_nursery(self):
        shell = self.shell()
        host = shell.host()
        launches = self.launched(shell, host, 2)
        local = {slot: shell.local_daemon((slot, serial), NO_PROCESS + slot) for slot, serial in launches}
        host.say(self.K.TASK, 1)
        slot = wait_until(lambda: [d for d in shell.dispatcher.core.daemons.values() if d.pieces])[0].slot
        self.expect(local[slot].hear(), self.K.TASK, 1)
        mine = mirai.Slot(shell.page, slot)
        self.assertTrue(mine.begin(1))
        before = bytes(shell.page)
        self.cancel(host, 1)
        message = shell.nursery.hear()
        self.expect(message, self.K.SIGNAL, 0)
        self.assertEqual(mirai.decode_json(message), {"pid": NO_PROCESS + slot, "signal": signal.SIGINT})
        self.assertEqual(mine.interrupted, 1)
        mine.interrupt(0)
        self.assertEqual(bytes(shell.page), before)     # and nothing else was written
        local[slot].say(self.K.RESULT, 1)
        self.cancel(host, 1)                # too late, twice: nobody is told
        self.cancel(host, 77)
        self.launched(shell, host)

    def test_what_a_daemon_does_not_give_back_is_interrupted_again_and_again(self):
        shell = self.shell()
        host = shell.host()
        launch, daemon, slot = self.local(shell, host)
        foreign = shell.daemon()
        for task in (1, 2):
            host.say(self.K.TASK, task)
        self.expect(foreign.hear(), self.K.TASK, 1)     # the last to come is the next to be used
        self.expect(daemon.hear(), self.K.TASK, 2)
        slot.begin(1)
        for task in (1, 2):
            self.cancel(host, task)
        for _ in range(3):
            self.expect(foreign.hear(), self.K.CANCEL, 1)
            self.expect(shell.nursery.hear(), self.K.SIGNAL, 0)

    def test_a_local_daemon_that_has_not_begun_a_cancelled_task_is_not_to_begin_it(self):
        shell = self.shell()
        host = shell.host()
        launch, daemon, slot = self.local(shell, host)
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)
        self.cancel(host, 1)
        wait_until(lambda: slot.words[2] == 1, what="the limit")
        self.assertFalse(slot.begin(1))
        daemon.say(self.K.STOPPED, 1)
        host.say(self.K.TASK, 2)
        message = daemon.hear()
        self.expect(message, self.K.TASK, 2)
        self.assertEqual(message.flags, mirai.FRESH)
        self.assertTrue(slot.begin(2))
        daemon.say(self.K.RESULT, 2)
        self.expect(host.hear(), self.K.RESULT, 2)

    def test_kill_after_so_long_kills_a_daemon_that_does_not_give_a_cancelled_task_back(self):
        for kind in ("begun", "begun when it is too late to hold it back", "an item"):
            with self.subTest(kind):
                shell = self.shell(fixed=2)
                host = shell.host()
                launch, daemon, slot = self.local(shell, host, kill_after=0.02)
                if kind == "an item":
                    self.unit(host, 1, 2)
                    self.expect(daemon.hear(), self.K.UNIT, 1)
                    self.expect_run(daemon.hear(), 1, 0, 2)
                    slot.begin(1)
                    self.results(daemon, 1, 0, 1)
                    self.expect(host.hear(), self.K.RESULTS, 1)
                    slot.begin(2)
                    self.cancel(host, 1, 0, 2)
                else:
                    host.say(self.K.TASK, 1)
                    self.expect(daemon.hear(), self.K.TASK, 1)
                    if kind == "begun":
                        slot.begin(1)
                    self.cancel(host, 1)
                    if kind != "begun":
                        wait_until(lambda: slot.words[2] == 1)
                        slot.words[1] = 1
                told = []
                while signal.SIGKILL not in told and len(told) < 5:     # the first comes again after 50 ms, then rarely
                    message = shell.nursery.hear()
                    self.expect(message, self.K.SIGNAL, 0)
                    told.append(mirai.decode_json(message)["signal"])
                self.assertEqual(set(told), {signal.SIGINT, signal.SIGKILL})

    def test_kill_after_spares_one_that_gives_the_task_back_in_time(self):
        shell = self.shell()
        host = shell.host()
        launch, daemon, slot = self.local(shell, host, kill_after=0.02)
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)
        slot.begin(1)
        host.say(self.K.TASK, 2)
        self.cancel(host, 1)
        self.expect(shell.nursery.hear(), self.K.SIGNAL, 0)
        daemon.say(self.K.RESULT, 1)
        self.expect(daemon.hear(), self.K.TASK, 2)
        slot.begin(2)
        wait_until(lambda: not shell.dispatcher.timers or shell.dispatcher.timers[0][0] > time.monotonic() + 1)
        self.launched(shell, host)          # the next that the nursery hears

    # -- local daemons

    def test_only_the_launch_that_counts_may_join(self):
        shell = self.shell()
        host = shell.host()
        (slot, serial), = self.launched(shell, host)
        for about in ((slot, serial + 1), (slot + 1, serial), (99, 99)):
            with self.subTest(about=about), self.assertRaisesRegex(mirai.Refused, "launch was given up"):
                shell.local_daemon(about)
        shell.local_daemon((slot, serial))
        with self.assertRaisesRegex(mirai.Refused, "launch was given up"):
            shell.local_daemon((slot, serial))

    def test_a_local_daemon_that_ends_is_launched_again_and_its_last_words_are_told(self):
        shell = self.shell()
        host = shell.host()
        launch, = self.launched(shell, host)
        daemon = shell.local_daemon(launch)
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)
        shell.slot(launch).begin(1)
        daemon.close()
        self.ended(shell, launch, -signal.SIGSEGV, "Segmentation fault\n")
        message = host.hear()
        self.expect(message, self.K.LOST, 1)
        self.assertRegex(mirai.decode_json(message)["text"], "(?s)was killed by SIGSEGV.*Segmentation fault")
        message = shell.nursery.hear()
        self.expect(message, self.K.FORK, 0)
        (slot, serial), = mirai.decode_json(message)["launches"]
        self.assertEqual(slot, launch[0])
        self.assertNotEqual(serial, launch[1])

    def test_what_a_local_daemon_had_not_begun_is_not_lost_with_it(self):
        shell = self.shell()
        host = shell.host()
        launch, = self.launched(shell, host)
        daemon = shell.local_daemon(launch)
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)
        daemon.close()
        self.ended(shell, launch, -signal.SIGKILL)
        self.expect(shell.daemon().hear(), self.K.TASK, 1)

    def test_a_local_daemon_that_outlives_its_connection_is_killed(self):
        shell = self.shell()
        host = shell.host()
        launch, = self.launched(shell, host)
        shell.local_daemon(launch).close()
        message = shell.nursery.hear()
        self.expect(message, self.K.SIGNAL, 0)
        self.assertEqual(mirai.decode_json(message), {"pid": NO_PROCESS, "signal": signal.SIGKILL})

    def test_what_a_local_daemon_said_before_it_ended_counts(self):
        shell = self.shell()
        host = shell.host()
        launch, = self.launched(shell, host)
        daemon = shell.local_daemon(launch)
        host.say(self.K.TASK, 1)
        self.expect(daemon.hear(), self.K.TASK, 1)
        shell.slot(launch).begin(1)
        daemon.say(self.K.RESULT, 1, b"last")
        self.ended(shell, launch, 0)
        self.expect(host.hear(), self.K.RESULT, 1, b"last")
        self.expect(shell.nursery.hear(), self.K.FORK, 0)

    def test_after_five_failed_launches_the_host_and_what_waits_are_told(self):
        shell = self.shell()
        host = shell.host()
        host.say(self.K.TASK, 1)
        launch, = self.launched(shell, host)
        for number in range(mirai.MAX_FAILED_STARTS):
            self.ended(shell, launch, 1, f"words {number}")
            if number < mirai.MAX_FAILED_STARTS - 1:
                message = shell.nursery.hear()
                self.expect(message, self.K.FORK, 0)
                launch, = mirai.decode_json(message)["launches"]
        told = [host.hear(), host.hear()]
        self.assertEqual(sorted(m.kind for m in told), sorted([self.K.NO_LAUNCH, self.K.LOST]))
        for message in told:
            report = mirai.decode_json(message)
            self.assertRegex(report["text"], "(?s)5 in a row.*exited with status 1.*words 4")
            if message.kind == self.K.LOST:
                self.assertEqual((message.id, report["how"]), (1, LAUNCH))
        self.ended(shell, launch, 1)            # a report that is repeated starts nothing
        launch, = self.launched(shell, host)    # it may be asked anew
        host.say(self.K.TASK, 2)
        self.expect(shell.local_daemon(launch).hear(), self.K.TASK, 2)

    # -- the end

    def test_with_the_host_it_ends_and_takes_its_files_along(self):
        for url in (None, "tcp://127.0.0.1:0"):
            with self.subTest(url=url):
                shell = self.shell(url=url)
                self.assertEqual(len(shell.files), 2 if url is None else 1)
                self.assertEqual([path for path in shell.files if not os.path.exists(path)], [])
                self.assertEqual(mirai.find_key(shell.url), shell.key)
                host, daemon = shell.host(), shell.daemon()
                host.say(self.K.TASK, 1)
                self.expect(daemon.hear(), self.K.TASK, 1)
                host.close()
                shell.thread.join(LONG)
                self.assertEqual(shell.status, 0)
                self.assertEqual([path for path in shell.files if os.path.exists(path)], [])

    def test_a_stranger_or_daemon_that_ends_does_not_end_it(self):
        shell = self.shell()
        host = shell.host()
        shell.stranger().close()
        shell.daemon().close()
        host.say(self.K.TASK, 1)
        self.expect(shell.daemon().hear(), self.K.TASK, 1)

    def test_with_the_nursery_it_ends_and_kills_the_local_daemons(self):
        for told in (False, True):          # whether there is something to tell the nursery at that moment
            with self.subTest(told=told), subprocess.Popen(["sleep", "1000"], start_new_session=True) as child:
                self.addCleanup(child.kill)
                shell = self.shell()
                host, core = shell.host(), shell.dispatcher.core
                launch, = self.launched(shell, host)
                daemon = shell.local_daemon(launch, child.pid)
                host.say(self.K.TASK, 1)
                self.expect(daemon.hear(), self.K.TASK, 1)
                cancelled = core.cancelled
                core.cancelled = lambda *task: (shell.nursery.close(), cancelled(*task))[1]
                if told:
                    shell.slot(launch).begin(1)
                    self.cancel(host, 1)
                else:
                    shell.nursery.close()
                shell.thread.join(LONG)
                try:
                    self.assertEqual(shell.status, 0)
                    self.assertEqual(child.wait(1.0), -signal.SIGKILL)
                finally:
                    child.kill()
                self.assertEqual([path for path in shell.files if os.path.exists(path)], [])


# -- 11. Daemon


class ByHand:
    """A daemon that is started by hand: `python -m mirai daemon URL ...`; as `python mirai.py`, which is to be compiled
    first, under MIRAI_LONG and where that is asked for."""

    def __init__(self, url, *options, key=None, module=not MIRAI_LONG, stdin=None, **more):
        environ = {name: value for name, value in os.environ.items() if name != "MIRAI_KEY"}
        environ.update(PYTHONPATH=HERE, PYTHONDONTWRITEBYTECODE="1", **({} if key is None else {"MIRAI_KEY": key}))
        command = ["-m", "mirai"] if module else [FILE]
        self.process = subprocess.Popen([sys.executable, *command, "daemon", *([] if url is None else [url]), *options],
                                        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, env=environ, start_new_session=True, **more)
        self.pid = self.process.pid
        if stdin:
            self.process.stdin.write(stdin)
            self.process.stdin.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.communicate()

    def status(self, timeout=LONG):
        """Waits for its end: its exit status, and what it said on stderr."""
        _, said = self.process.communicate(timeout=timeout)
        return self.process.returncode, said


def connections():
    return info().connections


def joined(n):
    wait_until(lambda: connections() == n, what=f"{n} connections")


# Tasks that run until they are interrupted. Each enters a gate first, so that the host knows that it runs.


def sleeping(enter):
    enter("sleep")
    time.sleep(1000)


def looping(enter):
    enter("loop")
    while True:
        pass


def counting(enter):
    enter("generator")
    return sum(1 for _ in itertools.count())


def receiving(enter):
    enter("socket")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.recv(1)


def calling(enter):
    enter("subprocess")
    subprocess.run(["sleep", "1000"])


def awaiting(enter):
    enter("asyncio")
    asyncio.run(asyncio.sleep(1000))


def joining(enter):
    enter("lock")
    threading.Event().wait()


def gated(enter):
    enter("gate")


def finalizing_last(enter):
    class Slow:
        def __del__(self):
            enter("finalizer")
            time.sleep(1000)

    it = Slow()
    del it              # an interrupt that comes in here is swallowed
    gc.collect()        # or in here, on PyPy


def finalizing(enter):
    finalizing_last(enter)
    time.sleep(1000)


ENDLESS = (sleeping, looping, counting, receiving, calling, awaiting, joining, finalizing)


def children_of(pid):
    return [child for child in family_of(pid) if is_alive(child)]


class Listener:
    """A scripted dispatcher: listens, and serves one daemon after the other by hand."""

    def __init__(self, url="tcp://127.0.0.1:0", key=None):
        self.key = key or os.urandom(32)
        self.sock, address = mirai.listen(mirai.parse_url(url))
        self.sock.settimeout(LONG)
        self.url = mirai.format_url(address)
        self.address = address

    def accept(self):
        """The next daemon, after its handshake."""
        sock, _ = self.sock.accept()
        peer = Peer(mirai.Connection(sock))
        shake = mirai.ListenerHandshake(self.key, {"seal": self.address.scheme == "tcp"})
        while not shake.done:
            message = peer.hear()
            if message is None:
                raise AssertionError("it went in the handshake")
            sock.sendall(shake.receive(message))
        if self.address.scheme == "tcp":
            peer.connection.seal(shake.seal("listener"))
        peer.about = shake.peer
        return peer

    def close(self):
        self.sock.close()
        if self.address.scheme == "ipc":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.address.host)


class TestDaemon(Case):
    K = mirai.Kind
    URLS = ("tcp://127.0.0.1:0", None)      # None: the platform's own

    def set_daemons(self, url=None, n=None, **options):
        """Daemons that are reset after the test: the URL at which others can join."""
        self.addCleanup(daemons, 0)
        daemons(*([] if n is None else [n]), url=url or mirai.local_url(), **options)
        return status()["daemons"]

    def by_hand(self, *arguments, **options):
        one = ByHand(*arguments, **options)
        self.addCleanup(one.__exit__)
        return one

    def key(self):
        """The key of the profile that is set, as a user finds it."""
        return mirai.find_key(status()["daemons"]).hex()

    def scripted(self, *options, url=None):
        """A scripted dispatcher and the daemon that was started for it: listener, process, connection."""
        listener = Listener(url or mirai.local_url())
        self.addCleanup(listener.close)
        one = self.by_hand(listener.url, *options, key=listener.key.hex())
        return listener, one, self.accepted(listener)

    def accepted(self, listener):
        peer = listener.accept()
        self.addCleanup(peer.close)
        return peer

    def say_task(self, peer, kind, id, task, flags=0):
        for hash, blob in (task.needs or {}).items():
            parts = [blob] if isinstance(blob, bytes) else blob
            peer.say_bytes(mirai.encode_parts(self.K.DEFINE, [hash, *parts]))
        peer.say_bytes(mirai.encode_task(kind, id, task.parts, list(task.needs or ()), flags))

    def task(self, peer, id, f, *args, flags=0, kind=mirai.Kind.TASK, **kwargs):
        self.say_task(peer, kind, id, mirai.dump_task(f, args, kwargs, None), flags)

    def items(self, peer, id, f, items, *args):
        """Sends items of a map, in one unit, and has none of them run."""
        constant = mirai.dump_constant(f, args, {}, None)
        (n, unit), = mirai.dump_units(constant, 1, list(items), str, None)
        self.assertEqual(n, len(items))
        self.say_task(peer, self.K.UNIT, id, unit)

    def run_items(self, peer, id, lo, hi, flags=0):
        peer.say(self.K.RUN, id, mirai.RANGE.pack(lo, hi), flags)

    def answer(self, peer, id):
        """The value of a task, or its error."""
        message = peer.hear()
        self.assertIsNotNone(message, "the daemon has gone")
        self.assertEqual((message.kind, message.id), (self.K.RESULT, id), message)
        value, success = mirai.load_outcome(message.payload)
        if not success:
            raise value
        return value

    @staticmethod
    def outcomes_of(message):
        _, _, n, _ = mirai.RESULTS_HEAD.unpack_from(message.payload)
        return [mirai.load_outcome(data)[0] for data in mirai.split_apart(message.payload, n, mirai.RESULTS_HEAD.size)]

    def answers(self, peer, id, lo, hi):
        """The values of these items, however they come; no report may go beyond what was claimed before it."""
        found = []
        while lo + len(found) < hi:
            message = peer.hear()
            self.assertIsNotNone(message, "the daemon has gone")
            if message.kind == self.K.CLAIM:
                peer.claimed = message.id
                continue
            self.assertEqual((message.kind, message.id), (self.K.RESULTS, id), message)
            _, first, n, seconds = mirai.RESULTS_HEAD.unpack_from(message.payload)
            self.assertEqual(first, lo + len(found))
            self.assertGreater(n, 0)
            self.assertGreaterEqual(seconds, 0.0)
            peer.reported = getattr(peer, "reported", 0) + n
            self.assertLessEqual(peer.reported, peer.claimed)
            found += self.outcomes_of(message)
        return found

    def expect(self, message, kind, id, flags=0):
        self.assertIsNotNone(message, "the daemon has gone")
        self.assertEqual((message.kind, message.id, message.flags), (kind, id, flags), message)

    def next_but_claims(self, peer):
        while (message := peer.hear()) is not None and message.kind == self.K.CLAIM:
            pass
        return message

    # -- served by a script

    def test_items_are_run_in_pieces_and_nothing_is_begun_that_was_not_claimed(self):
        listener, one, peer = self.scripted()
        self.assertIsNone(peer.about.get("slot"))
        self.assertFalse(peer.about.get("page"))
        self.items(peer, 100, lambda x, y: x * y, range(1000), 3)
        self.run_items(peer, 100, 0, 300)
        self.run_items(peer, 100, 700, 1000)
        self.assertEqual(self.answers(peer, 100, 0, 300), [3 * x for x in range(300)])
        self.assertEqual(self.answers(peer, 100, 700, 1000), [3 * x for x in range(700, 1000)])
        self.task(peer, 2000, os.getpid)
        self.assertEqual(self.answer(peer, 2000), one.pid)
        peer.close()
        self.assertEqual(one.status(), (0, ""))

    def test_a_report_comes_every_so_often_while_items_run(self):
        listener, one, peer = self.scripted()
        with Gate() as gate:
            self.items(peer, 1, lambda x, enter: (time.sleep(0.02), enter() if x == 3 else None, x)[2], range(5), gate.enter)
            self.run_items(peer, 1, 0, 5)
            gate.arrived()
            self.assertEqual(self.answers(peer, 1, 0, 3), [0, 1, 2])        # the fourth is held, and the others are there
            gate.open()
            self.assertEqual(self.answers(peer, 1, 3, 5), [3, 4])

    def test_at_a_limit_it_stops_and_skips_what_was_meant_for_others_until_it_is_told(self):
        listener, one, peer = self.scripted()
        with Gate() as gate:
            self.items(peer, 1, lambda x, enter: (enter() if x == 1 else None, x)[1], range(10), gate.enter)
            self.run_items(peer, 1, 0, 5)
            self.run_items(peer, 1, 5, 6)       # on its way before the dispatcher knew
            gate.arrived()                      # in the task at position 2
            peer.say(self.K.LIMIT, 4)
            message = self.next_but_claims(peer)
            if message.kind == self.K.RESULTS:
                message = self.next_but_claims(peer)
            self.expect(message, self.K.CUT, 4)
            gate.open()
            reported = []
            while (message := self.next_but_claims(peer)).kind == self.K.RESULTS:
                reported.append(mirai.RESULTS_HEAD.unpack_from(message.payload)[1:3])
            self.assertEqual(sum(reported[-1]), 3)
            self.expect(message, self.K.STOPPED, 4)
            self.task(peer, 50, os.getpid)                          # also before it knew
            self.run_items(peer, 1, 6, 8, mirai.FRESH)              # positions: 5 + 1 + 1 were taken back or skipped
            peer.reported, peer.claimed = 7, 7
            self.assertEqual(self.answers(peer, 1, 6, 8), [6, 7])
            self.assertGreaterEqual(peer.claimed, 9)
            self.task(peer, 51, os.getpid)
            self.assertEqual(self.answer(peer, 51), one.pid)

    def test_a_limit_below_what_it_has_begun_is_answered_with_what_comes_next(self):
        listener, one, peer = self.scripted()
        with Gate() as gate:
            self.items(peer, 1, lambda x, enter: (enter() if x == 2 else None, x)[1], range(5), gate.enter)
            self.run_items(peer, 1, 0, 5)
            gate.arrived()
            peer.say(self.K.LIMIT, 1)
            message = self.next_but_claims(peer)
            while message.kind == self.K.RESULTS:
                message = self.next_but_claims(peer)
            self.expect(message, self.K.CUT, 4)
            gate.open()
            while (message := self.next_but_claims(peer)).kind == self.K.RESULTS:
                pass
            self.expect(message, self.K.STOPPED, 4)

    def test_a_limit_that_comes_while_it_idles_stops_what_comes_next(self):
        listener, one, peer = self.scripted()
        self.task(peer, 10, os.getpid)
        self.answer(peer, 10)
        peer.say(self.K.LIMIT, 2)
        self.expect(peer.hear(), self.K.CUT, 2)
        self.task(peer, 11, os.getpid)
        self.expect(peer.hear(), self.K.STOPPED, 2)
        self.task(peer, 12, os.getpid, flags=mirai.FRESH)
        self.assertEqual(self.answer(peer, 12), one.pid)

    def test_limits_that_come_at_any_moment_lose_no_item_and_double_none(self):
        listener, one, peer = self.scripted()
        chance = random.Random(7)
        self.items(peer, 1, lambda x: (time.sleep(1e-5), x)[1], range(4000))
        at, position, done, stops, fresh = 0, 1, [], 0, 0
        while at < 4000:
            hi = min(at + 200, 4000)
            self.run_items(peer, 1, at, hi, fresh)
            end = time.perf_counter() + chance.uniform(0, 0.02)
            while time.perf_counter() < end:
                pass
            limit = position + chance.randrange(hi - at)
            peer.say(self.K.LIMIT, limit)
            got, cut, stopped = at, None, None
            while cut is None or (stopped is None and got < hi):
                message = self.next_but_claims(peer)
                if message.kind == self.K.RESULTS:
                    self.assertIsNone(stopped)
                    _, first, n, _ = mirai.RESULTS_HEAD.unpack_from(message.payload)
                    self.assertEqual(first, got)
                    got += n
                    done += self.outcomes_of(message)
                elif message.kind == self.K.CUT:
                    cut = message.id
                    self.assertGreaterEqual(cut, limit)
                else:
                    self.assertEqual((message.kind, message.id), (self.K.STOPPED, position + got - at))
                    stopped = message.id
            position += hi - at
            if stopped is None:                 # it had begun all; the limit still holds
                self.run_items(peer, 1, 0, 1)
                self.expect(self.next_but_claims(peer), self.K.STOPPED, position)
                position += 1
            else:
                self.assertLessEqual(stopped, cut)
                stops += 1
            fresh, at = mirai.FRESH, got
        self.assertEqual(done, list(range(4000)))
        self.assertGreater(stops, 0)

    def test_it_says_where_it_leaves(self):
        listener, one, peer = self.scripted("--maxtasks", "5")
        self.task(peer, 1, os.getpid)
        self.answer(peer, 1)
        self.items(peer, 10, abs, range(10))
        self.run_items(peer, 10, 0, 10)
        found = []
        while (message := self.next_but_claims(peer)).kind == self.K.RESULTS:
            found += self.outcomes_of(message)
        self.expect(message, self.K.LEAVE, 5, mirai.MAXTASKS)       # so that nothing is sent to it after the last result
        while (message := peer.hear()) is not None:
            self.expect(message, self.K.RESULTS, 10)
            found += self.outcomes_of(message)
        if not MIRAI_LONG:
            peer.close()            # else it waits CLOSE_TIME for that
        self.assertEqual(found, [0, 1, 2, 3])
        self.assertEqual(one.status()[0], mirai.MAXTASKS)

    def test_it_leaves_for_being_idle_or_old_at_the_position_it_has_come_to(self):
        for option, why in (("--idletime", mirai.IDLETIME), ("--walltime", mirai.WALLTIME)):
            with self.subTest(option):
                listener, one, peer = self.scripted(option, "1")
                for task in (1, 2):
                    self.task(peer, task, abs, -task)
                    self.assertEqual(self.answer(peer, task), task)
                self.expect(peer.hear(), self.K.LEAVE, 2, why)
                self.assertIsNone(peer.hear())
                if not MIRAI_LONG:
                    peer.close()        # else it waits CLOSE_TIME for that
                self.assertEqual(one.status()[0], why)

    def test_an_item_is_cancelled_by_its_range_and_the_others_are_run(self):
        listener, one, peer = self.scripted()
        with Gate() as gate:
            def f(x, enter):
                if x == 1:
                    enter()
                    time.sleep(1000)
                return x

            self.items(peer, 10, f, range(4), gate.enter)
            self.run_items(peer, 10, 0, 4)
            gate.arrived()
            gate.open()
            peer.say(self.K.CANCEL, 10, mirai.RANGE.pack(2, 4))     # not this one
            found = []
            while not found:                # again and again, as a dispatcher does
                peer.say(self.K.CANCEL, 10, mirai.RANGE.pack(1, 2))
                peer.connection.sock.settimeout(0.2)
                with contextlib.suppress(OSError):
                    found = self.answers(peer, 10, 0, 4)
                peer.connection.ended = False
            peer.connection.sock.settimeout(LONG)
            self.assertEqual([found[0], found[2], found[3]], [0, 2, 3])
            self.assertIsInstance(found[1], MiraiInterrupt)

    def test_a_call_for_all_stays_and_a_task_leaves_nothing_behind(self):
        for cleanup in (True, False):
            with self.subTest(cleanup=cleanup):
                listener, one, peer = self.scripted(*([] if cleanup else ["--no-cleanup"]))
                self.task(peer, 1, "import os; os.environ['KEPT'] = 'yes'; kept = a", a=5, kind=self.K.EVERYWHERE)
                self.answer(peer, 1)

                def change():
                    import warnings
                    os.environ["MADE"] = "here"
                    os.environ["KEPT"] = "no"
                    os.chdir("/")
                    sys.path.append("/no/such")
                    warnings.simplefilter("error")

                def look():
                    import warnings
                    return (os.environ.get("MADE"), os.environ["KEPT"], os.getcwd() == "/", "/no/such" in sys.path,
                            warnings.filters[0][0] == "error")

                self.task(peer, 2, change)
                self.answer(peer, 2)
                self.task(peer, 3, look)
                clean = (None, "yes", os.getcwd() == "/", False, False)
                self.assertEqual(self.answer(peer, 3), clean if cleanup else ("here", "no", True, True, True))
                self.task(peer, 4, "kept + a")
                self.assertEqual(self.answer(peer, 4), 10)
                self.items(peer, 10, lambda x: os.environ.setdefault("MADE_BY", str(x)), range(4))
                for lo, hi, values in ((0, 2, ["0", "0"]), (2, 4, ["2", "2"] if cleanup else ["0", "0"])):   # once a piece
                    self.run_items(peer, 10, lo, hi)
                    got = []
                    while len(got) < 2:
                        got += self.outcomes_of(self.next_but_claims(peer))
                    self.assertEqual(got, values)

    def test_a_call_that_fails_says_so_and_in_a_replay_ends_the_daemon(self):
        listener, one, peer = self.scripted()
        self.task(peer, 1, "1 / 0", kind=self.K.EVERYWHERE)
        self.expect(peer.hear(), self.K.RESULT, 1, mirai.FAILED)
        self.task(peer, 2, "1 + 1", kind=self.K.EVERYWHERE, flags=mirai.REPLAY)
        self.expect(peer.hear(), self.K.RESULT, 2)
        self.task(peer, 3, "1 / 0", kind=self.K.EVERYWHERE, flags=mirai.REPLAY)
        self.assertIsNone(peer.hear())
        status, said = one.status()
        self.assertEqual(status, mirai.EX_SOFTWARE)
        self.assertRegex(said, "replay of everywhere.*ZeroDivisionError")
        self.assertNotIn("SystemExit", said)

    # -- how it goes on when a connection ends

    def held(self, gate, peer, path):
        """Has it run a task that is held at a gate, and writes a file then."""
        def run(enter, path):
            enter()
            with open(path, "w") as file:
                file.write("done")

        self.task(peer, 1, run, gate.enter, path)
        gate.arrived()

    def test_autoexit_none_finishes_its_task_first(self):
        for url in self.URLS:
            with self.subTest(url=url), Gate() as gate, tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "file")
                listener, one, peer = self.scripted("--autoexit", "none", url=url)
                self.held(gate, peer, path)
                peer.close()
                with self.assertRaises(subprocess.TimeoutExpired):
                    one.process.wait(2 * mirai.GRACE)
                gate.open()
                self.assertEqual(one.status(), (0, ""))
                self.assertEqual(self.file_text(path), "done")

    def test_autoexit_true_ends_with_the_connection(self):
        with Gate() as gate, tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "file")
            listener, one, peer = self.scripted("--autoexit", "true")
            self.held(gate, peer, path)
            peer.close()
            self.assertEqual(one.status(5.0), (0, ""))
            gate.open()
            self.assertFalse(os.path.exists(path))

    def test_autoexit_false_finishes_its_task_and_serves_the_next_host_from_the_start(self):
        for url in self.URLS:
            with self.subTest(url=url), Gate() as gate, tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, "file")
                listener, one, peer = self.scripted("--autoexit", "false", url=url)
                self.items(peer, 100, abs, range(3))
                self.held(gate, peer, path)
                peer.say(self.K.LIMIT, 2)               # of no importance to the next
                self.expect(peer.hear(), self.K.CUT, 2)
                peer.close()
                gate.open()
                for _ in range(2):
                    peer = self.accepted(listener)
                    self.assertEqual(self.file_text(path), "done")
                    self.items(peer, 1, abs, range(-2, 2))
                    self.run_items(peer, 1, 0, 4)
                    self.assertEqual(self.answers(peer, 1, 0, 4), [2, 1, 0, 1])
                    self.assertLess(peer.claimed, 10)
                    self.task(peer, 9, os.getpid)
                    self.assertEqual(self.answer(peer, 9), one.pid)
                    peer.close()
                peer = self.accepted(listener)
                peer.say(self.K.END)
                self.assertEqual(one.status(), (0, ""))

    def test_between_hosts_it_waits_for_one_that_lets_it_in_or_until_it_has_idled_long_enough(self):
        listener, one, peer = self.scripted("--autoexit", "false", "--idletime", at_length("2", "3"), url="tcp://127.0.0.1:0")
        peer.close()
        listener.close()
        stranger = Listener(listener.url)       # another host, with a key of its own
        with contextlib.closing(stranger):
            for _ in range(2):
                with self.assertRaises((mirai.ProtocolError, mirai.Refused, AssertionError, OSError)):
                    self.accepted(stranger)
            self.assertIsNone(one.process.poll())
        again = Listener(listener.url, listener.key)
        with contextlib.closing(again):
            peer = self.accepted(again)
            self.task(peer, 1, os.getpid)
            self.assertEqual(self.answer(peer, 1), one.pid)
            again.close()
            peer.close()
        self.assertEqual(one.status()[0], mirai.IDLETIME)

    def test_what_a_task_changed_is_made_good_though_its_host_went_meanwhile(self):
        with Gate() as gate:
            listener, one, peer = self.scripted("--autoexit", "false")

            def change(enter):
                os.environ["MADE"] = "for a host that is gone"
                enter()

            self.task(peer, 1, change, gate.enter)
            gate.arrived()
            peer.close()
            gate.open()
            peer = self.accepted(listener)
            self.task(peer, 1, "import os; os.environ.get('MADE')")
            self.assertIsNone(self.answer(peer, 1))

    def test_a_task_is_no_item_of_a_map_though_a_host_went_during_one(self):
        with Gate() as gate:
            listener, one, peer = self.scripted("--autoexit", "false")
            self.items(peer, 1, lambda x, enter: (enter(), time.sleep(0.05))[1], range(3), gate.enter)
            self.run_items(peer, 1, 0, 3)
            gate.arrived()
            peer.close()
            gate.listener.close()           # the others are not held
            gate.open()
            peer = self.accepted(listener)
            self.task(peer, 1, lambda: sys.modules[daemons.__module__]._here["map"])
            self.assertFalse(self.answer(peer, 1))

    def test_asyncdial_waits_until_somebody_listens(self):
        for url in (mirai.local_url(), None):
            with self.subTest(url=url):
                if url is None:
                    with socket.create_server(("127.0.0.1", 0)) as free:
                        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
                key = os.urandom(32)
                one = self.by_hand(url, "--asyncdial", key=key.hex())
                with self.assertRaises(subprocess.TimeoutExpired):
                    one.process.wait(at_length(0.3, 0.5))
                listener = Listener(url, key)
                self.addCleanup(listener.close)
                peer = self.accepted(listener)
                self.task(peer, 1, os.getpid)
                self.assertEqual(self.answer(peer, 1), one.pid)
                peer.close()
                self.assertEqual(one.status()[0], 0)

    def test_output_shows_what_tasks_print_and_before_their_result(self):
        listener, one, peer = self.scripted("--output")
        self.task(peer, 1, "print('printed', end=';')")
        self.answer(peer, 1)
        self.assertTrue(mirai.wait_ready(one.process.stdout.fileno(), 0.0))
        self.assertEqual(os.read(one.process.stdout.fileno(), 100), b"printed;")
        self.task(peer, 2, subprocess.run, ["echo", "echoed"])
        self.answer(peer, 2)
        self.assertEqual(os.read(one.process.stdout.fileno(), 100), b"echoed\n")

    def test_output_goes_on_for_the_next_host_where_its_reader_is_still_there(self):
        listener, one, peer = self.scripted("--output", "--autoexit", "false")
        for number in range(2):
            self.task(peer, 1, f"print('host {number}', flush=True)")
            self.answer(peer, 1)
            self.assertTrue(mirai.wait_ready(one.process.stdout.fileno(), 5.0), f"host {number}")
            self.assertEqual(os.read(one.process.stdout.fileno(), 100), b"host %d\n" % number)
            peer.close()
            peer = self.accepted(listener)

    def test_the_stream_it_begins_with_is_the_one_it_was_given(self):
        stream = mirai.stream_to_r(mirai.seed_stream(1))
        drawn = []
        for _ in range(2):
            listener, one, peer = self.scripted("--rs", *map(str, stream))
            self.task(peer, 1, "import random; [random.random() for _ in range(3)]")
            drawn.append(self.answer(peer, 1))
        self.assertEqual(*drawn)
        listener, one, peer = self.scripted()
        self.task(peer, 1, "import random; [random.random() for _ in range(3)]")
        self.assertNotEqual(self.answer(peer, 1), drawn[0])

    # -- started by hand

    def test_one_started_by_hand_finds_the_key_joins_and_works(self):
        for url in self.URLS:
            for module in (False, True):
                with self.subTest(url=url, module=module):
                    actual = self.set_daemons(url)
                    with self.by_hand(actual, module=module) as one:
                        joined(1)
                        self.assertEqual(mirai.mirai(os.getpid).result(LONG), one.pid)
                        self.assertEqual(mirai.mirai("x + 1", x=1).result(LONG), 2)
                        with self.assertRaises(ZeroDivisionError):
                            mirai.mirai(lambda: 1 / 0).result(LONG)
                        daemons(0)
                        self.assertEqual(one.status(), (0, ""))

    def test_n_starts_as_many(self):
        url = self.set_daemons(self.URLS[0])
        with self.by_hand(url, "-n", "2") as both, Gate() as gate:
            joined(2)
            held = [mirai.mirai(gate.enter, i) for i in range(2)]
            pids = {gate.arrived()[1] for _ in held}
            self.assertEqual(len(pids), 2)
            self.assertLessEqual(pids, {both.pid, *family_of(both.pid)})
            gate.open()
            call_mirai(held)
            daemons(0)
            self.assertEqual(both.status(), (0, ""))

    def test_the_exit_status_says_why_it_ended(self):
        url = self.set_daemons(self.URLS[0])
        with socket.create_server(("127.0.0.1", 0)) as unused:
            nobody = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        key = self.key()
        expected = (
            (0, "", self.by_hand(url)),
            (64, "no URL", self.by_hand("127.0.0.1:5555", key=key)),
            (64, "unknown scheme", self.by_hand("http://127.0.0.1:5555", key=key)),
            (64, "url|URL", self.by_hand(None)),
            (64, "--no-such", self.by_hand(url, "--no-such")),
            (64, "idletime", self.by_hand(url, "--idletime", "-1")),
            (64, "maxtasks", self.by_hand(url, "--maxtasks", "many")),
            (64, "-n 0", self.by_hand(url, "-n", "0")),
            (64, "64 hexadecimal", self.by_hand(url, key="abc")),
            (69, "can't reach", self.by_hand(nobody, key=key)),
            (69, "can't reach", self.by_hand("ipc:///no/such/socket", key=key)),
            (77, "key", self.by_hand(url, key="00" * 32)),
            (77, "MIRAI_KEY.*--key-file", self.by_hand(nobody)),
            (64, "no-such", self.by_hand(url, "--key-file", os.path.join(HERE, "no-such-file"))),
        )
        joined(1)
        for status, said, one in expected[1:]:
            with self.subTest(status=status, said=said):
                actual, stderr = one.status()
                self.assertEqual(actual, status, stderr)
                self.assertRegex(stderr, f"(?s){said}")
                self.assertNotIn("Traceback", stderr)
        daemons(0)
        self.assertEqual(expected[0][2].status(), (0, ""))

    def test_its_limits_end_it_with_their_own_status(self):
        url = self.set_daemons(self.URLS[0])
        idle, wall = self.by_hand(url, "--idletime", "0.05"), self.by_hand(url, "--walltime", "0.05")
        self.assertEqual((idle.status()[0], wall.status()[0]), (1, 2))
        joined(0)
        tasks = self.by_hand(url, "--maxtasks", "2")
        self.assertEqual([m[:] for m in [mirai.mirai(os.getpid) for _ in range(2)]], [tasks.pid] * 2)
        self.assertEqual(tasks.status()[0], 3)
        joined(0)

    def test_the_key_can_come_by_file_or_standard_input(self):
        url = self.set_daemons(self.URLS[0])
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "key")
            with open(path, "w") as file:
                file.write(self.key() + "\n")
            elsewhere = {"XDG_RUNTIME_DIR": folder}     # where no key file is found
            with changed_environ(**elsewhere):
                by_file = self.by_hand(url, "--key-file", path)
                by_input = self.by_hand(url, "--key-file", "-", stdin=self.file_text(path))
                neither = self.by_hand(url)
            joined(2)
            self.assertEqual(neither.status()[0], 77)
            daemons(0)
            self.assertEqual((by_file.status()[0], by_input.status()[0]), (0, 0))

    @staticmethod
    def file_text(path):
        with open(path) as file:
            return file.read()

    def test_ctrl_c_ends_an_idle_one(self):
        url = self.set_daemons(self.URLS[0])
        one, two = self.by_hand(url), self.by_hand(url, "-n", "2")
        joined(3)
        os.killpg(one.pid, signal.SIGINT)
        self.assertEqual(one.status(), (130, ""))
        os.killpg(two.pid, signal.SIGINT)
        actual, said = two.status()
        self.assertEqual((abs(actual) in (130, signal.SIGINT), said), (True, ""))
        joined(0)

    def test_ctrl_c_ends_a_busy_one_and_its_task_is_an_interrupt(self):
        url = self.set_daemons(self.URLS[0])
        with self.by_hand(url) as one, Gate() as gate:
            m = mirai.mirai(sleeping, gate.enter)
            gate.arrived()
            gate.open()
            for _ in range(20):         # once more where it came right before the sleep began, as a person would
                os.kill(one.pid, signal.SIGINT)
                with contextlib.suppress(concurrent.futures.TimeoutError):
                    m.exception(3)
                    break
            self.assertIsInstance(m[:], MiraiInterrupt)
            one.status()
            joined(0)

    def test_one_that_is_busy_when_the_host_ends_is_soon_gone(self):
        with Gate() as gate, Host(f"""
                import mirai, time
                mirai.daemons(url="tcp://127.0.0.1:0")
                print(mirai.status()["daemons"])
                def busy(address):
                    import socket
                    with socket.create_connection(address) as sock:
                        sock.sendall(b"[0, 0]\\n")
                    while True:
                        pass
                ms = [mirai.mirai(busy, {gate.address!r}) for _ in range(2)]
                time.sleep(1000)
                """) as host:
            url = host.line()
            ones = [self.by_hand(url) for _ in range(2)]
            for _ in ones:
                gate.arrived()
            host.process.kill()
            killed = time.monotonic()
            for one in ones:
                one.process.wait(LONG)
            self.assertLess(time.monotonic() - killed, 1.0)

    def test_what_tasks_print_is_dropped(self):
        url = self.set_daemons(self.URLS[0])
        with self.by_hand(url, "--maxtasks", "3") as one:
            mirai.mirai(print, "printed", flush=True).result(LONG)
            mirai.mirai(os.write, 1, b"written").result(LONG)
            mirai.mirai(subprocess.run, ["echo", "echoed"]).result(LONG)
            self.assertEqual(one.process.communicate(timeout=LONG), ("", ""))
        self.set_daemons(n=1)
        done = run_python("""
            import mirai, os, subprocess
            with mirai.daemons(1):
                mirai.mirai(print, "printed", flush=True).result()
                mirai.mirai(os.write, 1, b"written").result()
                mirai.mirai(subprocess.run, ["echo", "echoed"]).result()
            mirai.mirai(print, "printed", flush=True).result()
            print("the host's")
            """)
        self.assertEqual((done.stdout, done.stderr), ("the host's\n", ""))

    # -- cancelling

    def check_cancels(self, tasks):
        """Each of the tasks is cancelled while it runs, and its daemon is free at once, and the same as before."""
        pid = mirai.mirai(os.getpid).result(LONG)
        for task in tasks:
            with self.subTest(task=task.__name__), Gate() as gate:
                m = mirai.mirai(task, gate.enter)
                self.assertEqual(gate.arrived()[1], pid)
                after = mirai.mirai(os.getpid)
                gate.open()
                if task is calling:         # before that, it is Popen() that is interrupted
                    wait_until(lambda: "sleep" in map(self.program, children_of(pid)))
                if task not in (looping, counting):
                    wait_until(lambda: self.sleeps(pid))
                self.assertTrue(m.cancel())
                self.assertIsInstance(m.data, MiraiCancelled)
                self.assertEqual(after.result(5.0), pid)

    @staticmethod
    def program(pid):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
            return file.read().strip()

    @staticmethod
    def sleeps(pid):
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "S"

    def test_a_cancel_reaches_whatever_python_does(self):
        self.set_daemons(n=1)
        self.check_cancels(ENDLESS)

    def test_a_cancel_reaches_one_that_was_started_by_hand(self):
        for url in self.URLS:
            with self.subTest(url=url), self.by_hand(self.set_daemons(url)):
                self.check_cancels(ENDLESS)

    def test_a_cancel_that_comes_too_late_hits_nobody(self):
        for kind in ("local", "by hand"):
            with self.subTest(kind=kind), contextlib.ExitStack() as stack:
                url = self.set_daemons(n=1 if kind == "local" else None)
                if kind == "by hand":
                    stack.enter_context(self.by_hand(url))
                pid = mirai.mirai(os.getpid).result(LONG)
                moments = random.Random(2)
                cancels = 0
                for _ in range(300):
                    m = mirai.mirai(abs, -1)
                    after = mirai.mirai(os.getpid)
                    end = time.perf_counter() + moments.uniform(0, 3e-4)
                    while time.perf_counter() < end:
                        pass
                    cancels += m.cancel()
                    self.assertEqual(after.result(LONG), pid)
                self.assertEqual(mirai.mirai(os.getpid).result(LONG), pid)
                self.assertGreater(cancels, 0)

    def test_an_interrupt_that_a_finalizer_swallows_last_hits_nobody(self):
        for kind in ("local", "by hand"):
            with self.subTest(kind=kind), contextlib.ExitStack() as stack:
                url = self.set_daemons(n=1 if kind == "local" else None)
                if kind == "by hand":
                    stack.enter_context(self.by_hand(url))
                pid = mirai.mirai(os.getpid).result(LONG)
                for _ in range(5):
                    with Gate() as gate:
                        m = mirai.mirai(finalizing_last, gate.enter)
                        gate.arrived()
                        m.cancel()
                        self.assertEqual(mirai.mirai(time.sleep, 0.01)[:], None)
                        self.assertEqual(mirai.mirai(os.getpid)[:], pid)

    def test_a_task_that_changes_the_handler_of_ctrl_c_disturbs_no_later_cancel(self):
        def ignore():
            signal.signal(signal.SIGINT, signal.SIG_IGN)

        def default():
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.set_daemons(n=1)
        for change in (ignore, default):
            mirai.mirai(change).result(LONG)
            self.check_cancels([sleeping])

    def test_a_cancelled_daemon_does_the_next_task_undisturbed(self):
        self.set_daemons(n=1)
        with Gate() as gate:
            for _ in range(20):
                m = mirai.mirai(looping, gate.enter)
                gate.arrived()
                gate.open()
                after = mirai.mirai(sum, range(200_000))
                m.cancel()
                self.assertEqual(after.result(LONG), sum(range(200_000)))

    # -- what tasks find, and do

    def test_on_daemon_is_true_there_and_false_here(self):
        self.set_daemons(n=1)
        self.assertIs(mirai.mirai(mirai.on_daemon).result(LONG), True)
        self.assertIs(mirai.on_daemon(), False)

    def test_quit_ends_the_daemon_and_sys_exit_is_an_error_value(self):
        self.set_daemons(n=1)
        pid = mirai.mirai(os.getpid).result(LONG)
        failed = mirai.mirai(sys.exit, 3)[:]
        self.assertEqual((failed.code, failed.condition_class[0]), (1000, "SystemExit"))
        self.assertEqual(mirai.mirai(os.getpid).result(LONG), pid)
        for source, status in (("quit()", 0), ("exit(3)", 3), ("quit('text')", 1)):
            lost = mirai.mirai(source)[:]
            self.assertIsInstance(lost, MiraiConnectionReset)
            self.assertEqual(lost.code, 19)
            self.assertIn(f"exited with status {status}", str(lost))
        self.assertNotEqual(mirai.mirai(os.getpid).result(LONG), pid)

    def test_a_task_that_closes_all_descriptors_is_lost_and_the_pool_recovers(self):
        def close_all(wait):
            os.closerange(0, 1024)
            time.sleep(wait)

        self.set_daemons(n=1)
        for wait in (0, 1000):
            with self.subTest(wait=wait):
                start = time.monotonic()
                lost = mirai.mirai(close_all, wait)[:]
                self.assertIsInstance(lost, MiraiConnectionReset)
                self.assertLess(time.monotonic() - start, 5.0)
                self.assertEqual(mirai.mirai("1 + 1").result(LONG), 2)
                self.assertEqual(info().connections, 1)

    def test_the_environment_the_directory_and_the_path_are_the_hosts(self):
        before, path = os.getcwd(), list(sys.path)
        with tempfile.TemporaryDirectory() as folder:
            folder = os.path.realpath(folder)
            try:
                os.chdir(folder)
                sys.path.append(folder)
                with changed_environ(MIRAI_TEST="set \u00e9", OMP_NUM_THREADS=None, MIRAI_KEY="00" * 32):
                    self.set_daemons(n=2, url=None)
                    self.assertEqual(mirai.mirai(os.getcwd).result(LONG), folder)
                    self.assertEqual(mirai.mirai("import sys; sys.path").result(LONG), sys.path)
                    environ = mirai.mirai("import os; dict(os.environ)").result(LONG)
                    expected = {name: value for name, value in os.environ.items() if name != "MIRAI_KEY"}
                    self.assertEqual({name: environ.get(name) for name in expected}, expected)
                    self.assertNotIn("MIRAI_KEY", environ)
                    self.assertEqual(environ["OMP_NUM_THREADS"], str(max(1, mirai.cpu_count() // 2)))
                    echoed = mirai.mirai(subprocess.check_output, "echo $MIRAI_TEST", shell=True).result(LONG)
                    self.assertEqual(echoed.decode(), "set \u00e9\n")
                sys.path.insert(0, os.path.join(folder, "later"))
                self.assertEqual(mirai.mirai("import sys; sys.path").result(LONG), sys.path)
                with changed_environ(OMP_NUM_THREADS="7"):
                    self.set_daemons(n=1)
                    self.assertEqual(mirai.mirai("import os; os.environ['OMP_NUM_THREADS']").result(LONG), "7")
            finally:
                os.chdir(before)
                sys.path[:] = path

    def test_tasks_run_in_the_main_thread_and_not_as_the_hosts_main(self):
        self.set_daemons(n=1)
        self.assertTrue(mirai.mirai(lambda: threading.current_thread() is threading.main_thread()).result(LONG))
        self.assertIsNone(mirai.mirai("import sys; getattr(sys.modules['__main__'], '__file__', None)").result(LONG))

    def test_its_options_are_checked_and_the_near_miss_is_named(self):
        with self.assertRaisesRegex(TypeError, "'idle_time'; did you mean 'idletime'"):
            daemons(1, idle_time=5)
        for bad in (0, -1, "5", True, math.nan):
            with self.subTest(bad=bad), self.assertRaisesRegex(ValueError, "maxtasks=.*above 0"):
                daemons(1, maxtasks=bad)
        self.assertFalse(mirai.daemons_set())


# -- the daemons' options, memory


KEY = "5a" * 32


def computes(pid):
    """Waits until a process is busy: what it is at needs no more of the host."""
    def ticks():
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[11])

    before = ticks()
    wait_until(lambda: ticks() > before + 5, SOON, "a twentieth of a second of work")


def _crunch(enter=None):
    """C code that no interrupt reaches, and that holds the GIL; PyPy, which would compile it, is told to hear none."""
    if enter is not None:
        enter("crunching")
    if PYPY:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return sum(range(10**12))


_WRITE = """
import os, subprocess, sys
print("printed", flush=True)
os.write(1, b"written\\n")
subprocess.run(["echo", "echoed"])
import ctypes
ctypes.CDLL(None).write(1, b"from C\\n", 7)
print("said", file=sys.stderr, flush=True)
os.write(2, b"written too\\n")
subprocess.run(["sh", "-c", "echo echoed too >&2"])
print("last")
7
"""


class TestOptions(Case):
    def by_hand(self, *arguments, **options):
        one = ByHand(*arguments, **options)
        self.addCleanup(one.__exit__)
        return one

    # -- autoexit

    def test_autoexit_true_ends_with_the_host_in_the_midst_of_a_task(self):
        for mode in MODES:
            with self.subTest(**mode), Gate() as gate, Noted() as note:
                daemons(1, autoexit=True, **mode)
                m = mirai.mirai(_note_after, gate.enter, note.path)
                _, pid = gate.arrived()
                daemons(0)
                no_more([pid], 1.0)
                gate.open()
                self.assertIsInstance(m.data, MiraiConnectionReset)
                self.assertFalse(os.path.exists(note.path))

    def test_autoexit_none_finishes_what_runs_after_a_reset_and_begins_nothing_more(self):
        for mode in MODES:
            with self.subTest(**mode), Gate() as gate, Noted() as note, Noted() as never:
                daemons(2, autoexit=None, **mode)
                pids = set(outcomes(mirai.everywhere(os.getpid)))
                ms = [mirai.mirai(_note_after, gate.enter, note.path)]
                _, busy = gate.arrived()
                idle, = pids - {busy}
                if not mode["dispatcher"]:
                    ms.append(mirai.mirai(abs, -1))         # to the one whose turn it is
                    ms.append(mirai.mirai(_note_after, str, never.path))
                daemons(0)
                self.assertIsInstance(ms[0].data, MiraiConnectionReset)
                no_more([idle], 2.0)
                time.sleep(0.5)                             # longer than any grace
                self.assertTrue(is_alive(busy))
                gate.open()
                wait_until(note.done, 2.0, "what the task does last")
                no_more([busy], 2.0)
                self.assertFalse(os.path.exists(never.path))

    def test_autoexit_none_finishes_what_runs_after_the_host_was_killed(self):
        for mode in MODES:
            with self.subTest(**mode), Noted() as note, Gate() as gate, Host(f"""
                    import mirai, os, socket, time
                    def finish(address, path):
                        with socket.create_connection(address) as sock:
                            sock.sendall(b"[0, %d]\\n" % os.getpid())
                            sock.recv(1)
                        print("nobody reads this" * 10_000, flush=True)
                        with open(path, "w") as file:
                            file.write("done")
                    mirai.daemons(1, autoexit=None, **{mode!r})
                    m = mirai.mirai(finish, {gate.address!r}, {note.path!r})
                    time.sleep(1000)
                    """) as host:
                _, pid = gate.arrived()
                family = family_of(host.pid)
                self.end_with_the_test(pid)
                host.process.kill()
                host.process.wait(SOON)
                time.sleep(0.5)
                self.assertTrue(is_alive(pid))
                gate.open()
                wait_until(note.done, 2.0, "what the task does last")
                no_more(family)

    def test_autoexit_none_holds_for_one_that_was_started_by_hand(self):
        for mode in MODES:
            with self.subTest(**mode), Noted() as note, Gate() as gate, daemons(url="tcp://127.0.0.1:0", **mode):
                one, two = (self.by_hand(status()["daemons"], "--autoexit", how) for how in ("none", "true"))
                joined(2)
                ms = [mirai.mirai(_note_after, gate.enter, note.path) for _ in range(2)]
                gate.arrived(), gate.arrived()
                daemons(0)
                self.assertEqual(two.status(2.0)[0], 0)
                self.assertIsNone(one.process.poll())
                gate.open()
                self.assertEqual(one.status(2.0)[0], 0)
                self.assertTrue(note.done())
                self.assertEqual({type(m.data) for m in ms}, {MiraiConnectionReset})

    def test_autoexit_false_needs_a_url_and_a_key_that_a_next_host_can_use(self):
        url = f"tcp://127.0.0.1:{free_port()}"
        for options in ({}, {"url": url}, {"key": KEY}):
            with self.subTest(**options), self.assertRaisesRegex(ValueError, "autoexit.*(url|key)"):
                daemons(1, autoexit=False, **options)
            self.assertFalse(mirai.daemons_set())
        with daemons(1), self.assertRaisesRegex(ValueError, "autoexit.*(url|key)"):
            launch_local(1, autoexit=False)
        with self.assertRaisesRegex(ValueError, "autoexit"):
            daemons(1, autoexit="no")

    NEXT_HOST = """
        import mirai, os, sys, time
        url, key, n, mode = sys.argv[1:]
        tag = "the next host's"
        def tell(x):
            return tag, x, os.getpid()
        mirai.daemons(url=url, key=key, dispatcher=mode == "True")
        deadline = time.monotonic() + 20
        while mirai.info().connections < int(n) and time.monotonic() < deadline:
            time.sleep(0.01)
        print(mirai.info().connections)
        found = mirai.mirai_map(range(20), tell).results()
        print([x for _, x, _ in found] == list(range(20)), {t for t, _, _ in found}, mirai.mirai("1 + 1").result(20))
        print(*sorted(set(mirai.everywhere("import os; os.getpid()").results())))
        sys.stdout.flush()
        """

    def test_autoexit_false_serves_the_next_host_at_the_same_url_with_the_same_key(self):
        tag = "the first host's"

        def tell():
            return tag

        for mode in MODES:
            with self.subTest(**mode), tempfile.TemporaryDirectory() as folder:
                url = f"ipc://{folder}/socket" if mode["dispatcher"] else f"tcp://127.0.0.1:{free_port()}"
                daemons(2, url=url, key=KEY, autoexit=False, **mode)
                self.assertEqual({outcome(mirai.mirai(tell)) for _ in range(4)}, {tag})
                pids = sorted(outcomes(mirai.everywhere(os.getpid)))
                self.end_with_the_test(*pids)
                self.assertFalse(daemons(0))
                self.assertFalse(mirai.daemons_set())
                done = run_python(self.NEXT_HOST, url, KEY, "2", str(mode["dispatcher"]), timeout=2 * SOON)
                self.assertEqual((done.stderr, done.stdout.splitlines()), ("", [
                    "2", "True {\"the next host's\"} 2", " ".join(map(str, pids))]))
                self.assertTrue(all(map(is_alive, pids)))
                daemons(url=url, key=KEY, **mode)           # a third, who ends them
                joined(2)
                self.assertEqual(sorted(outcomes(mirai.everywhere(os.getpid))), pids)
                self.assertFalse(daemons(None))
                no_more(pids)

    def test_autoexit_false_outlives_a_host_that_is_killed_and_what_it_ran_for_it(self):
        for mode in MODES:
            url = f"tcp://127.0.0.1:{free_port()}"
            with self.subTest(**mode), Host(f"""
                    import mirai, time
                    mirai.daemons(2, url={url!r}, key={KEY!r}, autoexit=False, **{mode!r})
                    print(*mirai.everywhere("import os; os.getpid()").results())
                    m = mirai.mirai("import time; time.sleep(1000)", _timeout=1000)
                    while not mirai.info().executing:
                        time.sleep(0.01)
                    print("executing")
                    time.sleep(1000)
                    """) as host:
                pids = set(map(int, host.line().split()))
                self.assertEqual(host.line(), "executing")
                self.end_with_the_test(*pids)
                others = set(family_of(host.pid)) - pids
                host.process.kill()
                no_more(others, 1.0)
                with daemons(url=url, key=KEY, **mode):
                    wait_until(lambda: connections() >= 1, SOON, "the idle one")
                    self.assertEqual(outcomes([mirai.mirai(abs, -1) for _ in range(4)]), [1] * 4)
                    self.assertLessEqual(set(outcomes(mirai.everywhere(os.getpid))), pids)
                    daemons(None)
                wait_until(lambda: sum(map(is_alive, pids)) <= 1, 2.0, "all but that which may be asleep for ever")

    def test_autoexit_false_on_the_command_line_and_both_ways_of_a_reset(self):
        url = f"tcp://127.0.0.1:{free_port()}"
        for mode in (*MODES, *MODES):
            if mode is MODES[0]:
                one = self.by_hand(url, "--autoexit", "false", "--asyncdial", key=KEY)
            with self.subTest(**mode):
                daemons(url=url, key=KEY, **mode)
                joined(1)
                self.assertEqual(outcome(mirai.mirai(os.getpid)), one.pid)
                if mode is MODES[0]:
                    daemons(0)
                    self.assertIsNone(one.process.poll())
                else:
                    daemons(None)
                    self.assertEqual(one.status(SOON), (0, ""))

    def test_autoexit_false_ends_by_its_limits_while_no_host_is_there(self):
        url = f"tcp://127.0.0.1:{free_port()}"
        daemons(url=url, key=KEY)
        ones = {code: self.by_hand(url, "--autoexit", "false", option, "1", key=KEY)
                for option, code in (("--idletime", 1), ("--walltime", 2))}
        joined(2)
        daemons(0)
        self.assertEqual({code: one.status(SOON)[0] for code, one in ones.items()}, {1: 1, 2: 2})

    def test_setting_anew_at_the_same_url_keeps_those_that_persist(self):
        url = f"tcp://127.0.0.1:{free_port()}"
        daemons(1, url=url, key=KEY, autoexit=False)
        pid = outcome(mirai.mirai(os.getpid))
        self.end_with_the_test(pid)
        daemons(1, url=url, key=KEY, autoexit=False)
        joined(2)
        pids = set(outcomes(mirai.everywhere(os.getpid)))
        self.end_with_the_test(*pids)
        self.assertEqual((len(pids), pid in pids), (2, True))
        daemons(None)
        no_more(pids)

    # -- cleanup

    DISTURB = """
        import os, sys, warnings
        kept = "the host's"
        def disturb(folder):
            global left, kept
            left = kept = "the task's"
            sys.path.append("/left")
            os.environ["LEFT"], os.environ["TO_BE_CHANGED"] = "yes", "changed"
            os.environ.pop("TO_BE_REMOVED", None)
            os.chdir(folder)
            warnings.filterwarnings("ignore", "left")
        def look(_=None):
            return (globals().get("left"), "/left" in sys.path, os.environ.get("LEFT"), os.environ.get("TO_BE_CHANGED"),
                    os.environ.get("TO_BE_REMOVED"), os.getcwd(), any("left" in str(f[1]) for f in warnings.filters))
        def read(): return kept
        def disturb_and_look(item, folder):
            disturb(folder)
            return look()
        """

    def test_cleanup_makes_everything_as_it_was_after_each_task(self):
        at = written(self.DISTURB)
        before = (None, False, None, "old", "there", os.getcwd(), False)
        with tempfile.TemporaryDirectory() as folder, changed_environ(TO_BE_REMOVED="there", TO_BE_CHANGED="old"):
            after = ("the task's", True, "yes", "changed", None, os.path.realpath(folder), True)
            for options in (*MODES, {"cleanup": True}, {"sync": True}):
                with self.subTest(**options), daemons(1, **options):
                    self.assertEqual(outcome(mirai.mirai(at.look)), before)
                    outcome(mirai.mirai(at.disturb, folder))
                    self.assertEqual(outcome(mirai.mirai(at.look)), before)
                    self.assertEqual(outcomes(mirai_map([1], at.disturb_and_look, folder)), [after])
                    self.assertEqual((outcome(mirai.mirai(at.look)), outcome(mirai.mirai(at.read))), (before, "the host's"))
                    outcome(mirai.mirai("import os, sys\nos.environ['LEFT'] = sys.path[0] = '/left'\n1 / 0"))
                    self.assertEqual(outcome(mirai.mirai(at.look)), before)

    def test_cleanup_comes_after_what_was_cancelled_and_where_its_directory_is_gone(self):
        at = written("""
            import os
            def leave(enter, folder):
                os.environ["LEFT"] = "yes"
                os.chdir(folder)
                enter("left")
                while True: pass
            def remove(folder):
                os.chdir(folder)
                os.rmdir(folder)
            def look(): return os.environ.get("LEFT"), os.getcwd()
            """)
        with tempfile.TemporaryDirectory() as folder, Gate() as gate, daemons(1):
            m = mirai.mirai(at.leave, gate.enter, folder)
            gate.arrived()
            gate.open()
            m.cancel()
            self.assertEqual(outcome(mirai.mirai(at.look)), (None, os.getcwd()))
            os.mkdir(os.path.join(folder, "gone"))
            self.assertIsNone(outcome(mirai.mirai(at.remove, os.path.join(folder, "gone"))))
            self.assertEqual(outcome(mirai.mirai(at.look)), (None, os.getcwd()))

    def test_without_cleanup_it_stays(self):
        at = written(self.DISTURB)
        with tempfile.TemporaryDirectory() as folder, changed_environ(TO_BE_REMOVED="there", TO_BE_CHANGED="old"):
            after = ("the task's", True, "yes", "changed", None, os.path.realpath(folder), True)
            for mode in MODES:
                with self.subTest(**mode), daemons(1, cleanup=False, **mode):
                    outcome(mirai.mirai(at.disturb, folder))
                    self.assertEqual(outcome(mirai.mirai(at.look)), after)
                    self.assertEqual(outcome(mirai.mirai(at.read)), "the host's")       # what the host has goes along

    def test_without_cleanup_on_the_command_line(self):
        at = written(self.DISTURB)
        with tempfile.TemporaryDirectory() as folder, daemons(url="tcp://127.0.0.1:0"):
            with self.by_hand(status()["daemons"], "--no-cleanup"):
                joined(1)
                outcome(mirai.mirai(at.disturb, folder))
                self.assertEqual(outcome(mirai.mirai(at.look))[:3], ("the task's", True, "yes"))

    # -- output

    @contextlib.contextmanager
    def hearing(self):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            yield out, err

    def test_output_shows_all_that_tasks_write_in_order_and_before_the_result(self):
        for mode in MODES:
            with self.subTest(**mode), self.hearing() as (out, err), daemons(1, output=True, **mode):
                for _ in range(3):
                    m = mirai.mirai(_WRITE)
                    done, _ = concurrent.futures.wait([m], SOON)
                    found = out.getvalue(), err.getvalue()
                    self.assertEqual(m.data, 7)
                    self.assertEqual(found, ("printed\nwritten\nechoed\nfrom C\nlast\n", "said\nwritten too\nechoed too\n"))
                    out.truncate(0), out.seek(0), err.truncate(0), err.seek(0)

    def test_output_comes_before_the_result_by_every_way_to_wait(self):
        async def awaited():
            return await asyncio.wait_for(asyncio.ensure_future(self._awaited(mirai.mirai(print, "shown"))), SOON)

        with self.hearing() as (out, _), daemons(1, output=True):
            ways = (lambda m: m.result(SOON), lambda m: m[:], lambda m: m.exception(SOON), lambda m: mirai.collect_mirai(m),
                    lambda m: wait_until(m.done, SOON), lambda m: wait_until(lambda: not unresolved(m), SOON),
                    lambda m: asyncio.run(awaited()), lambda m: mirai.race_mirai([m]))
            for i, way in enumerate(ways):
                way(mirai.mirai(print, "shown"))
                with self.subTest(i):
                    self.assertIn("shown\n", out.getvalue())
                out.truncate(0), out.seek(0)
            shown = []
            called = threading.Event()
            m = mirai.mirai(print, "shown")
            m.add_done_callback(lambda m: (shown.append(out.getvalue()), called.set()))
            self.assertTrue(called.wait(SOON))
            self.assertIn("shown\n", shown[0])

    @staticmethod
    async def _awaited(m):
        return await m

    def test_output_of_a_megabyte_comes_whole(self):
        for mode in MODES:
            with self.subTest(**mode), self.hearing() as (out, err), daemons(1, output=True, **mode):
                text = "".join(f"{i:06d} and more of it\n" for i in range(50_000))
                self.assertEqual(outcome(mirai.mirai(lambda: [print(f"{i:06d} and more of it") for i in range(50_000)][-1])), None)
                self.assertEqual(out.getvalue() == text, True, f"{len(out.getvalue())} of {len(text)} characters")
                outcome(mirai.mirai("import os\nos.write(2, bytes([97]) * 1_000_000)\nos.write(2, b'!')"))
                self.assertEqual(err.getvalue() == "a" * 1_000_000 + "!", True, f"{len(err.getvalue())} of 1000001")

    def test_output_of_a_line_that_is_not_ended_comes_too(self):
        with self.hearing() as (out, _), daemons(1, output=True):
            outcome(mirai.mirai(print, "half", end=""))
            self.assertEqual(out.getvalue(), "half")
            outcome(mirai.mirai(print, "the rest", end=""))
            self.assertEqual(out.getvalue(), "halfthe rest")

    def test_output_is_any_text_and_what_is_none_harms_nobody(self):
        with self.hearing() as (out, _), daemons(1, output=True):
            outcome(mirai.mirai(print, "Größe 漢字 \U0001f600"))
            self.assertEqual(out.getvalue(), "Größe 漢字 \U0001f600\n")
            outcome(mirai.mirai("import os\nfor b in '漢'.encode(): os.write(1, bytes([b]))\nos.write(1, bytes([10]))"))
            self.assertEqual(out.getvalue()[-2:], "漢\n")
            outcome(mirai.mirai("import os; os.write(1, bytes([255, 254, 10, 0, 10]))"))
            outcome(mirai.mirai(print, "after"))
            self.assertTrue(out.getvalue().endswith("\nafter\n"))

    def test_output_of_several_daemons_is_mixed_by_whole_lines(self):
        with self.hearing() as (out, _), daemons(3, output=True):
            def write(letter):
                for _ in range(300):
                    print(letter * 100, flush=True)

            outcomes([mirai.mirai(write, letter) for letter in "abc"])
            lines = out.getvalue().splitlines()
            self.assertEqual(sorted(lines), sorted(letter * 100 for letter in "abc" for _ in range(300)))

    def test_output_of_map_items_and_of_everywhere_comes_too(self):
        for mode in MODES:
            with self.subTest(**mode), self.hearing() as (out, _), daemons(2, output=True, **mode):
                outcomes(mirai_map(range(500), lambda i: print(f"item {i}")))
                self.assertEqual(sorted(out.getvalue().splitlines()), sorted(f"item {i}" for i in range(500)))
                outcomes(mirai.everywhere("print('everywhere')"))
                self.assertEqual(out.getvalue().count("everywhere\n"), 2)

    def test_output_of_a_failing_a_cancelled_and_a_dying_task_comes(self):
        with self.hearing() as (out, err), Gate() as gate, daemons(1, output=True):
            outcome(mirai.mirai("print('before the failure')\n1 / 0"))
            self.assertIn("before the failure\n", out.getvalue())
            m = mirai.mirai("print('before the cancel', flush=True)\nenter(1)\nwhile True: pass", enter=gate.enter)
            gate.arrived()
            wait_until(lambda: "before the cancel\n" in out.getvalue(), SOON, "what it says, while it runs")
            gate.open()
            m.cancel()
            lost = outcome(mirai.mirai("import os\nprint('before the end', flush=True)\nos.write(2, b'last words')\nos._exit(3)"))
            self.assertIsInstance(lost, MiraiConnectionReset)
            self.assertIn("last words", str(lost))
            wait_until(lambda: "before the end\n" in out.getvalue() and "last words" in err.getvalue(), SOON)
            outcome(mirai.mirai(print, "by the next"))
            self.assertIn("by the next\n", out.getvalue())

    def test_output_of_what_a_task_leaves_running_comes_when_it_comes(self):
        with self.hearing() as (out, _), daemons(1, output=True):
            outcome(mirai.mirai("import subprocess\nchild = subprocess.Popen(['sh', '-c', 'sleep 0.2; echo late'])\nNone"))
            wait_until(lambda: "late\n" in out.getvalue(), SOON, "the late line")

    def test_output_is_dropped_unless_asked_for(self):
        for mode in MODES:
            with self.subTest(**mode), self.hearing() as (out, err), daemons(1, **mode):
                self.assertEqual(outcome(mirai.mirai(_WRITE)), 7)
                outcome(mirai.mirai(lambda: [print("x" * 100) for _ in range(20_000)][-1]))
                self.assertEqual((out.getvalue(), err.getvalue()), ("", ""))

    def test_output_goes_to_the_hosts_own_descriptors_in_a_script(self):
        done = run_python(f"""
            import mirai
            print("first")
            with mirai.daemons(1, output=True):
                mirai.mirai({_WRITE!r}).result()
                print("then")
                mirai.mirai(print, "last of all").result()
            """)
        self.assertEqual(done.stdout, "first\nprinted\nwritten\nechoed\nfrom C\nlast\nthen\nlast of all\n")
        self.assertEqual(done.stderr, "said\nwritten too\nechoed too\n")

    def test_output_ends_no_host_whose_stdout_is_closed_or_broken(self):
        class Broken(io.StringIO):
            def write(self, text):
                raise OSError("no space left")

        with daemons(1, output=True), contextlib.redirect_stdout(Broken()):
            self.assertEqual(outcome(mirai.mirai("print('lost')\n3")), 3)
            self.assertEqual(outcome(mirai.mirai(abs, -1)), 1)
            with contextlib.redirect_stdout(None):
                self.assertEqual(outcome(mirai.mirai("print('lost')\n4")), 4)

    def test_output_of_a_daemon_that_was_started_by_hand_is_its_own(self):
        with self.hearing() as (out, _), daemons(url="tcp://127.0.0.1:0"):
            one = self.by_hand(status()["daemons"], "--output", "--maxtasks", "2")
            outcome(mirai.mirai(print, "printed"))
            outcome(mirai.mirai("import os; os.write(2, b'written')"))
            said, complained = one.process.communicate(timeout=SOON)
            self.assertIn("printed\n", said + out.getvalue())
            self.assertIn("written", complained + out.getvalue())

    # -- asyncdial

    def test_asyncdial_waits_for_somebody_to_listen(self):
        with tempfile.TemporaryDirectory() as folder:
            for mode, url in zip(MODES, (f"tcp://127.0.0.1:{free_port()}", f"ipc://{folder}/socket")):
                with self.subTest(**mode):
                    early = self.by_hand(url, "--asyncdial", key=KEY)
                    hasty = self.by_hand(url, key=KEY)
                    self.assertEqual(hasty.status(SOON)[0], 69)
                    self.assertIsNone(early.process.poll())
                    with daemons(url=url, key=KEY, **mode):
                        joined(1)
                        self.assertEqual(outcome(mirai.mirai(os.getpid)), early.pid)
                    self.assertEqual(early.status(SOON), (0, ""))
        with daemons(1, asyncdial=True):
            self.assertEqual(outcome(mirai.mirai(abs, -1)), 1)

    # -- kill_after

    def test_kill_after_ends_a_daemon_that_does_not_give_back_a_cancelled_task(self):
        for mode in MODES:
            with self.subTest(**mode), Gate() as gate, daemons(1, kill_after=0.3, **mode):
                m = mirai.mirai(_crunch, gate.enter)
                _, pid = gate.arrived()
                waiting = mirai.mirai(os.getpid)
                gate.open()
                computes(pid)
                self.assertTrue(m.cancel())
                self.assertIs(type(m.data), MiraiCancelled)
                no_more([pid], 3.0)
                self.assertNotEqual(outcome(waiting), pid)
                timed = mirai.mirai(_crunch, _timeout=0.2)
                self.assertIs(type(outcome(timed)), MiraiTimeout)
                self.assertEqual(outcome(mirai.mirai(abs, -1)), 1)

    def test_kill_after_spares_what_gives_back_its_task(self):
        with Gate() as gate, daemons(1, kill_after=0.3):
            for task in (sleeping, looping):
                m = mirai.mirai(task, gate.enter)
                _, pid = gate.arrived()
                gate.open()
                m.cancel()
                self.assertEqual(outcome(mirai.mirai(os.getpid)), pid)
            # a kill for a task that was given back must not hit the next one
            self.assertEqual(outcome(mirai.mirai("import os, time; time.sleep(0.6); os.getpid()")), pid)

    def test_kill_after_of_a_map_costs_no_other_item(self):
        with daemons(2, kill_after=0.3):
            mp = mirai_map(range(40), lambda i: _crunch() if i == 20 else i)
            wait_until(lambda: unresolved(mp) == 1, 5, "all but one")
            self.assertTrue(mp[20].cancel())
            values = outcomes(mp)
            self.assertIs(type(values.pop(20)), MiraiCancelled)
            self.assertEqual(values, [i for i in range(40) if i != 20])
            wait_until(lambda: info().cumulative == 3 and connections() == 2, 5, "the successor")

    def test_without_kill_after_nobody_is_killed(self):
        with Gate() as gate, daemons(1):
            m = mirai.mirai(_crunch, gate.enter)
            _, pid = gate.arrived()
            gate.open()
            computes(pid)
            m.cancel()
            time.sleep(0.7)
            self.assertTrue(is_alive(pid))
            launch_local(1)
            self.assertEqual(outcome(mirai.mirai(abs, -1)), 1)      # the other works
            self.assertEqual(info().cumulative, 2)

    # -- limits

    def test_limits_end_it_with_a_status_that_nextcode_explains(self):
        with daemons(url="tcp://127.0.0.1:0"):
            url = status()["daemons"]
            for options, text in ((("--idletime", "0.1"), "1 | Daemon idletime limit reached"),
                                  (("--walltime", "0.1"), "2 | Daemon walltime limit reached")):
                self.assertEqual(mirai.nextcode(self.by_hand(url, *options).status(SOON)[0]), text)
            ms = mirai_map(range(7), lambda i: (i, os.getpid()))
            first = self.by_hand(url, "--maxtasks", "3")
            self.assertEqual(mirai.nextcode(first.status(SOON)[0]), "3 | Daemon task limit reached")
            wait_until(lambda: unresolved(ms) == 4, SOON)
            second, third = self.by_hand(url, "--maxtasks", "2"), self.by_hand(url, "--maxtasks", "2")
            self.assertEqual({one.status(SOON)[0] for one in (second, third)}, {3})
            values = outcomes(ms)
            self.assertEqual([i for i, _ in values], list(range(7)))
            counts = [[pid for _, pid in values].count(one.pid) for one in (first, second, third)]
            self.assertEqual(counts, [3, 2, 2])
            last = self.by_hand(url)
            joined(1)
            daemons(0)
            self.assertEqual(mirai.nextcode(last.status(SOON)[0]), "0 | Daemon connection terminated")

    def test_limits_of_time_let_a_running_task_finish(self):
        with daemons(url="tcp://127.0.0.1:0"), Gate() as gate:
            for option, code in (("--idletime", 1), ("--walltime", 2)):
                one = self.by_hand(status()["daemons"], option, "0.4")
                m = mirai.mirai(gate.enter, 5)
                gate.arrived()
                time.sleep(0.6)
                self.assertIsNone(one.process.poll())
                gate.open()
                self.assertEqual(outcome(m), 5)
                self.assertEqual(one.status(SOON)[0], code)
                wait_until(lambda: connections() == 0, SOON)

    def test_limits_in_direct_mode(self):
        with daemons(url="tcp://127.0.0.1:0", dispatcher=False):
            url = status()["daemons"]
            for options, code in ((("--idletime", "0.1"), 1), (("--walltime", "0.1"), 2)):
                self.assertEqual(self.by_hand(url, *options).status(SOON)[0], code)
            one = self.by_hand(url, "--maxtasks", "2")
            self.assertEqual(outcomes([mirai.mirai(os.getpid) for _ in range(2)]), [one.pid] * 2)
            self.assertEqual(one.status(SOON)[0], 3)
            m = mirai.mirai(abs, -1)
            wait_until(lambda: connections() == 0, SOON)
            self.assertFalse(m.done())
            self.by_hand(url)
            self.assertEqual(outcome(m), 1)

    def test_local_daemons_that_idled_out_come_back_when_tasks_wait(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(2, idletime=0.1, **mode):
                first = set(outcomes(mirai.everywhere(os.getpid)))
                wait_until(lambda: connections() == 0, SOON)
                self.assertNotIn(outcome(mirai.mirai(os.getpid)), first)
            with self.subTest(**mode), daemons(1, walltime=0.2, **mode):
                pid = outcome(mirai.mirai(os.getpid))
                wait_until(lambda: not is_alive(pid), SOON)
                self.assertNotEqual(outcome(mirai.mirai(os.getpid)), pid)

    def test_bad_options_are_told_at_once(self):
        bad = ((ValueError, {"autoexit": "yes"}), (ValueError, {"cleanup": None}), (ValueError, {"output": 1}),
               (ValueError, {"asyncdial": "no"}), (ValueError, {"kill_after": 0}), (ValueError, {"kill_after": "1"}),
               (ValueError, {"maxtasks": 0}), (ValueError, {"rs": [1, 2]}), (ValueError, {"rs": "seed"}),
               (TypeError, {"clean_up": False}), (TypeError, {"auto_exit": None}))
        for error, options in bad:
            with self.subTest(**options), self.assertRaisesRegex(error, *options):
                daemons(1, **options)
        with daemons(1):
            for error, options in bad:
                with self.subTest(**options), self.assertRaisesRegex(error, *options):
                    launch_local(1, **options)
        for options in (("--autoexit", "maybe"), ("--autoexit",), ("--cleanup",), ("--output", "yes")):
            with self.subTest(options):
                self.assertEqual(self.by_hand("tcp://127.0.0.1:1", *options, key=KEY).status(SOON)[0], 64)
        self.assertFalse(mirai.daemons_set())

    # -- memory

    def used(self):
        return status()["memory"]["used"]

    def test_a_timeout_counts_the_wait_for_room(self):
        for mode in MODES:
            with self.subTest(**mode), Gate() as gate, daemons(1, memory=1000, **mode):
                held = mirai.mirai(lambda enter, data: enter(), gate.enter, bytes(2000))
                gate.arrived()
                start = time.monotonic()
                self.assertIs(type(outcome(mirai.mirai(len, bytes(2000), _timeout=0.2))), MiraiTimeout)
                self.assertEqual([type(v) for v in outcomes(mirai_map([bytes(2000)], len, _timeout=0.2))], [MiraiTimeout])
                self.assertLess(time.monotonic() - start, SOON)
                gate.open()
                outcome(held)
                self.assertEqual(outcome(mirai.mirai(len, bytes(2000), _timeout=LONG)), 2000)

    def test_a_task_that_finds_no_room_takes_no_random_stream(self):
        found = []
        for tries in (1, 7):
            with Gate() as gate, daemons(1, memory=1000, seed=1):
                held = mirai.mirai(lambda enter, data: enter(), gate.enter, bytes(2000))
                gate.arrived()
                self.assertEqual({mirai.try_mirai(len, bytes(2000)) for _ in range(tries)}, {None})
                gate.open()
                outcome(held)
                found.append(outcome(mirai.mirai("import random; random.random()")))
        self.assertEqual(found[0], found[1])

    def test_memory_is_in_the_status(self):
        for mode in MODES:
            with self.subTest(**mode), Gate() as gate, daemons(1, memory=1_000_000, **mode):
                held = mirai.mirai(gate.enter)
                gate.arrived()
                before = status()["memory"]
                self.assertEqual((set(before), before["capacity"]), ({"used", "peak", "capacity"}, 1_000_000))
                self.assertLess(before["used"], 10_000)
                ms = [mirai.mirai(len, bytes(300_000)) for _ in range(2)]
                now = status()["memory"]
                self.assertTrue(600_000 <= now["used"] <= 620_000, now)
                self.assertGreaterEqual(now["peak"], now["used"])
                gate.open()
                self.assertEqual(outcomes(ms), [300_000] * 2)
                wait_until(lambda: self.used() == 0, SOON, "nothing in use")
                self.assertGreaterEqual(status()["memory"]["peak"], 600_000)
                outcome(held)

    def test_memory_that_is_spent_makes_mirai_wait_and_try_mirai_none(self):
        for mode in MODES:
            with self.subTest(**mode), Gate() as gate, daemons(1, memory=1_000_000, **mode):
                held = mirai.mirai(gate.enter)
                gate.arrived()
                ms = []
                for _ in range(100):
                    m = mirai.try_mirai(len, bytes(300_000))
                    if m is None:
                        break
                    ms.append(m)
                self.assertTrue(3 <= len(ms) <= 4, len(ms))
                blocked = threading.Thread(target=lambda: ms.append(mirai.mirai(len, bytes(300_000))), daemon=True)
                blocked.start()
                blocked.join(0.3)
                self.assertTrue(blocked.is_alive())
                self.assertIsNone(mirai.try_mirai(len, bytes(300_000)))
                self.assertLessEqual(self.used(), 1_300_000)
                gate.open()
                blocked.join(SOON)
                self.assertFalse(blocked.is_alive())
                self.assertEqual(outcomes(ms), [300_000] * len(ms))
                self.assertEqual(outcome(mirai.try_mirai(len, bytes(300_000))), 300_000)
                outcome(held)

    def test_memory_is_given_back_by_cancels_timeouts_errors_and_deaths(self):
        with daemons(1, memory=1_000_000):
            for end in ("cancel", "timeout", "error", "death"):
                with self.subTest(end), Gate() as gate:
                    held = mirai.mirai(gate.enter)
                    _, pid = gate.arrived()
                    m = mirai.mirai(lambda data: 1 / 0, bytes(900_000), _timeout=0.1 if end == "timeout" else None)
                    other = mirai.try_mirai(len, bytes(900_000))
                    if end == "cancel":
                        m.cancel()
                    elif end == "death":
                        os.kill(pid, signal.SIGKILL)
                    elif end == "error":
                        gate.open()
                    outcome(m)
                    gate.open()
                    outcomes([held, *filter(None, [other])])
                    wait_until(lambda: self.used() == 0, SOON, "nothing in use")
                    self.assertEqual(mirai.mirai(len, bytes(900_000)).result(SOON), 900_000)

    def test_memory_lets_a_payload_through_that_is_larger_than_all_of_it(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(1, memory=1000, **mode):
                done = _at_once(1, lambda i: outcome(mirai.mirai(len, bytes(100_000))))
                self.assertEqual(done, [100_000])
                self.assertEqual(outcomes(mirai_map([bytes(2000)] * 20, len)), [2000] * 20)
                self.assertEqual(outcomes([mirai.mirai(len, bytes(900)) for _ in range(20)]), [900] * 20)

    def test_memory_that_many_threads_wait_for_goes_to_all_of_them(self):
        with daemons(2, memory=100_000):
            found = _at_once(8, lambda i: [outcome(mirai.mirai(len, bytes(60_000 + i))) for _ in range(10)])
            self.assertEqual(found, [[60_000 + i] * 10 for i in range(8)])

    def test_memory_that_is_waited_for_ends_with_the_reset_and_with_ctrl_c(self):
        with Gate() as gate:
            daemons(1, memory=1000)
            held = mirai.mirai(gate.enter, "x" * 5000)
            gate.arrived()
            blocked = threading.Thread(target=self._submit, daemon=True)
            blocked.start()
            blocked.join(0.2)
            self.assertTrue(blocked.is_alive())
            daemons(0)
            blocked.join(SOON)
            self.assertFalse(blocked.is_alive())
            self.assertIsInstance(held.data, MiraiConnectionReset)
        done = run_python("""
            import mirai, os, signal, threading
            with mirai.daemons(1, memory=1000):
                held = mirai.mirai("import time; len(x) + time.sleep(1000)", x="x" * 5000)
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
                try:
                    mirai.mirai(len, "x" * 5000)
                    print("not interrupted")
                except KeyboardInterrupt:
                    print("interrupted", held.cancel(), mirai.mirai(len, "x" * 5000).result(20))
            """, timeout=SOON)
        self.assertEqual((done.stderr, done.stdout.strip()), ("", "interrupted True 5000"))

    @staticmethod
    def _submit():
        with contextlib.suppress(Exception):
            mirai.mirai(len, bytes(5000))

    def test_without_a_budget_try_mirai_is_mirai(self):
        self.assertEqual(outcome(mirai.try_mirai(abs, -1)), 1)          # in a process of its own
        for mode in (*MODES, {"sync": True}):
            with self.subTest(**mode), daemons(1, **mode):
                ms = [mirai.try_mirai(pow, i, 2, _timeout=SOON, _retries=1) for i in range(50)]
                self.assertEqual(outcomes(ms), [i * i for i in range(50)])
                self.assertEqual(outcome(mirai.try_mirai("a + b", a=1, b=2)), 3)
                with self.assertRaises(TypeError):
                    mirai.try_mirai(print, threading.Lock())

    def test_memory_must_be_a_number_of_bytes(self):
        for wrong in (-1, 0, "1GB", True, 1.5):
            with self.subTest(wrong), self.assertRaisesRegex((TypeError, ValueError), "memory"):
                daemons(1, memory=wrong)
            self.assertFalse(mirai.daemons_set())


# -- 12. Nursery


class TestNursery(Case):
    def set_daemons(self, n, **options):
        self.addCleanup(daemons, 0)
        daemons(n, **options)

    def expect_gone(self, pids, seconds):
        """Every process ends within so many seconds; what did not is killed."""
        try:
            no_more(pids, seconds)
        finally:
            for pid in pids:
                if is_alive(pid):
                    with contextlib.suppress(ProcessLookupError), open(f"/proc/{pid}/cmdline") as file:
                        print("left:", pid, file.read().replace("\0", " ")[:200], file=sys.stderr)
                        os.kill(pid, signal.SIGKILL)

    BUSY = """
        import mirai, os, signal, subprocess, sys, time
        from mirai import daemons, info

        def loop():
            while True:
                pass

        def compute():
            sum(range(10**12))

        def ignore():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)

        def call():
            subprocess.run(["sleep", "1000"])

        def start():
            daemons(4)
            ms = [mirai.mirai(f) for f in (loop, compute, ignore, call)]
            while info().executing < 4:
                time.sleep(0.001)
            print(mirai.status()["daemons"])
            return ms

        """

    def busy_host(self, code, **options):
        """A host whose four daemons are busy, before it goes on with `code`; the ids of all that it started."""
        host = Host(textwrap.dedent(self.BUSY) + textwrap.dedent(code), **options)
        self.addCleanup(host.__exit__)
        url = host.line()
        family = wait_until(lambda: (lambda pids: pids if len(pids) >= 7 else None)(family_of(host.pid)))
        self.assertEqual(len(family), 7)        # nursery, dispatcher, four daemons and the child of one
        path = url[len("ipc://"):]
        self.assertTrue(os.path.exists(path))
        mirai.find_key(url)
        return host, family, url

    def expect_no_files(self, url):
        self.assertFalse(os.path.exists(url[len("ipc://"):]))
        with self.assertRaises(mirai.Refused):
            mirai.find_key(url)

    def test_what_a_killed_host_had_started_is_gone_a_second_later_with_its_files(self):
        host, family, url = self.busy_host("ms = start(); time.sleep(1000)")
        os.kill(host.pid, signal.SIGKILL)
        self.expect_gone(family, 1.0)
        self.expect_no_files(url)

    def test_neither_a_fork_nor_a_program_with_the_hosts_descriptors_keeps_it_alive(self):
        host, family, url = self.busy_host("""
            ms = start()
            sys.stdin.readline()
            fork = os.fork()
            if fork == 0:
                time.sleep(1000)
                os._exit(0)
            for fd in map(int, os.listdir("/proc/self/fd")):
                try:
                    os.set_inheritable(fd, True)
                except OSError:
                    pass
            program = subprocess.Popen(["sleep", "1000"], close_fds=False)
            print(fork, program.pid)
            time.sleep(1000)
            """, stdin=subprocess.PIPE)
        self.addCleanup(host.process.stdin.close)
        host.process.stdin.write("go\n")
        host.process.stdin.flush()
        survivors = list(map(int, host.line().split()))
        try:
            os.kill(host.pid, signal.SIGKILL)
            self.expect_gone(family, 1.0)
            self.expect_no_files(url)
            self.assertTrue(all(map(is_alive, survivors)))
        finally:
            for pid in survivors:
                os.kill(pid, signal.SIGKILL)

    def test_however_a_host_ends_all_is_gone_and_nothing_is_said(self):
        endings = {
            "ms = start(); sys.stdin.readline()": (0, ""),
            "ms = start(); sys.stdin.readline(); sys.exit(3)": (3, ""),
            "ms = start(); sys.stdin.readline(); os._exit(4)": (4, ""),
            "ms = start(); sys.stdin.readline(); daemons(0)": (0, ""),
            "ms = start(); sys.stdin.readline(); os.kill(os.getpid(), signal.SIGTERM)": (-signal.SIGTERM, ""),
            "ms = start(); sys.stdin.readline(); os.kill(os.getpid(), signal.SIGHUP)": (-signal.SIGHUP, ""),
            "ms = start(); sys.stdin.readline(); 1 / 0": (1, "ZeroDivisionError: division by zero"),
            "ms = start(); import threading; threading.Thread(target=lambda: ms[0][:], daemon=True).start(); "
            "sys.stdin.readline()": (0, ""),
        }
        codes, pipe = list(endings), subprocess.PIPE
        hosts = _at_once(len(codes), lambda i: self.busy_host(codes[i], stdin=pipe, stderr=pipe))
        for (code, (status, said)), (host, family, url) in zip(endings.items(), hosts):
            with self.subTest(code=code):
                start = time.monotonic()
                _, stderr = host.process.communicate("go\n", timeout=LONG)
                self.expect_gone(family, 2.0)
                self.assertLess(time.monotonic() - start, 2.0)
                self.assertEqual(host.process.returncode, status, stderr)
                self.assertEqual(stderr.strip().rpartition("\n")[2], said)
                self.assertEqual(stderr.count("Traceback"), 1 if said else 0, stderr)
                self.expect_no_files(url)

    def test_a_ctrl_c_in_the_terminal_is_the_hosts_alone(self):
        host, family, url = self.busy_host("""
            ms = start()
            try:
                ms[0].result()
            except KeyboardInterrupt:
                print("interrupted", [m.done() for m in ms], info().connections, flush=True)
            sys.stdin.readline()
            """, stdin=subprocess.PIPE, start_new_session=True)
        self.addCleanup(host.process.stdin.close)
        os.killpg(host.pid, signal.SIGINT)
        self.assertEqual(host.line(), "interrupted [False, False, False, False] 4")
        self.assertTrue(all(map(is_alive, family)))
        host.process.communicate("go\n", timeout=LONG)
        self.expect_gone(family, 1.0)

    def test_without_its_nursery_all_ends_and_daemons_can_be_set_again(self):
        with Gate() as gate:
            self.set_daemons(2)
            ms = [mirai.mirai(looping, gate.enter) for _ in range(2)] + [mirai.mirai(abs, 1) for _ in range(3)]
            for _ in range(2):
                gate.arrived()
            gate.open()
            nursery = nursery_pid()
            family = [nursery, *family_of(nursery)]
            os.kill(nursery, signal.SIGKILL)
            lost = [m[:] for m in ms]
            self.assertEqual([(type(e), e.code) for e in lost], [(MiraiConnectionReset, 19)] * 5)
            self.expect_gone(family, 1.0)
            with self.assertRaises(MiraiConnectionReset):
                mirai.mirai(abs, 1)
            self.set_daemons(2)
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)
            self.assertNotEqual(nursery_pid(), nursery)

    def test_without_its_dispatcher_all_ends_and_the_next_call_says_so(self):
        with Gate() as gate:
            self.set_daemons(2)
            ms = [mirai.mirai(looping, gate.enter) for _ in range(2)]
            for _ in range(2):
                gate.arrived()
            gate.open()
            url = status()["daemons"]
            pids = family_of(nursery_pid())
            os.kill(dispatcher_pid(), signal.SIGKILL)
            for m in ms:
                self.assertIn("was killed by SIGKILL", str(m[:]))
                self.assertEqual(m[:].code, 19)
            self.expect_gone(pids, 1.0)
            with self.assertRaisesRegex(MiraiConnectionReset, r"(?s)SIGKILL.*daemons\(n\)"):
                mirai.mirai(abs, 1)
            wait_until(lambda: not os.path.exists(url[len("ipc://"):]), 1.0)
            self.set_daemons(1)
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_each_daemon_leads_a_session_of_its_own(self):
        self.set_daemons(2)
        self.assertTrue(mirai.mirai(lambda: os.getsid(0) == os.getpgid(0) == os.getpid()).result(LONG))

    def test_what_a_lost_daemons_task_had_started_goes_with_it(self):
        def start_and_die():
            child = subprocess.Popen(["sleep", "1000"])
            os.write(2, f"child {child.pid}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

        self.set_daemons(1)
        lost = mirai.mirai(start_and_die)[:]
        self.expect_gone([int(re.search("child ([0-9]+)", str(lost))[1])], 1.0)

    # -- last words

    def test_the_last_words_of_a_crash_are_its_stack(self):
        def crash_here():
            os.kill(os.getpid(), signal.SIGSEGV)

        self.set_daemons(1)
        lost = mirai.mirai(crash_here)[:]
        self.assertIsInstance(lost, MiraiConnectionReset)
        self.assertRegex(str(lost), r"(?s)daemon [0-9]+ .*was killed by SIGSEGV.*Segmentation fault")
        if not PYPY:
            self.assertIn("in crash_here", str(lost))

    def test_of_the_last_words_the_last_4096_bytes_are_kept(self):
        def talk():
            os.write(2, b"the beginning" + b"x" * 100_000 + b"the end")
            os._exit(3)

        self.set_daemons(1)
        text = str(mirai.mirai(talk)[:])
        self.assertIn("exited with status 3", text)
        self.assertTrue(text.endswith("xthe end"))
        self.assertLess(len(text), mirai.LAST_WORDS + 200)
        self.assertGreater(len(text), mirai.LAST_WORDS - 200)

    # -- descriptors

    def test_daemons_inherit_no_descriptors(self):
        def held():
            return {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                    if os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}")}

        with tempfile.TemporaryFile() as file, Gate() as gate:
            os.set_inheritable(file.fileno(), True)
            os.set_inheritable(gate.listener.fileno(), True)
            self.set_daemons(3)
            ms = [mirai.mirai(lambda enter, held: (enter("x"), held())[1], gate.enter, held) for _ in range(3)]
            for _ in ms:
                gate.arrived()
            gate.open()
            found = [m.result(LONG) for m in ms]
            os.set_inheritable(gate.listener.fileno(), False)
        sockets = [[to for to in fds.values() if to.startswith("socket:")] for fds in found]
        self.assertEqual(list(map(len, sockets)), [1, 1, 1], found)
        self.assertEqual(len({each[0] for each in sockets}), 3)
        for fds in found:
            self.assertEqual([fds["0"], fds["1"]], [os.devnull] * 2)
            pipes = [fd for fd, to in fds.items() if to.startswith("pipe:")]
            self.assertEqual(pipes, ["2"], fds)
            self.assertLessEqual(len(fds), 6 if PYPY else 4, fds)

    def test_daemons_have_the_users_own_limit_of_descriptors(self):
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.set_daemons(1)
        self.assertEqual(mirai.mirai("import resource; resource.getrlimit(resource.RLIMIT_NOFILE)[0]").result(LONG), soft)

    # -- starting, again and again

    def test_five_failed_starts_are_an_error_with_the_last_words_and_others_work_on(self):
        done = run_python("""
            import difflib, mirai, os, resource, time
            from mirai import daemons, info, launch_local
            daemons(1)
            pid = mirai.mirai(os.getpid).result()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            start = time.monotonic()
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            text = "it did start"
            try:
                launch_local(1)
            except mirai.LaunchError as error:
                text = str(error)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert time.monotonic() - start < 10.0
            assert "5 in a row" in text and "Too many open files" in text, text
            assert [mirai.mirai(os.getpid).result() for _ in range(5)] == [pid] * 5
            assert info().connections == 1
            assert launch_local(1) == 1
            assert info().connections >= 2
            print("good")
            """)
        self.assertEqual((done.stdout, done.stderr), ("good\n", ""))

    def test_daemons_that_cannot_start_are_an_error_with_their_last_words(self):
        def no_daemons(*_):
            return {**spec(*_), "nofile": 3}        # no descriptor is left to dial with

        spec = mirai._daemon_spec
        with replaced(mirai, "_daemon_spec", no_daemons):
            with self.assertRaisesRegex(mirai.LaunchError, "(?s)5 in a row.*Too many open files"):
                daemons(2)
        self.assertFalse(mirai.daemons_set())

    def test_an_idle_daemon_that_is_killed_is_soon_replaced(self):
        self.set_daemons(2)
        with Gate() as gate:
            ms = [mirai.mirai(gate.enter) for _ in range(2)]
            victim = [gate.arrived()[1] for _ in ms][0]
            gate.open()
            call_mirai(ms)
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: info().cumulative == 3 and info().connections == 2, 2.0, "a new daemon")
            ms = [mirai.mirai(gate.enter) for _ in range(2)]
            self.assertNotIn(victim, [gate.arrived()[1] for _ in ms])

    def test_daemons_that_reach_maxtasks_are_replaced(self):
        self.set_daemons(2, maxtasks=1)
        pids = [m.result(LONG) for m in [mirai.mirai(os.getpid) for _ in range(8)]]
        self.assertEqual(len(set(pids)), 8)
        wait_until(lambda: info().connections == 2, 2.0, "two new daemons")

    def test_setting_and_resetting_leaves_nothing_behind(self):
        def held():
            nursery = nursery_pid()
            return (descriptors(), len(os.listdir(f"/proc/{nursery}/fd")), len(family_of(nursery)),
                    threading.active_count(), sorted(os.listdir(mirai.runtime_dir())))

        first = None
        for _ in range(at_length(10, 30)):
            with daemons(2):
                self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)
            if first is None:
                first = held()
        self.assertEqual(held(), first)

    # -- output

    def outputs(self, code, **options):
        """What a host with daemons of `output=True` shows on stdout and stderr."""
        done = run_python("""
            import mirai, os, subprocess, sys
            from mirai import daemons
            def say(text, stream="stdout"):
                print(text, end="", file=getattr(sys, stream))
            def both(n):
                os.write(1, b"1" * n)
                os.write(2, b"2" * n)
            """ + textwrap.dedent("\n" + code).replace("\n", "\n            "), **options)
        self.assertEqual(done.returncode, 0, done.stderr[-2000:])
        return done.stdout, done.stderr

    def test_with_output_what_tasks_write_in_whatever_way_appears_before_their_result(self):
        for options in ("", ", dispatcher=False"):
            with self.subTest(options=options):
                said = self.outputs(f"""
                    with daemons(1, output=True{options}):
                        for i in range(50):
                            mirai.mirai(say, f"a{{i}} ").result()
                            print(f"b{{i}} ", end="", flush=True)
                        mirai.mirai(os.write, 1, b"written ").result()
                        print("W ", end="", flush=True)
                        mirai.mirai(subprocess.run, ["printf", "echoed "]).result()
                        print("E", end="", flush=True)
                        mirai.mirai(say, "error", "stderr").result()
                        print(" END", end="", file=sys.stderr)
                    """)
                expected = "".join(f"a{i} b{i} " for i in range(50)) + "written W echoed E"
                self.assertEqual(said, (expected, "error END"))

    def test_with_output_nothing_of_much_is_missing_when_the_result_is_there(self):
        said, errors = self.outputs("""
            with daemons(1, output=True):
                for n in (100_000, 1_000_000, 5_000_000):
                    mirai.mirai(both, n).result()
                    sys.stderr.flush()
                    print("|", end="", flush=True)
            """)
        self.assertEqual(list(map(len, said.split("|"))), [100_000, 1_000_000, 5_000_000, 0])
        self.assertEqual((set(said), len(errors)), ({"1", "|"}, 6_100_000))

    def test_with_output_that_of_a_daemon_which_ends_appears_too(self):
        said, errors = self.outputs("""
            with daemons(1, output=True):
                lost = mirai.mirai(lambda: (print("printed", flush=True), os.write(2, b"last words"), os._exit(3)))[:]
                assert "last words" in str(lost), str(lost)
                assert mirai.mirai("print('again'); 1").result() == 1
            """)
        self.assertEqual((said, errors), ("printed\nagain\n", "last words"))

    def test_with_output_that_of_daemons_without_a_page_comes_before_their_result_as_well(self):
        said, _ = self.outputs("""
            with daemons(1, output=True, autoexit=None):
                for i in range(50):
                    mirai.mirai(say, f"a{i} ").result()
                    print(f"b{i} ", end="", flush=True)
            """)
        self.assertEqual(said, "".join(f"a{i} b{i} " for i in range(50)))

    def test_without_output_nothing_is_shown(self):
        self.assertEqual(self.outputs("""
            with daemons(1):
                mirai.mirai(both, 1000).result()
            """), ("", ""))

    # -- daemons that outlive their host

    def pid_of_the_one(self):
        return mirai.mirai(os.getpid).result(LONG)

    def test_daemons_that_wait_for_a_next_host_are_spared_and_serve_it(self):
        url, key = mirai.local_url(), os.urandom(32)
        self.set_daemons(1, url=url, key=key, autoexit=False)
        pid = self.pid_of_the_one()
        self.end_with_the_test(pid)
        daemons(0)
        self.assertTrue(is_alive(pid))
        for _ in range(2):
            daemons(url=url, key=key)
            wait_until(lambda: info().connections == 1)
            self.assertEqual(self.pid_of_the_one(), pid)
            daemons(0)
        daemons(url=url, key=key)
        wait_until(lambda: info().connections == 1)
        daemons(None)
        self.expect_gone([pid], 2.0)

    def test_daemons_that_wait_for_a_next_host_survive_the_death_of_theirs(self):
        url, key = mirai.local_url(), os.urandom(32)
        with Host(f"""
                import mirai, os, time
                mirai.daemons(1, url={url!r}, key={key!r}, autoexit=False)
                print(mirai.mirai(os.getpid).result())
                mirai.mirai("print('to nobody', flush=True)")
                time.sleep(1000)
                """) as host:
            pid = int(host.line())
            self.end_with_the_test(pid)
            family = family_of(host.pid)
            os.kill(host.pid, signal.SIGKILL)
            self.expect_gone([other for other in family if other != pid], 1.0)
        self.assertTrue(is_alive(pid))
        self.addCleanup(daemons, 0)
        daemons(url=url, key=key)
        wait_until(lambda: info().connections == 1)
        self.assertEqual(mirai.mirai("import os; print('x', flush=True); os.write(2, b'x'); os.getpid()").result(LONG), pid)
        daemons(None)
        self.expect_gone([pid], 2.0)

    def test_daemons_of_one_profile_are_spared_and_those_of_another_are_not(self):
        with Gate() as gate:
            self.set_daemons(1, autoexit=None)
            self.addCleanup(daemons, 0, compute="other")
            daemons(1, compute="other")
            held = [mirai.mirai(gate.enter, "spared"), mirai.mirai(gate.enter, "ends", _compute="other")]
            pids = dict(gate.arrived() for _ in held)
            self.end_with_the_test(pids["spared"])
            daemons(0)
            daemons(0, compute="other")
            self.expect_gone([pids["ends"]], 1.0)
            self.assertTrue(is_alive(pids["spared"]))
            gate.open()
            self.expect_gone([pids["spared"]], 2.0)

    def test_kill_after_ends_a_task_that_will_not_be_cancelled(self):
        def stubborn(enter):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            enter()
            time.sleep(1000)

        for autoexit in (True, None):
            with self.subTest(autoexit=autoexit), Gate() as gate:
                self.set_daemons(1, kill_after=0.1, autoexit=autoexit)
                m = mirai.mirai(stubborn, gate.enter)
                pid = gate.arrived()[1]
                self.end_with_the_test(pid)
                gate.open()
                m.cancel()
                self.expect_gone([pid], 3.0)
                self.assertNotEqual(self.pid_of_the_one(), pid)

    # -- a dispatcher in the host

    def test_in_direct_mode_the_nursery_has_daemons_alone_and_they_work(self):
        self.set_daemons(2, dispatcher=False)
        self.assertEqual(len(family_of(nursery_pid())), 2)
        pids = _pids(2)
        self.assertEqual(pids, set(family_of(nursery_pid())))
        victim = min(pids)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: info().cumulative == 3 and info().connections == 2, 2.0, "a new daemon")
        self.assertNotIn(victim, _pids(2))

    def test_in_direct_mode_last_words_and_cancels_find_their_way(self):
        self.set_daemons(1, dispatcher=False)
        lost = mirai.mirai(lambda: (os.write(2, b"last words"), os._exit(3)))[:]
        self.assertRegex(str(lost), "(?s)exited with status 3.*last words")
        with Gate() as gate:
            m = mirai.mirai(sleeping, gate.enter)
            pid = gate.arrived()[1]
            gate.open()
            m.cancel()
            self.assertEqual(self.pid_of_the_one(), pid)

    def test_in_direct_mode_a_reset_ends_the_daemons_and_the_thread_and_gives_the_descriptors_back(self):
        def held():
            nursery = nursery_pid()
            return (descriptors(), len(os.listdir(f"/proc/{nursery}/fd")), len(family_of(nursery)),
                    sorted(thread.name for thread in threading.enumerate()), sorted(os.listdir(mirai.runtime_dir())))

        first = None
        for _ in range(at_length(8, 20)):
            with daemons(1, dispatcher=False):
                self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)
                pids = family_of(nursery_pid())
            self.expect_gone(pids, 1.0)
            wait_until(lambda: "mirai-dispatcher" not in {thread.name for thread in threading.enumerate()}, 2.0)
            if first is None:
                first = held()
        def nothing_more():        # the nursery closes what it had a moment after the host has heard of the end
            now = held()
            return now[3:] == first[3:] and all(a <= b for a, b in zip(now[:3], first[:3]))

        wait_until(nothing_more, 5.0, "the descriptors' being given back")

    def test_in_direct_mode_without_its_nursery_all_ends(self):
        with Gate() as gate:
            self.set_daemons(2, dispatcher=False)
            ms = [mirai.mirai(looping, gate.enter) for _ in range(2)] + [mirai.mirai(abs, 1) for _ in range(3)]
            for _ in range(2):
                gate.arrived()
            gate.open()
            nursery = nursery_pid()
            family = [nursery, *family_of(nursery)]
            os.kill(nursery, signal.SIGKILL)
            self.assertEqual([type(m[:]) for m in ms], [MiraiConnectionReset] * 5)
            self.expect_gone(family, 1.0)
            self.set_daemons(1, dispatcher=False)
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_in_direct_mode_daemons_that_cannot_start_are_an_error_with_their_last_words(self):
        def no_daemons(*_):
            return {**spec(*_), "nofile": 3}

        spec = mirai._daemon_spec
        before = threading.active_count()
        with replaced(mirai, "_daemon_spec", no_daemons):
            with self.assertRaisesRegex(mirai.LaunchError, "(?s)5 in a row.*Too many open files"):
                daemons(2, dispatcher=False)
        self.assertFalse(mirai.daemons_set())
        wait_until(lambda: threading.active_count() == before, 2.0)

    def test_in_direct_mode_a_url_that_is_taken_is_an_error_and_leaves_nothing(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.set_daemons(1)         # the nursery is there
            gc.collect()
            before = descriptors(), threading.active_count()
            url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            with self.assertRaisesRegex(mirai.LaunchError, "can't listen at " + re.escape(url)):
                daemons(1, url, dispatcher=False, compute="other")
            gc.collect()
            self.assertEqual((descriptors(), threading.active_count()), before)


# -- other machines

MIB = 1 << 20


# -- services that run on this machine, for tests of the real thing


def _services_dir():
    path = os.environ.get("MIRAI_SERVICES_SCRIPTS") or os.path.join(HERE, ".ci", "services")
    return path if os.path.isdir(path) else None


@functools.cache
def service(name):
    """What a service that is up says of itself (KEY=VALUE), None where it is down or unknown."""
    folder = _services_dir()
    if folder is None:
        return None
    done = subprocess.run(["bash", os.path.join(folder, f"{name}.sh"), "status"], stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=LONG)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line) if not done.returncode else None


def ssh_file():
    return os.environ.get("MIRAI_SSH_CONFIG") or (service("sshd") or {}).get("SSH_CONFIG")


def netns_script():
    return os.environ.get("MIRAI_NETNS") or (service("netns") or {}).get("NETNS_EXEC")


def needs_service(name):
    """Skips where it is not up; asked when the test begins, as that takes a moment."""
    up = {"sshd": ssh_file, "netns": netns_script,
          "slurm": lambda: shutil.which("sbatch") and (service("slurm") is not None or "SLURM_CONF" in os.environ),
          "sge": lambda: shutil.which("qsub") and (service("sge") is not None or "SGE_ROOT" in os.environ)}[name]

    def wrap(test):
        @functools.wraps(test)
        def run(self, *args):
            if not up():
                self.skipTest(f"no {name} here")
            return test(self, *args)
        return run
    return wrap


def needs_command(name):
    return unittest.skipUnless(shutil.which(name), f"needs {name}")


def command_lines():
    """Every process's arguments now: pid -> bytes, separated by zeros."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
            found[int(name)] = file.read()
    return found


class Watcher:
    """Reads every process's arguments again and again, and keeps those seen."""

    def __enter__(self):
        self.seen, self.over = set(), threading.Event()
        self.thread = threading.Thread(target=self._run, name="watcher")
        self.thread.start()
        return self

    def _run(self):
        while not self.over.is_set():
            self.seen.update(command_lines().values())

    def __exit__(self, *_):
        self.over.set()
        self.thread.join(LONG)

    def saw(self, words):
        return any(words in line for line in self.seen)


def wait_jobs_gone(list_jobs, what, seconds=20.0):
    wait_until(lambda: not list_jobs(), seconds, f"the end of {what}")


def output_of(*argv, timeout=LONG, **options):
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          timeout=timeout, **options).stdout


class Warnings(logging.Handler):
    """What the library says in its log, while this is in a `with` statement."""

    def __enter__(self):
        super().__init__()
        self.said = []
        logger = logging.getLogger("mirai")
        logger.addHandler(self)
        self.before, logger.propagate = logger.propagate, False
        return self

    def __exit__(self, *_):
        logger = logging.getLogger("mirai")
        logger.removeHandler(self)
        logger.propagate = self.before

    def emit(self, record):
        self.said.append((record.levelno, record.getMessage()))

    def texts(self):
        return [text for _, text in self.said]

    def wait(self, pattern, seconds=15.0):
        found = wait_until(lambda: [text for text in self.texts() if re.search(pattern, text)] or [], seconds,
                           f"a line {pattern!r} in the log, which has {self.texts()}")
        return found[0]


class MachinesCase(Case):
    """Every launched daemon has a word in its arguments, by which those that are left are found."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.WORD = f"mirai_{os.urandom(6).hex()}"
        cls.PYTHON = f"python3 -X {cls.WORD}"
        os.environ.setdefault("MIRAI_SERVICES", os.path.join(tempfile.gettempdir(), "mirai-services-ci"))     # outside of what follows
        cls._outer = tempfile.tempdir, os.environ.get("TMPDIR")
        tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="mirai-test-")      # of all that is begun here

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        wait_until(lambda: not cls.marked(), 15.0, f"the end of what {cls.__name__} launched: {cls.marked()}")
        own, (tempfile.tempdir, before) = tempfile.tempdir, cls._outer
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
        left = os.listdir(own)
        shutil.rmtree(own)
        assert not left, f"{cls.__name__} leaves {left}"

    @classmethod
    def marked(cls):
        """Processes that were launched by this class."""
        return [pid for pid, line in command_lines().items() if cls.WORD.encode() in line and is_alive(pid)]

    def setUp(self):
        super().setUp()
        self._began = time.monotonic()

    def tearDown(self):
        if os.environ.get("MIRAI_TIMES"):
            print(f"{time.monotonic() - self._began:7.2f} s {self.id()}", flush=True)
        for compute in list(mirai._profiles):
            daemons(0, compute=compute)
        super().tearDown()

    def folder(self):
        path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, path, True)
        return path

    def program(self, folder, name, text):
        path = os.path.join(folder, name)
        with open(path, "w") as file:
            file.write(textwrap.dedent(text).lstrip())
        os.chmod(path, 0o755)
        return path

    def ssh(self, remotes, **options):
        options.setdefault("command", f"ssh -F {ssh_file()}")
        options.setdefault("python", self.PYTHON)
        return ssh_config(remotes, **options)

    def cluster(self, command="sbatch", **options):
        options.setdefault("python", self.PYTHON)
        return cluster_config(command, **options)

    def check_map(self, n=1000):
        """Every item once, in order."""
        found = mirai_map(range(n), divmod, 7)
        wait_until(lambda: all(m.done() for m in found), what="a map")
        self.assertEqual(found.results(), [divmod(x, 7) for x in range(n)])

    def results_of(self, futures, seconds=LONG):
        deadline = time.monotonic() + seconds
        for m in futures:
            wait_until(m.done, max(0.1, deadline - time.monotonic()), "a result")
        return [m.data for m in futures]


def by_value(f):
    """For daemons that cannot import this file: the function goes to them as it is."""
    f.__qualname__ = f"<locals>.{f.__name__}"
    return f


class FarGate(Gate):
    """For daemons that cannot import this file, on this machine all the same."""

    @property
    def enter(self):
        return functools.partial(_enter_far_gate, self.address)


_enter_far_gate = by_value(types.FunctionType(_enter_gate.__code__, _enter_gate.__globals__, "_enter_far_gate",
                                              _enter_gate.__defaults__))


@by_value
def environment_of(name):
    return os.environ.get(name)


# -- 13. Launchers


OFFER = mirai.Offer(["tls+tcp://host:5555", "tls+tcp://192.0.2.7:5555"], "5a" * 32, {"maxtasks": 3})


def carried(script):
    """What a launcher's input carries: the directive for daemons, and the source."""
    lines = script.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("exec("))
    return tuple(zlib.decompress(base64.b64decode(line)).decode() for line in lines[at + 1:at + 3])


class TestLaunchers(MachinesCase):
    # -- as data

    def test_a_remote_is_what_ssh_takes_and_never_an_option(self):
        for remote, expected in (
            ("ssh://node", ["node"]),
            ("ssh://node/", ["node"]),
            ("node", ["node"]),
            ("me@node", ["me@node"]),
            ("ssh://me@node:2222", ["-p", "2222", "me@node"]),
            ("node:22", ["-p", "22", "node"]),
            ("ssh://10.0.0.1", ["10.0.0.1"]),
            ("ssh://[2001:db8::1]:2222", ["-p", "2222", "2001:db8::1"]),
            ("ssh://me@[2001:db8::1]", ["me@2001:db8::1"]),
            ("2001:db8::1", ["2001:db8::1"]),
        ):
            with self.subTest(remote=remote):
                command, = ssh_config(remote).commands(1, OFFER)
                tail = command.argv[-1 - len(expected):-1]
                self.assertEqual((tail, command.argv[-1]), (expected, "exec /bin/sh -s"))
        for remote in ("", "ssh://", "-oProxyCommand=true", "ssh://-oProxyCommand=true", "-l@node", "ssh://node/path",
                       "a b", "node\n", "ssh://@:22"):
            with self.subTest(remote=remote), self.assertRaisesRegex(ValueError, "expected 'ssh://user@host:port'"):
                ssh_config(remote)
        with self.assertRaisesRegex(ValueError, "remotes is empty"):
            ssh_config([])

    def test_ssh_asks_nothing_and_gives_up_in_time(self):
        command, = ssh_config("node", timeout=3.2, command="ssh -F 'my config' -4").commands(1, OFFER)
        self.assertEqual(command.argv[:4], ["ssh", "-F", "my config", "-4"])
        options = [command.argv[i + 1] for i, word in enumerate(command.argv) if word == "-o"]
        self.assertTrue({"BatchMode=yes", "ExitOnForwardFailure=yes", "ConnectTimeout=4"} <= set(options), options)
        self.assertIn("-T", command.argv)
        self.assertNotIn("-R", command.argv)

    def test_a_tunnel_comes_out_on_the_remotes_loopback(self):
        offer = OFFER._replace(urls=["tcp://127.0.0.1:5555"])
        first, second = ssh_config(["a", "b"], tunnel=True).commands(2, offer)
        ports = set()
        for command in (first, second):
            where = command.argv[command.argv.index("-R") + 1]
            found = re.fullmatch(r"127\.0\.0\.1:(\d+):127\.0\.0\.1:5555", where)
            self.assertTrue(found, where)
            ports.add(found[1])
            self.assertEqual(json.loads(carried(command.input)[0])["urls"], [f"tcp://127.0.0.1:{found[1]}"])
        self.assertEqual(len(ports), 2)

    def test_the_daemons_are_spread_over_the_remotes_by_one_ssh_each(self):
        found = ssh_config(["a", "b", "c"]).commands(8, OFFER)
        self.assertEqual([(c.argv[-2], c.n) for c in found], [("a", 3), ("b", 3), ("c", 2)])
        self.assertEqual([json.loads(carried(c.input)[0])["n"] for c in found], [3, 3, 2])
        self.assertEqual(len({c.launcher for c in found}), 3)
        with self.assertRaisesRegex(ValueError, "n=2 daemons on 3 remotes"):
            ssh_config(["a", "b", "c"]).commands(2, OFFER)

    def test_the_input_carries_the_source_and_what_a_daemon_needs(self):
        for config in (ssh_config("node"), cluster_config("sbatch"), remote_config("srun", ["."])):
            with self.subTest(config=config):
                command, = config.commands(1, OFFER)
                about, source = carried(command.input)
                with open(FILE, encoding="utf-8") as file:
                    self.assertEqual(source, file.read())
                about = json.loads(about)
                self.assertEqual((about["urls"], about["key"], about["options"], about["launch"], about["n"]),
                                 (OFFER.urls, OFFER.key, OFFER.options, command.launcher, 1))

    def test_the_key_is_in_no_argument_and_no_repr(self):
        for config in (ssh_config("node"), ssh_config("node", tunnel=True), cluster_config("sbatch"), cluster_config("bsub"),
                       cluster_config("qsub", "#$ -N x"), cluster_config("qsub", "#PBS -N x"),
                       remote_config("srun", ["."]), remote_config("ssh", ["node", "."], quote=True)):
            command, = config.commands(1, OFFER)
            self.assertNotIn(OFFER.key, " ".join(command.argv) + repr(config))
            self.assertNotIn(OFFER.key, command.input)      # as such: it would be found by who searches a spool for it

    def test_a_script_runs_setup_in_the_directory_before_the_daemon_in_any_bourne_shell(self):
        folder = self.folder()
        where = os.path.join(folder, "it's $HOME `x` \"here\"")
        os.mkdir(where)
        python = self.program(folder, "python", """
            #!/bin/sh
            echo "$PWD" "$A" "$#" "$1" "$2"
            cat
            """)
        payload = mirai.payload(OFFER, 1, 1)
        script = mirai.shell_script(python, (), ["A=one", "export A"], where, payload)
        for shell in filter(shutil.which, ("sh", "dash", "bash", "ksh", "zsh")):
            with self.subTest(shell=shell):
                done = subprocess.run([shell, "-s"], input=script, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                      text=True, timeout=LONG)
                first, _, rest = done.stdout.partition("\n")
                self.assertEqual((first, rest == payload, done.stderr, done.returncode),
                                 (f"{where} one 2 -c {mirai._BOOT}", True, "", 0))

    def test_a_directory_that_is_missing_ends_the_script(self):
        script = mirai.shell_script("python3", (), (), "/nonexistent/there", "x\n")
        done = subprocess.run(["sh", "-s"], input=script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              timeout=LONG)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("/nonexistent/there", done.stderr)

    def test_the_job_scripts_head_has_the_schedulers_own_lines_before_the_users(self):
        for command, options, head, array in (
            ("sbatch", "#SBATCH --mem=1G", ["#!/bin/sh", "#SBATCH --output=/dev/null", "#SBATCH --mem=1G"],
             ["--parsable", "--array=1-4"]),
            ("qsub", "#$ -N x", ["#!/bin/sh", "#$ -S /bin/sh", "#$ -o /dev/null", "#$ -j y", "#$ -N x"],
             ["-terse", "-t", "1-4"]),
            ("qsub", "#PBS -N x", ["#!/bin/sh", "#PBS -o /dev/null", "#PBS -j oe", "#PBS -N x"], ["-J", "1-4"]),
            ("bsub", "#BSUB -q x", ["#!/bin/sh", "#BSUB -o /dev/null", "#BSUB -q x"], ["-J", "mirai[1-4]"]),
            ("sbatch -p big", "#!/bin/bash\n  #SBATCH -c 2\n\n", ["#!/bin/bash", "#SBATCH --output=/dev/null", "#SBATCH -c 2"],
             ["--parsable", "--array=1-4"]),
            ("/opt/slurm/bin/sbatch", ["#SBATCH -c 2"], ["#!/bin/sh", "#SBATCH --output=/dev/null", "#SBATCH -c 2"],
             ["--parsable", "--array=1-4"]),
        ):
            with self.subTest(command=command, options=options):
                found, = cluster_config(command, options, setup="  module load python\n  X=1").commands(4, OFFER)
                lines = found.input.splitlines()
                self.assertEqual(lines[:len(head)], head)
                self.assertEqual(lines[len(head):len(head) + 2], ["module load python", "X=1"])
                self.assertTrue(lines[len(head) + 2].startswith("exec python3 -c "))
                self.assertEqual(found.argv, [*command.split(), *array])
                self.assertEqual((found.n, json.loads(carried(found.input)[0])["n"]), (4, 1))

    def test_a_pbs_job_of_one_is_no_array(self):
        found, = cluster_config("qsub", "#PBS -N x").commands(1, OFFER)
        self.assertEqual(found.argv, ["qsub"])

    def test_what_ends_a_job_goes_where_what_submits_it_goes(self):
        for command, undo in (("sbatch", ["scancel", "{}"]), ("ssh login sbatch", ["ssh", "login", "scancel", "{}"]),
                              ("/opt/bin/sbatch", ["/opt/bin/scancel", "{}"]), ("bsub", ["bkill", "{}"]),
                              ("ssh -p 22 login sbatch -p big", ["ssh", "-p", "22", "login", "scancel", "{}"])):
            found, = cluster_config(command).commands(2, OFFER)
            self.assertEqual(found.undo, undo)
        for command in ("", "salloc", "ssh login"):
            with self.subTest(command=command), self.assertRaisesRegex(ValueError, "expected .*sbatch, qsub or bsub"):
                cluster_config(command)

    def test_a_daemon_is_not_taken_for_a_step_of_the_job_that_its_host_is_part_of(self):
        environ = {"SLURM_JOB_ID": "1", "SLURM_CONF": "/etc/x", "SBATCH_MEM": "1", "PMI_RANK": "0", "PBS_JOBID": "1",
                   "PBS_SERVER": "s", "LSB_JOBID": "1", "SGE_TASK_ID": "1", "SGE_ROOT": "/sge", "JOB_ID": "1", "PATH": "/bin",
                   "MIRAI_KEY": "secret"}
        self.assertEqual(mirai.outer_environment(environ),
                         {"SLURM_CONF": "/etc/x", "PBS_SERVER": "s", "SGE_ROOT": "/sge", "PATH": "/bin"})

    def test_remote_config_puts_the_daemons_command_where_the_point_is(self):
        words = ["python3", "-c", mirai._BOOT]
        found = remote_config("srun -Q", ["-n 1", "."]).commands(2, OFFER)
        self.assertEqual([c.argv for c in found], [["srun", "-Q", "-n", "1", *words]] * 2)
        found, = remote_config("ssh", ["node", "."], quote=True).commands(1, OFFER)
        self.assertEqual(found.argv, ["ssh", "node", f"python3 -c '{mirai._BOOT}'"])
        found = remote_config("on", [["a", "."], ["b", "."]], python="/opt/my python").commands(3, OFFER)
        self.assertEqual([c.argv[:2] for c in found], [["on", "a"], ["on", "b"], ["on", "a"]])
        with self.assertRaisesRegex(ValueError, "expected '.' among them"):
            remote_config("srun", ["-n", "1"])

    # -- by hand

    def test_launch_remote_says_what_to_paste(self):
        with daemons(url="tcp://127.0.0.1:0"):
            line, = launch_remote()
            url = status()["daemons"]
            self.assertEqual(line, f"echo {mirai._profiles['default'].key} | python3 -m mirai daemon '{url}' --key-file -")
            lines = launch_remote(2, idletime=5, maxtasks=3, autoexit=None, cleanup=False, output=True, asyncdial=True)
            self.assertEqual(len(lines), 2)
            self.assertEqual(repr(lines), "\n".join(lines))
            for words in ("--idletime 5", "--maxtasks 3", "--autoexit none", "--no-cleanup", "--output", "--asyncdial"):
                self.assertIn(words, lines[0])
            self.assertEqual(launch_remote(remote=remote_config()), [line])

    def test_what_is_pasted_names_every_address_of_this_machine(self):
        with daemons(url=host_url(tls=False)):
            url = mirai.parse_url(status()["daemons"])
            line, = launch_remote()
            for other in host_url(port=url.port).interfaces.values():
                self.assertIn(f"'{other}'", line)

    def test_launch_remote_without_a_url_that_others_reach_or_without_daemons_says_what_to_do(self):
        with self.assertRaisesRegex(RuntimeError, "daemons"):
            launch_remote()
        with daemons(1), self.assertRaisesRegex(ValueError, "url=host_url"):
            launch_remote()

    def _pasted(self, shell, url, **options):
        key = os.urandom(32).hex()
        with daemons(url=url, key=key):
            line, = launch_remote(**options)
            self.assertIn(key, line)
            env = {**os.environ, "PYTHONPATH": HERE, "PYTHONDONTWRITEBYTECODE": "1", "MIRAI_KEY": ""}
            del env["MIRAI_KEY"]
            with Watcher() as watcher, subprocess.Popen(
                    [shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                    cwd=self.folder(), start_new_session=True) as process:
                try:
                    process.stdin.write(line + "\n")
                    process.stdin.close()
                    process.stdin = None
                    wait_until(lambda: info().connections == 1 or process.poll() is not None, what="the daemon that was pasted")
                    self.assertIsNone(process.poll(), process.returncode is not None and process.stderr.read())
                    self.check_map()
                    daemons(0)
                    said = process.communicate(timeout=LONG)
                    self.assertEqual((process.returncode, said), (0, ("", "")))
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
            self.assertTrue(watcher.saw(b"mirai\0daemon\0"))
            self.assertFalse(watcher.saw(key.encode()), "the key was in an argument")

    def test_what_is_pasted_works_in_shells_and_shows_no_secret(self):
        shells = [*filter(shutil.which, ("bash", "dash", "tcsh", "zsh", "ksh"))]
        for shell, url in crossed(shells, ("tcp://127.0.0.1:0", "tcp://[::1]:0", host_url(tls=True))):
            with self.subTest(shell=shell, url=url):
                self._pasted(shell, url)

    @needs_command("tcsh")
    def test_what_is_pasted_works_in_a_c_shell(self):
        self._pasted("tcsh", "tcp://[::1]:0")

    # -- commands of tests

    def _fake_ssh(self, body='eval "$last"'):
        """A command that takes ssh's arguments, and runs what is to run there here."""
        return self.program(self.folder(), "ssh", f"""
            #!/bin/sh
            for last; do :; done
            {body}
            """)

    def test_ssh_launches_without_a_network(self):
        with daemons(3, url="tcp://127.0.0.1:0", remote=ssh_config(["a", "b"], command=self._fake_ssh(), python=self.PYTHON)):
            self.assertEqual((info().connections, mirai.nextget("n")), (3, 3))
            self.check_map()
            launch_remote(2, ssh_config("c", command=self._fake_ssh(), python=self.PYTHON, setup="export MIRAI_A=one"))
            self.assertEqual(info().connections, 5)
            seen = mirai.everywhere(environment_of, "MIRAI_A").results()
            self.assertEqual(sorted(map(str, seen)), ["None"] * 3 + ["one"] * 2)

    def test_what_a_remote_shell_says_first_does_no_harm(self):
        """A login shell with a banner, on either stream, and one that reads no more than its lines."""
        ssh = self._fake_ssh('echo "Welcome to node, `date`"; echo "warning: quota" >&2; eval "$last"')
        with daemons(2, url="tcp://127.0.0.1:0", remote=ssh_config("a", command=ssh, python=self.PYTHON)):
            self.check_map(100)

    def test_a_failure_quotes_what_was_said_and_leaves_no_daemons_set(self):
        for body, words in (('echo "ssh: no route" >&2; exit 255', "ssh a exited with status 255; its last words:\nssh: no route"),
                            ('echo "no such module"; exit 1', "no such module"),
                            ("kill -9 $$", "was killed by SIGKILL"),
                            ("exit 0", "exited with status 0")):
            with self.subTest(body=body):
                start = time.monotonic()
                with self.assertRaises(LaunchError) as caught:
                    daemons(2, url="tcp://127.0.0.1:0", remote=ssh_config("a", command=self._fake_ssh(body)))
                self.assertIn(words, str(caught.exception))
                self.assertLess(time.monotonic() - start, 10)
                self.assertFalse(mirai.daemons_set())

    def test_a_command_that_is_missing_is_named(self):
        for remote in (ssh_config("a", command="/nonexistent/ssh"), cluster_config("/nonexistent/sbatch"),
                       remote_config("/nonexistent/run", ["."])):
            with self.subTest(remote=remote), self.assertRaisesRegex(LaunchError, "/nonexistent/"):
                daemons(1, url="tcp://127.0.0.1:0", remote=remote)

    def test_of_several_remotes_that_fail_each_is_told_of(self):
        ssh = self._fake_ssh('case "$*" in *good*) eval "$last";; *) echo "bad luck with $*" >&2; exit 7;; esac')
        with self.assertRaises(LaunchError) as caught:
            daemons(3, url="tcp://127.0.0.1:0", remote=ssh_config(["good", "bad1", "bad2"], command=ssh, python=self.PYTHON))
        self.assertIn("ssh bad1 exited with status 7", str(caught.exception))
        self.assertIn("ssh bad2 exited with status 7", str(caught.exception))
        wait_until(lambda: not self.marked(), 5.0, "the end of the one that did join")

    def test_those_that_come_later_do_not_hinder_a_profile_that_is_set(self):
        with daemons(1, url="tcp://127.0.0.1:0"):
            with self.assertRaisesRegex(LaunchError, "no luck"):
                launch_remote(2, ssh_config("a", command=self._fake_ssh("echo no luck >&2; exit 1")))
            self.check_map(100)
            self.assertEqual(info().connections, 1)

    def test_tasks_that_wait_for_daemons_of_which_none_can_come_are_told_why(self):
        with daemons(url="tcp://127.0.0.1:0"):
            waiting = mirai.mirai(int, "5")
            with self.assertRaises(LaunchError):
                launch_remote(1, remote_config(self.program(self.folder(), "run", "#!/bin/sh\necho out of nodes >&2; exit 3"), ["."]))
            value, = self.results_of([waiting])
            self.assertIsInstance(value, LaunchError)
            self.assertIn("out of nodes", str(value))
            launch_remote(1, ssh_config("a", command=self._fake_ssh(), python=self.PYTHON))
            self.assertEqual(mirai.mirai(int, "5").result(LONG), 5)

    def test_a_daemon_of_a_launcher_that_dies_is_lost_and_the_launcher_does_not_bring_it_back(self):
        with FarGate() as gate, daemons(2, url="tcp://127.0.0.1:0", remote=ssh_config("a", command=self._fake_ssh(),
                                                                              python=self.PYTHON)):
            held = [mirai.mirai(gate.enter, i) for i in range(2)]
            pids = dict(gate.arrived() for _ in held)
            os.kill(pids[0], signal.SIGKILL)
            self.assertIsInstance(self.results_of([held[0]])[0], MiraiConnectionReset)
            gate.open()
            self.assertEqual(held[1].result(LONG), 1)
            wait_until(lambda: info().connections == 1)
            self.check_map(100)

    def _scheduler(self, submit, cancel, lines):
        """Fake commands of a scheduler that run their jobs at once: the folder, and the log of what was asked."""
        folder = self.folder()
        log = os.path.join(folder, "log")
        self.program(folder, submit, f"""
            #!/bin/sh
            echo {submit} "$@" >>{log}
            cat >{folder}/script
            {lines}
            """)
        self.program(folder, cancel, f"""
            #!/bin/sh
            echo {cancel} "$@" >>{log}
            """)

        def asked():
            with contextlib.suppress(FileNotFoundError), open(log) as file:
                return file.read().splitlines()
            return []
        return folder, asked

    def test_lsf_and_pbs_get_one_array_job_that_is_ended_by_its_number(self):
        run_two = ("for i in 1 2; do setsid sh -c 'echo >{folder}/began'$i'; exec sh {folder}/script' </dev/null >/dev/null 2>&1 &"
                   " while [ ! -e {folder}/began$i ]; do sleep 0.01; done; done")
        for submit, cancel, options, said, expected in (
            ("bsub", "bkill", "", "Job <4711> is submitted to default queue <normal>.", ["bsub -J mirai[1-2]", "bkill 4711"]),
            ("qsub", "qdel", "#PBS -l x=1", "4711[].server.domain", ["qsub -J 1-2", "qdel 4711[].server.domain"]),
            ("qsub", "qdel", "#$ -l x=1", "4711.1-2:1", ["qsub -terse -t 1-2", "qdel 4711"]),
            ("sbatch", "scancel", "#SBATCH -c 1", "4711;cluster", ["sbatch --parsable --array=1-2", "scancel 4711"]),
        ):
            with self.subTest(submit=submit, options=options):
                folder, asked = self._scheduler(submit, cancel, "")
                with open(os.path.join(folder, submit), "a") as file:
                    file.write(run_two.format(folder=folder) + f"\necho '{said}'\n")
                with daemons(2, url="tcp://127.0.0.1:0", remote=self.cluster(os.path.join(folder, submit), options=options)):
                    self.check_map(100)
                    wait_until(lambda: info().connections == 2)
                    self.assertEqual(asked(), expected[:1])
                wait_until(lambda: asked() == expected, 5.0, f"{expected}, not {asked()},")

    def test_a_scheduler_that_refuses_is_quoted(self):
        folder, _ = self._scheduler("sbatch", "scancel", "echo 'sbatch: error: invalid partition' >&2; exit 1")
        with self.assertRaisesRegex(LaunchError, "sbatch exited with status 1; its last words:\nsbatch: error: invalid partition"):
            daemons(2, url="tcp://127.0.0.1:0", remote=self.cluster(os.path.join(folder, "sbatch")))

    # -- through an API

    def _api(self, answer=200, body=b"{}"):
        """A server that runs the commands it is sent, and the requests it had."""
        requests, processes = [], []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                data = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
                requests.append((handler.command, handler.path, dict(handler.headers), data))
                if answer == 200:
                    process = subprocess.Popen(["sh", "-s"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                               stderr=subprocess.DEVNULL, start_new_session=True)
                    text = json.loads(data)["cmd"] if data.startswith(b"{") else data.decode()
                    process.stdin.write(text.encode())
                    process.stdin.close()
                    processes.append(process)
                handler.send_response(answer)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                handler.wfile.write(body)

            do_PUT = do_POST

            def log_message(handler, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="api")
        thread.start()

        def end():
            server.shutdown()
            server.server_close()
            thread.join(LONG)
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                process.wait(LONG)
        self.addCleanup(end)
        return f"http://127.0.0.1:{server.server_address[1]}/run", requests

    def test_an_http_api_launches_daemons_by_a_request_each(self):
        url, requests = self._api()
        remote = http_config(lambda: url, headers=lambda: {"Content-Type": "application/json", "X-Mine": "1"},
                             data='{"cmd": "%s", "job": 1}', cookie="a=b", token=lambda: "t0ken", python=self.PYTHON)
        with daemons(2, url="tcp://127.0.0.1:0", remote=remote):
            wait_until(lambda: info().connections == 2)
            self.check_map()
        self.assertEqual(len(requests), 2)
        for method, path, headers, data in requests:
            self.assertEqual((method, path, headers["X-Mine"], headers["Cookie"], headers["Authorization"],
                              json.loads(data)["job"]), ("POST", "/run", "1", "a=b", "Bearer t0ken", 1))
        self.assertNotIn("t0ken", repr(remote))

    def test_an_http_apis_body_may_be_made_by_a_function_or_be_the_command_itself(self):
        url, requests = self._api()
        for data in (lambda command: json.dumps({"cmd": command}), lambda command: command.encode()):
            with daemons(1, url="tcp://127.0.0.1:0", remote=http_config(url, "PUT", data=data, python=self.PYTHON)):
                self.check_map(10)
        self.assertEqual([method for method, *_ in requests], ["PUT", "PUT"])

    def test_an_http_api_that_refuses_or_is_not_there_is_quoted(self):
        url, _ = self._api(403, b"no quota left")
        with self.assertRaisesRegex(LaunchError, r"(?s)/run answered 403 .*no quota left"):
            daemons(1, url="tcp://127.0.0.1:0", remote=http_config(url))
        self.assertFalse(mirai.daemons_set())
        with self.assertRaisesRegex(LaunchError, "can't be reached: .*[Rr]efused"):
            daemons(1, url="tcp://127.0.0.1:0", remote=http_config(f"http://127.0.0.1:{free_port()}/"))
        with socket.create_server(("127.0.0.1", 0)) as silent:
            start = time.monotonic()
            with self.assertRaisesRegex(LaunchError, "can't be reached: .*timed out"):
                daemons(1, url="tcp://127.0.0.1:0", remote=http_config(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout=0.3))
            self.assertLess(time.monotonic() - start, 10)

    # -- ssh, the real one

    @needs_service("sshd")
    def test_ssh_runs_daemons_on_a_machine_that_has_only_python(self):
        with daemons(3, remote=self.ssh("bare", setup=["export MIRAI_A=one"], cwd="/usr")) as set:
            self.assertTrue(set)
            self.assertTrue(status()["daemons"].startswith("tls+tcp://"))
            self.check_map()
            self.assertEqual(mirai.mirai(environment_of, "MIRAI_A").result(LONG), "one")
            self.assertEqual(mirai.mirai(os.getcwd).result(LONG), "/usr")
            self.assertEqual(len(self.marked()), 4, "three daemons, and the one that awaits them")
        wait_until(lambda: not self.marked(), 5.0, "the end of the daemons")

    @needs_service("sshd")
    def test_daemons_by_ssh_read_nothing_of_the_hosts_disk_and_a_banner_does_not_disturb(self):
        folder = _services_dir()
        if os.getuid() or folder is None:
            self.skipTest("hiding a directory needs root, and the script that starts an sshd")
        state = self.folder()
        script = os.path.join(folder, "sshd.sh")
        env = {**os.environ, "SSHD_HIDE": HERE}
        found = subprocess.run(["bash", script, "start", state], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                               timeout=LONG, env=env, check=True).stdout
        self.addCleanup(subprocess.run, ["bash", script, "stop", state], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL, timeout=LONG)
        config = dict(line.split("=", 1) for line in found.splitlines())["SSH_CONFIG"]
        login = os.path.join(os.path.dirname(config), "login")
        with open(login) as file:
            text = file.read()
        with open(login, "w") as file:
            file.write(text.replace("exec env -i", "echo Welcome; echo quota exceeded >&2; exec env -i"))
        with daemons(2, remote=self.ssh("bare", command=f"ssh -F {config}")):
            self.assertEqual(mirai.mirai(os.listdir, HERE).result(LONG), [])
            self.check_map()

    @needs_service("sshd")
    def test_ssh_tunnels_and_goes_through_a_jump_host(self):
        with daemons(2, remote=self.ssh("bare", tunnel=True)):
            self.assertTrue(status()["daemons"].startswith("tcp://127.0.0.1:"))
            self.check_map()
        with daemons(4, remote=self.ssh(["far", "node1"])):
            self.check_map()
        with daemons(2, remote=self.ssh(["far", "bare"], tunnel=True)):
            self.check_map()

    @needs_service("sshd")
    def test_another_python_serves_what_both_can_import(self):
        for alias in ("py39", "py313"):
            if output_of("ssh", "-F", ssh_file(), alias, "python3 -V").startswith("Python"):
                with self.subTest(alias), daemons(1, remote=self.ssh(alias)):
                    self.check_map(100)
                    self.assertEqual(mirai.mirai("__import__('sys').version_info[1]").result(LONG), int(alias[3:]))

    @needs_service("sshd")
    def test_what_ssh_or_python_says_is_in_the_error_and_in_time(self):
        old = output_of("ssh", "-F", ssh_file(), "py36", "python3 -V").startswith("Python")
        for remote, options, words in (
            ("noauth", {}, "ssh noauth exited with status 255; its last words:\n.*Permission denied"),
            ("refused", {}, "ssh refused exited with status 255; its last words:\n.*Connection refused"),
            ("bare", {"python": "python9.9"}, "ssh bare exited with status 127; its last words:\n.*python9.9.*not found"),
            ("bare", {"cwd": "/nonexistent/x"}, "ssh bare exited with status 2; its last words:\n.*/nonexistent/x"),
            ("bare", {"setup": "exit 3"}, "ssh bare exited with status 3"),
            ("bare", {"setup": "echo no module >&2; exit 3"}, "status 3; its last words:\nno module"),
            *([("py36", {}, "mirai needs Python 3.9 or newer, .* is 3.6")] if old else []),
            ("nonexistent.invalid", {}, "Could not resolve hostname nonexistent.invalid"),
        ):
            with self.subTest(remote=remote, **options):
                start = time.monotonic()
                with self.assertRaisesRegex(LaunchError, "(?s)" + words):
                    daemons(2, remote=self.ssh(remote, **options))
                self.assertLess(time.monotonic() - start, 10)
                self.assertFalse(mirai.daemons_set())

    @needs_service("sshd")
    def test_a_machine_that_does_not_answer_is_given_up_after_the_timeout(self):
        """One that takes the connection and says nothing, and one that is not on the network."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            for remote, words in ((f"127.0.0.1:{silent.getsockname()[1]}", "timed out"), ("192.0.2.254:22", "timed out|No route|unreachable")):
                with self.subTest(remote=remote):
                    start = time.monotonic()
                    with self.assertRaisesRegex(LaunchError, words):
                        daemons(1, remote=ssh_config(remote, timeout=1, command=f"ssh -F {ssh_file()}"))
                    self.assertLess(time.monotonic() - start, 8)

    @needs_service("sshd")
    def test_a_remote_port_that_is_taken_is_said_to_be(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            class Fixed:
                def randrange(self, *_):
                    return taken.getsockname()[1]
            with replaced(random, "SystemRandom", Fixed), self.assertRaisesRegex(LaunchError, "remote port forwarding failed"):
                daemons(1, remote=self.ssh("node1", tunnel=True))

    @needs_service("sshd")
    def test_launching_by_ssh_shows_no_secret_in_any_argument(self):
        key = os.urandom(32).hex()
        for tunnel in (False, True):
            with Watcher() as watcher:
                with daemons(2, url=None if not tunnel else "tcp://127.0.0.1:0", key=key, remote=self.ssh("bare", tunnel=tunnel)):
                    self.check_map(100)
            self.assertTrue(watcher.saw(b"exec /bin/sh -s") and watcher.saw(self.WORD.encode()), "nothing was seen at all")
            self.assertFalse(watcher.saw(key.encode()))

    @needs_service("sshd")
    def test_a_key_is_in_no_environment_of_what_daemons_start(self):
        with daemons(1, remote=self.ssh("bare")):
            key = mirai._profiles["default"].key
            env = mirai.mirai(dict, mirai.mirai("dict(__import__('os').environ)").result(LONG)).result(LONG)
            self.assertNotIn(key, json.dumps(env))

    @needs_service("sshd")
    def test_the_end_of_a_host_ends_what_it_launched_by_ssh(self):
        code = f"""
            from mirai import *
            daemons(2, remote=ssh_config("bare", command="ssh -F {ssh_file()}", python="{self.PYTHON}"))
            print(info().connections)
            import time
            time.sleep(1000)
            """
        with Host(code) as host:
            self.assertEqual(host.line(), "2")
            self.assertTrue(self.marked())
            host.process.kill()
            wait_until(lambda: not self.marked(), 10.0, "the end of the daemons")

    @needs_service("sshd")
    def test_daemons_by_ssh_connect_to_a_host_without_a_dispatcher(self):
        with daemons(2, remote=self.ssh("bare"), dispatcher=False):
            self.check_map()

    @needs_service("sshd")
    def test_daemons_by_ssh_that_wait_serve_the_next_host_and_outlive_the_first(self):
        url, key = host_url(tls=True, port=free_port()), os.urandom(32).hex()
        code = f"""
            import os, time
            from mirai import *
            remote = ssh_config("bare", command="ssh -F {ssh_file()}", python="{self.PYTHON}")
            daemons(2, url="{url}", key="{key}", remote=remote, autoexit=False)
            print(*sorted(everywhere(os.getpid).results()))
            time.sleep(1000)
            """
        with Host(code) as host:
            first = host.line()
            host.process.kill()
        for _ in range(2):
            with daemons(url=url, key=key):
                joined(2)
                self.assertEqual(" ".join(map(str, sorted(mirai.everywhere(os.getpid).results()))), first)
                self.check_map(100)
        daemons(url=url, key=key)
        joined(2)
        daemons(None)
        wait_until(lambda: not self.marked(), 10.0, "the end of the daemons")

    @needs_service("sshd")
    def test_a_tunnel_that_breaks_resolves_its_tasks(self):
        with FarGate() as gate, daemons(1, remote=self.ssh("bare", tunnel=True)):
            m = mirai.mirai(gate.enter, 1)
            _, daemon = gate.arrived()
            ssh = [pid for pid, line in command_lines().items() if line.startswith(b"ssh\0-F\0") and b"-R\0" in line
                   and pid in family_of(os.getpid())]
            self.assertEqual(len(ssh), 1)
            os.kill(ssh[0], signal.SIGKILL)
            value, = self.results_of([m], 15)
            self.assertIsInstance(value, MiraiConnectionReset)
            gate.open()
            no_more([daemon], 15)

    # -- Slurm

    def squeue(self, name):
        return output_of("squeue", "-h", "-r", "-n", name, "-o", "%i %T %F").splitlines()

    def _array(self, name, **options):
        options.setdefault("options", f"#SBATCH --job-name={name}")
        return self.cluster("sbatch", **options)

    @needs_service("slurm")
    def test_slurm_runs_one_array_job_with_options_and_setup(self):
        name = f"m{os.urandom(4).hex()}"
        remote = self._array(name, options=["#!/bin/bash", f"#SBATCH --job-name={name}", "#SBATCH --cpus-per-task=2"],
                             setup="export MIRAI_A=$SLURM_CPUS_PER_TASK", cwd="/usr")
        with daemons(3, remote=remote):
            wait_until(lambda: info().connections == 3)
            self.check_map()
            self.assertEqual(mirai.mirai(environment_of, "MIRAI_A").result(LONG), "2")
            self.assertEqual(mirai.mirai(os.getcwd).result(LONG), "/usr")
            jobs = self.squeue(name)
            self.assertEqual((len(jobs), len({line.split()[-1] for line in jobs})), (3, 1), jobs)
            ids = mirai.everywhere(environment_of, "SLURM_ARRAY_TASK_ID").results()
            self.assertEqual(sorted(ids), ["1", "2", "3"])
        wait_jobs_gone(lambda: self.squeue(name), name)

    @needs_service("slurm")
    def test_scancel_of_one_array_task_resolves_its_task_and_the_rest_finish(self):
        name = f"m{os.urandom(4).hex()}"
        with FarGate() as gate, daemons(3, remote=self._array(name)):
            wait_until(lambda: info().connections == 3)
            where = mirai.everywhere(_job_task).results()
            of = {pid: job for pid, job in where}
            held = [mirai.mirai(gate.enter, i) for i in range(5)]
            pids = dict(gate.arrived() for _ in range(3))
            label, pid = next(iter(pids.items()))
            subprocess.run(["scancel", of[pid]], check=True, timeout=LONG)
            value, = self.results_of([held[label]], 15)
            self.assertIsInstance(value, MiraiConnectionReset)
            self.assertEqual(value.code, 19)
            self._open_until_done(gate, held)
            self.assertEqual([m.data for m in held if m is not held[label]], [i for i in range(5) if i != label])
            self.assertEqual(info().connections, 2)
        wait_jobs_gone(lambda: self.squeue(name), name)

    def _open_until_done(self, gate, held):
        """Lets those go that are held, and those that come to the gate after them."""
        done = threading.Event()

        def let():
            while not done.is_set():
                gate.open()
                with contextlib.suppress(OSError):
                    gate.arrived()
        gate.listener.settimeout(0.05)
        thread = threading.Thread(target=let, name="let")
        thread.start()
        try:
            self.results_of(held)
        finally:
            done.set()
            thread.join(LONG)
            gate.listener.settimeout(LONG)

    @needs_service("slurm")
    def test_no_job_is_left_of_daemons_that_have_not_yet_begun(self):
        """More than there are processors: some wait in the queue when the profile is reset."""
        name = f"m{os.urandom(4).hex()}"
        with daemons(40, remote=self._array(name)):
            wait_until(lambda: info().connections >= 2)
            wait_until(lambda: any("PENDING" in line for line in self.squeue(name)))
        wait_jobs_gone(lambda: self.squeue(name), name)

    @needs_service("slurm")
    def test_a_host_that_is_killed_leaves_no_jobs(self):
        name = f"m{os.urandom(4).hex()}"
        code = f"""
            import time
            from mirai import *
            daemons(20, remote=cluster_config("sbatch", "#SBATCH --job-name={name}", python="{self.PYTHON}"))
            while not info().connections:
                time.sleep(0.01)
            print("there")
            time.sleep(1000)
            """
        with Host(code) as host:
            self.assertEqual(host.line(), "there")
            self.assertTrue(self.squeue(name))
            host.process.kill()
            wait_jobs_gone(lambda: self.squeue(name), name)

    @needs_service("slurm")
    def test_a_partition_that_does_not_exist_is_slurms_own_words(self):
        with self.assertRaisesRegex(LaunchError, "(?s)sbatch exited with status 1; its last words:.*invalid partition"):
            daemons(1, remote=self.cluster("sbatch", options="#SBATCH --partition=nonexistent"))

    @needs_service("slurm")
    def test_launching_by_sbatch_shows_no_secret_in_any_argument(self):
        key, name = os.urandom(32).hex(), f"m{os.urandom(4).hex()}"
        with Watcher() as watcher, daemons(2, key=key, remote=self._array(name)):
            wait_until(lambda: info().connections == 2)
            self.check_map(100)
        self.assertTrue(watcher.saw(b"--array=1-2") and watcher.saw(self.WORD.encode()))
        self.assertFalse(watcher.saw(key.encode()))
        wait_jobs_gone(lambda: self.squeue(name), name)

    @needs_service("slurm")
    def test_srun_runs_daemons_by_remote_config(self):
        name = f"m{os.urandom(4).hex()}"
        with daemons(2, url=host_url(tls=True), remote=remote_config("srun", ["-Q", f"--job-name={name}", "-n1", "."], python=self.PYTHON)):
            wait_until(lambda: info().connections == 2)
            self.check_map()
        wait_jobs_gone(lambda: self.squeue(name), name)

    @needs_service("slurm")
    def test_a_host_in_a_job_launches_jobs_of_their_own(self):
        """Its environment would otherwise make them steps of it."""
        name = f"m{os.urandom(4).hex()}"
        code = f"""
            import sys
            sys.path.insert(0, {HERE!r})
            from mirai import *
            import time
            with daemons(2, remote=remote_config("srun", ["-Q", "--job-name={name}", "-n1", "."], python="{self.PYTHON}")):
                while info().connections < 2:
                    time.sleep(0.01)
                print(sorted(mirai_map(range(10), abs).results()) == list(range(10)))
            """
        folder = self.folder()
        script = self.program(folder, "host.py", code)
        out = os.path.join(folder, "out")
        env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        subprocess.run(["sbatch", "--wait", f"--job-name={name}", f"--output={out}", "--wrap", f"{sys.executable} {script}"],
                       check=False, timeout=LONG, stdout=subprocess.DEVNULL, env=env)
        with open(out) as file:
            self.assertEqual(file.read().strip(), "True")
        wait_jobs_gone(lambda: self.squeue(name), name)

    # -- SGE

    def qstat(self, name):
        return [line for line in output_of("qstat", "-u", "*").splitlines() if name[:10] in line]

    def _sge(self, name, *lines, **options):
        return self.cluster("qsub", options=[f"#$ -N {name}", *lines], **options)

    @needs_service("sge")
    def test_sge_runs_one_array_job_with_options_and_setup(self):
        name = f"m{os.urandom(4).hex()}"
        with daemons(3, remote=self._sge(name, "#$ -v MIRAI_B=two", setup="export MIRAI_A=$SGE_TASK_ID", cwd="/usr")):
            wait_until(lambda: info().connections == 3)
            self.check_map()
            self.assertEqual(sorted(mirai.everywhere(environment_of, "MIRAI_A").results()), ["1", "2", "3"])
            self.assertEqual(mirai.mirai(environment_of, "MIRAI_B").result(LONG), "two")
            self.assertEqual(mirai.mirai(os.getcwd).result(LONG), "/usr")
            self.assertEqual(len({line.split()[0] for line in self.qstat(name)}), 1)
        wait_jobs_gone(lambda: self.qstat(name), name)

    @needs_service("sge")
    def test_qdel_of_one_array_task_resolves_its_task_and_the_rest_finish(self):
        name = f"m{os.urandom(4).hex()}"
        with FarGate() as gate, daemons(3, remote=self._sge(name)):
            wait_until(lambda: info().connections == 3)
            of = {pid: job for pid, job in mirai.everywhere(_job_task).results()}
            held = [mirai.mirai(gate.enter, i) for i in range(5)]
            pids = dict(gate.arrived() for _ in range(3))
            label, pid = next(iter(pids.items()))
            job, task = of[pid].split("_")
            subprocess.run(["qdel", job, "-t", task], check=True, timeout=LONG, stdout=subprocess.DEVNULL)
            value, = self.results_of([held[label]], 30)
            self.assertIsInstance(value, MiraiConnectionReset)
            self._open_until_done(gate, held)
            self.assertEqual([m.data for m in held if m is not held[label]], [i for i in range(5) if i != label])
        wait_jobs_gone(lambda: self.qstat(name), name)

    @needs_service("sge")
    def test_sge_is_left_without_jobs_when_the_profile_is_reset_or_its_host_killed(self):
        name = f"m{os.urandom(4).hex()}"
        with daemons(20, remote=self._sge(name)):
            wait_until(lambda: info().connections >= 2)
        wait_jobs_gone(lambda: self.qstat(name), name, 40)
        code = f"""
            import time
            from mirai import *
            daemons(20, remote=cluster_config("qsub", "#$ -N {name}", python="{self.PYTHON}"))
            while not info().connections:
                time.sleep(0.01)
            print("there")
            time.sleep(1000)
            """
        with Host(code) as host:
            self.assertEqual(host.line(), "there")
            host.process.kill()
            wait_jobs_gone(lambda: self.qstat(name), name, 40)

    # -- the same everywhere

    def test_the_same_map_gives_the_same_wherever_daemons_are(self):
        ways = {"local": {}, "loopback": {"url": "tcp://127.0.0.1:0"}, "direct": {"dispatcher": False}}
        if ssh_file():
            ways.update(ssh={"remote": self.ssh("bare")}, tunnel={"remote": self.ssh("bare", tunnel=True)})
        if shutil.which("sbatch") and service("slurm") is not None:
            ways["slurm"] = {"remote": self.cluster("sbatch")}
        if shutil.which("qsub") and service("sge") is not None:
            ways["sge"] = {"remote": self.cluster("qsub")}
        expected = None
        for name, options in ways.items():
            with self.subTest(name), daemons(3, seed=42, **options):
                found = mirai_map(range(1000), _random_with).results()
                expected = expected or found
                self.assertEqual(found, expected)


@by_value
def _job_task():
    """This daemon's process, and the array task that it is."""
    e = os.environ
    if "SLURM_ARRAY_JOB_ID" in e:
        return os.getpid(), f"{e['SLURM_ARRAY_JOB_ID']}_{e['SLURM_ARRAY_TASK_ID']}"
    return os.getpid(), f"{e['JOB_ID']}_{e['SGE_TASK_ID']}"


@by_value
def _random_with(x):
    return x, random.random()


# -- 8., 10. The network between


@functools.cache
def own_addresses():
    """This machine's addresses that are not loopback: hosts, as in a URL."""
    return [mirai.parse_url(url).host for url in host_url().interfaces.values()]


def own_address(version=4):
    for host in own_addresses():
        if (":" in host) == (version == 6):
            with contextlib.suppress(OSError), socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return host
    raise unittest.SkipTest(f"this machine has no IPv{version} address but loopback")


def at(host, scheme="tcp", port=0):
    return mirai.format_url(mirai.Address(scheme, host, port))


class Middle:
    """Sits between dialers and a listener. `alter(direction, number, unit)` gives what goes on instead of a unit, a list:
    of the handshake's frames (numbers below 0) and then of sealed records, in direction 'up' (to the listener) or 'down';
    None ends the connection there. Each connection's units are kept in `seen`."""

    def __init__(self, url, alter=lambda direction, number, unit: [unit], host=None):
        self.target, self.alter = mirai.parse_url(url), alter
        self.host = host or self.target.host
        self.listener = socket.create_server((self.host, 0), family=socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        self.url = at(self.host, self.target.scheme, self.listener.getsockname()[1])
        self.seen = []
        self.socks = []
        self.threads = [threading.Thread(target=self._accept, name="middle")]

    def __enter__(self):
        self.threads[0].start()
        return self

    def __exit__(self, *_):
        for sock in [self.listener, *self.socks]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(LONG)
        for sock in [self.listener, *self.socks]:
            sock.close()

    def _accept(self):
        while True:
            try:
                dialer, _ = self.listener.accept()
            except OSError:
                return
            listener = socket.create_connection((self.target.host, self.target.port), source_address=(self.host, 0))
            self.socks += [dialer, listener]
            for each in (("up", dialer, listener), ("down", listener, dialer)):
                self.threads.append(threading.Thread(target=self._carry, args=each, name="middle"))
                self.threads[-1].start()

    def _carry(self, direction, source, sink):
        buffer, number = bytearray(), -2        # two frames of the handshake in either direction
        try:
            while data := source.recv(65536):
                buffer += data
                while (end := self._end(buffer, number)) is not None:
                    unit = bytes(buffer[:end])
                    del buffer[:end]
                    self.seen.append((direction, number, unit))
                    instead = self.alter(direction, number, unit)
                    number += 1
                    if instead is None:
                        return
                    for each in instead:
                        sink.sendall(each)
        except OSError:
            pass
        finally:
            for sock in (source, sink):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _end(buffer, number):
        head, rest = (mirai.HEADER.size, 0) if number < 0 else (4, 32)
        if len(buffer) < head:
            return None
        length = mirai.HEADER.unpack_from(buffer)[0] if number < 0 else int.from_bytes(buffer[:4], "little")
        end = head + length + rest
        return end if len(buffer) >= end else None


def openssl(folder, *words):
    done = subprocess.run(["openssl", *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, timeout=LONG)
    if done.returncode:
        raise AssertionError(f"openssl {words[0]}: {done.stderr}")
    return done.stdout


class Authority:
    """Certificates of one's own: a root, one below it that signs, and the listeners'. Made by openssl in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self._key("root")
        openssl(folder, "req", "-x509", "-new", "-key", "root.key", "-subj", "/CN=root of tests", "-days", "30", "-out", "root.pem",
                "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign")
        self._key("middle")
        self._sign("middle", "root", "basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign")

    def _key(self, name):
        openssl(self.folder, "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key")

    def _sign(self, name, by, extensions, *options):
        with open(self.path(f"{name}.ext"), "w") as file:
            file.write(f"subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n{extensions}\n")
        openssl(self.folder, "req", "-new", "-key", f"{name}.key", "-subj", f"/CN={name}", "-out", f"{name}.csr")
        if options:
            self._sign_by_dates(name, by, options)
        else:
            openssl(self.folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{by}.pem", "-CAkey", f"{by}.key", "-CAcreateserial",
                    "-days", "30", "-extfile", f"{name}.ext", "-out", f"{name}.pem")

    def _sign_by_dates(self, name, by, dates):
        for path, text in (("index", ""), ("serial", "10"), ("ca.conf", (
                "[ca]\ndefault_ca=x\n[x]\ndatabase=index\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=p\n"
                "[p]\ncommonName=supplied\n"))):
            with open(self.path(path), "w") as file:
                file.write(text)
        openssl(self.folder, "ca", "-batch", "-config", "ca.conf", "-in", f"{name}.csr", "-cert", f"{by}.pem", "-keyfile", f"{by}.key",
                "-startdate", dates[0], "-enddate", dates[1], "-extfile", f"{name}.ext", "-out", f"{name}.pem", "-notext")

    def path(self, name):
        return os.path.join(self.folder, name)

    def read(self, name):
        with open(self.path(name)) as file:
            return file.read()

    def listener(self, name, names, password=None, dates=()):
        """Makes a certificate chain and its key: PEM texts."""
        self._key(name)
        self._sign(name, "middle", f"subjectAltName={names}\nextendedKeyUsage=serverAuth", *dates)
        if password:
            openssl(self.folder, "ec", "-in", f"{name}.key", "-aes256", "-passout", f"pass:{password}", "-out", f"{name}.key")
        return self.read(f"{name}.pem") + self.read("middle.pem"), self.read(f"{name}.key")


class NetworkCase(MachinesCase):
    def by_hand(self, url, key, *options, **more):
        daemon = ByHand(url, *options, key=key, **more)
        self.addCleanup(daemon.__exit__)
        return daemon

    def shell(self, **options):
        shell = Shell(**options)
        self.addCleanup(shell.__exit__, None, None, None)
        return shell.__enter__()


class TestNetwork(NetworkCase):
    # -- URLs and addresses

    def test_daemons_serve_at_every_kind_of_url_with_and_without_a_dispatcher(self):
        hosts = ["127.0.0.1", "::1", "localhost", *own_addresses(), socket.gethostname()]
        schemes = ("tcp", "tls+tcp") if shutil.which("openssl") else ("tcp",)
        for host, (scheme, dispatcher) in crossed(hosts, [*itertools.product(schemes, (True, False))]):
            with self.subTest(scheme=scheme, host=host, dispatcher=dispatcher), \
                    daemons(2, url=at(host, scheme), dispatcher=dispatcher):
                url = mirai.parse_url(status()["daemons"])
                self.assertEqual((url.scheme, url.host), (scheme, host))
                self.assertGreater(url.port, 0)
                self.check_map(200)

    def test_a_url_of_all_addresses_is_reached_at_each_of_them(self):
        for scheme in ("tcp", "tls+tcp") if shutil.which("openssl") else ("tcp",):
            for host in ("*", "0.0.0.0", socket.gethostname()):
                key = os.urandom(32).hex()
                with self.subTest(scheme=scheme, host=host), daemons(url=at(host, scheme), key=key):
                    port = mirai.parse_url(status()["daemons"]).port
                    peers = [mirai.dial(at(each, scheme, port), bytes.fromhex(key), "daemon", {}) for each in
                             ("127.0.0.1", *own_addresses()) if host != "0.0.0.0" or ":" not in each]
                    joined(len(peers))
                    for peer in peers:
                        peer.close()

    def test_a_url_of_all_ipv4_addresses_is_none_of_ipv6(self):
        with daemons(url="tcp://0.0.0.0:0"):
            port = mirai.parse_url(status()["daemons"]).port
            with self.assertRaises(ConnectionRefusedError):
                socket.create_connection(("::1", port)).close()
            self.assertEqual([url for url in mirai.reach(mirai.parse_url(status()["daemons"])) if "[" in url], [])

    def test_names_that_begin_as_loopback_addresses_do_are_none(self):
        for host, local in (("127.0.0.1", True), ("127.1", True), ("::ffff:127.0.0.1", True), ("localhost", True),
                            ("127.example.org", False), ("127.0.0.1.example.org", False)):
            self.assertEqual(mirai.is_local(mirai.Address("tcp", host, 1)), local, host)

    def test_local_daemons_serve_at_a_name_that_the_certificate_has(self):
        if not shutil.which("openssl"):
            self.skipTest("no openssl here")
        folder, name = self.folder(), socket.gethostname()
        cert, key = mirai.make_certificate([name])
        with open(os.path.join(folder, "cert.pem"), "w") as file:
            file.write(cert)
        with daemons(1, url=host_url(tls=True), tls=(cert, key), tlscert=file.name):
            self.check_map(20)
        cert, key = mirai.make_certificate(["elsewhere.invalid"])
        with open(file.name, "w") as file:
            file.write(cert)
        with self.assertRaisesRegex(LaunchError, "(?i)certificate is not accepted: hostname mismatch"):
            daemons(1, url=host_url(tls=True), tls=(cert, key), tlscert=file.name)

    def test_a_certificate_that_is_asked_of_nobody_or_is_none_is_told_at_once(self):
        folder = self.folder()
        for text, url, words in (("", "tls+tcp://127.0.0.1:1", "no certificate in PEM"),
                                 ("-----BEGIN", "tls+tcp://127.0.0.1:1", "no certificate in PEM"),
                                 (None, "tcp://127.0.0.1:1", "tlscert is for tls")):
            path = os.path.join(folder, "tlscert.pem")
            with open(path, "w") as file:
                file.write(mirai.make_certificate(["a"])[0] if text is None and shutil.which("openssl") else text or "")
            done = subprocess.run([sys.executable, FILE, "daemon", url, "--tlscert", path, "--key-file", "-"], input=KEY,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=LONG)
            if text is not None or shutil.which("openssl"):
                self.assertEqual(done.returncode, 64, done.stderr)
                self.assertIn(words, done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_what_a_listener_without_the_key_says_is_shown_as_text(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def serve():
                with listener.accept()[0] as sock:
                    sock.recv(1000)
                    sock.sendall(mirai.encode_json(mirai.Kind.REFUSED, {"why": "\x1b[2J\n" + "x" * 2000}))
            thread = threading.Thread(target=serve)
            thread.start()
            with self.assertRaises(mirai.Refused) as caught:
                mirai.dial(at("127.0.0.1", port=listener.getsockname()[1]), bytes(32), "daemon", {})
            thread.join(LONG)
        self.assertTrue(str(caught.exception).isprintable())
        self.assertLess(len(str(caught.exception)), 400)

    def test_host_url_has_every_interface_and_a_port_is_kept(self):
        self.assertTrue(host_url().startswith(f"tcp://{socket.gethostname()}:0"))
        self.assertTrue(host_url(tls=True, port=77).endswith(":77"))
        for name, url in host_url(tls=True, port=5).interfaces.items():
            address = mirai.parse_url(url)
            self.assertEqual((address.scheme, address.port), ("tls+tcp", 5))
            self.assertFalse(address.host.startswith("127.") or address.host == "::1", name)

    def test_a_port_that_is_taken_is_said_to_be(self):
        with socket.create_server(("127.0.0.1", 0)) as taken, self.assertRaisesRegex(LaunchError, "can't listen at tcp://127.0.0.1:.*in use"):
            daemons(1, url=at("127.0.0.1", port=taken.getsockname()[1]))
        with self.assertRaisesRegex(LaunchError, "can't listen at"):
            daemons(1, url="tcp://192.0.2.254:0")
        self.assertFalse(mirai.daemons_set())

    def test_of_several_addresses_the_one_that_answers_is_taken_at_once(self):
        key = os.urandom(32)
        shell = self.shell(url="tcp://127.0.0.1:0")
        other = self.shell(url="tcp://127.0.0.1:0")
        with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
            # one that refuses, one that never says a thing, one with another key, and the right one
            urls = [at("127.0.0.1", port=free_port()), "tcp://nonexistent.invalid:1", other.url, shell.url]
            start = time.monotonic()
            mirai.dial(urls, shell.key, "daemon", {}).close()
            self.assertLess(time.monotonic() - start, 2.0)
            with self.assertRaises(mirai.Refused) as caught:
                mirai.dial(urls, key, "daemon", {}, 3.0)
            for url in urls:
                self.assertIn(url, str(caught.exception))
            self.assertIn("does not hold the key", str(caught.exception))
            with self.assertRaisesRegex(OSError, "did not answer in time"):
                mirai.dial(at("127.0.0.1", port=silent.getsockname()[1]), key, "daemon", {}, 0.3)

    def test_an_address_that_takes_a_connection_and_is_silent_does_not_keep_from_the_others(self):
        """A dialer has DIAL_TIME for all: a silent one, as of a machine that hangs, must not use it up."""
        shell = self.shell(url="tcp://127.0.0.1:0")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            connection = mirai.dial([at("127.0.0.1", port=silent.getsockname()[1]), shell.url], shell.key, "daemon", {}, 3.0)
            connection.close()

    # -- sealed frames

    def test_frames_by_tcp_are_sealed_on_loopback_too_where_others_of_the_machine_may_relay(self):
        for url, sealed in ((at(own_address()), True), (at("127.0.0.1"), True), (at("::1"), True), (None, False)):
            with self.subTest(url=url):
                shell = self.shell(url=url)
                found = mirai.dial(shell.url, shell.key, "daemon", {})
                self.assertEqual(isinstance(found.channel, mirai.SealedChannel), sealed)
                found.close()

    def test_sealed_frames_carry_what_is_large_and_what_is_many(self):
        with daemons(2, url=at(own_address())):
            data = os.urandom(5 * MIB)
            self.assertEqual(mirai.mirai(bytes.upper, data).result(LONG), data.upper())
            self.check_map(3000)
        if own_addresses()[1:]:
            with daemons(1, url=at(own_address(6))):
                self.check_map(100)

    def test_a_dialer_refuses_a_listener_on_a_network_that_offers_no_protection(self):
        """One that holds the key: it is another version, or misconfigured."""
        key = os.urandom(32)
        with socket.create_server((own_address(), 0)) as listener:
            def serve():
                sock, _ = listener.accept()
                with sock:
                    decoder, shake = mirai.Decoder(), mirai.ListenerHandshake(key, {})
                    while data := sock.recv(65536):
                        decoder.feed(data)
                        while message := decoder.pop():
                            sock.sendall(shake.receive(message))
            thread = threading.Thread(target=serve)
            thread.start()
            with self.assertRaisesRegex(mirai.Refused, "offers no sealed frames"):
                mirai.dial(at(own_address(), port=listener.getsockname()[1]), key, "daemon", {})
            thread.join(LONG)

    def test_nobody_between_can_talk_the_two_out_of_sealing(self):
        shell = self.shell(url=at(own_address()))

        def alter(direction, number, unit):
            if (direction, number) == ("down", -2):
                changed = unit.replace(b'"seal": true', b'"seal": null')
                assert changed != unit
                return [changed]
            return [unit]
        with Middle(shell.url, alter) as middle, self.assertRaisesRegex(mirai.Refused, "does not hold the key"):
            mirai.dial(middle.url, shell.key, "daemon", {})

    ATTACKS = {
        "flip": lambda kept, number, unit: [flipped(unit, 8 * random.randrange(4, len(unit)))] if number == 3 else [unit],
        "flip the length": lambda kept, number, unit: [flipped(unit, 0)] if number == 3 else [unit],
        "an endless length": lambda kept, number, unit: [flipped(unit, 31)] if number == 3 else [unit],
        "drop": lambda kept, number, unit: [] if number == 3 else [unit],
        "repeat": lambda kept, number, unit: [unit, unit] if number == 3 else [unit],
        "reorder": lambda kept, number, unit: kept.append(unit) or [] if number == 3 else [unit, *kept] if number == 4 else [unit],
        "insert": lambda kept, number, unit: [unit, (40).to_bytes(4, "little") + bytes(72)] if number == 3 else [unit],
        "truncate": lambda kept, number, unit: None if number == 3 else [unit],
    }

    def _attacked(self, how, direction):
        """One daemon behind somebody who changes what passes, and its tasks."""
        key, kept, attack = os.urandom(32).hex(), [], self.ATTACKS[how]
        with Warnings() as log, daemons(url=at(own_address()), key=key):
            with Middle(status()["daemons"], lambda way, number, unit: attack(kept, number, unit) if way == direction and number >= 0
                        else [unit]) as middle:
                daemon = self.by_hand(middle.url, key)
                joined(1)
                found = [mirai.mirai(divmod, i, 7) for i in range(20)]
                if how in ("drop", "reorder"):      # what is missing is noticed with what comes next, and that may be nothing
                    with contextlib.suppress(AssertionError):
                        wait_until(lambda: info().connections == 0, at_length(0.3, 1.0))
                    ended = info().connections == 0
                else:
                    ended = wait_until(lambda: info().connections == 0, 20.0, f"the end of a connection with {how} {direction}")
                mirai.stop_mirai(found)     # what came before the attack was answered, and the rest finds nobody
                for i, value in enumerate(self.results_of(found)):
                    self.assertTrue(value == divmod(i, 7) or isinstance(value, (MiraiConnectionReset, mirai.MiraiCancelled)), value)
                if ended:
                    return log, daemon.status(10.0)[1]
                return None

    def test_what_is_changed_on_the_way_to_the_host_ends_the_connection_with_a_notice(self):
        for how in self.ATTACKS:
            with self.subTest(how):
                found = self._attacked(how, "up")
                if found and how != "truncate":
                    log = found[0]
                    log.wait(r"daemon \d+ on .*: what came over the network is not what was sent", 5.0)

    def test_what_is_changed_on_the_way_to_a_daemon_ends_the_connection(self):
        for how in self.ATTACKS:
            with self.subTest(how):
                found = self._attacked(how, "down")
                if found and how != "truncate":
                    log, said = found
                    self.assertIn("what came over the network is not what was sent", said + " ".join(log.texts()))

    # -- TLS

    @needs_command("openssl")
    def test_without_a_certificate_one_is_made_and_nothing_has_to_be_configured(self):
        key = os.urandom(32).hex()
        with daemons(2, url=host_url(tls=True), key=key):
            self.check_map()
            pem = mirai.nextget("tls")
            self.assertIn("BEGIN CERTIFICATE", pem)
            self.assertNotIn("PRIVATE", pem)
            address = mirai.parse_url(status()["daemons"])
            # it has this machine's names and addresses, so that it can be verified by who wants to
            for host in (socket.gethostname(), "localhost", "127.0.0.1", *own_addresses()):
                mirai.dial(at(host, "tls+tcp", address.port), bytes.fromhex(key), "daemon", {}, tlscert=pem).close()

    @needs_command("openssl")
    def test_each_profile_has_a_certificate_of_its_own(self):
        with daemons(1, url="tls+tcp://127.0.0.1:0"):
            first = mirai.nextget("tls")
        with daemons(1, url="tls+tcp://127.0.0.1:0"):
            self.assertNotEqual(mirai.nextget("tls"), first)

    def test_what_makes_certificates_may_be_missing_and_is_then_named(self):
        with changed_environ(PATH="/nonexistent"), self.assertRaisesRegex(OSError, "no openssl command.*tunnel=True"):
            daemons(1, url="tls+tcp://127.0.0.1:0")
        self.assertFalse(mirai.daemons_set())

    def _authority(self):
        return Authority(self.folder())

    @needs_command("openssl")
    def test_a_chain_of_ones_own_is_verified_up_to_its_authority(self):
        own = self._authority()
        chain, private = own.listener("good", "DNS:localhost,IP:127.0.0.1")
        both = own.path("both.pem")
        with open(both, "w") as file:
            file.write(chain + private)
        with open(own.path("chain.pem"), "w") as file:
            file.write(chain)
        for tls in ((chain, private), both, [own.path("chain.pem"), own.path("good.key")]):
            with daemons(2, url="tls+tcp://127.0.0.1:0", tls=tls, tlscert=own.path("root.pem")):
                self.check_map(100)
                self.assertIn("BEGIN CERTIFICATE", mirai.nextget("tls"))
                self.assertNotIn("PRIVATE", mirai.nextget("tls"), "it is for those who dial")
                line, = launch_remote(tlscert=own.path("root.pem"))
                self.assertIn(f"--tlscert {own.path('root.pem')}", line)
                key = mirai._profiles["default"].key
                daemon = self.by_hand(status()["daemons"], key, "--tlscert", own.path("root.pem"))
                joined(3)
            self.assertEqual(daemon.status(10.0)[0], 0)

    @needs_command("openssl")
    def test_certificate_and_key_are_told_apart_in_either_order(self):
        own = self._authority()
        cert, key = own.listener("good", "IP:127.0.0.1")
        both = own.path("reverse.pem")
        with open(both, "w") as file:
            file.write(key + cert)
        for tls in ((key, cert), both):
            with daemons(1, url="tls+tcp://127.0.0.1:0", tls=tls, tlscert=own.read("root.pem")):
                self.check_map(10)
                self.assertNotIn("PRIVATE", mirai.nextget("tls"))

    @needs_command("openssl")
    def test_an_encrypted_key_is_opened_with_its_password(self):
        own = self._authority()
        pair = own.listener("good", "IP:127.0.0.1", password="open sesame")
        for pass_ in ("open sesame", lambda: "open sesame"):
            with daemons(1, url="tls+tcp://127.0.0.1:0", tls=pair, pass_=pass_, tlscert=own.read("root.pem")):
                self.check_map(10)
        for pass_ in (None, "", "wrong"):
            with self.subTest(pass_=pass_), self.assertRaisesRegex(ValueError, "don't load .*pass_"):
                daemons(1, url="tls+tcp://127.0.0.1:0", tls=pair, pass_=pass_)
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                self.assertNotIn(b"open sesame", file.read())

    @needs_command("openssl")
    def test_a_certificate_and_key_that_do_not_belong_together_are_refused_before_anything_is_reset(self):
        own = self._authority()
        first, second = own.listener("first", "IP:127.0.0.1"), own.listener("second", "IP:127.0.0.1")
        with daemons(1):
            for tls in ((first[0], second[1]), (first[0], first[0]), (first[1], first[1]), (first[0], "-----BEGIN nonsense")):
                with self.assertRaisesRegex(ValueError, "tls: .*certificate and"):
                    daemons(1, url="tls+tcp://127.0.0.1:0", tls=tls)
            with self.assertRaises(FileNotFoundError):
                daemons(1, url="tls+tcp://127.0.0.1:0", tls="/nonexistent.pem")
            for options in ({"tls": first}, {"pass_": "x"}):
                with self.assertRaisesRegex(ValueError, "for a url 'tls"):
                    daemons(1, url="tcp://127.0.0.1:0", **options)
            with self.assertRaises(FileNotFoundError):
                daemons(1, url="tls+tcp://127.0.0.1:0", tls=first, tlscert="/nonexistent.pem")
            self.check_map(10)

    @needs_command("openssl")
    def test_a_certificate_that_is_not_accepted_is_refused_with_the_reason_on_both_sides(self):
        own, stranger = self._authority(), self._authority()
        past, future = ("20200101000000Z", "20200201000000Z"), ("20980101000000Z", "20990101000000Z")
        for name, pair, cert, reason, alert in (
            ("another authority", own.listener("good", "IP:127.0.0.1"), stranger.read("root.pem"), "unable to get|self.signed", "unknown ca"),
            ("another host", own.listener("other", "DNS:elsewhere.example,IP:192.0.2.9"), own.read("root.pem"), "IP address mismatch|not valid for",
             "bad certificate|certificate unknown|handshake"),
            ("expired", own.listener("old", "IP:127.0.0.1", dates=past), own.read("root.pem"), "expired", "expired"),
            ("not yet valid", own.listener("new", "IP:127.0.0.1", dates=future), own.read("root.pem"), "not yet valid", "bad certificate"),
        ):
            key = os.urandom(32).hex()
            pem = os.path.join(self.folder(), "cert.pem")
            with open(pem, "w") as file:
                file.write(cert)
            with self.subTest(name), Warnings() as log, daemons(url="tls+tcp://127.0.0.1:0", tls=pair, key=key):
                code, said = self.by_hand(status()["daemons"], key, "--tlscert", pem).status(15.0)
                self.assertEqual(code, 77, said)
                self.assertRegex(said, f"TLS: the listener's certificate is not accepted: .*({reason})")
                log.wait(f"tcp://127.0.0.1:.*TLS: .*({alert})", 5.0)
                with self.assertRaisesRegex(LaunchError, f"not accepted: .*({reason})"):
                    daemons(1, url="tls+tcp://127.0.0.1:0", tls=pair, tlscert=cert)

    @needs_command("openssl")
    def test_who_sits_in_between_with_a_certificate_of_his_own_is_found_out(self):
        """Nobody checks certificates here: the proof of the key is over the one that was seen."""
        import ssl
        shell = self.shell(url="tls+tcp://127.0.0.1:0", tls=[*mirai.make_certificate(["127.0.0.1"]), None])
        his = mirai.listener_context(*mirai.make_certificate(["127.0.0.1"]), None)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def relay():
                sock, _ = listener.accept()
                with his.wrap_socket(sock, server_side=True) as dialer:
                    plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                    plain.check_hostname, plain.verify_mode = False, ssl.CERT_NONE
                    address = mirai.parse_url(shell.url)
                    with socket.create_connection((address.host, address.port)) as inner, plain.wrap_socket(inner) as up:
                        up.sendall(dialer.recv(65536))
                        with contextlib.suppress(OSError):
                            dialer.sendall(up.recv(65536))
                            dialer.recv(65536)
            thread = threading.Thread(target=relay)
            thread.start()
            with self.assertRaisesRegex(mirai.Refused, "somebody with another certificate is in between"):
                mirai.dial(at("127.0.0.1", "tls+tcp", listener.getsockname()[1]), shell.key, "daemon", {})
            thread.join(LONG)

    @needs_command("openssl")
    def test_plain_text_into_tls_and_tls_into_plain_text_are_told_apart(self):
        for listens, dials in (("tls+tcp", "tcp"), ("tcp", "tls+tcp")):
            key = os.urandom(32).hex()
            with self.subTest(listens=listens), Warnings() as log, daemons(url=at("127.0.0.1", listens), key=key):
                port = mirai.parse_url(status()["daemons"]).port
                code, said = self.by_hand(at("127.0.0.1", dials, port), key).status(15.0)
                self.assertIn(code, (69, 77), said)
                self.assertNotIn("Traceback", said)
                if dials == "tls+tcp":
                    self.assertIn("the other side does not speak it here (tls+tcp:// has to be on both sides)", said)
                    log.wait("refused tcp://127.0.0.1:.*it speaks TLS: tls\\+tcp:// has to be", 5.0)
                else:
                    self.assertRegex(said, "tls|TLS", "says nothing of what might be wrong")
                    log.wait("tcp://127.0.0.1:.*: TLS: the other side does not speak it here", 5.0)

    @needs_command("openssl")
    def test_tls_carries_what_is_large_and_what_is_many(self):
        for dispatcher in (True, False):
            with self.subTest(dispatcher=dispatcher), daemons(2, url="tls+tcp://127.0.0.1:0", dispatcher=dispatcher):
                data = os.urandom(5 * MIB)
                self.assertEqual(mirai.mirai(bytes.upper, data).result(LONG), data.upper())
                self.check_map(3000)

    @needs_command("openssl")
    def test_five_hundred_daemons_dial_at_once_and_all_are_let_in(self):
        code = """
            import sys, threading, time
            import mirai
            url, key, n = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3])
            kept, failed, begin = [], [], threading.Event()
            def dial():
                begin.wait()
                try:
                    kept.append(mirai.dial(url, key, "daemon", {}))
                except Exception as error:
                    failed.append(repr(error))
            threads = [threading.Thread(target=dial) for _ in range(n)]
            for t in threads: t.start()
            print("ready", flush=True)
            sys.stdin.readline()
            begin.set()
            for t in threads: t.join()
            print(len(kept), failed[:1], flush=True)
            sys.stdin.readline()
            """
        key = os.urandom(32).hex()
        with Warnings() as log, daemons(url="tls+tcp://127.0.0.1:0", key=key):
            env = {**os.environ, "PYTHONPATH": HERE, "PYTHONDONTWRITEBYTECODE": "1"}
            crowd = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), status()["daemons"], key, "125"], env=env,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
            try:
                for each in crowd:
                    self.assertEqual(each.stdout.readline(), "ready\n")
                for each in crowd:
                    each.stdin.write("\n")
                    each.stdin.flush()
                self.assertEqual([each.stdout.readline() for each in crowd], ["125 []\n"] * 4)
                joined(500)
                self.assertEqual(log.texts(), [])
            finally:
                for each in crowd:
                    each.kill()
                    each.communicate()

    # -- daemons that come again, wait, come and go

    def test_daemons_that_wait_serve_the_next_host_at_the_same_url_and_key(self):
        for scheme, host in crossed(("tls+tcp", "tcp") if shutil.which("openssl") else ("tcp",), ("127.0.0.1", own_address())):
            url, key = at(host, scheme, free_port()), os.urandom(32).hex()
            with self.subTest(url=url):
                daemon = self.by_hand(url, key, "--autoexit", "false", "--asyncdial")
                for _ in range(3):
                    with daemons(url=url, key=key):
                        joined(1)
                        self.assertEqual(mirai.mirai(os.getpid).result(LONG), daemon.pid)
                        self.check_map(100)
                daemons(url=url, key=key)
                joined(1)
                daemons(None)
                self.assertEqual(daemon.status(10.0)[0], 0)

    def test_a_host_that_is_killed_is_followed_by_the_next(self):
        url, key = at("127.0.0.1", "tls+tcp", free_port()), os.urandom(32).hex()
        daemon = self.by_hand(url, key, "--autoexit", "false", "--asyncdial")
        code = f"""
            from mirai import *
            import os, time
            daemons(url={url!r}, key={key!r})
            print(mirai(os.getpid).result())
            time.sleep(1000)
            """
        with Host(code) as host:
            self.assertEqual(host.line(), str(daemon.pid))
            host.process.kill()
            host.process.wait(LONG)
            with daemons(url=url, key=key):
                joined(1)
                self.assertEqual(mirai.mirai(os.getpid).result(LONG), daemon.pid)

    def test_a_daemon_that_comes_before_its_host_waits_for_it_only_where_it_is_told_to(self):
        for scheme in ("tcp", "tls+tcp"):
            url, key = at("127.0.0.1", scheme, free_port()), os.urandom(32).hex()
            code, said = self.by_hand(url, key).status(15.0)
            self.assertEqual((code, "Traceback" in said), (69, False), said)
            self.assertIn("refused", said)
            early = self.by_hand(url, key, "--asyncdial")
            with daemons(url=url, key=key):
                joined(1)
                self.check_map(10)
            self.assertEqual(early.status(10.0)[0], 0)

    def test_daemons_come_and_go_and_nothing_runs_twice(self):
        """They leave after so many tasks, and others come, while a map runs."""
        key, folder = os.urandom(32).hex(), self.folder()
        path = os.path.join(folder, "ran")
        n, most = at_length((4_000, 400), (10_000, 900))
        url = at(own_address())
        with daemons(url=url, key=key):
            at_ = status()["daemons"]
            found = mirai_map(range(n), _note_in, path)
            left = []
            crowd = [self.by_hand(at_, key, "--maxtasks", str(random.randrange(most // 3, most))) for _ in range(2)]
            while not all(m.done() for m in found):
                for each in list(crowd):
                    if each.process.poll() is not None:
                        crowd.remove(each)
                        left.append(each.status(LONG)[0])
                        crowd.append(self.by_hand(at_, key, "--maxtasks", str(random.randrange(most // 3, most))))
                time.sleep(0.01)        # how often to look; nothing waits for it
            self.assertEqual(found.results(), list(range(n)))
            self.assertGreater(len(left), 5)
            self.assertEqual(set(left), {3})
        with open(path) as file:
            ran = list(map(int, file))
        self.assertEqual(sorted(ran), list(range(n)))

    def test_daemons_are_killed_while_a_map_runs_and_nothing_runs_twice_or_comes_back_wrong(self):
        n = at_length(6_000, 20_000)
        key, path = os.urandom(32).hex(), os.path.join(self.folder(), "ran")
        with daemons(url=at(own_address()), key=key):
            at_ = status()["daemons"]
            found = mirai_map(range(n), _note_in, path)
            kills = 0
            while not all(m.done() for m in found):
                with ByHand(at_, key=key), ByHand(at_, key=key) as second:
                    joined(2)
                    before = info().completed
                    wait_until(lambda: info().completed > before + 300 or all(m.done() for m in found))
                    second.process.kill()
                    kills += 1
                    wait_until(lambda: second.process.poll() is not None)
        values = [m.data for m in found]
        lost = [i for i, value in enumerate(values) if isinstance(value, MiraiConnectionReset)]
        self.assertEqual([value for i, value in enumerate(values) if i not in set(lost)], [i for i in range(n) if i not in set(lost)])
        self.assertGreaterEqual(kills, 1)
        with open(path) as file:
            ran = list(map(int, file))
        self.assertEqual(len(ran), len(set(ran)))
        self.assertLessEqual(set(range(n)) - set(ran), set(lost))

    @takes_long
    def test_a_daemon_that_is_stopped_for_long_is_waited_for(self):
        for url in (at(own_address()), at(own_address(), "tls+tcp")):
            key = os.urandom(32).hex()
            with self.subTest(url=url), daemons(url=url, key=key):
                daemon = self.by_hand(status()["daemons"], key)
                joined(1)
                self.assertEqual(mirai.mirai(divmod, 9, 7).result(LONG), (1, 2))
                os.kill(daemon.pid, signal.SIGSTOP)
                try:
                    m = mirai.mirai(len, bytes(20 * MIB))       # more than the kernel takes
                    began = time.monotonic()
                    wait_until(lambda: m.done() or time.monotonic() > began + 3 * mirai.LINK_TIME, 4 * mirai.LINK_TIME)
                    self.assertFalse(m.done())
                finally:
                    os.kill(daemon.pid, signal.SIGCONT)
                self.assertEqual(m.result(LONG), 20 * MIB)
                faulthandler.dump_traceback_later(4 * LONG, exit=True)

    # -- hosts of their own, in network namespaces

    def _on_head(self, code, folder=HERE):
        """A host on `head`: it can reach n1 to n3, and they it."""
        text = "import os, subprocess, sys, time\nNETNS, PYTHON, WORD = sys.argv[1:]\n" + textwrap.dedent(code)
        env = {**os.environ, "PYTHONPATH": folder, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(["bash", netns_script(), "exec", "head", sys.executable, "-c", text, netns_script(), self.PYTHON,
                                    self.WORD], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   env=env, start_new_session=True, cwd=folder)       # whose mirai.py comes first
        self.addCleanup(lambda: [process.kill() if process.poll() is None else None, process.communicate()])
        return process

    ON_NODES = """
        from mirai import *
        import mirai as module
        def on(*nodes):
            return remote_config("bash", [[NETNS, "exec", node, "."] for node in nodes], python=PYTHON)
        """

    @needs_service("netns")
    def test_three_machines_serve_a_host_by_tls_and_by_sealed_frames(self):
        process = self._on_head(self.ON_NODES + f"""
        n = {at_length(3, 6)}
        for tls in (True, False):
            with daemons(n, url=host_url(tls=tls), remote=on("n1", "n2", "n3")):
                while info().connections < n:
                    time.sleep(0.01)
                print(mirai_map(range(1000), divmod, 7).results() == [divmod(x, 7) for x in range(1000)],
                      sorted(set(everywhere("__import__('socket').gethostname()").results())), status()["daemons"].split(":")[:2])
        """)
        said, _ = process.communicate(timeout=LONG)
        nodes = "['n1', 'n2', 'n3']"
        self.assertEqual(said, f"True {nodes} ['tls+tcp', '//head']\nTrue {nodes} ['tcp', '//head']\n")

    def _hastened(self, seconds):
        """This library, but with another LINK_TIME: the folder it is in."""
        folder = self.folder()
        with open(FILE) as file:
            text, n = re.subn(r"(?m)^LINK_TIME = \S+", f"LINK_TIME = {seconds}", file.read())
        self.assertEqual(n, 1)
        with open(os.path.join(folder, "mirai.py"), "w") as file:
            file.write(text)
        return folder

    def _cut(self, folder, seconds, way="cut n1", last=None, tls=(True, False)):
        """Tasks are resolved in so many seconds, and the daemon has ended after `last` of them; by TLS, and by sealed
        frames."""
        last = last or seconds
        process = self._on_head(self.ON_NODES + f"""
        def there(pid):
            try:
                with open(f"/proc/{{pid}}/stat") as file:
                    return file.read().rpartition(")")[2].split()[0] not in "ZX"
            except OSError:
                return False
        for tls in {tls}:
          try:
            with daemons(2, url=host_url(tls=tls), remote=on("n1", "n2")):
                while info().connections < 2:
                    time.sleep(0.01)
                names = dict((pid, node) for pid, node in everywhere("(__import__('os').getpid(), __import__('socket').gethostname())").results())
                held = [mirai(time.sleep, 1000) for _ in range(2)]
                while info().executing < 2:
                    time.sleep(0.01)
                began = time.monotonic()
                subprocess.run(["bash", NETNS, *{way.split()!r}], check=True)
                lost = race_mirai(held)
                took = time.monotonic() - began
                codes = sorted(getattr(m.data, "code", 0) for m in held)
                pid = next(pid for pid, node in names.items() if node == "n1")
                while there(pid) and time.monotonic() < began + 2 * {last}:
                    time.sleep(0.02)
                ended = time.monotonic() - began
                print(f"{{codes}} {{took < {seconds} or took}} {{ended < {last} or ended}}", flush=True)
                print([str(m.data) for m in held if m.done()], flush=True)
          finally:
            subprocess.run(["bash", NETNS, "heal", "n1"], check=True)
        """, folder)
        try:
            said, _ = process.communicate(timeout=1.9 * LONG)
        finally:
            subprocess.run(["bash", netns_script(), "heal", "n1"], check=True, timeout=LONG)
        lines = said.splitlines()
        found = [line for line in lines if line.startswith("[")]
        self.assertEqual(found[::2], ["[0, 19] True True"] * len(tls), said)      # the other's goes on
        for line in found[1::2]:
            self.assertRegex(line, r"daemon \d+ on n1 .*(did not answer|timed out)")
        for line in lines:
            if not line.startswith("["):        # a line of the log
                self.assertRegex(line, r"daemon \d+ on n1.*did not answer")

    @needs_service("netns")
    def test_a_link_that_is_cut_resolves_its_tasks_and_the_daemon_ends(self):
        self._cut(self._hastened(6.0), 8.0, tls=at_length((True,), (True, False)))

    @needs_service("netns")
    def test_a_link_that_loses_everything_one_way_resolves_its_tasks(self):
        # until the host has given up, the daemon hears from it
        self._cut(self._hastened(6.0), 9.0, "drop n1 out", 18.0, at_length((False,), (True, False)))

    @takes_long
    @needs_service("netns")
    def test_a_link_that_is_cut_is_noticed_within_half_a_minute(self):
        faulthandler.dump_traceback_later(4 * LONG, exit=True)
        self._cut(HERE, 35.0)

    @needs_service("netns")
    def test_a_slow_and_lossy_network_changes_nothing_but_the_time(self):
        process = self._on_head(self.ON_NODES + """
        try:
            subprocess.run(["bash", NETNS, "delay", "n1", "50"], check=True)
            subprocess.run(["bash", NETNS, "loss", "n2", "3"], check=True)
            with daemons(4, url=host_url(tls=True), remote=on("n1", "n2")):
                while info().connections < 4:
                    time.sleep(0.01)
                print(mirai_map(range(1000), divmod, 7).results() == [divmod(x, 7) for x in range(1000)])
        finally:
            for node in ("n1", "n2"):
                subprocess.run(["bash", NETNS, "heal", node], check=True)
        """)
        try:
            said, _ = process.communicate(timeout=LONG)
        finally:
            for node in ("n1", "n2"):
                subprocess.run(["bash", netns_script(), "heal", node], check=True, timeout=LONG)
        self.assertEqual(said, "True\n")


@by_value
def _note_in(item, path):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"%d\n" % item)
    os.close(fd)
    return item


# -- strangers


def resident(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def listener_pid(port):
    """The process that listens on a port of this machine."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open(f"/proc/net/{name}") as file:
            for line in list(file)[1:]:
                words = line.split()
                if words[3] == "0A" and int(words[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{words[9]}]")
    for pid in [os.getpid(), *family_of(os.getpid())][::-1]:
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") in inodes:
                        return pid
    raise AssertionError("nobody listens there")


GARBAGE = {
    "random": lambda: random.Random(1).randbytes(4000),
    "HTTP": lambda: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "ssh": lambda: b"SSH-2.0-OpenSSH_9.2\r\n",
    "zeros": lambda: bytes(4000),
    "a frame without end": lambda: mirai.HEADER.pack(2**40, mirai.WIRE_VERSION, mirai.Kind.HELLO, 0, 0) + bytes(4000),
    "a frame that is too large": lambda: mirai.encode(mirai.Kind.HELLO, payload=b"x" * 5000),
    "a task": lambda: mirai.encode(mirai.Kind.TASK, 1, b"cos\nsystem\n(S'touch /tmp/owned'\ntR."),
    "no JSON": lambda: mirai.encode(mirai.Kind.HELLO, payload=b"{"),
    "deep JSON": lambda: mirai.encode(mirai.Kind.HELLO, payload=b"[" * 4000),
    "no object": lambda: mirai.encode(mirai.Kind.HELLO, payload=b"[1, 2]"),
    "no role": lambda: mirai.encode(mirai.Kind.HELLO, payload=b"{}"),
    "an odd role": lambda: mirai.encode(mirai.Kind.HELLO, payload=b'{"role": {"a": [1]}}'),
    "lone surrogates": lambda: mirai.encode(mirai.Kind.HELLO, payload=b'{"role": "\\ud800\\n\\u001b[31m"}'),
    "no pid": lambda: mirai.encode(mirai.Kind.HELLO, payload=b'{"role": "daemon", "pid": "1", "host": "x"}'),
    "a huge number": lambda: mirai.encode(mirai.Kind.HELLO, payload=b'{"role": "daemon", "host": "x", "pid": ' + b"9" * 3900 + b"}") + mirai.encode(mirai.Kind.PROOF),
    "a proof first": lambda: mirai.encode(mirai.Kind.PROOF, payload=bytes(32)),
    "an empty proof": lambda: mirai.encode(mirai.Kind.HELLO, payload=b'{"role": "daemon", "pid": 1, "host": "x"}') + mirai.encode(mirai.Kind.PROOF),
    "a wrong proof": lambda: mirai.encode(mirai.Kind.HELLO, payload=b'{"role": "daemon", "pid": 1, "host": "x"}') + mirai.encode(mirai.Kind.PROOF, payload=bytes(32)),
    "two hellos": lambda: mirai.encode(mirai.Kind.HELLO, payload=b'{"role": "daemon", "pid": 1, "host": "x"}') * 2,
}


class TestAttacks(NetworkCase):
    def profile(self, url="tcp://127.0.0.1:0", n=1, **options):
        """A profile with a daemon at work, its key, where to connect, and what the host's log says."""
        log = self.enterContext(Warnings()) if hasattr(self, "enterContext") else None
        if log is None:
            log = Warnings().__enter__()
            self.addCleanup(log.__exit__)
        self.key = os.urandom(32)
        daemons(n, url=url, key=self.key, **options)
        address = mirai.parse_url(status(options.get("compute"))["daemons"])
        self.where = address.host, address.port
        return log

    def stranger(self, data=b""):
        sock = socket.create_connection(self.where, timeout=LONG)
        self.addCleanup(sock.close)
        if data:
            with contextlib.suppress(OSError):
                sock.sendall(data)
        return sock

    def read_all(self, sock, seconds=15.0):
        """What it is sent until its connection is ended."""
        sock.settimeout(seconds)
        found = b""
        with contextlib.suppress(ConnectionError):
            while data := sock.recv(65536):
                found += data
        return found

    @contextlib.contextmanager
    def prompt(self, seconds=5.0):
        start = time.monotonic()
        yield
        self.assertLess(time.monotonic() - start, seconds)

    def port_of(self, sock):
        return sock.getsockname()[1]

    def test_garbage_is_refused_at_once_and_the_host_hears_who_it_was_and_why(self):
        for url, dispatcher in (("tcp://127.0.0.1:0", True), (at(own_address()), True), ("tcp://127.0.0.1:0", False)):
            log = self.profile(url, dispatcher=dispatcher)
            for name, make in GARBAGE.items():
                with self.subTest(name, url=url, dispatcher=dispatcher), self.prompt():
                    sock = self.stranger(make())
                    who = mirai.format_url(mirai.Address("tcp", *sock.getsockname()[:2]))
                    self.read_all(sock)
                    line = log.wait(f"refused {re.escape(who)}: .", 5.0)
                    self.assertTrue(line.isprintable(), repr(line))
                    self.assertLess(len(line), 600)
                    self.check_map(10)
            self.assertFalse(os.path.exists("/tmp/owned"))
            self.assertEqual(info().connections, 1)
            daemons(0)

    @needs_command("openssl")
    def test_garbage_into_tls_is_refused_as_well(self):
        log = self.profile("tls+tcp://127.0.0.1:0")
        for name, make in GARBAGE.items():
            with self.subTest(name), self.prompt():
                sock = self.stranger(make())
                sock.shutdown(socket.SHUT_WR)
                self.read_all(sock)
                self.check_map(10)
        log.wait("TLS: ", 5.0)
        daemons(0)
        log = self.profile("tls+tcp://127.0.0.1:0")      # a log says so many lines in a second
        import ssl
        context = mirai.dialer_context(None)
        for name, make in GARBAGE.items():
            with self.subTest("inside", name=name), self.prompt(), context.wrap_socket(self.stranger(), server_hostname="127.0.0.1") as sock:
                who = mirai.format_url(mirai.Address("tcp", *sock.getsockname()[:2]))
                with contextlib.suppress(OSError):
                    sock.sendall(make())
                with contextlib.suppress(ssl.SSLError):
                    self.read_all(sock)
                log.wait(f"refused {re.escape(who)}: .", 5.0)
        self.check_map(10)

    def test_a_unix_socket_has_strangers_too(self):
        log = Warnings().__enter__()
        self.addCleanup(log.__exit__)
        with daemons(1):
            for name, make in GARBAGE.items():
                with self.subTest(name), self.prompt(), socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(mirai.parse_url(status()["daemons"]).host)
                    with contextlib.suppress(OSError):
                        sock.sendall(make())
                    self.read_all(sock)
            log.wait("refused somebody on this machine: .", 5.0)
            self.check_map(10)

    def test_who_is_slow_or_silent_is_refused_in_time_and_disturbs_nobody(self):
        secure = self.profile("tls+tcp://127.0.0.1:0", compute="tls") if shutil.which("openssl") else None
        patient = [self.stranger(), self.stranger(b"\x16\x03\x01\x02\x00\x01")] if secure else []
        log = self.profile(at(own_address()), 2)
        began = time.monotonic()
        silent, slow, half = self.stranger(), self.stranger(), self.stranger(mirai.encode(mirai.Kind.HELLO, payload=json.dumps(
            {"role": "daemon", "pid": 1, "host": "x"}).encode()))
        hello = mirai.encode(mirai.Kind.HELLO, payload=b'{"role": "daemon", "pid": 1, "host": "x"}')
        over, at_ = threading.Event(), 0
        while time.monotonic() < began + mirai.HANDSHAKE_TIME + 1.5:
            with contextlib.suppress(OSError):
                if at_ < len(hello) - 1:
                    slow.sendall(hello[at_:at_ + 1])
                    at_ += 1
            self.check_map(50)
            over.wait(0.3)
        for sock in (silent, slow, half):
            log.wait(rf"refused .*:{self.port_of(sock)}: no handshake in time", 5.0)
            self.assertIn(b"no handshake in time", self.read_all(sock, 5.0))
        for sock in patient:
            log.wait(rf"refused .*:{self.port_of(sock)}: no handshake in time", 5.0)
            self.read_all(sock, 5.0)
        self.assertEqual(info().connections, 2)

    def test_a_crowd_of_the_silent_makes_room_for_daemons(self):
        log = self.profile()
        crowd = [self.stranger() for _ in range(3 * mirai.STRANGERS)]
        start = time.monotonic()
        mirai.dial(status()["daemons"], self.key, "daemon", {}).close()
        self.assertLess(time.monotonic() - start, 5)
        log.wait("too many connections that have not said who they are", 5.0)
        log.wait(r"and \d+ more in that second", 10.0)
        self.assertLess(len(log.texts()), 200)
        self.check_map(100)
        self.assertTrue(crowd)

    def test_a_flood_of_connections_does_not_keep_daemons_out_nor_take_descriptors(self):
        log = self.profile()
        pid = listener_pid(self.where[1])
        over = threading.Event()

        def flood():
            while not over.is_set():
                with contextlib.suppress(OSError), socket.create_connection(self.where, 5.0) as sock:
                    sock.sendall(random.choice(list(GARBAGE.values()))())
        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                mirai.dial(status()["daemons"], self.key, "daemon", {}).close()
                self.check_map(100)
        finally:
            over.set()
            for thread in threads:
                thread.join(LONG)
        wait_until(lambda: len(os.listdir(f"/proc/{pid}/fd")) < 40, mirai.HANDSHAKE_TIME + 5, "the descriptors to be closed")
        self.assertTrue(log.texts())

    def test_strangers_take_no_memory(self):
        for url in ("tcp://127.0.0.1:0", "tls+tcp://127.0.0.1:0") if shutil.which("openssl") else ("tcp://127.0.0.1:0",):
            with self.subTest(url=url):
                self.profile(url)
                pid = listener_pid(self.where[1])
                self.check_map(100)
                before = resident(pid)
                chunk = random.Random(2).randbytes(MIB)
                # frames that begin well, and go on for ever; and such as only begin
                heads = [mirai.HEADER.pack(4000, mirai.WIRE_VERSION, mirai.Kind.HELLO, 0, 0), mirai.HEADER.pack(2**30, mirai.WIRE_VERSION, mirai.Kind.HELLO, 0, 0),
                         b"\x16\x03\x01\x40\x00\x01\x00\x3f\xfc\x03\x03", b"\x16\x03\x01\x02\x00\x01\xff\xff\xff\x03\x03", b""]
                for i in range(200):
                    sock = self.stranger()
                    sock.settimeout(2.0)
                    with contextlib.suppress(OSError):
                        sock.sendall(heads[i % len(heads)] + (chunk if i % 2 else chunk[:3000]))
                self.check_map(100)
                self.assertLess(resident(pid) - before, 40 * MIB)
                daemons(0)

    def test_a_wrong_key_is_refused_by_either_side(self):
        log = self.profile()
        url = status()["daemons"]
        with self.assertRaisesRegex(mirai.Refused, "the listener does not hold the key that this side holds"):
            mirai.dial(url, os.urandom(32), "daemon", {})
        code, said = self.by_hand(url, os.urandom(32).hex()).status(15.0)
        self.assertEqual(code, 77)
        self.assertIn("the listener does not hold the key that this side holds", said)
        # one that does not care whether the listener has it
        with replaced(mirai.hmac, "compare_digest", lambda a, b: True):
            connection = socket.create_connection(self.where, timeout=LONG)
            self.addCleanup(connection.close)
            shake = mirai.DialerHandshake(os.urandom(32), "daemon", {})
            connection.sendall(shake.hello())
            decoder = mirai.Decoder()
            while (message := decoder.pop()) is None:
                decoder.feed(connection.recv(65536))
            connection.sendall(shake.receive(message))
        self.assertIn(b"wrong key", self.read_all(connection))
        log.wait(rf"refused tcp://127.0.0.1:{self.port_of(connection)}: wrong key", 5.0)
        self.assertEqual(info().connections, 1)

    def _recorded(self, host=None):
        """The dialer's side of a handshake that went well."""
        with Middle(status()["daemons"], host=host) as middle:
            mirai.dial(middle.url, self.key, "daemon", {}).close()
            wait_until(lambda: sum(way == "up" for way, _, _ in middle.seen) >= 2)
            return [unit for way, _, unit in middle.seen if way == "up"]

    def test_what_was_recorded_is_of_no_use_another_time(self):
        for url in ("tcp://127.0.0.1:0", at(own_address())):
            log = self.profile(url)
            recorded = self._recorded()
            joined(1)
            sock = self.stranger(b"".join(recorded))
            self.assertIn(b"wrong key", self.read_all(sock))
            log.wait(rf"refused .*:{self.port_of(sock)}: wrong key", 5.0)
            self.assertEqual(info().connections, 1)
            daemons(0)

    def test_a_listeners_proof_cannot_be_reflected(self):
        log = self.profile()
        sock = self.stranger(mirai.encode(mirai.Kind.HELLO, payload=json.dumps({"role": "daemon", "pid": 1, "host": "x"}).encode()))
        decoder = mirai.Decoder()
        while (message := decoder.pop()) is None:
            decoder.feed(sock.recv(65536))
        sock.sendall(mirai.encode(mirai.Kind.PROOF, payload=message.payload[:32]))
        self.assertIn(b"wrong key", self.read_all(sock))
        log.wait("wrong key", 5.0)

    def test_a_dialers_hello_cannot_be_used_to_pose_as_the_listener(self):
        """Whoever is dialed and has no key may ask the real listener, but not the other way about: a dialer's proof is no
        listener's, and what a host says is not what a daemon says."""
        shell = self.shell(url="tcp://127.0.0.1:0")

        def alter(direction, number, unit):
            if direction == "up" and number == -2:
                return [unit.replace(b'"role": "daemon"', b'"role": "host"  ')]
            return [unit]
        with Middle(shell.url, alter) as middle, self.assertRaisesRegex(mirai.Refused, "does not hold the key"):
            mirai.dial(middle.url, shell.key, "daemon", {})

    def test_a_second_host_is_refused(self):
        log = self.profile()
        with self.assertRaisesRegex(mirai.Refused, "this dispatcher has a host"):
            mirai.dial(status()["daemons"], self.key, "host", {})
        log.wait("refused tcp://127.0.0.1:.*: this dispatcher has a host", 5.0)

    def test_a_listener_that_is_none_is_refused_by_a_daemon_in_time_and_without_harm(self):
        """Somebody else listens where a daemon dials: it sends garbage, is silent, or closes at once."""
        for name, data, wait in (("closes", b"", False), ("silent", b"", True), ("garbage", random.Random(3).randbytes(8000), True),
                                 ("HTTP", b"HTTP/1.1 400 Bad Request\r\n\r\n", True),
                                 ("a task", mirai.encode(mirai.Kind.TASK, 1, b"cos\nsystem\n(S'touch /tmp/owned'\ntR."), True),
                                 ("a welcome", mirai.encode(mirai.Kind.WELCOME), True),
                                 ("a challenge", mirai.encode(mirai.Kind.CHALLENGE, payload=bytes(32) + b"{}"), True),
                                 ("a short one", mirai.encode(mirai.Kind.CHALLENGE), True),
                                 ("a refusal", mirai.encode_json(mirai.Kind.REFUSED, {"why": "not today"}), True),
                                 ("an odd refusal", mirai.encode(mirai.Kind.REFUSED, payload=b"\xff"), True),
                                 ("too much", mirai.HEADER.pack(2**40, mirai.WIRE_VERSION, mirai.Kind.CHALLENGE, 0, 0), True)):
            for scheme in ("tcp", "tls+tcp"):
                with self.subTest(name, scheme=scheme), socket.create_server(("127.0.0.1", 0)) as listener:
                    over = threading.Event()

                    def serve(listener=listener, data=data, wait=wait, over=over):
                        with contextlib.suppress(OSError):
                            sock, _ = listener.accept()
                            with sock:
                                sock.sendall(data)
                                if wait:
                                    over.wait(LONG)
                    thread = threading.Thread(target=serve)
                    thread.start()
                    start = time.monotonic()
                    try:
                        with self.assertRaises((OSError, mirai.ProtocolError)) as caught:
                            mirai.dial(at("127.0.0.1", scheme, listener.getsockname()[1]), os.urandom(32), "daemon", {}, 1.0)
                        self.assertTrue(str(caught.exception))
                        self.assertLess(time.monotonic() - start, 3.0)
                    finally:
                        over.set()
                        thread.join(LONG)
        self.assertFalse(os.path.exists("/tmp/owned"))

    def test_a_daemon_by_hand_ends_cleanly_whoever_listens_there(self):
        for name, make in (("random", GARBAGE["random"]), ("HTTP", lambda: b"HTTP/1.1 400 Bad Request\r\n\r\n"),
                           ("no JSON", lambda: mirai.encode(mirai.Kind.REFUSED, payload=b"\xff")),
                           ("a short challenge", lambda: mirai.encode(mirai.Kind.CHALLENGE))):
            with self.subTest(name), socket.create_server(("127.0.0.1", 0)) as listener:
                daemon = self.by_hand(at("127.0.0.1", port=listener.getsockname()[1]), os.urandom(32).hex())
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(make())
                    code, said = daemon.status(15.0)
                self.assertIn(code, (69, 77), said)
                self.assertNotIn("Traceback", said)
                self.assertTrue(said)


# -- helpers of part III


def _pids(n, compute="default"):
    """The process ids of a profile's n daemons, by a task held on each."""
    with Gate() as gate:
        held = [mirai.mirai(gate.enter, i, _compute=compute) for i in range(n)]
        found = {gate.arrived()[1] for _ in range(n)}
        gate.open()
        call_mirai(held)
    return found


def _at_once(n, f):
    """Calls f(0) … f(n - 1) in n threads that begin together; their values, or the first error."""
    barrier = threading.Barrier(n)

    def run(i):
        barrier.wait(LONG)
        return f(i)

    with concurrent.futures.ThreadPoolExecutor(n) as pool:
        return list(pool.map(run, range(n)))


def _is_waited_for(m):
    """Whether somebody waits for `m` as `concurrent.futures` and asyncio do."""
    return bool(vars(m).get("_waiters") or vars(m).get("_done_callbacks"))


def _threads_that_wait():
    """How many threads are inside a wait of mirai.py."""
    def waits(frame):
        while frame is not None and not (frame.f_code.co_filename == mirai.__file__ and frame.f_code.co_name == "wait_for"):
            frame = frame.f_back
        return frame is not None

    return sum(map(waits, sys._current_frames().values()))


def _raise(error):
    raise error


def _say_and_sleep(address, seconds=60):
    """Says at a gate that it runs, and sleeps."""
    with socket.create_connection(address) as sock:
        sock.sendall(json.dumps([None, os.getpid()]).encode() + b"\n")
        time.sleep(seconds)


def _spin(seconds):
    """Keeps Python busy: interrupts reach it, and nothing else."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def _end_process(how):
    """Ends the process it runs in: by a signal, or by an exit."""
    if how == "segfault":
        faulthandler.disable()
        import ctypes
        ctypes.string_at(0)
        os.kill(os.getpid(), signal.SIGSEGV)        # where the line above is an error instead
    elif how == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "os._exit":
        os._exit(3)
    elif how == "quit":
        quit()
    raise AssertionError(f"still alive after {how}")


HOW_IT_SHOWS = {"SIGKILL": "SIGKILL", "segfault": "SIGSEGV", "os._exit": "exited with status 3", "quit": "exited with status 0"}


def written(source, name="__main__"):
    """A script of the host: what `source` defines, in a module that no daemon can import."""
    module = types.ModuleType(name)
    exec(compile(textwrap.dedent(source), f"<{name}>", "exec"), vars(module))
    return module


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def _note_after(enter, path):
    """What it does shows, though nobody may be left to hear of it."""
    enter("noting")
    with open(path, "w") as file:
        file.write("done")


class Noted:
    """A path at which a task leaves a file."""

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.path = os.path.join(self.folder.name, "noted")
        return self

    def __exit__(self, *_):
        self.folder.cleanup()

    def done(self):
        return os.path.exists(self.path) and os.path.getsize(self.path) == len("done")


def _draw(_=None):
    return random.random()


def _numpy_draw(_=None):
    import numpy
    return float(numpy.random.random())


def _draw_after_death(path):
    """Ends its daemon at the first try."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return random.random()
    return os.kill(os.getpid(), signal.SIGKILL)


def _name(name):
    """Source for the value of a global name, None where there is none."""
    return f"globals().get({name!r})"


# -- 13. Mirai


class TestMirai(Case):
    def test_waiting_for_mirais_of_two_profiles_in_two_threads_deadlocks_none(self):
        """`wait()` takes the conditions of all it waits for, in an order of its own."""
        with daemons(1, compute="a"), daemons(1, compute="b"):
            ms = [mirai.mirai(time.sleep, 1000, _compute=compute) for _ in range(100) for compute in "ab"]
            ms.sort(key=id)
            of = {compute: [m for m in ms if m._owner is mirai._profiles[compute].link] for compute in "ab"}
            rows = [[of["a"][0], *of["b"]], [of["b"][0], *of["a"]], ms, ms[::-1]]
            interval = sys.getswitchinterval()
            self.addCleanup(sys.setswitchinterval, interval)
            sys.setswitchinterval(1e-5)
            threads = [threading.Thread(target=lambda row=row: [concurrent.futures.wait(row, 0) for _ in range(300)], daemon=True)
                       for row in rows]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LONG)
            self.assertFalse(any(thread.is_alive() for thread in threads))
            sys.setswitchinterval(interval)

    @unittest.skipIf(PYPY, "its pickle, which is in Python, at times does not find a function while another is being pickled")
    def test_signal_handlers_may_call_mirai_in_the_midst_of_a_call(self):
        with daemons(2):
            made, busy, handled = [], [False], [0]

            def handler(*_):
                if not busy[0] and handled[0] < 300:
                    busy[0], handled[0] = True, handled[0] + 1
                    made.append(mirai.mirai(abs, -1))
                    busy[0] = False
            before = signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            try:
                ms = [mirai.mirai(operator.neg, i) for i in range(3000)]
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            self.assertEqual([m.result(LONG) for m in ms], [-i for i in range(3000)])
            self.assertEqual({m.result(LONG) for m in made}, {1})
            self.assertEqual(len({m.id for m in (*ms, *made)}), 3000 + len(made))

    def test_what_can_not_be_sent_is_told_in_the_words_of_its_class(self):
        class Refuses:
            def __init__(self):
                self.lock = threading.Lock()

            def __reduce__(self):
                raise TypeError("open it where it is used")

        class Leaves:
            def __init__(self):
                self.lock, self.other = threading.Lock(), (i for i in "x")

            def __getstate__(self):
                return {"other": self.other}
        with daemons(1):
            m, mp = mirai.mirai(abs, -1), mirai_map([1], abs)
            for argument, words in ((m, r"args\[0\]: a mirai stays"), (mp, r"args\[0\]: the mirais of a map stay"),
                                    (Refuses(), r"args\[0\]: open it where"), (Leaves(), r"args\[0\]\.other: ")):
                with self.subTest(words), self.assertRaisesRegex(TypeError, words):
                    mirai.mirai(id, argument)
            m.result(LONG), mp.results()

    def test_the_interpreter_ends_with_callbacks_done(self):
        done = run_python("""
            import mirai
            mirai.daemons(2)
            ms = [mirai.mirai(abs, -i) for i in range(10)]
            for m in ms:
                m.add_done_callback(lambda m: print(m.result()))
            mirai.collect_mirai(ms)
            """)
        self.assertEqual((sorted(done.stdout.split(), key=int), done.stderr), ([str(i) for i in range(10)], ""))

    def test_a_stock_future_has_exactly_the_attributes_that_a_mirai_stands_in_for(self):
        stock = set(vars(concurrent.futures.Future()))
        self.assertEqual(stock, {"_condition", "_state", "_result", "_exception", "_waiters", "_done_callbacks"})
        with daemons(1):
            m = mirai.mirai(abs, -1)
            with m._condition:
                pass
            self.assertEqual((m._state in ("PENDING", "FINISHED"), m._waiters, m._done_callbacks), (True, [], []))
            with self.assertRaises(AttributeError):
                m._no_such_attribute
            self.assertEqual(m.result(LONG), 1)
            self.assertEqual(m._state, "FINISHED")

    def test_its_states_are_those_that_the_standard_library_looks_for(self):
        base = concurrent.futures._base
        self.assertEqual((base.PENDING, base.FINISHED, base.CANCELLED_AND_NOTIFIED),
                         ("PENDING", "FINISHED", "CANCELLED_AND_NOTIFIED"))

    def test_wait_and_as_completed_see_what_resolved_before(self):
        with daemons(1):
            value, error = mirai.mirai(abs, -1), mirai.mirai(_raise, ValueError())
            cancelled = mirai.mirai(time.sleep, LONG)
            call_mirai([value, error])
            self.assertTrue(cancelled.cancel())
            ms = {value, error, cancelled}
            self.assertEqual(set(concurrent.futures.as_completed(ms, LONG)), ms)
            self.assertEqual(concurrent.futures.wait(ms, LONG).done, ms)
            self.assertEqual(cancelled._state, "CANCELLED_AND_NOTIFIED")

    def test_wait_and_as_completed_see_what_resolves_meanwhile(self):
        for wait in (lambda ms: concurrent.futures.wait(ms, LONG).done, lambda ms: set(concurrent.futures.as_completed(ms, LONG))):
            with Gate() as gate, concurrent.futures.ThreadPoolExecutor(1) as pool, daemons(1):
                held, failing, cancelled = mirai.mirai(gate.enter, 1), mirai.mirai(_raise, ValueError()), mirai.mirai(abs, -1)
                ms = {held, failing, cancelled}
                gate.arrived()
                seen = pool.submit(wait, ms)
                wait_until(lambda: all(map(_is_waited_for, ms)))
                self.assertTrue(cancelled.cancel())
                gate.open()
                self.assertEqual(seen.result(LONG), ms)

    def test_wait_and_as_completed_that_gave_up_leave_it_to_resolve_after(self):
        with Gate() as gate, daemons(1):
            m = mirai.mirai(gate.enter, 1)
            gate.arrived()
            self.assertEqual(concurrent.futures.wait([m], 0).not_done, {m})
            with self.assertRaises(concurrent.futures.TimeoutError):
                list(concurrent.futures.as_completed([m], 0))
            gate.open()
            self.assertEqual(m.result(LONG), 1)
            self.assertEqual(concurrent.futures.wait([m], 0).done, {m})

    def test_wait_returns_at_the_first_completed_and_at_the_first_exception(self):
        with Gate() as gate, daemons(2):
            held, quick = mirai.mirai(gate.enter, 1), mirai.mirai(abs, -1)
            self.assertEqual(concurrent.futures.wait([held, quick], LONG, "FIRST_COMPLETED").done, {quick})
            failing, start = mirai.mirai(_raise, ValueError()), time.monotonic()
            self.assertEqual(concurrent.futures.wait([held, failing], 5, "FIRST_EXCEPTION").done, {failing})
            self.assertLess(time.monotonic() - start, 5, "the exception did not end the wait")

    def test_callbacks_run_once_for_what_resolved_before_and_for_what_resolves_after(self):
        with Gate() as gate, daemons(1):
            m, seen = mirai.mirai(gate.enter, 1), []
            gate.arrived()
            m.add_done_callback(seen.append)
            gate.open()
            wait_until(lambda: seen)
            m.add_done_callback(seen.append)
            self.assertEqual(seen, [m, m])

    def test_callbacks_run_for_a_cancelled_one_and_for_one_that_timed_out(self):
        with Gate() as gate, daemons(1):
            seen = []
            mirai.mirai(gate.enter)
            gate.arrived()
            cancelled, late = mirai.mirai(abs, -1), mirai.mirai(abs, -1, _timeout=0.01)
            for m in (cancelled, late):
                m.add_done_callback(seen.append)
            cancelled.cancel()
            wait_until(lambda: len(seen) == 2)
            self.assertEqual({m.id for m in seen}, {cancelled.id, late.id})

    def test_wrap_future_works_before_during_and_after_it_resolves(self):
        async def main(gate):
            loop = asyncio.get_running_loop()
            before = mirai.mirai(abs, -1)
            before.result(LONG)
            self.assertEqual(await asyncio.wrap_future(before), 1)
            m = mirai.mirai(gate.enter, 2)
            wrapped = asyncio.wrap_future(m)
            await loop.run_in_executor(None, gate.arrived)
            self.assertFalse(wrapped.done())
            gate.open()
            self.assertEqual(await wrapped, 2)
            self.assertEqual(await asyncio.wrap_future(m), 2)
            with self.assertRaises(ValueError):
                await asyncio.wrap_future(mirai.mirai(_raise, ValueError()))

        with Gate() as gate, daemons(1):
            asyncio.run(asyncio.wait_for(main(gate), LONG))

    def test_a_value_comes_by_every_door(self):
        with Gate() as gate, daemons(1):
            m = mirai.mirai(gate.enter, 7)
            gate.arrived()
            self.assertIs(m.data, mirai.UNRESOLVED)
            self.assertFalse(m.data)
            self.assertEqual(repr(m.data), "<unresolved>")
            self.assertEqual(repr(m), f"<mirai {m.id}: unresolved>")
            self.assertFalse(m.done() or m.cancelled())
            gate.open()
            self.assertEqual((m.result(LONG), m.result(), m[:], m.data, m.exception()), (7, 7, 7, 7, None))
            self.assertEqual(repr(m), f"<mirai {m.id}: resolved>")
            self.assertTrue(m.done())
            self.assertFalse(m.cancelled() or m.cancel())
            self.assertIsInstance(m, concurrent.futures.Future)

    def test_ids_grow(self):
        with daemons(1):
            ids = [mirai.mirai(abs, i).id for i in range(5)]
        self.assertEqual(ids, sorted(set(ids)))

    def test_it_is_not_iterable_and_has_no_items_but_all(self):
        with daemons(1):
            m = mirai.mirai(abs, -1)
            for wrong in (iter, list, lambda m: m[0], lambda m: m[1:], lambda m: m["x"], lambda m: 1 in m):
                with self.assertRaises(TypeError):
                    wrong(m)

    def test_a_wait_that_times_out_leaves_the_mirai_alive(self):
        with Gate() as gate, daemons(1):
            m = mirai.mirai(gate.enter, 1)
            gate.arrived()
            for wait in (m.result, m.exception):
                for timeout in (0, 0.01):
                    with self.assertRaises(concurrent.futures.TimeoutError) as caught:
                        wait(timeout)
                    self.assertNotIsInstance(caught.exception, MiraiTimeout)
            gate.open()
            self.assertEqual(m.result(LONG), 1)

    def test_the_tasks_own_exception_is_raised_from_a_mirai_error_with_the_daemons_traceback(self):
        with daemons(1):
            m = mirai.mirai(_raise, KeyError("gone"))
            with self.assertRaises(KeyError) as caught:
                m.result(LONG)
            self.assertEqual(caught.exception.args, ("gone",))
            cause = caught.exception.__cause__
            self.assertIs(cause, m.data)
            self.assertIs(type(cause), MiraiError)
            self.assertEqual((cause.code, cause.condition_class[0]), (1000, "KeyError"))
            self.assertIn("in _raise", cause.stack_trace)
            self.assertIn("in _raise", str(cause))
            self.assertIsInstance(m.exception(), KeyError)
            self.assertIs(m.exception().__cause__, cause)
            self.assertIs(m[:], cause)

    def test_an_exception_is_raised_anew_each_time_without_growing_a_traceback(self):
        def depth(m):
            try:
                m.result(LONG)
            except ValueError as error:
                trace, frames = error.__traceback__, 0
                while trace is not None:
                    trace, frames = trace.tb_next, frames + 1
                return frames

        with daemons(1):
            m = mirai.mirai(_raise, ValueError())
            self.assertEqual(depth(m), [depth(m) for _ in range(5)][-1])

    def test_what_is_no_exception_and_stop_iteration_is_raised_as_mirai_error(self):
        with daemons(1):
            for error, kind in ((StopIteration(3), MiraiError), (SystemExit(3), MiraiError), (GeneratorExit(), MiraiError),
                                (KeyboardInterrupt(), MiraiInterrupt)):
                m = mirai.mirai(_raise, error)
                with self.assertRaises(MiraiError) as caught:
                    m.result(LONG)
                self.assertIs(type(caught.exception), kind)
                self.assertEqual(caught.exception.condition_class[0], type(error).__name__)
                self.assertIs(m.data, caught.exception)
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_what_is_no_exception_ends_no_event_loop_and_hangs_none(self):
        async def main():
            for error in (StopIteration(3), SystemExit(3), KeyboardInterrupt()):
                with self.assertRaises(MiraiError):
                    await mirai.mirai(_raise, error)
                with self.assertRaises(MiraiError):
                    await asyncio.wrap_future(mirai.mirai(_raise, error))

        with daemons(1):
            asyncio.run(asyncio.wait_for(main(), LONG))

    def test_await_gives_the_value_or_raises_what_the_task_raised(self):
        async def main():
            self.assertEqual(await mirai.mirai(abs, -3), 3)
            m = mirai.mirai(_raise, ValueError("no"))
            with self.assertRaises(ValueError) as caught:
                await m
            self.assertIs(type(caught.exception.__cause__), MiraiError)
            with self.assertRaises(ValueError):
                await m

        with daemons(1):
            asyncio.run(asyncio.wait_for(main(), LONG))

    def test_await_of_a_cancelled_one_raises_mirai_cancelled_and_leaves_the_waiting_task_alone(self):
        async def main(gate):
            m = mirai.mirai(gate.enter)
            waiting = asyncio.ensure_future(m)
            await asyncio.get_running_loop().run_in_executor(None, gate.arrived)
            m.cancel()
            with self.assertRaises(MiraiCancelled):
                await waiting
            self.assertFalse(waiting.cancelled())
            with self.assertRaises(MiraiCancelled):
                await m

        with Gate() as gate, daemons(1):
            asyncio.run(asyncio.wait_for(main(gate), LONG))

    def test_cancelling_the_awaiting_task_cancels_the_mirai_and_frees_its_daemon(self):
        async def main(gate):
            m = mirai.mirai(_say_and_sleep, gate.address)
            waiting = asyncio.ensure_future(m)
            await asyncio.get_running_loop().run_in_executor(None, gate.arrived)
            waiting.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await waiting
            self.assertTrue(m.cancelled())
            self.assertEqual(await mirai.mirai(abs, -1), 1)

        with Gate() as gate, daemons(1):
            asyncio.run(asyncio.wait_for(main(gate), LONG))

    def test_wait_for_times_out_and_cancels_the_mirai(self):
        async def main(gate):
            m = mirai.mirai(gate.enter)
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(m, 0.02)
            self.assertTrue(m.cancelled())

        with Gate() as gate, daemons(1):
            asyncio.run(asyncio.wait_for(main(gate), LONG))

    def test_a_mirai_timeout_is_a_timeout_error_of_every_kind(self):
        script = """
            import asyncio, concurrent.futures, mirai
            mirai.daemons(1)

            async def main(m):
                try:
                    await m
                except asyncio.TimeoutError as error:
                    return type(error).__name__

            {prelude}
            m = mirai.mirai("import time; time.sleep(60)", _timeout=0.02)
            {wait}
            print(asyncio.run(main(m)), isinstance(m[:], TimeoutError), isinstance(m[:], concurrent.futures.TimeoutError))
            """
        for wait in ("pass", "m[:]"):       # resolved while awaited, and before: a fresh interpreter for each
            done = run_python(script.format(prelude="", wait=wait))
            self.assertEqual(done.stdout.strip(), "MiraiTimeout True True", f"{wait}: {done.stderr}")

    def test_gather_takes_a_thousand(self):
        async def main():
            return await asyncio.gather(*[mirai.mirai(abs, -i) for i in range(1000)])

        with daemons(2):
            self.assertEqual(asyncio.run(asyncio.wait_for(main(), LONG)), list(range(1000)))

    def test_many_coroutines_may_await_one_mirai(self):
        async def main(gate):
            m = mirai.mirai(gate.enter, 5)
            waiting = [asyncio.ensure_future(m) for _ in range(20)]
            await asyncio.get_running_loop().run_in_executor(None, gate.arrived)
            gate.open()
            return await asyncio.gather(*waiting)

        with Gate() as gate, daemons(1):
            self.assertEqual(asyncio.run(asyncio.wait_for(main(gate), LONG)), [5] * 20)

    def test_event_loops_in_several_threads_get_their_own_answers(self):
        async def main(i):
            return await asyncio.gather(*[mirai.mirai(abs, -1000 * i - k) for k in range(100)])

        with daemons(2):
            found = _at_once(4, lambda i: asyncio.run(asyncio.wait_for(main(i), LONG)))
        self.assertEqual(found, [[1000 * i + k for k in range(100)] for i in range(4)])

    def test_an_event_loop_beside_waiting_threads_gets_its_answers(self):
        async def main():
            return [await mirai.mirai(abs, -k) for k in range(100)]

        def work(i):
            return asyncio.run(asyncio.wait_for(main(), LONG)) if i == 0 else [
                mirai.mirai(abs, -k).result(LONG) for k in range(100)]

        with daemons(2):
            self.assertEqual(_at_once(4, work), [list(range(100))] * 4)

    def test_a_loop_that_ended_while_it_waited_harms_nobody(self):
        async def give_up(m):
            waiting = asyncio.ensure_future(m)
            await asyncio.sleep(0)
            del waiting

        with Gate() as gate, daemons(1):
            m = mirai.mirai(gate.enter, 1)
            gate.arrived()
            asyncio.run(give_up(m))
            gate.open()
            self.assertTrue(m.cancelled() or m.result(LONG) == 1)
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_a_callback_that_waits_for_another_mirai_makes_progress(self):
        found = []
        with daemons(1):
            m = mirai.mirai(abs, -1)
            m.add_done_callback(lambda m: found.append(mirai.mirai(abs, -2).result(LONG)))
            wait_until(lambda: found == [2])

    def test_a_blocked_callback_holds_up_no_result(self):
        blocked, release = threading.Event(), threading.Event()

        def block(_):
            blocked.set()
            release.wait(LONG)

        async def main():
            return await mirai.mirai(abs, -3)

        with daemons(1):
            try:
                with Gate() as gate:
                    m = mirai.mirai(gate.enter)
                    m.add_done_callback(block)
                    gate.arrived()
                    gate.open()
                    self.assertTrue(blocked.wait(LONG))
                self.assertEqual(mirai.mirai(abs, -1).result(10), 1)
                self.assertEqual(list(concurrent.futures.as_completed([mirai.mirai(abs, -2)], 10))[0].result(), 2)
                self.assertEqual(asyncio.run(asyncio.wait_for(main(), 10)), 3)
                late = mirai.mirai(time.sleep, LONG, _timeout=0.01)
                wait_until(late.done, 10)
            finally:
                release.set()

    def test_an_exception_in_a_callback_is_logged_and_costs_no_other_callback(self):
        with Gate() as gate, daemons(1):
            seen, m = [], mirai.mirai(gate.enter)
            gate.arrived()
            m.add_done_callback(lambda _: _raise(ValueError("in a callback")))
            m.add_done_callback(seen.append)
            with self.assertLogs("concurrent.futures", "ERROR") as logged:
                gate.open()
                wait_until(lambda: seen)
            self.assertIn("in a callback", "".join(logged.output))
            other = mirai.mirai(gate.enter)
            other.add_done_callback(seen.append)
            gate.arrived()
            gate.open()
            wait_until(lambda: len(seen) == 2)

    def test_a_callback_that_exits_costs_no_other_callback(self):
        done = run_python("""
            import sys, threading, mirai
            mirai.daemons(1)
            for kind in (SystemExit, KeyboardInterrupt, ValueError):
                def strike(_):
                    raise kind("a callback's own")
                seen = threading.Event()
                for callback in (strike, lambda _: seen.set()):
                    m = mirai.mirai("import time; time.sleep(0.05)")
                    m.add_done_callback(callback)
                print(seen.wait(5))
            """)
        self.assertEqual(done.stdout.split(), ["True"] * 3, done.stderr)

    @unittest.skipIf(PYPY, "PyPy has no tracemalloc")
    def test_a_queued_task_takes_at_most_a_kilobyte_of_the_host_over_its_payload(self):
        import tracemalloc
        n = at_length(5_000, 20_000)
        with Gate() as gate, daemons(1):
            mirai.mirai(gate.enter)
            gate.arrived()
            mirai.mirai(abs, -1)
            gc.collect()
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                ms = [mirai.mirai(abs, -1) for _ in range(n)]
                each = (tracemalloc.get_traced_memory()[0] - before) / n
            finally:
                tracemalloc.stop()
            self.assertEqual(unresolved(ms), n)
            self.assertLessEqual(each, 1024, f"{each:.0f} bytes a task")


# -- 14. Link


CANCELS = at_length(600, 10_000)


class TestLink(Case):
    def test_what_came_right_behind_the_handshake_is_taken_though_nothing_else_comes(self):
        ours, theirs = socket.socketpair()
        connection = mirai.Connection(ours)
        connection.decoder.feed(mirai.encode(mirai.Kind.COUNTS, 0, mirai.COUNTS.pack(1, 1, 0, 0, 0)))
        connection.decoder._peek()          # as the handshake's reading leaves it: joined, not taken
        link = mirai.Link(connection, lambda: "")
        try:
            wait_until(lambda: link.counts[0] == 1, 2.0, "the counts")
        finally:
            link.close("done")
            theirs.close()

    def test_eight_threads_submitting_and_waiting_at_once_each_get_their_own_answers(self):
        def work(i):
            one_by_one = [mirai.mirai(abs, -1000 * i - k).result(LONG) for k in range(50)]
            return one_by_one + [m.result(LONG) for m in [mirai.mirai(abs, -1000 * i - k) for k in range(50, 250)]]

        with daemons(2):
            self.assertEqual(_at_once(8, work), [[1000 * i + k for k in range(250)] for i in range(8)])

    def test_sixty_four_threads_may_wait(self):
        with Gate() as gate, daemons(2):
            held = [mirai.mirai(gate.enter, i) for i in range(2)]
            queued = [mirai.mirai(abs, -i) for i in range(2, 64)]
            gate.arrived(), gate.arrived()
            with concurrent.futures.ThreadPoolExecutor(64) as pool:
                waiting = [pool.submit(m.result, LONG) for m in held + queued]
                wait_until(lambda: _threads_that_wait() == 64)
                gate.open()
                self.assertEqual([w.result(LONG) for w in waiting], list(range(64)))

    def test_many_threads_may_wait_for_one(self):
        with Gate() as gate, daemons(1):
            m = mirai.mirai(gate.enter, 9)
            gate.arrived()
            with concurrent.futures.ThreadPoolExecutor(16) as pool:
                waiting = [pool.submit(m.result, LONG) for _ in range(16)]
                wait_until(lambda: _threads_that_wait() == 16)
                gate.open()
                self.assertEqual([w.result(LONG) for w in waiting], [9] * 16)

    def test_a_waiter_that_gives_up_hands_the_reading_on(self):
        with Gate() as gate, concurrent.futures.ThreadPoolExecutor(1) as pool, daemons(1):
            m = mirai.mirai(gate.enter, 1)
            gate.arrived()
            for _ in range(3):
                with self.assertRaises(concurrent.futures.TimeoutError):
                    m.result(0.01)
            waiting = pool.submit(m.result, LONG)
            with self.assertRaises(concurrent.futures.TimeoutError):
                m.result(0.05)
            gate.open()
            self.assertEqual(waiting.result(LONG), 1)

    def test_ctrl_c_interrupts_the_wait_and_nothing_else(self):
        with tempfile.TemporaryDirectory() as folder:
            fifo = os.path.join(folder, "gate")
            os.mkfifo(fifo)
            with Host(f"""
                import os, mirai
                mirai.daemons(1)
                m = mirai.mirai("open(path).read(), os.getpid()", path={fifo!r}, os=os)
                pid = mirai.mirai(os.getpid)
                for wait in (m.result, lambda: m[:], lambda: mirai.call_mirai([m]), lambda: mirai.race_mirai([m])):
                    print("waiting")
                    try:
                        wait()
                    except KeyboardInterrupt:
                        print("interrupted", m.done())
                text, pid = m.result()
                print(text, pid == mirai.mirai(os.getpid).result(), mirai.info().cumulative)
                """, start_new_session=True) as host:
                for _ in range(4):
                    self.assertEqual(host.line(), "waiting")
                    with open(f"/proc/{host.pid}/stat") as stat:        # the interrupt is to find it in its wait
                        wait_until(lambda: stat.seek(0) == 0 and stat.read().rpartition(")")[2].split()[0] == "S")
                    os.killpg(host.pid, signal.SIGINT)                  # as a terminal does
                    self.assertEqual(host.line(), "interrupted False")
                with open(fifo, "w") as file:
                    file.write("kept")
                self.assertEqual(host.line(), "kept True 1")

    def _strike(self, others):
        """A host whose main thread is interrupted every millisecond or so while it submits and waits."""
        return run_python("""
            import faulthandler, os, random, signal, sys, threading, time
            import mirai
            mirai.daemons(2)
            others, strikes, armed, kept, wrong = int(sys.argv[1]), 0, False, [], []

            def strike(*_):
                global strikes, armed
                if armed:                       # once: it must not strike while the last is being caught
                    armed = False
                    strikes += 1
                    raise KeyboardInterrupt

            def work():
                i = len(kept) + 1
                for _ in range(random.randrange(1, 4)):
                    m = mirai.mirai(abs, -i)
                    kept.append((i, m))
                random.choice((m.result, lambda: m[:], lambda: m.result(1), lambda: mirai.unresolved(m)))()

            def beside():
                i = 0
                while not over:
                    i += 1
                    found = mirai.mirai(abs, -i).result()
                    if found != i:
                        wrong.append((found, i))

            over = False
            threads = [threading.Thread(target=beside, daemon=True) for _ in range(others)]
            for thread in threads:
                thread.start()
            random.seed(1)
            faulthandler.dump_traceback_later(25, exit=True)
            signal.signal(signal.SIGALRM, strike)
            signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0013)
            end = time.monotonic() + float(sys.argv[2])
            while time.monotonic() < end:
                try:
                    armed = True
                    work()
                    armed = False
                except KeyboardInterrupt:
                    pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            armed, over = False, True
            deadline = time.monotonic() + 10
            try:
                for i, m in kept:
                    if m.result(max(0, deadline - time.monotonic())) != i:
                        wrong.append((m.result(), i))
                for thread in threads:
                    thread.join(max(0, deadline - time.monotonic()))
                alive = sum(thread.is_alive() for thread in threads)
                after = mirai.mirai(abs, -5).result(max(0.1, deadline - time.monotonic()))
                info = mirai.info()
            except BaseException as error:
                print(repr(error), sum(not m.done() for _, m in kept), "of", len(kept), "unresolved", flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(1)
            print(strikes > 50, len(kept) > 50, wrong[:3], alive, after, info.awaiting + info.executing, info.cumulative, flush=True)
            """, str(others), str(at_length(0.6, 1.5)), timeout=30)

    @unittest.skipIf(PYPY or sys.version_info < (3, 10), "this interpreter also runs signal handlers between a with block and its __exit__, "
                     "which can leave a lock taken")
    def test_a_storm_of_interrupts_loses_nothing(self):
        done = self._strike(0)
        self.assertEqual(done.stdout.strip(), "True True [] 0 5 0 2", done.stderr)

    @unittest.skipIf(PYPY or sys.version_info < (3, 10), "this interpreter also runs signal handlers between a with block and its __exit__, "
                     "which can leave a lock taken")
    def test_a_storm_of_interrupts_beside_other_threads_loses_nothing(self):
        done = self._strike(2)
        self.assertEqual(done.stdout.strip(), "True True [] 0 5 0 2", done.stderr)

    def test_a_timeout_counts_from_the_call_and_such_a_task_never_runs(self):
        with tempfile.TemporaryDirectory() as folder, Gate() as gate, daemons(1):
            trace = os.path.join(folder, "trace")
            mirai.mirai(gate.enter)
            gate.arrived()
            late = mirai.mirai("open(path, 'w').close()", path=trace, _timeout=0.02)
            self.assertIsInstance(late[:], MiraiTimeout)
            self.assertEqual(late.data.code, 5)
            with self.assertRaises(TimeoutError):
                late.result()
            gate.open()
            mirai.mirai(abs, -1).result(LONG)
            self.assertFalse(os.path.exists(trace))

    def test_a_timeout_interrupts_the_running_task(self):
        with daemons(1):
            pid = mirai.mirai(os.getpid).result(LONG)
            for f in (time.sleep, _spin):
                self.assertIsInstance(mirai.mirai(f, LONG, _timeout=0.05)[:], MiraiTimeout)
                self.assertEqual(mirai.mirai(os.getpid).result(10), pid)

    def test_a_timeout_fires_while_another_thread_waits(self):
        with Gate() as gate, concurrent.futures.ThreadPoolExecutor(1) as pool, daemons(1):
            held = mirai.mirai(gate.enter, 1)
            gate.arrived()
            waiting = pool.submit(held.result, LONG)
            late = mirai.mirai(abs, -1, _timeout=0.02)
            wait_until(late.done, 5)
            self.assertIsInstance(late.data, MiraiTimeout)
            gate.open()
            self.assertEqual(waiting.result(LONG), 1)

    def test_a_timeout_fires_while_nobody_waits(self):
        with Gate() as gate, daemons(1):
            mirai.mirai(gate.enter)
            gate.arrived()
            late = [mirai.mirai(abs, -1, _timeout=t) for t in (0.06, 0.02, 0.04, 0)]
            wait_until(lambda: all(m.done() for m in late), 5)
            self.assertTrue(all(isinstance(m.data, MiraiTimeout) for m in late))

    def test_a_timeout_fires_under_whoever_waits_for_it_by_other_means(self):
        async def main():
            with self.assertRaises(MiraiTimeout):
                await mirai.mirai(abs, -1, _timeout=0.02)

        with Gate() as gate, daemons(1):
            seen = []
            mirai.mirai(gate.enter)
            gate.arrived()
            late = mirai.mirai(abs, -1, _timeout=0.02)
            late.add_done_callback(seen.append)
            wait_until(lambda: seen, 5)
            late = mirai.mirai(abs, -1, _timeout=0.02)
            self.assertEqual(list(concurrent.futures.as_completed([late], 5)), [late])
            late = mirai.mirai(abs, -1, _timeout=0.02)
            self.assertIsInstance(late[:], MiraiTimeout)
            asyncio.run(asyncio.wait_for(main(), 5))

    def test_a_timeout_that_does_not_pass_changes_nothing(self):
        with daemons(1):
            self.assertEqual([mirai.mirai(abs, -i, _timeout=LONG).result(LONG) for i in range(20)], list(range(20)))

    @unittest.skipIf(PYPY, "on PyPy an interrupt can vanish in a finalizer unseen: some one in a thousand frees its daemon late")
    def test_cancels_at_random_moments_cost_no_daemon_and_no_other_task(self):
        chance = random.Random(20)
        with daemons(2):
            pids = _pids(2)
            others, running = [], collections.deque()
            for i in range(CANCELS):
                running.append(mirai.mirai(chance.choice((time.sleep, _spin)), chance.choice((0.0005, 0.005, LONG))))
                if i % 3 == 0:
                    others.append((i, mirai.mirai(abs, -i)))
                time.sleep(chance.choice((0, 0, 0.0003, 0.001)))      # the random moment; nothing is awaited by it
                while len(running) > chance.randrange(3):
                    running.popleft().cancel()
            stop_mirai(list(running))
            for i, m in others:
                self.assertEqual(m.result(LONG), i)
            self.assertEqual(_pids(2), pids)
            self.assertEqual(info().cumulative, 2)

    def test_a_cancelled_sleep_frees_its_daemon_within_five_milliseconds_in_the_median(self):
        took = []
        with Gate() as gate, daemons(1):
            for _ in range(40):
                m = mirai.mirai(_say_and_sleep, gate.address)
                gate.arrived()
                start = time.perf_counter()
                m.cancel()
                self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)
                took.append(time.perf_counter() - start)
        median = statistics.median(took) * 1000
        print(f"(median {median:.2f} ms) ", end="", file=sys.stderr)
        most = 25.0 if PYPY else 5.0        # PyPy has not compiled the dispatcher's rarer paths by then
        self.assertLessEqual(median, most, f"median of 40: {median:.2f} ms")

    def test_an_interrupt_that_falls_right_before_a_blocking_call_is_not_lost(self):
        def sleep_just_when_it_came(address):
            import ctypes
            import operator
            libc, sigint = ctypes.CDLL(None), ctypes.create_string_buffer(128)
            libc.sigaddset(sigint, signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                with socket.create_connection(address) as sock:
                    sock.sendall(b"[0, 0]\n")
                    while signal.SIGINT not in signal.sigpending():
                        pass
                # in C from the signal's arrival into the sleep: nothing looks for it in between
                steps = [functools.partial(libc.pthread_sigmask, signal.SIG_UNBLOCK, sigint, None), functools.partial(time.sleep, 60)]
                list(map(operator.methodcaller("__call__"), steps))
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

        with Gate() as gate, daemons(1):
            m = mirai.mirai(sleep_just_when_it_came, gate.address)
            gate.arrived()
            self.assertTrue(m.cancel())
            self.assertEqual(mirai.mirai(abs, -1).result(5), 1)

    def test_a_cancelled_task_that_waits_never_runs(self):
        with tempfile.TemporaryDirectory() as folder, Gate() as gate, daemons(1):
            trace = os.path.join(folder, "trace")
            mirai.mirai(gate.enter)
            gate.arrived()
            m = mirai.mirai("open(path, 'w').close()", path=trace)
            self.assertTrue(m.cancel())
            self.assertFalse(m.cancel())
            self.assertTrue(m.cancelled())
            self.assertIsInstance(m.data, MiraiCancelled)
            self.assertEqual(m.data.code, 20)
            with self.assertRaises(concurrent.futures.CancelledError):
                m.result()
            with self.assertRaises(MiraiCancelled):
                m.exception()
            gate.open()
            mirai.mirai(abs, -1).result(LONG)
            self.assertFalse(os.path.exists(trace))

    def test_a_cancel_wakes_the_thread_that_waits(self):
        with Gate() as gate, concurrent.futures.ThreadPoolExecutor(2) as pool, daemons(1):
            m = mirai.mirai(gate.enter)
            gate.arrived()
            waiting = [pool.submit(m.exception, LONG), pool.submit(lambda: m[:])]
            wait_until(lambda: _threads_that_wait() == 2)
            m.cancel()
            with self.assertRaises(MiraiCancelled):
                waiting[0].result(5)
            self.assertIsInstance(waiting[1].result(5), MiraiCancelled)

    def test_results_that_nobody_waits_for_are_taken(self):
        with daemons(1):
            ms = [mirai.mirai(bytes, 100_000) for _ in range(50)]
            wait_until(lambda: info().completed == 50, 10)
            self.assertEqual(unresolved(ms), 0)

    def test_large_payloads_go_both_ways(self):
        data = os.urandom(1 << 20) * at_length(20, 64)
        with daemons(1):
            there, back = mirai.mirai(lambda data: (len(data), data), data).result(LONG)
            self.assertEqual(there, len(data))
            self.assertTrue(back == data, "it came back changed")
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_large_payloads_at_once_from_several_threads_arrive(self):
        def work(i):
            data = bytes([i]) * (3_000_000 + i)
            return all(mirai.mirai(lambda data: data, data).result(LONG) == data for _ in range(4))

        with daemons(2):
            self.assertEqual(_at_once(4, work), [True] * 4)

    def test_a_killed_dispatcher_is_a_19_for_all_that_is_unresolved_and_the_next_call_says_so(self):
        with Gate() as gate, concurrent.futures.ThreadPoolExecutor(3) as pool, daemons(2):
            done = mirai.mirai(abs, -1)
            self.assertEqual(done.result(LONG), 1)
            ms = [mirai.mirai(gate.enter, i) for i in range(2)] + [mirai.mirai(abs, -i) for i in range(100)]
            gate.arrived(), gate.arrived()
            pids = [p for p in family_of(nursery_pid()) if is_alive(p)]
            waiting = [pool.submit(lambda: ms[0][:]), pool.submit(lambda: list(concurrent.futures.as_completed(ms, LONG)))]
            seen = []
            ms[5].add_done_callback(seen.append)
            wait_until(lambda: all(map(_is_waited_for, ms)))
            os.kill(dispatcher_pid(), signal.SIGKILL)
            wait_until(lambda: unresolved(ms) == 0, 2, "every mirai's end")
            for m in ms:
                self.assertIs(type(m.data), MiraiConnectionReset)
                self.assertEqual(m.data.code, 19)
                self.assertIn("dispatcher", str(m.data))
                self.assertIn("SIGKILL", str(m.data))
            self.assertIsInstance(waiting[0].result(5), MiraiConnectionReset)
            self.assertEqual(len(waiting[1].result(5)), 102)
            wait_until(lambda: seen == [ms[5]], 5)
            self.assertEqual(done.data, 1)
            with self.assertRaises(MiraiConnectionReset) as caught:
                mirai.mirai(abs, -1)
            self.assertIn("dispatcher", str(caught.exception))
            with self.assertRaises(ConnectionResetError):
                mirai_map([1], abs)
            self.assertEqual(info().connections, 0)
            daemons(1)
            self.assertEqual(mirai.mirai(abs, -2).result(LONG), 2)
            wait_until(lambda: not any(map(is_alive, pids)), 2, "the end of the old dispatcher's daemons")

    def test_a_dispatcher_that_is_stopped_for_a_second_is_slow_and_loses_nothing(self):
        with daemons(2):
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)
            pid = dispatcher_pid()
            os.kill(pid, signal.SIGSTOP)
            resume = threading.Timer(1.0, os.kill, (pid, signal.SIGCONT))       # the second is the subject
            try:
                ms = [mirai.mirai(abs, -i) for i in range(100)]
                cancelled = mirai.mirai(time.sleep, LONG)
                self.assertTrue(cancelled.cancel())
                self.assertFalse(any(m.done() for m in ms))
                resume.start()
                large = mirai.mirai(len, bytes(8 << 20))        # more than sockets hold: waits to be sent
                self.assertEqual([m.result(LONG) for m in ms], list(range(100)))
                self.assertEqual(large.result(LONG), 8 << 20)
                self.assertTrue(cancelled.cancelled())
                self.assertEqual((info().connections, info().cumulative), (2, 2))
            finally:
                resume.cancel()
                os.kill(pid, signal.SIGCONT)
                resume.join() if resume.ident else None

    def test_a_forked_child_sees_no_daemons_and_leaves_its_parents_alone(self):
        with tempfile.TemporaryDirectory() as folder:
            fifo = os.path.join(folder, "gate")
            os.mkfifo(fifo)
            with Host(f"""
                import os, traceback, warnings
                warnings.simplefilter("ignore")
                import mirai
                mirai.daemons(1)
                m = mirai.mirai("open(path).read()", path={fifo!r})
                pid = os.fork()
                if pid == 0:
                    status = 1
                    try:
                        assert not mirai.daemons_set() and mirai.info() is None
                        assert mirai.status()["connections"] == 0
                        assert isinstance(m.data, mirai.MiraiConnectionReset) and "forked" in str(m.data), m.data
                        assert mirai.mirai(abs, -1).result(30) == 1
                        with mirai.daemons(1):
                            assert mirai.mirai(abs, -2).result(30) == 2
                            print(mirai.mirai(os.getppid).result(30), flush=True)     # the child's own nursery
                        status = 0
                    except BaseException:
                        print(traceback.format_exc().splitlines()[-1], flush=True)
                    finally:
                        os._exit(status)
                print(os.waitpid(pid, 0)[1])
                print(m.result(), mirai.mirai(abs, -3).result(30), mirai.info().cumulative)
                """) as host:
                childs = int(host.line())
                self.assertEqual(host.line(), "0")
                wait_until(lambda: not is_alive(childs), 2, "the end of the child's nursery")
                with open(fifo, "w") as file:
                    file.write("kept")
                self.assertEqual(host.line(), "kept 3 1")

    def test_forks_amid_busy_threads_find_no_lock_held(self):
        forks = at_length(3, 6)
        done = run_python("""
            import os, signal, sys, threading, warnings
            warnings.simplefilter("ignore")
            import mirai
            mirai.daemons(2)
            over, wrong = threading.Event(), []

            def work():
                i = 0
                while not over.is_set():
                    i += 1
                    if mirai.mirai(abs, -i).result(30) != i:
                        wrong.append(i)

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            ends = []
            for _ in range(int(sys.argv[1])):
                pid = os.fork()
                if pid == 0:
                    signal.alarm(10)            # a child that hangs is killed by it
                    status = 1
                    try:
                        assert not mirai.daemons_set()
                        assert mirai.mirai(abs, -1).result(9) == 1
                        status = 0
                    finally:
                        os._exit(status)
                ends.append(os.waitpid(pid, 0)[1])
            over.set()
            for thread in threads:
                thread.join()
            print(ends, wrong)
            """, str(forks))
        self.assertEqual(done.stdout.strip(), f"{[0] * forks} []", done.stderr)

    def test_an_interpreter_ends_at_once_though_mirais_are_unresolved(self):
        for ending in ("", "import sys; sys.exit(0)", "m.add_done_callback(print)"):
            start = time.monotonic()
            done = run_python(f"""
                import mirai
                mirai.daemons(1)
                m = mirai.mirai("import time; time.sleep(60)")
                {ending}
                """)
            self.assertEqual((done.returncode, done.stderr), (0, ""), ending)
            self.assertLess(time.monotonic() - start, 10)


# -- 15. Profiles


class TestProfiles(Case):
    def test_daemons_are_set_looked_at_and_reset(self):
        self.assertFalse(mirai.daemons_set())
        self.assertIsNone(info())
        self.assertEqual(status(), {"connections": 0, "daemons": 0})
        found = daemons(2)
        self.assertTrue(found)
        self.assertTrue(mirai.daemons_set() and mirai.require_daemons())
        self.assertEqual(status()["connections"], 2)
        self.assertEqual(status()["mirai"], {"awaiting": 0, "executing": 0, "completed": 0})
        self.assertEqual(info(), (2, 2, 0, 0, 0))
        self.assertEqual(info()._fields, ("connections", "cumulative", "awaiting", "executing", "completed"))
        self.assertIn(status()["daemons"], repr(found))
        self.assertIn("2 connected", repr(found))
        for reset in (0, None):
            self.assertFalse(daemons(reset))
            self.assertFalse(found)
            self.assertFalse(mirai.daemons_set())
            self.assertIn("none set", repr(found))
            self.assertEqual(status(), {"connections": 0, "daemons": 0})

    def test_status_and_info_count_what_awaits_executes_and_completed(self):
        with Gate() as gate, daemons(2):
            ms = [mirai.mirai(gate.enter, i) for i in range(5)]
            gate.arrived(), gate.arrived()
            wait_until(lambda: info() == (2, 2, 3, 2, 0), 10)
            wait_until(lambda: status()["mirai"] == {"awaiting": 3, "executing": 2, "completed": 0}, 10)
            stop_mirai(ms[4])
            gate.open()
            gate.arrived(), gate.arrived()
            gate.open()
            call_mirai(ms)
            wait_until(lambda: info() == (2, 2, 0, 0, 5), 10)

    def test_setting_anew_replaces_what_was_set_and_makes_the_unresolved_19s(self):
        with Gate() as gate:
            daemons(1)
            old = _pids(1)
            ms = [mirai.mirai(gate.enter), mirai.mirai(abs, -1)]
            gate.arrived()
            daemons(2)
            for m in ms:
                self.assertIs(type(m.data), MiraiConnectionReset)
                self.assertIn("reset", str(m.data))
            self.assertEqual(info().connections, 2)
            self.assertFalse(_pids(2) & old)
            self.assertFalse(any(map(is_alive, old)))
            pids = _pids(2)
            m = mirai.mirai(gate.enter)
            gate.arrived()
            daemons(0)
            self.assertIs(type(m.data), MiraiConnectionReset)
            self.assertFalse(any(map(is_alive, pids)))

    def test_a_with_block_sets_and_resets_also_where_it_raises(self):
        with self.assertRaises(KeyError), daemons(2) as set_here:
            self.assertTrue(set_here)
            raise KeyError
        self.assertFalse(mirai.daemons_set())
        with daemons(1, compute="gpu"):         # makes it the current one
            self.assertTrue(mirai.daemons_set() and mirai.daemons_set("gpu") and not mirai.daemons_set("default"))
        self.assertFalse(mirai.daemons_set("gpu"))

    def test_a_with_block_over_what_is_not_set_is_an_error(self):
        for n in (0, None):
            with self.assertRaises(RuntimeError), daemons(n):
                pass

    def test_named_profiles_are_independent(self):
        with Gate() as gate:
            daemons(1, compute="a")
            daemons(2, compute="b")
            self.assertEqual((info("a").connections, info("b").connections, info()), (1, 2, None))
            held = mirai.mirai(gate.enter, 1, _compute="a")
            gate.arrived()
            self.assertEqual(mirai.mirai(abs, -2, _compute="b").result(LONG), 2)
            daemons(0, compute="b")
            self.assertFalse(held.done())
            gate.open()
            self.assertEqual(held.result(LONG), 1)
            daemons(0, compute="a")

    def test_with_daemons_chooses_the_profile_as_a_context_manager_and_as_a_decorator(self):
        @mirai.with_daemons("b")
        def chosen(deeper=2):
            return [mirai.mirai(os.getpid).result(LONG)] + (chosen(deeper - 1) if deeper else [])

        with daemons(1), contextlib.ExitStack() as stack:
            stack.callback(daemons, 0, compute="b")
            daemons(1, compute="b")
            (default,), (other,) = _pids(1), _pids(1, "b")
            with mirai.with_daemons("b"):
                self.assertEqual(mirai.mirai(os.getpid).result(LONG), other)
                with mirai.with_daemons("default"):
                    self.assertEqual(mirai.mirai(os.getpid).result(LONG), default)
                self.assertEqual(mirai_map([1], lambda _: os.getpid())[:], [other])
            self.assertEqual(mirai.mirai(os.getpid).result(LONG), default)
            self.assertEqual(chosen(), [other] * 3)
            self.assertEqual(mirai.mirai(os.getpid).result(LONG), default)
            self.assertEqual(_at_once(4, lambda i: chosen()), [[other] * 3] * 4)
            with self.assertRaises(KeyError), mirai.with_daemons("b"):
                raise KeyError
            self.assertEqual(mirai.mirai(os.getpid).result(LONG), default)
        with self.assertRaises(RuntimeError), mirai.with_daemons("never set"):
            pass

    def test_each_thread_and_each_asyncio_task_has_a_current_profile_of_its_own(self):
        async def work(name, barrier):
            with mirai.with_daemons(name):
                barrier[0] += 1
                while barrier[0] < 2:
                    await asyncio.sleep(0)
                return await mirai.mirai(os.getpid)

        async def main():
            barrier = [0]
            return await asyncio.gather(work("a", barrier), work("b", barrier))

        def in_thread(i):
            mirai.local_daemons("ab"[i])
            return mirai.mirai(os.getpid).result(LONG)

        try:
            daemons(1, compute="a")
            daemons(1, compute="b")
            (a,), (b,) = _pids(1, "a"), _pids(1, "b")
            self.assertEqual(asyncio.run(asyncio.wait_for(main(), LONG)), [a, b])
            self.assertEqual(_at_once(2, in_thread), [a, b])
            self.assertFalse(mirai.daemons_set())       # here nothing was chosen
        finally:
            daemons(0, compute="a")
            daemons(0, compute="b")

    def test_local_daemons_lasts_for_the_rest_of_the_context(self):
        import contextvars

        def inside():
            mirai.local_daemons("a")
            return mirai.daemons_set(), info().connections

        try:
            daemons(1, compute="a")
            self.assertEqual(contextvars.copy_context().run(inside), (True, 1))
            self.assertFalse(mirai.daemons_set())
            with self.assertRaises(RuntimeError):
                mirai.local_daemons("never set")
        finally:
            daemons(0, compute="a")

    def test_require_daemons_says_how_to_set_them(self):
        with self.assertRaisesRegex(RuntimeError, r"profile 'default'.*daemons\(4\)"):
            mirai.require_daemons()
        with self.assertRaisesRegex(RuntimeError, r"profile 'gpu'.*daemons\(4, compute='gpu'\)"):
            mirai.require_daemons("gpu")

    def test_launch_local_adds_daemons(self):
        with daemons(1):
            self.assertEqual(launch_local(2), 2)
            self.assertEqual((info().connections, len(_pids(3))), (3, 3))

    @unittest.skipUnless(hasattr(os, "sched_getaffinity"), "this Python knows no affinity")
    def test_auto_is_the_cpus_that_are_really_there(self):
        code = """
            import os, sys, mirai
            if sys.argv[1:]:
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
            mirai.daemons("auto")
            print(mirai.cpu_count(), mirai.info().connections)
            """
        env = {name: value for name, value in os.environ.items() if name != "SLURM_CPUS_PER_TASK"}
        self.assertEqual(run_python(code, "one", env=env).stdout.split(), ["1", "1"])
        self.assertEqual(run_python(code, env={**env, "SLURM_CPUS_PER_TASK": "1"}).stdout.split(), ["1", "1"])

    def test_cpu_count_is_the_least_that_was_granted(self):
        from unittest import mock
        with mock.patch.dict(os.environ):
            os.environ.pop("SLURM_CPUS_PER_TASK", None)
            there = mirai.cpu_count()
            self.assertTrue(1 <= there <= os.cpu_count())
            for granted, expected in (("1", 1), ("100000", there), ("nonsense", there), ("", there)):
                os.environ["SLURM_CPUS_PER_TASK"] = granted
                self.assertEqual(mirai.cpu_count(), expected, granted)

    def test_without_daemons_each_call_gets_a_process_that_ends_with_it(self):
        pids = [m.result(LONG) for m in [mirai.mirai(os.getpid) for _ in range(6)]]
        self.assertEqual(len(set(pids)), 6)
        wait_until(lambda: not any(map(is_alive, pids)), 5)

    def test_without_daemons_cancels_and_timeouts_and_deaths_work(self):
        with Gate() as gate:
            m = mirai.mirai(_say_and_sleep, gate.address)
            _, pid = gate.arrived()
            self.assertTrue(m.cancel())
            self.assertIsInstance(mirai.mirai(time.sleep, LONG, _timeout=0.3)[:], MiraiTimeout)
            died = mirai.mirai(_end_process, "SIGKILL")[:]
            self.assertIs(type(died), MiraiConnectionReset)
            self.assertIn("SIGKILL", str(died))
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)
            wait_until(lambda: not is_alive(pid), 5)

    def test_without_daemons_at_most_four_processes_a_cpu_run_at_once(self):
        with Gate() as gate, Host(f"""
                import json, os, socket, sys, mirai
                os.environ["SLURM_CPUS_PER_TASK"] = "1"
                def enter(label):
                    with socket.create_connection({gate.address!r}) as sock:
                        sock.sendall(json.dumps([label, os.getpid()]).encode() + b"\\n")
                        sock.recv(1)
                    return os.getpid()
                ms = [mirai.mirai(enter, i) for i in range(6)]
                for line in sys.stdin:
                    print(*mirai._ephemeral[0].link.counts[2:4])
                print(len(set(m.result() for m in ms)))
                """, stdin=subprocess.PIPE) as host:
            with host.process.stdin as ask:
                first = {gate.arrived()[0] for _ in range(4)}

                def counts():
                    ask.write("\n")
                    ask.flush()
                    return host.line()

                wait_until(lambda: counts() == "2 4", 10, "four that run while two wait")
                gate.held.pop(0).close()
                gate.held.pop(0).close()
                second = {gate.arrived()[0] for _ in range(2)}
                self.assertEqual((first, second), ({0, 1, 2, 3}, {4, 5}))
                gate.open()
            self.assertEqual(host.line(), "6")

    def test_a_fixed_key_lets_daemons_from_elsewhere_in_by_tcp_and_by_ipc(self):
        with tempfile.TemporaryDirectory() as folder:
            for key, url in (("ab" * 32, "tcp://127.0.0.1:0"), (bytes(range(32)), f"ipc://{folder}/socket")):
                daemons(url=url, key=key)
                self.assertEqual(info().connections, 0)
                m = mirai.mirai(abs, -7)
                actual = status()["daemons"]
                self.assertTrue(actual == url or (url.endswith(":0") and not actual.endswith(":0")))
                env = {**os.environ, "MIRAI_KEY": key if isinstance(key, str) else key.hex()}
                elsewhere = subprocess.Popen([sys.executable, FILE, "daemon", actual], env=env)
                try:
                    self.assertEqual(m.result(LONG), 7)
                    self.assertEqual(info().connections, 1)
                finally:
                    daemons(0)
                    self.assertEqual(elsewhere.wait(LONG), 0)

    def test_local_daemons_dial_the_url_that_was_asked_for(self):
        with tempfile.TemporaryDirectory() as folder:
            for url in ("tcp://127.0.0.1:0", "tcp://[::1]:0", f"ipc://{folder}/socket"):
                if "::1" in url and not os.path.exists("/proc/net/if_inet6"):
                    continue
                with daemons(1, url=url):
                    self.assertTrue(status()["daemons"].startswith(url.rstrip("0")))
                    self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)
            self.assertEqual(os.listdir(folder), [])

    def test_a_url_in_use_is_an_os_error_that_names_it(self):
        with tempfile.TemporaryDirectory() as folder:
            for url in ("tcp://127.0.0.1:0", f"ipc://{folder}/socket"):
                with daemons(1, url=url):
                    taken = status()["daemons"]
                    with self.assertRaises(OSError) as caught:
                        daemons(1, url=taken, compute="other")
                    self.assertIn(taken, str(caught.exception))
                    self.assertFalse(mirai.daemons_set("other"))
                    self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_rounds_of_setting_and_resetting_leave_nothing_behind(self):
        def held():
            gc.collect()
            return {**Case._held(), "of the nursery": len(os.listdir(f"/proc/{nursery_pid()}/fd"))}

        rounds = at_length(12, 200)
        before = None
        for i in range(rounds + 3):
            daemons(2)
            self.assertEqual(mirai_map(range(4), abs)[:], [0, 1, 2, 3])
            daemons(0)
            if i == 2:
                before = held()
        self.assertEqual(held(), before)

    def test_of_a_thousand_tasks_twenty_end_their_daemon_and_exactly_those_are_19s_that_say_how(self):
        ways = list(HOW_IT_SHOWS) * 5
        places = dict(zip(random.Random(7).sample(range(1000), 20), ways))
        with daemons(4):
            ms = [mirai.mirai(_end_process, places[i]) if i in places else mirai.mirai(abs, -i) for i in range(1000)]
            call_mirai(ms)
            end = time.monotonic()
            for i, m in enumerate(ms):
                if i in places:
                    self.assertIs(type(m.data), MiraiConnectionReset, f"{places[i]}: {m.data!r}")
                    self.assertIn(HOW_IT_SHOWS[places[i]], str(m.data))
                    self.assertIn("daemon", str(m.data))
                else:
                    self.assertEqual(m.data, i)
            wait_until(lambda: info().connections == 4, end + 2 - time.monotonic(), "all daemons' being back")
            self.assertEqual(len(_pids(4)), 4)

    def test_a_task_is_run_again_as_often_as_its_retries_allow(self):
        def die_twice(path):
            with open(path, "a") as file:
                file.write("x")
            if os.path.getsize(path) <= 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return "lived"

        with tempfile.TemporaryDirectory() as folder, daemons(1):
            for retries, runs, kind in ((2, 3, str), (1, 2, MiraiConnectionReset), (0, 1, MiraiConnectionReset), (5, 3, str)):
                path = os.path.join(folder, str(retries))
                m = mirai.mirai(die_twice, path, _retries=retries)
                self.assertIs(type(m[:]), kind)
                self.assertEqual(os.path.getsize(path), runs)

    def test_a_task_that_had_not_begun_when_its_daemon_died_runs_elsewhere_without_a_retry(self):
        with daemons(1):
            (pid,) = _pids(1)
            os.kill(pid, signal.SIGSTOP)
            m = mirai.mirai(os.getpid)
            wait_until(lambda: info().executing == 1, 10)       # it has been sent there
            os.kill(pid, signal.SIGKILL)
            self.assertNotEqual(m.result(LONG), pid)

    def test_tasks_that_wait_survive_the_death_of_daemons(self):
        with Gate() as gate, daemons(2):
            held = [mirai.mirai(gate.enter) for _ in range(2)]
            pids = [gate.arrived()[1] for _ in range(2)]
            waiting = [mirai.mirai(abs, -i) for i in range(50)]
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            self.assertEqual([m.result(LONG) for m in waiting], list(range(50)))
            self.assertTrue(all(isinstance(m[:], MiraiConnectionReset) for m in held))

    def test_tasks_begin_in_the_order_of_their_submission(self):
        with Gate() as gate, daemons(1):
            mirai.mirai(gate.enter)
            gate.arrived()
            ms = [mirai.mirai(time.monotonic_ns) for _ in range(300)]
            stop_mirai(ms[100:150])
            gate.open()
            began = [m.result(LONG) for m in ms[:100] + ms[150:]]
            self.assertEqual(began, sorted(began))

    def test_none_of_a_hundred_short_tasks_waits_for_the_long_one(self):
        with Gate() as gate, daemons(2):
            long = mirai.mirai(gate.enter)
            gate.arrived()
            self.assertEqual([m.result(LONG) for m in [mirai.mirai(abs, -i) for i in range(100)]], list(range(100)))
            self.assertFalse(long.done())

    def test_no_task_waits_beside_an_idle_daemon(self):
        with Gate() as gate, daemons(3):
            for _ in range(10):
                ms = [mirai.mirai(gate.enter, i) for i in range(3)]
                self.assertEqual(sorted(gate.arrived()[0] for _ in range(3)), [0, 1, 2])     # all at once
                gate.open()
                call_mirai(ms)

    def test_interpreter_options_that_show_every_warning_show_none(self):
        script = """
            import asyncio, mirai
            async def main():
                return await asyncio.gather(*[mirai.mirai(abs, -i) for i in range(20)])
            print(mirai.mirai(abs, -1).result())
            with mirai.daemons(2):
                print(mirai.mirai_map([1, 2], lambda x: x).results(), sum(asyncio.run(main())))
                print(mirai.mirai("1 / 0")[:].code, mirai.mirai("import time; time.sleep(60)", _timeout=0.01)[:].code)
                mirai.mirai("import time; time.sleep(60)")
            mirai.daemons(1)
            m = mirai.mirai("import time; time.sleep(60)")
            """
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "script.py")
            with open(path, "w") as file:
                file.write(textwrap.dedent(script))
            done = subprocess.run([sys.executable, "-W", "error", "-X", "dev", path], stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True, timeout=LONG, env={**os.environ, "PYTHONPATH": HERE})
        self.assertEqual((done.stdout.split(), done.stderr, done.returncode), (["1", "[1,", "2]", "190", "1000", "5"], "", 0))


# -- modes: dispatcher=False and sync=True


def code_names(value):
    """What an error value says of itself, to compare it with that of another run."""
    if isinstance(value, mirai.ErrorValue):
        return type(value).__name__, value.code, list(getattr(value, "condition_class", ()))
    return value


class Point:
    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return type(other) is type(self) and other.x == self.x


class Demanding(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.one = one


def _fail_demandingly():
    raise Demanding(1, 2)


def _shift(point, by=1):
    return Point(point.x + by)


def _surroundings():
    """What tasks may change of a process."""
    state = [sys.path[:], dict(os.environ), os.getcwd(), warnings.filters[:], random.getstate()]
    if "numpy" in sys.modules:
        import numpy
        state.append([list(part) if hasattr(part, "tolist") else part for part in numpy.random.get_state()])
    return state


def _disturb(folder):
    """Changes all of it."""
    sys.path.insert(0, folder)
    os.environ["DISTURBED"] = "yes"
    os.environ.pop("TO_BE_REMOVED", None)
    os.environ["TO_BE_CHANGED"] = "changed"
    os.chdir(folder)
    warnings.simplefilter("error")
    random.seed(99)
    if "numpy" in sys.modules:
        import numpy
        numpy.random.seed(99)
    return random.random()


def _breadth_of_tasks():
    """One of each kind of task: what the host gets, errors as their names."""
    offset = 10
    ms = [mirai.mirai(lambda x: x + offset, 1), mirai.mirai("a + b", a=1, b=2), mirai.mirai("x = 1"),
          mirai.mirai(_shift, Point(1), by=2), mirai.mirai(bytes, 3_000_000), mirai.mirai(len, bytes(3_000_000)),
          mirai.mirai(lambda: 1 / 0), mirai.mirai("1 / 0"), mirai.mirai(_fail_demandingly), mirai.mirai(sys.exit, 3),
          mirai.mirai(_raise, KeyboardInterrupt()), mirai.mirai(_raise, StopIteration(1)), mirai.mirai(threading.Lock),
          mirai.mirai(mirai.on_daemon)]
    maps = [mirai_map(range(-50, 50), abs), mirai_map({"a": Point(1), "b": Point(2)}, _shift), mirai_map([1, 0], lambda x: 1 / x),
            mirai_map([(1, 2), (3, 4)], pow, _star=True), mirai_map([], abs)]
    values = outcomes(ms) + [outcomes(mp) for mp in maps]
    return [list(map(code_names, v)) if type(v) is list else code_names(v) for v in values]


class TestModes(Case):
    # -- direct: the host listens itself

    def test_values_and_errors_are_those_of_a_dispatcher(self):
        found = []
        for mode in (*MODES, {"sync": True}):
            with daemons(2, **mode):
                found.append(_breadth_of_tasks())
        self.assertEqual(found[0][:6], [11, 3, None, Point(3), bytes(3_000_000), 3_000_000])
        self.assertEqual([value[0] for value in found[0][6:13]],
                         ["MiraiError"] * 4 + ["MiraiInterrupt"] + ["MiraiError"] * 2)
        self.assertTrue(found[0][13])
        self.assertEqual(found[1], found[0])
        self.assertEqual(found[2], found[0])

    def test_errors_are_raised_as_they_are_with_a_dispatcher(self):
        for options in ({"dispatcher": False}, {"sync": True}):
            with self.subTest(**options), daemons(1, **options):
                m = mirai.mirai(_fail_demandingly)
                with self.assertRaisesRegex(Demanding, "1 and 2") as caught:
                    m.result(LONG)
                self.assertEqual((caught.exception.one, caught.exception.__cause__), (1, m.data))
                self.assertIn("_fail_demandingly", m.data.stack_trace)
                with self.assertRaisesRegex(TypeError, r"args\[1\]\.lock: (cannot|Can't) pickle"):
                    mirai.mirai(print, 1, types.SimpleNamespace(lock=threading.Lock()))
                with self.assertRaises(SyntaxError):
                    mirai.mirai("1 +")
                with self.assertRaises(ZeroDivisionError):
                    mirai_map([1, 0], lambda x: 1 / x).results()

    def test_tasks_go_to_the_daemons_in_turn(self):
        with daemons(2, dispatcher=False):
            pids = [outcome(mirai.mirai(os.getpid)) for _ in range(10)]
            self.assertEqual(pids, pids[:2] * 5)
            self.assertEqual(len(set(pids)), 2)

    def test_a_task_that_blocks_its_daemon_stops_no_other_daemon(self):
        with Gate() as gate, daemons(2, dispatcher=False):
            held = mirai.mirai(gate.enter)
            _, blocked = gate.arrived()
            ms = [mirai.mirai(os.getpid) for _ in range(6)]
            wait_until(lambda: sum(m.done() for m in ms) >= 3, SOON, "three of six")
            self.assertNotIn(blocked, [m.data for m in ms if m.done()])
            self.assertFalse(held.done())
            gate.open()
            self.assertEqual(outcomes(ms).count(blocked), 3)
            self.assertIsNone(outcome(held))

    def test_results_are_taken_while_nobody_waits(self):
        with daemons(2, dispatcher=False):
            ms = [mirai.mirai(bytes, 1_000_000) for _ in range(10)]
            called = threading.Event()
            ms[-1].add_done_callback(lambda m: called.set())
            self.assertTrue(called.wait(SOON))
            wait_until(lambda: all(m.done() for m in ms), SOON)

    def test_threads_and_event_loops_may_use_it(self):
        async def work(i):
            return await mirai.mirai(lambda x: x + 1, i)

        async def main():
            return await asyncio.wait_for(asyncio.gather(*(work(i) for i in range(50))), SOON)

        with daemons(2, dispatcher=False):
            self.assertEqual(_at_once(8, lambda i: [outcome(mirai.mirai(pow, i, 2)) for _ in range(25)]),
                             [[i * i] * 25 for i in range(8)])
            self.assertEqual(asyncio.run(main()), list(range(1, 51)))

    def test_a_cancel_reaches_what_runs_and_what_waits(self):
        for task in (sleeping, looping, calling):
            with self.subTest(task=task.__name__), Noted() as note, Gate() as gate, daemons(1, dispatcher=False):
                running = mirai.mirai(task, gate.enter)
                _, pid = gate.arrived()
                waiting = mirai.mirai(_note_after, str, note.path)
                last = mirai.mirai(os.getpid)
                self.assertTrue(waiting.cancel())
                gate.open()
                self.assertTrue(running.cancel())
                self.assertEqual([type(m.data) for m in (running, waiting)], [MiraiCancelled] * 2)
                self.assertFalse(running.cancel())
                self.assertEqual(outcome(last), pid)        # the daemon has survived it
                self.assertFalse(os.path.exists(note.path))

    def test_a_timeout_ends_what_runs_and_what_waits(self):
        with Noted() as note, daemons(1, dispatcher=False):
            pid = outcome(mirai.mirai(os.getpid))
            running = mirai.mirai(time.sleep, 1000, _timeout=0.2)
            waiting = mirai.mirai(_note_after, str, note.path, _timeout=0.1)
            self.assertEqual([type(v) for v in outcomes([running, waiting])], [MiraiTimeout] * 2)
            self.assertEqual(outcome(mirai.mirai(os.getpid)), pid)
            self.assertFalse(os.path.exists(note.path))

    def test_a_killed_daemon_costs_the_task_that_ran_and_is_replaced(self):
        with Gate() as gate, daemons(1, dispatcher=False):
            running = mirai.mirai(gate.enter)
            _, pid = gate.arrived()
            ms = [mirai.mirai(os.getpid) for _ in range(5)]
            os.kill(pid, signal.SIGKILL)
            pids = set(outcomes(ms))
            self.assertEqual(len(pids - {pid}), 1)
            self.assertIs(type(outcome(running)), MiraiConnectionReset)
            self.assertRegex(str(running.data), f"{pid}.*SIGKILL")
            os.kill(pids.pop(), signal.SIGKILL)         # an idle one, too
            wait_until(lambda: info().cumulative == 3 and connections() == 1, SOON, "the third")
            with Noted() as note:
                self.assertIsInstance(outcome(mirai.mirai(_draw_after_death, note.path, _retries=1)), float)

    def test_of_a_map_exactly_the_items_that_kill_are_lost(self):
        with daemons(2, dispatcher=False):
            values = outcomes(mirai_map(range(300), lambda i: os.kill(os.getpid(), 9) if i % 100 == 50 else i))
            lost = [i for i, value in enumerate(values) if isinstance(value, MiraiConnectionReset)]
            self.assertEqual(lost, [50, 150, 250])
            self.assertEqual([v for i, v in enumerate(values) if i not in lost], [i for i in range(300) if i not in lost])

    def test_daemons_of_few_tasks_are_replaced(self):
        with daemons(2, dispatcher=False, maxtasks=3):
            self.assertEqual(outcomes(mirai_map(range(-20, 0), abs)), list(range(20, 0, -1)))
            self.assertGreaterEqual(len(set(outcomes([mirai.mirai(os.getpid) for _ in range(12)]))), 4)

    def test_resetting_makes_the_unresolved_19s_and_ends_all(self):
        with Gate() as gate:
            daemons(2, dispatcher=False)
            pids = outcomes(mirai.everywhere(os.getpid))
            ms = [mirai.mirai(gate.enter) for _ in range(2)]
            gate.arrived(), gate.arrived()
            ms += [mirai.mirai(abs, -1), *mirai_map([1, 2], abs)]
            self.assertFalse(daemons(0))
            self.assertEqual({type(m.data) for m in ms}, {MiraiConnectionReset})
            self.assertIn("reset", str(ms[0].data))
            no_more(pids)
            self.assertEqual((info(), mirai.daemons_set()), (None, False))
            self.assertEqual(outcome(mirai.mirai(abs, -1)), 1)      # in a process of its own

    def test_what_a_killed_host_had_started_is_gone_a_second_later(self):
        for url in ("None", "'tcp://127.0.0.1:0'"):
            with self.subTest(url=url), Gate() as gate, Host(f"""
                    import mirai, time, socket
                    def busy(address):
                        with socket.create_connection(address) as sock:
                            sock.sendall(b"[0, 0]\\n")
                        while True:
                            pass
                    mirai.daemons(2, url={url}, dispatcher=False)
                    ms = [mirai.mirai(busy, {gate.address!r}) for _ in range(3)]
                    print(mirai.status()["daemons"])
                    time.sleep(1000)
                    """) as host:
                gate.arrived(), gate.arrived()
                where = host.line()
                family = family_of(host.pid)
                self.assertEqual(len(family), 3)        # nursery and two daemons
                host.process.kill()
                no_more(family, 1.0)
                with self.assertRaises(mirai.Refused):
                    mirai.find_key(where)               # nor is its key left

    def test_hosts_end_at_once_and_in_silence_though_tasks_are_unresolved(self):
        for ending in ("", "sys.exit(3)", "raise KeyError"):
            with self.subTest(ending=ending):
                started = time.monotonic()
                done = run_python(f"""
                    import mirai, sys, time
                    mirai.daemons(2, dispatcher=False)
                    pids = mirai.everywhere("import os; os.getpid()")[:]
                    ms = [mirai.mirai(time.sleep, 1000) for _ in range(4)]
                    print(*pids)
                    {ending}
                    """)
                self.assertLess(time.monotonic() - started, 10)
                self.assertEqual(done.returncode, {"": 0, "sys.exit(3)": 3}.get(ending, 1))
                self.assertEqual(done.stderr.replace("KeyError\n", "").partition("Traceback")[0], "")
                no_more(list(map(int, done.stdout.split())), 1.0)

    def test_a_forked_child_sees_no_daemons_and_leaves_its_parents_alone(self):
        done = run_python("""
            import mirai, os, sys, warnings
            warnings.simplefilter("ignore")
            with mirai.daemons(2, dispatcher=False):
                m = mirai.mirai(lambda: [input_ for input_ in range(3)])
                held = mirai.mirai("import time; time.sleep(0.5); 5")
                child = os.fork()
                if child == 0:
                    found = mirai.daemons_set(), mirai.info()
                    alone = mirai.mirai(abs, -4).result(30)
                    print(*found, alone, flush=True)
                    mirai._at_exit()
                    os._exit(0)
                status = os.waitpid(child, 0)[1]
                print(m.result(30), held.result(30), mirai.mirai(abs, -1).result(30), status)
            """)
        self.assertEqual((done.stderr, done.stdout.split("\n")), ("", ["False None 4", "[0, 1, 2] 5 1 0", ""]))

    def test_ctrl_c_interrupts_the_wait_and_nothing_else(self):
        done = run_python("""
            import mirai, os, signal, threading
            mirai.daemons(1, dispatcher=False)
            m = mirai.mirai("import time; time.sleep(0.6); 7")
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                print("not interrupted", m.result(30))
            except KeyboardInterrupt:
                print("interrupted", m.done())
            print(m.result(30), mirai.mirai(abs, -1).result(30))
            """)
        self.assertEqual((done.stderr, done.stdout.splitlines()), ("", ["interrupted False", "7 1"]))

    def test_daemons_that_are_started_by_hand_join(self):
        with tempfile.TemporaryDirectory() as folder:
            for url in ("tcp://127.0.0.1:0", f"ipc://{folder}/socket"):
                with self.subTest(url=url), daemons(url=url, dispatcher=False):
                    first = mirai.mirai(os.getpid)
                    self.assertEqual((connections(), first.done()), (0, False))
                    actual = status()["daemons"]
                    self.assertTrue(actual.startswith(url.rstrip("0")))
                    with ByHand(actual) as one:
                        self.assertEqual(outcome(first), one.pid)
                        with ByHand(actual) as two, ByHand(actual, key="00" * 32) as stranger:
                            joined(2)
                            self.assertEqual({outcome(mirai.mirai(os.getpid)) for _ in range(4)}, {one.pid, two.pid})
                            self.assertEqual(stranger.status(SOON)[0], 77)
                            with Gate() as gate:
                                ms = [mirai.mirai(sleeping, gate.enter) for _ in range(2)]
                                killed = {gate.arrived()[1] for _ in ms}
                                self.assertEqual(killed, {one.pid, two.pid})
                                os.kill(two.pid, signal.SIGKILL)
                                gate.open()
                                wait_until(lambda: sum(m.done() for m in ms) == 1, SOON)
                                lost, = (m for m in ms if m.done())
                                self.assertIs(type(lost.data), MiraiConnectionReset)
                                self.assertEqual(sorted(stop_mirai(ms)), [False, True])
                        joined(1)
                        self.assertEqual(outcome(mirai.mirai(os.getpid)), one.pid)
                        daemons(0)
                        self.assertEqual(one.status(SOON), (0, ""))

    def test_local_ones_and_those_from_elsewhere_work_side_by_side(self):
        with daemons(1, url="tcp://127.0.0.1:0", dispatcher=False), ByHand(status()["daemons"]) as one:
            joined(2)
            launch_local(1)
            pids = set(outcomes(mirai.everywhere(os.getpid)))
            self.assertEqual(len(pids), 3)
            self.assertIn(one.pid, pids)
            self.assertEqual({outcome(mirai.mirai(os.getpid)) for _ in range(3)}, pids)

    def test_silent_strangers_hold_up_nobody(self):
        with daemons(1, url="tcp://127.0.0.1:0", dispatcher=False), contextlib.ExitStack() as stack:
            address = mirai.parse_url(status()["daemons"])
            for i in range(20):
                sock = stack.enter_context(socket.create_connection((address.host, address.port)))
                if i % 2:
                    sock.sendall(os.urandom(100))
            with ByHand(status()["daemons"]):
                joined(2)
                self.assertEqual(outcomes([mirai.mirai(abs, -1) for _ in range(10)]), [1] * 10)

    def test_what_needs_a_dispatcher_or_tls_is_refused_without(self):
        config = mirai.serial_config(threading.Event, lambda x: b"", lambda data: threading.Event())
        with self.assertRaisesRegex(ValueError, "serial.*dispatcher"):
            daemons(1, dispatcher=False, serial=config)
        for mode in MODES:
            for name in ("remote", "tls", "pass_"):
                with self.subTest(name, **mode), self.assertRaisesRegex((TypeError, ValueError), name):
                    daemons(1, url="tcp://127.0.0.1:0", **mode, **{name: "something"})
                self.assertFalse(mirai.daemons_set())

    # -- sync: in this process

    def test_sync_is_this_process_and_is_resolved_at_the_call(self):
        daemons(sync=True)                      # the example of R's own page
        m = mirai.mirai(os.getpid)
        daemons(0)
        self.assertEqual((m.done(), m.data, m[:], m.result()), (True, *[os.getpid()] * 3))
        daemons(sync=True, compute="sync")
        with mirai.with_daemons("sync"):
            m = mirai.mirai(os.getpid)
        daemons(0, compute="sync")
        self.assertEqual(m[:], os.getpid())
        self.assertFalse(mirai.daemons_set("sync"))

    def test_sync_has_no_processes_and_disregards_the_other_arguments(self):
        done = run_python("""
            import mirai, os
            with mirai.daemons(3, url="tcp://127.0.0.1:0", sync=True, dispatcher=False, maxtasks=1, key="ab" * 32) as found:
                print(bool(found), mirai.daemons_set(), mirai.require_daemons())
                print([mirai.mirai(os.getpid)[:] == os.getpid() for _ in range(3)])
                print(open(f"/proc/self/task/{os.getpid()}/children").read().split())
            """)
        self.assertEqual((done.stderr, done.stdout.splitlines()), ("", ["True True True", "[True, True, True]", "[]"]))

    def test_sync_errors_are_values_and_end_nothing(self):
        with daemons(sync=True):
            for f, kind in ((lambda: 1 / 0, MiraiError), (lambda: sys.exit(3), MiraiError), (lambda: _raise(KeyboardInterrupt()), MiraiInterrupt),
                            (lambda: _raise(GeneratorExit()), MiraiError), (threading.Lock, MiraiError), ("no_such_name", MiraiError)):
                m = mirai.mirai(f)
                self.assertIs(type(m.data), kind, m.data)
                self.assertTrue(mirai.is_error_value(m[:]))
            with self.assertRaises(NameError):
                m.result()
            deep = mirai.mirai("def f(n): return f(n + 1)\nf(0)")
            self.assertIn("RecursionError", deep.data.condition_class[0])

    def test_sync_goes_through_the_serializer(self):
        at = written("""
            rows = [1]
            def change(values):
                rows.append(2)
                values.append(len(rows))
                return values
            """)
        with daemons(sync=True):
            mine = [1]
            self.assertEqual(mirai.mirai(at.change, mine)[:], [1, 2])
            self.assertEqual((mine, at.rows), ([1], [1]))
            self.assertEqual(mirai.mirai(at.change, mine)[:], [1, 2])
            value = mirai.mirai(_shift, Point(1)).result()
            self.assertIs(type(value), Point)

    def test_sync_leaves_the_host_as_it_was(self):
        with contextlib.suppress(ImportError):
            import numpy            # noqa: F401
        with tempfile.TemporaryDirectory() as folder, changed_environ(TO_BE_REMOVED="there", TO_BE_CHANGED="old"):
            for options in ({}, {"seed": 3}):
                before = _surroundings()
                with self.subTest(**options), daemons(sync=True, **options):
                    self.assertIsInstance(mirai.mirai(_disturb, folder)[:], float)
                    self.assertEqual(_surroundings(), before)
                    self.assertEqual(mirai_map([folder] * 3, _disturb)[:], [random.Random(99).random()] * 3)
                    self.assertEqual(_surroundings(), before)
                    self.assertIsInstance(mirai.mirai(lambda f: [_disturb(f), 1 / 0], folder)[:], MiraiError)
                    self.assertEqual(_surroundings(), before)
                    mirai.mirai(random.random)
                    self.assertEqual(_surroundings(), before)
                self.assertEqual(_surroundings(), before)

    def test_sync_names_that_tasks_assign_are_forgotten(self):
        at = written("""
            counter = 1
            def count():
                global counter, left
                counter += 1
                left = True
                return counter
            def look(): return globals().get("left"), counter
            """)
        with daemons(sync=True):
            self.assertEqual([mirai.mirai(at.count)[:] for _ in range(3)], [2, 2, 2])
            self.assertEqual((mirai.mirai(at.look)[:], at.counter, hasattr(at, "left")), ((None, 1), 1, False))
            mirai.mirai("import math as left_here; x_left = 1")
            self.assertIsNone(mirai.mirai(_name("x_left"))[:])
        self.assertFalse({"left_here", "x_left", "left"} & set(vars(sys.modules["__main__"])))

    def test_sync_maps_and_the_other_verbs(self):
        with daemons(sync=True):
            mp = mirai_map({"a": 1, "b": 0}, lambda x: 1 / x)
            self.assertEqual((mp[:]["a"], type(mp[:]["b"]), unresolved(mp), len(mp)), (1.0, MiraiError, 0, 2))
            self.assertEqual(mirai_map(range(5), pow, 2).results(), [0, 1, 4, 9, 16])
            m = mirai.mirai(abs, -1)
            self.assertEqual((mirai.stop_mirai(m), m.cancel(), mirai.race_mirai([m]), mirai.call_mirai(m) is m), (False, False, 0, True))
            self.assertEqual((mirai.collect_mirai([m, m]), mirai.try_mirai(abs, -2)[:]), ([1, 1], 2))
            self.assertEqual(concurrent.futures.wait([m], 1).done, {m})
            called = threading.Event()
            m.add_done_callback(lambda m: called.set())
            self.assertTrue(called.wait(SOON))
            self.assertEqual((mirai.on_daemon(), mirai.mirai(mirai.on_daemon)[:], mirai.on_daemon()), (False, True, False))
            self.assertEqual(asyncio.run(self._awaited()), [5, 3, [1, 2]])
            self.assertEqual(mirai.mirai(abs, -1, _timeout=5, _retries=2)[:], 1)

    @staticmethod
    async def _awaited():
        mp = mirai_map([-1, -2], abs)
        return [await mirai.mirai(abs, -5), await asyncio.wait_for(mirai.mirai(abs, -3), SOON), sorted([v async for v in mp])]

    def test_sync_takes_items_of_a_generator_one_at_a_time(self):
        with daemons(sync=True):
            taken = []
            mp = mirai_map((taken.append(i) or i for i in range(10**9)), lambda i: i * i)
            self.assertEqual([m[:] for m, _ in zip(mp, range(3))], [0, 1, 4])
            self.assertLess(len(taken), 10_000)

    def test_sync_in_several_threads_at_once(self):
        with daemons(sync=True, compute="threads"):
            def work(i):
                return [mirai.mirai(lambda x: (x, mirai.on_daemon()), i, _compute="threads")[:] for _ in range(20)]
            self.assertEqual(_at_once(4, work), [[(i, True)] * 20 for i in range(4)])

    def test_sync_tasks_may_call_for_others(self):
        at = written("""
            import mirai
            level = 10
            def helper(x): return x * level
            def inner(x):
                global level
                level += 1
                return helper(x)
            def outer(x):
                global level
                level = 20
                found = mirai.mirai(inner, x).result(), mirai.mirai_map([1, 2], helper).results()
                return found, level, helper(x), mirai.on_daemon()
            """)
        with daemons(sync=True):
            self.assertEqual(outcome(mirai.mirai(at.outer, 1)), ((21, [20, 40]), 20, 20, True))
            self.assertEqual((at.level, mirai.on_daemon()), (10, False))

    def test_sync_output_is_the_hosts(self):
        with daemons(sync=True), contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            mirai.mirai(print, "printed")
            mirai.mirai("import sys; print('said', file=sys.stderr)")
        self.assertEqual((out.getvalue(), err.getvalue()), ("printed\n", "said\n"))

    def test_breakpoint_works_in_sync_mode(self):
        code = """
            import mirai
            level = 40
            def add(x):
                y = x + level
                breakpoint()
                return y
            mirai.daemons(sync=True)
            print("value", mirai.mirai(add, 2)[:])
            print("values", mirai.mirai_map([1, 3], add)[:])
            """
        done = run_python(code, input="p y * 1000\nwhere\nup\ndown\nc\np y * 1000\nc\np y * 1000\nc\n", timeout=SOON)
        self.assertEqual(done.returncode, 0, done.stderr)
        for text in ("42000", "value 42", "41000", "43000", "values [41, 43]", "add()"):
            self.assertIn(text, done.stdout)

    def test_quitting_the_debugger_is_an_error_value(self):
        done = run_python("""
            import mirai
            mirai.daemons(sync=True)
            m = mirai.mirai("breakpoint()\\nx = 1\\nx")
            print(type(m[:]).__name__, m[:].condition_class[0], mirai.mirai("2")[:])
            """, input="q\ny\n", timeout=SOON)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, "MiraiError (bdb.BdbQuit|SystemExit) 2")      # 3.14 exits

    def test_ctrl_c_ends_a_task_in_sync_mode(self):
        with Gate() as gate, Host(f"""
                import mirai, os, socket, time
                mirai.daemons(sync=True)
                def work(address):
                    os.environ["WORKED"] = "yes"
                    with socket.create_connection(address) as sock:
                        sock.sendall(b"[0, 0]\\n")
                        sock.recv(1)
                        time.sleep(1000)
                try:
                    m = mirai.mirai(work, {gate.address!r})
                    print(type(m[:]).__name__)
                except KeyboardInterrupt:
                    print("KeyboardInterrupt")
                print(os.environ.get("WORKED"), mirai.on_daemon(), mirai.mirai(abs, -3)[:])
                """) as host:
            gate.arrived()
            os.kill(host.pid, signal.SIGINT)
            self.assertIn(host.line(), ("KeyboardInterrupt", "MiraiInterrupt"))
            self.assertEqual(host.line(), "None False 3")
            self.assertEqual(host.process.wait(SOON), 0)


# -- seeds


def _drawn(**options):
    """What tasks draw with these daemons: singly, in maps, and singly again."""
    with daemons(**options):
        one = [mirai.mirai(_draw) for _ in range(5)]
        many = mirai_map(range(60), lambda i: [i, random.random(), random.gauss(0, 1)])
        few = mirai_map({"a": 1, "b": 2}, _draw)
        last = mirai.mirai("import random\nrandom.randrange(10**9)")
        return outcomes(one) + outcomes(many) + list(outcomes(few).values()) + [outcome(last)]


class TestSeeds(Case):
    WAYS = ({"n": 1}, {"n": 2}, {"n": 5}, {"n": 2, "dispatcher": False}, {"n": 5, "dispatcher": False}, {"sync": True},
            {"n": 2, "maxtasks": 3}, {"n": 2, "maxtasks": 3, "dispatcher": False}, {"n": 2, "cleanup": False})

    def test_a_seed_gives_the_same_results_whoever_evaluates(self):
        expected = None
        for options in self.WAYS:
            found = _drawn(seed=1, **options)
            expected = expected or found
            with self.subTest(**options):
                self.assertEqual(found, expected)

    def test_a_seed_gives_the_same_results_in_chunks_of_any_size(self):
        self.addCleanup(mirai._fixed_chunk.__setitem__, 0, mirai._fixed_chunk[0])
        found = []
        for size in (None, 1, 7, 1000):
            mirai._fixed_chunk[0] = size
            for n in (1, 3):
                found.append(_drawn(n=n, seed=1))
        self.assertEqual(found, found[:1] * 8)

    def test_another_seed_gives_others_and_no_two_tasks_draw_the_same(self):
        drawn = []
        for seed in (0, 1, -1, 2**31 - 1):
            drawn.append(_drawn(n=2, seed=seed))
            with self.subTest(seed=seed):
                self.assertEqual(_drawn(sync=True, seed=seed), drawn[-1])
                flat = [x for value in drawn[-1] for x in (value[1:] if type(value) is list else [value])]
                self.assertEqual(len(set(flat)), len(flat))
        for i, one in enumerate(drawn):
            for other in drawn[:i]:
                self.assertFalse([a for a, b in zip(one, other) if a == b])

    def test_a_mirai_and_an_item_at_the_same_place_draw_the_same(self):
        for mode in (*MODES, {"sync": True}):
            with self.subTest(**mode), daemons(1, seed=9, **mode):
                singly = outcomes([mirai.mirai(_draw, i) for i in range(6)])
                daemons(1, seed=9, **mode)
                self.assertEqual(outcomes(mirai_map(range(6), _draw)), singly)
                daemons(1, seed=9, **mode)
                self.assertEqual(outcomes(mirai_map((i for i in range(6)), _draw)), singly)

    def test_a_task_that_is_run_again_draws_the_same(self):
        with daemons(1, seed=4):
            expected = outcomes([mirai.mirai(_draw) for _ in range(3)])
        with Noted() as note, daemons(1, seed=4):
            found = [mirai.mirai(_draw), mirai.mirai(_draw_after_death, note.path, _retries=1), mirai.mirai(_draw)]
            self.assertEqual(outcomes(found), expected)

    def test_what_a_task_does_to_the_generator_reaches_no_other(self):
        with daemons(1, seed=4):
            expected = outcomes([mirai.mirai(_draw) for _ in range(3)])
        with daemons(1, seed=4):
            one, _, two = (mirai.mirai(f) for f in (_draw, "import random; random.seed(1); random.random()", _draw))
            self.assertEqual(outcomes([one, two]), expected[::2])

    def test_the_order_of_the_calls_decides_and_not_that_of_the_tasks(self):
        with daemons(1, seed=6):
            expected = outcomes([mirai.mirai(_draw) for _ in range(4)])
        with Gate() as gate, daemons(2, seed=6):
            late = mirai.mirai("enter(1)\nimport random\nrandom.random()", enter=gate.enter)
            gate.arrived()
            others = outcomes([mirai.mirai(_draw) for _ in range(3)])
            gate.open()
            self.assertEqual([outcome(late), *others], expected)

    def drawn_by_hand(self, rs, **mode):
        """What a daemon that is started with a stream draws in its first three tasks."""
        with daemons(url="tcp://127.0.0.1:0", **mode), ByHand(status()["daemons"], "--rs", *map(str, rs)):
            joined(1)
            return outcomes([mirai.mirai(_draw) for _ in range(3)])

    def test_rs_is_the_stream_that_a_daemon_begins_with(self):
        one, two = r_streams()[1][:2]
        for mode in MODES:
            with self.subTest(**mode):
                drawn = [self.drawn_by_hand(rs, **mode) for rs in (one, two, one)]
                self.assertEqual(drawn[0], drawn[2])
                self.assertEqual(len({*drawn[0], *drawn[1]}), 6)

    def test_the_stream_of_a_seeds_first_mirai_is_what_nextstream_would_have_given(self):
        with daemons(1, seed=42):
            drawn = [outcome(mirai.mirai(_draw)) for _ in range(2)]
        self.assertEqual(drawn, [self.drawn_by_hand(rs)[0] for rs in r_streams()[42][:2]])

    # -- without a seed

    def test_without_a_seed_the_generator_is_never_rewound(self):
        for options in (*MODES, {"cleanup": False}):
            with self.subTest(**options), daemons(1, **options):
                drawn = outcomes([mirai.mirai(_draw) for _ in range(30)]) + outcomes(mirai_map(range(30), _draw))
                self.assertEqual(len(set(drawn)), 60)
                ours = random.Random(5)
                self.assertEqual(outcome(mirai.mirai("import random; random.seed(5); random.random()")), ours.random())
                self.assertEqual(outcome(mirai.mirai(_draw)), ours.random())        # it goes on from there
                self.assertEqual(outcomes(mirai_map(range(3), _draw)), [ours.random() for _ in range(3)])
                outcomes(mirai.everywhere("import random; random.seed(6)"))
                self.assertEqual(outcome(mirai.mirai(_draw)), random.Random(6).random())

    def test_daemons_and_their_successors_never_repeat_each_others_numbers(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(2, maxtasks=2, **mode):
                drawn = outcomes([mirai.mirai(_draw) for _ in range(16)])
                self.assertEqual(len(set(drawn)), 16)
            with self.subTest(**mode), daemons(3, **mode):
                drawn += outcomes(mirai.everywhere(_draw))
                for pid in outcomes(mirai.everywhere(os.getpid)):
                    os.kill(pid, signal.SIGKILL)
                wait_until(lambda: info().cumulative == 6 and connections() == 3, SOON, "three new daemons")
                launch_local(1)
                drawn += outcomes(mirai.everywhere(_draw))
                self.assertEqual(len(set(drawn)), 16 + 3 + 4)

    def test_each_of_the_processes_without_daemons_draws_its_own(self):
        drawn = outcomes([mirai.mirai(_draw) for _ in range(8)])
        self.assertEqual(len(set(drawn)), 8)

    def test_a_seeded_host_draws_on_undisturbed_and_does_not_seed_its_daemons(self):
        state = random.getstate()
        self.addCleanup(random.setstate, state)
        drawn = []
        for _ in range(2):
            random.seed(7)
            with daemons(1):
                drawn.append(outcome(mirai.mirai(_draw)))
            with daemons(1, seed=3):
                outcome(mirai.mirai(_draw))
            with daemons(sync=True):
                drawn.append(mirai.mirai(_draw)[:])
            with daemons(sync=True, seed=3):
                mirai.mirai(_draw)
            self.assertEqual(random.random(), random.Random(7).random())
        self.assertEqual(len(set(drawn)), 4)

    def test_in_sync_mode_tasks_draw_on_though_the_hosts_generator_stays(self):
        with daemons(sync=True):
            drawn = [mirai.mirai(_draw)[:] for _ in range(10)] + mirai_map(range(10), _draw)[:]
            self.assertEqual(len(set(drawn)), 20)

    # -- numpy

    @needs("numpy")
    def test_numpy_is_seeded_too_whether_it_is_there_or_gets_imported_in_the_task(self):
        found = []
        for options in ({"n": 1}, {"n": 3}, {"n": 2, "dispatcher": False}, {"n": 2, "maxtasks": 1}, {"sync": True}):
            for early in (False, True):
                with daemons(seed=11, **options):
                    if early:
                        outcomes(mirai.everywhere("import numpy.random"))
                    ms = [mirai.mirai(_numpy_draw) for _ in range(4)]
                    late = mirai.mirai("x = __import__('random').random()\nimport numpy as np\n[x, float(np.random.random())]")
                    mp = mirai_map(range(6), _numpy_draw)
                    found.append(outcomes(ms) + outcome(late) + outcomes(mp))
        self.assertEqual(len(set(found[0])), len(found[0]))
        self.assertEqual(found, found[:1] * 10)

    @needs("numpy")
    def test_numpy_does_not_draw_what_random_draws(self):
        for source in ("import numpy.random", "1"):
            with daemons(1, seed=1):
                outcomes(mirai.everywhere(source))
                found = outcome(mirai.mirai("import random, numpy\n[f() for f in (random.random, numpy.random.random) for _ in range(3)]"))
                self.assertEqual(len(set(found)), 6)

    @needs("numpy")
    def test_numpy_imported_in_whichever_way_is_seeded(self):
        sources = ("import numpy; float(numpy.random.random())", "from numpy.random import random; float(random())",
                   "import numpy.random as r; float(r.random())", "import importlib; float(importlib.import_module('numpy.random').random())",
                   "import numpy as np; float(np.random.random_sample())")
        found = set()
        for source in sources:
            with daemons(1, seed=8):
                found.add(outcome(mirai.mirai(source)))
        self.assertEqual(len(found), 1)

    @needs("numpy")
    def test_numpy_without_a_seed_is_never_rewound_nor_repeated(self):
        import numpy
        for mode in MODES:
            with self.subTest(**mode), daemons(2, maxtasks=4, **mode):
                drawn = outcomes([mirai.mirai(_numpy_draw) for _ in range(16)])
                self.assertEqual(len(set(drawn)), 16)
        with daemons(1):
            ours = numpy.random.RandomState(5)
            self.assertEqual(outcome(mirai.mirai("import numpy; numpy.random.seed(5); float(numpy.random.random())")), ours.random_sample())
            self.assertEqual(outcome(mirai.mirai(_numpy_draw)), ours.random_sample())

    @needs("numpy")
    def test_numpy_that_the_host_has_is_left_alone(self):
        import numpy
        self.addCleanup(numpy.random.set_state, numpy.random.get_state())
        for options in ({"sync": True}, {"sync": True, "seed": 1}, {"n": 1, "seed": 1}):
            numpy.random.seed(5)
            expected = numpy.random.RandomState(5).random_sample()
            with self.subTest(**options), daemons(**options):
                outcome(mirai.mirai(_numpy_draw))
                outcomes(mirai_map(range(3), _numpy_draw))
                outcome(mirai.mirai("import numpy; numpy.random.seed(1)"))
                self.assertEqual(numpy.random.random(), expected)


# -- 16. mirai, map, collect: the verbs


class _Ugly:
    """Strikes where it is pickled ('pickle'), or where it is unpickled ('unpickle')."""

    def __init__(self, where, how):
        self.where, self.how = where, how

    def __reduce__(self):
        return (_strike if self.where == "unpickle" else str, (_strike(self.how) if self.where == "pickle" else self.how,))


def _strike(how):
    if how == "exception":
        raise ValueError("ugly")
    if how == "sys.exit":
        sys.exit(3)
    _end_process(how)


class TestVerbs(Case):
    def test_mirai_takes_callables_with_arguments_of_both_kinds(self):
        def closure(a, b=2, *, c=3):
            return a, b, c, offset

        offset = 10
        with daemons(1):
            self.assertEqual(mirai.mirai(closure, 1).result(LONG), (1, 2, 3, 10))
            self.assertEqual(mirai.mirai(closure, 1, 4, c=5).result(LONG), (1, 4, 5, 10))
            self.assertEqual(mirai.mirai(dict, f=1, timeout=2).result(LONG), {"f": 1, "timeout": 2})
            self.assertEqual(mirai.mirai(functools.partial(max, 3), 2).result(LONG), 3)
            self.assertEqual(mirai.mirai("abc".upper).result(LONG), "ABC")
            self.assertIsNone(mirai.mirai(lambda: None)[:])

    def test_mirai_takes_source_whose_value_is_its_last_expression(self):
        with daemons(1):
            self.assertEqual(mirai.mirai("a + b", a=1, b=2).result(LONG), 3)
            self.assertEqual(mirai.mirai("import math\nx = math.floor(y)\nx", y=2.5).result(LONG), 2)
            self.assertIsNone(mirai.mirai("x = 1").result(LONG))
            self.assertIsNone(mirai.mirai("").result(LONG))
            self.assertEqual(mirai.mirai("def f(n): return n and f(n - 1)\nf(3)").result(LONG), 0)
            self.assertEqual(mirai.mirai("[k * x for x in range(3)]", k=2).result(LONG), [0, 2, 4])
            with self.assertRaises(NameError):
                mirai.mirai("x").result(LONG)       # nothing is left of the tasks before

    def _check(self, error, texts, call, *args, **kwargs):
        with self.assertRaises(error) as caught:
            call(*args, **kwargs)
        self.assertIs(type(caught.exception), error)
        for text in texts:
            self.assertIn(text, str(caught.exception))

    def test_bad_input_to_daemons_says_what_was_wrong_and_what_would_be_right(self):
        self._check(ValueError, ("-1", "0 (reset)"), daemons, -1)
        self._check(TypeError, ("'2'", "integer", "'auto'"), daemons, "2")
        self._check(TypeError, ("2.0", "integer"), daemons, 2.0)
        self._check(TypeError, ("True", "integer"), daemons, True)
        self._check(ValueError, ("'URL'", "tcp://host:5555"), daemons, url="URL")
        self._check(ValueError, ("'udp'", "tcp://"), daemons, 1, url="udp://127.0.0.1:1")
        self._check(ValueError, ("port", "tcp://"), daemons, 1, url="tcp://127.0.0.1")
        self._check(TypeError, ("int", "tcp://"), daemons, 1, url=5555)
        self._check(TypeError, ("daemons(4)", "daemons(0)", "daemons(None)"), daemons)
        self._check(ValueError, ("url", "leave n out"), daemons, 0, url="tcp://127.0.0.1:0")
        self._check(TypeError, ("'idletme'", "did you mean 'idletime'"), daemons, 1, idletme=3)
        self._check(TypeError, ("'zzz'", "idletime", "walltime", "maxtasks"), daemons, 1, zzz=3)
        self._check(ValueError, ("maxtasks=0", "above 0"), daemons, 1, maxtasks=0)
        self._check(ValueError, ("idletime='1'", "number"), daemons, 1, idletime="1")
        self._check(ValueError, ("64 hexadecimal digits",), daemons, 1, key="abc")
        self._check(ValueError, ("32 bytes", "3"), daemons, 1, key=b"abc")
        self.assertFalse(mirai.daemons_set())

    def test_bad_input_to_daemons_leaves_what_is_set_as_it_is(self):
        with daemons(1):
            for args, kwargs in (((-1,), {}), ((1,), {"url": "URL"}), ((1,), {"idletme": 1}), ((1,), {"key": "abc"})):
                with self.assertRaises((ValueError, TypeError)):
                    daemons(*args, **kwargs)
                self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_bad_input_to_mirai_says_what_was_wrong_and_what_would_be_right(self):
        class Holder:
            def __init__(self):
                self.lock = threading.Lock()

        with daemons(1):
            self._check(TypeError, ("mirai(f, *args, **kwargs)",), mirai.mirai)
            self._check(TypeError, ("3", "callable"), mirai.mirai, 3)
            self._check(TypeError, ("None", "callable"), mirai.mirai, None)
            self._check(TypeError, ("keyword", "x=1"), mirai.mirai, "x", 1)
            self._check(ValueError, ("_timeout=-1", "seconds"), mirai.mirai, abs, -1, _timeout=-1)
            self._check(ValueError, ("_timeout='1'", "seconds"), mirai.mirai, abs, -1, _timeout="1")
            self._check(ValueError, ("_retries=-1", "integer"), mirai.mirai, abs, -1, _retries=-1)
            self._check(TypeError, ("args[1].lock", "pickle"), mirai.mirai, print, 1, Holder())
            self._check(TypeError, ("kwargs['x'][0]", "pickle"), mirai.mirai, print, x=[threading.Lock()])
            lock = threading.Lock()
            self._check(TypeError, ("closes over lock", "pickle"), mirai.mirai, lambda: lock)
            with self.assertRaises(SyntaxError) as caught:
                mirai.mirai("1 +")
            self.assertEqual(caught.exception.lineno, 1)
            self.assertEqual(info()[2:4], (0, 0))
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_bad_input_to_the_other_verbs_says_what_was_wrong_and_what_would_be_right(self):
        self._check(RuntimeError, ("no daemons are set", "daemons(4)"), mirai_map, [1], abs)
        self._check(RuntimeError, ("no daemons are set", "daemons(4)"), launch_local)
        self._check(RuntimeError, ("'gpu'", "daemons(4, compute='gpu')"), launch_local, compute="gpu")
        self._check(TypeError, ("'f'", "callable"), mirai_map, [1], "f")
        with daemons(1):
            self._check(TypeError, ("'f'", "callable"), mirai_map, [1], "f")
            self._check(ValueError, ("n=0", "above 0"), launch_local, 0)
            self._check(ValueError, ("n='1'", "above 0"), launch_local, "1")
            self._check(TypeError, ("'idletme'", "idletime"), launch_local, 1, idletme=3)
            for verb in (call_mirai, mirai.collect_mirai, race_mirai, stop_mirai):
                self._check(TypeError, ("3", "Mirai"), verb, 3)
                self._check(TypeError, ("Mirai",), verb, [3])
            with self.assertRaises(TypeError):
                mirai_map(3, abs)

    def test_a_map_over_a_list_keeps_its_order(self):
        with daemons(2):
            mp = mirai_map([3, -1, -2], abs)
            self.assertEqual((mp.results(), mp[:], mp.data, mp.names, len(mp)), ([3, 1, 2], [3, 1, 2], [3, 1, 2], None, 3))
            self.assertEqual((mp[0].result(), mp[-1].result()), (3, 2))
            self.assertTrue(all(mirai.is_mirai(m) for m in mp))
            self.assertEqual([m.result() for m in mp], [3, 1, 2])
            self.assertEqual(repr(mp), "<mirai map: 3 of 3 resolved>")
            for wrong in (lambda: mp[3], lambda: mp[-4]):
                with self.assertRaises(IndexError):
                    wrong()
            for wrong in (lambda: mp[1:], lambda: mp["a"]):
                with self.assertRaises(TypeError):
                    wrong()

    def test_a_map_over_a_generator_or_a_mapping_or_nothing(self):
        with daemons(2):
            self.assertEqual(mirai_map((i for i in range(-3, 0)), abs).results(), [3, 2, 1])
            self.assertEqual(mirai_map(range(3), pow, 2)[:], [0, 1, 4])
            self.assertEqual(mirai_map(["ff"], int, base=16)[:], [255])
            mp = mirai_map({"a": -1, "b": -2}, abs)
            self.assertEqual((mp.results(), mp[:], mp.data, mp.names), (*[{"a": 1, "b": 2}] * 3, ["a", "b"]))
            self.assertEqual(mp[1].result(), 2)
            empty = mirai_map([], abs)
            self.assertEqual((empty.results(), empty[:], empty.data, len(empty), list(empty)), ([], [], [], 0, []))
            self.assertEqual((mirai_map({}, abs)[:], mirai_map({}, abs).names), ({}, []))
            self.assertEqual((mirai.collect_mirai(empty), race_mirai(empty), stop_mirai(empty), unresolved(empty)), ([], None, [], 0))

    def test_a_map_has_error_values_in_place_and_results_raises_the_first(self):
        with daemons(2):
            mp = mirai_map([1, 0, "x"], lambda x: 1 / x)
            self.assertEqual(mp[:][0], 1.0)
            self.assertEqual([getattr(v, "condition_class", ("none",))[0] for v in mp[:]], ["none", "ZeroDivisionError", "TypeError"])
            with self.assertRaises(ZeroDivisionError) as caught:
                mp.results()
            self.assertIs(caught.exception.__cause__, mp[1].data)

    def test_a_map_shows_what_there_is_so_far_and_its_mirais_can_be_awaited(self):
        async def main(mp):
            return await asyncio.gather(*mp)

        with Gate() as gate, daemons(2):
            mp = mirai_map([0, 1], gate.enter)
            gate.arrived(), gate.arrived()
            self.assertEqual(mp.data, [mirai.UNRESOLVED] * 2)
            self.assertEqual((unresolved(mp), repr(mp)), (2, "<mirai map: 0 of 2 resolved>"))
            gate.open()
            self.assertEqual(asyncio.run(asyncio.wait_for(main(mp), LONG)), [0, 1])

    def test_a_map_gives_each_item_its_timeout(self):
        with Gate() as gate, daemons(1):
            mp = mirai_map([0, 1], gate.enter, _timeout=0.05)
            self.assertTrue(all(isinstance(v, MiraiTimeout) for v in mp[:]))

    def test_collect_gives_values_and_error_values_in_place(self):
        with daemons(2):
            a, b = mirai.mirai(abs, -1), mirai.mirai("1 / 0")
            self.assertEqual(mirai.collect_mirai(a), 1)
            self.assertEqual(mirai.collect_mirai([a, b])[0], 1)
            self.assertTrue(mirai.is_mirai_error(mirai.collect_mirai([a, b])[1]))
            self.assertTrue(mirai.is_mirai_error(mirai.collect_mirai(b)))
            self.assertEqual(mirai.collect_mirai(mirai_map({"k": -2}, abs)), {"k": 2})
            self.assertEqual(mirai.collect_mirai([]), [])
            self.assertEqual(mirai.collect_mirai((a,)), [1])

    def test_collect_with_stop_cancels_the_rest_and_raises_what_failed(self):
        def work(address, item):
            return _say_and_sleep(address) if item else 1 / 0

        with Gate() as gate, daemons(2):
            mp = mirai_map([1, 0, 2, 3], functools.partial(work, gate.address))
            with self.assertRaises(ZeroDivisionError):
                mirai.collect_mirai(mp, stop=True)
            self.assertTrue(all(m.cancelled() for m in (mp[0], mp[2], mp[3])))
            self.assertEqual(mirai.collect_mirai(mirai_map([-1, -2], abs), stop=True), [1, 2])
            self.assertEqual(mirai.collect_mirai([mirai.mirai(abs, -1)], stop=True), [1])

    def test_call_waits_and_gives_back_what_it_was_given(self):
        with daemons(2):
            for x in (mirai.mirai(abs, -1), [mirai.mirai("1 / 0"), mirai.mirai(abs, -1)], mirai_map([1, 2], abs), []):
                self.assertIs(call_mirai(x), x)
                self.assertFalse(unresolved(x))

    def test_race_gives_the_index_of_the_first_and_none_for_nothing(self):
        self.assertIsNone(race_mirai([]))
        with Gate() as gate, daemons(2):
            held, quick = mirai.mirai(gate.enter), mirai.mirai(abs, -1)
            self.assertEqual(race_mirai([held, quick]), 1)
            self.assertEqual(race_mirai([held, quick]), 1)
            gate.arrived()
            failing = mirai.mirai("1 / 0")
            self.assertEqual(race_mirai([held, failing]), 1)
            held.cancel()
            self.assertEqual(race_mirai([held, quick]), 0)
            self.assertEqual(race_mirai(mirai_map([1], abs)), 0)

    def test_stop_says_which_it_cancelled_and_unresolved_how_many_are_left(self):
        with Gate() as gate, daemons(1):
            done = mirai.mirai(abs, -1)
            done.result(LONG)
            ms = [done, mirai.mirai(gate.enter), mirai.mirai(abs, -1)]
            gate.arrived()
            self.assertEqual((unresolved(ms), unresolved(ms[1]), unresolved(done)), (2, True, False))
            self.assertEqual(stop_mirai(ms), [False, True, True])
            self.assertEqual((unresolved(ms), stop_mirai(ms[1])), (0, False))
            self.assertEqual([m.data for m in ms[:1]], [1])
            self.assertTrue(all(isinstance(m.data, MiraiCancelled) for m in ms[1:]))
            self.assertEqual((unresolved(3), unresolved(mirai.UNRESOLVED), unresolved([])), (False, True, 0))

    def test_what_is_what(self):
        with daemons(1):
            value, failed, cancelled = mirai.mirai(abs, -1), mirai.mirai("1 / 0"), mirai.mirai(time.sleep, LONG)
            interrupted = mirai.mirai(_raise, KeyboardInterrupt())
            cancelled.cancel()
            late = mirai.mirai(time.sleep, LONG, _timeout=0.01)
            mp = mirai_map([1], abs)
            found = [m[:] for m in (value, failed, cancelled, interrupted, late)]
            self.assertEqual([mirai.is_error_value(v) for v in found], [False, True, True, True, True])
            self.assertEqual([mirai.is_mirai_error(v) for v in found], [False, True, False, False, False])
            self.assertEqual([mirai.is_mirai_interrupt(v) for v in found], [False, False, False, True, False])
            self.assertEqual([v.code for v in found[1:]], [1000, 20, 1, 5])
            self.assertEqual([mirai.is_mirai(x) for x in (value, mp, 1)], [True, False, False])
            self.assertEqual([mirai.is_mirai_map(x) for x in (value, mp, [value])], [False, True, False])

    PROGRESS = """
        import sys, time, mirai
        mirai.daemons(2)
        mp = mirai.mirai_map([0.01] * 40, time.sleep)
        mirai.collect_mirai(mp, progress={progress})
        mirai.mirai_map([0.0] * 3, time.sleep).results(progress={progress})
        """

    def test_progress_is_quiet_where_stderr_is_no_terminal_unless_asked(self):
        ways = None, False, True
        none, never, asked = _at_once(3, lambda i: run_python(self.PROGRESS.format(progress=ways[i])).stderr)
        self.assertEqual((none, never), ("", ""))
        lines = asked.split("\n")
        self.assertEqual(lines.pop(), "")
        self.assertTrue(any("40/40" in line for line in lines) and any("3/3" in line for line in lines), lines)
        self.assertFalse(any("\r" in line or not line for line in lines), lines)

    def _on_terminal(self, columns, **options):
        """What a progress bar writes to a terminal of so many columns."""
        import fcntl
        import pty
        import termios
        master, slave = pty.openpty()
        try:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            env = {**os.environ, "PYTHONPATH": HERE}
            env.pop("COLUMNS", None)
            options = {name: slave if value == "terminal" else value for name, value in options.items()}
            process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(self.PROGRESS.format(progress=None))],
                                       stderr=slave, env=env, **options)
            os.close(slave)
            written = b""
            with contextlib.suppress(OSError):      # the end, on Linux
                while chunk := os.read(master, 4096):
                    written += chunk
            self.assertEqual(process.wait(LONG), 0, written)
            return written.decode()
        finally:
            os.close(master)

    def test_progress_on_a_terminal_is_a_bar_with_rate_and_time_left_within_its_width(self):
        for columns, stdout in ((40, "terminal"), (70, "terminal"), (40, subprocess.DEVNULL)):
            written = self._on_terminal(columns, stdout=stdout)
            states = [part for part in re.split("[\r\n]+", written) if part]
            self.assertTrue(any("40/40" in s for s in states), written)
            self.assertTrue(any(re.search(r"\d/s", s) for s in states), written)
            self.assertTrue(any(re.search(r"\d\d:\d\d left", s) for s in states), written)
            self.assertTrue(all("#" in s for s in states if "40/40" in s or "3/3" in s), written)
            self.assertTrue(all(len(s) < columns for s in states), f"{columns} columns, stdout {stdout}: {max(map(len, states))}")
            self.assertEqual(written.count("\n"), 2, written)

    def test_every_crash_at_every_stage_resolves_and_leaves_the_profile_usable(self):
        started = time.monotonic()
        with daemons(2):
            for how in ("exception", "sys.exit", "os._exit", "segfault"):
                dies = how in ("os._exit", "segfault")
                stages = {
                    "unpickling the argument": lambda: mirai.mirai(type, _Ugly("unpickle", how)),
                    "running": lambda: mirai.mirai(_strike, how),
                    "pickling the result": lambda: mirai.mirai(_Ugly, "pickle", how),
                }
                if not dies:        # in the host itself
                    stages["unpickling the result"] = lambda: mirai.mirai(_Ugly, "unpickle", how)
                    with self.assertRaises(SystemExit if how == "sys.exit" else TypeError):
                        mirai.mirai(type, _Ugly("pickle", how))
                for stage, submit in stages.items():
                    with self.subTest(how=how, stage=stage):
                        m = submit()
                        wait_until(m.done, 5)
                        self.assertIs(type(m.data), MiraiConnectionReset if dies else MiraiError, f"{m.data!r}")
                        text = HOW_IT_SHOWS[how] if dies else "SystemExit" if how == "sys.exit" else "ugly"
                        self.assertIn(text, str(m.data))
                        with self.assertRaises(MiraiConnectionReset if dies else (MiraiError, ValueError, TypeError)):
                            m.result()
                        self.assertEqual(mirai.mirai(abs, -1).result(5), 1)
        self.assertLess(time.monotonic() - started, LONG)

    def test_a_host_that_crashes_in_pickling_or_unpickling_leaves_no_process_behind(self):
        for how, stage in itertools.product(("os._exit", "segfault"), ("pickling the argument", "unpickling the result")):
            with self.subTest(how=how, stage=stage), Host(f"""
                    import ctypes, os, resource, signal, mirai
                    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                    host = os.getpid()
                    def strike(_):
                        if {how!r} == "os._exit":
                            os._exit(3)
                        ctypes.string_at(0)
                        os.kill(os.getpid(), signal.SIGSEGV)
                    class Ugly:
                        def __reduce__(self):
                            return (strike, (strike(0) if os.getpid() == host and {stage!r} == "pickling the argument" else 0,))
                    mirai.daemons(2)
                    mirai.mirai("import time; time.sleep(60)")
                    print("ready")
                    input()
                    if {stage!r} == "pickling the argument":
                        mirai.mirai(type, Ugly())
                    else:
                        mirai.mirai(Ugly).result()
                    print("still here")
                    """, stdin=subprocess.PIPE) as host:
                self.assertEqual(host.line(), "ready")
                family = family_of(host.pid)
                self.assertGreaterEqual(len(family), 4)
                host.process.stdin.write("\n")
                host.process.stdin.close()
                self.assertEqual(host.process.wait(5), 3 if how == "os._exit" else -signal.SIGSEGV)
                wait_until(lambda: not any(map(is_alive, family)), 1.0, "the end of all that the host began")


# -- maps


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
            text = file.read()      # its last line may have been written in part: at the end of a page
            return [(word, int(item), int(pid)) for word, item, pid in map(str.split, text[:text.rfind("\n") + 1].splitlines())]
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


def _note_any(x, path):
    _note(path, "begin", 0)


def _id(x):
    return x


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


class TestMaps(Case):
    def setUp(self):
        super().setUp()
        self._alarm = signal.signal(signal.SIGALRM, self._hangs)
        signal.setitimer(signal.ITIMER_REAL, LONG, 10.0)

    def tearDown(self):
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._alarm)
        daemons(0)      # whatever a test that failed has left
        super().tearDown()

    @staticmethod
    def _hangs(*_):
        raise AssertionError(f"no end within {LONG} s")

    def heard(self, left):
        """Waits until the dispatcher has so many unresolved tasks left: cancels are sent and not waited for, and what
        `info()` says of them is what the host knows."""
        link = mirai._profiles["default"].link
        wait_until(lambda: sum(link.counts[2:4]) == left, 10, f"the dispatcher's having {left} tasks left")

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
        for n, size in crossed((1, 3), (7, None, 1, 2, 64, 999, 1000, 4096)):
            with self.subTest(n=n, size=size), granting(size), daemons(n):
                mp = mirai_map(range(1000), work)
                self.assertEqual([getattr(m.exception(SOON), "__class__", None) is ZeroDivisionError for m in mp],
                                 [x % 100 == 50 for x in range(1000)])
                self.assertEqual([ZeroDivisionError if mirai.is_mirai_error(v) else v for v in mp[:]], expected)

    def test_tiny_items_cost_a_fraction_of_one_task_each(self):
        n = at_length(4_000, 20_000)

        def took(size):
            with granting(size), daemons(2):
                mirai_map(range(100), operator.neg)[:]
                begin = time.perf_counter()
                self.assertEqual(mirai_map(range(n), operator.neg).results()[-1], 1 - n)
                return time.perf_counter() - begin

        pairs = [(took(None), took(1)) for _ in range(3)]
        self.assertLess(min(a for a, _ in pairs), 0.5 * min(b for _, b in pairs), pairs)

    def test_a_long_item_holds_none_of_the_others_up_wherever_it_is(self):
        for size, place in crossed((None, 64, 4096), (0, 5, 300, 1999)):
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
                self.heard(1 + 99)
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
                self.heard(50)
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
        n = at_length(800, 1500)
        for size in (None, 16):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                chance, said, place = random.Random(3), {}, 0
                mp = mirai_map(range(n), _item, trace.path, seconds=0.0005)
                while place < n - 50:
                    near = place + chance.choice((0, 0, 1, 1, 2, 3, 5, 8, 30))      # runs, was granted, or waits
                    if near not in said:
                        said[near] = mp[near].cancel()
                    place += chance.randrange(6)
                    wait_until(mp[place].done, 10)
                    while mp[place].done() and place < n - 50:
                        place += 1
                self.settled(mp)
                for i, m in enumerate(mp):
                    if said.get(i):
                        self.assertIs(type(m.data), MiraiCancelled)
                    else:
                        self.assertEqual(m.data, 2 * i)
                self.assertGreater(sum(said.values()), at_length(25, 50))
                self.assertEqual(max(trace.begun().values()), 1)
                self.assertLessEqual({i for i in range(n) if not said.get(i)}, set(trace.ended()))
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
                # `stop_mirai()` does not wait for the dispatcher, which until it knows may give items to whoever is free:
                self.assertEqual(mirai.mirai(abs, -1).result(10), 1)        # by the same daemon, behind the cancel
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
        for size, (retries, deaths) in crossed((None, 64), [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2)]):
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
        for size in at_length((256,), (None, 256)):
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
        for size, deadly in crossed((None, 64, 4096), ((0,), (99,), (0, 1, 2), (49, 50, 51, 52), tuple(range(90, 100)))):
            with self.subTest(size=size, deadly=deadly), Trace() as trace, granting(size), daemons(2):
                mp = mirai_map(range(100), _deadly, trace.path, dict.fromkeys(deadly, "SIGKILL"))
                self.settled(mp)
                self.assertEqual([i for i, v in enumerate(mp[:]) if isinstance(v, MiraiConnectionReset)], list(deadly))
                self.assertEqual([v for v in mp[:] if not isinstance(v, MiraiConnectionReset)], sorted(set(range(100)) - {*deadly}))
                self.assertEqual(trace.begun(), collections.Counter(range(100)))

    def test_a_map_of_which_every_item_ends_its_daemon_ends(self):
        for size in at_length((64,), (None, 64)):
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
        n = at_length(1500, 3000)
        for size in (None, 16):
            with self.subTest(size=size), Trace() as trace, granting(size), daemons(2):
                chance = random.Random(5)
                mp = mirai_map(range(n), _item, trace.path, seconds=0.0005)
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
                self.assertEqual([m.data for i, m in enumerate(mp) if i not in lost], [2 * i for i in range(n) if i not in lost])
                self.assertEqual(max(begun.values()), 1, "an item that ran twice")
                self.assertLessEqual(set(range(n)) - set(ended), set(lost), "an item with a value that never ended")

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
        for size in at_length((64,), (None, 64)):
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
        for size, how in crossed((None, 64), ("exception", "sys.exit", "os._exit", "segfault")):
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
        for size, how in crossed((None, 64), ("exception", "sys.exit", "os._exit", "segfault")):
            with self.subTest(size=size, how=how), granting(size), daemons(2):
                mp = mirai_map(range(100), lambda x: _Ugly("pickle", how) if x in (11, 12, 40) else x)
                self.settled(mp)
                for i, value in enumerate(mp[:]):
                    if i in (11, 12, 40):
                        self.assertIs(type(value), MiraiConnectionReset if how in HOW_IT_SHOWS else MiraiError, repr(value))
                    else:
                        self.assertEqual(value, i)

    def test_a_result_that_cant_be_unpickled_is_the_error_of_its_item_alone(self):
        for size, how in crossed((None, 64), ("exception", "sys.exit")):
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

        n = at_length(16, 40)
        items = [bytes([i]) * 1_000_000 for i in range(n)]
        for size in (None, 16):
            with self.subTest(size=size), granting(size), daemons(2):
                self.assertEqual(mirai_map(items, check)[:], [(1_000_000, i, i, 1_000_000) for i in range(n)])
                self.assertEqual(mirai_map(range(n), lambda i: bytes([i]) * 1_000_000)[:], items)
                mixed = [b"x" * (5_000_000 if i % 25 == 3 else 3) for i in range(at_length(40, 100))]
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
        size = at_length(30_000_000, 100_000_000)
        ballast = bytes(size)
        with daemons(4):
            begin = time.monotonic()
            self.assertEqual(mirai.mirai(len, ballast).result(SOON), size)
            one = time.monotonic() - begin
            begin = time.monotonic()
            mp = mirai_map(range(1000), lambda x, data: x + len(data), ballast)
            self.assertEqual(mp[:], list(range(size, size + 1000)))
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

    def test_a_lazy_map_whose_daemons_go_gives_what_was_resolved_before(self):
        pulled = []

        def endless():
            for i in itertools.count():
                pulled.append(i)
                yield i
        with daemons(1):
            mp = mirai_map(endless(), operator.neg)
            wait_until(lambda: unresolved(mp) == 0, 10)
        n = len(pulled)
        with self.assertRaises(MiraiConnectionReset):
            found = []
            for m in mp:
                found.append(m.result(10))
        self.assertEqual(found, [-i for i in range(len(found))])
        self.assertGreater(len(found), 0)
        self.assertLessEqual(len(pulled), n + 64)
        before = len(pulled)
        with self.assertRaises(MiraiConnectionReset):
            mp[:]
        self.assertEqual(len(pulled), before)       # it takes no more of the generator

    def test_an_interrupt_while_items_are_taken_loses_none(self):
        class Counting:
            def __init__(self):
                self.n, self.interrupt = 0, {10, 30}

            def __iter__(self):
                return self

            def __next__(self):
                if self.n in self.interrupt:
                    self.interrupt.remove(self.n)
                    raise KeyboardInterrupt
                if self.n == 50:
                    raise StopIteration
                self.n += 1
                return self.n
        with daemons(1):
            mp, found, interrupts = mirai_map(Counting(), operator.neg), None, 0
            self.assertTrue(mp)         # its length is not known
            self.assertFalse(mirai_map([], abs))
            while found is None:
                try:
                    found = mp[:]
                except KeyboardInterrupt:
                    interrupts += 1
            self.assertEqual((found, interrupts), ([-i for i in range(1, 51)], 2))

            def generator():
                yield from range(20)
                raise KeyboardInterrupt
            with self.assertRaises(KeyboardInterrupt):
                mp = mirai_map(generator(), operator.neg)
                mp[:]
            with self.assertRaisesRegex(RuntimeError, "the generator was interrupted"):
                mp[:]

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
            wait_until(lambda: (gc.collect(), closed)[1], 10, "the generator's end")
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
        n, ballast = map(int, sys.argv[1:])
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
        n, ballast = at_length((60_000, 1_000), (1_000_000, 300))
        signal.setitimer(signal.ITIMER_REAL, 0)
        done = run_python(self.MEMORY, str(n), str(ballast), timeout=LONG if n < 1_000_000 else 4 * LONG)
        self.assertEqual(done.returncode, 0, done.stderr)
        seen, most, host = map(int, done.stdout.split())        # kept items or results would be 54 MB and more
        self.assertEqual(seen, n)
        self.assertLess(host, 25, "MB that the host grew by")
        self.assertLess(most, 25, "MB that one of its processes grew by")

    def test_a_map_that_is_dropped_leaves_nothing_in_the_host(self):
        done = run_python("""
            import gc, os, sys, mirai
            def size():
                with open("/proc/self/statm") as file:
                    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20
            with mirai.daemons(2):
                sizes = []
                for i in range(int(sys.argv[1])):
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
            """, str(at_length(11, 15)), timeout=SOON)
        self.assertEqual(done.returncode, 0, done.stderr)
        base, most = map(int, done.stdout.split())
        self.assertLess(most - base, 40, "MB; kept results would be 60 and more")

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

        for size, lazy in crossed((None, 64), (False, True)):
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
        rounds = at_length(2, 3)
        for size in (None, 64):
            with self.subTest(size=size), granting(size), daemons(2):
                found = _at_once(2, lambda k: [mirai_map(range(3000), lambda x, k: (k, x), k).results() for _ in range(rounds)])
                self.assertEqual(found, [[[(k, x) for x in range(3000)]] * rounds for k in range(2)])

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

        for size in at_length((None,), (None, 64)):
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


# -- everywhere, as a user has it


def on_each(n, source, **names):
    """The values of an expression on each of n daemons, which are all busy with it at once."""
    with Gate() as gate:
        held = [mirai.mirai(f"enter({source})", enter=gate.enter, **names) for _ in range(n)]
        found = dict(reversed(gate.arrived()) for _ in range(n))
        gate.open()
        outcomes(held)
    if len(found) != n:
        raise AssertionError(f"{len(found)} of {n} daemons took part")
    return list(found.values())


LOADER = """
    import os

    model, seen = None, 0

    def load(scale, *, shift=0):
        global model
        model = [scale, shift]
        return os.getpid()

    def use(x):
        return model[0] * x + model[1]

    def peek():
        return globals().get("model"), globals().get("extra")
    """


class TestEverywhere(Case):
    def test_its_answers_are_a_sequence(self):
        for mode in (*MODES, {"sync": True}):
            with self.subTest(**mode), daemons(2, **mode):
                mp = mirai.everywhere(abs, -1)
                n = len(mp)
                self.assertEqual((mp[0].result(LONG), mp[-1].result(LONG), [m.result(LONG) for m in reversed(mp)]), (1, 1, [1] * n))
                with self.assertRaisesRegex(IndexError, f"item {n} of {n}"):
                    mp[n]

    def test_definitions_of_calls_that_failed_everywhere_are_held_no_more(self):
        with daemons(1):
            link = mirai._profiles["default"].link
            outcome(mirai.mirai(abs, -1))
            for i in range(3):
                data = bytes([i]) * mirai.LARGE
                self.assertEqual([type(v) for v in outcomes(mirai.everywhere(lambda data=data: 1 / 0))], [MiraiError])
            self.assertEqual([held for held, _ in link.ahead.values() if held], [])
            outcomes(mirai.everywhere(lambda data=data: len(data)))
            self.assertNotEqual([held for held, _ in link.ahead.values() if held], [])

    def test_a_task_may_have_a_sync_profile_of_its_own(self):
        at = written("""
            import mirai
            E = 99
            def helper(x): return x + 1
            def inner(x): return helper(x)
            def task(x):
                with mirai.daemons(sync=True, compute="own"):
                    found = mirai.mirai(inner, x, _compute="own").result()
                    mirai.everywhere("E = 7", _compute="own")
                return found, helper(x), E
            def read(): return E
            """)
        with daemons(1):
            outcomes(mirai.everywhere("E = 1"))
            outcomes(mirai.everywhere(at.read))
            for _ in range(2):
                found, again, _ = outcome(mirai.mirai(at.task, 1))
                self.assertEqual((found, again), (2, 2))
                self.assertEqual(outcome(mirai.mirai("E")), 1)

    def test_it_evaluates_once_on_every_daemon_and_is_a_map_of_the_values(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(3, **mode):
                mp = mirai.everywhere(os.getpid)
                self.assertTrue(mirai.is_mirai_map(mp))
                self.assertEqual((len(mp), len(list(mp)), mp.names), (3, 3, None))
                self.assertEqual(set(outcomes(mp)), _pids(3) if mode["dispatcher"] else set(mp.results()))
                self.assertEqual(len(set(mp[:])), 3)
                self.assertEqual(outcomes(mirai.everywhere("1 + x", x=1)), [2, 2, 2])
                self.assertEqual(outcomes(mirai.everywhere("y = 1")), [None] * 3)
                self.assertEqual(outcomes(mirai.everywhere(divmod, 7, 2)), [(3, 1)] * 3)
                self.assertEqual(outcomes(mirai.everywhere(int, "ff", base=16)), [255] * 3)

    def test_what_source_assigns_and_imports_is_there_for_all_later_tasks(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(2, **mode):
                mp = mirai.everywhere("import math as m; model = m.sqrt(scale)", scale=16)
                self.assertEqual(outcomes(mp), [None, None])
                self.assertEqual(on_each(2, "[model, scale, m.floor(2.5)]"), [[4.0, 16, 2]] * 2)
                ms = [mirai.mirai("model + m.floor(x)", x=x + 0.5) for x in range(20)]
                self.assertEqual(outcomes(ms), [4.0 + x for x in range(20)])

    def test_its_keyword_arguments_become_global_names(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(2, **mode):
                outcomes(mirai.everywhere("", a=1, b=2))
                self.assertEqual(outcomes([mirai.mirai("a + b") for _ in range(4)]), [3] * 4)
                self.assertEqual(outcome(mirai.mirai("a + b", a=10)), 12)
                self.assertEqual(outcomes([mirai.mirai("a + b") for _ in range(4)]), [3] * 4)

    def test_what_a_function_declares_global_is_there_for_functions_of_the_same_script(self):
        for mode in MODES:
            at = written(LOADER)
            with self.subTest(**mode), daemons(2, **mode):
                pids = outcomes(mirai.everywhere(at.load, 3, shift=1))
                self.assertEqual(len(set(pids)), 2)
                self.assertEqual(outcomes(mirai_map(range(6), at.use)), [3 * x + 1 for x in range(6)])
                self.assertEqual(outcomes([mirai.mirai(at.use, x) for x in range(6)]), [3 * x + 1 for x in range(6)])
                self.assertIsNone(at.model)

    def test_functions_and_source_share_the_names_of_a_script(self):
        at = written(LOADER)
        with daemons(1):
            outcomes(mirai.everywhere("model, extra = (2, 0), 'more'"))
            self.assertEqual(outcome(mirai.mirai(at.use, 5)), 10)
            self.assertEqual(outcome(mirai.mirai(at.peek)), ((2, 0), "more"))
            outcomes(mirai.everywhere(at.load, 7))
            self.assertEqual(outcome(mirai.mirai("model")), [7, 0])

    def test_names_that_it_assigned_are_not_overwritten_by_what_functions_bring(self):
        at = written(LOADER)
        with daemons(1):
            outcomes(mirai.everywhere("model = (2, 0)"))
            at.model = [100, 100]                       # what the host has by that name stays with the host
            self.assertEqual(outcome(mirai.mirai(at.use, 5)), 10)
            self.assertEqual(outcomes(mirai_map([1, 2], at.use)), [2, 4])
            self.assertEqual(outcome(mirai.mirai("model")), (2, 0))
            outcomes(mirai.everywhere("model = (3, 0)"))        # save by the next call
            self.assertEqual(outcome(mirai.mirai(at.use, 5)), 15)

    def test_names_that_it_did_not_assign_follow_the_host(self):
        at = written("""
            level = 1
            def read():
                return level, other
            """)
        with daemons(1):
            outcomes(mirai.everywhere("other = 'daemon'"))
            at.other = "host"
            for at.level in (1, 2):
                self.assertEqual(outcome(mirai.mirai(at.read)), (at.level, "daemon"))

    def test_it_works_as_a_script(self):
        done = run_python("""
            import mirai, os, signal
            model = None
            def load(scale):
                global model
                model = {"scale": scale}
            def use(x):
                return model["scale"] * x
            with mirai.daemons(2):
                mirai.everywhere(load, 3)[:]
                print(mirai.mirai_map(range(4), use).results())
                mirai.mirai(os.kill, mirai.mirai(os.getpid).result(), signal.SIGKILL)[:]
                print(mirai.mirai_map(range(4), use).results(), model)
                mirai.everywhere("import math as m; model = load_it(2)", load_it=lambda x: {"scale": m.pow(x, 1)})[:]
                print(mirai.mirai_map(range(4), use).results(), mirai.mirai("model").result())
            """)
        self.assertEqual((done.stderr, done.stdout.splitlines()), (
            "", ["[0, 3, 6, 9]", "[0, 3, 6, 9] None", "[0.0, 2.0, 4.0, 6.0] {'scale': 2.0}"]))

    def test_what_it_changes_outlasts_the_cleanup_after_tasks(self):
        at = written("""
            import os, sys, warnings
            def prepare(folder):
                global extra
                extra = ["prepared"]
                sys.path.append("/prepared")
                os.environ["PREPARED"] = "yes"
                os.environ.pop("TO_BE_REMOVED", None)
                os.chdir(folder)
                warnings.filterwarnings("ignore", "prepared")
            def disturb():
                global extra, left
                extra = left = "disturbed"
                sys.path[:] = ["/disturbed"]
                os.environ["PREPARED"], os.environ["TO_BE_REMOVED"], os.environ["LEFT"] = "no", "no", "no"
                os.chdir("/")
                warnings.resetwarnings()
            def look():
                return (globals().get("extra"), globals().get("left"), sys.path[-1], os.environ.get("PREPARED"),
                        os.environ.get("TO_BE_REMOVED"), os.environ.get("LEFT"), os.getcwd(), warnings.filters[0][1].pattern)
            """)
        with tempfile.TemporaryDirectory() as folder, changed_environ(TO_BE_REMOVED="there"):
            expected = (["prepared"], None, "/prepared", "yes", None, None, os.path.realpath(folder), "prepared")
            for mode in MODES:
                with self.subTest(**mode), daemons(1, **mode):
                    outcomes(mirai.everywhere(at.prepare, folder))
                    self.assertEqual(outcome(mirai.mirai(at.look)), expected)
                    outcome(mirai.mirai(at.disturb))
                    self.assertEqual(outcome(mirai.mirai(at.look)), expected)

    def test_no_later_task_starts_on_a_daemon_before_it_has_run_there_and_no_earlier_one_after(self):
        with Gate() as gate, daemons(2):
            held = [mirai.mirai("enter(i)", enter=gate.enter, i=i) for i in range(2)]
            gate.arrived(), gate.arrived()
            calls, stages = [], []
            for stage in range(1, 4):
                stages.append([mirai.mirai(_name("stage")) for _ in range(10)])
                calls.append(mirai.everywhere("stage = s", s=stage))
            after = [mirai.mirai(_name("stage")) for _ in range(10)]
            self.assertFalse(any(m.done() for call in calls for m in call))
            gate.open()
            self.assertEqual(outcomes(after), [3] * 10)
            self.assertEqual([outcomes(ms) for ms in stages], [[None] * 10, [1] * 10, [2] * 10])
            self.assertEqual([outcomes(call) for call in calls], [[None, None]] * 3)
            outcomes(held)

    def test_a_daemon_that_is_free_does_not_wait_for_those_that_are_busy(self):
        with Gate() as gate, daemons(2):
            held = mirai.mirai(gate.enter)
            gate.arrived()
            mp = mirai.everywhere("stage = 1\nstage")
            self.assertEqual(outcome(mirai.mirai("stage")), 1)
            self.assertEqual(unresolved(mp), 1)
            gate.open()
            self.assertEqual((outcomes(mp), outcome(held)), ([1, 1], None))

    def test_it_comes_between_the_maps_before_and_after(self):
        at = written("def look(_): return globals().get('stage')")
        for mode in MODES:
            with self.subTest(**mode), daemons(2, **mode):
                before = mirai_map(range(2000), at.look)
                call = mirai.everywhere("stage = 1")
                after = mirai_map(range(2000), at.look)
                self.assertEqual(set(outcomes(after)), {1})
                self.assertLessEqual(set(outcomes(before)), {None})
                self.assertEqual(outcomes(call), [None, None])

    def test_in_direct_mode_each_daemons_own_tasks_keep_their_order(self):
        with Gate() as gate, daemons(2, dispatcher=False):
            held = [mirai.mirai(gate.enter) for _ in range(2)]
            gate.arrived(), gate.arrived()
            before = [mirai.mirai(_name("stage")) for _ in range(6)]
            call = mirai.everywhere("stage = 1\nstage")
            after = [mirai.mirai(_name("stage")) for _ in range(6)]
            gate.open()
            self.assertEqual((outcomes(before), outcomes(call), outcomes(after)), ([None] * 6, [1, 1], [1] * 6))
            outcomes(held)

    def test_a_relaunched_daemon_has_all_of_it_in_order_before_its_first_task(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(2, **mode):
                outcomes(mirai.everywhere("log = ['first']"))
                outcomes(mirai.everywhere("log.append('second')"))
                outcomes(mirai.everywhere("log = [*log, word]", word="third"))
                pids = set(outcomes(mirai.everywhere(os.getpid)))
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                wait_until(lambda: info().cumulative == 4 and connections() == 2, SOON, "two new daemons")
                self.assertEqual(outcomes([mirai.mirai("log") for _ in range(4)]), [["first", "second", "third"]] * 4)
                self.assertFalse(pids & set(outcomes(mirai.everywhere(os.getpid))))

    def test_tasks_that_wait_for_the_successor_find_it_prepared(self):
        for mode in MODES:
            at = written(LOADER)
            with self.subTest(**mode), Gate() as gate, daemons(1, **mode):
                outcomes(mirai.everywhere(at.load, 2))
                running = mirai.mirai(gate.enter)
                _, pid = gate.arrived()
                ms = [mirai.mirai(at.use, 4) for _ in range(3)]
                os.kill(pid, signal.SIGKILL)
                self.assertEqual(outcomes(ms), [8] * 3)
                self.assertIsInstance(outcome(running), MiraiConnectionReset)

    def test_those_of_launch_local_replay_it(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(1, **mode):
                outcomes(mirai.everywhere("log = ['first']"))
                outcomes(mirai.everywhere("log.append('second')"))
                launch_local(2)
                self.assertEqual(on_each(3, "log"), [["first", "second"]] * 3)

    def test_one_that_is_started_by_hand_replays_it(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(1, url="tcp://127.0.0.1:0", **mode):
                outcomes(mirai.everywhere("log = [1]"))
                outcomes(mirai.everywhere("log.append(2)"))
                with ByHand(status()["daemons"]) as one:
                    joined(2)
                    self.assertEqual(on_each(2, "log"), [[1, 2]] * 2)
                    self.assertEqual(outcomes(mirai.everywhere("log.append(3)\nlen(log)")), [3, 3])
                    self.assertIn(one.pid, outcomes(mirai.everywhere(os.getpid)))

    def test_daemons_that_take_turns_by_maxtasks_replay_it_each(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(1, maxtasks=2, **mode):
                outcomes(mirai.everywhere("import os; n = 7"))
                found = outcomes([mirai.mirai("n, os.getpid()") for _ in range(8)])
                self.assertEqual([n for n, _ in found], [7] * 8)
                self.assertGreaterEqual(len({pid for _, pid in found}), 4)

    def test_the_replay_has_what_it_needed_though_the_host_has_changed_since(self):
        at = written("""
            level = 1
            data = bytes(3_000_000)
            def helper(): return level
            def load():
                global model
                model = helper(), len(data)
            def read(): return model
            """)
        with daemons(1):
            outcomes(mirai.everywhere(at.load))
            at.level, at.data = 2, b""
            os.kill(outcome(mirai.mirai(os.getpid)), signal.SIGKILL)
            wait_until(lambda: info().cumulative == 2 and connections() == 1, SOON, "the successor")
            self.assertEqual(outcome(mirai.mirai(at.read)), (1, 3_000_000))

    def test_a_call_that_failed_on_every_daemon_is_not_replayed(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(2, **mode):
                failed = mirai.everywhere("bad = 1\n1 / 0")
                for value in outcomes(failed):
                    self.assertIsInstance(value, MiraiError)
                    self.assertIn("ZeroDivisionError", str(value))
                with self.assertRaises(ZeroDivisionError):
                    failed.results()
                outcomes(mirai.everywhere("good = 2"))
                for pid in set(outcomes(mirai.everywhere(os.getpid))):
                    os.kill(pid, signal.SIGKILL)
                wait_until(lambda: info().cumulative == 4 and connections() == 2, SOON, "two new daemons")
                self.assertEqual(outcomes([mirai.mirai(f"{_name('bad')}, good") for _ in range(4)]), [(None, 2)] * 4)

    def test_a_call_that_failed_on_some_daemons_only_is_replayed(self):
        with Noted() as note, daemons(2):
            source = "import os\nos.close(os.open(path, os.O_CREAT | os.O_EXCL))"
            values = outcomes(mirai.everywhere(source, path=note.path))
            self.assertEqual(sorted(isinstance(value, MiraiError) for value in values), [False, True])
            os.remove(note.path)
            launch_local(1)
            self.assertEqual(len(outcomes(mirai.everywhere("1"))), 3)
            self.assertTrue(os.path.exists(note.path))

    def fail_replays(self, note):
        """A call that worked, and works no more."""
        with open(note.path, "w") as file:
            file.write("weights")
        self.assertEqual(outcomes(mirai.everywhere("weights = open(path).read()\nlen(weights)", path=note.path)), [7])
        os.remove(note.path)

    def test_a_replay_that_fails_is_a_failed_launch_of_launch_local(self):
        for mode in MODES:
            with self.subTest(**mode), Noted() as note, daemons(1, **mode):
                self.fail_replays(note)
                with self.assertRaisesRegex(mirai.LaunchError, "(?s)FileNotFoundError.*noted"):
                    launch_local(1)
                self.assertEqual(outcome(mirai.mirai("weights")), "weights")       # the one that is there works on

    def test_a_replay_that_fails_is_a_failed_launch_of_a_successor(self):
        for mode in MODES:
            with self.subTest(**mode), Noted() as note, daemons(1, **mode):
                self.fail_replays(note)
                os.kill(outcome(mirai.mirai(os.getpid)), signal.SIGKILL)
                value = outcome(mirai.mirai("weights"))
                self.assertIsInstance(value, mirai.LaunchError)
                self.assertRegex(str(value), "(?s)FileNotFoundError.*noted")

    def test_a_replay_that_works_again_ends_the_row_of_failed_launches(self):
        for mode in MODES:
            with self.subTest(**mode), Noted() as note, daemons(1, **mode):
                self.fail_replays(note)
                os.kill(outcome(mirai.mirai(os.getpid)), signal.SIGKILL)
                self.assertIsInstance(outcome(mirai.mirai("weights")), mirai.LaunchError)
                with open(note.path, "w") as file:
                    file.write("others")
                launch_local(1)
                self.assertEqual(outcome(mirai.mirai("weights")), "others")

    def test_a_replay_that_fails_by_hand_ends_that_daemon_and_says_why(self):
        with Noted() as note, daemons(1, url="tcp://127.0.0.1:0"):
            self.fail_replays(note)
            code, said = ByHand(status()["daemons"]).status(SOON)
            self.assertNotIn(code, (0, 1, 2, 3))
            self.assertRegex(said, "FileNotFoundError.*noted")
            self.assertEqual(outcomes([mirai.mirai("weights") for _ in range(3)]), ["weights"] * 3)

    def test_with_a_minimum_it_waits_for_those_that_are_still_to_join(self):
        with daemons(1):
            mp = mirai.everywhere("import os; stage = 1; os.getpid()", _min=3)
            self.assertEqual(len(mp), 3)
            self.assertEqual(outcome(mirai.mirai("stage")), 1)      # those that are there go on
            wait_until(lambda: unresolved(mp) == 2, SOON)
            launch_local(2)
            self.assertEqual(len(set(outcomes(mp))), 3)
            self.assertEqual(on_each(3, "stage"), [1] * 3)
            launch_local(1)
            self.assertEqual((len(mp), on_each(4, "stage")), (3, [1] * 4))
            self.assertEqual(len(mirai.everywhere("1", _min=2)), 4)

    def test_with_a_minimum_and_no_daemon_yet_the_first_to_join_answer(self):
        for mode in MODES:
            with self.subTest(**mode), daemons(url="tcp://127.0.0.1:0", **mode):
                mp = mirai.everywhere("import os; os.getpid()", _min=2)
                later = mirai.mirai("os.getpid()")
                self.assertEqual((len(mp), unresolved(mp), later.done()), (2, 2, False))
                with ByHand(status()["daemons"]) as one, ByHand(status()["daemons"]) as two:
                    self.assertEqual(set(outcomes(mp)), {one.pid, two.pid})
                    self.assertIn(outcome(later), (one.pid, two.pid))

    def test_it_does_not_advance_the_streams_of_a_seed(self):
        for mode in (*MODES, {"sync": True}):
            found = []
            for calls in (0, 3):
                with daemons(1, seed=5, **mode):
                    for _ in range(calls):
                        outcomes(mirai.everywhere(_draw))
                    found.append([outcome(mirai.mirai(_draw))])
                    for _ in range(calls):
                        outcomes(mirai.everywhere("import random; random.seed(1)"))
                    found[-1] += outcomes(mirai_map(range(3), _draw))
            with self.subTest(**mode):
                self.assertEqual(found[0], found[1])

    def test_its_items_can_be_cancelled_and_the_daemons_work_on(self):
        for mode in MODES:
            with self.subTest(**mode), Gate() as gate, daemons(2, **mode):
                mp = mirai.everywhere(sleeping, gate.enter)
                pids = {gate.arrived()[1] for _ in range(2)}
                gate.open()
                self.assertEqual(stop_mirai(mp), [True, True])
                self.assertEqual({type(value) for value in mp[:]}, {MiraiCancelled})
                self.assertEqual(set(outcomes(mirai.everywhere(os.getpid))), pids)

    def test_a_daemon_that_dies_of_it_is_a_19_of_that_item(self):
        with Noted() as note, daemons(2):
            source = ("import os\ntry: os.close(os.open(path, os.O_CREAT | os.O_EXCL))\n"
                      "except FileExistsError: pass\nelse: os._exit(3)")
            values = outcomes(mirai.everywhere(source, path=note.path))
            self.assertEqual(sorted(type(value).__name__ for value in values), ["MiraiConnectionReset", "NoneType"])
            wait_until(lambda: connections() == 2, SOON)
            self.assertEqual(outcomes([mirai.mirai(abs, -1) for _ in range(4)]), [1] * 4)

    def test_in_sync_mode_it_lasts_until_the_reset_and_leaves_the_host_alone(self):
        at = written(LOADER)
        with daemons(sync=True):
            mp = mirai.everywhere("import math as m; model = (m.floor(s), 1)", s=3.5)
            self.assertEqual((len(mp), mp[:]), (1, [None]))
            self.assertEqual(mirai.mirai("model, m.floor(s)")[:], ((3, 1), 3))
            self.assertEqual(mirai.mirai(at.use, 2)[:], 7)
            mirai.everywhere(at.load, 5)
            self.assertEqual((mirai.mirai(at.use, 2)[:], mirai_map([1, 2], at.use)[:]), (10, [5, 10]))
            self.assertIsInstance(mirai.everywhere("1 / 0")[:][0], MiraiError)
        self.assertIsNone(at.model)
        self.assertFalse({"model", "m", "s"} & set(vars(sys.modules["__main__"])))
        with daemons(sync=True):
            self.assertIsInstance(mirai.mirai("model")[:], MiraiError)

    def test_another_profile_and_another_setting_know_nothing_of_it(self):
        with daemons(1, compute="a"), daemons(1, compute="b"):
            outcomes(mirai.everywhere("stage = 1", _compute="a"))
            self.assertEqual(outcome(mirai.mirai(_name("stage"), _compute="a")), 1)
            self.assertIsNone(outcome(mirai.mirai(_name("stage"))))
            daemons(1, compute="a")
            self.assertIsNone(outcome(mirai.mirai(_name("stage"), _compute="a")))

    def test_without_daemons_it_is_an_error(self):
        for f in ("x = 1", os.getpid):
            with self.assertRaisesRegex(RuntimeError, r"no daemons are set.*daemons\(4\)"):
                mirai.everywhere(f)
        with self.assertRaisesRegex(RuntimeError, "'never set'"):
            mirai.everywhere("x = 1", _compute="never set")

    def test_bad_input_is_an_error_at_the_call(self):
        for options in (*MODES, {"sync": True}):
            with self.subTest(**options), daemons(1, **options):
                for error, text, arguments, named in (
                        (TypeError, "callable", (3,), {}), (SyntaxError, "", ("1 +",), {}),
                        (TypeError, "keyword", ("x", 1), {}), (TypeError, "args.0.", (print, threading.Lock()), {}),
                        (TypeError, "lock", ("x",), {"lock": threading.Lock()}),
                        (ValueError, "_min", ("x = 1",), {"_min": 0}), (ValueError, "_min", ("x = 1",), {"_min": "2"})):
                    with self.subTest(arguments=arguments), self.assertRaisesRegex(error, text):
                        mirai.everywhere(*arguments, **named)
                self.assertEqual(outcome(mirai.mirai(abs, -1)), 1)


# A program, and what is changed in it one after the other: each next call must see it.
CHANGING = """
import abc, enum, functools
K, rows, mode, point, table = 1, [1], None, (0, 0), {}
look_up = table.get
def deep(): return K, mode
def helper(): return "helper", deep(), rows
def wrap(f):
    @functools.wraps(f)
    def inner(*args): return "wrapped", f(*args), K
    return inner
@wrap
def wrapped(): return rows
class Base:
    tag = "base"
    def who(self): return self.tag, K
class Other:
    tag = "other"
    def who(self): return "other", K
class Meta(type):
    def size(cls): return len(vars(cls)), K
class A(Base, metaclass=Meta):
    number, items = 1, [1]
    def get(self): return self.number, self.items, self.who(), K
    @property
    def prop(self): return "prop", K
    @staticmethod
    def static(x=1): return "static", x, K
    @classmethod
    def of_class(cls): return cls.number
    def keyed(self, *, by=[1]): return by, self.keyed.__kwdefaults__
    __registry__ = {}
@abc.abstractmethod
def marked(): return getattr(marked, "kept", None)
class Abstract(abc.ABC): pass
class Colour(enum.Enum): RED = 1
def make(n):
    def inner(): return n
    return inner
inner = make(1)
def f(x=0, *, y=0):
    found = [helper(), wrapped(), A().get(), A().prop, A.static(), A.of_class(), A.size()[1], inner(), x, y]
    found += [point, look_up("a"), A().keyed(), A.__registry__, isinstance(1, Abstract), vars(Colour.RED).get("note")]
    return [*found, marked(), [K for _ in rows], (lambda: K)(), getattr(f, "mark", None), Base().who()]
def g(x=3, *, y=4): return "g", x, y, K
"""
CHANGES = """
K = 2
for i in range(9): point = (i, i + 0.5)
for i in range(9): point = (i, i + 0.25)
point = None
table["a"] = 1
A.keyed.__kwdefaults__["by"].append(2)
A.keyed.__kwdefaults__["by"] = (3,)
A.keyed.cache = {}
A.keyed.cache["x"] = 1
A.__registry__["x"] = 2
Abstract.register(int)
Colour.RED.note = "noted"
marked.kept = ["a"]
marked.kept.append("b")
del table["a"]
A.__doc__ = "text"
mode = "on"
rows.append(2)
rows = [3]
def deep(): return "new deep", K
def helper(): return "new helper", K, deep()
deep.__code__ = (lambda: ("deeper", K)).__code__
helper.__defaults__ = ()
K = 2.5
K = 3.5
A.number = 5
A.items.append(2)
A.items = (1,)
A.items = ([],)
A.items[0].append(4)
A.get = lambda self: ("patched", self.number, K)
Base.who = lambda self: ("patched base", K)
Base.tag = "re-tagged"
A.prop = property(lambda self: "another property")
A.static = staticmethod(lambda: ("another static", K))
A.static = staticmethod(functools.partial(max, 1, 2))
A.of_class = classmethod(lambda cls: ("of class", cls.number))
Meta.size = lambda cls: (0, "another size")
A.__bases__ = (Other,)
Other.who = lambda self: "other who"
A.get = Base.who
inner = make(2)
inner.__closure__[0].cell_contents = 3
inner.__closure__[0].cell_contents = [3]
inner.__closure__[0].cell_contents.append(4)
wrapped.__closure__[0].cell_contents = lambda: ("unwrapped", K)
wrapped.__wrapped__ = len
f.__defaults__ = (7,)
f.__kwdefaults__ = {"y": 8}
f.__kwdefaults__["y"] = 9
f.mark = "marked"
f.mark = "marked again"
K = (1, 2)
K = (1, [2])
K[1].append(3)
class A(A): number = "of a child"
A.number = "of the child, patched"
f.__code__ = g.__code__
def f(): return "another f", K
K = helper
"""


class TestDefinitions(Case):
    """What is sent ahead, once, and what is looked at anew by each call."""

    def test_each_change_is_seen_by_the_next_call(self):
        space = {"__name__": "mirai_test_changing"}
        exec(CHANGING, space)
        with daemons(1):
            for change in ["", *re.split(r"\n(?! )", CHANGES.strip())]:
                exec(change, space)
                f = space["f"]
                for _ in range(3):
                    with self.subTest(change):
                        self.assertEqual(repr(mirai.mirai(f).result(LONG)).split(" at 0x")[0], repr(f()).split(" at 0x")[0])

    def test_a_configuration_that_can_not_be_rebuilt_there_fails_the_task_and_not_the_daemon(self):
        class Odd(type):
            pass

        class Late:
            def __reduce__(self):
                return (exec, ("raise RuntimeError('not here')", {}))

            def __call__(self, _):
                return b""
        with daemons(1, serial=mirai.serial_config(Odd, Late(), bytes)):
            for _ in range(2):
                self.assertRaisesRegex(RuntimeError, "not here", mirai.mirai(abs, -1).result, LONG)
            self.assertEqual(info().cumulative, 1)

    def test_what_a_task_changes_is_as_it_was_for_the_next(self):
        space = {"__name__": "mirai_test_changing"}
        exec(textwrap.dedent("""
            K, rows = 1, [1]
            class A: number, items = 1, [1]
            def f():
                global K
                K += 1
                rows.append(K)
                A.number += 1
                A.items.append(2)
                A.more = getattr(A, "more", 0) + 1
                return K, rows, A.number, A.items, A.more
            """), space)
        with daemons(1):
            for _ in range(3):
                self.assertEqual(mirai.mirai(space["f"]).result(LONG), (2, [1, 2], 2, [1, 2], 1))

    def test_a_global_that_is_deleted_is_no_more(self):
        space = {"__name__": "mirai_test_changing"}
        exec("Z = 5\ndef f(): return len([Z])\ndef len(_): return 'shadow'\n", space)
        with daemons(1):
            self.assertEqual(mirai.mirai(space["f"]).result(LONG), "shadow")
            del space["len"]
            self.assertEqual(mirai.mirai(space["f"]).result(LONG), 1)
            del space["Z"]
            with self.assertRaisesRegex(NameError, "'Z' is not defined"):
                mirai.mirai(space["f"]).result(LONG)

    def test_functions_in_arguments_are_those_that_the_function_refers_to(self):
        def key():
            return 1

        def f(x):
            return x is key, {key: 1}.get(x), x()
        with daemons(1):
            for _ in range(4):
                self.assertEqual(mirai.mirai(f, key).result(LONG), (True, 1, 1))

    def test_classes_that_tasks_make_stay_apart(self):
        """They have the same name and code, and may come from daemons that know nothing of each other."""
        def make(n):
            class Base:
                twice = 2 * n

            class Made(Base):
                data = [n]

                def get(self):
                    return self.data, self.twice, n
            return Made()
        with daemons(2):
            found = [m.result(LONG) for m in [mirai.mirai(make, i) for i in range(8)]] + mirai_map(range(8), make).results()
            self.assertEqual([each.get() for each in found], [([n], 2 * n, n) for n in [*range(8)] * 2])
            self.assertEqual(len({type(each) for each in found}), 16)
            again = mirai_map(found, lambda each: each).results()
            self.assertEqual([type(each) for each in again], [type(each) for each in found])

    def test_classes_that_the_host_makes_in_a_loop_stay_apart(self):
        def make(n):
            return type("Made", (), {"data": [n]})
        ms = []
        with daemons(2):
            for i in range(8):
                made = make(i)
                ms.append(mirai.mirai(lambda made=made: made()))
                del made
                gc.collect()
            self.assertEqual([m.result(LONG).data for m in ms], [[i] for i in range(8)])

    def test_results_do_not_change_what_modules_of_the_host_hold(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "mirai_test_state.py"), "w") as file:
                file.write("STATE = 0\ndef act(self): return STATE\ndef make():\n    class Q:\n"
                           "        also = act\n        def get(self): return STATE\n    return Q()\n"
                           "def work():\n    global STATE\n    STATE = 5\n    return make()\n")
            sys.path.insert(0, folder)
            try:
                import mirai_test_state
                with daemons(1):
                    found = mirai.mirai(mirai_test_state.work).result(LONG)
                self.assertEqual((mirai_test_state.STATE, found.get(), found.also()), (0, 5, 0))
            finally:
                sys.path.remove(folder)
                sys.modules.pop("mirai_test_state", None)

    def test_what_another_thread_changes_meanwhile_is_seen_in_the_end(self):
        """However the change and the first pickling fall together, the last word counts."""
        space = {"__name__": "mirai_test_changing"}
        exec("K = 0\nclass A: number = 0\ndef f(): return K, A.number\n", space)
        f, A = space["f"], space["A"]
        stop = threading.Event()

        def change():
            i = 0
            while not stop.is_set():
                i += 1
                space["K"] = A.number = i
        interval = sys.getswitchinterval()
        thread = threading.Thread(target=change)
        sys.setswitchinterval(1e-5)
        try:
            thread.start()
            for _ in range(200):
                mirai.dump_task(f, (), {}, None)
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(interval)
        for _ in range(3):
            value, success = evaluated(f)
            self.assertEqual((value[0], success), (space["K"], True))
            self.assertEqual(mirai.loads(mirai.dumps(A)).number, A.number)
        with daemons(1):
            self.assertEqual(mirai.mirai(f).result(LONG), (space["K"], A.number))

    def test_a_hundred_megabytes_that_a_function_closes_over_go_to_each_daemon_once(self):
        """Each daemon has one object of these bytes, for all its tasks."""
        size = at_length(30_000_000, 100_000_000)
        data = os.urandom(size)

        def f(i):
            return os.getpid(), id(data), i, data[::size // 10]
        with daemons(4):
            start = time.monotonic()
            found = [m.result(LONG) for m in [mirai.mirai(f, i) for i in range(1000)]]
            found += mirai_map(range(1000), f).results()
            found += [mirai.mirai(f, i).result(LONG) for i in range(20)]        # one by one, with none in between
            self.assertEqual([i for _, _, i, _ in found], [*range(1000), *range(1000), *range(20)])
            self.assertEqual(len({pid for pid, _, _, _ in found}), len({(pid, at) for pid, at, _, _ in found}))
            self.assertEqual({seen for _, _, _, seen in found}, {data[::size // 10]})
            self.assertLess(time.monotonic() - start, 60)

    @needs("numpy")
    def test_an_array_that_a_function_reads_is_as_it_is_at_each_call_and_can_be_written(self):
        import numpy
        array = numpy.arange(100_000, dtype="float64")

        def f(i, other=None):
            array[0] += 1
            array[i] += 1
            return float(array.sum()), array.flags.writeable, other
        with daemons(1):
            for _ in range(3):
                expected = float(array.sum()) + 2
                self.assertEqual(mirai.mirai(f, 5).result(LONG), (expected, True, None))
                array[7] *= 3
            needs = {hash for _ in range(3) for hash in mirai.dump_task(f, (5,), {}, None).needs}
            self.assertLessEqual(len(needs), 2)
            total, _, other = mirai.mirai(f, 5, array).result(LONG)
            self.assertEqual((total, other[0], array[0]), (float(array.sum()) + 2, 1.0, 0.0))
            large = mirai.mirai(lambda x: x * 2, numpy.ones(1_000_000)).result(LONG)
            self.assertEqual((float(large.sum()), large.flags.writeable), (2_000_000.0, True))

    def test_a_new_daemon_has_what_its_predecessor_had(self):
        data = os.urandom(1_000_000)

        class Point:
            def __init__(self, x):
                self.x = x

        def f(p, end=False):
            if end:
                os.kill(os.getpid(), signal.SIGKILL)
            return len(data) + p.x
        with daemons(1):
            for _ in range(3):
                self.assertEqual(mirai.mirai(f, Point(1)).result(LONG), 1_000_001)
                self.assertEqual(mirai.mirai(f, Point(1), True)[:].code, 19)

    def test_definitions_that_no_task_needs_make_room_for_others(self):
        link = None
        with daemons(2), replaced(mirai, "KEPT_DEFINITIONS", 200_000):
            link = mirai._find(None).link
            for i in range(60):
                data = bytes([i]) * 100_000
                m = mirai.mirai(lambda: data[0] + len(data))
                if i % 7 == 3:
                    m.cancel()
                else:
                    self.assertEqual(m.result(LONG), i + 100_000)
                self.assertLessEqual(link.unneeded_bytes, 350_000)
                self.assertEqual(link.unneeded_bytes, sum(link.ahead[hash][1] for hash in link.unneeded))
            self.assertLess(len(link.ahead), 20)
            inside = mirai.mirai(lambda: len(__import__("mirai")._received)).result(LONG)
            self.assertLess(inside, 20)

    def test_a_definition_that_a_task_needs_stays(self):
        with Gate() as gate, daemons(1), replaced(mirai, "KEPT_DEFINITIONS", 0):
            held = mirai.mirai(gate.enter)
            gate.arrived()
            waiting = []
            for i in range(30):
                data = bytes([i]) * 70_000
                waiting.append(mirai.mirai(lambda: data[0] + len(data)))
            for m in waiting[::3]:
                m.cancel()
            gate.open()
            held.result(LONG)
            self.assertEqual([m[:] for i, m in enumerate(waiting) if i % 3], [i + 70_000 for i in range(30) if i % 3])
            for _ in range(3):              # gone, and sent anew
                self.assertEqual(mirai.mirai(lambda: data[0] + len(data)).result(LONG), 29 + 70_000)

    def test_threads_that_submit_share_what_is_sent_ahead(self):
        data = [os.urandom(100_000) for _ in range(3)]

        def make(each):
            return lambda i: len(each) + i
        functions = [make(each) for each in data]

        def work(k):
            return [mirai.mirai(functions[(i + k) % 3], i).result(LONG) - 100_000 for i in range(40)]
        with daemons(2), replaced(mirai, "KEPT_DEFINITIONS", 150_000):
            with concurrent.futures.ThreadPoolExecutor(6) as pool:
                self.assertEqual(list(pool.map(work, range(6))), [list(range(40))] * 6)
            link = mirai._find(None).link
            self.assertTrue(all(users == 0 for users, _ in link.ahead.values()))
            self.assertEqual(set(link.unneeded), set(link.ahead))

    def test_a_daemon_started_by_hand_has_definitions_too(self):
        data = os.urandom(500_000)

        class Point:
            x = 1
        with daemons(url=mirai.local_url()):
            with subprocess.Popen([sys.executable, mirai.__file__, "daemon", status()["daemons"]]) as process:
                found = mirai_map(range(5), lambda i: (len(data), Point().x, i)).results()
                daemons(0)
                self.assertEqual(process.wait(LONG), 0)
        self.assertEqual(found, [(500_000, 1, i) for i in range(5)])


# What a session changes between calls, as it would in cells: `call` evaluates on the daemon, `expect` compares.
SESSIONS = {
    "a_redefined_function_is_its_newest": r"""
def f$(): return 1
def g$(): return [f$()]
expect("$", lambda: [call(f$), call(g$)], [1, [1]])
def f$(): return 2
expect("$", lambda: [call(f$), call(g$)], [2, [2]])
f$ = lambda: 3
expect("$", lambda: [call(f$), call(g$)], [3, [3]])
""",
    "a_redefined_class_is_its_newest": r"""
class Point$:
    def __init__(self, x): self.x = x
    def get(self): return self.x
def make$(x): return Point$(x)
old$ = Point$(1)
Old$ = Point$
expect("$", lambda: [call(old$.get), call(make$, 2).get(), type(call(give, old$)) is Point$], [1, 2, True])
class Point$:
    def __init__(self, x): self.x = x
    def get(self): return -self.x
expect("$", lambda: [call(Point$(1).get), call(make$, 2).get(), type(call(make$, 2)) is Point$], [-1, -2, True])
expect("$", lambda: [call(old$.get), type(call(give, old$)) is Old$], [1, True])
""",
    "a_patched_class_goes_with_its_patch": r"""
class Base$:
    def name(self): return "base"
class Tool$(Base$):
    limit = 1
    gone = "still here"
    def use(self): return self.limit
tool$ = Tool$()
look$ = lambda t: (t.use(), t.name(), hasattr(t, "gone"), getattr(t, "extra", lambda: None)())
expect("$", lambda: call(look$, tool$), (1, "base", True, None))
Tool$.limit = 2
expect("$", lambda: call(look$, tool$), (2, "base", True, None))
Tool$.use = lambda self: ("patched", self.limit)
Base$.name = lambda self: "new base"
Tool$.extra = staticmethod(lambda: 7)
del Tool$.gone
expect("$", lambda: call(look$, tool$), (("patched", 2), "new base", False, 7))
expect("$", lambda: look$(call(give, tool$)), (("patched", 2), "new base", False, 7))
""",
    "globals_are_read_anew": r"""
x$, rows$ = 1, [1]
def helper$(): return x$
def f$(): return helper$(), x$, rows$
expect("$", lambda: call(f$), (1, 1, [1]))
x$ = 2
rows$.append(2)
expect("$", lambda: call(f$), (2, 2, [1, 2]))
helper$ = lambda: -x$
expect("$", lambda: call(f$), (-2, 2, [1, 2]))
""",
    "closures_are_read_anew": r"""
def counter$():
    count = 0
    def increase():
        nonlocal count
        count += 1
        return count
    return increase, lambda: count
increase$, read$ = counter$()
expect("$", lambda: [call(read$), increase$(), call(read$), call(increase$), call(read$)], [0, 1, 1, 2, 1])
""",
    "what_a_task_changes_stays_there": r"""
kept$ = [1]
level$ = 5
class Kept$: seen = []
def change$():
    global level$
    level$ = 6
    kept$.append(2)
    Kept$.seen = ["there"]
    return level$, kept$
expect("$", lambda: [call(change$), call(change$)], [(6, [1, 2]), (6, [1, 2])])
expect("$", lambda: [level$, kept$, Kept$.seen], [5, [1], []])
""",
    "results_are_of_the_classes_here": r"""
import collections, dataclasses, enum
class Plain$: pass
class Colour$(enum.Enum): RED = 1
Pair$ = collections.namedtuple("Pair$", "a b")
@dataclasses.dataclass
class Data$:
    x: int = 0
class Wrong$(Exception): pass
def make$(): return [Plain$(), Colour$.RED, Pair$(1, 2), Data$(3), Wrong$("no"), Plain$, Colour$]
expect("$", lambda: [type(x) for x in call(make$)[:5]], [Plain$, Colour$, Pair$, Data$, Wrong$])
expect("$", lambda: [x is y for x, y in zip(call(make$)[5:], (Plain$, Colour$))], [True, True])
expect("$", lambda: [call(make$)[1] is Colour$.RED, call(make$)[2:4] == [Pair$(1, 2), Data$(3)]], [True, True])
def fail$(): raise Wrong$("no")
def caught$():
    try:
        call(fail$)
    except Wrong$ as error:
        return error.args
expect("$", caught$, ("no",))
""",
    "classes_made_there_come_home_and_go_again": r"""
def make$():
    class Made:
        def __init__(self, x): self.x = x
        def twice(self): return Made(2 * self.x)
    return Made(1)
made$ = call(make$)
expect("$", lambda: [made$.twice().x, call(made$.twice).x, call(type(made$), 5).x], [2, 2, 5])
expect("$", lambda: type(call(give, made$)) is type(made$) is type(call(made$.twice)), True)
""",
    "recursion_through_globals_that_change": r"""
def even$(n): return True if n == 0 else odd$(n - 1)
def odd$(n): return False if n == 0 else even$(n - 1)
expect("$", lambda: [call(even$, 10), call(odd$, 10)], [True, False])
def odd$(n): return "redefined"
expect("$", lambda: [call(even$, 10), call(odd$, 10)], ["redefined", "redefined"])
""",
}
SESSIONS = {name: source.replace("$", "_" + name) for name, source in SESSIONS.items()}

# Those of which the daemon's copy comes home and is looked at there: `type(result) is type(subject)`.
COMES_HOME = {
    "abstract_class", "annotations_of_a_class", "bound_method", "cached_property_computed", "class_decorator",
    "class_local_with_closure", "class_patched", "class_plain", "closure_shares_a_cell", "context_managing_class",
    "cycles", "dataclass", "dataclass_frozen", "dataclass_made", "decorated_by_a_class", "enum_mixins", "enum_plain",
    "enum_values_of_its_own_kind", "enum_with_its_own_init", "exception_with_required_keywords", "flags",
    "function_plain", "generic_class", "generic_dataclass", "getattr_and_setattr", "iteration_and_operators",
    "metaclass", "metaclass_keywords", "named_tuple", "new_and_singleton", "partialmethod", "protocol", "set_name",
    "slots", "super_and_diamond", "type_variables", "typed_named_tuple",
}

# Functions that a module can be asked for go by name and see that module's data, not the copy that is sent beside them.
NOT_BY_NAME = {"contextmanager", "dynamic_module", "descriptor_objects", "globals_shared", "lru_cache",
               "shared_between_global_and_argument"}


def statements_of(source):
    """The text of each top-level statement, as somebody would type one after the other, and whether it has a value."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        yield "\n".join(line for line in lines[first - 1:node.end_lineno] if line.strip()), isinstance(node, ast.Expr)


def typed(source):
    """A program as it is typed at the prompt, where a blank line ends a compound statement."""
    return "".join(text + "\n\n" for text, _ in statements_of(source))


def as_doctest(source):
    return "".join((">>> " + ("shown = " if has_value else "") + text).replace("\n", "\n... ") + "\n"
                   for text, has_value in statements_of(source))


class TestEnvironments(Case):
    """Every feature, from wherever Python code is written, on one daemon: nothing there is wiped between them."""

    HEAD = """
import sys, traceback
import mirai
mirai.daemons(1)
failures = set()
def call(f, *args):
    return mirai.mirai(f, *args).result(60)
def give(x):
    return x
def failed(name):
    failures.add(name)
    print("failed", name, flush=True)
    traceback.print_exc(file=sys.stdout)
def send(name, check, subject, comes_home):
    try:
        call(check, subject)
        if comes_home:
            result = call(give, subject)
            check(result)
            assert type(result) is type(subject), type(result)
        print("ok", name, flush=True)
    except Exception:
        failed(name)
def expect(name, thunk, wanted):
    try:
        got = thunk()
        assert got == wanted, (got, wanted)
    except Exception:
        failed(name)
def end(name):
    print("failed" if name in failures else "ok", name, flush=True)
"""

    @staticmethod
    def features():
        return {name: source for name, source in FEATURES.items() if runs_here(source)}

    def cells(self):
        """(name, source) of every feature and session, each with the call that sends it."""
        for name, source in self.features().items():
            yield name, f"{source}\nsend({name!r}, check, subject, {name in COMES_HOME})\n"
        for name, source in SESSIONS.items():
            steps = source.replace(f'expect("_{name}"', f"expect({name!r}")
            yield name, f"{steps}\nend({name!r})\n"

    def check_output(self, output, wanted, more=""):
        done = re.findall(r"\bok (\w+)\s*$", output, re.M)
        missing = sorted(set(wanted) - set(done))
        text = output if len(output) < 20000 else output[:10000] + "\n[...]\n" + output[-10000:]
        said = f"{len(missing)} of {len(wanted)} failed: {', '.join(missing)}"
        self.assertFalse(missing, f"\n{text}\n{more[-3000:]}\n{said}")

    def check_program(self, mode, convert=str, size=1 << 30):
        """Runs all of them as programs of at most `size` characters, each of one process."""
        todo = list(self.cells())
        while todo:
            program, names = convert(self.HEAD), []
            while todo and (not names or len(program) + len(todo[0][1]) < size):
                name, source = todo.pop(0)
                program += convert(source)
                names.append(name)
            done = run_python(program, mode=mode, timeout=2 * LONG)
            with self.subTest(f"{names[0]} to {names[-1]}"):
                self.check_output(done.stdout, names, done.stderr)

    def test_in_a_script(self):
        self.check_program("file")

    def test_on_standard_input(self):
        self.check_program("-")

    def test_on_the_command_line(self):
        self.check_program("-c", size=100_000)      # one argument holds 128 KiB

    def test_at_the_prompt(self):
        self.check_program("-i", typed)

    NOTEBOOK = """
        import json, os, sys
        from jupyter_client.manager import start_new_kernel
        manager, client = start_new_kernel(startup_timeout=60, kernel_name="python3", env=dict(os.environ))
        def show(message):
            content = message["content"]
            if message["header"]["msg_type"] == "stream":
                sys.stdout.write(content["text"])
            elif message["header"]["msg_type"] == "error":
                print("\\n".join(content["traceback"]))
        try:
            for cell in json.load(sys.stdin):
                client.execute_interactive(cell, timeout=60, output_hook=show)
        finally:
            client.stop_channels()
            manager.shutdown_kernel(now=False)
    """

    @unittest.skipUnless(importlib.util.find_spec("ipykernel") and importlib.util.find_spec("jupyter_client"),
                         "ipykernel and jupyter_client are not installed")
    def test_in_a_notebook(self):
        cells = dict(self.cells())
        texts = json.dumps([self.HEAD, *cells.values(), "mirai.daemons(0)"])
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(self.NOTEBOOK)], input=texts, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=2 * LONG,
                              env={**os.environ, "PYTHONPATH": HERE, "NO_COLOR": "1"})
        self.check_output(done.stdout, cells, done.stderr)

    def run_pytest(self, *options):
        head = ("import mirai\nimport pytest\n\n\n@pytest.fixture(autouse=True, scope='module')\ndef one_daemon():\n"
                "    with mirai.daemons(1):\n        yield\n\n\n")
        test = "{1}\n\ndef test_{0}(check=check, subject=subject):\n    mirai.mirai(check, subject).result(60)\n\n\n"
        names = [name for name in self.features() if name not in NOT_BY_NAME]
        with tempfile.TemporaryDirectory() as folder:
            for name in ("tests", "elsewhere"):
                os.mkdir(os.path.join(folder, name))
            path = os.path.join(folder, "tests", "test_of_features.py")
            with open(path, "w") as file:
                file.write(head + "".join(test.format(name, FEATURES[name]) for name in names))
            command = [sys.executable, "-m", "pytest", "-v", "--color=no", "--tb=native", "-p", "no:cacheprovider",
                       f"--rootdir={folder}", *options, path]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  timeout=2 * LONG, cwd=os.path.join(folder, "elsewhere"),
                                  env={**os.environ, "PYTHONPATH": HERE})
        output = re.sub(r"(?m)^\S*::test_(\w+) PASSED.*$", r"ok \1", done.stdout)
        self.check_output(output, names)

    @needs("pytest")
    def test_in_pytest(self):
        self.run_pytest()

    @needs("pytest")
    def test_in_pytest_that_leaves_the_path_alone(self):
        self.run_pytest("--import-mode=importlib")

    DOCTEST = """
        import doctest, mirai, shop
        with mirai.daemons(1):
            for test in doctest.DocTestFinder().find(shop):
                if test.examples:
                    failed, _ = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST).run(test)
                    print("failed" if failed else "ok", test.name[len("shop.doc_"):], flush=True)
    """

    def test_in_doctests(self):
        features = self.features()
        send = ">>> mirai.mirai(check, subject).result(60)\n"
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "shop.py"), "w") as file:
                file.write("import mirai\n\n\n" + "".join(f"def doc_{name}():\n    {as_doctest(source) + send!r}\n\n\n"
                                                          for name, source in features.items()))
            done = run_python(f"import sys\nsys.path.insert(0, {folder!r})\n" + textwrap.dedent(self.DOCTEST),
                              timeout=2 * LONG)
        self.check_output(done.stdout, features, done.stderr)


# -- R's page on daemons()


SSH = """    # in place of ssh: it forwards a port, and runs on this machine what is to run on another
import os, socket, subprocess, sys, threading
*_, remote, command = sys.argv

def accept(listener, port):
    while True:
        near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", port))
        for pair in ((near, far), (far, near)):
            threading.Thread(target=forward, args=pair, daemon=True).start()

def forward(source, sink):
    while data := source.recv(1 << 16):
        sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)

if "-R" in sys.argv:
    here, port, _, to = sys.argv[sys.argv.index("-R") + 1].split(":")
    threading.Thread(target=accept, args=(socket.create_server((here, int(port))), int(to)), daemon=True).start()
sys.exit(subprocess.call(["/bin/sh", "-c", command], env={**os.environ, "SSH_REMOTE": remote}))
"""


class TestSeedPage(Case):
    """R's page on `daemons()`: each of its examples, then what its text promises. In R's order."""

    def tearDown(self):
        for compute in list(mirai._profiles):
            daemons(0, compute=compute)
        super().tearDown()

    def setUp(self):
        super().setUp()
        mirai.mirai(abs, -1).result(LONG)       # a nursery, and a dispatcher for processes of their own
        self.before = family_of(nursery_pid())

    def started(self):
        """The dispatchers and local daemons of this test that live."""
        return [pid for pid in family_of(nursery_pid()) if pid not in self.before and is_alive(pid)]

    def check_url(self, pattern):
        found = status()
        self.assertRegex(found["daemons"], pattern)
        self.assertEqual(found["connections"], info().connections)
        return found["daemons"]

    @staticmethod
    def key():
        """What daemons that are not launched by mirai need, where others than this machine's reach the URL."""
        command, = mirai.launch_remote(1)
        return command.split()[1]

    # examples

    def test_two_local_daemons_using_dispatcher(self):
        self.assertTrue(daemons(2))
        self.assertEqual(status()["connections"], 2)
        self.assertEqual(status()["mirai"], {"awaiting": 0, "executing": 0, "completed": 0})
        self.assertEqual(len(self.started()), 3)
        self.assertFalse(daemons(0))
        self.assertEqual(status(), {"connections": 0, "daemons": 0})

    def test_two_local_daemons_not_using_dispatcher(self):
        self.assertTrue(daemons(2, dispatcher=False))
        self.assertEqual(status()["connections"], 2)
        self.assertEqual(len(self.started()), 2)            # there is none
        self.assertEqual(mirai.mirai("x + 1", x=1)[:], 2)
        self.assertFalse(daemons(0))
        self.assertEqual(status(), {"connections": 0, "daemons": 0})

    def test_a_dispatcher_that_accepts_tls_over_tcp_connections(self):
        daemons(url=mirai.host_url(tls=True))
        url = self.check_url(r"^tls\+tcp://.+:[1-9]\d*$")
        with ByHand(url, key=self.key()) as one:
            joined(1)
            self.assertEqual(launch_local(1), 1)
            self.assertEqual(set(outcomes(mirai.everywhere(os.getpid))), {one.pid, *_pids(2)})
            daemons(0)
            self.assertEqual(one.status(), (0, ""))

    def test_a_host_url_for_remote_daemons_to_dial_into(self):
        daemons(url=mirai.host_url(), dispatcher=False)
        url = self.check_url(r"^tcp://.+:[1-9]\d*$")
        with ByHand(url, key=self.key()) as one:
            joined(1)
            self.assertEqual(mirai.mirai(os.getpid).result(LONG), one.pid)
            daemons(0)
            self.assertEqual(one.status(), (0, ""))

    def test_a_loopback_url_for_daemons_to_dial_into_with_a_dispatcher_and_without(self):
        for dispatcher in (True, False):
            with self.subTest(dispatcher=dispatcher):
                daemons(url=mirai.local_url(tcp=True), dispatcher=dispatcher)
                url = self.check_url(r"^tcp://127\.0\.0\.1:[1-9]\d*$")
                self.assertEqual(status()["connections"], 0)
                m = mirai.mirai(os.getpid)
                with ByHand(url) as one:
                    joined(1)
                    self.assertEqual(m.result(LONG), one.pid)
                    daemons(0)
                    self.assertEqual(one.status(), (0, ""))

    def test_with_evaluates_with_daemons_for_the_duration_of_a_block(self):
        out = io.StringIO()
        with daemons(2), contextlib.redirect_stdout(out):
            pids = _pids(2)
            m1 = mirai.mirai(os.getpid)
            m2 = mirai.mirai(os.getpid)
            print(m1[:], m2[:])
        self.assertLessEqual(set(map(int, out.getvalue().split())), pids)
        self.assertFalse(mirai.daemons_set())

    def ssh(self, *remotes, **options):
        """ssh_config() for machines that are this one."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "ssh")
        with open(path, "w") as file:
            file.write(SSH)
        return mirai.ssh_config(remotes, command=f"{sys.executable} {path}", python=sys.executable, **options)

    def test_daemons_on_remotes_by_ssh_that_connect_back_over_tls(self):
        daemons(url=mirai.host_url(tls=True), remote=self.ssh("ssh://nodeone", "ssh://nodetwo"))
        self.check_url(r"^tls\+tcp://")
        self.assertEqual((status()["connections"], len(_pids(2))), (2, 2))
        found = outcomes(mirai.everywhere(os.getenv, "SSH_REMOTE"))
        self.assertEqual(sorted(found), ["nodeone", "nodetwo"])

    def test_four_daemons_on_a_remote_machine_by_ssh_tunnelling(self):
        daemons(4, url=mirai.local_url(tcp=True), remote=self.ssh("ssh://10.75.32.90", tunnel=True))
        self.check_url(r"^tcp://127\.0\.0\.1:")
        self.assertEqual((status()["connections"], len(_pids(4))), (4, 4))
        self.assertEqual(outcomes(mirai.everywhere(os.getenv, "SSH_REMOTE")), ["10.75.32.90"] * 4)

    def test_synchronous_mode(self):
        daemons(sync=True)
        m = mirai.mirai(os.getpid)
        daemons(0)
        self.assertEqual(m[:], os.getpid())

    def test_synchronous_mode_restricted_to_a_profile(self):
        daemons(sync=True, compute="sync")
        with mirai.with_daemons("sync"):
            m = mirai.mirai(os.getpid)
        other = mirai.mirai(os.getpid)          # no daemons are set for the default profile: a process of its own
        daemons(0, compute="sync")
        self.assertEqual(m[:], os.getpid())
        self.assertNotEqual(other.result(LONG), os.getpid())

    # arguments

    def test_a_url_with_n_sets_local_daemons_and_others_may_join(self):
        for url in ("tcp://127.0.0.1:0", mirai.local_url()):
            daemons(1, url=url)
            local, = _pids(1)
            with ByHand(status()["daemons"]) as one:
                joined(2)
                self.assertEqual(_pids(2), {local, one.pid})
                daemons(0)
                self.assertEqual(one.status(), (0, ""))

    def test_further_arguments_are_passed_to_the_daemons(self):
        daemons(1, autoexit=None, cleanup=False, output=False, maxtasks=100, idletime=60.0, walltime=60.0,
                asyncdial=True)
        mirai.mirai("os.environ['SEED_PAGE'] = 'kept'", os=os).result(LONG)
        self.assertEqual(mirai.mirai(os.getenv, "SEED_PAGE").result(LONG), "kept")
        daemons(1, maxtasks=1)
        pids = [mirai.mirai(os.getpid).result(LONG) for _ in range(3)]
        self.assertEqual(len(set(pids)), 3)

    def test_sync_disregards_all_but_seed_and_compute(self):
        daemons(3, sync=True, memory=1, maxtasks=1, dispatcher=False, seed=1, compute="here")
        pids = mirai_map([1, 2], lambda _: os.getpid(), _compute="here")[:]
        self.assertEqual(pids, [os.getpid()] * 2)
        drawn = mirai.mirai("random.random()", random=random, _compute="here")[:]
        daemons(sync=True, seed=1, compute="here")
        mirai_map([1, 2], abs, _compute="here")
        self.assertEqual(mirai.mirai("random.random()", random=random, _compute="here")[:], drawn)

    def test_a_seed_is_associated_with_a_mirai_independently_of_where_it_is_evaluated(self):
        def draw():
            return ([mirai.mirai("import random; random.random()").result(LONG) for _ in range(4)],
                    mirai_map(range(6), lambda x: random.uniform(x, 7))[:])

        found = []
        for n, options in ((1, {}), (3, {}), (2, {"dispatcher": False}), (None, {"sync": True})):
            with daemons(n, seed=1, **options):
                found.append(draw())
        self.assertEqual(found, found[:1] * 4)
        self.assertEqual(len(set(found[0][0])), 4)
        with daemons(1, seed=2):
            self.assertNotEqual(draw(), found[0])

    def test_the_functions_of_random_itself_draw_from_the_stream_of_the_mirai(self):
        found = []
        for n in (1, 2):        # they are methods of an instance, whose state must not come along
            with daemons(n, seed=1):
                found.append(([mirai.mirai(random.random).result(LONG) for _ in range(4)],
                              mirai_map([1] * 6, random.gauss, 1)[:]))
        self.assertEqual([len(set(drawn)) for drawn in found[0]], [4, 6])
        self.assertEqual(found[1], found[0])

    def test_without_a_seed_daemons_have_streams_that_differ(self):
        with daemons(2), Gate() as gate:
            ms = [mirai.mirai(lambda enter: (random.random(), enter())[0], gate.enter) for _ in range(2)]
            gate.arrived(), gate.arrived()
            gate.open()
            self.assertEqual(len({m.result(LONG) for m in ms}), 2)

    def test_serial_requires_dispatcher(self):
        generator = type(i for i in ())
        serial = mirai.serial_config(generator, bytes, iter)
        with self.assertRaises(ValueError):
            daemons(1, serial=serial, dispatcher=False)
        with daemons(1, serial=serial):
            self.assertEqual(mirai.mirai(sum, (i for i in range(4))).result(LONG), 6)

    # details

    def test_resetting_ends_all_processes_and_makes_the_unresolved_19s(self):
        for options in ({}, {"dispatcher": False}):
            with self.subTest(options), Gate() as gate:
                daemons(2, **options)
                pids = self.started()
                ms = [mirai.mirai(gate.enter, i) for i in range(4)]
                gate.arrived(), gate.arrived()
                daemons(0)
                for m in ms:
                    self.assertIs(type(m.data), MiraiConnectionReset)
                    self.assertEqual(m.data.code, 19)
                wait_until(lambda pids=pids: not any(map(is_alive, pids)), 10)
                self.assertNotEqual(*[mirai.mirai(os.getpid).result(LONG) for _ in range(2)])      # a process each

    def test_setting_resets_what_is_set_and_launch_local_adds(self):
        daemons(1)
        old = _pids(1)
        daemons(1)
        new = _pids(1)
        self.assertFalse(old & new)
        self.assertEqual(launch_local(2), 2)
        self.assertEqual(status()["connections"], 3)
        self.assertLessEqual(new, _pids(3))

    # dispatcher

    def test_dispatcher_gives_a_task_to_whichever_daemon_is_free(self):
        with daemons(2), Gate() as gate:
            held = mirai.mirai(gate.enter)
            gate.arrived()
            self.assertEqual([mirai.mirai(abs, -i).result(LONG) for i in range(4)], [0, 1, 2, 3])
            self.assertFalse(held.done())

    def test_without_dispatcher_tasks_go_round_and_queue_at_each_daemon(self):
        with daemons(2, dispatcher=False), Gate() as gate:
            held = mirai.mirai(gate.enter)
            gate.arrived()
            free, stuck, free_too = (mirai.mirai(os.getpid) for _ in range(3))
            self.assertEqual(free.result(LONG), free_too.result(LONG))
            self.assertTrue(mirai.unresolved(stuck))            # while the other daemon is idle
            gate.open()
            self.assertNotEqual(stuck.result(LONG), free.result(LONG))
            self.assertIsNone(held.result(LONG))

    def test_cancellation_and_timeouts_with_a_dispatcher_and_without(self):
        for options in ({}, {"dispatcher": False}):
            with self.subTest(options), daemons(1, **options), Gate() as gate:
                m = mirai.mirai("enter(); import time; time.sleep(1000)", enter=gate.enter)
                gate.arrived()
                gate.open()
                self.assertTrue(stop_mirai(m))
                self.assertIs(type(m.data), MiraiCancelled)
                self.assertIs(type(mirai.mirai("import time; time.sleep(1000)", _timeout=0.1)[:]), MiraiTimeout)
                self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    # distributed computing

    def test_it_adjusts_to_the_number_of_daemons_that_are_connected(self):
        daemons(url="tcp://127.0.0.1:0")
        url = status()["daemons"]
        with ByHand(url):
            joined(1)
            with ByHand(url, "-n", "2"):
                joined(3)
                self.assertEqual(len(_pids(3)), 3)
            joined(1)
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_ipv6_is_in_brackets_and_port_zero_is_a_free_one(self):
        if not os.path.exists("/proc/net/if_inet6"):
            self.skipTest("no IPv6 here")
        daemons(1, url="tcp://[::1]:0")
        self.check_url(r"^tcp://\[::1\]:[1-9]\d*$")
        self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_shell_commands_for_manual_deployment(self):
        daemons(url=mirai.host_url())
        commands = mirai.launch_remote(2)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            print(commands)
        self.assertEqual((len(commands), out.getvalue().splitlines()), (2, list(commands)))
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            os.symlink(sys.executable, os.path.join(folder, "python3"))
            environ = {**os.environ, "PYTHONPATH": HERE, "PATH": folder + os.pathsep + os.environ["PATH"]}
            there = [stack.enter_context(subprocess.Popen(["/bin/sh", "-c", command], env=environ)) for command in commands]
            stack.callback(daemons, 0)
            joined(2)
            self.assertEqual(len(_pids(2)), 2)
            daemons(0)
            self.assertEqual([one.wait(LONG) for one in there], [0, 0])

    # compute profiles

    def test_local_and_remote_profiles_side_by_side(self):
        daemons(1)
        daemons(url="tcp://127.0.0.1:0", compute="remote")          # the far end is here too
        with ByHand(status("remote")["daemons"]) as one:
            self.assertEqual(mirai.mirai(os.getpid, _compute="remote").result(LONG), one.pid)
            self.assertEqual({mirai.mirai(os.getpid).result(LONG)}, _pids(1))
            daemons(0, compute="remote")
            self.assertEqual(one.status(), (0, ""))
            self.assertEqual(mirai.mirai(abs, -1).result(LONG), 1)

    def test_cpu_and_gpu_profiles(self):
        daemons(2, compute="cpu")
        daemons(1, compute="gpu")
        cpu, gpu = _pids(2, "cpu"), _pids(1, "gpu")
        self.assertFalse(cpu & gpu)
        self.assertLessEqual(set(mirai_map(range(4), lambda _: os.getpid(), _compute="cpu")[:]), cpu)
        self.assertEqual({mirai.mirai(os.getpid, _compute="gpu").result(LONG)}, gpu)
        with mirai.with_daemons("gpu"):
            self.assertEqual({mirai.mirai(os.getpid).result(LONG)}, gpu)
        daemons(0, compute="gpu")
        self.assertFalse(mirai.daemons_set("gpu"))
        self.assertTrue(mirai.daemons_set("cpu"))


README = os.path.join(HERE, "README.md")
R_EXPORTS = [       # of the NAMESPACE of R's mirai 2.7.1.9000; S3 methods aside
    ".flat", ".progress", ".stop", "call_mirai", "cluster_config", "collect_mirai", "daemon", "daemons", "daemons_set",
    "everywhere", "host_url", "http_config", "info", "is_error_value", "is_mirai", "is_mirai_error",
    "is_mirai_interrupt", "is_mirai_map", "launch_local", "launch_remote", "local_daemons", "local_url", "make_cluster",
    "mirai", "mirai_map", "nextcode", "nextget", "nextstream", "on_daemon", "race_mirai", "register_serial",
    "remote_config", "require_daemons", "serial_config", "ssh_config", "status", "stop_cluster", "stop_mirai",
    "try_mirai", "unresolved", "with_daemons",
]
TO_COME = set()


class TestFromR(Case):
    """The README's table of R's names: complete, and every example gives what stands beside it."""

    def tearDown(self):
        mirai._registered.clear()
        super().tearDown()

    def rows(self):
        """The table's rows: R's name, Python's words, and the example with its value, or None for both."""
        if not os.path.exists(README):
            self.skipTest("no README.md beside this file")
        with open(README, encoding="utf-8") as file:
            _, heading, below = file.read().partition("\n| R | Python | expression | gives |\n|---|---|---|---|\n")
        self.assertTrue(heading, "README.md has no table 'R | Python | expression | gives'")
        found = []
        for line in below.partition("\n\n")[0].splitlines():
            cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)]
            self.assertEqual((cells[0], cells[-1], len(cells)), ("", "", 6), line)
            name, python, *example = cells[1:-1]
            self.assertRegex(name, r"^`[^`]+`$")
            if example == ["—", "—"]:
                example = [None, None]
            else:
                for cell in example:
                    self.assertRegex(cell, r"^`[^`]+`$", line)
            found.append((name.strip("`"), python, *(cell and cell.strip("`") for cell in example)))
        return found

    def test_every_name_that_r_exports_has_one_row(self):
        self.assertEqual(sorted(name for name, *_ in self.rows()), sorted(R_EXPORTS))

    def test_only_what_is_to_come_has_no_example(self):
        rows = self.rows()
        self.assertEqual({name for name, _, example, _ in rows if example is None}, TO_COME)
        for name, python, example, _ in rows:
            self.assertEqual("to come" in python, example is None, name)

    def test_an_example_uses_what_its_row_is_about_and_a_name_that_is_the_same_is_public(self):
        for name, python, example, _ in self.rows():
            if example is not None:
                own = name if python.startswith("same") else re.match(r"`([\w.]+)", python)[1].rpartition(".")[2]
                self.assertRegex(example, rf"\b{own}\b")
                self.assertTrue(own in mirai.__all__ or own in python, name)

    def test_every_example_gives_what_stands_beside_it(self):
        space = {"__name__": "from_r"}
        exec("from mirai import *; daemons(2)", space)
        run = contextvars.copy_context().run            # local_daemons() is for the rest of a context
        for name, _, example, gives in self.rows():
            if example is not None:
                with self.subTest(name), contextlib.redirect_stderr(io.StringIO()):       # the progress bar
                    self.assertEqual(repr(run(eval, example, space)), gives, example)


# -- 17. Command line: daemon, demo


def _run(command, **options):
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=LONG, **options)


def _with_environment(entry):
    """The processes that were begun with this entry in their environment."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if entry.encode() in file.read().split(b"\0"):
                found.append(int(name))
    return [pid for pid in found if is_alive(pid)]


PROMPTS = re.compile(r"^((>>>>? ?)|(\.\.\.\.? ?))+")       # PyPy writes them to standard output


class TestIntegrations(Case):
    OUTSIDE = """
        # The standard library's own tests of executors, as they stand, on ours.
        import importlib, sys, unittest
        import mirai
        from test.support import script_helper
        try:
            parts = {name: importlib.import_module(f"test.test_concurrent_futures.{name}") for name in (
                "util", "executor", "test_as_completed", "test_wait", "test_shutdown", "test_init")}
        except ImportError:     # before 3.12 they are one module
            parts = {"all": importlib.import_module("test.test_concurrent_futures")}

        def find(name):
            return next(getattr(part, name) for part in parts.values() if hasattr(part, name))

        class MiraiMixin(find("ExecutorMixin")):
            executor_type = mirai.MiraiExecutor

        def ok(*words, **options):
            words = [f"import sys; sys.path.insert(0, {sys.argv[1]!r})\\n" + word.replace(
                "from concurrent.futures import MiraiExecutor", "from mirai import MiraiExecutor")
                if "MiraiExecutor" in word else word for word in words]
            return script_helper.assert_python_ok(*words, **options)

        for part in parts.values():
            if hasattr(part, "assert_python_ok"):
                part.assert_python_ok = ok
        OnMirai = type("OnMirai", (find(sys.argv[2]), MiraiMixin, find("BaseTestCase")), {"__module__": __name__})
        del MiraiMixin
        unittest.main(argv=sys.argv[:1], verbosity=2)
        """

    def outside(self, name, least):
        """At least so many."""
        if importlib.util.find_spec("test") is None or importlib.util.find_spec("test.test_concurrent_futures") is None:
            self.skipTest("this Python comes without test.test_concurrent_futures")
        done = run_python(self.OUTSIDE, HERE, name, timeout=90)
        ran = re.search(r"Ran (\d+) tests?", done.stderr)
        self.assertTrue(ran and int(ran[1]) >= least, done.stderr)
        self.assertTrue(done.stderr.rstrip().endswith("OK"), done.stderr[-5000:])

    def test_the_standard_librarys_own_tests_of_executors_pass(self):
        self.outside("ExecutorTest", 8)

    def test_the_standard_librarys_own_tests_of_as_completed_pass(self):
        self.outside("AsCompletedTests", 4)

    def test_the_standard_librarys_own_tests_of_wait_pass(self):
        self.outside("WaitTests", 6)

    def test_the_standard_librarys_own_tests_of_shutdown_pass(self):
        self.outside("ExecutorShutdownTest", 5)

    def test_the_standard_librarys_own_tests_of_initializers_pass(self):
        self.outside("InitializerMixin", 1)
        self.outside("FailingInitializerMixin", 1)

    def test_an_executor_is_used_as_the_standard_librarys(self):
        with mirai.MiraiExecutor(2) as executor:
            self.assertEqual(executor.submit(divmod, 7, 2).result(LONG), (3, 1))
            self.assertEqual(executor.submit(lambda **names: names, _timeout=1, fn=2).result(LONG), {"_timeout": 1, "fn": 2})
            self.assertEqual(list(executor.map(divmod, [7, 8], [2, 3])), [(3, 1), (2, 2)])
            self.assertEqual(list(executor.map(divmod, [7, 8], [2, 3], chunksize=100)), [(3, 1), (2, 2)])
            for chunksize in (0, -1):
                with self.assertRaisesRegex(ValueError, "chunksize"):
                    executor.map(abs, [1], chunksize=chunksize)

            async def inside():
                return await asyncio.get_running_loop().run_in_executor(executor, operator.neg, 1)
            self.assertEqual(asyncio.run(inside()), -1)
        with self.assertRaisesRegex(RuntimeError, "after shutdown"):
            executor.submit(abs, 1)
        with self.assertRaisesRegex(RuntimeError, "after shutdown"):
            executor.map(abs, [1])
        for wrong in (0, -1):
            with self.assertRaisesRegex(ValueError, "max_workers must be greater than 0"):
                mirai.MiraiExecutor(wrong)

    def test_of_an_executors_map_a_window_is_taken_ahead(self):
        taken = []
        with mirai.MiraiExecutor(1) as executor:
            results = executor.map(operator.neg, (taken.append(i) or i for i in itertools.count()), buffersize=3)
            self.assertEqual([next(results) for _ in range(5)], [0, -1, -2, -3, -4])
            self.assertEqual(len(taken), 8)
            results.close()
            for wrong, error in ((0, ValueError), (True, TypeError), ("1", TypeError)):
                with self.assertRaises(error):
                    executor.map(abs, [1], buffersize=wrong)

    def test_an_executor_uses_a_profile_that_is_set_and_leaves_it(self):
        with daemons(1, compute="theirs"):
            pid = mirai.mirai(os.getpid, _compute="theirs").result(LONG)
            with mirai.MiraiExecutor(compute="theirs") as executor:
                self.assertEqual(executor.submit(os.getpid).result(LONG), pid)
            self.assertEqual(mirai.mirai(os.getpid, _compute="theirs").result(LONG), pid)
            with self.assertRaisesRegex(ValueError, "'theirs'"):
                mirai.MiraiExecutor(2, compute="theirs")
        with self.assertRaisesRegex(RuntimeError, "no daemons are set"):
            mirai.MiraiExecutor(compute="theirs")

    def test_an_executor_that_is_dropped_finishes_and_ends_its_daemons(self):
        executor = mirai.MiraiExecutor(2)
        pid = executor.submit(os.getpid).result(LONG)
        ms = [executor.submit(abs, -i) for i in range(100)]
        del executor
        gc.collect()
        self.assertEqual([m.result(LONG) for m in ms], list(range(100)))
        wait_until(lambda: not is_alive(pid) and not mirai._profiles, SOON)

    def test_a_daemon_that_dies_costs_its_task_and_no_executor(self):
        with mirai.MiraiExecutor(2, initializer=_mark_daemon, initargs=(5,)) as executor:
            with self.assertRaises(MiraiConnectionReset):
                executor.submit(os._exit, 1).result(LONG)
            self.assertEqual({executor.submit(_daemon_mark).result(LONG) for _ in range(20)}, {5})

    def test_what_runs_is_not_cancelled_with_what_waits(self):
        for mode in MODES:
            with self.subTest(**mode), Gate() as gate:
                executor = mirai.MiraiExecutor(1, **mode)
                held = executor.submit(gate.enter, 1)
                gate.arrived()
                waiting = [executor.submit(abs, -i) for i in range(50)]
                threading.Timer(0.05, gate.open).start()
                executor.shutdown(cancel_futures=True)
                self.assertEqual(held.result(0), 1)
                self.assertTrue(all(m.cancelled() for m in waiting))
        self.assertEqual(mirai._profiles, {})


_mark = None


def _mark_daemon(value):
    global _mark
    _mark = value


def _daemon_mark():
    return _mark


class TestCommandLine(Case):
    def test_the_demo_shows_all_it_promises_and_leaves_nothing_behind(self):
        with tempfile.TemporaryDirectory() as folder:
            home = f"/nonexistent/{os.urandom(8).hex()}"
            done = _run([os.path.realpath(sys.executable), FILE, "demo"], cwd=folder,
                        env={"PATH": "/usr/bin:/bin", "HOME": home, "TMPDIR": folder})
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(len(re.findall(r"^ *\d+ lines  \w+ +\S+\.py$", done.stdout, re.M)), 10, done.stdout)
            self.assertRegex(done.stdout, r"sequential \d+\.\d+ s, on \d+ daemons \d+\.\d+ s")
            self.assertIn("Traceback (most recent call last)", done.stdout)
            self.assertIn("ValueError: invalid literal for int()", done.stdout)
            self.assertIn("<MiraiCancelled 20", done.stdout)
            self.assertIn("<MiraiTimeout 5", done.stdout)
            self.assertIn("'connections':", done.stdout)
            self.assertEqual(_with_environment(f"HOME={home}"), [])
            left = [name for _, folders, names in os.walk(folder) for name in names]
            self.assertEqual(left, [])

    def test_wrong_usage_is_exit_status_64_and_help_is_help(self):
        command = at_length(["-m", "mirai"], [FILE])        # as a module it is compiled already
        env = {**os.environ, "PYTHONPATH": HERE}
        wrong = ((), ("daemom",), ("daemon",), ("daemon", "URL"), ("daemon", "-n", "0", "tcp://127.0.0.1:1"),
                 ("daemon", "--maxtasks", "0", "tcp://127.0.0.1:1"))
        every = _at_once(len(wrong), lambda i: _run([sys.executable, *command, *wrong[i]], env=env))
        for arguments, done in zip(wrong, every):
            self.assertEqual((done.returncode, done.stdout), (64, ""), f"{arguments}: {done.stderr}")
            self.assertTrue(done.stderr and "Traceback" not in done.stderr, done.stderr)
        done = _run([sys.executable, FILE, "--help"])
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertTrue("daemon" in done.stdout and "demo" in done.stdout)
        self.assertIn("URL", _run([sys.executable, *command, "daemon", "--help"], env=env).stdout)

    def test_the_quick_start_runs_as_a_file_at_the_prompt_and_on_the_command_line(self):
        readme = os.path.join(HERE, "README.md")
        if not os.path.exists(readme):
            self.skipTest("no README.md beside this file")
        with open(readme) as file:
            _, heading, below = file.read().partition("# Quick start\n")
        self.assertTrue(heading, "README.md has no heading 'Quick start'")
        _, fence, below = below.partition("\n#")[0].partition("```python\n")
        code, end, _ = below.partition("\n```")
        self.assertTrue(fence and end, "README.md has no ```python block under 'Quick start'")
        outputs = {}
        modes = "file", "-c", "-i"
        for mode, done in zip(modes, _at_once(len(modes), lambda i: run_python(code + "\n", mode=modes[i]))):
            errors = [line for line in done.stderr.splitlines() if line.strip(">. ")]
            self.assertEqual((done.returncode, errors), (0, []), mode)
            lines = [PROMPTS.sub("", line) for line in done.stdout.splitlines()] if mode == "-i" else done.stdout.splitlines()
            outputs[mode] = [line for line in lines if line and not line.startswith("<daemons ")]    # the prompt shows values
        self.assertTrue(outputs["file"])
        self.assertEqual(outputs["-c"], outputs["file"])
        self.assertEqual(outputs["-i"], outputs["file"])

    def test_the_readmes_other_programs_print_what_stands_below_them(self):
        readme = os.path.join(HERE, "README.md")
        if not os.path.exists(readme):
            self.skipTest("no README.md beside this file")
        with open(readme) as file:
            programs = re.findall(r"```python\n((?:(?!```).)*?)\n```\n+```\n(.*?)\n```", file.read(), re.S)
        self.assertGreaterEqual(len(programs), 2)
        every = _at_once(len(programs), lambda i: run_python(programs[i][0] + "\n", mode="file"))
        for (code, expected), done in zip(programs, every):
            self.assertEqual((done.returncode, done.stdout.strip(), done.stderr), (0, expected.strip(), ""), code)

    def test_functions_defined_right_there_work_as_a_file_at_the_prompt_on_the_command_line_and_on_standard_input(self):
        code = ("import mirai\n"
                "def double(x): return twice * x\n"
                "\n"
                "twice = 2\n"
                "_ = mirai.daemons(2)\n"
                "print(mirai.mirai_map([1, 2], double).results(), mirai.mirai(lambda: double(4)).result())\n")
        modes = "file", "-c", "-", "-i"
        for mode, done in zip(modes, _at_once(len(modes), lambda i: run_python(code, mode=modes[i]))):
            shown = PROMPTS.sub("", done.stdout).strip(">\n ")
            self.assertEqual((done.returncode, shown), (0, "[2, 4] 8"), f"{mode}: {done.stderr}")

    def _application(self, folder):
        """A package that carries mirai.py under another name, and a script that uses it."""
        vendor = os.path.join(folder, "app", "_vendor")
        os.makedirs(vendor)
        shutil.copy(FILE, os.path.join(vendor, "mirai.py"))
        files = {
            "app/__init__.py": "",
            "app/_vendor/__init__.py": "",
            "app/tasks.py": """
                import sys
                from ._vendor import mirai

                class Point:
                    def __init__(self, x):
                        self.x = x

                def double(point):
                    return Point(2 * point.x), mirai.on_daemon(), "mirai" in sys.modules

                def main():
                    with mirai.daemons(2):
                        found = mirai.mirai_map([Point(1), Point(2)], double).results()
                        failed = mirai.mirai("1 / 0")[:]
                    alone = mirai.mirai(double, Point(3)).result()
                    print([(type(p).__module__, p.x, *rest) for p, *rest in [*found, alone]], type(failed).__module__)
                """,
            "run.py": "from app.tasks import main\nmain()\n"}
        for name, text in files.items():
            with open(os.path.join(folder, name), "w") as file:
                file.write(textwrap.dedent(text))
        return ("[('app.tasks', 2, True, False), ('app.tasks', 4, True, False), ('app.tasks', 6, True, False)] app._vendor.mirai")

    def test_it_works_as_part_of_another_package(self):
        with tempfile.TemporaryDirectory() as folder:
            expected = self._application(folder)
            env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            done = _run([sys.executable, os.path.join(folder, "run.py")], env=env, cwd="/")
            self.assertEqual((done.stdout.strip(), done.stderr), (expected, ""))
            done = _run([sys.executable, "-m", "app._vendor.mirai", "--help"], env=env, cwd=folder)
            self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_it_works_from_a_directory_that_cannot_be_written_to(self):
        root = os.getuid() == 0
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
            expected = self._application(folder)
            options, python = {}, sys.executable
            if root:        # whom no mode keeps from writing: as somebody else
                nobody = pwd.getpwnam("nobody")
                options = {"preexec_fn": lambda: (os.setgroups([]), os.setgid(nobody.pw_gid), os.setuid(nobody.pw_uid))}
                os.chown(scratch, nobody.pw_uid, nobody.pw_gid)
                python = self._python_for(options)
            for where, _, _ in os.walk(folder):
                os.chmod(where, 0o755 if root else 0o555)
            env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "TMPDIR": scratch}
            try:
                done = _run([python, os.path.join(folder, "run.py")], env=env, cwd=folder, **options)
                self.assertEqual((done.stdout.strip(), done.stderr), (expected, ""))
                done = _run([python, os.path.join(folder, "app", "_vendor", "mirai.py"), "--help"], env=env, cwd=folder, **options)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertFalse([w for w, _, _ in os.walk(folder) if w.endswith("__pycache__")])
                self.assertFalse([n for _, _, names in os.walk(scratch) for n in names])
            finally:
                for where, _, _ in os.walk(folder):
                    os.chmod(where, 0o755)

    def _python_for(self, options):
        """An interpreter that the other user can run: this one may be somebody's own."""
        for python in (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                if _run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 9))"], cwd="/", **options).returncode == 0:
                    return python
        self.skipTest("user nobody can run no Python from 3.9 on here")


# -- running


class _Result(unittest.TextTestResult):
    """Names the class, says what was skipped and why, as it goes, and notes what each test took."""

    classes: dict = {}      # name -> seconds of the clock, user, system, with what a class prepares and ends

    durations = 0               # how many tests to name

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.tests = []         # (seconds, of processors, test's name)

    def startTest(self, test):
        super().startTest(test)
        self._started = self._now()

    def stopTest(self, test):
        seconds, busy = (after - before for before, after in zip(self._started, self._now()))
        self.tests.append((seconds, busy, test.id().partition(".")[2]))
        super().stopTest(test)

    def _now(self):
        """Seconds: of the clock, and of processors in this process, its descendants and those that have ended."""
        ticks = 0
        for pid in [os.getpid(), *family_of(os.getpid())] if self.durations else ():
            with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
                ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:15]))
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.stream.writeln(f"skipped {test}: {reason}")

    def print_durations(self):
        print(f"The {self.durations} slowest tests, in seconds, and of processors")
        for seconds, busy, name in sorted(self.tests, reverse=True)[:self.durations]:
            print(f"{seconds:9.2f} {busy:9.2f}  {name}")
        print("The classes, in seconds, and of processors: user, system")
        for name, (clock, user, system) in sorted(self.classes.items(), key=lambda item: -item[1][0]):
            print(f"{clock:9.2f} {user:9.2f} {system:9.2f}  {name}")


# ======================================================================
# --bench: how fast, beside what the standard library has and beside what no one can beat
# ======================================================================
# All systems of a workload are up at once, and take turns in one run, in random order: these machines are noisy.

def _noop():
    pass


def _square(x):
    return x * x


def _echo(x):
    return x


def _last(x):
    return x[-1]


class OnMirai:
    """Each system: `call` there and back, `singles` submitted one by one, `map`, at the end `close`."""
    options = {}

    def __init__(self, n):
        self.name = f"bench {os.urandom(4).hex()}"
        daemons(n, compute=self.name, **self.options)

    def call(self, f, *args):
        return mirai.mirai(f, *args, _compute=self.name).result()

    def singles(self, f, rows):
        return [m.result() for m in [mirai.mirai(f, *row, _compute=self.name) for row in rows]]

    def map(self, f, items):
        return mirai_map(items, f, _compute=self.name)[:]

    def close(self):
        daemons(0, compute=self.name)


class OnMiraiDirect(OnMirai):
    options = {"dispatcher": False}


class OnMiraiTCP(OnMirai):
    options = {"url": "tcp://127.0.0.1:0"}


class OnMiraiTLS(OnMirai):
    options = {"url": "tls+tcp://127.0.0.1:0"}


class OnExecutor:
    def __init__(self, n):
        from concurrent.futures import ProcessPoolExecutor
        self.pool = ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("fork"))
        self.pool.submit(_noop).result()

    def call(self, f, *args):
        return self.pool.submit(f, *args).result()

    def singles(self, f, rows):
        return [future.result() for future in [self.pool.submit(f, *row) for row in rows]]

    def map(self, f, items):
        return list(self.pool.map(f, items))

    def close(self):
        self.pool.shutdown()


class OnPool:
    def __init__(self, n):
        self.pool = multiprocessing.get_context("fork").Pool(n)
        self.pool.apply(_noop)

    def call(self, f, *args):
        return self.pool.apply(f, args)

    def singles(self, f, rows):
        return [result.get() for result in [self.pool.apply_async(f, row) for row in rows]]

    def map(self, f, items):
        return self.pool.map(f, items)

    def close(self):
        self.pool.close()
        self.pool.join()


class Floor:
    """Plain Python: pickles on socket pairs, to a process, or through one that passes on what it gets."""
    hops = 2

    def __init__(self, n):
        self.sock, end = socket.socketpair()
        self.pids = []
        for hop in range(self.hops):
            last = hop == self.hops - 1
            ours, theirs = (None, None) if last else socket.socketpair()
            pid = os.fork()
            if not pid:
                try:
                    (self._serve if last else self._forward)(end, ours)
                finally:
                    os._exit(0)
            self.pids.append(pid)
            end.close()
            if not last:
                ours.close()
                end = theirs

    @staticmethod
    def _receive(sock):
        head = sock.recv(65536)
        size, data = int.from_bytes(head[:8], "little"), head[8:]
        if len(data) < size:
            whole, at = bytearray(size), len(data)
            whole[:at] = data
            view = memoryview(whole)
            while at < size:
                got = sock.recv_into(view[at:])
                at += got or size
            data = whole
        return data if head else None

    @staticmethod
    def _send(sock, data):
        if len(data) < 65536:
            sock.sendall(len(data).to_bytes(8, "little") + data)
        else:
            sock.sendall(len(data).to_bytes(8, "little"))
            sock.sendall(data)

    def _serve(self, sock, _):
        while (data := self._receive(sock)) is not None:
            f, args = pickle.loads(data)
            self._send(sock, pickle.dumps(f(*args), 5))

    def _forward(self, sock, other):
        while (data := self._receive(sock)) is not None:
            self._send(other, data)
            self._send(sock, self._receive(other))

    def call(self, f, *args):
        self._send(self.sock, pickle.dumps((f, args), 5))
        return pickle.loads(self._receive(self.sock))

    def singles(self, f, rows):
        return [self.call(f, *row) for row in rows]

    def close(self):
        self.sock.close()
        for pid in self.pids:       # each holds ends of the others' pairs
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class FloorDirect(Floor):
    hops = 1


class Copy:
    """No other process: a copy of the bytes there, and one back."""

    def __init__(self, n):
        """Nothing."""

    def call(self, f, x):
        return f(bytearray(memoryview(bytearray(memoryview(x).cast("B")))))

    def close(self):
        """Nothing."""


class TLSFloor:
    """A thread at the other end of a TLS connection, which sends back what it gets."""

    def __init__(self, n):
        import ssl
        cert, key = mirai.make_certificate(["localhost"])
        ours, theirs = socket.socketpair()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.pid = os.fork()
        if not self.pid:
            try:
                ours.close()
                self._serve(mirai.listener_context(cert, key, None).wrap_socket(theirs, server_side=True))
            finally:
                os._exit(0)
        theirs.close()
        self.sock = context.wrap_socket(ours)

    @staticmethod
    def _serve(sock):
        while (data := Floor._receive(sock)) is not None:
            Floor._send(sock, data)

    def call(self, f, x):
        Floor._send(self.sock, x)
        return Floor._receive(self.sock)

    def close(self):
        self.sock.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _per_call(f, *args, n=200):
    def measure(system):
        start = time.perf_counter()
        for _ in range(n):
            system.call(f, *args)
        return (time.perf_counter() - start) / n
    return measure


def _singles(n):
    def measure(system):
        start = time.perf_counter()
        system.singles(_noop, [()] * n)
        return (time.perf_counter() - start) / n
    return measure


def _mapped(n):
    def measure(system):
        start = time.perf_counter()
        assert system.map(_square, range(n))[-1] == (n - 1) ** 2
        return (time.perf_counter() - start) / n
    return measure


def _to_many(make, n=16):
    def measure(system):
        x = make()
        start = time.perf_counter()
        system.singles(_last, [(x,)] * n)
        return time.perf_counter() - start
    return measure


def _sleeps(n, seconds, rounds):
    """Actual ÷ ideal."""
    def measure(system):
        start = time.perf_counter()
        system.singles(time.sleep, [(seconds,)] * (n * rounds))
        return (time.perf_counter() - start) / (rounds * seconds)
    return measure


def _script(code):
    """Seconds that a fresh interpreter says it took."""
    def measure(_):
        return float(run_python(code).stdout.split()[-1])
    return measure


class Fresh:
    """A system that is started within each measurement."""

    def __init__(self, n):
        """Nothing is up before."""

    def close(self):
        """Nothing is left."""


Workload = collections.namedtuple("Workload", "name systems measures wanted rounds unit n pinned", defaults=(9, "us", 2, False))


def _workloads():
    """`measures`: one for all systems, or one each. `wanted`: (system, most, other), times as a ratio."""
    usual = {"mirai": OnMirai, "executor": OnExecutor, "pool": OnPool}
    latency = {**usual, "floor": Floor}
    yield Workload("latency", latency, _per_call(_noop), [("mirai", 0.45, "executor"), ("mirai", 1.4, "floor")])
    yield Workload("latency, one CPU", latency, _per_call(_noop), [("mirai", 0.45, "executor"), ("mirai", 1.4, "floor")],
                   pinned=True)
    yield Workload("latency, direct", {"mirai": OnMiraiDirect, "executor": OnExecutor, "floor": FloorDirect},
                   _per_call(_noop), [("mirai", 0.2, "executor")])
    yield Workload("20,000 singles", {**usual, "floor": Floor}, _singles(20_000),
                   [("mirai", 1 / 7, "executor"), ("mirai", 1 / 3, "pool")], 5)
    yield Workload("100,000 mapped", usual, {"mirai": _mapped(100_000), "executor": _mapped(20_000), "pool": _mapped(100_000)},
                   [("mirai", 1 / 250, "executor"), ("mirai", 1 / 0.7, "pool")], 5)
    numpy = importlib.util.find_spec("numpy") and importlib.import_module("numpy")
    for size, n, bound in ((1, 20, 2.5), (64, 2, 4), (256, 1, 4)):
        systems = {**usual, "floor": Floor, **({"copy": Copy} if size > 1 else {})}
        yield Workload(f"echo {size} MiB bytes", systems, _per_call(_echo, os.urandom(size << 20), n=n),
                       [("mirai", 1 / bound, "executor")], 7, "ms")
        data = numpy.frombuffer(os.urandom(size << 20), "f8") if numpy else array.array("d", os.urandom(size << 20))
        yield Workload(f"echo {size} MiB {'numpy' if numpy else 'array'}", systems, _per_call(_echo, data, n=n),
                       [("mirai", 1 / (8 if size == 1 else 30), "executor")], 7, "ms")
    yield Workload("64 MiB to 16 tasks", usual, _to_many(lambda: array.array("d", bytes(64 << 20))),
                   [("mirai", 1 / 15, "executor")], 3, "ms")
    start = "import time; t = time.perf_counter()\n"
    yield Workload("start, to first result", {"mirai": Fresh, "spawn": Fresh, "fork": Fresh}, {
        "mirai": _script(start + "import mirai; mirai.daemons(2); mirai.mirai(abs, -1).result(); print(time.perf_counter() - t)"),
        **{how: _script(start + textwrap.dedent(f"""\
            if __name__ == "__main__":
                import multiprocessing
                from concurrent.futures import ProcessPoolExecutor
                pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("{how}"))
                pool.submit(abs, -1).result()
                print(time.perf_counter() - t)""")) for how in ("spawn", "fork")}}, [("mirai", 0.65, "spawn")], 9, "ms")
    yield Workload("import", {"mirai": Fresh, "concurrent.futures": Fresh}, {
        "mirai": _script(start + "import mirai; print(time.perf_counter() - t)"),
        "concurrent.futures": _script(start + "import concurrent.futures.process; print(time.perf_counter() - t)")},
        [("mirai", 1.0, "concurrent.futures")], 15, "ms")
    first = "import mirai; t = time.perf_counter(); mirai.mirai(abs, -1).result(); first = time.perf_counter() - t\n"
    later = "t = time.perf_counter(); mirai.mirai(abs, -1).result()\n"
    bare = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'pass']); print(time.perf_counter() - t)"
    yield Workload("no daemons set", {"first": Fresh, "later": Fresh, "python -c pass": Fresh}, {
        "first": _script(start + first + "print(first)"),
        "later": _script(start + first + later + later + "print(time.perf_counter() - t)"),
        "python -c pass": _script("import subprocess\n" + start + bare)},
        [("first", 4.0, "python -c pass"), ("later", 1.0, "python -c pass")], 9, "ms")
    for n, seconds, most in ((8, 0.01, 1 / 0.965), (64, 0.02, 1 / 0.95)):
        yield Workload(f"{n} daemons, sleeps of {seconds * 1000:.0f} ms", {"mirai": OnMirai, "executor": OnExecutor},
                       _sleeps(n, seconds, 10), [("mirai", most, None)], 5, "x", n)
    if shutil.which("openssl"):
        yield Workload("latency, TLS", {"mirai": OnMiraiTLS, "tcp": OnMiraiTCP}, _per_call(_noop), [("mirai", 1.5, "tcp")])
        yield Workload("echo 64 MiB, TLS", {"mirai": OnMiraiTLS, "tcp": OnMiraiTCP, "floor": TLSFloor},
                       _per_call(_echo, os.urandom(64 << 20), n=1), [("mirai", 1 / 0.7, "floor")], 5, "ms")


def _measured(workload):
    """Medians by system."""
    found = {name: [] for name in workload.systems}
    cpus = os.sched_getaffinity(0)
    if workload.pinned:
        os.sched_setaffinity(0, {min(cpus)})
    try:
        with contextlib.ExitStack() as stack:
            systems = {}
            for name, system in workload.systems.items():
                systems[name] = system(workload.n)
                stack.callback(systems[name].close)
            for round in range(-1, workload.rounds):        # the first warms
                for name in random.sample(list(systems), len(systems)):
                    measure = workload.measures[name] if isinstance(workload.measures, dict) else workload.measures
                    taken = measure(systems[name])
                    if round >= 0:
                        found[name].append(taken)
    finally:
        os.sched_setaffinity(0, cpus)
    return {name: statistics.median(times) for name, times in found.items()}


def bench(words=(), as_json=False):
    """All workloads, or those with these words in their names: a table, or JSON of seconds."""
    scale = {"us": 1e6, "ms": 1e3, "x": 1.0}
    results = {}
    for workload in _workloads():
        if words and not any(word in workload.name for word in words):
            continue
        medians = results[workload.name] = _measured(workload)
        if as_json:
            continue
        figures = "  ".join(f"{name} {value * scale[workload.unit]:.4g}" for name, value in medians.items())
        print(f"{workload.name} [{workload.unit}]: {figures}")
        for system, most, other in workload.wanted:
            ratio = medians[system] / (medians[other] if other else 1.0)
            print(f"    {'reached' if ratio <= most else 'MISSED '} {system} is {ratio:.3g} x {other or 'ideal'}, "
                  f"wanted {most:.3g} at most", flush=True)
    if as_json:
        print(json.dumps(results, indent=1))
    return 0


def main(arguments):
    if "--bench" in arguments:
        return bench([a for a in arguments if not a.startswith("-")], "--json" in arguments)
    if "--durations" in arguments:
        at = arguments.index("--durations")
        _Result.durations, arguments = int(arguments[at + 1]), arguments[:at] + arguments[at + 2:]
    verbose = "-v" in arguments
    names = [a for a in arguments if not a.startswith("-")]
    loader = unittest.TestLoader()
    loader.sortTestMethodsUsing = None
    module = sys.modules[__name__]
    classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, unittest.TestCase) and c is not Case]
    suite = loader.loadTestsFromNames(names, module) if names else unittest.TestSuite(
        map(loader.loadTestsFromTestCase, classes))
    result = unittest.TextTestRunner(verbosity=2 if verbose else 1, resultclass=_Result).run(suite)
    if result.durations:
        result.print_durations()
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    passed = max(0, result.testsRun - failed - len(result.skipped))
    print(f"{passed} passed, {failed} failed, {len(result.skipped)} skipped", flush=True)
    return 1 if failed or not result.testsRun else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
