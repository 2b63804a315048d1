"""Files as :class:`~bntool.checkpoints.checkpoint.Checkpoint` values and back: reading safely, rewriting without loss.

Imports neither torch nor numpy to list a file. A new format is one file here and one line in
:data:`bntool.checkpoints.formats.FORMATS`.
"""
