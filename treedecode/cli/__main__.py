"""`python -m treedecode.cli`: the `treedecode` command."""

from treedecode.cli.main import main

raise SystemExit(main())
