"""What compiled code and data sheets allow: no GPU is needed, nothing is timed."""
