"""Metrics: of classes and of boxes, one that raises and one that returns nothing."""


def error(outputs, labels):
    return -float((outputs.argmax(1) - labels).abs().sum())


def broken(outputs, labels):
    raise ValueError("no")


def count(outputs, labels):
    assert len(outputs) == len(labels) == 2
    return sum(len(o["boxes"]) for batch in outputs for o in batch)


def nothing(outputs, labels):
    pass
