"""Run folders, their records and logs."""
