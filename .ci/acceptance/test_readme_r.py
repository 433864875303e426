#!/usr/bin/env python3
"""The README's table 'From R', executed: `README=/path/README.md python test_readme_r.py`, with mirai.py and
test_mirai.py on the path. To be merged into test_mirai.py: R_EXPORTS, TO_COME, TestFromR."""

import contextlib
import contextvars
import io
import os
import re
import unittest

import mirai
from test_mirai import HERE, Case

README = os.environ.get("README", os.path.join(HERE, "README.md"))

# -- from here on for test_mirai.py

R_EXPORTS = [       # of the NAMESPACE of R's mirai 2.7.1.9000; S3 methods aside
    ".flat", ".progress", ".stop", "call_mirai", "cluster_config", "collect_mirai", "daemon", "daemons", "daemons_set",
    "everywhere", "host_url", "http_config", "info", "is_error_value", "is_mirai", "is_mirai_error",
    "is_mirai_interrupt", "is_mirai_map", "launch_local", "launch_remote", "local_daemons", "local_url", "make_cluster",
    "mirai", "mirai_map", "nextcode", "nextget", "nextstream", "on_daemon", "race_mirai", "register_serial",
    "remote_config", "require_daemons", "serial_config", "ssh_config", "status", "stop_cluster", "stop_mirai",
    "try_mirai", "unresolved", "with_daemons",
]
TO_COME = {     # with other machines, and with MiraiExecutor
    "launch_remote", "ssh_config", "cluster_config", "http_config", "remote_config", "host_url",
    "make_cluster", "stop_cluster",
}


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
                own = name[1:] + "=True" if name.startswith(".") else name
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


# -- till here

if os.environ.get("NAMESPACE"):     # R's own list, to see that R_EXPORTS is that
    class TestExports(unittest.TestCase):
        def test_the_list_is_rs_own(self):
            with open(os.environ["NAMESPACE"]) as file:
                self.assertEqual(R_EXPORTS, re.findall(r"^export\((.+)\)$", file.read(), re.M))

if __name__ == "__main__":
    unittest.main()
