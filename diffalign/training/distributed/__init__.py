"""What several processes of one run need besides the step: launchers, sign of life, shared folders."""
