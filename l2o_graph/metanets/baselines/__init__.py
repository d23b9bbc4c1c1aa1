"""What graph models are compared with."""
