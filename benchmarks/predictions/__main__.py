"""python -m benchmarks.predictions: predictions of every kernel of CuMo, written or compared."""

from benchmarks.predictions.layers import main

raise SystemExit(main())
