"""What a fleet consists of: the bodies of records, scans of datastores, selections and snapshots."""
