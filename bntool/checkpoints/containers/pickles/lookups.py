"""Lookups by ``getattr`` in a pickle: protocols before 4 name methods and nested classes that way.

``getattr`` can also reach any code that there is. Where it is certain that a pickle only names attributes of classes,
they are listed in its place and judged like any other name.
"""

from __future__ import annotations

from bntool.checkpoints.containers.pickles.nodes import Global, Instance, Node, children, text_of
from bntool.checkpoints.containers.pickles.reading import Pickle

GETATTR = ("builtins.getattr", "__builtin__.getattr")
_SINGLE = (str, bytes, int, float, type(None))  # values with nothing inside


def resolve_lookups(pickle: Pickle) -> dict[str, bool] | None:
    """Return dotted names of the attributes that the pickle looks up, and whether it calls them.

    None where anything else is done with ``getattr``, or could be: an attribute that begins with an underscore, of
    something that is not named like a class, or computed; ``getattr`` itself as a value; objects that the pickle made
    and dropped again.
    """
    if not pickle.complete:
        return None
    found: dict[str, bool] = {}
    seen: set[int] = set()
    pending = [pickle.root]
    while pending:
        node = pending.pop()
        if isinstance(node, _SINGLE) or id(node) in seen:
            continue
        seen.add(id(node))
        if _is_getattr(node):
            return None
        inside = iter(children(node))
        if isinstance(node, Instance):
            if _is_lookup(node):
                name = _name_attribute(node)
                if name is None:
                    return None
                found.setdefault(name, False)
                next(inside)  # its constructor: getattr, in the one place where it may be
            elif _is_lookup(node.constructor):
                found[_name_attribute(node.constructor) or ""] = True
        pending.extend(inside)
    return found


def _is_getattr(node: Node) -> bool:
    return isinstance(node, Global) and node.path in GETATTR


def _is_lookup(node: Node) -> bool:
    return isinstance(node, Instance) and _is_getattr(node.constructor)


def _name_attribute(lookup: Instance) -> str | None:
    arguments = lookup.arguments
    if not isinstance(arguments, tuple) or len(arguments) != 2 or not isinstance(arguments[0], Global):
        return None
    owner, attribute = arguments[0], text_of(arguments[1])
    named_like_a_class = owner.name.rpartition(".")[2][:1].isupper()
    if not named_like_a_class or attribute is None or not attribute.isidentifier() or attribute.startswith("_"):
        return None
    return f"{owner.path}.{attribute}"
