"""Models on disk: both layouts, conversion, assembly from parts, upcycling."""
