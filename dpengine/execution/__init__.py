"""How fast a pass runs, and in how much memory; nothing here can change a guarantee."""

from .passes import make_pass as make_pass
