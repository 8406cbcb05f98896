"""The torch decoder: the model in PyTorch, on any device that PyTorch has."""
