#!/usr/bin/env python3
"""The two time measurements of issue 4: `python3 bench_map.py [-n DAEMONS] [-r RUNS] [tiny] [uneven]`.

tiny:   100,000 items x*x; uneven: 200 items of which three (positions 10, 90, 150) sleep a second, the others 1 ms.
Each with the grant size that the map chooses (auto) and with forced ones, alternating in a new order each round, as
medians; wanted: auto within 5 % of the better of size 1 and the best fixed size. Every run has daemons of its own,
warm, started outside of what is measured.
"""

import faulthandler
import random
import statistics
import sys
import time

sys.path.insert(0, __import__("os").environ.get("MIRAI_UNDER_TEST", "."))
import mirai  # noqa: E402

SIZES = (None, 1, 16, 64, 256, 1024, 4096)
if not hasattr(mirai, "_fixed_chunk"):
    mirai._fixed_chunk = [None]
    print("mirai has no _fixed_chunk yet: all sizes are the same")


def square(x):
    return x * x


def uneven(x):
    time.sleep(1.0 if x in (10, 90, 150) else 0.001)
    return x


def once(size, n, items, f, expected):
    faulthandler.dump_traceback_later(120, exit=True)
    mirai._fixed_chunk[0] = size
    try:
        with mirai.daemons(n):
            mirai.mirai_map(range(2000), square)[:]
            begin = time.perf_counter()
            values = mirai.mirai_map(items, f)[:]
            took = time.perf_counter() - begin
            assert values == expected, "wrong values"
            return took
    finally:
        mirai._fixed_chunk[0] = None
        faulthandler.cancel_dump_traceback_later()


def measure(title, rounds, n, items, f):
    expected = [square(x) if f is square else x for x in items]
    took = {size: [] for size in SIZES}
    for _ in range(rounds):
        for size in random.sample(SIZES, len(SIZES)):
            took[size].append(once(size, n, items, f, expected))
    medians = {size: statistics.median(times) for size, times in took.items()}
    best = min((size for size in SIZES if size), key=medians.get)
    print(f"{title}, {n} daemons, {rounds} rounds")
    print(f"  {'grant':>6} {'median s':>9} {'min':>8} {'max':>8} {'items/s':>10} {'/ best':>7}")
    for size in SIZES:
        print(f"  {'auto' if size is None else size:>6} {medians[size]:9.4f} {min(took[size]):8.4f} "
              f"{max(took[size]):8.4f} {len(items) / medians[size]:10.0f} {medians[size] / medians[best]:7.3f}")
    ratio, least = medians[None] / medians[best], min(took[None]) / min(min(took[s]) for s in SIZES if s)
    print(f"  auto / best fixed ({best}): {ratio:.3f} by medians, {least:.3f} by minima; "
          f"auto / 1: {medians[None] / medians[1]:.3f}  -> {'OK' if ratio <= 1.05 else 'MISSED'} (at most 1.05)\n",
          flush=True)
    return ratio


def main(arguments):
    n = int(arguments[arguments.index("-n") + 1]) if "-n" in arguments else mirai.cpu_count()
    rounds = int(arguments[arguments.index("-r") + 1]) if "-r" in arguments else None
    chosen = [a for a in arguments if a in ("tiny", "uneven")] or ["tiny", "uneven"]
    ratios = []
    if "tiny" in chosen:
        ratios.append(measure("100,000 items x*x", rounds or 5, n, range(100_000), square))
    if "uneven" in chosen:
        ratios.append(measure("200 items, three of 1 s, the others 1 ms", rounds or 2, n, range(200), uneven))
    return 0 if max(ratios) <= 1.05 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
