"""The ``torch`` source: a transformer block's layers with a rank's real shapes, timed with PyTorch."""
