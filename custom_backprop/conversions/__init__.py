"""How an existing model is made to run ours: what :func:`custom_backprop.convert` is made of."""
