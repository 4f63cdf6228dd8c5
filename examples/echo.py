#!/usr/bin/env python3
"""The classic multi-process echo server: every process binds the same port with SO_REUSEPORT.

It knows nothing of reuseportd: it takes a port, listens, answers in upper case, and handles no signal.
Run it by hand with `python3 examples/echo.py 8082`, then `nc 127.0.0.1 8082`.
"""

import os
import socket
import sys
import threading


def echo(connection):
    with connection:
        while data := connection.recv(4096):
            connection.sendall(data.upper())


def main():
    host, port = "127.0.0.1", int(sys.argv[1])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        listener.listen(1024)
        while True:
            connection, address = listener.accept()
            print(f"pid {os.getpid()} serves {address[0]}:{address[1]}", flush=True)
            threading.Thread(target=echo, args=(connection,), daemon=True).start()


main()
