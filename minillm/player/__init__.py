"""`<trace-player>`, a web component that plays a trace in a browser, and the page of the server that uses it.

Static files without a build step. The component: palette.js, replay.js, trace-player.js and .css. The page adds
index.html, feed.js, replicas.js, page.js and page.css.
May import `trace` and `errors`.
"""

from minillm import hand_on

__getattr__, __dir__, __all__ = hand_on(__name__, {"files": "FILES FOLDER save_html"})
