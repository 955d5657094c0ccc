import sys

from prefixd.cli import main

sys.exit(main())
