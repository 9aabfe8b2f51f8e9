"""What goes over the network at an averaging: flat buffers, number formats, exchanges."""
