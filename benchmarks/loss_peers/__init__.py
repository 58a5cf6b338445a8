"""One file per way to compute the loss. Each has ``KIND`` and ``make(problem)``.

``make`` gives a function without arguments that returns the loss of ``problem.hidden`` and
``problem.weight``, differentiable; it raises ``ImportError`` where the peer is not installed and
``Unsupported`` where it cannot run on this device.
"""
