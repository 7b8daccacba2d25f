"""One file a subcommand. Each has `configure`, which adds its arguments to a parser, and `run`; see server/cli.py."""
