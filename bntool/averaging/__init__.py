"""The weights of several checkpoints averaged, and running statistics that go with them."""
