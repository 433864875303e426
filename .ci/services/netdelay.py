"""netdelay.py DEVICE DEVICE MS: two TAP devices; what is read from one is written to the other so much later."""
import collections
import contextlib
import fcntl
import os
import select
import struct
import sys
import time


def tap(name):
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002))     # TUNSETIFF; IFF_TAP | IFF_NO_PI
    return fd


one, other = map(tap, sys.argv[1:3])
line = collections.deque()      # (when, where to, frame); the delay is the same for all, so they stay in order
while True:
    patience = max(0.0, line[0][0] - time.monotonic()) if line else None
    for fd in select.select([one, other], [], [], patience)[0]:
        with contextlib.suppress(OSError):      # it is not up yet
            line.append((time.monotonic() + float(sys.argv[3]) / 1000, other if fd == one else one, os.read(fd, 65536)))
    while line and line[0][0] <= time.monotonic():
        _, fd, frame = line.popleft()
        with contextlib.suppress(OSError):      # it is down, or full: lost, as on a wire
            os.write(fd, frame)
