"""The tools around the chapters: executing and canonicalising them, and making the reader's copies.

May import anything of minillm; nothing of minillm imports it except the command line.
"""
