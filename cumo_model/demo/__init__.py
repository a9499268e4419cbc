"""The demo: real small data, tiny pre-training, the three stages and their figures."""

import logging

# where it is installed the Trainer imports it, and it warns of a kernel that nothing here asks for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
