"""`python -m kfac_onnx`: the command line without the console script."""

import sys

from kfac_onnx.cli.main import main

sys.exit(main())
