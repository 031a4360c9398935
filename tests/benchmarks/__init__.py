"""How fast jobsys is, beside a floor measured on the same server in the same run: `bin/bench [drain|submit|latency]`."""
