"""From a model to graphs that are ready to be written."""
