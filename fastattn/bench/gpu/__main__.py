"""python -m fastattn.bench.gpu"""

from __future__ import annotations

import sys

from fastattn.bench.gpu import supervisor

if __name__ == "__main__":
    sys.exit(supervisor.main(sys.argv[1:]))
