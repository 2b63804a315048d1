"""What the verbs share to prove a result: outputs of two models, compared."""
