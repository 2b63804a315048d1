"""A process that has imported what its third argument lists, and forks one for each program that it is asked to run.

It is asked by connections to a socket, whose number is the first argument, in JSON: to start a program, whose three
streams come along, which is answered by the number of the process; or to wait for a process, which is answered by its
exit code. A program ends as in a process of its own. The second argument is a pipe that is
closed when nobody else will connect.
"""

import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys


def become(command, folder, environment, streams):
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    signal.alarm(600)
    faulthandler.dump_traceback_later(590)  # says where it waits
    if "bntool.cli.progress" in sys.modules:  # as in conftest.py
        sys.modules["bntool.cli.progress"]._LOG_INTERVAL = 1e6
    sys.argv = command
    if sys.argv[0] == "-m":
        del sys.argv[0]
        sys.path[0] = os.getcwd()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


def accept(listening, needed):
    """A connection, in a fork of its own that imports nothing again; None in this one, when all of them have ended."""
    while True:
        ready, *_ = select.select([listening, needed], [], [])
        if listening not in ready:
            break
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            os.close(needed)
            return connection
        connection.close()
    listening.close()  # who comes too late is refused, and does not wait
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return None


def serve(asked):
    """Until nobody asks any more; in a fork, what it is to become."""
    while True:
        request, streams, *_ = socket.recv_fds(asked, 1 << 20, 3)
        if not request:
            return None
        request = json.loads(request)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                asked.close()
                return request | {"streams": streams}
            for stream in streams:
                os.close(stream)
        asked.send(json.dumps(answer).encode())


for name in sys.argv[3].split():
    importlib.import_module(name)
gc.freeze()  # else each fork copies all that is imported, when it looks for what to collect
connection = accept(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
fork = serve(connection) if connection is not None else None
if fork is None:
    os._exit(0)  # at its end a library may wait for a thread of its own, which a fork does not have
become(**fork)
