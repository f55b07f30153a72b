"""What every request passes: limits, authentication, logs."""
