"""What a step costs: kernel times from profile bundles, interpolated and summed into integer nanoseconds."""
