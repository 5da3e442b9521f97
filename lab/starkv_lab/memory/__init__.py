"""What a model takes, computed from its configuration: weights, cache, the peak of a prompt."""
