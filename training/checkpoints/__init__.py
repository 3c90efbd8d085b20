"""Checkpoints: format, saving, finding, retention, disks; and the export of one."""
