"""How fast jobsys is, beside a floor and beside its peers, all on one server in one run: `bin/bench [NAME…] [--json] [--quick|--full]`.

One module a part: it has the part's `UNIT` and `measure(bench)`. The peers, below `peers/`, come from the extra `bench`.
"""
