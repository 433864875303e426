#!/usr/bin/env python3
"""Acceptance tests of streams, everywhere, modes, options and seeds (issue 4, points 2 to 5):
`cd the repository && python3 test_modes.py [-v] [TestModes[.test] ...]`.

To be pasted into test_mirai.py: everything between the two lines of `# >8 ...`.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.environ.get("MIRAI_UNDER_TEST", os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))))

import asyncio
import concurrent.futures
import contextlib
import functools
import importlib.util
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
import warnings

import mirai
import test_mirai
from mirai import (MiraiCancelled, MiraiConnectionReset, MiraiError, MiraiInterrupt, MiraiTimeout, daemons, info,
                   launch_local, mirai_map, status, stop_mirai, unresolved)
from test_mirai import (LONG, MODES, SOON, outcome, outcomes, r_streams, ByHand, Case, Gate, Host, _at_once, _end_process, _enter_gate, _pids, _raise,
                        changed_environ, connections, family_of, is_alive, joined, looping, nursery_pid, run_python,
                        sleeping, calling, wait_until)

for _it in (_enter_gate, _end_process, _raise, looping, sleeping, calling):     # by value, as where test_mirai.py is the script
    _it.__module__ = "__main__"

# >8 ---------------------------------------------------------------------------------------------------------

HAS_NUMPY = importlib.util.find_spec("numpy") is not None
KEY = "5a" * 32


def written(source, name="__main__"):
    """A script of the host: what `source` defines, in a module that no daemon can import."""
    module = types.ModuleType(name)
    exec(compile(textwrap.dedent(source), f"<{name}>", "exec"), vars(module))
    return module


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


def no_more(pids, seconds=2.0):
    wait_until(lambda: not any(map(is_alive, pids)), seconds, "the end of all processes")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def computes(pid):
    """Waits until a process is busy: what it is at needs no more of the host."""
    def ticks():
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[11])

    before = ticks()
    wait_until(lambda: ticks() > before + 5, SOON, "a twentieth of a second of work")


def code_names(value):
    """What an error value says of itself, to compare it with that of another run."""
    if isinstance(value, mirai.ErrorValue):
        return type(value).__name__, value.code, list(getattr(value, "condition_class", ()))
    return value


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


def _crunch(enter=None):
    """C code that no interrupt reaches, and that holds the GIL."""
    if enter is not None:
        enter("crunching")
    return sum(range(10**12))


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


# -- Random streams, as R has them


# What R 4.2 prints of `.Random.seed[2:7]` for seven seeds: after RNGkind("L'Ecuyer-CMRG"); set.seed(seed), then after
# nextRNGStream() once to four times, then after nextRNGSubStream().


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


def _name(name):
    """Source for the value of a global name, None where there is none."""
    return f"globals().get({name!r})"


class TestEverywhere(Case):
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
            at = written(MODEL)
            with self.subTest(**mode), daemons(2, **mode):
                pids = outcomes(mirai.everywhere(at.load, 3, shift=1))
                self.assertEqual(len(set(pids)), 2)
                self.assertEqual(outcomes(mirai_map(range(6), at.use)), [3 * x + 1 for x in range(6)])
                self.assertEqual(outcomes([mirai.mirai(at.use, x) for x in range(6)]), [3 * x + 1 for x in range(6)])
                self.assertIsNone(at.model)

    def test_functions_and_source_share_the_names_of_a_script(self):
        at = written(MODEL)
        with daemons(1):
            outcomes(mirai.everywhere("model, extra = (2, 0), 'more'"))
            self.assertEqual(outcome(mirai.mirai(at.use, 5)), 10)
            self.assertEqual(outcome(mirai.mirai(at.peek)), ((2, 0), "more"))
            outcomes(mirai.everywhere(at.load, 7))
            self.assertEqual(outcome(mirai.mirai("model")), [7, 0])

    def test_names_that_it_assigned_are_not_overwritten_by_what_functions_bring(self):
        at = written(MODEL)
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
            at = written(MODEL)
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
        at = written(MODEL)
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


# -- Modes: dispatcher=False and sync=True


class Point:
    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return type(other) is type(self) and other.x == self.x


class Stubborn(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.one = one


def _fail_stubbornly():
    raise Stubborn(1, 2)


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
          mirai.mirai(lambda: 1 / 0), mirai.mirai("1 / 0"), mirai.mirai(_fail_stubbornly), mirai.mirai(sys.exit, 3),
          mirai.mirai(_raise, KeyboardInterrupt()), mirai.mirai(_raise, StopIteration(1)), mirai.mirai(threading.Lock),
          mirai.mirai(mirai.on_daemon)]
    maps = [mirai_map(range(-50, 50), abs), mirai_map({"a": Point(1), "b": Point(2)}, _shift), mirai_map([1, 0], lambda x: 1 / x),
            mirai_map([(1, 2), (3, 4)], pow, _star=True), mirai_map([], abs)]
    values = outcomes(ms) + [outcomes(mp) for mp in maps]
    return [list(map(code_names, v)) if type(v) is list else code_names(v) for v in values]


class TestModes(Case):
    # -- direct: the host listens itself

    def test_there_is_no_dispatcher_process(self):
        with daemons(1, dispatcher=False):      # the nursery begins
            pass
        others = {pid for pid in family_of(nursery_pid()) if is_alive(pid)}
        with daemons(2, dispatcher=False):
            pids = set(outcomes(mirai.everywhere(os.getpid)))
            self.assertEqual(len(pids), 2)
            self.assertEqual({pid for pid in family_of(nursery_pid()) if is_alive(pid)} - others, pids)
            self.assertEqual((connections(), status()["connections"], info().cumulative), (2, 2, 2))
        no_more(pids, 1.0)

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
                m = mirai.mirai(_fail_stubbornly)
                with self.assertRaisesRegex(Stubborn, "1 and 2") as caught:
                    m.result(LONG)
                self.assertEqual((caught.exception.one, caught.exception.__cause__), (1, m.data))
                self.assertIn("_fail_stubbornly", m.data.stack_trace)
                with self.assertRaisesRegex(TypeError, r"args\[1\]\.lock: cannot pickle"):
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

    def test_daemons_that_cannot_start_are_an_error_with_their_last_words(self):
        def no_daemons(*_):
            return {**spec(*_), "nofile": 3}

        spec = mirai._daemon_spec
        with test_mirai.replaced(mirai, "_daemon_spec", no_daemons):
            with self.assertRaisesRegex(mirai.LaunchError, "(?s)5 in a row.*Too many open files"):
                daemons(2, dispatcher=False)
        self.assertFalse(mirai.daemons_set())

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

    def test_rounds_of_setting_and_resetting_leave_nothing_behind(self):
        def held():
            return (test_mirai.descriptors(), len(os.listdir(f"/proc/{nursery_pid()}/fd")), threading.active_count(),
                    sorted(os.listdir(mirai.runtime_dir())))

        first = None
        for i in range(12):
            with daemons(1, dispatcher=False):
                outcome(mirai.mirai(abs, -1))
            if i == 1:
                first = held()
        with contextlib.suppress(AssertionError):
            wait_until(lambda: held() == first, 2.0)
        self.assertEqual(held(), first)

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

    def test_a_url_in_use_is_an_os_error_that_names_it(self):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            url = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
            with self.assertRaisesRegex(OSError, re.escape(url)):
                daemons(1, url=url, dispatcher=False)
        self.assertFalse(mirai.daemons_set())

    def test_what_needs_a_dispatcher_is_refused_and_so_is_what_is_to_come(self):
        config = mirai.serial_config(threading.Event, lambda x: b"", lambda data: threading.Event())
        with self.assertRaisesRegex(ValueError, "serial.*dispatcher"):
            daemons(1, dispatcher=False, serial=config)
        for name in ("remote", "tls", "pass_"):
            with self.subTest(name), self.assertRaisesRegex((ValueError, NotImplementedError), name):
                daemons(1, url="tcp://127.0.0.1:0", **{name: "something"})
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
        if HAS_NUMPY:
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


# -- Daemon options, memory


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
    def end_with_the_test(self, pids):
        """Daemons that persist are gone after the test, whatever comes."""
        def end():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)

        self.addCleanup(no_more, pids)
        self.addCleanup(end)

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
                self.end_with_the_test([pid])
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
                self.end_with_the_test(pids)
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
                self.end_with_the_test(pids)
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
        for option, code in (("--idletime", 1), ("--walltime", 2)):
            one = self.by_hand(url, "--autoexit", "false", option, "1", key=KEY)
            joined(1)
            daemons(0)
            self.assertEqual(one.status(SOON)[0], code)
            daemons(url=url, key=KEY)
        daemons(0)

    def test_setting_anew_at_the_same_url_keeps_those_that_persist(self):
        url = f"tcp://127.0.0.1:{free_port()}"
        daemons(1, url=url, key=KEY, autoexit=False)
        pid = outcome(mirai.mirai(os.getpid))
        self.end_with_the_test([pid])
        daemons(1, url=url, key=KEY, autoexit=False)
        joined(2)
        pids = set(outcomes(mirai.everywhere(os.getpid)))
        self.end_with_the_test(pids)
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
            mp = mirai_map(range(40), lambda i: sum(range(10**12)) if i == 20 else i)
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
        for error, options in ((ValueError, {"autoexit": "yes"}), (ValueError, {"cleanup": None}), (ValueError, {"output": 1}),
                               (ValueError, {"asyncdial": "no"}), (ValueError, {"kill_after": 0}), (ValueError, {"kill_after": "1"}),
                               (ValueError, {"maxtasks": 0}), (ValueError, {"rs": [1, 2]}), (ValueError, {"rs": "seed"}),
                               (TypeError, {"clean_up": False}), (TypeError, {"auto_exit": None})):
            name, = options
            with self.subTest(**options), self.assertRaisesRegex(error, name):
                daemons(1, **options)
            with self.subTest(**options), daemons(1), self.assertRaisesRegex(error, name):
                launch_local(1, **options)
        for options in (("--autoexit", "maybe"), ("--autoexit",), ("--cleanup",), ("--output", "yes")):
            with self.subTest(options):
                self.assertEqual(self.by_hand("tcp://127.0.0.1:1", *options, key=KEY).status(SOON)[0], 64)
        self.assertFalse(mirai.daemons_set())

    # -- memory

    def used(self):
        return status()["memory"]["used"]

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


# -- Seeds


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

    @unittest.skipUnless(HAS_NUMPY, "numpy is not installed")
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

    @unittest.skipUnless(HAS_NUMPY, "numpy is not installed")
    def test_numpy_does_not_draw_what_random_draws(self):
        for source in ("import numpy.random", "1"):
            with daemons(1, seed=1):
                outcomes(mirai.everywhere(source))
                found = outcome(mirai.mirai("import random, numpy\n[f() for f in (random.random, numpy.random.random) for _ in range(3)]"))
                self.assertEqual(len(set(found)), 6)

    @unittest.skipUnless(HAS_NUMPY, "numpy is not installed")
    def test_numpy_imported_in_whichever_way_is_seeded(self):
        sources = ("import numpy; float(numpy.random.random())", "from numpy.random import random; float(random())",
                   "import numpy.random as r; float(r.random())", "import importlib; float(importlib.import_module('numpy.random').random())",
                   "import numpy as np; float(np.random.random_sample())")
        found = set()
        for source in sources:
            with daemons(1, seed=8):
                found.add(outcome(mirai.mirai(source)))
        self.assertEqual(len(found), 1)

    @unittest.skipUnless(HAS_NUMPY, "numpy is not installed")
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

    @unittest.skipUnless(HAS_NUMPY, "numpy is not installed")
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


# >8 ---------------------------------------------------------------------------------------------------------


def main(arguments):
    verbose = "-v" in arguments
    names = [a for a in arguments if not a.startswith("-")]
    loader = unittest.TestLoader()
    loader.sortTestMethodsUsing = None
    classes = [TestEverywhere, TestModes, TestOptions, TestSeeds]
    suite = loader.loadTestsFromNames(names, sys.modules[__name__]) if names else unittest.TestSuite(
        map(loader.loadTestsFromTestCase, classes))
    result = unittest.TextTestRunner(verbosity=2 if verbose else 1, resultclass=test_mirai._Result).run(suite)
    failed = len(result.failures) + len(result.errors)
    print(f"{result.testsRun - failed - len(result.skipped)} passed, {failed} failed, {len(result.skipped)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
