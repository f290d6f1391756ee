"""The exit codes of a job: what a farm does next depends on nothing else."""

DONE = 0
MISTAKEN = 2
"""a user's mistake: no retry mends it"""
FAILED = 3
"""a failure, such as a rank that is gone"""
STOPPED = 75
"""told to stop, and stopped: EX_TEMPFAIL of sysexits.h, try again"""
