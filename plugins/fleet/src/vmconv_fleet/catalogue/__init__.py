"""Record bodies, scans of datastores, selections and snapshots."""
