"""Exit 0 if the server in this container answers a path with 200, else 1 and say why.

Usage: ``healthcheck.py /livez``. The images have no curl, and this needs nothing but Python.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_S = 4.0  # below the timeout of every health check that runs this


def main(path: str) -> int:
    """Ask the local server for `path` and return the exit status."""
    url = f"http://127.0.0.1:{os.environ.get('PREFIXD_PORT', '8000')}{path}"
    # A proxy meant for model downloads must not be asked for the loopback address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            print(f"GET {path}: {answer.status}")
            return 0
    except urllib.error.HTTPError as error:
        print(f"GET {path}: {error.code} {error.read(200).decode(errors='replace')}")
    except OSError as error:
        print(f"GET {path}: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
