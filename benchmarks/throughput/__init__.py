"""The throughput suite: samples/s, waits and memory of a cluster, its scaling, and the cost model fitted to them."""
