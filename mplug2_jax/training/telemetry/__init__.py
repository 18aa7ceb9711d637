"""What a run writes about itself: metrics, events, goodput, throughput, profiles."""
