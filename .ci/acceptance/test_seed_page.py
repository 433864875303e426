#!/usr/bin/env python3
"""The seed page of R's daemons() in Python's words: `python test_seed_page.py`, with mirai.py and
test_mirai.py on the path. To be merged into test_mirai.py: class TestSeedPage, after TestProfiles."""

import contextlib
import io
import os
import random
import unittest

import mirai
from mirai import (MiraiCancelled, MiraiConnectionReset, MiraiTimeout, daemons, info, launch_local, mirai_map, status,
                   stop_mirai)
from test_mirai import LONG, ByHand, Case, Gate, _pids, family_of, is_alive, joined, nursery_pid, wait_until

# -- from here on for test_mirai.py


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

    @unittest.skip("other machines")
    def test_a_dispatcher_that_accepts_tls_over_tcp_connections(self):
        daemons(url=mirai.host_url(tls=True))
        self.check_url(r"^tls\+tcp://.+:[1-9]\d*$")
        daemons(0)

    @unittest.skip("other machines")
    def test_a_host_url_for_remote_daemons_to_dial_into(self):
        daemons(url=mirai.host_url(), dispatcher=False)
        self.check_url(r"^tcp://.+:[1-9]\d*$")
        daemons(0)

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

    @unittest.skip("other machines")
    def test_daemons_on_remotes_by_ssh_that_connect_back_over_tls(self):
        daemons(url=mirai.host_url(tls=True), remote=mirai.ssh_config(["ssh://nodeone", "ssh://nodetwo"]))

    @unittest.skip("other machines")
    def test_four_daemons_on_a_remote_machine_by_ssh_tunnelling(self):
        daemons(4, url=mirai.local_url(tcp=True), remote=mirai.ssh_config("ssh://10.75.32.90", tunnel=True))

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

    @unittest.skip("other machines")
    def test_shell_commands_for_manual_deployment(self):
        daemons(url=mirai.host_url())
        self.assertEqual(len(mirai.launch_remote(2)), 2)

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


# -- till here

if __name__ == "__main__":
    unittest.main()
