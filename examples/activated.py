#!/usr/bin/env python3
"""Serves the sockets it is passed (LISTEN_FDS), whether they are of TCP or have a path: a line, and its answer.

Behind `bind = "master"` the master makes the sockets; by hand: `systemd-socket-activate -l /tmp/web.sock examples/activated.py`,
then `printf 'hello\\n' | nc -NU /tmp/web.sock`. Told to stop (SIGTERM) it accepts nothing more, finishes and ends.
"""

import os
import selectors
import signal
import socket
import threading
import time

# How long an answer takes.
DELAY = float(os.environ.get("ANSWER_AFTER", "0"))


def answer(connection):
    with connection, connection.makefile("rb") as lines:
        if line := lines.readline():
            time.sleep(DELAY)
            generation = os.environ.get("REUSEPORTD_GENERATION", "0")
            said = f"generation={generation} pid={os.getpid()} said={line.decode().strip()}\n"
            connection.sendall(said.encode())


def tell_ready():
    """READY=1, to whoever wants to know: the whole of sd_notify."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(b"READY=1", path.replace("@", "\0", 1) if path[0] == "@" else path)


def main():
    # From now on a signal is a byte to read: none comes between accept() and the answer.
    stop, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    waiting = selectors.DefaultSelector()
    waiting.register(stop, selectors.EVENT_READ)
    for number in range(3, 3 + int(os.environ["LISTEN_FDS"])):
        listener = socket.socket(fileno=number)
        # Others accept from it too: who is late finds nothing.
        listener.setblocking(False)
        waiting.register(listener, selectors.EVENT_READ)
    tell_ready()
    while True:
        for key, _ in waiting.select():
            if key.fileobj is stop:
                # What was accepted is answered before the process ends: threads are waited for.
                return
            try:
                connection, _ = key.fileobj.accept()
            except BlockingIOError:
                continue
            connection.setblocking(True)
            threading.Thread(target=answer, args=(connection,)).start()


main()
