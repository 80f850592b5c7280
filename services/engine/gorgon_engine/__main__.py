"""`python -m gorgon_engine`: the engine as a service, set up by `GORGON_ENGINE_*` in the environment."""

import sys

try:
    from gorgon_engine.server.serve import main

    main()
except KeyboardInterrupt:  # before the server has taken the signals
    sys.exit(130)
