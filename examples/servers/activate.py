"""Runs a program that serves a socket it is given (LISTEN_FDS), with one that is its own: activate.py HOST PORT PROGRAM…

SO_REUSEPORT lets the program's successor have one beside it. listen() is left to the program, so that nobody connects
before it can serve. The program replaces this process.
"""

import os
import socket
import sys

host, port, *command = sys.argv[1:]
listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind((host, int(port)))
# 3 is the first descriptor of the protocol, and may be this very one.
if listener.fileno() == 3:
    os.set_inheritable(3, True)
else:
    os.dup2(listener.fileno(), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execvp(command[0], command)
