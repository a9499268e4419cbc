"""The timed cases: a bench_<stem>.py for each stem, for the layer and for models; sizes and plain loops."""
