"""Programs that torch wrote: TorchScript and torch.export."""
