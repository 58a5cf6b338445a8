"""What the sandbox benchmark measures us against, each run as its users run it.

A backend has either ``execute`` (blocking; a thread per request in flight) or ``submit`` (asyncio);
both take an ``ExecutionRequest`` and give an ``ExecutionResult`` of :mod:`thor_fast.types`.
"""
