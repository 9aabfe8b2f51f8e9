"""Federated devices: their speeds and links, who takes part in which round, and the clock they would have shown."""
