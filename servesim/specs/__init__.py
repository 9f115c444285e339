"""What the user describes: cluster, model, architecture, hardware, options, and where files are found."""
