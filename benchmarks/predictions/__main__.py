"""python -m benchmarks.predictions: predict every kernel of CuMo, and write or compare the result."""

from benchmarks.predictions.layers import main

raise SystemExit(main())
