"""Archives that hold a checkpoint beside what runs it: TorchServe's and NeMo's."""
