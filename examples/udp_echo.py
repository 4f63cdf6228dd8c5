#!/usr/bin/env python3
"""A multi-process UDP echo server: every process binds the same port with SO_REUSEPORT.

It knows nothing of reuseportd: it takes a port, answers each datagram with `GENERATION SEAT PID ` before it, tells
systemd's way that it is ready (READY=1 to NOTIFY_SOCKET), and on SIGTERM answers what waits in its socket and ends.
Run it by hand with `python3 examples/udp_echo.py 8086`, then `nc -u 127.0.0.1 8086`. Under a master:

    [app]
    command = ["python3", "examples/udp_echo.py", "{port.default}"]

    [[listen]]
    protocol = "udp"
    address = "127.0.0.1:8086"
"""

import os
import select
import signal
import socket
import sys

GENERATION, SEAT = (os.environ.get("REUSEPORTD_" + name, "0") for name in ("GENERATION", "SEAT"))
WHO = f"{GENERATION} {SEAT} {os.getpid()}"


def notify_ready():
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as master:
            master.connect("\0" + path[1:] if path.startswith("@") else path)
            master.send(b"READY=1")


def answer(listener):
    """Whether there was a datagram to answer."""
    try:
        datagram, peer = listener.recvfrom(65535)
        listener.sendto(WHO.encode() + b" " + datagram, peer)
        return True
    except BlockingIOError:
        return False


def main():
    stopped, stop = os.pipe()
    os.set_blocking(stop, False)
    signal.set_wakeup_fd(stop)
    signal.signal(signal.SIGTERM, lambda *_: None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", int(sys.argv[1])))
        notify_ready()
        while True:
            readable, _, _ = select.select([listener, stopped], [], [])
            if listener in readable:
                answer(listener)
            if stopped in readable:
                while answer(listener):
                    pass
                return  # nothing waits any more: what waits in a UDP socket when it is closed is lost


main()
