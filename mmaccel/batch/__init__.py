"""`mmaccel batch`: thousands of jobs from a file, on one machine or a cluster, each done once or reported."""
