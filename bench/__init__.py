"""Measurements. Each command's results go to `bench/results/`.

The GPU suite must run where little more than torch and triton is installed: it imports
`dpengine.kernels` and nothing else of the package.
"""

from dpengine.threads import sleep_soon

sleep_soon()  # as the commands do, before torch is loaded
