"""What a fleet consists of: record bodies, scans of datastores, selections and snapshots."""
