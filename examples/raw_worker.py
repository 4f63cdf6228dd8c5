#!/usr/bin/env python3
"""A worker that speaks the handover channel itself, without the SDK (crates/wire/README.md).

It echoes in upper case, one thread per connection. Needs a master: it reads REUSEPORTD_CHANNEL.
"""

import os
import select
import socket
import threading

CHANNEL = socket.socket(fileno=int(os.environ["REUSEPORTD_CHANNEL"]))
CHANNEL.set_inheritable(False)  # no child of ours may hold the channel open


def echo(connection):
    with connection:
        connection.setblocking(True)
        while data := connection.recv(4096):
            connection.sendall(data.upper())


def serve(connection):
    threading.Thread(target=echo, args=(connection,)).start()


def drain(listener):
    """Accepts until the queue is empty, then closes the listener; says how many that were."""
    count = 0
    listener.setblocking(False)
    with listener:
        while True:
            try:
                serve(listener.accept()[0])
                count += 1
            except BlockingIOError:
                return count
            except ConnectionAbortedError:
                pass  # this client has given up


def bind():
    """The sockets of REUSEPORTD_LISTEN by name: bound with SO_REUSEPORT, not listening."""
    sockets = {}
    for part in os.environ["REUSEPORTD_LISTEN"].split(";"):
        name, _, rest = part.partition("=")
        host, _, port = rest.removeprefix("tcp:").rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        sockets[name] = socket.socket(family, socket.SOCK_STREAM)
        sockets[name].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sockets[name].bind((host.strip("[]"), int(port)))
    return sockets


def order():
    """The next order and the sockets that came with it; no words when the master is gone."""
    try:
        data, fds, _, _ = socket.recv_fds(CHANNEL, 4096, 1)
    except ConnectionResetError:
        return [], []
    return data.decode().split(" ") if data else [], [socket.socket(fileno=fd) for fd in fds]


def main():
    listeners = bind()
    # Initialise here: `ready` promises that this worker can serve the moment it is told to.
    ready = " ".join(["ready", *listeners]).encode()
    socket.send_fds(CHANNEL, [ready], [listener.fileno() for listener in listeners.values()])
    serving, waiting_for = False, [CHANNEL]
    while True:
        readable, _, _ = select.select(waiting_for, [], [])
        for listener in readable:
            if listener is not CHANNEL:
                try:
                    serve(listener.accept()[0])
                except (BlockingIOError, ConnectionAbortedError):
                    pass
        if CHANNEL not in readable:
            continue
        words, attached = order()
        match words:
            case ["serve", *_]:
                serving = True
                for listener in listeners.values():
                    listener.setblocking(False)
                waiting_for = [CHANNEL, *listeners.values()]
            case ["stop", *_]:
                if serving:
                    for listener in listeners.values():
                        drain(listener)
                    CHANNEL.send(b"drained")
                return  # the interpreter exits when the last connection's thread has ended
            case ["take", name, *_] if attached:
                CHANNEL.send(f"taken {name} {drain(attached[0])}".encode())
            case []:
                if not serving:
                    return
                waiting_for.remove(CHANNEL)  # the master is gone: go on serving
            case ["unknown", *_]:
                pass
            case [verb, *_]:
                CHANNEL.send(f"unknown {verb}".encode())


main()
