"""`make bench`: every benchmark, one table after the other."""

import sys

from tests.benchmarks import numerics, pipeline, service, shardfile

sys.argv = sys.argv[:1]
for benchmark in (shardfile, numerics, pipeline, service):
    benchmark.main()
