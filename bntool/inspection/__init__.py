"""What the layers of a checkpoint hold, and what is wrong with them."""
