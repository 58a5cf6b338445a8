"""A scripted engine that says something else under each seed, as sampling does."""

from __future__ import annotations

from thor_fast.engines.base import GenerateRequest
from thor_fast.engines.scripted import Script, ScriptedEngine


class ReseededEngine(ScriptedEngine):
    """A session plays its context's scripts in order, the next one whenever its seed changes.

    ``cuts``: where it was truncated. ``seeds``: those of the calls.
    """

    def __init__(self, prompt: tuple[int, ...], scripts: list[Script], **options) -> None:
        super().__init__({prompt: scripts[:1]}, **options)
        self.turns = scripts
        self.cuts: list[int] = []
        self.seeds: list[int] = []

    async def generate(self, request: GenerateRequest):
        fresh = not self.seeds or self.seeds[-1] != request.sampling.seed
        if fresh and self.seeds:
            session = self._open(request)
            session.script, session.played = self.turns[len(set(self.seeds))], []
        self.seeds.append(request.sampling.seed)
        async for chunk in super().generate(request):
            yield chunk

    async def truncate(self, session: str, at_token: int) -> None:
        self.cuts.append(at_token)
        await super().truncate(session, at_token)
