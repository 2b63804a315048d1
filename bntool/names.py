"""Dotted names of modules and tensors, as ``named_modules()`` and ``state_dict()`` give them."""

from __future__ import annotations


def join_name(module: str, inner: str) -> str:
    """Return the name of a tensor or module inside a module; the root is "" and adds nothing."""
    return f"{module}.{inner}" if module else inner


def add_prefix(path: str, prefix: str) -> str:
    """Return the path of a module with what wrappers put before it; "" is the wrapped model itself.

    Args:
        prefix: with its last dot, as ``module.``; "" for none.
    """
    return (prefix + path).removesuffix(".")


def remove_prefix(path: str, prefix: str) -> str:
    """Return the path of a module without what wrappers put before it, "" for the wrapped model; see
    :func:`add_prefix`.
    """
    return f"{path}.".removeprefix(prefix).removesuffix(".")
