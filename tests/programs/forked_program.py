"""A Python program for a shell that a test starts, run by ``fork_server``, whose socket is the first argument."""

import json
import os
import socket
import sys

server = socket.socket(fileno=int(sys.argv[1]))
request = {"command": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
started = json.loads(server.recv(1 << 10))
server.send(json.dumps({"wait": started}).encode())
sys.exit(json.loads(server.recv(1 << 10)))
