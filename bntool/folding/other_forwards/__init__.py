"""What a fold has to hold for beside the forward that was observed: other inputs, switches, the model's own fusing."""
