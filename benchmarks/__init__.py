"""Speed of scoring and compaction against rivals and floors: `python -m benchmarks`.

Everything measured stands in one registry (`contenders`). All contenders of a size run in turn,
in a new order each round, so that a ratio compares neighbours in time; medians and quartiles of
those ratios are what is reported. A contender is measured only after its result was checked.
"""
