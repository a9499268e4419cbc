"""The demo: a small real data set, short pre-training, the three stages and their results."""

import logging

# the Trainer imports bitsandbytes if it is installed, which warns about a kernel that the demo does not use
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
