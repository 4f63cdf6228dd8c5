"""A server as people write them: processes that share one listener without SO_REUSEPORT, and are slow to accept."""

import ctypes
import os
import signal
import socket
import sys
import time

ACCEPT_DELAY_S = 0.005
PR_SET_PDEATHSIG = 1


def listen(address):
    host, port = address.rsplit(":", 1)
    listener = socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if "REUSEPORT" in os.environ:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host.strip("[]"), int(port)))
    listener.listen(4096)
    return listener


def serve(seat, listener):
    # Nothing is left of it when a test fails.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    while True:
        connection, _ = listener.accept()
        time.sleep(ACCEPT_DELAY_S)
        with connection:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                more = connection.recv(4096)
                if not more:
                    break
                request += more
            body = f"generation=0 seat={seat} pid={os.getpid()}\n".encode()
            head = b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
            try:
                connection.sendall(head + body)
            except OSError:
                pass


def main():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    listeners = [listen(address) for address in sys.argv[2:]]
    children = []
    for seat in range(int(sys.argv[1])):
        child = os.fork()
        if child == 0:
            serve(seat, listeners[0])
        children.append(child)
    print("serves", flush=True)
    signal.sigwait([signal.SIGTERM])
    for child in children:
        os.kill(child, signal.SIGTERM)
    for child in children:
        os.waitpid(child, 0)


main()
