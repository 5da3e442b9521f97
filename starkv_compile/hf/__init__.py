"""What is transformers' own: names, checkpoints, questions it asks."""
