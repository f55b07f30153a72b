"""`make bench`: every benchmark, one table after the other."""

import sys

from tests.benchmarks import numerics, pipeline, shardfile

sys.argv = sys.argv[:1]
for benchmark in (shardfile, numerics, pipeline):
    benchmark.main()
