"""migperf: benchmarks work on partitions of an accelerator and recommends a partition."""
