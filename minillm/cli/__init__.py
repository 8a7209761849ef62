"""The command line: `main`, and a file for each larger subcommand.

May import every room; no room imports it.
"""
