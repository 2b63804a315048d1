"""Who feeds whom: :class:`~bntool.graphs.graph.ModelGraph` from a live model, a file, an architecture or pairs."""
