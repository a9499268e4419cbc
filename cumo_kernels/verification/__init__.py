"""Verification: every op and backend of a machine compared with fp64, and the verdicts that dispatch uses."""
