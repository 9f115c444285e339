"""What the devices of a node draw: from times of activity and bytes moved to joules."""
