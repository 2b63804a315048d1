"""Channel transforms: folds of BatchNorms that no single neighbour can take.

To read in this order: ``operations.py`` says what each operation lets pass, ``roles.py`` what each node does with that,
``unknowns.py`` how equations are solved (``scales.py`` and ``shifts.py`` add signs and sums), ``channel_transforms.py``
which equations a graph asks for and what disappears, ``solution.py`` how every tensor is stored then,
``storing_otherwise.py`` which BatchNorms are tried and what becomes of weights, ``targets.py`` who can take something,
and ``takers.py`` who did. ``branches.py``, ``padding_values.py`` and ``aliasing.py`` stand for themselves.
"""
