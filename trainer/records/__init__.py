"""A run's directory: written while the ranks go, and read again by reports and replays."""
