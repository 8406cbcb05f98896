"""`fastgen bench`: what a model gives on this machine, against its limits and against peers."""
