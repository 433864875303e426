#!/usr/bin/env python3
"""The tests of mirai.py: `python test_mirai.py [-v] [Class[.test] ...]`, on the standard library alone.

One class per section of mirai.py, in its order; a test's name is a promise. Nothing sleeps to synchronise: tests
wait for conditions (`wait_until`), and hold tasks at gates (`Gate`). LONG only catches hangs: a test that takes
longer ends the run with the stack of every thread. After each class no process, thread, descriptor or file is left.
"""

from __future__ import annotations

import ast
import asyncio
import atexit
import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import faulthandler
import functools
import gc
import io
import itertools
import json
import math
import os
import pickle
import pwd
import random
import re
import resource
import selectors
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
import weakref

import mirai
from mirai import (MiraiCancelled, MiraiConnectionReset, MiraiError, MiraiInterrupt, MiraiTimeout, call_mirai, daemons,
                   info, launch_local, mirai_map, race_mirai, status, stop_mirai, unresolved)

LONG = 60.0         # seconds; a wait this long means a hang
HERE = os.path.dirname(os.path.abspath(__file__))
FILE = os.path.join(HERE, "mirai.py")
PYPY = sys.implementation.name == "pypy"


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


def is_alive(pid):
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


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
        inode = next(line.split()[6] for line in file if line.rstrip().endswith(url[len("ipc://"):]))
    for pid in family_of(nursery_pid()):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]":
                        return pid
    raise AssertionError("no dispatcher found")


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
