"""How good heads are: predicted from held-out accuracies, measured by running the engine, and reported."""
