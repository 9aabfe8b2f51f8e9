"""Sends averages over the network: flat buffers, number formats, exchanges."""
