"""Measuring a bundle shot by shot, whoever holds the watch: grids, resumable tables, skew fit, progress."""
