"""Measures the speed of scoring and compaction against rivals and floors: `python -m benchmarks`.

The registry `contenders` lists everything that is measured. All contenders of a size run one after
another, in a new order each round, so that a ratio compares neighbours in time. The report gives
medians and quartiles of those ratios. A contender is measured only after its result was checked.
"""
