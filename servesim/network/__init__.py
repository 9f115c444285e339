"""How long ranks take to exchange data."""
