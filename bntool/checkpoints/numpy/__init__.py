"""Archives of arrays that ``numpy.savez`` writes."""
