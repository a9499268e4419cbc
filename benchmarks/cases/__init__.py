"""What is timed: a bench_<stem>.py for each stem, and for layer and model; sizes and plain loops."""
