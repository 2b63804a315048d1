"""What torch.save writes: zip, legacy and tar files, pickled modules, arrays, distributed folders."""
