"""Pages and plots of what commands found: one HTML file that needs no network, or images."""
