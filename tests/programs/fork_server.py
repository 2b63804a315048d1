"""A process that has imported torch, and forks one that runs a program for each that it is asked for.

Reads a line of JSON a request: a list of programs with their arguments, environment and the files that their streams
are. Answers with the list of their exit codes. Each ends as a process of its own does.
"""

import json
import os
import runpy
import signal
import sys

import torch._dynamo  # noqa: F401 which DistributedDataParallel imports when it is made

import bntool

bntool.recalibrate, bntool.freeze  # noqa: B018 imported when they are asked for


def become(launch):
    os.environ.clear()
    os.environ.update(launch["environment"])
    for stream, name in enumerate(("input", "output", "errors")):
        file = os.open(launch[name], os.O_RDONLY if stream == 0 else os.O_WRONLY)
        os.dup2(file, stream)
        os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    signal.alarm(launch["seconds"])
    sys.argv = [launch["program"], *launch["arguments"]]
    sys.path[0] = os.path.dirname(launch["program"])
    runpy.run_path(launch["program"], run_name="__main__")


def serve():
    for line in sys.stdin:
        children = []
        for launch in json.loads(line):
            child = os.fork()
            if child == 0:
                return launch
            children.append(child)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
    return None


launch = serve()
if launch is not None:
    become(launch)
