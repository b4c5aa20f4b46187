"""An accelerator for machines that have none: the code that is for GPUs runs on it."""
