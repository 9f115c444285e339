"""What makes profile bundles: sources of kernel times, the grids they are sampled on, and the writer."""
