"""What a run leaves behind: records, CSV, heartbeat, summary."""
