"""Every op and backend of a machine compared with fp64, and what that proves to dispatch."""
