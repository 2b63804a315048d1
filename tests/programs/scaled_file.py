"""Scale a tensor of SOURCE in a given view and add another; write TARGET and print the peak of memory in MiB."""

import sys

from bntool.checkpoints.application import apply_plan
from bntool.checkpoints.formats import open_checkpoint
from bntool.checkpoints.saving import save_checkpoint
from bntool.plan import AddTensor, Operation, Plan, Scaled, SetTensor, Values

source, target, *numbers = sys.argv[1:]
view = tuple(map(int, numbers))
steps = (
    SetTensor("a.weight", Scaled("a.weight", view, (0.5,) * view[1], (1, view[1], 1))),
    AddTensor("a.bias", Values((1.0,), (1,)), dtype="float32", after="a.weight"),
)
save_checkpoint(apply_plan(open_checkpoint(source), Plan(Operation.FOLD, steps=steps)), target)
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
