"""Past one machine: the same recipes and methods on Flower's deployment engine.

    server.py   the server's half of a run: meets clients, sends tasks, waits for updates
    site.py     a client's half: its model, its data, what it keeps

Both speak in `Letter`s and know nothing of Flower, which carries them.
"""

from anyrank.flower.letter import Letter
from anyrank.flower.server import Clients, Post, play
from anyrank.flower.site import Site

__all__ = ["Clients", "Letter", "Post", "Site", "play"]
