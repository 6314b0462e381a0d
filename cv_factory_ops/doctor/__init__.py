"""``cvf doctor``: whether everything is there that a run of a project will need, before anything is paid for."""
